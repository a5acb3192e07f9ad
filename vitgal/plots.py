"""Figures: photographs with marks on them, rankings with coloured frames, curves and bars.

Every function makes one figure and returns its axes; the notebook shows it, `save` exports it.
Nothing else changes: the style holds inside a function only, and no backend is chosen here.
A photograph is an array (H, W, 3) or (H, W) uint8 RGB, or the path of a file. Pixel convention of
all coordinates: (0, 0) is the centre of the top-left pixel, so that an image spans -0.5 to W - 0.5.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import ConnectionPatch, Patch, Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from vitgal.features import LocalFeatures
from vitgal.images import read_image
from vitgal.revisited import GroundTruth
from vitgal.runs import atomic

Image = np.ndarray | str | os.PathLike

# Green, orange, red and grey as the field frames its rankings, in hues and, above all, lightnesses
# that stay apart without red-green vision (the usual bluish green and vermilion are too close to
# grey and to orange there). A letter on each frame says the same once more.
COLOURS = {
    "easy": "#009E73",
    "hard": "#F2A100",
    "negative": "#A31621",
    "junk": "#C4C4C4",
    "query": "#0072B2",
}
LETTERS = {"easy": "E", "hard": "H", "negative": "N", "junk": "J"}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # curves: Okabe and Ito's, with LINE_STYLES
LINE_STYLES = ("-", "--", "-.", ":")
SYSTEMS = ("#BDBDBD", "#56B4E9", "#0072B2", "#14304D", "#CC79A7", "#7A3B5E")  # bars
INK = "#333333"
BOX = "#FFE14D"  # the query's box and its outline in other images
INLIER, INLIER_EDGE, REJECTED = "#00E5A0", "#004D38", "#F0606E"
DROPPED, DROPPED_BY = "#FFD23F", ("#FFD23F", "#FF6F91", "#7FDBFF")  # crosses on photographs
HEAT = "inferno"
GRID = {"color": "#E3E3E3", "linewidth": 0.6}

STYLE = {
    "figure.dpi": 80,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlepad": 4,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
CAPTION = 7.5  # points, text beside photographs
BAND = {"alpha": 0.15, "linewidth": 0}  # an interval around a curve
# Photographs are kept at this many pixels a drawn pixel: an exported figure stays sharp, and a
# notebook's picture is as large as its figure whatever the photographs.
DETAIL = 3

# Training logs: title of a panel -> columns of log.jsonl and their names in the legend
PANELS = {
    "loss": {"loss": "training"},
    "accuracy (%)": {
        "accuracy": "training (margin)",
        "val_accuracy": "validation",
        "val_accuracy_margin": "validation (margin)",
    },
    "retrieval mAP (%)": {"val_map": "validation"},
    "reconstruction error": {"reconstruction": "training", "val_reconstruction": "validation"},
    "learning rate": {"lr": "learning rate"},
    "images per second": {"images_per_second": "training"},
}


# Photographs and text


def _pixels(image: Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB from an array or a file."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    image = np.asarray(image)
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"a photograph must be (H, W, 3) or (H, W) uint8 and not empty, "
            f"not {image.shape} {image.dtype}; give RGB pixels or a file's path"
        )
    return image


def _shrink(image: np.ndarray, inches: float) -> np.ndarray:
    """The image with its longer side at most what `inches` of figure can show."""
    factor = inches * STYLE["figure.dpi"] * DETAIL / max(image.shape[:2])
    if factor >= 1:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _span(image: np.ndarray) -> tuple[float, float, float, float]:
    """The image's extent in its own pixels, whatever size it is drawn at."""
    height, width = image.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def _photograph(axes: Axes, image: np.ndarray, inches: float) -> None:
    axes.imshow(_shrink(image, inches), extent=_span(image))
    _bare(axes)


def _bare(axes: Axes) -> None:
    """An axes without ticks and without a frame; photographs of one row share their upper edge."""
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set_visible(False)


def _say(axes: Axes, text: str) -> None:
    """An axes that holds nothing but a sentence: what an empty input is drawn as."""
    _bare(axes)
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def _elide(text: object, inches: float, *, size: float = CAPTION) -> str:
    """The text with each line's middle left out where it is wider than `inches`."""
    return "\n".join(_elide_line(line, inches * 72, size) for line in str(text).split("\n"))


def _elide_line(line: str, points: float, size: float) -> str:
    kept, text = len(line), line
    while kept > 2 and _wide(text, size) > points:
        kept -= 1
        text = f"{line[: (kept + 1) // 2]}…{line[len(line) - kept // 2 :]}"
    return _literal(text)


def _literal(text: object) -> str:
    """A name with two dollar signs would be set as mathematics."""
    return str(text).replace("$", r"\$")


def _wide(text: str, size: float) -> float:
    """The width of a line of text, in points: the sum of its letters' advances."""
    font = get_font(findfont(STYLE["font.family"][0]))
    font.set_size(size, 72)
    return sum(font.load_char(ord(letter)).linearHoriAdvance for letter in text) / 65536


def _outlined(colour: str, width: float) -> list[patheffects.AbstractPathEffect]:
    """Keeps a line legible on any photograph."""
    return [patheffects.withStroke(linewidth=width, foreground=colour)]


def _titles(titles: Sequence[object] | None, count: int) -> list[str]:
    """One title an image; empty ones for None."""
    titles = [""] * count if titles is None else [str(title) for title in titles]
    if len(titles) != count:
        raise ValueError(f"{len(titles)} titles for {count} images: give one each, or None")
    return titles


def _tighten(figure: Figure) -> None:
    """Little space between photographs."""
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)


def _only_says(text: str, *, width: float) -> Axes:
    """A small figure that holds a sentence."""
    figure, axes = plt.subplots(figsize=(width, 0.6), layout="constrained")
    _say(axes, text)
    return axes


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


# The split and the training


def _counts(counts: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
    """Images per class, largest first."""
    counts = np.asarray(counts, dtype=np.int64)
    if counts.ndim != 1 or (counts.size and counts.min() < 0):
        raise ValueError(f"{name} must be one number of images a class, none negative")
    return np.sort(counts)[::-1]


def split_statistics(
    train: Sequence[int] | np.ndarray,
    validation: Sequence[int] | np.ndarray,
    *,
    width: float = 9.0,
) -> np.ndarray:
    """How many images the classes have: a histogram, and the classes from largest to smallest.

    train, validation: images per class, one number each, in any order; 0 = a class that has none
    there. Returns the two axes. A part without classes is named in the legend and drawn as
    nothing. Raises ValueError for negative numbers and for tables.
    """
    parts = {"training": _counts(train, "train"), "validation": _counts(validation, "validation")}
    largest = max([int(part[0]) for part in parts.values() if len(part)] + [1])
    wide = largest > 60  # then single counts are too fine for bars, and the tail spans decades
    edges = np.geomspace(1, largest + 1, 40) if wide else np.arange(largest + 2)
    edges = np.unique(edges.round()) - 0.5
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(width, 2.9), layout="constrained")
        for colour, line, (name, part) in zip(SERIES, LINE_STYLES, parts.items(), strict=False):
            label = f"{name}: {part.sum():,} images of {(part > 0).sum():,} classes"
            style = {"color": colour, "linestyle": line, "linewidth": 1.6}
            axes[0].stairs(np.histogram(part, edges)[0], edges, label=label, **style)
            places = np.arange(1, len(part) + 1)
            axes[1].plot(places, part, drawstyle="steps-mid", **style)
        axes[0].set(xlabel="images in a class", ylabel="classes")
        axes[1].set(xlabel="classes, largest first", ylabel="images in the class")
        if wide:
            _decades(axes[0].xaxis, axes[1].xaxis, axes[1].yaxis)
        else:
            axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
            axes[1].set_ylim(bottom=0)
        for panel in axes:
            panel.grid(axis="y", **GRID)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return axes


def _decades(*directions: Axis) -> None:
    """Logarithmic axes with whole numbers at the decades."""
    for axis in directions:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _present(log: pd.DataFrame, columns: Mapping[str, str]) -> list[str]:
    """The columns for which the log holds a value; without rows, none."""
    if len(log) and not {"step", "epoch"} & set(log.columns):
        names = ", ".join(map(str, log.columns))
        raise ValueError(f"the log has no column step and no epoch, only {names}")
    return [column for column in columns if column in log and log[column].notna().any()]


def _curves(axes: Axes, log: pd.DataFrame, columns: Mapping[str, str], *, percent: bool) -> None:
    """The finite values of each column over the steps, a line each, with a legend for several.

    A log without steps, such as a schedule, is drawn over its epochs.
    """
    across = "step" if "step" in log else "epoch"
    present = _present(log, columns)
    for index, column in enumerate(present):
        values = log[column].to_numpy(float) * (100 if percent else 1)
        known = np.isfinite(values)
        places = log[across].to_numpy(float)[known]
        ends = [f"{column}_low", f"{column}_high"]
        if all(end in log for end in ends):
            low, high = (log[end].to_numpy(float)[known] * (100 if percent else 1) for end in ends)
            axes.fill_between(places, low, high, color=SERIES[index % len(SERIES)], **BAND)
        axes.plot(
            places,
            values[known],
            color=SERIES[index % len(SERIES)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker="o" if known.sum() <= 25 else None,
            markersize=3.5,
            label=columns[column],
        )
    if len(present) > 1:
        axes.legend(loc="best", labelspacing=0.2, frameon=True, framealpha=0.7, edgecolor="none")
    axes.set_xlabel(across)
    axes.set_ylim(bottom=0)  # none of these values can be negative
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", **GRID)


def training_curves(
    log: pd.DataFrame,
    *,
    panels: Mapping[str, Mapping[str, str]] | None = None,
    width: float = 10.0,
) -> np.ndarray:
    """Loss, accuracy, retrieval mAP, reconstruction error, learning rate, throughput over steps.

    log: the rows of log.jsonl, with the column `step`, or a table by `epoch`; a value that a row
    lacks is nan; a column with `_low` and `_high` beside it gets a band between them. panels:
    title -> {column: name in the legend}; None: `PANELS`. A title that ends in "(%)" shows shares
    as percent. Panels without a value are left out. Returns the axes, one a panel, in the order of
    `panels`. An empty log: one axes that says so. Raises ValueError for a log without either.
    """
    if panels is None:
        accuracy = PANELS["accuracy (%)"]
        if "reconstruction" in log and "val_accuracy_margin" not in log:
            # the autoencoder's classifier knows no margin
            accuracy = accuracy | {"accuracy": "training"}
        panels = PANELS | {"accuracy (%)": accuracy}
    titles = [title for title, columns in panels.items() if _present(log, columns)]
    columns = min(3, len(titles))
    with plt.rc_context(STYLE):
        if not titles:
            return np.array([_only_says("the log holds no values yet", width=width / 2)])
        rows = -(-len(titles) // columns)
        figure, axes = plt.subplots(
            *(rows, columns),
            figsize=(width * columns / 3, 2.3 * rows),
            squeeze=False,
            layout="constrained",
        )
        for panel, title in zip(axes.flat, titles, strict=False):
            _curves(panel, log, panels[title], percent=title.endswith("(%)"))
            panel.set_title(title, loc="left")
        for panel in axes.ravel()[len(titles) :]:
            panel.remove()
    return axes.ravel()[: len(titles)]


def _maps(maps: Sequence[np.ndarray], count: int, name: str) -> list[np.ndarray]:
    """Maps (h, w), one a photograph, finite and not empty."""
    maps = [np.asarray(one, dtype=float) for one in maps]
    if len(maps) != count:
        raise ValueError(f"{len(maps)} {name} for {count} images: give one each")
    for one in maps:
        if one.ndim != 2 or not one.size or not np.isfinite(one).all():
            raise ValueError(f"{name} must be (h, w), finite and not empty, not {one.shape}")
    return maps


def _percentiles(maps: Sequence[np.ndarray], cut: float) -> Normalize:
    """One colour scale for several maps, without the lowest and highest `cut` percent."""
    values = np.concatenate([one.ravel() for one in maps])
    low, high = np.percentile(values, (cut, 100 - cut))
    return Normalize(low, high if high > low else low + 1)


def _heat(axes: Axes, image: np.ndarray, heat: np.ndarray, norm: Normalize, inches: float) -> None:
    """A map of patches over the photograph in grey; the map spans the whole photograph."""
    grey = cv2.cvtColor(_shrink(image, inches), cv2.COLOR_RGB2GRAY)
    axes.imshow(grey, extent=_span(image), cmap="gray", vmin=0, vmax=255)
    style = {"cmap": HEAT, "norm": norm, "alpha": 0.6, "interpolation": "nearest"}
    axes.imshow(heat, extent=_span(image), **style)
    _bare(axes)


def _heat_bar(cells: Sequence[Axes], norm: Normalize, label: str) -> None:
    """The scale of the maps, beside them all; the photographs stay where they are."""
    bar = cells[0].figure.colorbar(
        ScalarMappable(norm, HEAT), ax=cells, extend="max", aspect=25, pad=0.02, panchor=False
    )
    bar.outline.set_visible(False)
    bar.set_label(label)


def reconstruction_error(
    log: pd.DataFrame,
    images: Sequence[Image] = (),
    errors: Sequence[np.ndarray] = (),
    *,
    width: float = 10.0,
) -> np.ndarray:
    """The autoencoder's reconstruction error over the steps, and where in photographs it is large.

    log: rows of log.jsonl with `step`, `reconstruction`, `val_reconstruction`. images, errors: per
    photograph the error (h, w) of each token, row by row, spanning the photograph; all maps share
    one scale, from the 1st to the 99th percentile. Returns the axes: the curves, then the
    photographs, then their maps. A log without values says so; no images: curves alone. Raises
    ValueError for maps that are not (h, w) and finite.
    """
    pictures = [_pixels(image) for image in images]
    errors = _maps(errors, len(pictures), "error maps")
    columns = PANELS["reconstruction error"]
    known = _present(log, columns)
    ratios = [1.4] + [1.0] * len(pictures)
    with plt.rc_context(STYLE):
        size = (width if pictures else width / 2, 3.1)
        figure = plt.figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(2, len(ratios), width_ratios=ratios)
        curves = figure.add_subplot(grid[:, 0])
        if known:
            _curves(curves, log, columns, percent=False)
            curves.set_title("reconstruction error", loc="left")
        else:
            _say(curves, "the log holds no\nreconstruction error")
        cells = [figure.add_subplot(grid[row, i]) for row in (0, 1) for i in range(1, len(ratios))]
        if pictures:
            norm, inches = _percentiles(errors, 1), width / sum(ratios)
            for index, (picture, error) in enumerate(zip(pictures, errors, strict=True)):
                _photograph(cells[index], picture, inches)
                _heat(cells[len(pictures) + index], picture, error, norm, inches)
            _heat_bar(cells, norm, "squared error per token")
    return np.array([curves, *cells])


def attention_maps(
    images: Image | Sequence[Image],
    before: np.ndarray | Sequence[np.ndarray],
    after: np.ndarray | Sequence[np.ndarray],
    *,
    names: tuple[str, str] = ("backbone", "autoencoder"),
    width: float = 8.0,
) -> np.ndarray:
    """Class attention before and after the autoencoder as heat over each photograph.

    images: one photograph or several. before, after: (h, w) each (or one a photograph): the
    attention that the class token pays to each token, summed or averaged over heads. Each map is
    divided by its mean: 1 = what every token would get if all got the same. One scale for all, cut
    at the 99th percentile. Returns the axes (photographs, 3). No photograph: one axes that says
    so. Raises ValueError for maps that are not (h, w), finite, and of one number with the images.
    """
    if isinstance(images, str | os.PathLike | np.ndarray):
        images, before, after = [images], [before], [after]
    pictures = [_pixels(image) for image in images]
    first, second = (_maps(maps, len(pictures), "attention maps") for maps in (before, after))
    with plt.rc_context(STYLE):
        if not pictures:
            return np.array([[_only_says("no photographs", width=width / 2)]])
        first, second = ([one / (one.mean() or 1.0) for one in maps] for maps in (first, second))
        norm = Normalize(0, _percentiles(first + second, 1).vmax)
        axes, inches = _photograph_rows(pictures, 3, width)
        for index, (row, picture) in enumerate(zip(axes, pictures, strict=True)):
            _photograph(row[0], picture, inches)
            _heat(row[1], picture, first[index], norm, inches)
            _heat(row[2], picture, second[index], norm, inches)
        for cell, title in zip(axes[0], ("photograph", *names), strict=True):
            cell.set_title(title)
        _heat_bar(list(axes.flat), norm, "attention / mean attention")
    return axes


def _photograph_rows(
    pictures: Sequence[np.ndarray], columns: int, width: float
) -> tuple[np.ndarray, float]:
    """Axes (photographs, columns), rows as high as their photograph needs; a column's inches."""
    inches = 0.88 * width / columns  # a scale beside them takes the rest
    heights = [min(1.4, picture.shape[0] / picture.shape[1]) * inches for picture in pictures]
    figure, axes = plt.subplots(
        *(len(pictures), columns),
        figsize=(width, sum(heights) + 0.06 * len(heights) + 0.25),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    _tighten(figure)
    return axes, inches


# Rankings


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


# Scores


def ap_change(
    table: pd.DataFrame,
    *,
    before: str = "before",
    after: str = "after",
    width: float = 9.0,
) -> Axes:
    """How the average precision of each query changes, sorted from most won to most lost.

    table: one row a query, named by the index, with the columns `before` and `after`: average
    precision in [0, 1], nan where the query has no positive (left out, and counted below). Bars in
    points (hundredths of AP): solid green up, hatched red down; named while there is room. Returns
    the axes. No query: it says so. Raises ValueError for missing columns.
    """
    missing = {before, after} - set(table.columns)
    if missing:
        raise ValueError(f"the table has no column {', '.join(sorted(missing))}")
    change = 100 * (table[after] - table[before]).astype(float)
    known = change.dropna().sort_values(ascending=False, kind="stable")
    left = len(change) - len(known)
    with plt.rc_context(STYLE):
        if not len(known):
            return _only_says("no query has a positive image", width=width / 2)
        figure, axes = plt.subplots(figsize=(width, 3.2), layout="constrained")
        places, up = np.arange(len(known)), known.to_numpy() >= 0
        axes.bar(places[up], known[up], color=COLOURS["easy"], width=0.8)
        down = {"facecolor": "white", "edgecolor": COLOURS["negative"], "hatch": "//////"}
        axes.bar(places[~up], known[~up], width=0.8, **down)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.grid(axis="y", **GRID)
        axes.set(ylabel="change of AP (points)", xlim=(-0.7, len(known) - 0.3))
        _name_bars(axes, known.index, width)
        axes.set_xlabel(
            "queries" + (f" ({left} without a positive image left out)" if left else "")
        )
        won, lost, same = ((known > 0).sum(), (known < 0).sum(), (known == 0).sum())
        text = f"{won} won, {lost} lost, {same} unchanged; mean {known.mean():+.1f} points"
        axes.set_title(text, loc="left")
    return axes


def _name_bars(axes: Axes, names: Sequence[object], width: float) -> None:
    """Upright names under the bars, as large as the bars are wide, or none."""
    size = min(8.0, 0.75 * 72 * width / len(names))
    if size < 5:
        axes.set_xticks([])
        return
    names = [_elide(name, 1.1, size=size) for name in names]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.tick_params(axis="x", length=0)


def score_bars(
    scores: Mapping[str, Mapping[str, object]],
    *,
    protocols: Sequence[str] = ("easy", "medium", "hard"),
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    width: float = 7.0,
) -> Axes:
    """Mean average precision of several systems side by side, with the values printed.

    scores: system -> protocol -> mAP in [0, 1], or `evaluate`'s dict of the protocol, of which
    "map" is taken; nan, None or a missing protocol: no bar. intervals: system -> protocol -> (low,
    high) in [0, 1], drawn as whiskers. Returns the axes. No systems: it says so.
    """
    intervals = intervals or {}
    with plt.rc_context(STYLE):
        if not scores:
            return _only_says("no scores", width=width / 2)
        figure, axes = plt.subplots(figsize=(width, 3.0), layout="constrained")
        share = 0.82 / len(scores)
        size = min(8.0, 24 * width / len(protocols) * share)
        for index, (system, row) in enumerate(scores.items()):
            places = np.arange(len(protocols)) + (index - (len(scores) - 1) / 2) * share
            values = [_percent(row.get(protocol)) for protocol in protocols]
            style = {"color": SYSTEMS[index % len(SYSTEMS)], "edgecolor": INK, "linewidth": 0.5}
            hatch = "////" if index >= len(SYSTEMS) else ""
            axes.bar(places, values, 0.92 * share, label=_literal(system), hatch=hatch, **style)
            for protocol, place, value in zip(protocols, places, values, strict=True):
                top = _whisker(axes, place, value, intervals.get(system, {}).get(protocol))
                if not np.isnan(value):
                    axes.text(place, top + 1, f"{value:.1f}", ha="center", fontsize=size)
        axes.set_xticks(range(len(protocols)), [protocol.capitalize() for protocol in protocols])
        axes.tick_params(axis="x", length=0)
        axes.set(ylabel="mAP (%)", ylim=(0, 110), yticks=range(0, 101, 20))
        axes.grid(axis="y", **GRID)
        longest = max(_wide(str(system), 8.0) for system in scores) / 72 + 0.6  # and its mark
        columns = int(np.clip(0.95 * width / longest, 1, 4))
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=columns)
    return axes


def _percent(score: object) -> float:
    """A share, or the mAP in `evaluate`'s dict, in percent; nan for None."""
    value = score.get("map") if isinstance(score, Mapping) else score
    return float("nan") if value is None else 100 * float(value)


def _whisker(axes: Axes, place: float, value: float, interval: tuple[float, float] | None) -> float:
    """A confidence interval as a thin line over its bar; returns how high bar and line reach."""
    if interval is None:
        return value
    low, high = (100 * float(bound) for bound in interval)
    line = axes.plot([place, place], [low, high], color=INK, linewidth=1.2)[0]
    line.set_path_effects(_outlined("white", 2.6))
    return max(value, high)


# Local features


def keypoints(
    image: Image,
    features: LocalFeatures,
    *,
    max_keypoints: int | None = None,
    patch: int = 16,
    title: str = "",
    width: float = 5.0,
    axes: Axes | None = None,
) -> Axes:
    """Local features on their photograph: a square a patch, coloured by its score.

    features: as extracted from this photograph, best first; the first `max_keypoints` are drawn. A
    feature of scale s covers patch / s pixels of the network's input, which the square shows in the
    photograph (unknown: s = 1). Colours span the scores, but the extreme 2 % at either end; the
    lower the fainter; unknown scores have one colour. axes: draw there, not in a new figure.
    Returns the axes. No feature: the photograph alone, and the title says so.
    """
    picture, drawn = _pixels(image), features.subset(slice(max_keypoints))
    with plt.rc_context(STYLE):
        if axes is None:
            height = width * min(1.3, picture.shape[0] / picture.shape[1])
            _, axes = plt.subplots(figsize=(width + 0.7, height + 0.3), layout="constrained")
        _photograph(axes, picture, width)
        count = f"{len(drawn)} of {len(features)} local features"
        axes.set_title(_literal(f"{title}   {count}".strip()))
        if not len(drawn):
            return axes
        scores = np.nan_to_num(drawn.scores)
        norm, colours = _percentiles([scores], 2), _bright("plasma")
        edges = colours(norm(scores))
        edges[:, 3] = 0.35 + 0.65 * np.clip(norm(scores), 0, 1)
        squares = _squares(drawn, patch)[::-1]  # the best on top
        collection = PatchCollection(squares, facecolor="none", edgecolor=edges[::-1], linewidth=1)
        axes.add_collection(collection, autolim=False)
        if np.isfinite(drawn.scores).all():
            beside = axes.inset_axes([1.02, 0.1, 0.025, 0.8])
            scale = ScalarMappable(norm, colours)
            axes.figure.colorbar(scale, cax=beside, extend="both", label="score")
    return axes


def _bright(name: str) -> Colormap:
    """A colour map without its darkest part, which cannot be seen on photographs."""
    return LinearSegmentedColormap.from_list(name, plt.get_cmap(name)(np.linspace(0.2, 1, 256)))


def _squares(features: LocalFeatures, patch: int) -> list[Rectangle]:
    """The patches of the features in pixels of the photograph."""
    x0, y0, x1, y1 = features.box
    height, width = features.input_size
    ratio = np.array([(x1 - x0) / width, (y1 - y0) / height])
    sides = patch / np.nan_to_num(features.scales, nan=1.0)[:, None] * ratio  # (N, 2)
    corners = features.original_keypoints() - sides / 2
    return [Rectangle(corner, *side) for corner, side in zip(corners, sides, strict=True)]


def feature_counts(
    counts: Sequence[int], scales: Sequence[float] | np.ndarray, *, width: float = 9.0
) -> np.ndarray:
    """How many local features images give, and at which scales those of one image were found.

    counts: features of each image. scales: (N,) of one image's features, nan where unknown.
    Returns the two axes. No images, or an image without features: empty bars, and the title's
    count says so.
    """
    counts, scales = np.asarray(counts, dtype=int), np.asarray(scales, dtype=float)
    names, found = np.unique(scales.round(4), return_counts=True)
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(1, 2, figsize=(width, 2.4), layout="constrained")
        axes[0].hist(counts, bins=30, color=SERIES[0])
        axes[0].set(xlabel="local features of an image", ylabel="images")
        axes[0].set_title(f"{counts.sum():,} features of {len(counts):,} images", loc="left")
        axes[1].bar([f"{name:g}" for name in names], found, color=SERIES[0])
        axes[1].set(xlabel="scale", ylabel="features")
        axes[1].set_title(f"{len(scales):,} features of one image, by scale", loc="left")
        for panel in axes:
            panel.yaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(axis="y", **GRID)
    return axes


def homography_to_pixels(
    homography: np.ndarray, query: LocalFeatures, database: LocalFeatures
) -> np.ndarray:
    """A homography between two network inputs as one between the two photographs.

    homography: (3, 3), from the query's input frame to the database image's, as `verify` gives it.
    Returns (3, 3) float64 from query pixels to database pixels, (0, 0) the centre of the top-left
    pixel, for `matches` together with `original_keypoints()`.
    """
    to_query, to_database = _input_to_pixels(query), _input_to_pixels(database)
    return to_database @ np.asarray(homography, dtype=float) @ np.linalg.inv(to_query)


def _input_to_pixels(features: LocalFeatures) -> np.ndarray:
    """(3, 3): `original_keypoints` as a matrix."""
    x0, y0, x1, y1 = (float(value) for value in features.box)
    height, width = features.input_size
    scale_x, scale_y = (x1 - x0) / width, (y1 - y0) / height
    return np.array([[scale_x, 0, x0 - 0.5], [0, scale_y, y0 - 0.5], [0, 0, 1]])


def _project(homography: np.ndarray, points: np.ndarray) -> np.ndarray | None:
    """Points (N, 2) through a homography; None where some would lie on or behind the horizon."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ np.asarray(homography, float).T
    depth = mapped[:, 2]
    if not np.isfinite(mapped).all() or depth.min() * depth.max() <= 0:
        return None
    return mapped[:, :2] / depth[:, None]


def _side_by_side(
    axes: Axes, pictures: Sequence[np.ndarray], width: float
) -> list[tuple[float, float, float]]:
    """Draws two photographs beside each other, at one height if none gets too narrow by it.

    Units of the axes: inches, y downwards; the figure gets the size that they need. Returns
    (x, y, scale) of each: a pixel's centre p is drawn at (x, y) + (p + 0.5) * scale.
    """
    gap = 0.08
    aspects = np.array([picture.shape[1] / picture.shape[0] for picture in pictures])
    shares = np.clip(aspects / aspects.sum(), 0.2, 0.8)
    widths = shares / shares.sum() * (width - gap)
    height = min((widths / aspects).max(), 0.55 * width)
    widths = np.minimum(widths, aspects * height)
    frames, left = [], 0.0
    for picture, place in zip(pictures, widths, strict=True):
        rows, columns = picture.shape[:2]
        scale = place / columns
        top = (height - rows * scale) / 2
        extent = (left, left + place, top + rows * scale, top)
        axes.imshow(_shrink(picture, max(place, rows * scale)), extent=extent)
        frames.append((left, top, scale))
        left += place + gap
    axes.set(xlim=(0, left - gap), ylim=(height, 0), aspect="equal")
    axes.figure.set_size_inches(max(left - gap, 3) + 0.1, height + 0.5)
    return frames


def _place(points: np.ndarray, frame: tuple[float, float, float]) -> np.ndarray:
    """Pixels of a photograph to the inches of `_side_by_side`."""
    x, y, scale = frame
    return np.array([x, y]) + (points + 0.5) * scale


def matches(
    query_image: Image,
    database_image: Image,
    query_keypoints: np.ndarray,
    database_keypoints: np.ndarray,
    matches: np.ndarray,
    inliers: np.ndarray,
    *,
    homography: np.ndarray | None = None,
    box: Sequence[float] | None = None,
    max_lines: int = 100,
    titles: tuple[str, str] = ("query", "database image"),
    width: float = 8.5,
) -> Axes:
    """Two photographs with their matches: inliers as bold lines, rejected ones thin and dashed.

    query_keypoints, database_keypoints: (N, 2), (M, 2) pixels of the photographs
    (`original_keypoints()`). matches: (K, 2) indices into them. inliers: (K,) bool. homography:
    (3, 3) from query pixels to database pixels (`homography_to_pixels`); the outline of the
    query's box (None: of its photograph) is drawn with it in the database image, unless part of
    it falls behind the horizon. max_lines: of each kind, spread evenly over the list. Returns the
    axes, in inches. No matches: the photographs alone. Raises ValueError where shapes do not fit.
    """
    inliers = np.asarray(inliers, dtype=bool)
    points = _matched(query_keypoints, database_keypoints, matches)
    if inliers.shape != (len(points[0]),):
        raise ValueError(f"{len(points[0])} matches, but inliers of shape {inliers.shape}")
    pictures = [_pixels(query_image), _pixels(database_image)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained")
        frames = _side_by_side(axes, pictures, width)
        _bare(axes)
        lines = np.stack([_place(*side) for side in zip(points, frames, strict=True)], axis=1)
        _rejected_lines(axes, lines[~inliers][_evenly((~inliers).sum(), max_lines)])
        _inlier_lines(axes, lines[inliers][_evenly(inliers.sum(), max_lines)])
        _outlines(axes, pictures, frames, box, homography)
        _name_pictures(axes, pictures, frames, titles)
        drawn = f" ({max_lines} drawn)" if inliers.sum() > max_lines else ""
        axes.set_title(f"{inliers.sum()} inliers{drawn} of {len(inliers)} matches")
    return axes


def _matched(
    query_keypoints: np.ndarray, database_keypoints: np.ndarray, matches: np.ndarray
) -> list[np.ndarray]:
    """Both ends (K, 2) of each match."""
    pairs = np.asarray(matches, dtype=int).reshape(-1, 2)
    return [
        np.asarray(points, dtype=float).reshape(-1, 2)[pairs[:, side]]
        for side, points in enumerate((query_keypoints, database_keypoints))
    ]


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` indices, spread over the list."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def _rejected_lines(axes: Axes, lines: np.ndarray) -> None:
    """Thin dashed lines; lines: (K, 2 ends, 2) inches."""
    style = {"colors": REJECTED, "linewidths": 0.6, "linestyles": (0, (4, 3)), "alpha": 0.75}
    axes.add_collection(LineCollection(lines, **style), autolim=False)


def _inlier_lines(axes: Axes, lines: np.ndarray) -> None:
    """Bold lines with dots at their ends; lines: (K, 2 ends, 2) inches."""
    wide = 1.2 if len(lines) <= 50 else 0.8
    drawn = LineCollection(lines, colors=INLIER, linewidths=wide)
    drawn.set_path_effects(_outlined(INLIER_EDGE, 2 * wide))
    axes.add_collection(drawn, autolim=False)
    dots = {"markersize": 2.6 * wide, "color": INLIER, "markeredgecolor": INLIER_EDGE}
    axes.plot(*lines.reshape(-1, 2).T, "o", markeredgewidth=0.6, scalex=False, scaley=False, **dots)


def _outlines(
    axes: Axes,
    pictures: Sequence[np.ndarray],
    frames: Sequence[tuple[float, float, float]],
    box: Sequence[float] | None,
    homography: np.ndarray | None,
) -> None:
    """The query's box, and where the homography puts it in the database image."""
    if box is None and homography is None:
        return
    whole = (0, 0, *pictures[0].shape[1::-1])
    x0, y0, x1, y1 = (float(value) - 0.5 for value in (whole if box is None else box))
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    seen = None if homography is None else _project(homography, corners)
    for picture, frame, outline in zip(pictures, frames, (corners, seen), strict=True):
        if outline is None:
            continue
        shape = Polygon(_place(outline, frame), fill=False, edgecolor=BOX, linewidth=1.6)
        shape.set_path_effects(_outlined("black", 2.8))
        axes.add_patch(shape)
        low, high = _place(np.array([[-0.5, -0.5], picture.shape[1::-1]]) - [[0], [0.5]], frame)
        shape.set_clip_path(Rectangle(low, *(high - low), transform=axes.transData))


def _name_pictures(
    axes: Axes,
    pictures: Sequence[np.ndarray],
    frames: Sequence[tuple[float, float, float]],
    titles: tuple[str, str],
) -> None:
    """Each photograph's name under it."""
    for picture, (left, top, scale), title in zip(pictures, frames, titles, strict=True):
        height, inches = (side * scale for side in picture.shape[:2])
        axes.annotate(
            _elide(title, inches, size=8),
            (left + inches / 2, top + height),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )


# A pair under the lens


def inspection(
    query_image: Image,
    database_image: Image,
    query: LocalFeatures,
    database: LocalFeatures,
    matches: np.ndarray,
    inliers: np.ndarray,
    *,
    homography: np.ndarray | None = None,
    outline: bool = True,
    rejected: bool = True,
    dropped: tuple[LocalFeatures | None, LocalFeatures | None] = (None, None),
    heat: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    max_lines: int = 100,
    titles: tuple[str, str] = ("query", "database image"),
    width: float = 8.5,
) -> Axes:
    """Two photographs with their matches over what the network attends to and has dropped.

    query, database: local features; matches: (K, 2) indices into them; inliers: (K,) bool.
    homography: (3, 3) from the query's input frame to the database image's, as `verify` gives it;
    outline: draw the query's box and its image under it. rejected: draw matches that are no
    inliers. dropped: features to mark with crosses. heat: (h, w) >= 0 over the box that the
    features were extracted from, drawn over it in grey, each map over its own peak. Returns the
    axes, in inches. Raises ValueError where shapes do not fit.
    """
    inliers = np.asarray(inliers, dtype=bool)
    sides = (query, database)
    points = _matched(query.original_keypoints(), database.original_keypoints(), matches)
    if inliers.shape != (len(points[0]),):
        raise ValueError(f"{len(points[0])} matches, but inliers of shape {inliers.shape}")
    pictures = [_pixels(query_image), _pixels(database_image)]
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(layout="constrained")
        heated = [
            picture if one is None else _heated(picture, one, features.box)
            for picture, one, features in zip(pictures, heat, sides, strict=True)
        ]
        frames = _side_by_side(axes, heated, width)
        _bare(axes)
        lines = np.stack([_place(*side) for side in zip(points, frames, strict=True)], axis=1)
        for features, frame in zip(dropped, frames, strict=True):
            if features is not None:
                _crosses(axes, _place(features.original_keypoints(), frame))
        if rejected:
            _rejected_lines(axes, lines[~inliers][_evenly((~inliers).sum(), max_lines)])
        _inlier_lines(axes, lines[inliers][_evenly(inliers.sum(), max_lines)])
        if outline:
            if homography is not None:
                homography = homography_to_pixels(homography, query, database)
            _outlines(axes, pictures, frames, query.box, homography)
        _name_pictures(axes, pictures, frames, titles)
        axes.set_title(f"{inliers.sum()} inliers of {len(inliers)} matches")
    return axes


def _heated(picture: np.ndarray, heat: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """A photograph with a map over one box of it, mixed into a grey copy as `_heat` draws it."""
    (heat,) = _maps([heat], 1, "attention maps")
    x0, y0, x1, y1 = box
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    shares = cv2.resize(
        heat / (heat.max() or 1.0), (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST
    )
    colours = (plt.get_cmap(HEAT)(shares)[..., :3] * 255).astype(np.uint8)
    picture[y0:y1, x0:x1] = cv2.addWeighted(picture[y0:y1, x0:x1], 0.4, colours, 0.6, 0)
    return picture


def _crosses(axes: Axes, points: np.ndarray) -> None:
    """Small marks at features that were dropped; points: (N, 2) inches."""
    style = {"color": DROPPED, "markersize": 3.2, "markeredgewidth": 0.8}
    (marks,) = axes.plot(*points.T, "x", scalex=False, scaley=False, zorder=2, **style)
    marks.set_path_effects(_outlined("black", 1.6))


def attention_heads(
    image: Image,
    attention: Mapping[float, np.ndarray],
    scores: Mapping[float, np.ndarray],
    *,
    box: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    width: float = 10.0,
) -> np.ndarray:
    """The class attention of every head at every scale, and the score that they make together.

    attention: scale -> (heads, h, w), each head over its peak. scores: scale -> (h, w), of mean 1.
    box: what of the photograph was given to the network, None: all. scales: the rows; None: all.
    Every map is drawn over its own peak. Returns the axes (scales, 1 + heads), the scores first. No
    scale: one axes that says so. Raises ValueError for maps that are not finite.
    """
    scales = list(attention) if scales is None else list(scales)
    picture = _pixels(image)
    if box is not None:
        x0, y0, x1, y1 = (int(side) for side in box)
        picture = picture[y0:y1, x0:x1]
    with plt.rc_context(STYLE):
        if not scales:
            return np.array([[_only_says("no scale", width=width / 2)]])
        columns = 1 + len(attention[scales[0]])
        inches = width / columns
        height = min(1.4, picture.shape[0] / picture.shape[1]) * inches
        size = (width, len(scales) * (height + 0.08) + 0.3)
        figure, axes = plt.subplots(
            len(scales), columns, figsize=size, squeeze=False, layout="constrained"
        )
        _tighten(figure)
        small = _shrink(picture, inches)
        whole = (0, 0, small.shape[1], small.shape[0])
        for row, scale in zip(axes, scales, strict=True):
            for cell, heat in zip(row, (scores[scale], *attention[scale]), strict=True):
                _photograph(cell, _heated(small, heat, whole), inches)
            row[0].set_ylabel(f"scale {scale:g}")
        heads = (f"head {number}" for number in range(1, columns))
        for cell, title in zip(axes[0], ("score: all heads", *heads), strict=True):
            cell.set_title(title)
    return axes


def dropped_features(
    image: Image,
    kept: LocalFeatures,
    dropped: LocalFeatures,
    reasons: Sequence[str],
    *,
    titles: Mapping[str, str] | None = None,
    width: float = 9.0,
) -> np.ndarray:
    """The features that were kept, and those that were dropped, by reason.

    reasons: one a dropped feature. titles: reason -> what it means, for the legend. Returns the two
    axes, kept and dropped. Raises ValueError for another number of reasons than of features.
    """
    reasons = np.asarray(reasons, dtype=str)
    if reasons.shape != (len(dropped),):
        raise ValueError(f"{len(dropped)} dropped features, but {reasons.shape} reasons")
    picture = _pixels(image)
    with plt.rc_context(STYLE):
        height = width / 2 * min(1.3, picture.shape[0] / picture.shape[1])
        figure, axes = plt.subplots(1, 2, figsize=(width, height + 0.6), layout="constrained")
        for panel in axes:
            _photograph(panel, picture, width / 2)
        style = {"markersize": 3.5, "scalex": False, "scaley": False}
        axes[0].plot(*kept.original_keypoints().T, "o", color=INLIER, mec=INLIER_EDGE, **style)
        axes[0].set_title(f"{len(kept)} kept")
        axes[1].set_title(f"{len(dropped)} dropped")
        points = dropped.original_keypoints()
        for name, marker, colour in zip(sorted(set(reasons)), "x+1", DROPPED_BY, strict=False):
            label = f"{(reasons == name).sum()}: {(titles or {}).get(name, name)}"
            (marks,) = axes[1].plot(
                *points[reasons == name].T, marker, color=colour, label=label, **style
            )
            marks.set_path_effects(_outlined("black", 2.2))
        if len(dropped):
            figure.legend(loc="outside lower right")
    return axes


def knob_curves(
    table: pd.DataFrame, *, marks: Mapping[str, float], width: float = 10.0
) -> np.ndarray:
    """Matches and inliers of one pair over each knob.

    table: rows of `knob`, `value`, `matches`, `inliers` (`inspection.sweep`). marks: knob -> the
    value in use, drawn as a line. Returns the axes, one a knob. No rows: one axes that says so.
    """
    knobs = list(dict.fromkeys(table["knob"]))
    with plt.rc_context(STYLE):
        if not knobs:
            return np.array([_only_says("nothing was compared", width=width / 2)])
        figure, axes = plt.subplots(
            1, len(knobs), figsize=(width, 2.5), squeeze=False, layout="constrained"
        )
        for panel, knob in zip(axes[0], knobs, strict=True):
            rows = table[table["knob"] == knob]
            for column, colour, line in zip(
                ("matches", "inliers"), SERIES, LINE_STYLES, strict=False
            ):
                style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3}
                panel.plot(rows["value"], rows[column], label=column, **style)
            if knob in marks:
                panel.axvline(marks[knob], color=INK, linewidth=0.8, linestyle=":")
            panel.set(xlabel=knob.replace("_", " "), ylim=(0, None))
            panel.grid(axis="y", **GRID)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return axes[0]


# Photographs without labels


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


# Files


def save(
    axes: Axes | np.ndarray, path: str | os.PathLike, *, dpi: int = 200, close: bool = False
) -> Path:
    """Writes the figure of these axes; the suffix chooses the format (.pdf, .svg, .png, .jpg).

    axes: what a function here returned. dpi: of photographs inside a .pdf or .svg, and of a .png
    or .jpg as a whole. close: forgets the figure afterwards, for loops that write many. The file
    appears whole or not at all and holds no date: the same figure gives the same bytes. Returns
    the path. Raises ValueError for a suffix that matplotlib does not know.
    """
    path = Path(path)
    kind = path.suffix[1:].lower()
    figure = np.ravel(np.asarray(axes, dtype=object))[0].figure
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: no format is known by this suffix; use .pdf, .svg, .png or .jpg")
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with plt.rc_context({"svg.hashsalt": "vitgal"}), atomic(path) as temporary:
        figure.savefig(
            temporary,
            format=kind,
            dpi=dpi,
            bbox_inches="tight",
            pad_inches=0.03,
            metadata=metadata,
        )
    if close:
        plt.close(figure)
    return path


# Failures: one query's ranking, what moved, and why


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


# Choosing thresholds


def tuning_curves(
    curves: Mapping[str, tuple[Sequence[float], np.ndarray]],
    chosen: Mapping[str, float],
    current: Mapping[str, float],
    *,
    before: np.ndarray,
    interval: Callable[[np.ndarray], tuple[float, float]],
    width: float = 10.0,
) -> np.ndarray:
    """mAP over one parameter after the other, each with its interval over queries.

    curves: name -> values (V,) and AP (V, Q) in [0, 1], nan where a query does not count. chosen,
    current: the value of each parameter, marked by a line. before: (Q,) AP without reranking, a
    level line. interval: AP (Q,) -> (low, high), the band (`evaluation.bootstrap_interval`).
    Returns the axes, one a parameter. No parameter: one axes that says so.
    """
    with plt.rc_context(STYLE):
        if not curves:
            return np.array([_only_says("nothing was tuned", width=width / 2)])
        figure, axes = plt.subplots(
            1, len(curves), figsize=(width, 2.9), sharey=True, squeeze=False, layout="constrained"
        )
        for panel, (name, (values, ap)) in zip(axes[0], curves.items(), strict=True):
            places = np.arange(len(values))  # evenly spaced, whatever the values
            low, high = 100 * np.array([interval(row) for row in ap]).T
            mean = 100 * np.array([_mean(row) for row in ap])
            panel.fill_between(places, low, high, color=SERIES[0], **BAND)
            panel.plot(places, mean, "o-", color=SERIES[0], markersize=4, label="reranked")
            level = {"color": INK, "linewidth": 1.0, "linestyle": ":"}
            panel.axhline(100 * _mean(before), **level, label="not reranked")
            for marked, style, label in (
                (current, {"color": SERIES[3], "linestyle": "--"}, "current"),
                (chosen, {"color": SERIES[1], "linestyle": "-"}, "chosen"),
            ):
                panel.axvline(list(values).index(marked[name]), linewidth=1.4, **style, label=label)
            panel.set_xticks(places, [f"{value:g}" for value in values])
            panel.set_xlabel(name)
            panel.grid(axis="y", **GRID)
        axes[0, 0].set_ylabel("mAP (%)")
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=4)
    return axes[0]


def _mean(ap: np.ndarray) -> float:
    known = ap[~np.isnan(ap)]
    return float(known.mean()) if known.size else float("nan")


# Figures for a paper


def keep(axes: Axes | np.ndarray | Figure, folder: Path | None, name: str, kind: str) -> None:
    """Writes a figure as `<folder>/<name>.<kind>` where a folder is given, else nothing.

    kind: "pdf", "svg", "png" or "jpg", see `save`. To be called before the figure is shown.
    """
    if folder is None:
        return
    axes = axes.axes[0] if isinstance(axes, Figure) else axes
    save(axes, Path(folder) / f"{name}.{kind}")


# The way of a tensor


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
