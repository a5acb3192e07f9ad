"""Charts of the split, of training and of scores."""

import numpy as np
import pandas as pd
import pytest

from tests.viz.drawn_samples import log, texts
from vitgal.settings import RerankingSettings
from vitgal.viz import charts


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


def test_training_curves_show_the_logged_values():
    panels = charts.training_curves(log())
    assert [panel.get_title("left") for panel in panels] == list(charts.PANELS)
    accuracy = panels[1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines["training (accuracy: with margin)"] == [[10, 10], [20, 30]]
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
    assert schedule[0].lines[0].get_xdata().tolist() == [1, 2, 3]  # epochs that are over
    both = charts.training_curves(log().assign(epoch=[0, 0, 1]))  # 15 steps an epoch
    assert both[0].get_xlabel() == "epoch"
    assert both[0].lines[0].get_xdata() == pytest.approx([10 / 15, 20 / 15, 2])
    legend = [text.get_text() for text in both[0].figure.legends[0].get_texts()]
    assert legend == ["training (accuracy: with margin)", "validation", "validation (margin)"]


def test_a_curve_has_the_band_of_its_interval():
    options = log().assign(val_map_low=[np.nan, np.nan, 0.5], val_map_high=[np.nan, np.nan, 0.7])
    options.loc[0, ["val_map", "val_map_low", "val_map_high"]] = (0.25, 0.125, 0.375)
    axes = charts.training_curves(options)[2]
    (band,) = axes.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()} == {
        *((10.0, 12.5), (10.0, 37.5), (30.0, 50.0), (30.0, 70.0))
    }


def test_parameter_curves_have_a_panel_a_parameter():
    rows = [("threshold", 4, 10, 2), ("threshold", 16, 10, 7), ("max_keypoints", 100, 10, 7)]
    table = pd.DataFrame(rows, columns=["parameter", "value", "matches", "inliers"])
    axes = charts.parameter_curves(table, RerankingSettings())
    assert [panel.get_xlabel().split("\n")[1] for panel in axes] == [
        "(threshold)",
        "(max_keypoints)",
    ]
    assert axes[0].lines[1].get_ydata().tolist() == [2, 7]
    assert [panel.lines[2].get_xdata()[0] for panel in axes] == [16, 100]  # in use; None is all
    assert [texts(panel) for panel in axes] == [["16"], ["all"]]
    assert len(charts.parameter_curves(table.head(0), RerankingSettings())) == 1
