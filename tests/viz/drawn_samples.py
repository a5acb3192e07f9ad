"""Photographs, features and logs that the tests of figures draw."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from vitgal.features.local import LocalFeatures
from vitgal.viz.galleries import RankedImage

LABELS = ["easy", "hard", "junk", "negative", "hard", "easy"]
LONG = [f"a_landmark_with_quite_a_long_name_{index:06d}" for index in range(6)]
SYSTEMS = {
    name: {"easy": 0.999, "medium": 0.5, "hard": 0.1}
    for name in (
        "an untrained network of the same size",
        "the trained network, global features",
        "reranked, all protocols as published",
        "$x$ y $z$",
    )
}


def picture(height: int, width: int, value: int = 120) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def photographs(count: int) -> list[np.ndarray]:
    sides = [(60, 80), (80, 60), (20, 160), (150, 40)]
    return [picture(*sides[index % 4], 40 + 20 * index) for index in range(count)]


def log() -> pd.DataFrame:
    rows = [
        {"step": 10, "loss": 4.0, "lr": 1e-4, "accuracy": 0.1, "images_per_second": 90.0},
        {"step": 20, "loss": 3.0, "lr": 5e-5, "accuracy": 0.3, "images_per_second": 95.0},
        {"step": 30, "loss": 2.0, "lr": 1e-5, "val_accuracy": 0.4, "val_map": 0.55},
    ]
    return pd.DataFrame(rows).assign(
        val_accuracy_margin=[np.nan, np.nan, 0.2],
        reconstruction=[0.5, 0.4, 0.3],
        val_reconstruction=[np.nan, 0.6, 0.5],
    )


def features(keypoints: list, **changes) -> LocalFeatures:
    """A crop of 200 x 100 pixels at (30, 40), seen by the network as 400 x 100."""
    count = len(keypoints)
    fields = {
        "keypoints": np.array(keypoints, np.float32).reshape(-1, 2),
        "descriptors": np.zeros((count, 2), np.float32),
        "scores": np.linspace(2, 1, count).astype(np.float32),
        "scales": np.full(count, 0.5, np.float32),
        "input_size": (100, 400),
        "box": (30, 40, 230, 140),
        "image_size": (150, 240),
    }
    return LocalFeatures(**fields | changes)


def texts(axes: plt.Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def ranked(keys: str, labels: Sequence[str | None], captions: Sequence[str] = ()) -> list:
    """A ranking of photographs with these one-letter keys."""
    captions = [*captions, *[""] * len(keys)]
    return [
        RankedImage(key, picture(30, 40, 90), label, caption)
        for key, label, caption in zip(keys, labels, captions, strict=False)
    ]
