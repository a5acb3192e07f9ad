"""Galleries: rankings, before and after reranking, side by side."""

from collections.abc import Hashable, Mapping, Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Patch, Rectangle

from vitgal.data.revisited import GroundTruth
from vitgal.viz.style import (
    BOX,
    CAPTION,
    COLOURS,
    LETTERS,
    STYLE,
    Image,
    _bare,
    _elide,
    _only_says,
    _photograph,
    _pixels,
    _say,
    _tighten,
    _titles,
)


def contact_sheet(
    images: Sequence[Image],
    titles: Sequence[object] | None = None,
    *,
    columns: int = 8,
    width: float = 10.0,
) -> np.ndarray:
    """Small pictures of many photographs, row by row.

    images: arrays or paths, of any aspect. titles: one each, may hold line breaks; what is wider
    than its picture loses its middle. width: of the figure, in inches. Returns the axes
    (rows, columns); those left over are blank. No images: one axes that says so. Raises ValueError
    for an array that is no photograph and for another number of titles.
    """
    titles = _titles(titles, len(images))
    pictures = [_pixels(image) for image in images]
    rows = -(-len(pictures) // columns)
    with plt.rc_context(STYLE):
        if not pictures:
            return np.array([[_only_says("no images", width=width / 2)]])
        lines = max((title.count("\n") + 1 for title in titles if title), default=0)
        inches = width / columns
        size = (width, rows * (0.75 * inches + 0.135 * lines + 0.1) + 0.1)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        _tighten(figure)
        for cell in axes.flat:
            _bare(cell)
        for cell, picture, title in zip(axes.flat, pictures, titles, strict=False):
            _photograph(cell, picture, inches)
            cell.set_title(_elide(title, 0.94 * inches), fontsize=CAPTION)
    return axes


def relevance(ground_truth: GroundTruth, query: int, images: Sequence[int]) -> list[str]:
    """What the ground truth says of database images for one query, as `gallery` frames them.

    query: its index; images: database indices. Returns "easy", "hard", "junk" or "negative" (not
    listed at all) for each. Raises IndexError for a query that does not exist.
    """
    listed = {
        int(index): label
        for label in ("junk", "hard", "easy")
        for index in getattr(ground_truth, label)[query]
    }
    return [listed.get(int(image), "negative") for image in images]


def _check_labels(labels: Sequence[str], count: int) -> list[str]:
    labels = [str(label) for label in labels]
    unknown = sorted(set(labels) - set(LETTERS))
    if unknown or len(labels) != count:
        raise ValueError(
            f"{len(labels)} labels for {count} images, unknown: {', '.join(unknown) or 'none'}; "
            f"give one of {', '.join(LETTERS)} for each image"
        )
    return labels


def _framed(axes: Axes, image: np.ndarray, label: str, inches: float) -> None:
    """A photograph in the frame of its label, with the label's letter in the corner."""
    _photograph(axes, image, inches)
    axes.spines[:].set(visible=True, color=COLOURS[label], linewidth=2.5)
    if label in LETTERS:
        axes.text(
            *(0, 1, LETTERS[label]),
            transform=axes.transAxes,
            ha="left",
            va="top",
            fontsize=CAPTION,
            fontweight="bold",
            color="white" if label in ("easy", "negative") else "black",
            bbox={"facecolor": COLOURS[label], "edgecolor": "none", "pad": 1.8},
        )


def _query(
    axes: Axes, image: np.ndarray, box: Sequence[float] | None, title: str, inches: float
) -> None:
    """The query photograph, faded outside its box."""
    if box is not None:
        x0, y0, x1, y1 = (max(0, int(value)) for value in box)
        faded = cv2.addWeighted(image, 0.4, np.full_like(image, 255), 0.6, 0)
        faded[y0:y1, x0:x1] = image[y0:y1, x0:x1]
        image = faded
    _framed(axes, image, "query", inches)
    axes.set_title(_elide(title, 0.94 * inches), fontsize=CAPTION, color=COLOURS["query"])
    if box is not None:
        corner = (x0 - 0.5, y0 - 0.5)  # edges of pixels: the last one of the crop is x1 - 1
        style = {"fill": False, "edgecolor": BOX, "linewidth": 1.6}
        axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, **style))


def _legend(figure: Figure, labels: set[str]) -> None:
    """Names the frames that occur."""
    names = ["query"] + [label for label in LETTERS if label in labels]
    handles = [
        Patch(
            facecolor="white",
            edgecolor=COLOURS[name],
            linewidth=2,
            label=f"{LETTERS[name]}  {name}" if name in LETTERS else name,
        )
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _gallery_grid(rows: int, columns: int, *, width: float, span: bool) -> tuple[list, list, float]:
    """The query axes (one for all rows, or one a row), axes [row][column], a cell's inches."""
    ratios = [1.25, 0.08] + [1.0] * columns
    cell = width / sum(ratios)
    height = rows * (0.75 * cell + 0.3) + (0.45 if span else 0.35)  # span: captions of two lines
    figure = plt.figure(figsize=(width, height), layout="constrained")
    _tighten(figure)
    grid = figure.add_gridspec(rows, len(ratios), width_ratios=ratios)
    places = [grid[:, 0]] if span else [grid[row, 0] for row in range(rows)]
    queries = [figure.add_subplot(place) for place in places]
    cells = [
        [figure.add_subplot(grid[row, 2 + column]) for column in range(columns)]
        for row in range(rows)
    ]
    for axes in figure.axes:
        _bare(axes)
    return queries, cells, cell


def _ranked(
    images: Sequence[Image], labels: Sequence[str], captions: Sequence[str], columns: int | None
) -> list[tuple[np.ndarray, str, str]]:
    """Photograph, label and caption of the images that are drawn, the first `columns`."""
    labels = _check_labels(labels, len(images))
    return [
        (_pixels(image), label, caption)
        for image, label, caption in zip(images[:columns], labels, captions, strict=False)
    ]


def _captions(
    ranks: Sequence[int] | None, titles: Sequence[object] | None, count: int
) -> list[str]:
    """Rank numbers, each followed by its title."""
    ranks = _titles(range(1, count + 1) if ranks is None else ranks, count)
    titles = _titles(titles, count)
    return [f"{rank}   {title}".strip() for rank, title in zip(ranks, titles, strict=True)]


def _fill(
    cells: Sequence[Axes],
    ranked: Sequence[tuple[np.ndarray, str, str]],
    inches: float,
    *,
    below: bool = False,
) -> None:
    """One query's ranked photographs, framed, with their captions above or below."""
    if not ranked:
        _say(cells[0], "no image\nranked")
    for axes, (image, label, caption) in zip(cells, ranked, strict=False):
        _framed(axes, image, label, inches)
        caption = _elide(caption, 0.92 * inches)
        if below:
            axes.set_anchor("S")
            axes.set_xlabel(caption, fontsize=CAPTION)
        else:
            axes.set_title(caption, fontsize=CAPTION)


def gallery(
    query_image: Image,
    box: Sequence[float] | None,
    images: Sequence[Image],
    labels: Sequence[str],
    *,
    titles: Sequence[object] | None = None,
    ranks: Sequence[int] | None = None,
    query_title: str = "query",
    columns: int = 8,
    width: float = 11.0,
) -> np.ndarray:
    """One query's ranking: the query with its box, then its ranked images in coloured frames.

    box: (x0, y0, x1, y1) in pixels of the query's photograph, None = the whole of it. images: best
    first; all are drawn, on further rows where `columns` is not enough. labels: "easy", "hard",
    "junk" or "negative" for each. titles: a word after each rank number. ranks: the numbers,
    counted from 1; None: 1, 2, 3, …. Returns the axes: the query's, then one an image. No images:
    an axes that says so. Raises ValueError for unknown labels and unequal lengths.
    """
    ranked = _ranked(images, labels, _captions(ranks, titles, len(images)), None)
    picture = _pixels(query_image)
    rows = max(1, -(-len(ranked) // columns))
    with plt.rc_context(STYLE):
        queries, cells, inches = _gallery_grid(rows, columns, width=width, span=False)
        _query(queries[0], picture, box, query_title, 1.25 * inches)
        cells = [axes for row in cells for axes in row]
        _fill(cells, ranked, inches)
        _legend(queries[0].figure, {label for _, label, _ in ranked})
    return np.array([queries[0], *cells[: max(1, len(ranked))]])


def galleries(
    query_images: Sequence[Image],
    boxes: Sequence[Sequence[float] | None],
    images: Sequence[Sequence[Image]],
    labels: Sequence[Sequence[str]],
    *,
    titles: Sequence[Sequence[object]] | None = None,
    query_titles: Sequence[object] | None = None,
    columns: int = 10,
    width: float = 11.0,
) -> np.ndarray:
    """The rankings of several queries under each other, one row a query.

    As `gallery`, with one box, list of images, list of labels and list of titles a query; the first
    `columns` images of each are drawn. Returns the axes (queries, 1 + columns). A query without
    images says so; no queries: one axes that says so. Raises ValueError for unknown labels and
    unequal lengths.
    """
    count = len(query_images)
    names = ["query"] * count if query_titles is None else _titles(query_titles, count)
    titles = [None] * count if titles is None else titles
    if not len(boxes) == len(images) == len(labels) == len(titles) == count:
        raise ValueError(f"{count} queries: give as many boxes and lists of images and labels")
    rows = [
        _ranked(*row[:2], _captions(None, row[2], len(row[0])), columns)
        for row in zip(images, labels, titles, strict=True)
    ]
    pictures = [_pixels(image) for image in query_images]
    with plt.rc_context(STYLE):
        if not count:
            return np.array([[_only_says("no queries", width=width / 2)]])
        queries, cells, inches = _gallery_grid(count, columns, width=width, span=False)
        for index, picture in enumerate(pictures):
            _query(queries[index], picture, boxes[index], names[index], 1.25 * inches)
            _fill(cells[index], rows[index], inches)
        _legend(queries[0].figure, {label for row in rows for _, label, _ in row})
    return np.array([[query, *row] for query, row in zip(queries, cells, strict=True)])


def before_after(
    query_image: Image,
    box: Sequence[float] | None,
    images: Mapping[Hashable, Image],
    labels: Mapping[Hashable, str],
    before: Sequence[Hashable],
    after: Sequence[Hashable],
    *,
    notes: Mapping[Hashable, object] | None = None,
    names: tuple[str, str] = ("before", "after"),
    query_title: str = "query",
    columns: int = 8,
    width: float = 11.0,
) -> np.ndarray:
    """A ranking before and after reranking, with arrows between the places of each image.

    before, after: keys of the database images, best first, as far as they are known; the first
    `columns` are drawn, the rest tells where an image came from or went to. images, labels: by
    key, at least of those drawn. notes: by key, a word below the caption in the second row, for
    example a number of inliers. Returns the axes (2, 1 + columns), the query's twice. Empty
    rankings say so. Raises KeyError for a missing photograph or label, ValueError for unknown
    labels and a repeated key.
    """
    tops = (list(before[:columns]), list(after[:columns]))
    captions = _moves(list(before), list(after), columns, notes or {})
    rows = [
        _ranked([images[key] for key in top], [labels[key] for key in top], caption, None)
        for top, caption in zip(tops, captions, strict=True)
    ]
    picture = _pixels(query_image)
    with plt.rc_context(STYLE):
        queries, cells, inches = _gallery_grid(2, columns, width=width, span=True)
        _query(queries[0], picture, box, query_title, 1.25 * inches)
        for row, ranked, name in zip(cells, rows, names, strict=True):
            _fill(row, ranked, inches, below=row is cells[1])
            row[0].set_ylabel(name)
        _arrows(cells, tops, labels)
        _legend(queries[0].figure, {label for row in rows for _, label, _ in row})
    return np.array([[queries[0], *row] for row in cells])


def _moves(
    before: list[Hashable], after: list[Hashable], columns: int, notes: Mapping[Hashable, object]
) -> tuple[list[str], list[str]]:
    """Captions of both rows: ranks, where images came from, where those no arrow shows went."""
    if len(set(before)) < len(before) or len(set(after)) < len(after):
        raise ValueError("a ranking before or after holds an image more than once")
    first, second = [], []
    for rank, key in enumerate(before[:columns], 1):
        new = after.index(key) + 1 if key in after else None
        gone = "   ▼ out" if new is None else f"   ▼ to {new}" if new > columns else ""
        first.append(f"{rank}{gone}")
    for rank, key in enumerate(after[:columns], 1):
        old = before.index(key) + 1 if key in before else None
        came = f"{'▲' if old > rank else '▼'} from {old}" if old and old != rank else "="
        second.append(f"{rank} {came if old else 'new'}\n{notes.get(key, '')}".strip())
    return first, second


def _arrows(
    cells: Sequence[Sequence[Axes]],
    tops: Sequence[Sequence[Hashable]],
    labels: Mapping[Hashable, str],
) -> None:
    """From an image's place in the first row to its place in the second."""
    for place, key in enumerate(tops[0]):
        if key not in tops[1]:
            continue
        arrow = ConnectionPatch(
            (0.5, -0.02),
            (0.5, 1.02),
            *("axes fraction", "axes fraction"),
            axesA=cells[0][place],
            axesB=cells[1][tops[1].index(key)],
            color=COLOURS[labels[key]],
            linewidth=1.8,
            arrowstyle="-|>",
        )
        arrow.set_in_layout(False)  # else the layout would make room for it between the rows
        cells[0][place].figure.add_artist(arrow)


def two_rankings(
    query_image: Image,
    box: Sequence[float] | None,
    before: Sequence[tuple[Image, str]],
    after: Sequence[tuple[Image, str]],
    *,
    names: tuple[str, str] = ("by similarity", "by inliers"),
    query_title: str = "query",
    columns: int = 7,
    width: float = 11.0,
) -> np.ndarray:
    """A query and two rankings of unlabelled photographs, one above the other, without frames.

    before, after: (photograph, caption) each, best first; the first `columns` are drawn; a caption
    may hold a line break. Returns the axes (2, 1 + columns), the query's twice. Empty rankings say
    so.
    """
    pictures = [
        [(_pixels(image), text) for image, text in row[:columns]] for row in (before, after)
    ]
    picture = _pixels(query_image)
    with plt.rc_context(STYLE):
        queries, cells, inches = _gallery_grid(2, columns, width=width, span=True)
        figure = queries[0].figure
        figure.set_figheight(figure.get_figheight() + 0.3)  # captions of two lines, no legend
        _query(queries[0], picture, box, query_title, 1.25 * inches)
        for row, ranked, name in zip(cells, pictures, names, strict=True):
            if not ranked:
                _say(row[0], "no photograph\nranked")
            for axes, (image, caption) in zip(row, ranked, strict=False):
                _photograph(axes, image, inches)
                axes.set_title(_elide(caption, 0.94 * inches), fontsize=CAPTION)
            row[0].set_ylabel(name)
    return np.array([[queries[0], *row] for row in cells])
