"""Diagrams of computations."""

from matplotlib.patches import Rectangle

from vitgal.viz import diagrams


def test_a_diagram_keeps_every_word_in_its_box_and_its_box_in_the_figure():
    steps = [
        diagrams.Step("name " * (1 + i % 3), f"{i} × 128", "a note of some words")
        for i in range(11)
    ]
    axes = diagrams.step_diagram(steps, width=8)
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
