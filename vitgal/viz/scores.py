"""Bars and curves of scores."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vitgal.viz.style import (
    BAND,
    COLOURS,
    GRID,
    INK,
    LINE_STYLES,
    SERIES,
    STYLE,
    SYSTEMS,
    _elide,
    _literal,
    _only_says,
    _outlined,
    _percent,
    _wide,
)


def ap_change(
    table: pd.DataFrame,
    *,
    before: str = "before",
    after: str = "after",
    width: float = 9.0,
) -> Axes:
    """How the average precision of each query changes, sorted from most won to most lost.

    table: one row a query, named by the index, with the columns `before` and `after`: average
    precision in [0, 1], nan where the query has no positive (left out, and counted below). Bars in
    points (hundredths of AP): solid green up, hatched red down; named while there is room. Returns
    the axes. No query: it says so. Raises ValueError for missing columns.
    """
    missing = {before, after} - set(table.columns)
    if missing:
        raise ValueError(f"the table has no column {', '.join(sorted(missing))}")
    change = 100 * (table[after] - table[before]).astype(float)
    known = change.dropna().sort_values(ascending=False, kind="stable")
    left = len(change) - len(known)
    with plt.rc_context(STYLE):
        if not len(known):
            return _only_says("no query has a positive image", width=width / 2)
        figure, axes = plt.subplots(figsize=(width, 3.2), layout="constrained")
        places, up = np.arange(len(known)), known.to_numpy() >= 0
        axes.bar(places[up], known[up], color=COLOURS["easy"], width=0.8)
        down = {"facecolor": "white", "edgecolor": COLOURS["negative"], "hatch": "//////"}
        axes.bar(places[~up], known[~up], width=0.8, **down)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.grid(axis="y", **GRID)
        axes.set(ylabel="change of AP (points)", xlim=(-0.7, len(known) - 0.3))
        _name_bars(axes, known.index, width)
        axes.set_xlabel(
            "queries" + (f" ({left} without a positive image left out)" if left else "")
        )
        won, lost, same = ((known > 0).sum(), (known < 0).sum(), (known == 0).sum())
        text = f"{won} won, {lost} lost, {same} unchanged; mean {known.mean():+.1f} points"
        axes.set_title(text, loc="left")
    return axes


def _name_bars(axes: Axes, names: Sequence[object], width: float) -> None:
    """Upright names under the bars, as large as the bars are wide, or none."""
    size = min(8.0, 0.75 * 72 * width / len(names))
    if size < 5:
        axes.set_xticks([])
        return
    names = [_elide(name, 1.1, size=size) for name in names]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.tick_params(axis="x", length=0)


def score_bars(
    scores: Mapping[str, Mapping[str, object]],
    *,
    protocols: Sequence[str] = ("easy", "medium", "hard"),
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    width: float = 7.0,
) -> Axes:
    """Mean average precision of several systems side by side, with the values printed.

    scores: system -> protocol -> mAP in [0, 1], or `evaluate`'s dict of the protocol, of which
    "map" is taken; nan, None or a missing protocol: no bar. intervals: system -> protocol -> (low,
    high) in [0, 1], drawn as whiskers. Returns the axes. No systems: it says so.
    """
    intervals = intervals or {}
    with plt.rc_context(STYLE):
        if not scores:
            return _only_says("no scores", width=width / 2)
        figure, axes = plt.subplots(figsize=(width, 3.0), layout="constrained")
        share = 0.82 / len(scores)
        size = min(8.0, 24 * width / len(protocols) * share)
        for index, (system, row) in enumerate(scores.items()):
            places = np.arange(len(protocols)) + (index - (len(scores) - 1) / 2) * share
            values = [_percent(row.get(protocol)) for protocol in protocols]
            style = {"color": SYSTEMS[index % len(SYSTEMS)], "edgecolor": INK, "linewidth": 0.5}
            hatch = "////" if index >= len(SYSTEMS) else ""
            axes.bar(places, values, 0.92 * share, label=_literal(system), hatch=hatch, **style)
            for protocol, place, value in zip(protocols, places, values, strict=True):
                top = _whisker(axes, place, value, intervals.get(system, {}).get(protocol))
                if not np.isnan(value):
                    axes.text(place, top + 1, f"{value:.1f}", ha="center", fontsize=size)
        axes.set_xticks(range(len(protocols)), [protocol.capitalize() for protocol in protocols])
        axes.tick_params(axis="x", length=0)
        axes.set(ylabel="mAP (%)", ylim=(0, 110), yticks=range(0, 101, 20))
        axes.grid(axis="y", **GRID)
        longest = max(_wide(str(system), 8.0) for system in scores) / 72 + 0.6  # and its mark
        columns = int(np.clip(0.95 * width / longest, 1, 4))
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=columns)
    return axes


def _whisker(axes: Axes, place: float, value: float, interval: tuple[float, float] | None) -> float:
    """A confidence interval as a thin line over its bar; returns how high bar and line reach."""
    if interval is None:
        return value
    low, high = (100 * float(bound) for bound in interval)
    line = axes.plot([place, place], [low, high], color=INK, linewidth=1.2)[0]
    line.set_path_effects(_outlined("white", 2.6))
    return max(value, high)


def knob_curves(
    table: pd.DataFrame, *, marks: Mapping[str, float], width: float = 10.0
) -> np.ndarray:
    """Matches and inliers of one pair over each knob.

    table: rows of `knob`, `value`, `matches`, `inliers` (`inspection.sweep`). marks: knob -> the
    value in use, drawn as a line. Returns the axes, one a knob. No rows: one axes that says so.
    """
    knobs = list(dict.fromkeys(table["knob"]))
    with plt.rc_context(STYLE):
        if not knobs:
            return np.array([_only_says("nothing was compared", width=width / 2)])
        figure, axes = plt.subplots(
            1, len(knobs), figsize=(width, 2.5), squeeze=False, layout="constrained"
        )
        for panel, knob in zip(axes[0], knobs, strict=True):
            rows = table[table["knob"] == knob]
            for column, colour, line in zip(
                ("matches", "inliers"), SERIES, LINE_STYLES, strict=False
            ):
                style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3}
                panel.plot(rows["value"], rows[column], label=column, **style)
            if knob in marks:
                panel.axvline(marks[knob], color=INK, linewidth=0.8, linestyle=":")
            panel.set(xlabel=knob.replace("_", " "), ylim=(0, None))
            panel.grid(axis="y", **GRID)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return axes[0]


def tuning_curves(
    curves: Mapping[str, tuple[Sequence[float], np.ndarray]],
    chosen: Mapping[str, float],
    current: Mapping[str, float],
    *,
    before: np.ndarray,
    interval: Callable[[np.ndarray], tuple[float, float]],
    width: float = 10.0,
) -> np.ndarray:
    """mAP over one parameter after the other, each with its interval over queries.

    curves: name -> values (V,) and AP (V, Q) in [0, 1], nan where a query does not count. chosen,
    current: the value of each parameter, marked by a line. before: (Q,) AP without reranking, a
    level line. interval: AP (Q,) -> (low, high), the band (`evaluation.bootstrap_interval`).
    Returns the axes, one a parameter. No parameter: one axes that says so.
    """
    with plt.rc_context(STYLE):
        if not curves:
            return np.array([_only_says("nothing was tuned", width=width / 2)])
        figure, axes = plt.subplots(
            1, len(curves), figsize=(width, 2.9), sharey=True, squeeze=False, layout="constrained"
        )
        for panel, (name, (values, ap)) in zip(axes[0], curves.items(), strict=True):
            places = np.arange(len(values))  # evenly spaced, whatever the values
            low, high = 100 * np.array([interval(row) for row in ap]).T
            mean = 100 * np.array([_mean(row) for row in ap])
            panel.fill_between(places, low, high, color=SERIES[0], **BAND)
            panel.plot(places, mean, "o-", color=SERIES[0], markersize=4, label="reranked")
            level = {"color": INK, "linewidth": 1.0, "linestyle": ":"}
            panel.axhline(100 * _mean(before), **level, label="not reranked")
            for marked, style, label in (
                (current, {"color": SERIES[3], "linestyle": "--"}, "current"),
                (chosen, {"color": SERIES[1], "linestyle": "-"}, "chosen"),
            ):
                panel.axvline(list(values).index(marked[name]), linewidth=1.4, **style, label=label)
            panel.set_xticks(places, [f"{value:g}" for value in values])
            panel.set_xlabel(name)
            panel.grid(axis="y", **GRID)
        axes[0, 0].set_ylabel("mAP (%)")
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=4)
    return axes[0]


def _mean(ap: np.ndarray) -> float:
    known = ap[~np.isnan(ap)]
    return float(known.mean()) if known.size else float("nan")
