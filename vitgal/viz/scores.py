"""Bars and curves of scores."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vitgal.data.revisited import PROTOCOLS
from vitgal.evaluation import statistics
from vitgal.evaluation.tuning import Tuning
from vitgal.settings import RerankingSettings
from vitgal.viz.drawing import escape, outlined, sentence_figure, shorten, text_width
from vitgal.viz.style import (
    BAND_OPACITY,
    BAR_COLOURS,
    CURVE_COLOURS,
    INK,
    LABEL_COLOURS,
    LINE_STYLES,
    STYLE,
)

WIDTH = 9.0  # inches, of the changes of all queries


@plt.rc_context(STYLE)
def ap_change(table: pd.DataFrame) -> Axes:
    """Draws how the average precision of each query changes, from most won to most lost.

    Bars are in points (hundredths of AP): solid green up, hatched red down; named if there is
    room. table: one row a query, named by the index, with the columns `before` and `after`:
    average precision in [0, 1], nan where the query has no positive (left out, and counted
    below; a sentence where there is no other). Raises ValueError for a missing column.
    """
    missing = {"before", "after"} - set(table.columns)
    if missing:
        raise ValueError(f"the table has no column {', '.join(sorted(missing))}")
    every = 100 * (table["after"] - table["before"]).astype(float)
    change = every.dropna().sort_values(ascending=False, kind="stable")
    left_out = len(every) - len(change)
    if not len(change):
        return sentence_figure("no query has a positive image")
    _, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    positions, up = np.arange(len(change)), change.to_numpy() >= 0
    axes.bar(positions[up], change[up], color=LABEL_COLOURS["easy"], width=0.8)
    down = axes.bar(positions[~up], change[~up], color="white", width=0.8, hatch="//////")
    plt.setp(list(down), edgecolor=LABEL_COLOURS["negative"])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y")
    axes.set(ylabel="change of AP (points)", xlim=(-0.7, len(change) - 0.3))
    _name_bars(axes, change.index)
    note = f" ({left_out} without a positive image left out)" if left_out else ""
    axes.set_xlabel("queries" + note)
    won, lost, same = ((change > 0).sum(), (change < 0).sum(), (change == 0).sum())
    text = f"{won} won, {lost} lost, {same} unchanged; mean {change.mean():+.1f} points"
    axes.set_title(text, loc="left")
    return axes


def _name_bars(axes: Axes, names: Sequence[object]) -> None:
    """Vertical names under the bars in a size that fits the bars, or none."""
    size = min(8.0, 0.75 * 72 * WIDTH / len(names))
    if size < 5:
        axes.set_xticks([])
        return
    names = [shorten(name, 1.1, size=size) for name in names]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.tick_params(axis="x", length=0)


@plt.rc_context(STYLE)
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
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    bar = 0.82 / len(scores)
    size = min(8.0, 24 * 7 / len(PROTOCOLS) * bar)
    for index, (system, row) in enumerate(scores.items()):
        positions = np.arange(len(PROTOCOLS)) + (index - (len(scores) - 1) / 2) * bar
        values = [_percent(row.get(protocol)) for protocol in PROTOCOLS]
        axes.bar(
            positions,
            values,
            0.92 * bar,
            label=escape(system),
            color=BAR_COLOURS[index % len(BAR_COLOURS)],
            edgecolor=INK,
            linewidth=0.5,
            hatch="////" if index >= len(BAR_COLOURS) else "",
        )
        for protocol, x, value in zip(PROTOCOLS, positions, values, strict=True):
            top = _draw_whisker(axes, x, value, intervals.get(system, {}).get(protocol))
            if not np.isnan(value):
                axes.text(x, top + 1, f"{value:.1f}", ha="center", fontsize=size)
    axes.set_xticks(range(len(PROTOCOLS)), [protocol.capitalize() for protocol in PROTOCOLS])
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="mAP (%)", ylim=(0, 110), yticks=range(0, 101, 20))
    axes.grid(axis="y")
    longest = max(text_width(str(system), 8.0) for system in scores) / 72 + 0.6  # and its mark
    columns = int(np.clip(0.95 * 7 / longest, 1, 4))
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=columns)
    return axes


def _percent(score: object) -> float:
    """A fraction, or the mAP in `evaluate`'s dict, in percent; nan for None."""
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


@plt.rc_context(STYLE)
def parameter_curves(table: pd.DataFrame, settings: RerankingSettings) -> np.ndarray:
    """Draws matches and inliers of one pair over each parameter of matching and verification.

    table: rows of `parameter`, `value`, `matches`, `inliers`, as `inspection.sweep` returns it.
    settings: the values in use, marked by lines. Returns the axes, shape (parameters,); a
    sentence for no rows.
    """
    names, current = list(dict.fromkeys(table["parameter"])), settings.compared()
    if not names:
        return np.array([sentence_figure("nothing was compared")])
    figure, axes = plt.subplots(
        1, len(names), figsize=(10, 2.5), squeeze=False, layout="constrained"
    )
    for panel, name in zip(axes[0], names, strict=True):
        rows = table[table["parameter"] == name]
        for index, column in enumerate(("matches", "inliers")):
            line = f"o{LINE_STYLES[index]}"
            colour = CURVE_COLOURS[index]
            panel.plot(rows["value"], rows[column], line, color=colour, markersize=3, label=column)
        if current[name] is not None:
            panel.axvline(current[name], color=INK, linewidth=0.8, linestyle=":")
        panel.set(xlabel=name.replace("_", " "), ylim=(0, None))
        panel.grid(axis="y")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return axes[0]


@plt.rc_context(STYLE)
def tuning_curves(tuning: Tuning) -> np.ndarray:
    """Draws mAP over each tuned parameter, the others as chosen, with its interval over queries.

    The chosen and the current value are marked by lines; a level line shows mAP without reranking.
    Returns the axes, shape (parameters,).
    """
    chosen, current = tuning.values(tuning.chosen), tuning.values(tuning.current)
    figure, axes = plt.subplots(
        1, len(tuning.grid), figsize=(10, 2.9), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, (name, values) in zip(axes[0], tuning.grid.items(), strict=True):
        ap, positions = tuning.curve(name), np.arange(len(values))  # evenly spaced
        low, high = 100 * np.array([statistics.bootstrap_interval(row) for row in ap]).T
        mean = 100 * np.array([_mean(row) for row in ap])
        colour = CURVE_COLOURS[0]
        panel.fill_between(positions, low, high, color=colour, alpha=BAND_OPACITY, linewidth=0)
        panel.plot(positions, mean, "o-", color=colour, markersize=4, label="reranked")
        level = 100 * _mean(tuning.before)
        panel.axhline(level, color=INK, linewidth=1.0, linestyle=":", label="not reranked")
        for label, marked, colour, line in (
            ("current", current, CURVE_COLOURS[3], "--"),
            ("chosen", chosen, CURVE_COLOURS[1], "-"),
        ):
            x = list(values).index(marked[name])
            panel.axvline(x, color=colour, linewidth=1.4, linestyle=line, label=label)
        panel.set_xticks(positions, [f"{value:g}" for value in values])
        panel.set_xlabel(name)
        panel.grid(axis="y")
    axes[0, 0].set_ylabel("mAP (%)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=4)
    return axes[0]


def _mean(ap: np.ndarray) -> float:
    """The mean of AP (Q,) over the queries that count; nan where none does."""
    counting = ap[~np.isnan(ap)]
    return float(counting.mean()) if counting.size else float("nan")
