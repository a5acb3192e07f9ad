"""A run of six generated photographs whose local features are extracted by a small network."""

from pathlib import Path

import cv2
import numpy as np

from vitgal import runs
from vitgal.data import revisited
from vitgal.features import store
from vitgal.models import descriptors, sources
from vitgal.models.network import build_model
from vitgal.models.weights import save_model

OPTIONS = dict(size=96, scales=(0.7071, 1.0), max_keypoints=40)


def texture(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return cv2.resize(small, (128, 96), interpolation=cv2.INTER_CUBIC)


def write_run(folder: Path) -> Path:
    """Query q: a easy, b hard, c junk, d wrong, e on no short list; query p: nothing verified."""
    model = build_model("xcit_nano_12_p16_224", code_dim=8, seed=0)
    save_model(model, folder / "model.safetensors")
    (folder / "jpg").mkdir()
    for seed, name in enumerate("qabcde"):
        image = texture(seed if seed > 1 else 0)  # q and a are one photograph
        cv2.imwrite(str(folder / "jpg" / f"{name}.jpg"), image)
    labels = {"easy": [0], "hard": [1], "junk": [2]}
    truth = revisited.GroundTruth(
        name="tiny",
        database=list("abcde"),
        queries=["q", "p"],
        boxes=np.array([[0.0, 0.0, 128.0, 96.0]] * 2),
        **{label: [np.array(at), np.array([], int)] for label, at in labels.items()},
    )
    cv2.imwrite(str(folder / "jpg" / "p.jpg"), texture(9))
    revisited.write_ground_truth(folder / "gnd_tiny.pkl", truth)
    described = [
        (name, descriptors.extract_local(model, read(folder, name), **OPTIONS)) for name in "abcdpq"
    ]
    _stages(folder, described)
    return folder


def read(folder: Path, name: str) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(folder / "jpg" / f"{name}.jpg")), cv2.COLOR_BGR2RGB)


def _stages(folder: Path, described: list) -> None:
    weights = sources.weights_fingerprint(folder / "model.safetensors")
    parameters = OPTIONS | {"precision": "fp32"}
    local = dict(parameters=parameters, inputs={"weights": weights})
    with runs.stage(folder / "tiny" / "local", "local", **local) as stage:
        store.write_shard(
            stage.folder / "shard-00", sorted(described), store.ShardFormat("float32")
        )
        stage.finish([], {"precision": "fp32"})
    with runs.stage(folder / "tiny" / "rerank", "rerank", parameters={}, inputs={}) as stage:
        candidates = np.array([[3, 1, 0, 2], [-1, -1, -1, -1]], np.int32)
        runs.write_array(stage.folder / "candidates.npy", candidates)
        inliers = np.array([[4, 6, 9, 0], [-1, -1, -1, -1]], np.int32)
        runs.write_array(stage.folder / "inliers.npy", inliers)
        stage.finish(["candidates.npy", "inliers.npy"])
