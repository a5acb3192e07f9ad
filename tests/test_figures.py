"""Figures of a run, on a benchmark of four generated images whose rankings are written by hand."""

from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitgal import figures, revisited, runs, store
from vitgal.features import LocalFeatures

NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def benchmark(tmp_path: Path) -> revisited.RetrievalDataset:
    """One query; a is easy, b hard, c junk, d wrong."""
    rng = np.random.default_rng(0)
    (tmp_path / "jpg").mkdir()
    for name in ("q", *NAMES):
        image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "jpg" / f"{name}.jpg"), image)
    labels = {"easy": [0], "hard": [1], "junk": [2]}
    truth = revisited.GroundTruth(
        name="tiny",
        database=list(NAMES),
        queries=["q"],
        boxes=np.array([[0.0, 0.0, 64.0, 48.0]]),
        **{label: [np.array(indices)] for label, indices in labels.items()},
    )
    revisited.write_ground_truth(tmp_path / "gnd_tiny.pkl", truth)
    return revisited.open_dataset("tiny", tmp_path)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """`<run>/tiny` with a global ranking d b a c, and b before d after reranking."""
    folder = tmp_path / "run" / "tiny"
    with runs.stage(folder / "rerank", "rerank", parameters={}, inputs={}) as stage:
        runs.write_array(folder / "rerank" / "candidates.npy", np.array([[3, 1, 0, 2]], np.int32))
        runs.write_array(folder / "rerank" / "inliers.npy", np.array([[5, 9, 0, 7]], np.int32))
        runs.write_array(
            folder / "rerank" / "top_hard.npy", np.array([[1], [3], [0], [2]], np.int32)
        )
        stage.finish(["candidates.npy", "inliers.npy", "top_hard.npy"])
    runs.write_array(folder / "global" / "ranks.npy", np.array([[3], [1], [0], [2]], np.int32))
    return folder


def written(axes: np.ndarray) -> str:
    """All text of a figure."""
    figure = np.atleast_1d(axes).flat[0].figure
    return "\n".join(text.get_text() for text in figure.findobj(plt.Text))


def test_rankings_say_what_the_ground_truth_says(benchmark):
    axes = figures.rankings(benchmark, np.array([[3], [1], [0], [2]]), [0], columns=4)
    assert axes.shape == (1, 5)
    letters = [
        next(t.get_text() for t in one.texts if t.get_text() in "EHJN") for one in axes[0, 1:]
    ]
    assert letters == ["N", "H", "E", "J"]


def test_rankings_of_no_query_say_so(benchmark):
    axes = figures.rankings(benchmark, np.array([[3], [1], [0], [2]]), [])
    assert "no quer" in written(axes).lower()


def test_an_unknown_query_is_an_error(benchmark):
    with pytest.raises(IndexError):
        figures.rankings(benchmark, np.array([[3], [1], [0], [2]]), [1])


def test_reranked_leaves_out_what_the_protocol_ignores(benchmark, finished):
    text = written(figures.reranked(benchmark, finished, 0, columns=4))
    # Hard ignores the easy a (0 inliers) and the junk c (7)
    assert "9 inliers" in text and "5 inliers" in text
    assert "0 inliers" not in text and "7 inliers" not in text


def test_a_pair_is_drawn_with_its_counts_and_saved_inside_its_folder(benchmark, tmp_path):
    rng = np.random.default_rng(1)
    codes = rng.standard_normal((12, 8)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    features = LocalFeatures(
        keypoints=rng.uniform(8, 40, (12, 2)).astype(np.float32),
        descriptors=codes,
        scores=np.linspace(2, 1, 12, dtype=np.float32),
        scales=np.ones(12, np.float32),
        input_size=(48, 64),
        box=(0, 0, 64, 48),
        image_size=(48, 64),
    )
    store.write_shard(tmp_path / "local" / "shard-00", [("q", features), ("b", features)])
    kept = store.FeatureStore.open(tmp_path / "local")
    text = written(figures.pair(benchmark, kept, 0, 1))
    assert "12" in text and "hard" in text  # an image against itself: all twelve are inliers
    paths = figures.save_pairs(benchmark, kept, 0, [1], tmp_path / "matches")
    assert paths == [tmp_path / "matches" / "q" / "b.png"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "name, safe", [("a/b", "a_b"), ("../../etc", "_.._etc"), ("..", "_"), ("ok_1.x", "ok_1.x")]
)
def test_names_stay_one_file_in_the_folder(name, safe):
    assert figures.safe_name(name) == safe
