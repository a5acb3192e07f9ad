"""Figures of a run, on a benchmark of four generated images whose rankings are written by hand."""

import dataclasses
import shutil
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitgal import runs
from vitgal.data import revisited
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.retrieval import ranking
from vitgal.viz import figures

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


# Failures


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


def features_of(number: int) -> LocalFeatures:
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
    ).subset(slice(number))


@pytest.fixture
def failing(tmp_path: Path, benchmark) -> tuple[Path, revisited.RetrievalDataset]:
    """Two queries. Query q: d c b a before, b c d a after Medium; query r is without positives."""
    truth = truth_of(2)
    cv2.imwrite(str(tmp_path / "jpg" / "r.jpg"), np.zeros((48, 64, 3), np.uint8))
    revisited.write_ground_truth(tmp_path / "gnd_tiny.pkl", truth)
    folder, labelled = tmp_path / "run" / "tiny", revisited.labelled(truth)
    before = np.array([[3, 0], [2, 1], [1, 2], [0, 3]], np.int32)
    after = np.array([[1, 0], [2, 1], [3, 2], [0, 3]], np.int32)
    for stage_name, ranks, files in (
        ("global", before, ("ranks.npy", "positions.npz")),
        ("rerank", after, ("top_medium.npy", "positions_medium.npz")),
    ):
        parameters = {"max_distance": 0.1, "max_keypoints": None}
        with runs.stage(folder / stage_name, stage_name, parameters=parameters, inputs={}) as stage:
            runs.write_array(folder / stage_name / files[0], ranks)
            ranking.Positions.from_ranks(ranks, labelled).save(folder / stage_name / files[1])
            outputs = list(files)
            if stage_name == "rerank":
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


def test_failure_table_by_hand(failing):
    table = figures.failure_table(*failing, protocol="medium")
    # Medium without the junk c: d b a, then b d a. AP by trapezoids: (0 + 1/2)/4 + (1/2 + 2/3)/4
    # and (1 + 1)/4 + (1/2 + 2/3)/4.
    assert table.index.tolist() == [0, 1]
    first = table.loc[0]
    assert first["before"] == pytest.approx(5 / 12, abs=1e-12)
    assert first["after"] == pytest.approx(19 / 24, abs=1e-12)
    assert first["change"] == pytest.approx(3 / 8, abs=1e-12)
    assert (first["query"], first["positives"], first["worst"], first["worst_rank"]) == (
        *("q", 2, "a", 3),
    )
    assert table.loc[1, ["after", "worst", "worst_rank"]].isna().all()


def test_failure_table_without_reranking_and_with_wrong_names(failing):
    run, benchmark = failing
    shutil.rmtree(run / "tiny" / "rerank")
    table = figures.failure_table(run, benchmark, "miss")
    assert table.loc[0, "after"] == table.loc[0, "before"] == pytest.approx(5 / 12, abs=1e-12)
    assert table.loc[0, "change"] == 0
    with pytest.raises(ValueError, match="by is 'worst'; .* ap, change, miss"):
        figures.failure_table(run, benchmark, "worst")
    with pytest.raises(ValueError, match="unknown protocol 'soft'"):
        figures.failure_table(run, benchmark, protocol="soft")
    shutil.rmtree(run / "tiny" / "global")
    with pytest.raises(runs.StageError, match="04_global_evaluation first"):
        figures.failure_table(run, benchmark)


@pytest.mark.parametrize("by, order", [("ap", [1, 0]), ("change", [1, 0]), ("miss", [0, 1])])
def test_failure_table_starts_with_the_greatest_failure(failing, by, order):
    # Query r: a b c d both times, d easy, a and b junk: d is second, AP (0 + 1/2) / 2 = 1/4, no
    # change. Query q: 5/12, then 19/24, its last positive third.
    run, benchmark = failing
    truth = truth_of(2)
    truth.easy[1], truth.junk[1] = np.array([3]), np.array([0, 1])
    for ranks, positions in (
        ("global/ranks.npy", "global/positions.npz"),
        ("rerank/top_medium.npy", "rerank/positions_medium.npz"),
    ):
        ranks = np.load(run / "tiny" / ranks)
        found = ranking.Positions.from_ranks(ranks, revisited.labelled(truth))
        found.save(run / "tiny" / positions)
    benchmark = dataclasses.replace(benchmark, ground_truth=truth)
    table = figures.failure_table(run, benchmark, by)
    assert table["worst_rank"].to_dict() == {0: 3, 1: 2}
    assert table.loc[1, "after"] == 0.25
    assert table.index.tolist() == order


def test_failure_figure_says_what_moved_and_why(failing):
    figure = figures.failure_figure(*failing, 0, protocol="medium", columns=4)
    lines = [text.get_text() for text in figure.findobj(plt.Text)]
    # Captions: rank and similarity; rank, origin, inliers of matches; junk without a rank.
    for wanted in ("1   0.90", "–   0.80", "1 ▲2   9/9", "2 ▼1   0/3", "3 =   0/0"):
        assert wanted in lines, lines
    assert "up past 1 with fewer inliers" in lines
    assert "fewer than 5 matches count as no inlier; down, 1 with more inliers pass" in lines
    assert "no local features, so no inlier" in lines


def test_failure_figure_without_reranking_has_one_row(failing):
    run, benchmark = failing
    shutil.rmtree(run / "tiny" / "rerank")
    figure = figures.failure_figure(run, benchmark, 0, columns=4)
    lines = [text.get_text() for text in figure.findobj(plt.Text)]
    assert {"1   0.90", "ranking", "rank"} <= set(lines)
    assert not {"before", "after", "rank before", "why", "inliers"} & set(lines)


def test_failure_figure_of_a_query_without_positives(failing):
    figure = figures.failure_figure(*failing, 1, columns=4)
    assert "not on the short list: nothing verified" in [
        text.get_text() for text in figure.findobj(plt.Text)
    ]


@pytest.mark.parametrize("query", [2, -1])
def test_failure_figure_of_an_unknown_query_states_the_range(failing, query):
    with pytest.raises(ValueError, match=rf"query_index {query}: tiny has the queries 0 to 1"):
        figures.failure_figure(*failing, query)


def test_failure_figure_opens_a_run_of_its_own_benchmark_by_name(failing, tmp_path):
    run, _ = failing
    (run / "data").mkdir()
    (tmp_path / "jpg").rename(run / "data" / "jpg")
    shutil.copytree(run / "data", run / "data" / "benchmark")
    shutil.move(tmp_path / "gnd_tiny.pkl", run / "data" / "benchmark")
    assert figures.failure_table(run, "tiny").loc[0, "query"] == "q"


def test_failures_of_the_global_ranking_alone(failing):
    run, benchmark = failing
    table = figures.failure_table(run, benchmark, reranked=False)
    assert table.loc[0, "after"] == table.loc[0, "before"] == pytest.approx(5 / 12, abs=1e-12)
    figure = figures.failure_figure(run, benchmark, 0, columns=4, reranked=False)
    assert "why" not in [text.get_text() for text in figure.findobj(plt.Text)]


def test_queries_that_are_not_there_are_named(capsys):
    assert figures.known_queries(truth_of(2), [1, 2, 0, -1]) == [1, 0]
    assert capsys.readouterr().out.splitlines() == [
        "query 2 is not drawn: tiny has the queries 0 to 1",
        "query -1 is not drawn: tiny has the queries 0 to 1",
    ]


def test_paths_show_the_run_s_own_shapes(failing):
    run, benchmark = failing
    runs.write_array(run / "tiny" / "global" / "database.npy", np.zeros((4, 8), np.float32))
    text = [one.get_text() for one in figures.global_path(run / "tiny" / "global", size=224).texts]
    assert {"196 × 8", "197 × 8", "1 × 8"} <= set(text)
    # The first candidate with features is d, which has 3 of the query's 12: all match.
    axes = figures.rerank_path(benchmark, run / "tiny", 0, max_distance=0.1)
    text = [one.get_text() for one in axes.texts]
    assert {"12 × 8", "3 × 8", "12 × 3", "3 × 2", "3 × 4", "0 of 3"} <= set(text)
    with pytest.raises(ValueError, match="query_index 2"):
        figures.rerank_path(benchmark, run / "tiny", 2)
