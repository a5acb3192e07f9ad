"""Charts of the split, of training and of scores."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from tests.viz.drawn_samples import log, texts
from vitgal.settings import RerankingSettings
from vitgal.viz import charts
from vitgal.viz.style import LABEL_COLOURS


def test_split_statistics_counts_classes():
    left, right = charts.split_statistics([2, 1, 2, 4], np.array([1, 0, 0, 1]))
    train, validation = (patch.get_data().values for patch in left.patches)
    assert train.tolist() == [0, 1, 2, 0, 1]  # classes with 0, 1, 2, 3, 4 images
    assert validation.tolist() == [2, 2, 0, 0, 0]
    assert right.lines[0].get_xydata().tolist() == [[1, 4], [2, 2], [3, 2], [4, 1]]
    labels = [text.get_text() for text in left.figure.legends[0].get_texts()]
    assert labels == ["training: 9 images of 4 classes", "validation: 2 images of 2 classes"]


def test_split_statistics_of_a_long_tail_keeps_every_class():
    counts = np.concatenate([np.full(500, 1), np.full(70, 40), [3000]])
    left, _ = charts.split_statistics(counts, [])
    histogram = left.patches[0].get_data()
    assert histogram.values.sum() == 571 and histogram.values[0] == 500
    assert left.get_xscale() == "log"
    with pytest.raises(ValueError, match="none negative"):
        charts.split_statistics([1, -1], [])


def test_training_curves_show_the_logged_values():
    panels = charts.training_curves(log())
    assert [panel.get_title("left") for panel in panels] == list(charts.PANELS)
    accuracy = panels[1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines["training (margin)"] == [[10, 10], [20, 30]]
    assert lines["validation"] == [[30, 40]] and lines["validation (margin)"] == [[30, 20]]
    assert len({line.get_linestyle() for line in accuracy.lines}) == 3
    codes = charts.training_curves(log().drop(columns="val_accuracy_margin"))
    assert [line.get_label() for line in codes[1].lines] == ["training", "validation"]
    only_loss = charts.training_curves(log()[["step", "loss"]])
    assert [panel.get_title("left") for panel in only_loss] == ["loss"]
    assert panels[2].lines[0].get_ydata() == pytest.approx([55])  # 0.55 * 100 is rounded
    with pytest.raises(ValueError, match="no column step"):
        charts.training_curves(log().drop(columns="step"))
    assert panels[0].get_xlabel() == "step"
    schedule = charts.training_curves(pd.DataFrame({"epoch": [0, 1, 2], "lr": [0.1, 0.2, 0.1]}))
    assert [panel.get_xlabel() for panel in schedule] == ["epoch"]
    assert schedule[0].lines[0].get_xdata().tolist() == [0, 1, 2]


def test_a_curve_has_the_band_of_its_interval():
    options = log().assign(val_map_low=[np.nan, np.nan, 0.5], val_map_high=[np.nan, np.nan, 0.7])
    options.loc[0, ["val_map", "val_map_low", "val_map_high"]] = (0.25, 0.125, 0.375)
    axes = charts.training_curves(options)[2]
    (band,) = axes.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()} == {
        *((10.0, 12.5), (10.0, 37.5), (30.0, 50.0), (30.0, 70.0))
    }


def test_ap_change_sorts_and_counts():
    table = pd.DataFrame(
        {"before": [0.5, 0.5, 0.2, np.nan, 0.3], "after": [0.75, 0.25, 0.2, np.nan, 0.8]},
        index=list("pqrst"),
    )
    axes = charts.ap_change(table)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 25, 0, -25])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["t", "p", "r", "q"]
    assert axes.get_title("left") == "2 won, 1 lost, 1 unchanged; mean +12.5 points"
    assert "1 without a positive" in axes.get_xlabel()
    up, down = axes.patches[0], axes.patches[3]
    assert to_hex(up.get_facecolor()).upper() == LABEL_COLOURS["easy"]
    assert to_hex(down.get_edgecolor()).upper() == LABEL_COLOURS["negative"] and down.get_hatch()
    with pytest.raises(ValueError, match="no column after, before"):
        charts.ap_change(table[[]])


def test_ap_change_of_very_many_queries_names_none():
    change = np.linspace(-0.5, 0.5, 400)
    axes = charts.ap_change(pd.DataFrame({"before": np.full(400, 0.5), "after": 0.5 + change}))
    assert len(axes.patches) == 400 and not len(axes.get_xticks())


def test_score_bars_print_their_values():
    systems = {
        "one": {"easy": 0.5, "medium": None, "hard": float("nan")},
        "two": {"easy": {"map": 0.904, "mp_at": {}}, "medium": 0.25},
    }
    axes = charts.score_bars(systems, intervals={"two": {"medium": (0.2, 0.4)}})
    assert texts(axes) == ["50.0", "90.4", "25.0"]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([50, np.nan, np.nan, 90.4, 25, np.nan], nan_ok=True)
    assert axes.lines[0].get_ydata() == pytest.approx([20, 40])
    assert axes.texts[2].get_position()[1] == pytest.approx(41)  # above the whisker
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["Easy", "Medium", "Hard"]
    middle = np.mean([bar.get_x() + bar.get_width() / 2 for bar in axes.patches[::3]])
    assert middle == pytest.approx(0)  # both bars stand round the tick


def test_parameter_curves_have_a_panel_a_parameter():
    rows = [("threshold", 4, 10, 2), ("threshold", 16, 10, 7), ("max_keypoints", 100, 10, 7)]
    table = pd.DataFrame(rows, columns=["parameter", "value", "matches", "inliers"])
    axes = charts.parameter_curves(table, RerankingSettings())
    assert [panel.get_xlabel() for panel in axes] == ["threshold", "max keypoints"]
    assert axes[0].lines[1].get_ydata().tolist() == [2, 7]
    assert [len(panel.lines) for panel in axes] == [3, 2]  # the value in use; None is no line
    assert len(charts.parameter_curves(table.head(0), RerankingSettings())) == 1
