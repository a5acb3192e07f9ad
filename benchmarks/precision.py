"""What bf16 inference and smaller stored descriptors do to the scores of a finished demo run.

    python benchmarks/precision.py RUN [--precision fp32 bf16] [--dtypes float32 float16 int8 bit]

RUN is a run folder in which notebooks 01 to 03 have finished; nothing is written there. Global
descriptors, short lists and local features are made anew in each precision with the demo's
settings; the features are extracted once in float32 and stored again in every type.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vitgal import runs
from vitgal.data import revisited
from vitgal.features import store
from vitgal.settings import (
    GlobalSettings,
    LocalSettings,
    MachineSettings,
    MatchingSettings,
    RerankingSettings,
)
from vitgal.stages import describe as stages_describe, extract, rerank

DEMO = "demo"


def describe(source: Path, run: Path, precision: str) -> None:
    """Runs the stages of notebooks 04 and 05 with the demo's settings, in another folder."""
    dataset = revisited.open_dataset(DEMO, source / "data" / "benchmark")
    model = source / "autoencoder" / "model.safetensors"
    machine = MachineSettings(threads=1)
    settings = GlobalSettings(
        size=224, resize="area", scales=(0.5, 0.7071, 1.0), precision=precision
    )
    stages_describe.evaluate_global(run, dataset, settings, machine, model=model)
    local = LocalSettings(size=320, dtype="float32", precision=precision)
    extract.extract_shortlist(run, dataset, local, machine, model=model)


def stored_as(run: Path, source: Path, dtype: str) -> None:
    """Writes the same run with its features in another type."""
    (run / DEMO).mkdir(parents=True)
    (run / DEMO / "global").symlink_to(source / DEMO / "global")
    features = store.FeatureStore.open(source / DEMO / "local")
    folder = run / DEMO / "local"
    shard = store.shard_folder(folder, 0, 1)
    store.write_shard(shard, features.items(), store.ShardFormat(dtype))
    store.write_index(folder)
    stage = runs.read_json(source / DEMO / "local" / "stage.json")
    runs.write_json(folder / "stage.json", stage)


def size(run: Path) -> float:
    """Returns the kilobytes of features an image, everything included."""
    folder = run / DEMO / "local"
    files = [path for path in folder.rglob("*.*") if path.is_file() and path.name != "stage.json"]
    return sum(path.stat().st_size for path in files) / len(store.FeatureStore.open(folder)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "int8", "bit"])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print("mAP Medium, Hard: global | reranked | reranked, published short list | kB an image")
    benchmark = options.run / "data" / "benchmark"
    truth = revisited.load_ground_truth(benchmark / f"gnd_{DEMO}.pkl")
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precision:
            source = Path(folder) / precision
            describe(options.run.absolute(), source, precision)
            for dtype in options.dtypes:
                run = Path(folder) / f"{precision}-{dtype}"
                stored_as(run, source, dtype)
                stage = rerank.rerank_shortlist(
                    run,
                    truth,
                    RerankingSettings(matching=MatchingSettings(max_distance=0.95)),
                    MachineSettings(workers=options.workers),
                )
                scores = runs.read_json(stage / "scores.json")
                cells = [
                    "  ".join(f"{100 * system[name]['map']:6.2f}" for name in ("medium", "hard"))
                    for system in (scores["global"], scores, scores["published"])
                ]
                line = " | ".join([*cells, f"{size(run):7.1f}"])
                print(f"{precision}, stored as {dtype:8}{line}", flush=True)


if __name__ == "__main__":
    main()
