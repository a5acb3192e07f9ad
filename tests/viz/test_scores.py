"""Charts of scores and rankings."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from tests.viz.drawn_samples import texts
from vitgal.viz import scores, style


def test_score_dots_print_their_values():
    systems = {
        "global": {"easy": 0.5, "medium": None, "hard": float("nan")},
        "two": {"easy": {"map": 0.904, "mp_at": {}}, "medium": 0.25},
    }
    axes = scores.score_dots(systems, intervals={"two": {"medium": (0.2, 0.4)}})
    assert texts(axes) == ["50.0", "90.4", "25.0"]
    marks = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in marks] == pytest.approx([50, 90.4, 25])
    assert to_hex(marks[0].get_color()).upper() == style.GLOBAL_COLOUR
    (whisker,) = [line for line in axes.lines if line.get_xdata() == pytest.approx([20, 40])]
    assert (whisker.get_ydata() == marks[2].get_ydata()[0]).all()
    assert axes.texts[2].get_position()[0] == pytest.approx(41.2)  # beside the whisker
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["Easy", "Medium", "Hard"]


def test_ap_change_separates_won_from_lost_and_names_the_largest():
    table = pd.DataFrame(
        {"before": [0.5, 0.5, 0.2, np.nan, 0.3], "after": [0.75, 0.25, 0.2, np.nan, 0.8]},
        index=list("pqrst"),
    )
    axes = scores.ap_change(table)
    diagonal, won, lost = axes.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [100, 100]]
    assert won.get_xydata().tolist() == [[50, 75], [20, 20], [30, 80]]
    assert lost.get_xydata().tolist() == [[50, 25]] and lost.get_markerfacecolor() == "white"
    assert axes.get_title("left") == "2 won, 1 lost, 1 unchanged; mean +12.5 points"
    assert "1 without a positive" in axes.get_xlabel()
    # numbers at the points, and their names; r has not changed
    assert texts(axes)[:3] == ["1", "2", "3"]
    assert texts(axes)[3].split("\n")[1:] == ["1  +50  t", "2  +25  p", "3  -25  q"]
    with pytest.raises(ValueError, match="no column after, before"):
        scores.ap_change(table[[]])


def test_ap_change_of_very_many_queries_names_five():
    change = np.linspace(-0.5, 0.5, 400)
    axes = scores.ap_change(pd.DataFrame({"before": np.full(400, 0.5), "after": 0.5 + change}))
    assert sum(len(line.get_xdata()) for line in axes.lines[1:]) == 400
    assert len(axes.texts) == 6


def test_retrieval_curves_show_what_a_short_list_can_reach():
    similarities = {"easy": np.array([0.9, 0.4]), "hard": np.zeros(0), "negative": [0.5, 0.1, 0.2]}
    recall = {"hard": (np.array([1, 3, 5]), np.array([0.0, 0.5, 1.0]))}
    first, second, third = scores.retrieval_curves(
        similarities, {"hard": np.array([1.0, 0.5])}, recall, top=4
    )
    # 0.9 exceeds three, 0.4 two of the three wrong ones
    assert first.get_title("left") == "right before wrong in 83 % of pairs"
    heights, edges, _ = first.patches[0].get_data()
    assert (heights * np.diff(edges)).sum() == pytest.approx(1)
    assert second.lines[0].get_xydata().tolist() == [[0, 100], [100, 50]]
    labels = [line.get_label() for line in third.lines if not line.get_label().startswith("_")]
    assert labels == ["Hard: 75 %", "short list: 4"]  # between 50 % at 3 and 100 % at 5
    empty = scores.retrieval_curves({}, {}, {}, top=4)
    assert empty[0].get_title("left") == "no similarities"
