"""Does the autoencoder earn its place? Its codes beside a PCA of the same tokens and length.

Local features of a finished demo run are extracted again with other codes. Attention, keypoints
and thresholds stay the autoencoder's, but for the last variant, which does without one. The PCA is
fitted to tokens of every fifth training photograph. With `--tune`, `max_distance` and
`fused_weight` are chosen for each variant on all queries of val_retrieval; otherwise they are the
run's. It works in a copy of the run.

    python benchmarks/pca_codes.py RUN SCRATCH [--tune] [--only PCA]
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.decomposition import PCA

from vitgal import data, evaluation, models, runs, stages, training
from vitgal.data.revisited import PROTOCOLS
from vitgal.models.network import TokenCodes, ViTGaL
from vitgal.settings import (
    LocalSettings,
    MachineSettings,
    RerankingSettings,
    TuningSettings,
)

GRID = TuningSettings(
    tune=True,
    max_distances=(0.5, 0.7, 0.82, 1.1),
    thresholds=(),
    tops=(),
    matchings=(),
    counts=(),
    orders=(),
    weights=(1.0, 2.0, 4.0),
    caps=(),
)
Project = Callable[[torch.Tensor], torch.Tensor]


def with_codes(project: Project, *, backbone_attention: bool) -> Callable:
    """Returns a `token_codes` for ViTGaL that projects tokens (B, N, D) itself."""

    def token_codes(model: ViTGaL, images: torch.Tensor) -> TokenCodes:
        features = model.token_features(images)
        attention = features.backbone_attention if backbone_attention else features.attention
        return TokenCodes(features.grid, project(features.tokens.float()), attention)

    return token_codes


def projections(run: Path, model: ViTGaL, size: int) -> dict[str, Project]:
    """Fits the PCA; returns a projection (..., D) -> (..., code_dim) for each variant."""
    paths = data.read_split(run / "split", "train")["path"][::5]
    photographs = [data.read_image(run / "data" / "train" / path) for path in paths]
    tokens = training.photograph_tokens(model, photographs, size=size)
    pca = PCA(model.code_dim, svd_solver="full").fit(tokens)
    mean, rows = (torch.from_numpy(part.astype("float32")) for part in (pca.mean_, pca.components_))
    deviations = torch.from_numpy(pca.explained_variance_.astype("float32")).sqrt()
    print(f"PCA of {len(tokens):,} tokens: {pca.explained_variance_ratio_.sum():.1%} of variance")
    return {
        "PCA": lambda part: (part - mean) @ rows.T,
        "PCA, whitened": lambda part: (part - mean) @ rows.T / deviations,
    }


def tuned(
    run: Path, weights: Path, demo: RerankingSettings, machine: MachineSettings
) -> RerankingSettings:
    """Returns the reranking settings that all queries of val_retrieval choose from GRID."""
    validation = stages.prepare_validation(
        run,
        machine,
        like="demo",
        model=weights,
        image_folder=run / "data" / "train",
        overwrite=True,
    )
    folder = stages.tune(run, validation.ground_truth, GRID, demo, machine, overwrite=True)
    grid = evaluation.Tuning.read(folder)
    chosen = grid.values(grid.chosen)
    matching = replace(demo.matching, max_distance=chosen["max_distance"])
    return replace(demo, matching=matching, fused_weight=chosen["fused_weight"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", action="append", help="a variant by name; may be repeated")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    run = shutil.copytree(options.run, options.scratch / "run")
    weights = run / "autoencoder" / "model.safetensors"
    benchmark = data.open_dataset("demo", run / "data" / "benchmark")
    machine = MachineSettings()
    local = LocalSettings.from_manifest(
        runs.read_stage(run / "demo" / "local", "05_local_extraction")["parameters"]
    )
    demo = RerankingSettings.from_manifest(
        runs.read_stage(run / "demo" / "rerank", "06_rerank")["parameters"]
    )
    fitted = projections(run, models.load_model(weights), size=160)
    variants: dict[str, Callable] = {"autoencoder": ViTGaL.token_codes} | {
        name: with_codes(project, backbone_attention=False) for name, project in fitted.items()
    }
    variants["PCA, the backbone's attention"] = with_codes(fitted["PCA"], backbone_attention=True)
    reference = runs.read_json(run / "demo" / "rerank" / "scores.json")
    for name in options.only or variants:
        ViTGaL.token_codes = variants[name]
        stages.extract_shortlist(run, benchmark, local, machine, model=weights, overwrite=True)
        settings = tuned(run, weights, demo, machine) if options.tune else demo
        folder = stages.rerank_shortlist(
            run, benchmark.ground_truth, settings, machine, overwrite=True
        )
        scores = runs.read_json(folder / "scores.json")
        means = [f"{100 * scores[part]['map']:.1f}" for part in PROTOCOLS]
        print(name, settings.matching.max_distance, settings.fused_weight, *means, sep=" | ")
        compared = evaluation.compare_results(scores, reference, names=(name, "the run"))
        print(*(compared.sentence(part) for part in ("medium", "hard")), sep="\n", flush=True)


if __name__ == "__main__":
    main()
