"""Figures of a run, on a benchmark whose rankings are written by hand."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.viz.tiny_run import features_of, truth_of
from vitgal import runs
from vitgal.features import store
from vitgal.settings import GlobalSettings, MatchingSettings, RerankingSettings
from vitgal.viz import diagrams, run_figures


def written(axes: np.ndarray) -> str:
    """All text of a figure."""
    figure = np.atleast_1d(axes).flat[0].figure
    return "\n".join(text.get_text() for text in figure.findobj(plt.Text))


def test_rankings_match_the_ground_truth(benchmark):
    axes = run_figures.ranking_gallery(benchmark, np.array([[3], [1], [0], [2]]), [0])
    assert axes.shape == (1, 9)
    letters = [
        next(t.get_text() for t in cell.texts if t.get_text() in "EHJN") for cell in axes[0, 1:5]
    ]
    assert letters == ["N", "H", "E", "J"]


def test_rankings_of_no_query_are_a_sentence(benchmark):
    axes = run_figures.ranking_gallery(benchmark, np.array([[3], [1], [0], [2]]), [])
    assert "no quer" in written(axes).lower()


def test_an_unknown_query_is_an_error(benchmark):
    with pytest.raises(IndexError):
        run_figures.ranking_gallery(benchmark, np.array([[3], [1], [0], [2]]), [1])


def test_reranked_leaves_out_ignored_images(benchmark, finished):
    before, after = run_figures.reranked_gallery(benchmark, finished, 0)[:, 1:]
    # Hard ignores the easy a (0 inliers) and the junk c (7): d b, then b d.
    assert [cell.get_title() for cell in before[:3]] == ["1", "2", ""]
    captions = [cell.get_xlabel() for cell in after[:3]]
    assert captions == ["1 ▲ from 2\n9 inliers", "2 ▼ from 1\n5 inliers", ""]


def test_images_that_leave_or_enter_the_drawn_ranks_are_marked(benchmark, finished, monkeypatch):
    monkeypatch.setattr(run_figures, "COLUMNS", 1)
    axes = run_figures.reranked_gallery(benchmark, finished, 0)
    assert axes.shape == (2, 2) and axes[0, 1].get_title() == "1   ▼ to 2"


def test_a_pair_is_drawn_with_its_counts_and_saved_inside_its_folder(benchmark, tmp_path):
    features, settings = features_of(12), RerankingSettings()
    store.write_shard(tmp_path / "local" / "shard-00", [("q", features), ("b", features)])
    stored = store.FeatureStore.open(tmp_path / "local")
    text = written(run_figures.pair_matches(benchmark, stored, 0, 1, settings))
    assert "12" in text and "hard" in text  # an image against itself: all twelve are inliers
    paths = run_figures.save_pair_matches(benchmark, stored, 0, [1], settings, tmp_path / "matches")
    assert paths == [tmp_path / "matches" / "q" / "b.png"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "matches" / "q").rename(tmp_path / "elsewhere")
    (tmp_path / "matches" / "q").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(runs.PathError, match="q is a link to"):
        run_figures.save_pair_matches(benchmark, stored, 0, [1], settings, tmp_path / "matches")


@pytest.mark.parametrize(
    "name, safe", [("a/b", "a_b"), ("../../etc", "_.._etc"), ("..", "_"), ("ok_1.x", "ok_1.x")]
)
def test_names_stay_one_file_in_the_folder(name, safe):
    assert run_figures.safe_file_name(name) == safe


def test_long_names_are_cut_and_stay_apart():
    first, second = (run_figures.safe_file_name("漢" * 90 + end) for end in "ab")
    assert first != second and len(f"{first}.png".encode()) < 230
    assert run_figures.safe_file_name("caf\udce9" * 60).isascii()


def test_queries_that_are_not_there_are_named(capsys):
    assert run_figures.existing_queries(truth_of(2), [1, 2, 0, -1]) == [1, 0]
    assert capsys.readouterr().out.splitlines() == [
        "query 2 is not drawn: tiny has the queries 0 to 1",
        "query -1 is not drawn: tiny has the queries 0 to 1",
    ]


def test_diagrams_show_the_run_s_own_shapes(failing):
    run, benchmark = failing
    coarse = {"architecture": "timm:tf_efficientnet_lite0", "patch": 32, "class_token": "gem"}
    for recorded, words in (
        ({"weights": None}, {"196 × 8", "197 × 8", "1 × 8", "16 × 16 pixels each"}),
        ({"weights": "timm:resnet10t@a.pth"}, {"resnet10t", "1 × 8", "224 × 224 × 3"}),
        (coarse, {"49 × 8", "50 × 8", "32 × 32 pixels each", "the tokens' GeM"}),
    ):
        settings = GlobalSettings(size=224).compared()
        with runs.stage(
            run / "tiny" / "drawn", "global", parameters=settings, inputs={}, overwrite=True
        ) as stage:
            runs.write_array(stage.folder / "database.npy", np.zeros((4, 8), np.float32))
            stage.finish(["database.npy"], recorded)
        axes = diagrams.global_diagram(run / "tiny" / "drawn")
        assert words <= {label.get_text() for label in axes.texts}
    # The first candidate with features is d, which has 3 of the query's 12: all match.
    settings = RerankingSettings(matching=MatchingSettings(max_distance=0.1))
    axes = diagrams.reranking_diagram(benchmark, run / "tiny", 0, settings)
    text = [label.get_text() for label in axes.texts]
    assert {"12 × 8", "3 × 8", "12 × 3", "3 × 2", "3 × 4", "0 of 3"} <= set(text)
    with pytest.raises(ValueError, match="query_index 2"):
        diagrams.reranking_diagram(benchmark, run / "tiny", 2, settings)
