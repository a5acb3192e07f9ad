"""The table of failures and the figure that explains one, on rankings written by hand."""

import dataclasses
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.viz.tiny_run import ranking_of, truth_of
from vitgal import runs
from vitgal.retrieval.evidence import Evidence
from vitgal.retrieval.ranking import Ranking
from vitgal.viz import failures


def test_failure_table_by_hand(failing):
    table = failures.failure_table(*failing, protocol="medium")
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
    table = failures.failure_table(run, benchmark, "miss")
    assert table.loc[0, "after"] == table.loc[0, "before"] == pytest.approx(5 / 12, abs=1e-12)
    assert table.loc[0, "change"] == 0
    with pytest.raises(ValueError, match="by is 'worst'; .* ap, change, miss"):
        failures.failure_table(run, benchmark, "worst")
    with pytest.raises(ValueError, match="unknown protocol 'soft'"):
        failures.failure_table(run, benchmark, protocol="soft")
    shutil.rmtree(run / "tiny" / "global")
    with pytest.raises(runs.StageError, match="04_global_evaluation first"):
        failures.failure_table(run, benchmark)


@pytest.mark.parametrize("by, order", [("ap", [1, 0]), ("change", [1, 0]), ("miss", [0, 1])])
def test_failure_table_starts_with_the_greatest_failure(failing, by, order):
    # Query r: a b c d both times, d easy, a and b junk: d is second, AP (0 + 1/2) / 2 = 1/4, no
    # change. Query q: 5/12, then 19/24, its last positive third.
    run, benchmark = failing
    truth = truth_of(2)
    truth.easy[1], truth.junk[1] = np.array([3]), np.array([0, 1])
    for name, variant in (("global", None), ("rerank", "medium")):
        stored = np.array(Ranking.load(run / "tiny" / name, variant).order)
        ranking_of(stored, truth).save(run / "tiny" / name, variant)
    benchmark = dataclasses.replace(benchmark, ground_truth=truth)
    table = failures.failure_table(run, benchmark, by)
    assert table["worst_rank"].to_dict() == {0: 3, 1: 2}
    assert table.loc[1, "after"] == 0.25
    assert table.index.tolist() == order


def test_failure_figure_explains_moved_images(failing):
    figure = failures.failure_figure(*failing, 0, protocol="medium", columns=4)
    lines = [text.get_text() for text in figure.findobj(plt.Text)]
    # Captions: rank and similarity; rank, origin, inliers of matches; junk without a rank.
    wanted = {"1   0.90\nd", "–   0.80\nc", "1 ▲2   9/9\nb", "2 ▼1   0/3\nd", "3 =   0/0\na"}
    assert wanted <= set(lines)
    assert "up past 1 with fewer inliers" in lines
    assert "fewer than 5 matches count as no inlier; down, 1 with more inliers pass" in lines
    assert "no local features, so no inlier" in lines


def test_failure_figure_without_reranking_has_one_row(failing):
    run, benchmark = failing
    shutil.rmtree(run / "tiny" / "rerank")
    figure = failures.failure_figure(run, benchmark, 0, columns=4)
    lines = [text.get_text() for text in figure.findobj(plt.Text)]
    assert {"1   0.90\nd", "ranking", "rank"} <= set(lines)
    assert not {"before", "after", "rank before", "why", "inliers"} & set(lines)


def test_failure_figure_of_a_query_without_positives(failing):
    figure = failures.failure_figure(*failing, 1, columns=4)
    lines = [text.get_text() for text in figure.findobj(plt.Text)]
    assert "not on the short list: nothing verified" in lines
    assert "–" in lines and "0" not in lines  # matches and inliers are unknown, not none


@pytest.mark.parametrize("query", [2, -1])
def test_failure_figure_of_an_unknown_query_states_the_range(failing, query):
    with pytest.raises(ValueError, match=rf"query_index {query}: tiny has the queries 0 to 1"):
        failures.failure_figure(*failing, query)


def test_failures_of_the_global_ranking_alone(failing):
    run, benchmark = failing
    table = failures.failure_table(run, benchmark, reranked=False)
    assert table.loc[0, "after"] == table.loc[0, "before"] == pytest.approx(5 / 12, abs=1e-12)
    figure = failures.failure_figure(run, benchmark, 0, columns=4, reranked=False)
    assert "why" not in [text.get_text() for text in figure.findobj(plt.Text)]


def test_names_of_any_kind_are_written_into_the_table(failing, recwarn):
    run, benchmark = failing
    truth = dataclasses.replace(benchmark.ground_truth, queries=["北京\n\x1b[2J", "caf\udce9"])
    benchmark = dataclasses.replace(benchmark, ground_truth=truth)
    table = failures.failure_table(run, benchmark)
    assert table["query"].to_dict() == {0: r"北京\n\x1b[2J", 1: r"caf\udce9"}
    assert table.to_html().encode()


def evidence(matches=40, inliers=20, partners=40, features=20, orientation=1, area=1.0):
    return Evidence(matches, inliers, partners, features, orientation, area, 0.2)


def reasons(*moves, fused=False, **by_image):
    """Image i stands first at place moves[i][0], then at moves[i][1]; all others pass or follow."""
    found = {index: evidence(**by_image.get(f"of_{index}", {})) for index in range(len(moves))}
    return failures._Reasons(dict.fromkeys(found, 20), found, dict(enumerate(moves)), fused)


def test_an_image_whose_homography_is_doubted_is_named_with_the_cause():
    collapsed = {"features": 4, "partners": 9}
    moved = reasons((0, 0), of_0=collapsed)
    assert moved.reason(0, 9, 1) == "collapsed onto 4 features; up past 8 with fewer inliers"
    moved = reasons((0, 0), of_0={"area": 0.02}, fused=True)
    assert moved.reason(0, 9, 1).startswith("outline 2 % of the query; up past 8 with a lower")
    assert (
        reasons((0, 0), of_0={"orientation": -1}).reason(0, 3, 3) == "mirror image; keeps its place"
    )
    assert (
        reasons((0, 0), of_0={"partners": 9}).reason(0, 3, 3) == "repeated texture; keeps its place"
    )
    assert reasons((0, 0)).reason(7, 1, 2) == "not on the short list: nothing verified"


def test_images_that_pass_another_are_named_with_what_speaks_against_most_of_them():
    # Image 0 falls from the first place to the last; 1 to 4 pass it, 5 was before it all the time.
    moves = ((1, 5), (2, 1), (3, 2), (4, 3), (5, 4), (0, 0))
    causes = dict(of_1={"features": 4}, of_2={"features": 3}, of_3={"orientation": -1})
    assert reasons(*moves, **causes, of_5={"features": 1}).reason(0, 2, 6) == (
        "down, 2 of 4 that pass collapsed, the first onto 4 features"
    )
    assert reasons(*moves, of_3={"orientation": -1}).reason(0, 2, 6) == (
        "down, 1 of 4 that pass is a mirror image"
    )
    assert reasons(*moves).reason(0, 2, 6) == "down, 4 with more inliers pass"
    assert reasons(*moves, fused=True).reason(0, 2, 6) == "down, 4 with a higher score pass"


def test_a_right_image_with_no_more_inliers_than_chance_says_so():
    found = {index: evidence() for index in range(4)}
    counts = {0: 8, 1: 6, 2: 6, 3: 30}  # 0 is right; the wrong ones have 6 in the median
    places = {0: (0, 3), 1: (1, 0), 2: (2, 1), 3: (3, 2)}
    known = failures._Reasons(counts, found, places, True, frozenset([0]))
    assert known.reason(0, 1, 4) == (
        "down, 3 with a higher score pass: no more inliers than by chance (6)"
    )
    assert known.reason(3, 4, 3) == (
        "wrong, but its homography is plausible; up past 1 with a lower score"
    )
    clear = failures._Reasons({**counts, 0: 10}, found, places, True, frozenset([0]))
    assert clear.reason(0, 1, 4) == "down, 3 with a higher score pass"
