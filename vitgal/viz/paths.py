"""The path of tensors through the pipeline as a drawing."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from vitgal.viz.style import CAPTION, INK, SERIES, STYLE, _bare, _literal, _only_says, _wide


def tensor_path(steps: Sequence[tuple[str, str, str]], *, width: float = 10.0) -> Axes:
    """Steps as boxes with arrows between them: what it is, its shape, a word on it.

    steps: (name, shape, note) each, drawn from left to right, on further lines where one is not
    wide enough. Returns the axes, in inches. No steps: it says so.
    """
    with plt.rc_context(STYLE):
        if not steps:
            return _only_says("no steps", width=width / 2)
        boxes = _box_lines([_box_width(step) for step in steps], width)
        rows = 1 + max(row for row, _, _ in boxes)
        figure, axes = plt.subplots(figsize=(width, 0.95 * rows), layout="constrained")
        _bare(axes)
        axes.set(xlim=(0, width), ylim=(0.95 * rows, 0))
        middle = None
        for (name, shape, note), (row, left, wide) in zip(steps, boxes, strict=True):
            top = 0.95 * row + 0.12
            style = {"facecolor": "#EAF3FA", "edgecolor": SERIES[0], "linewidth": 1.0}
            axes.add_patch(Rectangle((left, top), wide, 0.7, **style))
            centre = left + wide / 2
            for offset, text, weight in ((0.16, name, "bold"), (0.54, note, "normal")):
                place = {"ha": "center", "va": "center", "fontsize": CAPTION}
                axes.text(centre, top + offset, _literal(text), fontweight=weight, **place)
            place = {"ha": "center", "va": "center", "fontsize": 9, "color": SERIES[0]}
            axes.text(centre, top + 0.35, _literal(shape), **place)
            if middle is not None and middle[0] == row:
                arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.0}
                ends = (left, top + 0.35), (middle[1], top + 0.35)
                axes.annotate("", *ends, arrowprops=arrow)
            middle = row, left + wide
    return axes


def _box_width(step: tuple[str, str, str]) -> float:
    """Inches that a step's longest line needs; bold letters are a sixth wider."""
    name, shape, note = step
    points = max(1.17 * _wide(name, CAPTION), _wide(shape, 9), _wide(note, CAPTION))
    return points / 72 + 0.16


def _box_lines(widths: Sequence[float], width: float) -> list[tuple[int, float, float]]:
    """Row, left edge and width of each box, as many in a row as fit."""
    gap, rows, used = 0.28, [[]], 0.0
    for box in widths:
        if rows[-1] and used + gap + box > width - 0.1:
            rows.append([])
            used = 0.0
        used += box + (gap if rows[-1] else 0.0)
        rows[-1].append(box)
    places = []
    for row, boxes in enumerate(rows):
        left = 0.05
        for box in boxes:
            places.append((row, left, box))
            left += box + gap
    return places
