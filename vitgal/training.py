"""Training: the retrieval model with ArcFace (notebook 02), the autoencoder on its tokens (03).

Both fits are one loop (`trainer`) over the images of a split (`training_data`, `augmentation`) by
one recipe (`recipe`). What these modules offer to notebooks and scripts can be had from here.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState, PartialState

from vitgal import images, landmarks, runs, weights
from vitgal.augmentation import (
    augment_fast,
    augment_published,
    displayable,
    normalised,
    squashed,
)
from vitgal.model import ArcFace, LinearClassifier, ViTGaL, build_model
from vitgal.recipe import (
    Recipe,
    TrainingError,
    learning_rates,
    resolve_precision,
)
from vitgal.trainer import AutoencoderNetwork, Progress, RetrievalNetwork, Trainer
from vitgal.training_data import Batches, SplitData, TrainingImages, read_data

__all__ = [
    "AutoencoderNetwork",
    "Batches",
    "Progress",
    "Recipe",
    "RetrievalNetwork",
    "SplitData",
    "Trainer",
    "TrainingError",
    "TrainingImages",
    "augment_fast",
    "augment_published",
    "displayable",
    "fit_autoencoder",
    "fit_retrieval",
    "learning_rates",
    "lost_variance",
    "normalised",
    "parameter_table",
    "read_data",
    "read_log",
    "resolve_precision",
    "same_backbone",
    "schedule_table",
    "split_inputs",
    "squashed",
    "token_maps",
    "validation_photographs",
]


def fit_retrieval(
    run: Path,
    *,
    image_folder: Path,
    architecture: str = "xcit_small_12_p16_224",
    initial_weights: Path | None = None,
    recipe: Recipe | None = None,
    drop_path: float = 0.1,
    margin: float = 0.15,
    scale: float = 30.0,
    overwrite: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> Path:
    """Trains the retrieval model with ArcFace on `<run>/split`; returns `<run>/retrieval`.

    Writes model.safetensors (backbone and multi-atrous head, no classifier), log.jsonl (a row every
    50 steps and at each epoch's end) and state/ (to resume from, with the classifier). A finished
    stage returns at once, an interrupted one continues from its last state.

    Args:
        image_folder: what the paths of the split are relative to.
        initial_weights: ImageNet XCiT weights; None starts from random ones.
        margin: ArcFace's angular margin in radians; published code 0.15, paper 0.1.
        watch: called with the log so far after each epoch (one process only).
    Raises:
        TrainingError: too few images, a loss that is not finite, too many unreadable images.

    Source: ViTGaL section 4, and the published training code where the two differ.
    """
    recipe = recipe or Recipe()
    split = run / "split"
    inputs = split_inputs(split)
    if initial_weights is not None:
        inputs["initial_weights"] = runs.fingerprint_file(initial_weights)
    parameters = recipe.affecting() | {
        "architecture": architecture,
        "drop_path": drop_path,
        "margin": margin,
        "scale": scale,
    }
    with runs.stage(
        run / "retrieval", "retrieval", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if not stage.finished:
            build = functools.partial(
                _retrieval_network, architecture, initial_weights, drop_path, margin, scale
            )
            _launch(build, recipe, stage.folder, split, image_folder, watch, progress)
            stage.finish(["model.safetensors", "log.jsonl"], **_recorded(recipe))
    return run / "retrieval"


def fit_autoencoder(
    run: Path,
    *,
    image_folder: Path,
    source: Path | None = None,
    code_dim: int = 128,
    reconstruction_weight: float = 10.0,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> Path:
    """Trains the autoencoder on the frozen retrieval model; returns `<run>/autoencoder`.

    Writes the complete model (backbone and autoencoder) as model.safetensors, log.jsonl and state/;
    the backbone's tensors stay bit-identical. Resumes and returns as `fit_retrieval` does.

    Args:
        source: the retrieval model; None takes `<run>/retrieval/model.safetensors`.
        code_dim: length of a local descriptor; published 128 where the tokens have 384.
        reconstruction_weight: of the mean squared error beside the cross-entropy; published 10.
    """
    recipe = recipe or Recipe(epochs=25)
    split = run / "split"
    if source is None:
        runs.read_stage(run / "retrieval", "notebook 02_train")
        source = run / "retrieval" / "model.safetensors"
    inputs = split_inputs(split) | {"weights": runs.fingerprint_file(source)}
    parameters = recipe.affecting() | {
        "code_dim": code_dim,
        "reconstruction_weight": reconstruction_weight,
    }
    with runs.stage(
        run / "autoencoder",
        "autoencoder",
        parameters=parameters,
        inputs=inputs,
        overwrite=overwrite,
    ) as stage:
        if not stage.finished:
            build = functools.partial(_autoencoder_network, source, code_dim, reconstruction_weight)
            _launch(build, recipe, stage.folder, split, image_folder, watch, progress)
            stage.finish(["model.safetensors", "log.jsonl"], **_recorded(recipe))
    return run / "autoencoder"


def split_inputs(split: Path) -> dict[str, str]:
    """Fingerprints of the split that training depends on, from its manifest."""
    return {
        name: runs.output_fingerprint(split, f"{name}.csv", "notebook 01_data_split")
        for name in ("train", "val", "val_retrieval")
    }


def read_log(folder: Path) -> pd.DataFrame:
    """A fit's log.jsonl as a table, a row every 50 steps and at each epoch's end."""
    runs.read_stage(folder, "the notebook that trains it")
    return pd.read_json(folder / "log.jsonl", lines=True)


def _retrieval_network(
    architecture: str,
    initial_weights: Path | None,
    drop_path: float,
    margin: float,
    scale: float,
    classes: int,
    seed: int,
) -> RetrievalNetwork:
    model = build_model(architecture, seed=seed, drop_path=drop_path)
    if initial_weights is not None:
        weights.initial_weights(model, initial_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ArcFace(model.embed_dim, classes, margin, scale)
    return RetrievalNetwork(model, head)


def _autoencoder_network(
    source: Path, code_dim: int, reconstruction_weight: float, classes: int, seed: int
) -> AutoencoderNetwork:
    model = weights.load_model(source).attach_autoencoder(code_dim, seed=seed).freeze_backbone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = LinearClassifier(model.embed_dim, classes)
    return AutoencoderNetwork(model, classifier, reconstruction_weight)


def _launch(build: Callable, recipe: Recipe, *arguments) -> None:
    """Runs the fit here, or in `num_processes` forked processes that accelerate joins."""
    if PartialState._shared_state:
        raise TrainingError(
            "accelerate was already started in this process; restart the kernel and run the "
            "training cell once"
        )
    if recipe.num_processes == 1:
        try:
            _fit(build, recipe, *arguments)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    else:
        notebook_launcher(_fit, (build, recipe, *arguments), num_processes=recipe.num_processes)


def _fit(
    build: Callable,
    recipe: Recipe,
    folder: Path,
    split: Path,
    image_folder: Path,
    watch: Callable[[pd.DataFrame], None] | None,
    show: bool,
) -> None:
    """One process's fit: trains, and on rank 0 writes the model."""
    data = read_data(split, image_folder, recipe)
    trainer = Trainer(build(classes=data.classes, seed=recipe.seed), recipe, folder, data)
    trainer.load_state()
    trainer.run(watch, show)
    if trainer.accelerator.is_main_process:
        network = trainer.accelerator.unwrap_model(trainer.network)
        weights.save_model(network.model, folder / "model.safetensors")
    trainer.accelerator.end_training()


def _recorded(recipe: Recipe) -> dict:
    return {
        "device": "cuda" if torch.cuda.device_count() else "cpu",
        "data_workers": recipe.data_workers,
        "processes": recipe.num_processes,
    }


# What notebooks 02 and 03 show


def schedule_table(recipe: Recipe) -> pd.DataFrame:
    """The learning rate of each epoch as a log: columns step (the epoch) and lr."""
    rates = learning_rates(recipe)
    return pd.DataFrame({"step": range(len(rates)), "lr": rates})


def parameter_table(model: ViTGaL) -> pd.DataFrame:
    """Parameters of each part of the network: columns part, parameters, share."""
    backbone = model.backbone
    parts = {
        "patch embedding": (backbone.patch_embed, backbone.pos_embed),
        "XCiT blocks": (backbone.blocks,),
        "multi-atrous block": (model.local_atrous,),
        "class attention": (backbone.cls_attn_blocks, backbone.norm),
    }
    if model.autoencoder is not None:
        parts["autoencoder"] = (model.autoencoder,)
    counts = [
        sum(parameter.numel() for module in modules for parameter in module.parameters())
        for modules in parts.values()
    ]
    shares = [f"{100 * count / sum(counts):.0f} %" for count in counts]
    return pd.DataFrame({"part": list(parts), "parameters": counts, "share": shares})


def validation_photographs(split: Path, image_folder: Path, *, count: int) -> list[np.ndarray]:
    """`count` validation images, (H, W, 3) uint8 RGB each, spread evenly over their list."""
    paths = landmarks.read_split(split, "val")["path"].tolist()
    chosen = np.linspace(0, len(paths) - 1, num=min(count, len(paths)), dtype=int)
    return [images.read_image(Path(image_folder) / paths[index]) for index in chosen]


@torch.no_grad()
def token_maps(
    model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int
) -> dict[str, list[np.ndarray]]:
    """Per photograph (h, w) maps: the codes' reconstruction error, and attention before and after.

    Args:
        photographs: (H, W, 3) uint8 RGB; each is squashed to `size` x `size` pixels.
    Returns:
        "error": mean squared difference of tokens and decoded tokens; "backbone_attention" and
        "attention": the means over heads of the two class attentions.
    """
    maps: dict[str, list[np.ndarray]] = {"error": [], "backbone_attention": [], "attention": []}
    for photograph in photographs:
        found = model.token_features(squashed(photograph, size)[None])
        maps["error"].append((found.decoded - found.tokens).square().mean(2)[0])
        maps["backbone_attention"].append(found.backbone_attention.mean(1)[0])
        maps["attention"].append(found.attention.mean(1)[0])
    grid = (size // 16, size // 16)
    return {key: [one.reshape(grid).numpy() for one in value] for key, value in maps.items()}


@torch.no_grad()
def lost_variance(model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int) -> float:
    """The share of the tokens' variance that the autoencoder loses: 0 is perfect, 1 the mean token.

    photographs: (H, W, 3) uint8 RGB, each squashed to `size` x `size` pixels.
    """
    found = [model.token_features(squashed(photograph, size)[None]) for photograph in photographs]
    tokens = torch.cat([one.tokens[0] for one in found])
    decoded = torch.cat([one.decoded[0] for one in found])
    return float((decoded - tokens).square().sum() / (tokens - tokens.mean(0)).square().sum())


def same_backbone(model: ViTGaL, source: Path) -> bool:
    """Whether every tensor of the model but its autoencoder's is, bit for bit, that of `source`."""
    other = weights.load_model(source).state_dict()
    return all(
        torch.equal(value, other[key])
        for key, value in model.state_dict().items()
        if not key.startswith("autoencoder.")
    )
