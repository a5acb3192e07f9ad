"""A small real run with names that would break a page: ranked, described by hand, reranked."""

from pathlib import Path

import cv2
import numpy as np

from vitgal import runs
from vitgal.data import revisited
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.settings import GlobalSettings, MachineSettings, MatchingSettings, RerankingSettings
from vitgal.stages.describe import evaluate_descriptors
from vitgal.stages.rerank import rerank_shortlist

INPUTS = {"weights": "none"}
SHIFT = (10.0, 6.0)  # of the features of a positive image, in pixels of the network's input
# Easy, hard, junk and three negatives of query 0; query 1 has image 3 alone.
DATABASE = ["easy", "<img src=x onerror=window.bad=1>", '&lt;"junk"', "قصر", "e", "🏰 'f'"]
QUERIES = ["query", "other"]
SIMILARITIES = np.array([[0.5, 0.2, 0.6, 0.9, 0.4, 0.3], [0.1, 0.2, 0.3, 0.8, 0.5, 0.4]])


def write_run(folder: Path) -> Path:
    """Writes `<folder>/data` and the run `<folder>/run`, and returns the run."""
    truth = revisited.GroundTruth(
        name="tiny",
        database=DATABASE,
        queries=QUERIES,
        boxes=np.array([[8.0, 0, 128, 96], [0, 0, 128, 96]]),
        easy=[np.array([0]), np.array([3])],
        hard=[np.array([1]), np.array([], int)],
        junk=[np.array([2]), np.array([], int)],
    )
    data = folder / "data"
    (data / "jpg").mkdir(parents=True)
    for seed, name in enumerate([*QUERIES, *DATABASE]):
        small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
        image = cv2.resize(small, (128, 96), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(data / "jpg" / f"{name}.jpg"), image)
    revisited.write_ground_truth(data / "gnd_tiny.pkl", truth)
    dataset = revisited.open_dataset("tiny", data)
    run = folder / "run"
    np.save(folder / "descriptors.npy", _descriptors())
    (folder / "descriptors.txt").write_text("\n".join([*QUERIES, *DATABASE]), encoding="utf-8")
    evaluate_descriptors(
        run, dataset, GlobalSettings(top=6), descriptors=folder / "descriptors.npy"
    )
    items = [(name, _features(name)) for name in sorted([*QUERIES, *DATABASE])]
    with runs.stage(run / "tiny" / "local", "local", parameters={}, inputs=INPUTS) as stage:
        store.write_shard(stage.folder / "shard-00", items, store.ShardFormat("float32"))
        stage.finish([])
    settings = RerankingSettings(top=6, matching=MatchingSettings(max_distance=0.1))
    rerank_shortlist(run, truth, settings, MachineSettings(workers=1))
    return run


def _descriptors() -> np.ndarray:
    """(8, 8) float32 of length 1, queries first, whose products are SIMILARITIES."""
    rows = np.zeros((8, 8), np.float32)
    rows[0, 0] = rows[1, 1] = 1
    rows[2:, :2] = 0.7 * SIMILARITIES.T
    for number, row in enumerate(rows[2:]):
        row[2 + number] = np.sqrt(1 - (row**2).sum())
    return rows


def _features(name: str) -> LocalFeatures:
    """30 features; those of image 1 are query 0's, shifted by SHIFT."""
    shifted = name == DATABASE[1]
    seed = 0 if shifted or name == QUERIES[0] else 1 + len(name)
    generator = np.random.default_rng(seed)
    points = generator.uniform(20, 70, (30, 2)).astype(np.float32)
    codes = generator.standard_normal((30, 16)).astype(np.float32)
    box = (8, 0, 128, 96) if name == QUERIES[0] else (0, 0, 128, 96)
    return LocalFeatures(
        keypoints=points + np.float32(SHIFT) * shifted,
        descriptors=codes / np.linalg.norm(codes, axis=1, keepdims=True),
        scores=np.linspace(2, 1, 30, dtype=np.float32),
        scales=np.ones(30, np.float32),
        input_size=(96, 2 * (box[2] - box[0])),
        box=box,
        image_size=(96, 128),
    )
