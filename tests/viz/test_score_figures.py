"""Bars and curves of scores, and diagrams."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from tests.viz.drawn_samples import texts
from vitgal.evaluation.tuning import Tuning
from vitgal.settings import RerankingSettings
from vitgal.viz import scores
from vitgal.viz.style import LABEL_COLOURS


def test_ap_change_sorts_and_counts():
    table = pd.DataFrame(
        {"before": [0.5, 0.5, 0.2, np.nan, 0.3], "after": [0.75, 0.25, 0.2, np.nan, 0.8]},
        index=list("pqrst"),
    )
    axes = scores.ap_change(table)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 25, 0, -25])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["t", "p", "r", "q"]
    assert axes.get_title("left") == "2 won, 1 lost, 1 unchanged; mean +12.5 points"
    assert "1 without a positive" in axes.get_xlabel()
    up, down = axes.patches[0], axes.patches[3]
    assert to_hex(up.get_facecolor()).upper() == LABEL_COLOURS["easy"]
    assert to_hex(down.get_edgecolor()).upper() == LABEL_COLOURS["negative"] and down.get_hatch()
    with pytest.raises(ValueError, match="no column after, before"):
        scores.ap_change(table[[]])


def test_ap_change_of_very_many_queries_names_none():
    change = np.linspace(-0.5, 0.5, 400)
    axes = scores.ap_change(pd.DataFrame({"before": np.full(400, 0.5), "after": 0.5 + change}))
    assert len(axes.patches) == 400 and not len(axes.get_xticks())


def test_score_bars_print_their_values():
    systems = {
        "one": {"easy": 0.5, "medium": None, "hard": float("nan")},
        "two": {"easy": {"map": 0.904, "mp_at": {}}, "medium": 0.25},
    }
    axes = scores.score_bars(systems, intervals={"two": {"medium": (0.2, 0.4)}})
    assert texts(axes) == ["50.0", "90.4", "25.0"]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([50, np.nan, np.nan, 90.4, 25, np.nan], nan_ok=True)
    assert axes.lines[0].get_ydata() == pytest.approx([20, 40])
    assert axes.texts[2].get_position()[1] == pytest.approx(41)  # above the whisker
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["Easy", "Medium", "Hard"]
    middle = np.mean([bar.get_x() + bar.get_width() / 2 for bar in axes.patches[::3]])
    assert middle == pytest.approx(0)  # both bars stand round the tick


def test_tuning_curves_show_means_over_queries_that_count():
    ap = np.array([[0.2, np.nan, 0.4], [0.5, np.nan, 0.7]])
    tuning = Tuning(
        {"max_distance": [0.7, 0.9], "threshold": [16.0], "top": [20]},
        ap[:, None, None],
        *((1, 0, 0), (0, 0, 0)),
        before=np.array([0.1, np.nan, 0.3]),
        groups=np.arange(3),
    )
    axes = scores.tuning_curves(tuning)
    lines = {line.get_label(): line for line in axes[0].lines}
    assert lines["reranked"].get_ydata().tolist() == pytest.approx([30, 60])
    assert lines["not reranked"].get_ydata()[0] == pytest.approx(20)
    assert (lines["chosen"].get_xdata()[0], lines["current"].get_xdata()[0]) == (1, 0)
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0.7", "0.9"]
    assert [panel.get_xlabel() for panel in axes] == ["max_distance", "threshold", "top"]


def test_parameter_curves_have_a_panel_a_parameter():
    rows = [("threshold", 4, 10, 2), ("threshold", 16, 10, 7), ("max_keypoints", 100, 10, 7)]
    table = pd.DataFrame(rows, columns=["parameter", "value", "matches", "inliers"])
    axes = scores.parameter_curves(table, RerankingSettings())
    assert [panel.get_xlabel() for panel in axes] == ["threshold", "max keypoints"]
    assert axes[0].lines[1].get_ydata().tolist() == [2, 7]
    assert [len(panel.lines) for panel in axes] == [3, 2]  # the value in use; None is no line
    assert len(scores.parameter_curves(table.head(0), RerankingSettings())) == 1
