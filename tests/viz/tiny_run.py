"""A benchmark of four generated images whose rankings are written by hand."""

import numpy as np

from vitgal.data import revisited
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.ranking import Positions, Ranking

NAMES = ("a", "b", "c", "d")


def truth_of(queries: int) -> revisited.GroundTruth:
    """The benchmark's labels for query 0: a easy, b hard, c junk; the others have no positives."""
    labels = {"easy": [0], "hard": [1], "junk": [2]}
    return revisited.GroundTruth(
        name="tiny",
        database=list(NAMES),
        queries=["q", "r"][:queries],
        boxes=np.tile([[0.0, 0.0, 64.0, 48.0]], (queries, 1)),
        **{
            label: [np.array(indices), *[np.zeros(0, np.int64)] * (queries - 1)]
            for label, indices in labels.items()
        },
    )


def ranking_of(order: np.ndarray, truth: revisited.GroundTruth) -> Ranking:
    return Ranking(order, Positions.from_ranks(order, revisited.labelled(truth)))


def features_of(count: int) -> LocalFeatures:
    rng = np.random.default_rng(3)
    codes = rng.standard_normal((12, 8)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    return LocalFeatures(
        keypoints=rng.uniform(8, 40, (12, 2)).astype(np.float32),
        descriptors=codes,
        scores=np.linspace(2, 1, 12, dtype=np.float32),
        scales=np.ones(12, np.float32),
        input_size=(48, 64),
        box=(0, 0, 64, 48),
        image_size=(48, 64),
    ).subset(slice(count))
