"""Colours, style and files of all figures."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from vitgal.runs.files import atomic, refuse_links
from vitgal.settings.sections import ShowSettings

# Green, orange, red and grey differ in lightness too, for red-green colour-blind readers (the usual
# bluish green and vermilion are too close to grey and orange). A frame also has the label's letter.
LABEL_COLOURS = {"easy": "#009E73", "hard": "#F2A100", "negative": "#A31621", "junk": "#C4C4C4"}
QUERY_COLOUR = "#0072B2"
BOX_COLOUR = "#FFE14D"  # the query's box, and its outline in other images
BOX_RGB = (255, 225, 77)  # the same
INLIER_COLOUR, INLIER_EDGE_COLOUR, REJECTED_COLOUR = "#00E5A0", "#004D38", "#F0606E"
DROPPED_COLOURS = ("#FFD23F", "#FF6F91", "#7FDBFF")  # crosses on photographs, one a reason
ERROR_COLOUR = "#A31621"
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's
LINE_STYLES = ("-", "--", "-.", ":")
BAR_COLOURS = ("#BDBDBD", "#56B4E9", "#0072B2", "#14304D", "#CC79A7", "#7A3B5E")
STEP_COLOUR = "#EAF3FA"  # the boxes of a diagram
INK = "#333333"
HEAT_MAP = "inferno"
SCORE_MAP = "plasma"
BAND_OPACITY = 0.15  # of the interval around a curve
CAPTION_SIZE = 7.5  # points, text beside photographs
# Pixels of a photograph that are kept for each drawn pixel: exported figures stay sharp and
# notebooks small.
DETAIL = 3
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
    axes: Axes | np.ndarray, path: str | os.PathLike, *, dpi: int = 200, close: bool = False
) -> Path:
    """Writes the figure of these axes, and returns the path.

    The file is written atomically, without a date: the same figure gives the same bytes.

    Args:
        axes: the result of a drawing function; an array may have any shape.
        path: its suffix, .pdf, .svg, .png or .jpg, chooses the format; ValueError for others.
        dpi: resolution of photographs inside a .pdf or .svg, and of a .png or .jpg as a whole.
        close: closes the figure afterwards, for loops that write many.
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
