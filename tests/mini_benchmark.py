"""A benchmark of six small images and two queries, and its stages with small settings."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vitgal import runs
from vitgal.data import revisited
from vitgal.runs.stage_folder import STAMPS
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings
from vitgal.stages.describe import evaluate_global
from vitgal.stages.extract import extract_shortlist

TOP = Path(__file__).resolve().parents[1]
NANO = "xcit_nano_12_p16_224"
SHAPES = [(96, 128), (128, 96), (96, 128), (80, 160), (128, 128)]
MACHINE = MachineSettings(batch_size=2, local_batch_size=2, threads=1, read_threads=1)
GLOBAL = GlobalSettings(size=64, top=2, max_failed_share=0)
LOCAL = LocalSettings(
    size=64, shard_size=3, max_failed_share=0, max_keypoints=9, scales=(0.7071, 1.0)
)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth random image (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write_benchmark(folder: Path, images: int = 6) -> Path:
    """Writes the benchmark `mini`: query q is image 3 q, described within a box."""
    (folder / "jpg").mkdir(parents=True)
    database = [f"image{i}" for i in range(images)]
    for i, name in enumerate(database):
        photo = noise(*SHAPES[i % len(SHAPES)], seed=i)
        assert cv2.imwrite(str(folder / f"jpg/{name}.jpg"), photo)
    for i in range(2):
        photo = cv2.imread(str(folder / f"jpg/image{3 * i}.jpg"))
        assert cv2.imwrite(str(folder / f"jpg/query{i}.jpg"), photo)
    truth = revisited.GroundTruth(
        name="mini",
        database=database,
        queries=["query0", "query1"],
        boxes=np.array([[0, 0, 128, 96], [8.5, 4, 150, 76]]),
        easy=[np.array([0]), np.array([3])],
        hard=[np.array([2]), np.array([], np.int64)],
        junk=[np.array([5]), np.array([1])],
    )
    revisited.write_ground_truth(folder / "gnd_mini.pkl", truth)
    return folder


def evaluate(
    run: Path, benchmark: Path, model: Path | str, distractors: Path | None = None, **changed: Any
) -> Path:
    """Runs the global stage; `changed` are settings of any section or options of the stage."""
    dataset = revisited.open_dataset("mini", benchmark, distractors=distractors)
    settings, machine, options = _divided(GLOBAL, changed)
    return evaluate_global(run, dataset, settings, machine, model=model, **options)


def extract(run: Path, benchmark: Path, model: Path | str, **changed: Any) -> Path:
    """Runs the local stage; `changed` as for `evaluate`."""
    dataset = revisited.open_dataset("mini", benchmark)
    settings, machine, options = _divided(LOCAL, changed)
    return extract_shortlist(run, dataset, settings, machine, model=model, **options)


def _divided(settings: Any, changed: dict) -> tuple[Any, MachineSettings, dict]:
    def taken(section: Any) -> Any:
        names = [field.name for field in dataclasses.fields(section) if field.name in options]
        return dataclasses.replace(section, **{name: options.pop(name) for name in names})

    options = dict(changed)
    return taken(settings), taken(MACHINE), options


def interrupt(folder: Path) -> None:
    """Leaves a stage as a kill before its end does: settings, but no manifest."""
    manifest = runs.read_json(folder / runs.MANIFEST)
    settings = {key: manifest[key] for key in ("format", "stage", "parameters", "inputs")}
    runs.write_json(folder / runs.STARTED, settings)
    (folder / runs.MANIFEST).unlink()


def contents(folder: Path) -> dict[str, bytes]:
    """Every result file of a stage; the manifest and the stamps beside it hold times."""
    skipped = (runs.MANIFEST, runs.LOCK, STAMPS)
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(skipped))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
