"""Thresholds of reranking: mAP over a grid, and the choice on the validation set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.evaluation import statistics

DATASET = "val_retrieval"
PROTOCOL = "medium"  # easy and hard count; only easy ones are labelled here


class TuningError(runs.UserError, ValueError):
    """Nothing can be tuned here; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Tuning:
    """mAP on the validation set over a grid of thresholds.

    grid: max_distance, threshold and top, each with its values, rising. ap: (D, T, C, Q), the AP
    of every query at every point of the grid. chosen, current: places on the grid, the best one
    and the one compared with. before: (Q,), AP without reranking.
    """

    grid: dict[str, list[float]]
    ap: np.ndarray
    chosen: tuple[int, int, int]
    current: tuple[int, int, int]
    before: np.ndarray
    groups: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Tuning":
        """What `tune` wrote."""
        record = runs.read_json(Path(folder) / "tuning.json")
        ap = np.load(Path(folder) / "ap.npy", allow_pickle=False)
        places = (tuple(record[key]) for key in ("chosen", "current"))
        before, groups = np.array(record["before"], np.float64), np.array(record["groups"])
        return cls(record["grid"], ap, *places, before, groups)

    def values(self, place: tuple[int, int, int]) -> dict[str, float]:
        """The parameters at a place of the grid."""
        return {name: self.grid[name][at] for name, at in zip(self.grid, place, strict=True)}

    def curve(self, name: str) -> np.ndarray:
        """(values, Q) AP along one parameter, the other two as chosen."""
        axis = list(self.grid).index(name)
        index = tuple(slice(None) if i == axis else at for i, at in enumerate(self.chosen))
        return self.ap[index]

    @property
    def held_out(self) -> np.ndarray:
        """(Q,) AP of each query at the point that the other landmarks' queries would choose.

        What was chosen by a query flatters it; this does not. With one landmark alone, all nan.
        """
        ap = np.full(self.groups.shape, np.nan)
        for group in np.unique(self.groups):
            inside = self.groups == group
            if (others := ~inside & ~np.isnan(self.before)).any():
                ap[inside] = self.ap[_best(self.ap[..., others])][inside]
        return ap

    @property
    def test(self) -> statistics.PairedTest:
        """Choosing thresholds, as `held_out` judges it, against the current ones."""
        current, other = self.ap[self.current], self.held_out
        if np.isnan(other).all():
            current = other
        return statistics.paired_test(current, other)

    def advice(self, params: str = "params/demo.yaml") -> str:
        """The chosen values, how sure they are, and the command that uses them."""
        values = self.values(self.chosen)
        sentence = statistics.verdict(self.test, "the current setting", "choosing")
        options = " ".join(f"-p {name} {value}" for name, value in values.items())
        return (
            f"chosen on {DATASET}: {', '.join(f'{k} = {v}' for k, v in values.items())}\n"
            f"each landmark judged by what the others choose: {sentence}\n"
            f"to use them: vitgal run {params} --only 06 {options} -p overwrite true"
        )


def _best(ap: np.ndarray) -> tuple[int, int, int]:
    """The place of the highest mean of AP (D, T, C, Q); of equal ones the first.

    Means that are equal but for rounding are equal: the sums' order would choose among them.
    """
    means = ap.mean(axis=-1)
    place = np.argmax(means >= means.max() - 1e-12)
    return tuple(int(at) for at in np.unravel_index(place, means.shape))


def _grid(
    max_distances: Sequence[float],
    thresholds: Sequence[float],
    tops: Sequence[int],
    current: Mapping[str, float],
) -> dict[str, list]:
    given = {"max_distance": max_distances, "threshold": thresholds, "top": tops}
    if set(current) != set(given):
        raise TuningError(f"current needs {', '.join(given)}, not {', '.join(current)}")
    grid = {name: sorted({*values, current[name]}) for name, values in given.items()}
    if any(value <= 0 for values in grid.values() for value in values):
        raise TuningError(f"every value to try must be above 0, not {grid}")
    return grid
