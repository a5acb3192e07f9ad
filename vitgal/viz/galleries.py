"""Galleries: photographs in rows, and rankings whose frames show the labels."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from vitgal.runs import printable
from vitgal.viz import drawing
from vitgal.viz.style import BOX_COLOUR, CAPTION_SIZE, LABEL_COLOURS, QUERY_COLOUR, styled

WIDTH = 11.0  # inches, of rankings


@dataclass(frozen=True, eq=False)
class QueryImage:
    """A query's photograph, its box (x0, y0, x1, y1) in pixels (None: all of it), its title."""

    image: drawing.ImageSource
    box: Sequence[float] | None = None
    title: str = "query"


@dataclass(frozen=True, eq=False)
class RankedImage:
    """A database image in a ranking.

    key: identifies it in another ranking. label: "easy", "hard", "junk" or "negative", the colour
    of its frame; None: no frame. caption: drawn beside it; may hold a line break.
    """

    key: Hashable
    image: drawing.ImageSource
    label: str | None = None
    caption: str = ""


@styled
def contact_sheet(
    images: Sequence[drawing.ImageSource], titles: Sequence[str], *, columns: int = 8
) -> np.ndarray:
    """Draws small pictures of many photographs, row by row.

    images: of any aspect. titles: one an image; may hold line breaks. A title wider than its
    picture loses its middle. Returns the axes, shape (rows, columns), blank after the last image;
    a sentence without images. Raises ValueError where an array is no photograph or the number of
    titles differs.
    """
    if len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images: give one each")
    pictures = [drawing.read_pixels(image) for image in images]
    rows, inches = -(-len(pictures) // columns), 10 / columns
    if not pictures:
        return np.array([[drawing.sentence_figure("no images")]])
    lines = max((title.count("\n") + 1 for title in titles if title), default=0)
    size = (10, rows * (0.75 * inches + 0.135 * lines + 0.1) + 0.1)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    drawing.tighten(figure)
    for cell in axes.flat:
        drawing.hide_frame(cell)
    for cell, picture, title in zip(axes.flat, pictures, titles, strict=False):
        drawing.draw_photograph(cell, picture, inches)
        cell.set_title(drawing.shorten_lines(title, 0.94 * inches), fontsize=CAPTION_SIZE)
    return axes


@styled
def ranking_rows(
    queries: Sequence[QueryImage],
    rankings: Sequence[Sequence[RankedImage]],
    *,
    columns: int = 10,
) -> np.ndarray:
    """Draws the first `columns` images of several queries' rankings, one row a query.

    An empty ranking gets a note. Returns the axes, shape (queries, 1 + columns); a sentence without
    queries. Raises ValueError where the numbers of queries and rankings differ or an array is no
    photograph.
    """
    if len(queries) != len(rankings):
        raise ValueError(f"{len(queries)} queries, but {len(rankings)} rankings: give one each")
    if not queries:
        return np.array([[drawing.sentence_figure("no queries")]])
    rows = [_with_pixels(ranking[:columns]) for ranking in rankings]
    axes, inches = _make_axes(_with_pixels(queries), len(rows), columns, extra=0.35)
    for row, images in zip(axes, rows, strict=True):
        _draw_row(row[1:], images, inches)
    _add_legend(axes[0, 0].figure, rows)
    return axes


@styled
def stacked_rankings(
    query: QueryImage,
    rankings: dict[str, Sequence[RankedImage]],
    reasons: pd.DataFrame | None = None,
    *,
    columns: int,
) -> np.ndarray:
    """Draws rankings of one query above each other, with a text table below.

    Arrows lead from a labelled image's position in the first ranking to that in the second.
    rankings: one or two of name -> images, best first; an empty one gets a note. reasons: the
    table that is written below. columns: images drawn of each ranking. Returns the axes, shape
    (rankings, 1 + columns), the query's in each row. Raises ValueError where an array is no
    photograph.
    """
    rows = [_with_pixels(images[:columns]) for images in rankings.values()]
    lines = 0 if reasons is None else len(reasons)
    labelled = any(image.label for row in rows for image in row) or not any(rows)
    extra = 0.75 if not labelled else 0.4 if lines else 0.45
    if any("\n" in image.caption for row in rows for image in row):
        extra += 0.15 * len(rows)
    axes, inches = _make_axes(_with_pixels([query]), len(rows), columns, extra=extra, lines=lines)
    for number, (images, name) in enumerate(zip(rows, rankings, strict=True)):
        _draw_row(axes[number, 1:], images, inches, below=labelled and number > 0)
        axes[number, 1].set_ylabel(drawing.drawable(name))
    figure = axes[0, 0].figure
    if len(rows) == 2 and labelled:
        _draw_arrows(axes[:, 1:], rows)
    if lines:
        grid = axes[0, 0].get_gridspec()
        _write_table(figure.add_subplot(grid[len(rows), :]), reasons)
    if labelled:
        _add_legend(figure, rows)
    return axes


def _with_pixels(images: Sequence[Any]) -> list[Any]:
    return [replace(image, image=drawing.read_pixels(image.image)) for image in images]


def _make_axes(
    queries: Sequence[QueryImage], rows: int, columns: int, *, extra: float, lines: int = 0
) -> tuple[np.ndarray, float]:
    """Makes axes (rows, 1 + columns) with the queries drawn; returns also an image's inches."""
    ratios = [1.25, 0.08] + [1.0] * columns  # query, gap, images
    inches = WIDTH / sum(ratios)
    heights = [0.75 * inches + 0.3] * rows + ([0.175 * (lines + 1)] if lines else [])
    figure = plt.figure(figsize=(WIDTH, sum(heights) + extra))
    drawing.tighten(figure)
    sizes = (len(heights), len(ratios))
    grid = figure.add_gridspec(*sizes, width_ratios=ratios, height_ratios=heights)
    axes, span = np.empty((rows, 1 + columns), object), rows // len(queries)
    for number, query in enumerate(queries):
        cell = figure.add_subplot(grid[number * span : (number + 1) * span, 0])
        axes[number * span : (number + 1) * span, 0] = cell
        _draw_query(cell, query, 1.25 * inches)
    for row, column in np.ndindex(rows, columns):
        axes[row, 1 + column] = figure.add_subplot(grid[row, 2 + column])
        drawing.hide_frame(axes[row, 1 + column])
    return axes, inches


def _draw_query(axes: Axes, query: QueryImage, inches: float) -> None:
    image = query.image
    if query.box is not None:
        x0, y0, x1, y1 = (max(0, int(value)) for value in query.box)
        image = cv2.addWeighted(image, 0.4, np.full_like(image, 255), 0.6, 0)
        image[y0:y1, x0:x1] = query.image[y0:y1, x0:x1]
        corner = (x0 - 0.5, y0 - 0.5)  # edges of pixels: the last one of the crop is x1 - 1
        axes.add_patch(
            Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=BOX_COLOUR, linewidth=1.6)
        )
    drawing.draw_photograph(axes, image, inches)
    axes.spines[:].set(visible=True, color=QUERY_COLOUR, linewidth=2.5)
    title = axes.set_title(drawing.shorten(query.title, 0.94 * inches), fontsize=CAPTION_SIZE)
    title.set_color(QUERY_COLOUR)


def _draw_row(
    cells: Sequence[Axes], images: Sequence[RankedImage], inches: float, *, below: bool = False
) -> None:
    if not images:
        drawing.write_sentence(cells[0], "no image\nranked")
    for axes, image in zip(cells, images, strict=False):
        drawing.draw_photograph(axes, image.image, inches)
        if image.label is not None:
            _draw_label(axes, image.label)
        caption = drawing.shorten_lines(image.caption, 0.92 * inches)
        (axes.set_xlabel if below else axes.set_title)(caption, fontsize=CAPTION_SIZE)
        axes.set_anchor("S" if below else "N")


def _draw_label(axes: Axes, label: str) -> None:
    axes.spines[:].set(visible=True, color=LABEL_COLOURS[label], linewidth=2.5)
    letter = axes.text(0, 1, label[0].upper(), transform=axes.transAxes, fontsize=CAPTION_SIZE)
    letter.set(ha="left", va="top", fontweight="bold")
    letter.set_color("white" if label in ("easy", "negative") else "black")
    letter.set_bbox({"facecolor": LABEL_COLOURS[label], "edgecolor": "none", "pad": 1.8})


def _draw_arrows(cells: np.ndarray, rows: Sequence[Sequence[RankedImage]]) -> None:
    after = {image.key: cell for cell, image in zip(cells[1], rows[1], strict=False)}
    for cell, image in zip(cells[0], rows[0], strict=False):
        if image.key in after:
            ends, colour = (cell, after[image.key]), LABEL_COLOURS[image.label]
            drawing.draw_arrow(ends, (0.5, -0.02), (0.5, 1.02), color=colour, linewidth=1.8)


def _add_legend(figure: Figure, rankings: Sequence[Sequence[RankedImage]]) -> None:
    labels = {image.label for ranking in rankings for image in ranking}
    colours = {"query": QUERY_COLOUR}
    for label, colour in LABEL_COLOURS.items():
        if label in labels:
            colours[f"{label[0].upper()}  {label}"] = colour
    handles = [
        Patch(facecolor="white", edgecolor=colour, linewidth=2, label=name)
        for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _write_table(axes: Axes, table: pd.DataFrame) -> None:
    """Writes a table as text; the first column is shortened to fit WIDTH inches."""
    drawing.hide_frame(axes)
    axes.set(xlim=(0, 72 * WIDTH), ylim=(len(table) + 0.5, -0.5))
    columns = {name: [name, *map(_cell_text, table[name])] for name in table}
    widths = [max(drawing.text_width(t, CAPTION_SIZE) for t in texts) for texts in columns.values()]
    gap, left = 14.0, 4.0
    rest = sum(widths[1:]) + gap * len(widths)
    widths[0] = min(widths[0], max(60.0, 72 * WIDTH - rest - left))
    for (name, texts), wide in zip(columns.items(), widths, strict=True):
        number = pd.api.types.is_numeric_dtype(table[name])
        for line, text in enumerate(texts):
            text = drawing.shorten(text, wide / 72 + 0.02)
            written = axes.text(left + wide * number, line, text, va="center")
            written.set(ha="right" if number else "left", fontsize=CAPTION_SIZE)
            written.set_fontweight("bold" if line == 0 else "normal")
        left += wide + gap


def _cell_text(value: object) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else printable(value)
