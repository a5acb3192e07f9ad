"""Charts of the split, of training and of scores."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator, StrMethodFormatter

from vitgal.data.revisited import PROTOCOLS
from vitgal.settings import RerankingSettings
from vitgal.viz import style
from vitgal.viz.drawing import outlined, sentence_figure, shorten, text_width
from vitgal.viz.style import CURVE_COLOURS, INK, LINE_STYLES, styled

WIDTH = 9.0  # inches, of the changes of all queries
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


@styled
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
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9))
    for colour, line, (name, part) in zip(CURVE_COLOURS, LINE_STYLES, parts.items(), strict=False):
        label = f"{name}: {part.sum():,} images of {(part > 0).sum():,} classes"
        steps = axes[0].stairs(np.histogram(part, edges)[0], edges, label=label)
        steps.set(edgecolor=colour, linestyle=line, linewidth=1.6)
        positions = np.arange(1, len(part) + 1)
        axes[1].plot(positions, part, line, color=colour, drawstyle="steps-mid")
    axes[0].set(xlabel="images in a class", ylabel="classes")
    axes[1].set(xlabel="classes, largest first", ylabel="images in the class")
    if wide:
        axes[0].set_xscale("log")
        axes[1].set(xscale="log", yscale="log")
        for axis in (axes[0].xaxis, axes[1].xaxis, axes[1].yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_minor_formatter(LogFormatter())  # the usual one writes mathematics
    else:
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].set_ylim(bottom=0)
    for panel in axes:
        panel.grid(axis="y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return axes


def _counts(counts: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
    counts = np.asarray(counts, dtype=np.int64)
    if counts.ndim != 1 or (counts.size and counts.min() < 0):
        raise ValueError(f"{name} must be one number of images a class, none negative")
    return np.sort(counts)[::-1]


@styled
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
    if not titles:
        return np.array([sentence_figure("the log holds no values yet")])
    columns, rows = min(3, len(titles)), -(-len(titles) // 3)
    size = (width * columns / 3, 2.3 * rows)
    _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
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
    present, factor = filled_columns(log, columns), 100 if percent else 1
    for index, column in enumerate(present):
        colour, line = CURVE_COLOURS[index % 4], LINE_STYLES[index % 4]
        values, positions = factor * log[column].to_numpy(float), log[horizontal].to_numpy(float)
        finite = np.isfinite(values)
        ends = [f"{column}_low", f"{column}_high"]
        if all(end in log for end in ends):
            low, high = (factor * log[end].to_numpy(float)[finite] for end in ends)
            _draw_band(axes, positions[finite], low, high, colour)
        (curve,) = axes.plot(positions[finite], values[finite], line, color=colour, markersize=3.5)
        curve.set(marker="o" if finite.sum() <= 25 else "None", label=columns[column])
    if len(present) > 1:
        axes.legend(loc="best", labelspacing=0.2, frameon=True, framealpha=0.7, edgecolor="none")
    axes.set_xlabel(horizontal)
    axes.set_ylim(bottom=0)  # no value can be negative
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y")


def _draw_band(
    axes: Axes, positions: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str
) -> None:
    axes.fill_between(positions, low, high, color=colour, alpha=style.BAND_OPACITY, linewidth=0)


@styled
def ap_change(table: pd.DataFrame) -> Axes:
    """Draws how the average precision of each query changes, from most won to most lost.

    Bars are in points (hundredths of AP): solid green up, hatched red down; named if the
    names fit. table: one row a query, named by the index, with the columns `before` and `after`:
    average precision in [0, 1], nan where the query has no positive (left out, and counted
    below; a sentence where there is no other). Raises ValueError for a missing column.
    """
    if missing := {"before", "after"} - set(table.columns):
        raise ValueError(f"the table has no column {', '.join(sorted(missing))}")
    every = 100 * (table["after"] - table["before"]).astype(float)
    change = every.dropna().sort_values(ascending=False, kind="stable")
    if not len(change):
        return sentence_figure("no query has a positive image")
    _, axes = plt.subplots(figsize=(WIDTH, 3.2))
    positions, up = np.arange(len(change)), change.to_numpy() >= 0
    axes.bar(positions[up], change[up], color=style.LABEL_COLOURS["easy"], width=0.8)
    down = axes.bar(positions[~up], change[~up], color="white", width=0.8, hatch="//////")
    plt.setp(list(down), edgecolor=style.LABEL_COLOURS["negative"])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y")
    axes.set(ylabel="change of AP (points)", xlim=(-0.7, len(change) - 0.3), xticks=[])
    size = min(8.0, 0.75 * 72 * WIDTH / len(change))  # points, of names that fit the bars
    if size >= 5:
        names = [shorten(name, 1.1, size=size) for name in change.index]
        axes.set_xticks(positions, names, rotation=90, fontsize=size)
        axes.tick_params(axis="x", length=0)
    left_out = len(every) - len(change)
    note = f" ({left_out} without a positive image left out)" if left_out else ""
    axes.set_xlabel("queries" + note)
    won, lost, same = ((change > 0).sum(), (change < 0).sum(), (change == 0).sum())
    text = f"{won} won, {lost} lost, {same} unchanged; mean {change.mean():+.1f} points"
    axes.set_title(text, loc="left")
    return axes


@styled
def score_bars(
    scores: Mapping[str, Mapping[str, object]],
    *,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Axes:
    """Draws the mean average precision of several systems side by side, with the values printed.

    Args:
        scores: system -> protocol -> mAP in [0, 1], or `evaluate`'s dict of the protocol, of which
            "map" is taken; no bar for nan, None or a missing protocol. Without systems: a sentence.
        intervals: system -> protocol -> (low, high) in [0, 1], drawn as whiskers.
    """
    intervals = intervals or {}
    if not scores:
        return sentence_figure("no scores")
    figure, axes = plt.subplots(figsize=(7, 3))
    ticks, bar = np.arange(len(PROTOCOLS)), 0.82 / len(scores)
    size = min(8.0, 24 * 7 / len(PROTOCOLS) * bar)
    names, handles = [shorten(system, 6, size=8) for system in scores], []
    for index, (system, row) in enumerate(scores.items()):
        positions = ticks + (index - (len(scores) - 1) / 2) * bar
        values = [_percent(row.get(protocol)) for protocol in PROTOCOLS]
        bars = axes.bar(positions, values, 0.92 * bar, edgecolor=INK, linewidth=0.5)
        colour = style.BAR_COLOURS[index % len(style.BAR_COLOURS)]
        plt.setp(list(bars), facecolor=colour, hatch="////" if index >= 6 else "")
        handles.append(bars)
        for protocol, x, value in zip(PROTOCOLS, positions, values, strict=True):
            top = _draw_whisker(axes, x, value, intervals.get(system, {}).get(protocol))
            if not np.isnan(value):
                axes.text(x, top + 1, f"{value:.1f}", ha="center", fontsize=size)
    axes.set_xticks(ticks, [protocol.capitalize() for protocol in PROTOCOLS])
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="mAP (%)", ylim=(0, 110), yticks=range(0, 101, 20))
    axes.grid(axis="y")
    longest = max(text_width(name, 8.0) for name in names) / 72 + 0.6  # and its mark
    columns = int(np.clip(0.95 * 7 / longest, 1, 4))
    # Given as such, since matplotlib leaves out names that begin with an underscore.
    figure.legend(handles, names, loc="outside upper left", ncols=columns)
    return axes


def _percent(score: object) -> float:
    """Returns a fraction, or the mAP in `evaluate`'s dict, in percent; nan for None."""
    value = score.get("map") if isinstance(score, Mapping) else score
    return float("nan") if value is None else 100 * float(value)


def _draw_whisker(
    axes: Axes, x: float, value: float, interval: tuple[float, float] | None
) -> float:
    """A confidence interval as a thin line over its bar; returns how high bar and line reach."""
    if interval is None:
        return value
    low, high = (100 * float(bound) for bound in interval)
    line = axes.plot([x, x], [low, high], color=INK, linewidth=1.2)[0]
    line.set_path_effects(outlined("white", 2.6))
    return max(value, high)


@styled
def parameter_curves(table: pd.DataFrame, settings: RerankingSettings) -> np.ndarray:
    """Draws matches and inliers of one pair over each parameter of matching and verification.

    table: rows of `parameter`, `value`, `matches`, `inliers`, as `inspection.sweep` returns it.
    settings: the values in use, marked by lines. Returns the axes, shape (parameters,); a
    sentence for no rows.
    """
    names, current = list(dict.fromkeys(table["parameter"])), settings.compared()
    if not names:
        return np.array([sentence_figure("nothing was compared")])
    figure, axes = plt.subplots(1, len(names), figsize=(10, 2.5), squeeze=False)
    for panel, name in zip(axes[0], names, strict=True):
        rows = table[table["parameter"] == name]
        for index, column in enumerate(("matches", "inliers")):
            line, colour = f"o{LINE_STYLES[index]}", CURVE_COLOURS[index]
            panel.plot(rows["value"], rows[column], line, color=colour, label=column, markersize=3)
        if current[name] is not None:
            panel.axvline(current[name], color=INK, linewidth=0.8, linestyle=":")
        panel.set(xlabel=name.replace("_", " "), ylim=(0, None))
        panel.grid(axis="y")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return axes[0]
