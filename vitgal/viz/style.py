"""Colours, style and files of all figures."""

import base64
import functools
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image

from vitgal.runs.files import atomic, refuse_links
from vitgal.settings.sections import ShowSettings

# One colour, one meaning, in all figures. Green, orange, red and grey differ in lightness too, for
# red-green colour-blind readers. A frame also has the label's letter.
LABEL_COLOURS = {"easy": "#009E73", "hard": "#F2A100", "negative": "#A31621", "junk": "#C4C4C4"}
PROTOCOL_COLOURS = {  # Medium counts easy and hard images: between their colours
    "easy": LABEL_COLOURS["easy"],
    "medium": "#7A8B1A",
    "hard": LABEL_COLOURS["hard"],
}
GLOBAL_COLOUR, OURS_COLOUR = "#56B4E9", "#0072B2"  # the global ranking; the reranked one
SYSTEM_COLOURS = {  # by name; other systems take OTHER_COLOURS in their order
    "global": GLOBAL_COLOUR,
    "ViTGaL": GLOBAL_COLOUR,
    "published": "#8C6BB1",  # the published short list, reranked
    "per protocol": OURS_COLOUR,
    "untrained": "#BDBDBD",
}
OTHER_COLOURS = ("#6B6B6B", "#14304D", "#D55E00", "#7A3B5E", "#8A6D3B")
QUERY_COLOUR = "#0072B2"
BOX_COLOUR = "#FFE14D"  # the query's box, and its outline in other images
INLIER_COLOUR, INLIER_EDGE_COLOUR, REJECTED_COLOUR = "#00D5E5", "#00454D", "#F0606E"
MATCH_COLOUR, INLIER_CURVE_COLOUR = "#8A8A8A", "#008C99"  # in charts
DROPPED_COLOURS = ("#FFD23F", "#FF6F91", "#7FDBFF")  # crosses on photographs, one a reason
TRAINING_COLOUR, VALIDATION_COLOUR, MARGIN_COLOUR = "#333333", "#C2478F", "#7B5EA7"
LINE_STYLES = ("-", "--", "-.", ":")
STEP_COLOUR = "#EAF3FA"  # the boxes of a diagram
CHOSEN_COLOUR = "#D55E00"  # the value in use, or the chosen one
INK = "#333333"
HEAT_MAP = "inferno"
SCORE_MAP = "plasma"
BAND_OPACITY = 0.15  # of the interval around a curve
CAPTION_SIZE = 7.5  # points, text beside photographs
# Pixels of a photograph that are kept for each drawn pixel: exported figures stay sharp and
# notebooks small.
DETAIL = 3
DPI = 200  # of saved figures, and of those in notebooks
JPEG_QUALITY = 70  # of pictures in notebooks
FONT = "DejaVu Sans"
BOXES_FONT = "Last Resort High-Efficiency"  # of matplotlib: boxes for letters that no font has
STYLE = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.family": [FONT],
    "font.size": 9,
    "text.parse_math": False,  # names may hold dollar signs
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlepad": 4,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
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


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that returns axes: it draws in STYLE, not in the user's style."""

    @functools.wraps(draw)
    def draw_in_style(*arguments: Any, **options: Any) -> Any:
        """Draws in STYLE."""
        with plt.style.context(["default", STYLE]):
            axes = draw(*arguments, **options)
            # Includes the labels of ticks, which are otherwise created later, in another style.
            for text in np.ravel(axes)[0].figure.findobj(Text):
                if not text.get_text().isascii():
                    text.set_fontfamily(plt.rcParams["font.family"])  # with what `drawable` added
        return axes

    return draw_in_style


def save_figure(
    axes: Axes | np.ndarray, path: str | os.PathLike, *, dpi: int = DPI, close: bool = False
) -> Path:
    """Writes the figure of these axes, an array of any shape or one, and returns the path.

    The file is written atomically, without a date: the same figure gives the same bytes. The path's
    suffix, .pdf, .svg, .png or .jpg, chooses the format; ValueError for others. dpi: resolution of
    photographs inside a .pdf or .svg, and of a .png or .jpg as a whole. close: closes the figure
    afterwards, for loops that write many.
    """
    path = Path(path)
    suffix = path.suffix[1:].lower()
    figure = np.ravel(np.asarray(axes, dtype=object))[0].figure
    if suffix not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: no format is known by this suffix; use .pdf, .svg, .png or .jpg")
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
    style = {"svg.hashsalt": "vitgal", "savefig.bbox": "tight", "savefig.pad_inches": 0.03}
    with plt.style.context(["default", style]), atomic(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=dpi, metadata=metadata)
    if close:
        plt.close(figure)
    return path


def sharpen_figures() -> None:
    """Stores this notebook's figures at DPI: charts as PNG, those with photographs as JPEG.

    Call it once, after `%matplotlib inline`. Figures are shown at their size in inches, times 80
    pixels; the same figure gives the same bytes. Raises RuntimeError outside IPython.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise RuntimeError("sharpen_figures is for notebooks; elsewhere use save_figure")
    formatters = shell.display_formatter.formatters
    for kind in ("png", "jpeg"):
        write = functools.partial(stored_picture, kind=kind)
        formatters[f"image/{kind}"].for_type(Figure, write)


def stored_picture(figure: Figure, kind: str, dpi: int = DPI) -> tuple[str, dict[str, int]] | None:
    """Returns a figure as a notebook stores it: base64, with the shown width and height in pixels.

    kind: "jpeg" for figures that hold a photograph, "png" of at most 256 colours for the others;
    None for a figure of the other kind.
    """
    photographs = any(image.get_array().ndim == 3 for image in figure.findobj(AxesImage))
    if photographs != (kind == "jpeg"):
        return None
    drawn, stored = io.BytesIO(), io.BytesIO()
    with plt.style.context(["default", {"savefig.bbox": "tight", "savefig.pad_inches": 0.03}]):
        # Read again at once: to compress a photograph takes nearly as long as to draw it.
        figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"compress_level": 0})
    picture = Image.open(drawn).convert("RGB")
    if kind == "jpeg":
        picture.save(stored, "JPEG", quality=JPEG_QUALITY, optimize=True)
    else:
        picture.quantize(256, dither=Image.Dither.NONE).save(stored, "PNG", optimize=True)
    width, height = (round(side * STYLE["figure.dpi"] / dpi) for side in picture.size)
    return base64.b64encode(stored.getvalue()).decode(), {"width": width, "height": height}


@dataclass(frozen=True)
class FigureFolder:
    """A folder that figures are written to where `show.save_figures` is set."""

    folder: Path
    show: ShowSettings

    def keep(self, drawing: Axes | np.ndarray | Figure, name: str) -> None:
        """Writes a figure, or that of axes (any shape), as `<name>.<figure_format>`.

        Call it before the figure is shown. Raises PathError where the folder is a link.
        """
        if self.show.save_figures:
            refuse_links([self.folder.parent, self.folder])
            axes = drawing.axes[0] if isinstance(drawing, Figure) else drawing
            save_figure(axes, self.folder / f"{name}.{self.show.figure_format}")
