"""Figures of splits and training."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from vitgal.viz.style import BAND, GRID, LINE_STYLES, PANELS, SERIES, STYLE, _only_says


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
