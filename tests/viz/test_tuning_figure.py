"""The figure of a tuned reranking, of arrays written by hand."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitgal.evaluation.tuning import Tuning
from vitgal.viz.tuning import tuning_figure


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_means_are_over_queries_that_count():
    ap = np.array([[0.2, np.nan, 0.4], [0.5, np.nan, 0.7]])
    tuning = Tuning(
        {"max_distance": [0.7, 0.9], "threshold": [16.0], "top": [20]},
        ap[:, None, None],
        *((1, 0, 0), (0, 0, 0)),
        before=np.array([0.1, np.nan, 0.3]),
        groups=np.arange(3),
    )
    curve, thresholds = tuning_figure(tuning)
    lines = {line.get_label(): line for line in curve.lines}
    assert lines["reranked"].get_ydata().tolist() == pytest.approx([60])
    assert lines["not reranked: 20.0"].get_ydata() == pytest.approx([20, 20])
    assert [text.get_text() for text in thresholds.texts] == ["30.0", "60.0"]
    chosen, current = thresholds.patches[1], thresholds.patches[0]
    assert (chosen.get_xy(), current.get_xy()) == ((-0.5, 0.5), (-0.44, -0.44))
    assert [label.get_text() for label in thresholds.get_yticklabels()] == ["0.7", "0.9"]


def test_orders_have_a_curve_each_and_other_settings_a_mark():
    grid = {"max_distance": [0.9], "threshold": [8.0], "count": ["inliers", "features"]}
    grid |= {"order": ["inliers", "fused"], "fused_cap": [15, 60], "top": [5, 50]}
    ap = np.full((1, 1, 2, 2, 2, 2, 4), 0.5)
    ap[0, 0, 1, 1, 1] = [[0.9] * 4, [0.8, 0.8, 0.4, 0.4]]  # features, fused, 60
    ap[0, 0, 1, 0, 1, 1] = 0.1  # features, inliers: 50 candidates
    chosen, current = (0, 0, 1, 1, 1, 0), (0, 0, 0, 0, 0, 1)
    tuning = Tuning(grid, ap, chosen, current, np.full(4, 0.5), np.array([0, 0, 1, 1]))
    curve, _, others = tuning_figure(tuning)
    lines = {line.get_label(): line.get_ydata() for line in curve.lines}
    assert lines["reranked by similarity and count"] == pytest.approx([90, 60])
    assert lines["reranked by count"] == pytest.approx([50, 10])
    # The landmarks' lines are those of the chosen order.
    thin = [line.get_ydata() for line in curve.lines if line.get_linewidth() < 0.8]
    assert [list(values) for values in thin if len(values)] == [
        pytest.approx([90, 80]),
        pytest.approx([90, 40]),
    ]
    labels = [label.get_text() for label in others.get_yticklabels()]
    assert labels == [
        *("count", "inliers", "features", "order", "inliers", "fused", "fused_cap", "15", "60"),
    ]
    marks = [line.get_xdata()[0] for line in others.lines if line.get_marker() == "o"]
    assert marks == pytest.approx([50, 90, 50, 90, 50, 90])


def test_an_order_that_is_not_chosen_is_drawn_with_its_best_weight():
    grid = {"max_distance": [0.9], "threshold": [8.0], "order": ["inliers", "fused"]}
    grid |= {"fused_weight": [0.01, 0.02, 0.04], "top": [5, 50]}
    ap = np.full((1, 1, 2, 3, 2, 2), 0.5)
    ap[0, 0, 0, :, 0] = 0.9  # chosen: by count, five candidates
    ap[0, 0, 1, 1] = [[0.8] * 2, [0.7] * 2]
    tuning = Tuning(grid, ap, (0, 0, 0, 0, 0), (0, 0, 0, 0, 1), np.full(2, 0.5), np.arange(2))
    curve, _, others = tuning_figure(tuning)
    lines = {line.get_label(): line.get_ydata() for line in curve.lines}
    assert lines["reranked by similarity and count"] == pytest.approx([80, 70])
    labels = [label.get_text() for label in others.get_yticklabels()]
    assert labels == ["order", "inliers", "fused"]  # weights change nothing by count
    marks = [line.get_xdata()[0] for line in others.lines if line.get_marker() == "o"]
    assert marks == pytest.approx([90, 80])


def test_no_query_counts():
    nothing = np.full(2, np.nan)
    grid = {"max_distance": [0.9], "threshold": [8.0], "top": [5]}
    tuning = Tuning(grid, np.full((1, 1, 1, 2), np.nan), *((0, 0, 0),) * 2, nothing, np.arange(2))
    assert tuning_figure(tuning)[0].figure.get_supxlabel() == "No query counts."
