"""Photographs and text on axes: the helpers of all drawing functions."""

import bisect
import contextlib
import functools
import os
from collections.abc import Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import ConnectionPatch, Rectangle

from vitgal.data.images import read_image
from vitgal.runs import printable
from vitgal.viz.style import BOX_COLOUR, BOXES_FONT, CAPTION_SIZE, DETAIL, FONT, STYLE, styled

ImageSource = np.ndarray | str | os.PathLike  # pixels, or a file


def read_pixels(image: ImageSource) -> np.ndarray:
    """Returns a photograph as (H, W, 3) uint8 RGB.

    image: a file, or an array (H, W, 3) or (H, W) of uint8. Raises ValueError for other arrays.
    """
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


def reduce_image(image: np.ndarray, longest: float) -> tuple[np.ndarray, float]:
    """Reduces an image (H, W, 3) to at most `longest` pixels a side.

    Returns the image and the factor; smaller images keep their size, with factor 1.
    """
    factor = min(1.0, longest / max(image.shape[:2]))
    if factor == 1:
        return image, factor
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), factor


def shrink(image: np.ndarray, inches: float) -> np.ndarray:
    """Reduces (H, W, 3) pixels so that the longer side is no finer than `inches` can show."""
    return reduce_image(image, inches * STYLE["figure.dpi"] * DETAIL)[0]


def pixel_extent(image: np.ndarray) -> tuple[float, float, float, float]:
    """Returns imshow's extent of an image (H, W, ...) in its own pixels."""
    height, width = image.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def draw_photograph(axes: Axes, image: np.ndarray, inches: float) -> None:
    """Draws (H, W, 3) uint8 pixels that take at most `inches`; data coordinates are pixels."""
    axes.imshow(shrink(image, inches), extent=pixel_extent(image), interpolation="bicubic")
    hide_frame(axes)


def hide_frame(axes: Axes) -> None:
    """Removes ticks and frame; photographs of one row share their upper edge."""
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set_visible(False)


def draw_box(axes: Axes, box: Sequence[int]) -> None:
    """Frames a box (x0, y0, x1, y1) of pixels of a drawn photograph in yellow."""
    x0, y0, x1, y1 = box
    frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, linewidth=2)
    frame.set(edgecolor=BOX_COLOUR, path_effects=outlined("black", 3.2))
    axes.add_patch(frame)


def draw_arrow(
    axes: Sequence[Axes], start: Sequence[float], end: Sequence[float], **style: object
) -> None:
    """Draws an arrow from a point of the first to one of the second axes, in fractions of each."""
    fraction, style = "axes fraction", {"arrowstyle": "-|>"} | style
    arrow = ConnectionPatch(start, end, fraction, fraction, axesA=axes[0], axesB=axes[1], **style)
    arrow.set_in_layout(False)  # otherwise the layout moves the axes apart
    axes[0].figure.add_artist(arrow)


def write_sentence(axes: Axes, text: str) -> None:
    """Writes a sentence into the axes, for an empty input."""
    hide_frame(axes)
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


@styled
def sentence_figure(text: str) -> Axes:
    """Makes a small figure that holds a sentence."""
    _, axes = plt.subplots(figsize=(5, 0.6))
    write_sentence(axes, text)
    return axes


def drawable(text: object) -> str:
    """Returns any text as one line that a figure can draw, written as `runs.printable` writes it.

    Called by a `styled` function, it adds the fonts that the text needs to those of the figure. A
    letter that no installed font has is drawn as a box.
    """
    text = printable(text)
    families = plt.rcParams["font.family"]
    if families[0] == FONT:  # in a styled function
        needed = {_glyph(letter, len(fontManager.ttflist))[0] for letter in text}
        others = {*families[1:], *needed} - {FONT}
        others = sorted(others, key=lambda family: (family == BOXES_FONT, family))
        plt.rcParams["font.family"] = [FONT, *others]
    return text


@functools.cache
def _glyph(letter: str, fonts: int) -> tuple[str, float]:
    """The first family with a letter, and its advance in a size of one point; fonts: installed."""
    others = sorted(
        fontManager.ttflist,
        key=lambda font: (font.name == BOXES_FONT, font.style != "normal", font.weight != 400),
    )
    for name, path in [(FONT, findfont(FONT)), *((font.name, font.fname) for font in others)]:
        with contextlib.suppress(OSError, RuntimeError):  # the file is gone, or damaged
            font = FT2Font(path)
            if font.get_char_index(ord(letter)):
                font.set_size(100, 72)
                return name, font.load_char(ord(letter)).linearHoriAdvance / 6553600
    return FONT, 0.6


def text_width(text: str, size: float) -> float:
    """Returns the width of a line of text in points: the sum of its letters' advances."""
    return size * sum(_glyph(letter, len(fontManager.ttflist))[1] for letter in text)


def shorten(text: object, inches: float, *, size: float = CAPTION_SIZE) -> str:
    """Returns text as `drawable` does, without its middle where it is wider; size in points."""
    line = drawable(text)

    def without_middle(kept: int) -> str:
        return f"{line[: (kept + 1) // 2]}…{line[len(line) - kept // 2 :]}"

    def fits(text: str) -> bool:
        return text_width(text, size) <= 72 * inches

    if len(line) <= 2 or fits(line):
        return line
    # As many letters as fit, or two; with a letter less no text is wider.
    counts = range(len(line) - 1, 2, -1)
    longer = bisect.bisect_left(counts, True, key=lambda kept: fits(without_middle(kept)))
    return without_middle(len(line) - 1 - longer)


def shorten_lines(text: object, inches: float) -> str:
    """Returns `shorten` of each line of a caption."""
    return "\n".join(shorten(line, inches) for line in str(text).split("\n"))


def outlined(colour: str, width: float) -> list[patheffects.AbstractPathEffect]:
    """Returns path effects that keep a line legible on any photograph; width in points."""
    return [patheffects.withStroke(linewidth=width, foreground=colour)]


def tighten(figure: Figure) -> None:
    """Leaves little space between photographs."""
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
