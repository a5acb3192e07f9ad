"""Diagrams of computations."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from vitgal import runs, stages
from vitgal.data import revisited
from vitgal.viz import diagrams


def test_a_diagram_keeps_every_word_in_its_box_and_its_box_in_the_figure():
    steps = [("name " * (1 + i % 3), f"{i} × 128", "a note of some words") for i in range(11)]
    axes = diagrams.step_diagram(steps)
    axes.figure.draw_without_rendering()
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(boxes) == 11
    words = [text for text in axes.texts if text.get_text()]
    assert len(words) == 33
    for number, text in enumerate(words):
        extent, box = text.get_window_extent(), boxes[number // 3]
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1, text
        assert box.y0 <= extent.y0 and extent.y1 <= box.y1, text
    assert all(box.x1 <= axes.figure.bbox.x1 for box in boxes)
    # Rows of boxes do not overlap, and arrows stay within a row.
    assert len({round(box.y0) for box in boxes}) > 1
    assert len(axes.texts) - len(words) == 11 - len({round(box.y0) for box in boxes})


def test_a_query_is_drawn_on_its_way_with_the_shapes_of_its_network(inspected_run, tmp_path):
    benchmark = revisited.open_dataset("tiny", inspected_run)
    with runs.stage(tmp_path / "global", "global", parameters={"size": 64}, inputs={}) as stage:
        descriptor = np.linspace(-1, 1, 128, dtype=np.float32)
        runs.write_array(stage.folder / "queries.npy", np.stack([descriptor, -descriptor]))
        stage.finish(["queries.npy"])
    model = inspected_run / "model.safetensors"
    flow = stages.query_flow(tmp_path / "global", benchmark, model, query=1)
    image, box, maps, vector, patch = flow
    assert image.shape == (96, 128, 3) and box.tolist() == [0, 0, 128, 96]
    assert maps["tokens"][0].shape == (4, 4, 128)  # 64 pixels are 4 patches
    assert vector == pytest.approx(-descriptor) and patch == 16
    axes = diagrams.flow_figure(*flow)
    notes = [panel.get_xlabel() for panel in axes]
    assert notes[1:3] == ["4 × 4 of 16 × 16 pixels", "4 × 4 × 128, as colours"]
    assert notes[4] == "128 numbers, length 1"
    coarser = diagrams.flow_figure(image, box, maps, vector, patch=32)
    assert coarser[1].get_xlabel() == "4 × 4 of 32 × 32 pixels"
    assert stages.query_flow(tmp_path, benchmark, "timm:resnet18", query=0) is None
