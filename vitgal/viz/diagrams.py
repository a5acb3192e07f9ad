"""Diagrams of a computation: its steps as boxes with arrows between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from vitgal.viz.drawing import escape, hide_frame, sentence_figure, text_width
from vitgal.viz.style import CAPTION_SIZE, CURVE_COLOURS, INK, STEP_COLOUR, STYLE

ROW = 0.95  # inches from one row of boxes to the next
GAP = 0.28  # inches between two boxes


@dataclass(frozen=True)
class Step:
    """A step of a diagram: what it is, the shape of the result, and a short note."""

    name: str
    shape: str
    note: str

    @property
    def width(self) -> float:
        """The inches that the longest line needs; bold letters are a sixth wider."""
        widths = (
            1.17 * text_width(self.name, CAPTION_SIZE),
            text_width(self.shape, 9),
            text_width(self.note, CAPTION_SIZE),
        )
        return max(widths) / 72 + 0.16


@plt.rc_context(STYLE)
def step_diagram(steps: Sequence[Step], *, width: float = 10.0) -> Axes:
    """Draws steps as boxes with arrows between them, row by row as `width` inches allow.

    Returns the axes, in inches; a sentence where there is no step.
    """
    if not steps:
        return sentence_figure("no steps")
    rows = _break_rows(steps, width)
    height = ROW * len(rows)
    _, axes = plt.subplots(figsize=(width, height), layout="constrained")
    hide_frame(axes)
    axes.set(xlim=(0, width), ylim=(height, 0))
    for number, row in enumerate(rows):
        middle, left = ROW * number + 0.47, 0.05
        for step in row:
            _draw_step(axes, step, left, middle)
            if step is not row[0]:
                arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.0}
                ends = (left, middle), (left - GAP, middle)
                axes.annotate("", *ends, arrowprops=arrow)
            left += step.width + GAP
    return axes


def _break_rows(steps: Sequence[Step], width: float) -> list[list[Step]]:
    """As many steps in a row as fit."""
    rows, used = [[]], 0.0
    for step in steps:
        if rows[-1] and used + GAP + step.width > width - 0.1:
            rows.append([])
            used = 0.0
        used += step.width + (GAP if rows[-1] else 0.0)
        rows[-1].append(step)
    return rows


def _draw_step(axes: Axes, step: Step, left: float, middle: float) -> None:
    """A box with three lines of text; left and middle in inches."""
    corner, blue = (left, middle - 0.35), CURVE_COLOURS[0]
    axes.add_patch(
        Rectangle(corner, step.width, 0.7, facecolor=STEP_COLOUR, edgecolor=blue, linewidth=1)
    )
    x = left + step.width / 2
    for y, text, size, weight, colour in (
        (middle - 0.19, step.name, CAPTION_SIZE, "bold", INK),
        (middle, step.shape, 9, "normal", blue),
        (middle + 0.19, step.note, CAPTION_SIZE, "normal", INK),
    ):
        axes.text(
            *(x, y, escape(text)), fontsize=size, weight=weight, color=colour, ha="center",
            va="center",
        )  # fmt: skip
