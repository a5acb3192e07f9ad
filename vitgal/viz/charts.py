"""Charts of the split, of training and of the settings of matching."""

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator, StrMethodFormatter

from vitgal.settings import RerankingSettings
from vitgal.viz import style
from vitgal.viz.drawing import sentence_figure
from vitgal.viz.style import LINE_STYLES, styled

KNOBS = {  # of matching and verification: meaning and unit
    "max_distance": "largest distance of two descriptors\n(max_distance)",
    "threshold": "reprojection threshold, pixels of the input\n(threshold)",
    "max_keypoints": "features of each image\n(max_keypoints)",
}
PARTS = (style.TRAINING_COLOUR, style.VALIDATION_COLOUR, style.MARGIN_COLOUR)
# Training logs: title of a panel -> columns of log.jsonl and their names in the legend
PANELS = {
    "loss": {"loss": "training"},
    "accuracy (%)": {
        "accuracy": "training (accuracy: with margin)",
        "val_accuracy": "validation",
        "val_accuracy_margin": "validation (margin)",
    },
    "retrieval mAP (%)": {"val_map": "validation"},
    "reconstruction error": {"reconstruction": "training", "val_reconstruction": "validation"},
    "learning rate": {"lr": "training"},
    "images per second": {"images_per_second": "training"},
}


@styled
def split_statistics(
    train: Sequence[int] | np.ndarray, validation: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Draws how many images the classes have: a histogram, and the classes by size.

    train, validation: shape (classes,), images of each class, in any order; 0 for a class
    without images. A part without classes is only in the legend. Returns the axes, shape (2,).
    """
    parts = {"training": train, "validation": validation}
    parts = {name: np.sort(np.asarray(part, np.int64))[::-1] for name, part in parts.items()}
    largest = max([int(part[0]) for part in parts.values() if len(part)] + [1])
    wide = largest > 60  # then three axes are logarithmic
    edges = np.geomspace(1, largest + 1, 40) if wide else np.arange(largest + 2)
    edges = np.unique(edges.round()) - 0.5
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9))
    for colour, line, (name, part) in zip(PARTS, LINE_STYLES, parts.items(), strict=False):
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


@styled
def training_curves(log: pd.DataFrame, *, width: float = 10.0) -> np.ndarray:
    """Draws loss, accuracy, mAP, reconstruction error, learning rate and speed over the epochs.

    log: the rows of log.jsonl, with `epoch`, `step` or both; nan where a row lacks a value.
    Columns `<name>_low` and `<name>_high` make a band around a curve. width: of the figure, in
    inches. Returns the axes, shape (panels,), for the `PANELS` that have values; a sentence where
    none has. Raises ValueError for a log with neither `step` nor `epoch`.
    """
    panels = PANELS
    if "reconstruction" in log and "val_accuracy_margin" not in log:
        # The autoencoder's classifier has no margin.
        panels = PANELS | {"accuracy (%)": PANELS["accuracy (%)"] | {"accuracy": "training"}}
    if len(log) and not {"step", "epoch"} & set(log.columns):
        names = ", ".join(map(str, log.columns))
        raise ValueError(f"the log has no column step and no epoch, only {names}")
    filled = log.columns[log.notna().any()]
    titles = [title for title, columns in panels.items() if filled.isin(columns).any()]
    if not titles:
        return np.array([sentence_figure("the log holds no values yet")])
    rows = [titles] if len(titles) <= 3 else np.array_split(titles, 2)
    cells = math.lcm(*map(len, rows))
    mosaic = [np.repeat(row, cells // len(row)).tolist() for row in rows]
    size = (width * min(3, len(rows[0])) / 3, 2.5 * len(rows))
    figure, axes = plt.subplot_mosaic(mosaic, figsize=size)
    for title, panel in axes.items():
        columns = {name: text for name, text in panels[title].items() if name in filled}
        _draw_curves(panel, log, columns, 100 if title.endswith("(%)") else 1)
        panel.set_title(title, loc="left")
    every = [line for panel in axes.values() for line in panel.lines]
    every.sort(key=lambda line: len(line.get_label()))  # of one colour, the longest name
    lines = {line.get_color(): line for line in every}
    ordered = [lines[colour] for colour in PARTS if colour in lines]
    if len(ordered) > 1:
        figure.legend(handles=ordered, loc="outside upper left", ncols=3)
    return np.array(list(axes.values()))


def _draw_curves(axes: Axes, log: pd.DataFrame, columns: Mapping[str, str], factor: int) -> None:
    """Draws the finite values of some columns of a log, times `factor`, over its epochs or steps.

    columns: of the log -> name in the legend.
    """
    positions = _positions(log)
    for column, name in columns.items():
        values = factor * log[column].to_numpy(float)
        part = 2 if name == "validation (margin)" else int(name.startswith("validation"))
        finite = np.isfinite(values)
        ends = [f"{column}_low", f"{column}_high"]
        if all(end in log for end in ends):
            low, high = (factor * log[end].to_numpy(float)[finite] for end in ends)
            band = axes.fill_between(positions[finite], low, high, color=PARTS[part], linewidth=0)
            band.set_alpha(style.BAND_OPACITY)
        (curve,) = axes.plot(positions[finite], values[finite], LINE_STYLES[part], label=name)
        curve.set(color=PARTS[part], marker="o" if finite.sum() <= 40 else "None", markersize=3)
    axes.set_xlabel("epoch" if "epoch" in log else "step")
    axes.set_ylim(bottom=0)  # no value can be negative
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y")


def live_curves() -> Callable[[pd.DataFrame], None]:
    """Returns a function that draws training curves into this cell; pass it to a fit as `watch`.

    It updates one output, which holds the last state after a headless run.
    """
    from IPython.display import display

    handle = display(display_id=True)

    def watch(log: pd.DataFrame) -> None:
        """Draws the log in place of the previous drawing."""
        figure = training_curves(log)[0].figure
        plt.close(figure)  # otherwise the inline backend shows it twice
        handle.update(figure)

    return watch


def _positions(log: pd.DataFrame) -> np.ndarray:
    """Epochs that are over, in fractions where a log has several rows an epoch; else steps."""
    if "epoch" not in log:
        return log["step"].to_numpy(float)
    epochs = log["epoch"].to_numpy(float)
    if "step" not in log or not len(log):
        return epochs + 1
    steps = log["step"].to_numpy(float)
    an_epoch = steps.max() / (epochs.max() + 1)
    return steps / an_epoch if an_epoch else epochs


@styled
def parameter_curves(table: pd.DataFrame, settings: RerankingSettings) -> np.ndarray:
    """Draws matches and inliers of one pair over each parameter of matching and verification.

    table: rows of `parameter`, `value`, `matches`, `inliers`, as `inspection.sweep` returns it.
    settings: the values in use, marked by lines; None (all features) stands at the right end.
    Returns the axes, shape (parameters,); a sentence for no rows.
    """
    names, current = list(dict.fromkeys(table["parameter"])), settings.compared()
    if not names:
        return np.array([sentence_figure("nothing was compared")])
    figure, axes = plt.subplots(1, len(names), figsize=(10, 2.9), squeeze=False, sharey=True)
    colours = (style.MATCH_COLOUR, style.INLIER_CURVE_COLOUR)
    for panel, name in zip(axes[0], names, strict=True):
        rows = table[table["parameter"] == name]
        for index, column in enumerate(("matches", "inliers")):
            line, values = f"o{LINE_STYLES[1 - index]}", rows[column]
            panel.plot(rows["value"], values, line, color=colours[index], markersize=3.5)
            panel.lines[-1].set_label(column)
        used = current[name]
        at = rows["value"].max() if used is None else used
        panel.axvline(at, color=style.CHOSEN_COLOUR, linewidth=1.0, linestyle=":", label="in use")
        text = "all" if used is None else f"{used:g}"
        note = panel.annotate(text, (at, 1.0), (0, 2), xycoords=("data", "axes fraction"))
        note.set(anncoords="offset points", ha="center", fontsize=8, color=style.CHOSEN_COLOUR)
        panel.set(xlabel=KNOBS.get(name, name), ylim=(0, None))
        panel.grid(axis="y")
    axes[0, 0].set_ylabel("number in this pair")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return axes[0]
