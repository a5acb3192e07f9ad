"""Settings of reranking: mAP over a grid of them, and the choice on the validation set."""

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.evaluation import statistics
from vitgal.evaluation.protocol import average_precision
from vitgal.features.files import INT32, FileError, map_array, read_json
from vitgal.retrieval.ranking import fused_scores
from vitgal.settings import RerankingSettings, TuningSettings

DATASET = "val_retrieval"
PROTOCOL = "medium"  # the positives of the validation set are all easy

# Settings that a grid may vary, in its order; those that change the counts of a pair come first.
COUNTED = ("matching", "estimator", "max_distance", "threshold", "count", "order")
NAMES = (*COUNTED, "fused_weight", "fused_cap", "top")
ALWAYS = ("max_distance", "threshold", "top")  # in every grid, if with one value alone
VALUES = {name: [float | int] for name in NAMES} | dict.fromkeys(
    ("matching", "estimator", "count", "order"), [str]
)
RECORD = {
    "grid": {name: VALUES[name] for name in ALWAYS},
    **dict.fromkeys(("chosen", "current"), [range(1 << 31)]),
    "before": [float | None],
    "groups": [INT32],
}

HARMLESS = (
    "With the chosen values reranking lowers mAP at no number of candidates and on no landmark."
)
ROUNDING = 1e-9  # differences of mAP below it are none

Grid = dict[str, list[Any]]  # setting -> its values, in the order of NAMES
Point = tuple[int, ...]  # the index of a value of each


class TuningError(runs.UserError, ValueError):
    """Tuning is impossible; the message gives the reason and the remedy."""


def current_values(current: RerankingSettings) -> dict[str, Any]:
    """Returns the values of all settings that a grid may vary, by name, in the grid's order."""
    values = vars(current) | vars(current.verification) | vars(current.matching)
    values["matching"] = current.matching.method
    return {name: values[name] for name in NAMES}


def make_grid(settings: TuningSettings, current: RerankingSettings) -> Grid:
    """Returns the values to try, the current ones among them: numbers rise, the current name leads.

    A setting with one value alone is left out, unless it is one of ALWAYS; so are weight and cap
    where no order is "fused". Raises TuningError for a number that is not above 0.
    """
    tried = {
        "matching": settings.matchings,
        "estimator": settings.estimators,
        "max_distance": settings.max_distances,
        "threshold": settings.thresholds,
        "count": settings.counts,
        "order": settings.orders,
        "fused_weight": settings.weights,
        "fused_cap": settings.caps,
        "top": settings.tops,
    }
    grid: Grid = {}
    for name, value in current_values(current).items():
        values = tried[name]
        if isinstance(value, str):
            grid[name] = [*dict.fromkeys([value, *values])]
            continue
        grid[name] = sorted({*values, value})
        if name in ALWAYS and grid[name][0] <= 0:
            raise TuningError(f"every {name} to try must be above 0, not {grid[name]}")
    fused = "fused" in grid["order"]
    used = [name for name in grid if fused or not name.startswith("fused_")]
    return {name: grid[name] for name in used if name in ALWAYS or len(grid[name]) > 1}


def query_ap(
    counts: np.ndarray,
    similarities: np.ndarray,
    relevant: np.ndarray,
    later: np.ndarray,
    grid: Grid,
    current: RerankingSettings,
) -> np.ndarray:
    """Computes the AP of one query at every point of a grid.

    Args:
        counts: (..., C) integers of its first C images, in the global order and without ignored
            ones; the axes before the last are those of the grid that are in COUNTED.
        similarities: (C,) of these images, which the order "fused" needs.
        relevant: (C,) bool, which of them are positives.
        later: zero-based ranks, without ignored images, of the positives behind.
        current: the settings that the grid does not vary.
    Returns:
        (...) float64, an axis a setting of the grid; nan without positives. In memory stand a few
        times C numbers for each point of one `top`.
    """
    values = {name: grid.get(name, [value]) for name, value in current_values(current).items()}
    total = np.count_nonzero(relevant) + len(later)
    if not total:
        return np.full([len(each) for each in grid.values()], np.nan)
    counts = counts.reshape([*(len(values[name]) for name in COUNTED), counts.shape[-1]])
    tried = [values[name] for name in ("order", "fused_weight", "fused_cap")]
    ap = []
    for top in values["top"]:
        first = counts[..., :top]
        scores = np.empty((*first.shape[:-2], *map(len, tried), first.shape[-1]))
        for (o, order), (w, weight), (k, cap) in itertools.product(*map(enumerate, tried)):
            of_order = first[..., o, :]
            if order == "fused":
                of_order = fused_scores(similarities[:top], of_order, weight, cap)
            scores[..., o, w, k, :] = of_order
        ap.append(_reranked_ap(scores, relevant, later, total))
    return np.stack(ap, axis=-1).reshape([len(each) for each in grid.values()])


def _reranked_ap(
    scores: np.ndarray, relevant: np.ndarray, later: np.ndarray, total: int
) -> np.ndarray:
    """The AP (...) where the first T of C images are sorted by scores (..., T), ties as before."""
    top = scores.shape[-1]
    order = np.argsort(-scores.reshape(-1, top), axis=-1, kind="stable")
    hits = relevant[:top][order]
    ranks = np.nonzero(hits)[1].reshape(len(hits), -1)  # as many a row
    behind = np.concatenate([top + np.flatnonzero(relevant[top:]), later])
    ranks = np.concatenate([ranks, np.tile(np.sort(behind), (len(hits), 1))], axis=1)
    return np.reshape(average_precision(ranks, total), scores.shape[:-1])


def best_point(ap: np.ndarray) -> Point:
    """Returns the point of the highest mean AP; of equal ones the first.

    ap: float64 of shape (..., Q), an axis a setting of the grid. Means that differ only by rounding
    count as equal.
    """
    means = ap.mean(axis=-1)
    best = np.argmax(means >= means.max() - 1e-12)
    return tuple(int(index) for index in np.unravel_index(best, means.shape))


def point_values(grid: Grid, point: Point) -> dict[str, Any]:
    """Returns the parameters at a point of a grid, without those that change nothing there."""
    values = {name: tried[at] for (name, tried), at in zip(grid.items(), point, strict=True)}
    if values.get("order") == "inliers":
        values = {name: values[name] for name in values if not name.startswith("fused_")}
    return values


@dataclass(frozen=True, eq=False)
class Tuning:
    """mAP on the validation set over a grid of settings.

    ap: (..., Q) float64, the AP of every query at every point of the grid, an axis a setting.
    chosen, current: the best point and the one it is compared with. before: (Q,) float64, AP
    without reranking. groups: (Q,) int64, equal for queries of one landmark. queries: their names,
    or none.
    """

    grid: Grid
    ap: np.ndarray
    chosen: Point
    current: Point
    before: np.ndarray
    groups: np.ndarray
    queries: Sequence[str] = ()

    @classmethod
    def read(cls, folder: Path) -> "Tuning":
        """Reads the folder of a finished tuning stage; FileError where a file is damaged."""
        path = Path(folder) / "tuning.json"
        record = read_json(path, RECORD)
        grid, before, groups = record["grid"], record["before"], record["groups"]
        queries = record.get("queries", [])
        points = [tuple(record[key]) for key in ("chosen", "current")]
        known = [name for name in NAMES if name in grid]
        fits = list(grid) == known and all(
            runs.conforms(grid[name], VALUES[name]) for name in known
        )
        fits = fits and runs.conforms(queries, [str]) and len(queries) in (0, len(before))
        fits = fits and len(groups) == len(before)
        shape = tuple(map(len, grid.values())) if fits else ()
        for point in points:
            fits = fits and len(point) == len(shape) and all(map(operator.lt, point, shape))
        if not fits:
            raise FileError(f"{path} is damaged: make the stage again")
        ap = map_array(Path(folder) / "ap.npy", np.dtype(np.float64), (*shape, len(before)))
        return cls(grid, ap, *points, np.array(before, np.float64), np.array(groups), queries)

    def values(self, point: Point) -> dict[str, Any]:
        """Returns the parameters at a point of the grid, see `point_values`."""
        return point_values(self.grid, point)

    def curve(self, *names: str, fixed: Mapping[str, int] | None = None) -> np.ndarray:
        """Returns AP of shape (..., Q): an axis each for the named parameters' values, and queries.

        names: in the grid's order. fixed: parameter -> index of its value; all others as chosen.
        """
        at = dict(zip(self.grid, self.chosen, strict=True)) | (fixed or {})
        index = tuple(slice(None) if name in names else at[name] for name in self.grid)
        return self.ap[index]

    def with_order(self, index: int) -> dict[str, int]:
        """Returns what fixes an order for `curve`: its index, and its best weights, by index."""
        weights = [name for name in self.grid if name.startswith("fused_")]
        fixed = {"order": index}
        if weights and self.grid["order"][index] == "fused":
            scored = ~np.isnan(self.before)
            best = best_point(self.curve(*weights, fixed=fixed)[..., scored])
            fixed |= dict(zip(weights, best, strict=True))
        return fixed

    @property
    def held_out(self) -> np.ndarray:
        """(Q,) AP of each query at the best point for the queries of other landmarks.

        The choice does not depend on the query itself. All nan if there is only one landmark.
        """
        ap = np.full(self.groups.shape, np.nan)
        for group in np.unique(self.groups):
            inside = self.groups == group
            if (others := ~inside & ~np.isnan(self.before)).any():
                ap[inside] = self.ap[best_point(self.ap[..., others])][inside]
        return ap

    @property
    def test(self) -> statistics.PairedTest:
        """The test by landmark of chosen values (`held_out`) against the current ones."""
        current, other = self.ap[self.current], self.held_out
        if np.isnan(other).all():
            current = other
        return statistics.paired_test(current, other, self.groups)

    def advice(self, params: str = "params/demo.yaml") -> str:
        """Returns the chosen values, how certain the gain is, and the command that uses them.

        Says where reranking hurts, if it does.
        """
        values = self.values(self.chosen)
        sentence = statistics.verdict(self.test, "the current setting", "choosing")
        options = " ".join(f"-p {name} {value}" for name, value in values.items())
        return (
            f"chosen on {DATASET}: {', '.join(f'{k} = {v}' for k, v in values.items())}\n"
            f"each landmark judged by what the others choose: {sentence}\n"
            f"{self.harm()}\n"
            f"to use them: vitgal run {params} --only 06 {options} -p overwrite true"
        )

    def harm(self) -> str:
        """Says where reranking lowers mAP: at both settings, over `top`, and for landmarks."""
        counting = ~np.isnan(self.before)
        if not counting.any():
            return "No query counts."
        before, sentences = 100 * self.before[counting].mean(), []
        for name, point in (("current", self.current), ("chosen", self.chosen)):
            after = 100 * self.ap[point][counting].mean()
            if after < before - ROUNDING:
                change = f"from {before:.1f} to {after:.1f}"
                sentences.append(f"Reranking with the {name} values lowers mAP {change}.")
        curve = 100 * self.curve("top")[:, counting].mean(axis=-1)
        if worse := np.flatnonzero(curve < before - ROUNDING).tolist():
            tops = " or ".join(str(self.grid["top"][index]) for index in worse)
            lost = before - curve[worse].min()
            sentences.append(
                f"With the chosen values and a top of {tops}, reranking lowers mAP by {lost:.1f} "
                "at most."
            )
        change = 100 * (self.ap[self.chosen] - self.before)[counting]
        groups = self.groups[counting]
        means = np.array([change[groups == group].mean() for group in np.unique(groups)])
        if lost := np.count_nonzero(means < -ROUNDING):
            sentences.append(
                f"The chosen values lose on {lost} of {len(means)} landmarks, by "
                f"{-means.min():.1f} points at most."
            )
        return " ".join(sentences) or HARMLESS
