"""Colours, type and helpers that all figures share."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from vitgal.data.images import read_image
from vitgal.runs.files import atomic

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


def _percent(score: object) -> float:
    """A share, or the mAP in `evaluate`'s dict, in percent; nan for None."""
    value = score.get("map") if isinstance(score, Mapping) else score
    return float("nan") if value is None else 100 * float(value)


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


def keep(axes: Axes | np.ndarray | Figure, folder: Path | None, name: str, kind: str) -> None:
    """Writes a figure as `<folder>/<name>.<kind>` where a folder is given, else nothing.

    kind: "pdf", "svg", "png" or "jpg", see `save`. To be called before the figure is shown.
    """
    if folder is None:
        return
    axes = axes.axes[0] if isinstance(axes, Figure) else axes
    save(axes, Path(folder) / f"{name}.{kind}")
