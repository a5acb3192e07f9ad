"""What holds for every figure: labels stay inside, nothing is left behind, empty inputs say so."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tests.viz.drawn_samples import (
    LABELS,
    LONG,
    SYSTEMS,
    features,
    log,
    photographs,
    picture,
    ranked,
    texts,
)
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import PairInspection, Verification
from vitgal.viz import charts, diagrams, evidence_figures, galleries, maps, matching, scores
from vitgal.viz.galleries import QueryImage

PANORAMA, TOWER, DOT = (6, 300), (300, 6), (1, 1)
QUERY = QueryImage(picture(60, 80), (10, 5, 60, 40), LONG[0])


def match_figure(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return match_lines(first, second, draw=evidence_figures.match_figure)


def match_lines(
    first: np.ndarray, second: np.ndarray, count: int = 2, draw=matching.match_lines
) -> plt.Axes | np.ndarray:
    """The corners of two photographs, matched: one inlier, the others rejected."""
    sides = [
        matching.MatchedImage(image, corners(image, count), title)
        for image, title in ((first, LONG[0]), (second, LONG[1] * 3))
    ]
    inliers = np.arange(count) == 0
    pairs = np.column_stack([np.arange(count)] * 2)
    return draw(*sides, PairInspection(pairs, Verification(inliers, np.eye(3))), max_lines=60)


def corners(image: np.ndarray, count: int) -> LocalFeatures:
    height, width = image.shape[:2]
    size = {"input_size": (height, width), "image_size": (height, width)}
    points = [(0, 0), (width, height)][:count]
    return features(points, box=(0, 0, width, height), **size)


CALLS = {
    "contact_sheet": lambda: galleries.contact_sheet(photographs(6), LONG, columns=4),
    "two lines": lambda: galleries.contact_sheet(photographs(3), ["one\ntwo", "", "$a$ and $b$"]),
    "split": lambda: charts.split_statistics([3, 5, 9], [1, 0, 2]),
    "long tail": lambda: charts.split_statistics(np.arange(1, 2000), [1, 10, 100]),
    "training_curves": lambda: charts.training_curves(log()),
    "tokens": lambda: maps.token_figure(
        photographs(2), [np.ones((3, 3, 5)), np.zeros((2, 4, 5))], [np.eye(3), np.ones((2, 4))]
    ),
    "attention": lambda: maps.attention_maps(photographs(2), [np.eye(3)] * 2, [np.eye(4)] * 2),
    "ranking_rows": lambda: galleries.ranking_rows(
        [QUERY, QueryImage(picture(80, 60))], [ranked("abcdef", LABELS, LONG)] * 2, columns=5
    ),
    "stacked": lambda: galleries.stacked_rankings(
        QUERY,
        {"before": ranked("abcdef", LABELS), "after": ranked("fedcba", LABELS[::-1], LONG)},
        columns=6,
    ),
    "reasons": lambda: galleries.stacked_rankings(
        QUERY,
        {"before": ranked("a", ["easy"], ["1   0.71"])},
        pd.DataFrame({"image": [LONG[0] * 4], "why": ["no local features " * 6]}),
        columns=1,
    ),
    "unlabelled": lambda: galleries.stacked_rankings(
        QUERY, {"by similarity": ranked("ab", [None] * 2, LONG), "by inliers": []}, columns=2
    ),
    "ap_change": lambda: scores.ap_change(
        pd.DataFrame({"before": [0.1, 0.5, np.nan], "after": [0.9, 0.2, np.nan]}, index=LONG[:3])
    ),
    "score_dots": lambda: scores.score_dots(SYSTEMS),
    "retrieval": lambda: scores.retrieval_curves(
        {"easy": np.ones(3), "negative": np.zeros(9)},
        {"medium": np.ones(11)},
        {"medium": (np.array([1, 10, 100]), np.array([0.1, 0.5, 1.0]))},
        top=20,
    ),
    "attention and inliers": lambda: evidence_figures.attention_and_inliers(
        matching.MatchedImage(picture(150, 240), features([(8, 8), (392, 92)]), "q"),
        PairInspection(np.array([[0, 0]]), Verification(np.array([True]), np.eye(3))),
    ),
    "match_figure": lambda: match_figure(picture(60, 80), picture(90, 40)),
    "flow": lambda: diagrams.flow_figure(
        picture(60, 80),
        (10, 5, 60, 40),
        {"tokens": [np.ones((3, 4, 2))], "backbone_attention": [np.ones((3, 4))]},
        np.ones(13),
    ),
    "feature_counts": lambda: matching.feature_counts([3, 90, 500], [0.3535, 0.5, 1.4142]),
    "keypoints": lambda: matching.keypoints(picture(150, 240), features([(8, 8), (392, 92)])),
    "match_lines": lambda: match_lines(picture(60, 80), picture(90, 40)),
}
EMPTY = {
    "contact_sheet": (lambda: galleries.contact_sheet([], []), "no images"),
    "training_curves": (lambda: charts.training_curves(pd.DataFrame()), "no values"),
    "tokens": (lambda: maps.token_figure([], [], []), "no photographs"),
    "attention": (lambda: maps.attention_maps([], [], []), "no photographs"),
    "attention_heads": (
        lambda: maps.attention_heads(picture(9, 9), {}, {}, box=(0, 0, 9, 9)),
        "no scale",
    ),
    "ranking_rows": (lambda: galleries.ranking_rows([], []), "no queries"),
    "one query": (lambda: galleries.ranking_rows([QUERY], [[]], columns=2), "no image\nranked"),
    "stacked": (
        lambda: galleries.stacked_rankings(QUERY, {"before": [], "after": []}, columns=1),
        "no image\nranked",
    ),
    "ap_change": (
        lambda: scores.ap_change(pd.DataFrame({"before": [np.nan], "after": [np.nan]})),
        "no query",
    ),
    "score_dots": (lambda: scores.score_dots({}), "no scores"),
    "diagram": (lambda: diagrams.step_diagram([]), "no steps"),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_figure_with_every_label_inside_and_no_setting_changed(name):
    before = dict(matplotlib.rcParams)
    axes = np.ravel(np.asarray(CALLS[name](), dtype=object))
    assert dict(matplotlib.rcParams) == before
    assert len(plt.get_fignums()) == 1
    figure = axes[0].figure
    assert all(isinstance(single, plt.Axes) and single.figure is figure for single in axes)
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()
    # 0.03 inches: half a frame's line may lie outside, letters of names may not
    assert drawn.x0 > -0.03 and drawn.y0 > -0.03
    assert drawn.x1 < figure.get_figwidth() + 0.03 and drawn.y1 < figure.get_figheight() + 0.03


def test_the_user_style_does_not_reach_the_figure_when_it_is_drawn_later():
    with plt.rc_context({"xtick.labelsize": 30, "font.family": "serif", "axes.grid": True}):
        axes = scores.score_dots(SYSTEMS)
        axes.figure.draw_without_rendering()
        ticks = axes.get_xticklabels()
    assert {tick.get_fontsize() for tick in ticks} == {8}
    assert ticks[0].get_fontfamily() == ["DejaVu Sans"]
    assert not axes.yaxis.get_gridlines()[0].get_visible()


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_input_is_noted_in_the_figure(name):
    draw, sentence = EMPTY[name]
    axes = np.ravel(np.asarray(draw(), dtype=object))
    assert any(sentence in text for single in axes for text in texts(single))
    axes[0].figure.draw_without_rendering()


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(PANORAMA, TOWER), (TOWER, DOT), (DOT, PANORAMA)])
def test_any_aspect_can_be_drawn(sides):
    first, second = (picture(*side) for side in sides)
    query = QueryImage(first, (0, 0, 1, 1))
    images = [galleries.RankedImage(0, second, "easy"), galleries.RankedImage(1, first, "junk")]
    for axes in (
        galleries.contact_sheet([first, second], ["a", "b"], columns=2),
        galleries.ranking_rows([query], [images], columns=2),
        maps.attention_maps([first, second], [np.eye(2)] * 2, [np.eye(2)] * 2),
        match_lines(first, second, 1),
        match_figure(first, second),
    ):
        figure = np.ravel(np.asarray(axes, dtype=object))[0].figure
        figure.draw_without_rendering()
        assert max(figure.get_size_inches()) < 25


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_invalid_photographs_are_refused_and_no_figure_is_left(wrong):
    with pytest.raises(ValueError, match="a photograph must be"):
        galleries.contact_sheet([wrong], [""])
    with pytest.raises(ValueError, match="a photograph must be"):
        galleries.ranking_rows([QUERY], [[galleries.RankedImage(0, wrong)]])
    assert not plt.get_fignums()
