"""Photographs and text on axes: the helpers of all drawing functions."""

import os

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from vitgal.data.images import read_image
from vitgal.viz.style import CAPTION_SIZE, DETAIL, STYLE

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


def shrink(image: np.ndarray, inches: float) -> np.ndarray:
    """Reduces (H, W, 3) pixels so that the longer side is no finer than `inches` can show."""
    factor = inches * STYLE["figure.dpi"] * DETAIL / max(image.shape[:2])
    if factor >= 1:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def pixel_extent(image: np.ndarray) -> tuple[float, float, float, float]:
    """Returns imshow's extent of an image (H, W, ...) in its own pixels."""
    height, width = image.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def draw_photograph(axes: Axes, image: np.ndarray, inches: float) -> None:
    """Draws (H, W, 3) uint8 pixels that take at most `inches`; data coordinates are pixels."""
    axes.imshow(shrink(image, inches), extent=pixel_extent(image))
    hide_frame(axes)


def hide_frame(axes: Axes) -> None:
    """Removes ticks and frame; photographs of one row share their upper edge."""
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set_visible(False)


def write_sentence(axes: Axes, text: str) -> None:
    """Writes a sentence into the axes, for an empty input."""
    hide_frame(axes)
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def sentence_figure(text: str) -> Axes:
    """Makes a small figure that holds a sentence."""
    _, axes = plt.subplots(figsize=(5, 0.6), layout="constrained")
    write_sentence(axes, text)
    return axes


def shorten(text: object, inches: float, *, size: float = CAPTION_SIZE) -> str:
    """Leaves out the middle of each line that is wider than `inches`; size in points."""
    return "\n".join(_shorten_line(line, inches * 72, size) for line in str(text).split("\n"))


def _shorten_line(line: str, points: float, size: float) -> str:
    kept, text = len(line), line
    while kept > 2 and text_width(text, size) > points:
        kept -= 1
        text = f"{line[: (kept + 1) // 2]}…{line[len(line) - kept // 2 :]}"
    return escape(text)


def escape(text: object) -> str:
    """Escapes dollar signs, which matplotlib reads as mathematics."""
    return str(text).replace("$", r"\$")


def text_width(text: str, size: float) -> float:
    """Returns the width of a line of text in points: the sum of its letters' advances."""
    font = get_font(findfont(STYLE["font.family"][0]))
    font.set_size(size, 72)
    return sum(font.load_char(ord(letter)).linearHoriAdvance for letter in text) / 65536


def outlined(colour: str, width: float) -> list[patheffects.AbstractPathEffect]:
    """Returns path effects that keep a line legible on any photograph; width in points."""
    return [patheffects.withStroke(linewidth=width, foreground=colour)]


def tighten(figure: Figure) -> None:
    """Leaves little space between photographs."""
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
