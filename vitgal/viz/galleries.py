"""Galleries: photographs in rows, and rankings whose frames show the labels."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Patch, Rectangle

from vitgal.viz.drawing import (
    ImageSource,
    check_titles,
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


@dataclass(frozen=True, eq=False)
class QueryImage:
    """A query as galleries draw it.

    Attributes:
        image: the photograph.
        box: (x0, y0, x1, y1) in pixels of the photograph; None: the whole of it.
        title: drawn above it.
    """

    image: ImageSource
    box: Sequence[float] | None = None
    title: str = "query"


@dataclass(frozen=True, eq=False)
class RankedImage:
    """A database image in a ranking as galleries draw it.

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
        if self.label is not None and self.label not in LABEL_COLOURS:
            raise ValueError(
                f"{self.key}: unknown label {self.label!r}; use {', '.join(LABEL_COLOURS)} or None"
            )


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
        The axes (rows, columns), blank after the last image; a sentence where there is no image.
    Raises:
        ValueError: an array is no photograph, or the number of titles differs.
    """
    titles = check_titles(titles, len(images))
    pictures = [read_pixels(image) for image in images]
    rows = -(-len(pictures) // columns)
    with plt.rc_context(STYLE):
        if not pictures:
            return np.array([[sentence_figure("no images", width=width / 2)]])
        lines = max((title.count("\n") + 1 for title in titles if title), default=0)
        inches = width / columns
        size = (width, rows * (0.75 * inches + 0.135 * lines + 0.1) + 0.1)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        tighten(figure)
        for cell in axes.flat:
            hide_frame(cell)
        for cell, picture, title in zip(axes.flat, pictures, titles, strict=False):
            draw_photograph(cell, picture, inches)
            cell.set_title(shorten(title, 0.94 * inches), fontsize=CAPTION_SIZE)
    return axes


def ranking_rows(
    queries: Sequence[QueryImage],
    rankings: Sequence[Sequence[RankedImage]],
    *,
    columns: int = 10,
    width: float = 11.0,
) -> np.ndarray:
    """Draws the rankings of several queries under each other, one row a query.

    Args:
        queries: their photographs.
        rankings: one a query, best first; the first `columns` images are drawn.
        width: of the figure, in inches.
    Returns:
        The axes (queries, 1 + columns). A query without images says so; so does a figure without
        queries.
    Raises:
        ValueError: there are more or fewer rankings than queries, or an array is no photograph.
    """
    if len(queries) != len(rankings):
        raise ValueError(f"{len(queries)} queries, but {len(rankings)} rankings: give one each")
    rankings = [_with_pixels(ranking[:columns]) for ranking in rankings]
    queries = [replace(query, image=read_pixels(query.image)) for query in queries]
    if not queries:
        with plt.rc_context(STYLE):
            return np.array([[sentence_figure("no queries", width=width / 2)]])
    count, ratios = len(queries), _column_ratios(columns)
    inches = width / sum(ratios)
    with plt.rc_context(STYLE):
        size = (width, count * (0.75 * inches + 0.3) + 0.35)
        figure = plt.figure(figsize=size, layout="constrained")
        tighten(figure)
        grid = figure.add_gridspec(count, len(ratios), width_ratios=ratios)
        query_cells = [figure.add_subplot(grid[row, 0]) for row in range(count)]
        cells = _add_cells(grid, count, columns)
        for index, query in enumerate(queries):
            _draw_query(query_cells[index], query, 1.25 * inches)
            _draw_row(cells[index], rankings[index], inches)
        _add_legend(figure, rankings)
    return np.array([[query, *row] for query, row in zip(query_cells, cells, strict=True)])


def stacked_rankings(
    query: QueryImage,
    rankings: dict[str, Sequence[RankedImage]],
    reasons: pd.DataFrame | None = None,
    *,
    columns: int | None = None,
    width: float = 11.0,
) -> np.ndarray:
    """Draws rankings of one query above each other, with a table of words below.

    Arrows lead from a labelled image's position in the first ranking to that in the second.

    Args:
        query: its photograph, drawn once.
        rankings: one or two of name -> images, best first.
        reasons: a table whose rows are written below the photographs; None or no row: no table.
        columns: images drawn of each ranking; None: all.
        width: of the figure, in inches.
    Returns:
        The axes (rankings, 1 + columns), the query's in each row. An empty ranking says so.
    Raises:
        ValueError: an array is no photograph.
    """
    rows = [_with_pixels(images[:columns]) for images in rankings.values()]
    query = replace(query, image=read_pixels(query.image))
    columns = columns or max([1, *map(len, rows)])
    lines = 0 if reasons is None else len(reasons)
    labelled = any(image.label for row in rows for image in row) or not any(rows)
    with plt.rc_context(STYLE):
        figure, query_cell, cells, inches = _stacked_cells(
            len(rows), columns, width, lines=lines, extra=0.45 if labelled else 0.75
        )
        _draw_query(query_cell, query, 1.25 * inches)
        for row, images, name in zip(cells, rows, rankings, strict=True):
            _draw_row(row, images, inches, below=labelled and row is not cells[0])
            row[0].set_ylabel(name)
        if len(rows) == 2 and labelled:
            _draw_arrows(cells, rows)
        if lines:
            write_table(figure.axes[-1], reasons, width)
        if labelled:
            _add_legend(figure, rows)
    return np.array([[query_cell, *row] for row in cells])


def before_after(
    query: QueryImage,
    before: Sequence[RankedImage],
    after: Sequence[RankedImage],
    *,
    columns: int = 8,
    width: float = 11.0,
) -> np.ndarray:
    """Draws a ranking before and after reranking, with arrows between an image's two positions.

    Args:
        query: its photograph.
        before, after: the two rankings, best first, as far as they are known. The first `columns`
            images are drawn; the rest tells where an image came from or went to. A caption of
            `after`, for example a number of inliers, is written below the rank.
        width: of the figure, in inches.
    Returns:
        The axes (2, 1 + columns), the query's in both rows. An empty ranking says so.
    Raises:
        ValueError: a ranking holds an image twice, or an array is no photograph.
    """
    first, second = ([image.key for image in ranking] for ranking in (before, after))
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        raise ValueError("a ranking before or after holds an image more than once")
    upper, lower = [], []
    for rank, image in enumerate(before[:columns], 1):
        new = second.index(image.key) + 1 if image.key in second else None
        left = "   ▼ out" if new is None else f"   ▼ to {new}" if new > columns else ""
        upper.append(replace(image, caption=f"{rank}{left}"))
    for rank, image in enumerate(after[:columns], 1):
        old = first.index(image.key) + 1 if image.key in first else None
        moved = f"{'▲' if old > rank else '▼'} from {old}" if old and old != rank else "="
        caption = f"{rank} {moved if old else 'new'}\n{image.caption}".strip()
        lower.append(replace(image, caption=caption))
    return stacked_rankings(query, {"before": upper, "after": lower}, columns=columns, width=width)


def _with_pixels(images: Sequence[RankedImage]) -> list[RankedImage]:
    return [replace(image, image=read_pixels(image.image)) for image in images]


def _column_ratios(columns: int) -> list[float]:
    """Widths of the query, a gap, and each image, in widths of an image."""
    return [1.25, 0.08] + [1.0] * columns


def _add_cells(grid: plt.GridSpec, rows: int, columns: int) -> list[list[Axes]]:
    """Axes [row][column] of the ranked images, without frames."""
    figure = grid.figure
    cells = [
        [figure.add_subplot(grid[row, 2 + column]) for column in range(columns)]
        for row in range(rows)
    ]
    for axes in figure.axes:
        hide_frame(axes)
    return cells


def _stacked_cells(
    rows: int, columns: int, width: float, *, lines: int, extra: float
) -> tuple[Figure, Axes, list[list[Axes]], float]:
    """The figure, the query's axes, axes [row][column], and the inches of a cell.

    lines: of the table, whose axes are the figure's last. extra: inches for captions and legend.
    """
    ratios = _column_ratios(columns)
    inches = width / sum(ratios)
    heights = [0.75 * inches + 0.3] * rows
    if lines:
        heights.append(0.175 * (lines + 1))
        extra -= 0.05
    figure = plt.figure(figsize=(width, sum(heights) + extra), layout="constrained")
    tighten(figure)
    grid = figure.add_gridspec(
        len(heights), len(ratios), width_ratios=ratios, height_ratios=heights
    )
    query_cell = figure.add_subplot(grid[:rows, 0])
    cells = _add_cells(grid, rows, columns)
    if lines:
        hide_frame(figure.add_subplot(grid[rows, :]))
    return figure, query_cell, cells, inches


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
        style = {"fill": False, "edgecolor": BOX_COLOUR, "linewidth": 1.6}
        axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, **style))


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
            text = shorten(text, widths[name] / 72 + 0.02)
            style = {"ha": "right" if number else "left", "va": "center", "fontsize": CAPTION_SIZE}
            axes.text(x, line, text, fontweight="bold" if line == 0 else "normal", **style)
        left += widths[name] + gap


def _cell_text(value: object) -> str:
    """A value as a person writes it; – for one that is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
