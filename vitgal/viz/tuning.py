"""The figure of a tuned reranking: mAP over candidates, thresholds and the other settings."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from vitgal.evaluation.tuning import ALWAYS, Tuning
from vitgal.viz import style

CHANGE_MAP = "PuOr"  # mAP below that without reranking, and above it
LEAST_CHANGE = 2.0  # points of mAP at the ends of the colours, at least
LINE = 125  # letters of a line below
ORDER_COLOURS = {"inliers": style.SYSTEM_COLOURS["published"]}
ORDER_NAMES = {"inliers": "reranked by count", "fused": "reranked by similarity and count"}


@style.styled
def tuning_figure(tuning: Tuning) -> np.ndarray:
    """Draws mAP over the number of candidates, over distance and threshold, and over all else.

    Each panel keeps the other settings as chosen. The first has a thin line for each landmark, a
    thick line for each order (the fused one with its best weights), and a labelled level without
    reranking. A sentence below says where reranking hurts. Returns the axes, shape (2,), or (3,)
    where further settings were tried.
    """
    others = [name for name in tuning.values(tuning.chosen) if name not in ALWAYS]
    widths = [3.6, 2.8, 2.8] if others else [4, 3]
    tried = sum(len(tuning.grid[name]) for name in others) + 0.6 * len(others)
    height = max(3.9, 0.9 + 0.19 * tried)
    figure, axes = plt.subplots(1, len(widths), figsize=(11, height), width_ratios=widths)
    _draw_tops(axes[0], tuning)
    _draw_thresholds(axes[1], tuning)
    if others:
        _draw_others(axes[2], tuning, others)
    sentence = "\n".join(textwrap.wrap(tuning.harm(), LINE))
    figure.supxlabel(sentence, x=0.01, ha="left", fontsize=8)
    return axes


def _percent(ap: np.ndarray) -> np.ndarray:
    """The mean over the queries that count, in percent; ap: (..., Q)."""
    counting = ~np.isnan(ap).all(axis=tuple(range(ap.ndim - 1)))
    return 100 * ap[..., counting].mean(axis=-1) if counting.any() else ap[..., 0]


def _draw_tops(axes: Axes, tuning: Tuning) -> None:
    tops = tuning.grid["top"]
    for group in np.unique(tuning.groups):
        curve = _percent(tuning.curve("top")[:, tuning.groups == group])
        axes.plot(tops, curve, color=style.INK, alpha=0.3, linewidth=0.7)
    axes.plot([], [], color=style.INK, alpha=0.35, linewidth=0.7, label="queries of one landmark")
    orders = tuning.grid.get("order", [None])
    for index, order in enumerate(orders):
        fixed = {} if order is None else tuning.with_order(index)
        mark, label = f"o{style.LINE_STYLES[index]}", ORDER_NAMES.get(order, "reranked")
        curve = _percent(tuning.curve("top", fixed=fixed))
        colour = ORDER_COLOURS.get(order, style.OURS_COLOUR)
        axes.plot(tops, curve, mark, color=colour, markersize=4, label=label)
    level = _percent(tuning.before)
    line = axes.axhline(level, color=style.GLOBAL_COLOUR, linestyle=":")
    line.set_label(f"not reranked: {level:.1f}")
    for label, point, mark in (("current", tuning.current, "--"), ("chosen", tuning.chosen, "-")):
        top = tuning.values(point)["top"]
        axes.axvline(top, color=style.CHOSEN_COLOUR, linewidth=1.2, linestyle=mark, label=label)
    axes.set_xscale("log")
    axes.set_xticks(tops, [str(top) for top in tops])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="candidates that are reranked (top)", ylabel="mAP (%)")
    axes.grid(axis="y")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=6)


def _draw_thresholds(axes: Axes, tuning: Tuning) -> None:
    names = ("max_distance", "threshold")
    values, level = _percent(tuning.curve(*names)), _percent(tuning.before)
    reach = max(LEAST_CHANGE, np.nanmax(np.abs(values - level), initial=0))
    norm = TwoSlopeNorm(level if np.isfinite(level) else 0, *(level + [-reach, reach]))
    axes.imshow(values, cmap=CHANGE_MAP, norm=norm, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if abs(value - level) > 0.6 * reach else style.INK
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=ink)
    for point, mark, inset in ((tuning.current, "--", 0.06), (tuning.chosen, "-", 0.0)):
        at = [list(tuning.grid).index(name) for name in names]
        corner = point[at[1]] - 0.5 + inset, point[at[0]] - 0.5 + inset
        side = 1 - 2 * inset
        frame = Rectangle(
            corner, side, side, fill=False, edgecolor=style.CHOSEN_COLOUR, linewidth=2
        )
        frame.set(linestyle=mark, clip_on=False)
        axes.add_patch(frame)
    for axis, name in zip((axes.yaxis, axes.xaxis), names, strict=True):
        axis.set_ticks(range(len(tuning.grid[name])), [f"{v:g}" for v in tuning.grid[name]])
    axes.set(xlabel="threshold (pixels of the input)", ylabel="max_distance of a match")
    axes.set_title(f"mAP (%); white: as not reranked, {level:.1f}", loc="left")
    axes.tick_params(length=0)


def _draw_others(axes: Axes, tuning: Tuning, names: list[str]) -> None:
    """A row a value, with a mark at its mAP; of each setting the chosen one is filled."""
    labels, position = [], 0.0
    for name in names:
        chosen = tuning.chosen[list(tuning.grid).index(name)]
        labels.append((position, name))
        for index, value in enumerate(tuning.grid[name]):
            position += 1
            fixed = tuning.with_order(index) if name == "order" else {name: index}
            mean = _percent(tuning.curve(fixed=fixed))
            face = style.CHOSEN_COLOUR if index == chosen else "white"
            axes.plot(mean, position, "o", color=style.CHOSEN_COLOUR, markerfacecolor=face)
            axes.axhline(position, color="#E3E3E3", linewidth=0.6, zorder=0)
            labels.append((position, str(value)))
        position += 1.3
    axes.axvline(_percent(tuning.before), color=style.GLOBAL_COLOUR, linestyle=":")
    axes.set_yticks(*map(list, zip(*labels, strict=True)), fontsize=7.5)
    for tick in axes.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in names else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(position - 0.5, -0.7)
    axes.set_xlabel("mAP (%)")
    axes.set_title("the other settings; filled: chosen", loc="left")
