"""The global stage with descriptors that another system made."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.features.examples import NAMES, ROWS, save_hloc, save_npy
from vitgal import runs
from vitgal.data import revisited
from vitgal.evaluation import protocol as evaluation_protocol
from vitgal.retrieval import faiss_index
from vitgal.settings import GlobalSettings
from vitgal.stages.describe import evaluate_descriptors
from vitgal.stages.rank import GLOBAL_OUTPUTS


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Query q; a easy, b hard, c junk; no image need be decoded."""
    folder = tmp_path / "data"
    for name in NAMES:
        path = folder / "jpg" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8))
    truth = revisited.GroundTruth(
        name="small",
        database=NAMES[1:],
        queries=NAMES[:1],
        boxes=np.array([[0.0, 0, 8, 8]]),
        easy=[np.array([0])],
        hard=[np.array([1])],
        junk=[np.array([2])],
    )
    revisited.write_ground_truth(folder / "gnd_small.pkl", truth)
    return folder


@pytest.fixture
def larger(tmp_path: Path) -> tuple[Path, Path]:
    """A benchmark of 3 queries and 300 images that are never decoded, and descriptors of it."""
    generator = np.random.default_rng(0)
    names = [*(f"q{q}" for q in range(3)), *(f"im{image:03}" for image in range(300))]
    folder = tmp_path / "data"
    (folder / "jpg").mkdir(parents=True)
    for name in names:
        (folder / "jpg" / f"{name}.jpg").write_bytes(b"-")
    drawn = np.sort(generator.permuted(np.tile(np.arange(300), (3, 1)), axis=1)[:, :60])
    truth = revisited.GroundTruth(
        "larger",
        names[3:],
        names[:3],
        np.tile([0.0, 0, 8, 8], (3, 1)),
        *([row[kind::3] for row in drawn] for kind in range(3)),
    )
    revisited.write_ground_truth(folder / "gnd_larger.pkl", truth)
    rows = generator.standard_normal((303, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    (tmp_path / "x.txt").write_text("\n".join(names) + "\n")
    return folder, tmp_path / "x.npy"


def test_a_ranking_that_begins_with_an_index_result(larger, tmp_path):
    data, path = larger
    truth = revisited.load_ground_truth(data / "gnd_larger.pkl")
    dataset = revisited.open_dataset("larger", data)

    def rank(run: Path, index: str | None) -> Path:
        settings = GlobalSettings(top=5, display=5, index=index)
        return evaluate_descriptors(run, dataset, settings, descriptors=path)

    plain = rank(tmp_path / "plain", None)
    exact = runs.read_json(plain / "scores.json")
    assert "recall" not in exact and "exact" not in exact
    text = "IVF16,Flat; nprobe=4"
    folder = rank(tmp_path / "run", text)
    scores = runs.read_json(folder / "scores.json")
    assert scores["parameters"]["index"] == text
    assert 0.2 < scores["recall"]["10"] < 1 and scores["recall"]["searched exactly"] == 0
    # The ranking written out: the list, then all other images in exact order.
    ranks = np.load(folder / "ranks.npy")
    queries, database = (np.load(folder / f"{name}.npy") for name in ("queries", "database"))
    order = np.argsort(-(database.astype(float) @ queries.T), axis=0)
    behind = [order[~np.isin(order[:, q], ranks[:, q]), q] for q in range(3)]
    written = np.concatenate([ranks, np.array(behind).T])
    expected, whole = (
        evaluation_protocol.evaluate(written, truth),
        evaluation_protocol.evaluate(order, truth),
    )
    for protocol in revisited.PROTOCOLS:
        assert scores[protocol]["map"] == pytest.approx(expected[protocol]["map"], abs=1e-12)
        assert scores["exact"][protocol]["map"] == pytest.approx(whole[protocol]["map"], abs=1e-12)
        assert exact[protocol]["map"] == scores["exact"][protocol]["map"]
    assert scores["medium"]["map"] != scores["exact"]["medium"]["map"]
    result = faiss_index.build(tmp_path / "again", database, text)
    for name in faiss_index.OUTPUTS:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    np.testing.assert_array_equal(faiss_index.find(result, queries, k=len(ranks))[1], ranks)
    # Reused as it is; another index, or none, is another ranking.
    before = (folder / "stage.json").read_bytes()
    rank(tmp_path / "run", text)
    assert (folder / "stage.json").read_bytes() == before
    for other in (None, "Flat"):
        with pytest.raises(runs.StageError, match="index"):
            rank(tmp_path / "run", other)


def test_an_index_that_does_not_fit_stops_before_anything_is_written(larger, tmp_path):
    data, path = larger
    dataset = revisited.open_dataset("larger", data)
    for text in ("nonsense", "PQ3"):  # 3 does not divide 8
        with pytest.raises(ValueError, match=f"no index '{text}'"):
            evaluate_descriptors(
                tmp_path / "run", dataset, GlobalSettings(index=text), descriptors=path
            )
    assert not list((tmp_path / "run").rglob("*.npy"))


def test_the_stage_ranks_and_scores(benchmark, tmp_path):
    path, run = save_npy(tmp_path / "x.npy"), tmp_path / "run"
    stage = (run, revisited.open_dataset("small", benchmark))
    stage += (GlobalSettings(top=2, crop_queries=False),)
    folder = evaluate_descriptors(*stage, descriptors=path)
    assert {file.name for file in folder.glob("[a-z]*")} == {
        *GLOBAL_OUTPUTS,
        "stage.json",
    }
    # Cosines of q with a, b, c: 0.8, 0.6, -0.6.
    assert np.load(folder / "ranks.npy").ravel().tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.load(folder / "similarities.npy").ravel(), [0.8, 0.6, -0.6], 1e-6)
    scores = runs.read_json(folder / "scores.json")
    assert (scores["easy"]["map"], scores["medium"]["map"], scores["hard"]["map"]) == (1, 1, 1)
    assert scores["protocol"]["descriptors"] == "made elsewhere"
    assert scores["protocol"]["crop_queries"] is False
    assert str(tmp_path) not in (folder / "scores.json").read_text()
    # The same descriptors in the other layout are the same stage; other ones are not.
    before = (folder / "stage.json").read_bytes()
    again = evaluate_descriptors(*stage, descriptors=save_hloc(tmp_path / "x.h5"))
    assert (again / "stage.json").read_bytes() == before
    save_npy(path, ROWS[:, ::-1])
    with pytest.raises(runs.StageError, match="inputs.descriptors"):
        evaluate_descriptors(*stage, descriptors=path)
