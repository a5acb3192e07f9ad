"""Figures of the split and of training."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from vitgal.viz.drawing import sentence_figure
from vitgal.viz.style import BAND_OPACITY, CURVE_COLOURS, LINE_STYLES, STYLE

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


@plt.rc_context(STYLE)
def split_statistics(
    train: Sequence[int] | np.ndarray, validation: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Draws how many images the classes have: a histogram, and the classes by size.

    train, validation: shape (classes,), images of each class, in any order; 0 for a class
    without images. A part without classes is only in the legend. Returns the axes, shape
    (2,). Raises ValueError for negative numbers and for arrays of another dimension.
    """
    parts = {"training": _counts(train, "train"), "validation": _counts(validation, "validation")}
    largest = max([int(part[0]) for part in parts.values() if len(part)] + [1])
    wide = largest > 60  # then three axes are logarithmic
    edges = np.geomspace(1, largest + 1, 40) if wide else np.arange(largest + 2)
    edges = np.unique(edges.round()) - 0.5
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    for colour, line, (name, part) in zip(CURVE_COLOURS, LINE_STYLES, parts.items(), strict=False):
        label = f"{name}: {part.sum():,} images of {(part > 0).sum():,} classes"
        steps = axes[0].stairs(np.histogram(part, edges)[0], edges, label=label)
        steps.set(edgecolor=colour, linestyle=line, linewidth=1.6)
        positions = np.arange(1, len(part) + 1)
        axes[1].plot(positions, part, line, color=colour, drawstyle="steps-mid")
    axes[0].set(xlabel="images in a class", ylabel="classes")
    axes[1].set(xlabel="classes, largest first", ylabel="images in the class")
    if wide:
        _decades(axes[0].xaxis, axes[1].xaxis, axes[1].yaxis)
    else:
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].set_ylim(bottom=0)
    for panel in axes:
        panel.grid(axis="y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return axes


@plt.rc_context(STYLE)
def training_curves(log: pd.DataFrame, *, width: float = 10.0) -> np.ndarray:
    """Draws loss, accuracy, mAP, reconstruction error, learning rate and throughput over steps.

    log: the rows of log.jsonl, with the column `step`, or a table with `epoch`; nan where a row
    lacks a value. Columns `<name>_low` and `<name>_high` make a band around a curve. width: of
    the figure, in inches. Returns the axes, shape (panels,), for the `PANELS` that have values;
    a sentence where none has. Raises ValueError for a log with neither `step` nor `epoch`.
    """
    panels = PANELS
    if "reconstruction" in log and "val_accuracy_margin" not in log:
        # The autoencoder's classifier has no margin.
        panels = PANELS | {"accuracy (%)": PANELS["accuracy (%)"] | {"accuracy": "training"}}
    titles = [title for title, columns in panels.items() if filled_columns(log, columns)]
    columns = min(3, len(titles))
    if not titles:
        return np.array([sentence_figure("the log holds no values yet")])
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(width * columns / 3, 2.3 * rows),
        squeeze=False,
        layout="constrained",
    )
    for panel, title in zip(axes.flat, titles, strict=False):
        draw_curves(panel, log, panels[title], percent=title.endswith("(%)"))
        panel.set_title(title, loc="left")
    for panel in axes.ravel()[len(titles) :]:
        panel.remove()
    return axes.ravel()[: len(titles)]


def filled_columns(log: pd.DataFrame, columns: Mapping[str, str]) -> list[str]:
    """Returns the columns for which the log holds a value; ValueError without `step` or `epoch`."""
    if len(log) and not {"step", "epoch"} & set(log.columns):
        names = ", ".join(map(str, log.columns))
        raise ValueError(f"the log has no column step and no epoch, only {names}")
    return [column for column in columns if column in log and log[column].notna().any()]


def draw_curves(
    axes: Axes, log: pd.DataFrame, columns: Mapping[str, str], *, percent: bool
) -> None:
    """Draws the finite values of some columns of a log, with a legend for several.

    A log without steps, such as a schedule, is drawn over its epochs. columns: of the log ->
    name in the legend. percent: whether values are fractions, to be drawn as percent.
    """
    horizontal = "step" if "step" in log else "epoch"
    present = filled_columns(log, columns)
    for index, column in enumerate(present):
        factor, colour = 100 if percent else 1, CURVE_COLOURS[index % len(CURVE_COLOURS)]
        values = factor * log[column].to_numpy(float)
        finite = np.isfinite(values)
        positions = log[horizontal].to_numpy(float)[finite]
        ends = [f"{column}_low", f"{column}_high"]
        if all(end in log for end in ends):
            low, high = (factor * log[end].to_numpy(float)[finite] for end in ends)
            axes.fill_between(positions, low, high, color=colour, alpha=BAND_OPACITY, linewidth=0)
        axes.plot(
            positions,
            values[finite],
            color=colour,
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker="o" if finite.sum() <= 25 else None,
            markersize=3.5,
            label=columns[column],
        )
    if len(present) > 1:
        axes.legend(loc="best", labelspacing=0.2, frameon=True, framealpha=0.7, edgecolor="none")
    axes.set_xlabel(horizontal)
    axes.set_ylim(bottom=0)  # none of these values can be negative
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y")


def _counts(counts: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
    """Images per class, largest first."""
    counts = np.asarray(counts, dtype=np.int64)
    if counts.ndim != 1 or (counts.size and counts.min() < 0):
        raise ValueError(f"{name} must be one number of images a class, none negative")
    return np.sort(counts)[::-1]


def _decades(*directions: Axis) -> None:
    """Logarithmic axes with whole numbers at the decades."""
    for axis in directions:
        (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
