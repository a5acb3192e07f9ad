"""Colours, type and files: what all figures share."""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from vitgal.runs.files import atomic

# Green, orange, red and grey differ in lightness too, for red-green colour-blind readers (the usual
# bluish green and vermilion are too close to grey and orange). Each frame also has a letter.
LABEL_COLOURS = {"easy": "#009E73", "hard": "#F2A100", "negative": "#A31621", "junk": "#C4C4C4"}
LABEL_LETTERS = {"easy": "E", "hard": "H", "negative": "N", "junk": "J"}
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


def save_figure(
    axes: Axes | np.ndarray, path: str | os.PathLike, *, dpi: int = 200, close: bool = False
) -> Path:
    """Writes the figure of these axes; the suffix chooses the format.

    The file is written atomically, without a date: the same figure gives the same bytes.

    Args:
        axes: what a drawing function returned; an array may have any shape.
        path: ends in .pdf, .svg, .png or .jpg.
        dpi: resolution of photographs inside a .pdf or .svg, and of a .png or .jpg as a whole.
        close: closes the figure afterwards, for loops that write many.
    Returns:
        The path.
    Raises:
        ValueError: matplotlib does not know the suffix.
    """
    path = Path(path)
    suffix = path.suffix[1:].lower()
    figure = np.ravel(np.asarray(axes, dtype=object))[0].figure
    if suffix not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: no format is known by this suffix; use .pdf, .svg, .png or .jpg")
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
    with plt.rc_context({"svg.hashsalt": "vitgal"}), atomic(path) as temporary:
        figure.savefig(
            temporary,
            format=suffix,
            dpi=dpi,
            bbox_inches="tight",
            pad_inches=0.03,
            metadata=metadata,
        )
    if close:
        plt.close(figure)
    return path
