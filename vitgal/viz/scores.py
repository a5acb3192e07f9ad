"""Charts of scores and rankings: systems side by side, changes of AP, retrieval curves."""

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from scipy import stats

from vitgal.data.revisited import PROTOCOLS
from vitgal.viz import style
from vitgal.viz.drawing import outlined, sentence_figure, shorten, text_width
from vitgal.viz.style import INK, LINE_STYLES, styled

NAMED = 5  # queries that changed most, named in `ap_change`


@styled
def score_dots(
    scores: Mapping[str, Mapping[str, object]],
    *,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Axes:
    """Draws the mean average precision of several systems, a dot each, with the values printed.

    scores: system -> protocol -> mAP in [0, 1], or `evaluate`'s dict of the protocol, of which
    "map" is taken; no dot for nan, None or a missing protocol. Without systems: a sentence.
    intervals: system -> protocol -> (low, high) in [0, 1], drawn as whiskers.
    """
    intervals = intervals or {}
    if not scores:
        return sentence_figure("no scores")
    rows = len(scores)
    figure, axes = plt.subplots(figsize=(7, 0.75 + 3 * (0.21 * rows + 0.12)))
    colours, handles = system_colours(scores), []
    for index, (system, row) in enumerate(scores.items()):
        draw = partial(_draw_points, axes, face=colours[system], edge=INK)
        handles += draw([], [])
        for group, protocol in enumerate(PROTOCOLS):
            value, y = _percent(row.get(protocol)), group * (rows + 0.6) + index
            if np.isnan(value):
                continue
            right, interval = value, intervals.get(system, {}).get(protocol)
            if interval is not None:
                low, high = (100 * float(bound) for bound in interval)
                axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
                right = max(value, high)
            draw(value, y)
            text = axes.text(right + 1.2, y, f"{value:.1f}", va="center", fontsize=8)
            text.set_path_effects(outlined("white", 2))
    for group in (1, 2):
        axes.axhline(group * (rows + 0.6) - 0.8, color="#BBBBBB", linewidth=0.6)
    middles = [group * (rows + 0.6) + (rows - 1) / 2 for group in range(3)]
    axes.set_yticks(middles, [protocol.capitalize() for protocol in PROTOCOLS])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="mAP (%)", xlim=(0, 107), xticks=range(0, 101, 20))
    axes.set_ylim(middles[2] + rows / 2 + 0.2, -0.7)
    axes.grid(axis="x")
    names = [shorten(system, 6, size=8) for system in scores]
    longest = max(text_width(name, 8.0) for name in names) / 72 + 0.6  # and its mark
    columns = int(np.clip(0.95 * 7 / longest, 1, 4))
    # Given as such, since matplotlib leaves out names that begin with an underscore.
    figure.legend(handles, names, loc="outside upper left", ncols=columns)
    return axes


def _draw_points(axes: Axes, x: ArrayLike, y: ArrayLike, *, face: str, edge: str) -> list[Line2D]:
    return axes.plot(
        x, y, "o", color=face, markeredgecolor=edge, markersize=5.5, markeredgewidth=1.2
    )


def system_colours(names: Sequence[str] | Mapping[str, object]) -> dict[str, str]:
    """Returns the colour of each system: that of its name, else the next of OTHER_COLOURS."""
    others = [name for name in names if name not in style.SYSTEM_COLOURS]
    count = len(style.OTHER_COLOURS)
    extra = {name: style.OTHER_COLOURS[i % count] for i, name in enumerate(others)}
    return style.SYSTEM_COLOURS | extra


def _percent(score: object) -> float:
    """Returns a fraction, or the mAP in `evaluate`'s dict, in percent; nan for None."""
    value = score.get("map") if isinstance(score, Mapping) else score
    return float("nan") if value is None else 100 * float(value)


@styled
def ap_change(table: pd.DataFrame) -> Axes:
    """Draws each query's average precision after a change over that before, with the diagonal.

    Filled points above the diagonal have won, hollow ones below it have lost; the `NAMED` that
    changed most are numbered and listed. table: one row a query, named by the index, with
    the columns `before` and `after`: average precision in [0, 1], nan where the query has no
    positive (left out, and counted below; a sentence where there is no other). Raises ValueError
    for a missing column.
    """
    if missing := {"before", "after"} - set(table.columns):
        raise ValueError(f"the table has no column {', '.join(sorted(missing))}")
    points = 100 * table[["before", "after"]].astype(float)
    left_out = int(points.isna().any(axis=1).sum())
    points = points.dropna()
    if not len(points):
        return sentence_figure("no query has a positive image")
    _, axes = plt.subplots(figsize=(7.2, 4.4))
    change = points["after"] - points["before"]
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle="--")
    for lost, colour, face in (
        (False, style.OURS_COLOUR, style.OURS_COLOUR),
        (True, style.GLOBAL_COLOUR, "white"),
    ):
        chosen = points[(change < 0) == lost]
        drawn = _draw_points(axes, chosen["before"], chosen["after"], face=face, edge=colour)
        plt.setp(drawn, clip_on=False)
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", anchor="W")
    axes.set(xlabel="AP before (%)", ylabel="AP after (%)")
    axes.grid()
    most = np.argsort(-change.abs().to_numpy(), kind="stable")[:NAMED]
    _number_points(axes, points.iloc[most[change.abs().to_numpy()[most] >= 0.05]])
    won, lost, same = ((change > 0).sum(), (change < 0).sum(), (change == 0).sum())
    text = f"{won} won, {lost} lost, {same} unchanged; mean {change.mean():+.1f} points"
    axes.set_title(text, loc="left")
    if left_out:
        axes.set_xlabel(f"AP before (%)   ({left_out} without a positive image left out)")
    return axes


def _number_points(axes: Axes, points: pd.DataFrame) -> None:
    """Numbers points, and lists their names and changes beside the axes."""
    change, lines = points["after"] - points["before"], []
    for number, (name, (x, y)) in enumerate(zip(points.index, points.to_numpy(), strict=True), 1):
        note = axes.annotate(str(number), (x, y), (4, -8), fontsize=8, fontweight="bold")
        note.set(anncoords="offset points")
        note.set_path_effects(outlined("white", 2))
        lines.append(f"{number}  {change.iloc[number - 1]:+.0f}  {shorten(name, 1.9)}")
    head = "changed most (points):\n" if lines else ""
    listed = axes.text(1.03, 1, head + "\n".join(lines), va="top", fontsize=8, linespacing=1.5)
    listed.set_transform(axes.transAxes)


@styled
def retrieval_curves(
    similarities: Mapping[str, np.ndarray],
    precision: Mapping[str, np.ndarray],
    recall: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    top: int,
) -> np.ndarray:
    """Draws similarities by label, precision over recall, and recall over the length of a list.

    similarities: label ("easy", "hard", "negative") -> (N,) similarities of such images, all
    queries together; each histogram has the area 1. precision: protocol -> (R,) mean interpolated
    precision at R levels of recall from 0 to 1. recall: protocol -> lengths (L,) and the mean share
    (L,) of right images within each. top: length of the short list, drawn as a line; the values
    there are the most that reranking can find. Returns the axes, shape (3,).
    """
    _, axes = plt.subplots(1, 3, figsize=(10, 3.6), width_ratios=[1.15, 1, 1.15])
    _draw_histograms(axes[0], similarities)
    for protocol, line in zip(precision, LINE_STYLES, strict=False):
        values, (lengths, shares) = precision[protocol], recall[protocol]
        colour, label = style.PROTOCOL_COLOURS[protocol], protocol.capitalize()
        levels = np.linspace(0, 100, len(values))
        axes[1].plot(levels, 100 * values, line, color=colour, label=label)
        ceiling = 100 * float(np.interp(top, lengths, shares))
        axes[2].plot(top, ceiling, "o", color=colour, markeredgecolor=INK, markersize=5)
        axes[2].plot(lengths, 100 * shares, line, color=colour, label=f"{label}: {ceiling:.0f} %")
    axes[2].axvline(top, color=INK, linewidth=0.8, linestyle=":", label=f"short list: {top}")
    axes[1].set(xlabel="recall (%)", ylabel="precision (%)", xlim=(0, 100), ylim=(0, 103))
    axes[1].set_title("precision and recall", loc="left")
    axes[2].set(xscale="log", xlabel="images looked at", ylabel="right images found (%)")
    axes[2].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[2].set(ylim=(0, 103))
    axes[2].set_title("recall by length of the list", loc="left")
    for panel in axes:
        panel.grid(axis="y")
        if panel.get_legend_handles_labels()[0]:
            legend = panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
            plt.setp(legend.get_texts(), fontsize=7.5)
    return axes


def _draw_histograms(axes: Axes, similarities: Mapping[str, np.ndarray]) -> None:
    axes.set(xlabel="similarity to the query", ylabel="density")
    values = {label: np.asarray(row, float) for label, row in similarities.items() if len(row)}
    if not values:
        axes.set_title("no similarities", loc="left")
        return
    every = np.concatenate(list(values.values()))
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-6), 41)
    for index, (label, row) in enumerate(values.items()):
        heights, colour = np.histogram(row, edges, density=True)[0], style.LABEL_COLOURS[label]
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.25)
        steps = axes.stairs(heights, edges, label=f"{label}: {len(row):,}", linewidth=1.5)
        steps.set(edgecolor=colour, linestyle=LINE_STYLES[index % 4])
    title = "similarities"
    right = [row for label, row in values.items() if label != "negative"]
    if right and "negative" in values:
        first, second = np.concatenate(right), values["negative"]
        won = stats.mannwhitneyu(first, second).statistic / (first.size * second.size)
        title = f"right before wrong in {100 * won:.0f} % of pairs"
    axes.set_title(title, loc="left")
