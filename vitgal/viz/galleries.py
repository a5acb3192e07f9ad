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
from matplotlib.gridspec import GridSpec
from matplotlib.patches import ConnectionPatch, Patch, Rectangle

from vitgal.viz.drawing import (
    ImageSource,
    draw_photograph,
    hide_frame,
    read_pixels,
    sentence_figure,
    shorten,
    text_width,
    tighten,
    write_sentence,
)
from vitgal.viz.style import (
    BOX_COLOUR,
    CAPTION_SIZE,
    LABEL_COLOURS,
    LABEL_LETTERS,
    QUERY_COLOUR,
    STYLE,
)

WIDTH = 11.0  # inches, of rankings


@dataclass(frozen=True, eq=False)
class QueryImage:
    """A query's photograph, its box (x0, y0, x1, y1) in pixels (None: all of it), its title."""

    image: ImageSource
    box: Sequence[float] | None = None
    title: str = "query"


@dataclass(frozen=True, eq=False)
class RankedImage:
    """A database image in a ranking.

    Attributes:
        key: identifies the image in another ranking, for example its database index.
        image: the photograph.
        label: "easy", "hard", "junk" or "negative", the colour of its frame; None: no frame.
        caption: drawn beside it; may hold a line break.
    Raises:
        ValueError: the label is unknown.
    """

    key: Hashable
    image: ImageSource
    label: str | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        if self.label not in (*LABEL_COLOURS, None):
            raise ValueError(
                f"{self.key}: unknown label {self.label!r}; use {', '.join(LABEL_COLOURS)} or None"
            )


@plt.rc_context(STYLE)
def contact_sheet(
    images: Sequence[ImageSource],
    titles: Sequence[object] | None = None,
    *,
    columns: int = 8,
    width: float = 10.0,
) -> np.ndarray:
    """Draws small pictures of many photographs, row by row.

    Args:
        images: of any aspect.
        titles: one an image; may hold line breaks. A title wider than its picture loses its middle.
        width: of the figure, in inches.
    Returns:
        The axes, shape (rows, columns), blank after the last image; a sentence without images.
    Raises:
        ValueError: an array is no photograph, or the number of titles differs.
    """
    titles = [""] * len(images) if titles is None else [str(title) for title in titles]
    if len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images: give one each, or None")
    pictures = [read_pixels(image) for image in images]
    rows = -(-len(pictures) // columns)
    if not pictures:
        return np.array([[sentence_figure("no images")]])
    lines = max((title.count("\n") + 1 for title in titles if title), default=0)
    inches = width / columns
    size = (width, rows * (0.75 * inches + 0.135 * lines + 0.1) + 0.1)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    tighten(figure)
    for cell in axes.flat:
        hide_frame(cell)
    for cell, picture, title in zip(axes.flat, pictures, titles, strict=False):
        draw_photograph(cell, picture, inches)
        cell.set_title(shorten(title, 0.94 * inches), fontsize=CAPTION_SIZE)
    return axes


@plt.rc_context(STYLE)
def ranking_rows(
    queries: Sequence[QueryImage],
    rankings: Sequence[Sequence[RankedImage]],
    *,
    columns: int = 10,
) -> np.ndarray:
    """Draws the rankings of several queries under each other, one row a query.

    The first `columns` images of each ranking are drawn; an empty one says so. Returns the
    axes, shape (queries, 1 + columns); a sentence without queries. Raises ValueError where the
    numbers of queries and rankings differ or an array is no photograph.
    """
    if len(queries) != len(rankings):
        raise ValueError(f"{len(queries)} queries, but {len(rankings)} rankings: give one each")
    rankings = [_with_pixels(ranking[:columns]) for ranking in rankings]
    queries = _with_pixels(queries)
    if not queries:
        return np.array([[sentence_figure("no queries")]])
    figure, grid, inches = _make_grid(len(queries), columns, extra=0.35)
    query_cells = [figure.add_subplot(grid[row, 0]) for row in range(len(queries))]
    cells = _add_cells(figure, grid, len(queries), columns)
    for query_cell, query, row, ranking in zip(query_cells, queries, cells, rankings, strict=True):
        _draw_query(query_cell, query, 1.25 * inches)
        _draw_row(row, ranking, inches)
    _add_legend(figure, rankings)
    return np.array([[query, *row] for query, row in zip(query_cells, cells, strict=True)])


@plt.rc_context(STYLE)
def stacked_rankings(
    query: QueryImage,
    rankings: dict[str, Sequence[RankedImage]],
    reasons: pd.DataFrame | None = None,
    *,
    columns: int | None = None,
) -> np.ndarray:
    """Draws rankings of one query above each other, with a table of words below.

    Arrows lead from a labelled image's position in the first ranking to that in the second.

    Args:
        query: drawn once.
        rankings: one or two of name -> images, best first. An empty one says so.
        reasons: a table whose rows are written below; None or no row: no table.
        columns: images drawn of each ranking; None: all.
    Returns:
        The axes, shape (rankings, 1 + columns), the query's in each row.
    Raises:
        ValueError: an array is no photograph.
    """
    rows = [_with_pixels(images[:columns]) for images in rankings.values()]
    (query,) = _with_pixels([query])
    columns = columns or max([1, *map(len, rows)])
    lines = 0 if reasons is None else len(reasons)
    labelled = any(image.label for row in rows for image in row) or not any(rows)
    extra = 0.75 if not labelled else 0.4 if lines else 0.45
    figure, grid, inches = _make_grid(len(rows), columns, extra=extra, lines=lines)
    query_cell = figure.add_subplot(grid[: len(rows), 0])
    cells = _add_cells(figure, grid, len(rows), columns)
    _draw_query(query_cell, query, 1.25 * inches)
    for row, images, name in zip(cells, rows, rankings, strict=True):
        _draw_row(row, images, inches, below=labelled and row is not cells[0])
        row[0].set_ylabel(name)
    if len(rows) == 2 and labelled:
        _draw_arrows(cells, rows)
    if lines:
        write_table(figure.add_subplot(grid[len(rows), :]), reasons, WIDTH)
    if labelled:
        _add_legend(figure, rows)
    return np.array([[query_cell, *row] for row in cells])


def before_after(
    query: QueryImage,
    before: Sequence[RankedImage],
    after: Sequence[RankedImage],
    *,
    columns: int = 8,
) -> np.ndarray:
    """Draws a ranking before and after reranking, with arrows between an image's two positions.

    Args:
        query: drawn once.
        before, after: the two rankings, best first. The first `columns` images are drawn; the rest
            gives the ranks that images came from or went to. A caption of
            `after`, for example a number of inliers, is written below the rank.
        columns: images in a row.
    Returns:
        The axes, shape (2, 1 + columns), the query's in both rows.
    Raises:
        ValueError: a ranking holds an image twice, or an array is no photograph.
    """
    old, new = (
        {image.key: rank for rank, image in enumerate(images, 1)} for images in (before, after)
    )
    if len(old) < len(before) or len(new) < len(after):
        raise ValueError("a ranking before or after holds an image more than once")
    upper, lower = [], []
    for image in before[:columns]:
        rank = new.get(image.key)
        left = "   ▼ out" if rank is None else f"   ▼ to {rank}" if rank > columns else ""
        upper.append(replace(image, caption=f"{old[image.key]}{left}"))
    for image in after[:columns]:
        rank, origin = new[image.key], old.get(image.key)
        moved = "=" if origin == rank else f"{'▲' if (origin or 0) > rank else '▼'} from {origin}"
        caption = f"{rank} {moved if origin else 'new'}\n{image.caption}".strip()
        lower.append(replace(image, caption=caption))
    return stacked_rankings(query, {"before": upper, "after": lower}, columns=columns)


def _with_pixels(images: Sequence[Any]) -> list[Any]:
    """Queries or ranked images with their photographs read."""
    return [replace(image, image=read_pixels(image.image)) for image in images]


def _make_grid(
    rows: int, columns: int, *, extra: float, lines: int = 0
) -> tuple[Figure, GridSpec, float]:
    """A grid of query, gap and images, with a row for a table of so many lines; a cell's inches.

    extra: inches for captions and legend.
    """
    ratios = [1.25, 0.08] + [1.0] * columns
    inches = WIDTH / sum(ratios)
    heights = [0.75 * inches + 0.3] * rows + ([0.175 * (lines + 1)] if lines else [])
    figure = plt.figure(figsize=(WIDTH, sum(heights) + extra), layout="constrained")
    tighten(figure)
    grid = figure.add_gridspec(
        len(heights), len(ratios), width_ratios=ratios, height_ratios=heights
    )
    return figure, grid, inches


def _add_cells(figure: Figure, grid: GridSpec, rows: int, columns: int) -> list[list[Axes]]:
    """Axes [row][column] of the ranked images; no frame in the whole figure."""
    cells = [
        [figure.add_subplot(grid[row, 2 + column]) for column in range(columns)]
        for row in range(rows)
    ]
    for axes in figure.axes:
        hide_frame(axes)
    return cells


def _draw_query(axes: Axes, query: QueryImage, inches: float) -> None:
    """The query's photograph, faded outside its box."""
    image = query.image
    if query.box is not None:
        x0, y0, x1, y1 = (max(0, int(value)) for value in query.box)
        faded = cv2.addWeighted(image, 0.4, np.full_like(image, 255), 0.6, 0)
        faded[y0:y1, x0:x1] = image[y0:y1, x0:x1]
        image = faded
    draw_photograph(axes, image, inches)
    _draw_frame(axes, QUERY_COLOUR)
    axes.set_title(shorten(query.title, 0.94 * inches), fontsize=CAPTION_SIZE, color=QUERY_COLOUR)
    if query.box is not None:
        corner = (x0 - 0.5, y0 - 0.5)  # edges of pixels: the last one of the crop is x1 - 1
        axes.add_patch(
            Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=BOX_COLOUR, linewidth=1.6)
        )


def _draw_frame(axes: Axes, colour: str) -> None:
    axes.spines[:].set(visible=True, color=colour, linewidth=2.5)


def _draw_row(
    cells: Sequence[Axes], images: Sequence[RankedImage], inches: float, *, below: bool = False
) -> None:
    """One ranking's photographs in their frames, with captions above or below."""
    if not images:
        write_sentence(cells[0], "no image\nranked")
    for axes, image in zip(cells, images, strict=False):
        draw_photograph(axes, image.image, inches)
        if image.label is not None:
            _draw_label(axes, image.label)
        caption = shorten(image.caption, 0.92 * inches)
        if below:
            axes.set_anchor("S")
            axes.set_xlabel(caption, fontsize=CAPTION_SIZE)
        else:
            axes.set_title(caption, fontsize=CAPTION_SIZE)


def _draw_label(axes: Axes, label: str) -> None:
    """A frame in the label's colour, with the label's letter in the corner."""
    _draw_frame(axes, LABEL_COLOURS[label])
    axes.text(
        *(0, 1, LABEL_LETTERS[label]),
        transform=axes.transAxes,
        ha="left",
        va="top",
        fontsize=CAPTION_SIZE,
        fontweight="bold",
        color="white" if label in ("easy", "negative") else "black",
        bbox={"facecolor": LABEL_COLOURS[label], "edgecolor": "none", "pad": 1.8},
    )


def _draw_arrows(cells: Sequence[Sequence[Axes]], rows: Sequence[Sequence[RankedImage]]) -> None:
    """From an image's position in the first row to its position in the second."""
    after = [image.key for image in rows[1]]
    for position, image in enumerate(rows[0]):
        if image.key not in after:
            continue
        arrow = ConnectionPatch(
            (0.5, -0.02),
            (0.5, 1.02),
            *("axes fraction", "axes fraction"),
            axesA=cells[0][position],
            axesB=cells[1][after.index(image.key)],
            color=LABEL_COLOURS[image.label],
            linewidth=1.8,
            arrowstyle="-|>",
        )
        arrow.set_in_layout(False)  # else the layout would make room for it between the rows
        cells[0][position].figure.add_artist(arrow)


def _add_legend(figure: Figure, rankings: Sequence[Sequence[RankedImage]]) -> None:
    """Names the frames that occur."""
    labels = {image.label for ranking in rankings for image in ranking}
    entries = [("query", QUERY_COLOUR)]
    entries += [
        (f"{letter}  {label}", LABEL_COLOURS[label])
        for label, letter in LABEL_LETTERS.items()
        if label in labels
    ]
    handles = [
        Patch(facecolor="white", edgecolor=colour, linewidth=2, label=name)
        for name, colour in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def write_table(axes: Axes, table: pd.DataFrame, width: float) -> None:
    """Writes a table as text: numbers aligned to the right, words to the left.

    The first column, the names, is shortened where the columns are wider than `width` inches.
    """
    hide_frame(axes)
    axes.set(xlim=(0, 72 * width), ylim=(len(table) + 0.5, -0.5))
    columns = {str(name): [_cell_text(value) for value in table[name]] for name in table}
    gap, left = 14.0, 4.0
    widths = {
        name: max(text_width(text, CAPTION_SIZE) for text in (name, *texts))
        for name, texts in columns.items()
    }
    first = next(iter(widths))
    rest = sum(widths.values()) - widths[first] + gap * len(widths)
    widths[first] = min(widths[first], max(60.0, 72 * width - rest - left))
    for name, texts in columns.items():
        number = pd.api.types.is_numeric_dtype(table[name])
        x = left + (widths[name] if number else 0)
        for line, text in enumerate((name, *texts)):
            axes.text(
                *(x, line, shorten(text, widths[name] / 72 + 0.02)),
                ha="right" if number else "left",
                va="center",
                fontsize=CAPTION_SIZE,
                fontweight="bold" if line == 0 else "normal",
            )
        left += widths[name] + gap


def _cell_text(value: object) -> str:
    """Formats a value; – for a missing one."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
