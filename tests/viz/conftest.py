"""What all tests of figures share."""

from pathlib import Path

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.viz.inspected_run import write_run
from tests.viz.test_browser import ARGUMENTS, executable
from tests.viz.tiny_run import NAMES, features_of, ranking_of, truth_of
from vitgal import runs
from vitgal.data import revisited
from vitgal.features import store
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close("all")
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
    revisited.write_ground_truth(tmp_path / "gnd_tiny.pkl", truth_of(1))
    return revisited.open_dataset("tiny", tmp_path)


@pytest.fixture
def finished(tmp_path: Path, benchmark) -> Path:
    """`<run>/tiny` with a global ranking d b a c, and b before d after reranking."""
    folder = tmp_path / "run" / "tiny"
    with runs.stage(folder / "rerank", "rerank", parameters={}, inputs={}) as stage:
        runs.write_array(folder / "rerank" / "candidates.npy", np.array([[3, 1, 0, 2]], np.int32))
        runs.write_array(folder / "rerank" / "inliers.npy", np.array([[5, 9, 0, 7]], np.int32))
        after = ranking_of(np.array([[1], [3], [0], [2]], np.int32), truth_of(1))
        stage.finish(["candidates.npy", "inliers.npy", *after.save(stage.folder, "hard")])
    with runs.stage(folder / "global", "global", parameters={}, inputs={}) as stage:
        before = ranking_of(np.array([[3], [1], [0], [2]], np.int32), truth_of(1))
        stage.finish([*before.save(stage.folder)])
    return folder


@pytest.fixture
def failing(tmp_path: Path, benchmark) -> tuple[Path, revisited.RetrievalDataset]:
    """Two queries. Query q: d c b a before, b c d a after Medium; query r is without positives."""
    truth = truth_of(2)
    cv2.imwrite(str(tmp_path / "jpg" / "r.jpg"), np.zeros((48, 64, 3), np.uint8))
    revisited.write_ground_truth(tmp_path / "gnd_tiny.pkl", truth)
    folder = tmp_path / "run" / "tiny"
    before = np.array([[3, 0], [2, 1], [1, 2], [0, 3]], np.int32)
    after = np.array([[1, 0], [2, 1], [3, 2], [0, 3]], np.int32)
    for name, order, variants in (
        ("global", before, [None]),
        ("rerank", after, ["medium", "hard"]),
    ):
        parameters = {"max_distance": 0.1, "max_keypoints": None}
        with runs.stage(folder / name, name, parameters=parameters, inputs={}) as stage:
            outputs = []
            for variant in variants:
                outputs += ranking_of(order, truth).save(stage.folder, variant)
            if name == "rerank":
                counts = np.array([[0, 1, 0], [-1, -1, -1]], np.int32)
                images = np.array([[3, 1, 0], [-1, -1, -1]], np.int32)
                runs.write_array(folder / "rerank" / "candidates.npy", images)
                runs.write_array(folder / "rerank" / "inliers.npy", counts * 9)
                outputs += ["candidates.npy", "inliers.npy"]
            stage.finish(outputs)
    similarities = np.array([[0.9, 0.5], [0.8, 0.4], [0.7, 0.3], [0.6, 0.2]], np.float32)
    runs.write_array(folder / "global" / "similarities.npy", similarities)
    items = {"q": 12, "b": 9, "d": 3, "a": 0, "r": 0}
    items = [(name, features_of(number)) for name, number in sorted(items.items())]
    store.write_shard(folder / "local" / "shard-00", items)
    return tmp_path / "run", revisited.open_dataset("tiny", tmp_path)


@pytest.fixture(scope="session")
def inspected_run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("inspected"))


@pytest.fixture(scope="session")
def describer(inspected_run, tmp_path_factory):
    from vitgal.stages.own import Describer  # which imports torch

    return Describer(
        tmp_path_factory.mktemp("own"),
        inspected_run / "model.safetensors",
        GlobalSettings(size=64),
        LocalSettings(size=96),
        MachineSettings(threads=1),
    )


@pytest.fixture(scope="session")
def photographs(inspected_run, describer):
    from vitgal.stages import own

    return own.describe_folder(inspected_run / "jpg", describer)


@pytest.fixture(scope="module")  # another file may open a browser of its own
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if executable() is None:
        pytest.skip("no Chromium or Chrome is installed")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=executable(), args=ARGUMENTS)
        yield chromium
        chromium.close()
