"""The figure that explains one query's failure."""

from collections.abc import Hashable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vitgal.viz.rankings import _arrows, _fill, _legend, _query, _ranked
from vitgal.viz.style import CAPTION, STYLE, Image, _bare, _elide, _pixels, _tighten, _wide


def failure(
    query_image: Image,
    box: Sequence[float] | None,
    images: Mapping[Hashable, Image],
    labels: Mapping[Hashable, str],
    rows: Mapping[str, Sequence[tuple[Hashable, str]]],
    reasons: pd.DataFrame,
    *,
    query_title: str = "query",
    width: float = 11.0,
) -> np.ndarray:
    """A query with its box, its ranking once or before and after, and a table of reasons below.

    rows: one or two of name -> [(key, caption), ...], best first; all are drawn, and arrows lead
    from an image's place in the first row to its place in the second. images, labels: by key, at
    least of those drawn. reasons: a row a line under the photographs, its columns named there; no
    row: no table. Returns the axes of the photographs (rows, 1 + columns), the query's in each row.
    A row without images says so. Raises KeyError for a missing photograph or label, ValueError for
    an unknown label.
    """
    drawn = [list(row) for row in rows.values()]
    ranked = [
        _ranked(
            [images[key] for key, _ in row],
            [labels[key] for key, _ in row],
            [caption for _, caption in row],
            None,
        )
        for row in drawn
    ]
    picture = _pixels(query_image)
    columns = max([1, *map(len, drawn)])
    with plt.rc_context(STYLE):
        query, cells, panel, inches = _failure_grid(len(drawn), columns, len(reasons), width)
        _query(query, picture, box, query_title, 1.25 * inches)
        for line, row, name in zip(cells, ranked, rows, strict=True):
            _fill(line, row, inches, below=line is not cells[0])
            line[0].set_ylabel(name)
        if len(cells) == 2:
            _arrows(cells, [[key for key, _ in row] for row in drawn], labels)
        _words(panel, reasons, width)
        _legend(query.figure, {label for row in ranked for _, label, _ in row})
    return np.array([[query, *line] for line in cells])


def _failure_grid(
    rows: int, columns: int, lines: int, width: float
) -> tuple[Axes, list[list[Axes]], Axes, float]:
    """The query's axes, axes [row][column], the axes of the table, and a cell's inches."""
    ratios = [1.25, 0.08] + [1.0] * columns
    inches = width / sum(ratios)
    heights = [0.75 * inches + 0.3] * rows + [0.175 * (lines + 1) if lines else 0.01]
    size = (width, sum(heights) + 0.4)
    figure = plt.figure(figsize=size, layout="constrained")
    _tighten(figure)
    grid = figure.add_gridspec(rows + 1, len(ratios), width_ratios=ratios, height_ratios=heights)
    query = figure.add_subplot(grid[:rows, 0])
    cells = [
        [figure.add_subplot(grid[row, 2 + column]) for column in range(columns)]
        for row in range(rows)
    ]
    panel = figure.add_subplot(grid[rows, :])
    for axes in figure.axes:
        _bare(axes)
    return query, cells, panel, inches


def _words(axes: Axes, table: pd.DataFrame, width: float) -> None:
    """A table as text: numbers to the right of their column, words to the left, nothing cut off."""
    axes.set(xlim=(0, 72 * width), ylim=(len(table) + 0.5, -0.5))
    if not len(table):
        return
    shown = {str(name): [_cell(value) for value in table[name]] for name in table}
    gap, left = 14.0, 4.0
    widths = {
        name: max(_wide(text, CAPTION) for text in (name, *texts)) for name, texts in shown.items()
    }
    # The first column, the names, gives way where all together are too wide.
    first = next(iter(widths))
    rest = sum(widths.values()) - widths[first] + gap * len(widths)
    widths[first] = min(widths[first], max(60.0, 72 * width - rest - left))
    for name, texts in shown.items():
        number = pd.api.types.is_numeric_dtype(table[name])
        place = left + (widths[name] if number else 0)
        for line, text in enumerate((name, *texts)):
            text = _elide(text, widths[name] / 72 + 0.02)
            style = {"ha": "right" if number else "left", "va": "center", "fontsize": CAPTION}
            weight = "bold" if line == 0 else "normal"
            axes.text(place, line, text, fontweight=weight, **style)
        left += widths[name] + gap


def _cell(value: object) -> str:
    """A value as a person writes it; – for one that is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
