"""Thresholds of reranking: mAP over a grid, and the choice on the validation set."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.evaluation import statistics
from vitgal.features.files import INT32, FileError, map_array, read_json
from vitgal.settings import RerankingSettings, TuningSettings

DATASET = "val_retrieval"
PROTOCOL = "medium"  # the positives of the validation set are all easy

NAMES = ("max_distance", "threshold", "top")  # of the settings that a grid varies
RECORD = {
    "grid": {name: [float | int] for name in NAMES},
    **dict.fromkeys(("chosen", "current"), [range(1 << 31)] * 3),
    "before": [float | None],
    "groups": [INT32],
}

Grid = dict[str, list[float]]  # max_distance, threshold and top, each with its rising values
Point = tuple[int, int, int]  # the index of a value of each


class TuningError(runs.UserError, ValueError):
    """Tuning is impossible; the message gives the reason and the remedy."""


def current_point(current: RerankingSettings) -> dict[str, float]:
    """Returns the values of the settings that a grid varies, by name, in the grid's order."""
    values = current.matching.max_distance, current.verification.threshold, current.top
    return dict(zip(NAMES, values, strict=True))


def make_grid(settings: TuningSettings, current: RerankingSettings) -> Grid:
    """Returns the values to try, rising, the current ones among them.

    Raises TuningError for a value that is not above 0.
    """
    lists = settings.max_distances, settings.thresholds, settings.tops
    grid = {
        name: sorted({*values, value})
        for (name, value), values in zip(current_point(current).items(), lists, strict=True)
    }
    if any(value <= 0 for values in grid.values() for value in values):
        raise TuningError(f"every value to try must be above 0, not {grid}")
    return grid


def best_point(ap: np.ndarray) -> Point:
    """Returns the point of the highest mean AP; of equal ones the first.

    ap: (D, T, C, Q) float64. Means that differ only by rounding count as equal.
    """
    means = ap.mean(axis=-1)
    best = np.argmax(means >= means.max() - 1e-12)
    return tuple(int(index) for index in np.unravel_index(best, means.shape))


@dataclass(frozen=True, eq=False)
class Tuning:
    """mAP on the validation set over a grid of thresholds.

    ap: (D, T, C, Q) float64, the AP of every query at every point of the grid. chosen, current: the
    best point and the one it is compared with. before: (Q,) float64, AP without reranking. groups:
    (Q,) int64, equal for queries of one landmark.
    """

    grid: Grid
    ap: np.ndarray
    chosen: Point
    current: Point
    before: np.ndarray
    groups: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Tuning":
        """Reads the folder of a finished tuning stage; FileError where a file is damaged."""
        path = Path(folder) / "tuning.json"
        record = read_json(path, RECORD)
        grid, before, groups = record["grid"], record["before"], record["groups"]
        shape = tuple(map(len, grid.values()))
        points = [tuple(record[key]) for key in ("chosen", "current")]
        inside = all(at < size for point in points for at, size in zip(point, shape, strict=True))
        if list(grid) != list(NAMES) or not inside or len(groups) != len(before):
            raise FileError(f"{path} is damaged: make the stage again")
        ap = map_array(Path(folder) / "ap.npy", np.dtype(np.float64), (*shape, len(before)))
        return cls(grid, ap, *points, np.array(before, np.float64), np.array(groups))

    def values(self, point: Point) -> dict[str, float]:
        """Returns the parameters at a point of the grid."""
        return {name: self.grid[name][index] for name, index in zip(self.grid, point, strict=True)}

    def curve(self, name: str) -> np.ndarray:
        """Returns AP (V, Q) over the V values of one parameter, the other two as chosen."""
        axis = list(self.grid).index(name)
        index = tuple(slice(None) if i == axis else at for i, at in enumerate(self.chosen))
        return self.ap[index]

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
        """The test of chosen thresholds (`held_out`) against the current ones."""
        current, other = self.ap[self.current], self.held_out
        if np.isnan(other).all():
            current = other
        return statistics.paired_test(current, other)

    def advice(self, params: str = "params/demo.yaml") -> str:
        """Returns the chosen values, how certain the gain is, and the command that uses them."""
        values = self.values(self.chosen)
        sentence = statistics.verdict(self.test, "the current setting", "choosing")
        options = " ".join(f"-p {name} {value}" for name, value in values.items())
        return (
            f"chosen on {DATASET}: {', '.join(f'{k} = {v}' for k, v in values.items())}\n"
            f"each landmark judged by what the others choose: {sentence}\n"
            f"to use them: vitgal run {params} --only 06 {options} -p overwrite true"
        )
