"""Exact ranks of labelled images, counted without ranking the rest."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from vitgal import runs
from vitgal.retrieval.exact_search import KEYS
from vitgal.retrieval.products import BLOCK, _in_threads, _products, _slices, checked

BUCKETS = 4096  # steps of similarity; more of them leave less to sort and take longer to count


@dataclass(frozen=True, eq=False)
class Positions:
    """Where each query's labelled images stand in its full ranking of the database.

    indices: per query a rising int64 array of database indices.  positions: per query the int64
    zero-based rank of each.  number: N, the size of the database.
    Raises ValueError where an index or a rank repeats or lies outside 0 … N - 1.
    """

    indices: list[np.ndarray]
    positions: list[np.ndarray]
    number: int

    def __post_init__(self) -> None:
        for q, (index, place) in enumerate(zip(self.indices, self.positions, strict=True)):
            if index.shape != place.shape:
                raise ValueError(f"query {q}: {index.size} images, but {place.size} ranks")
            if (np.diff(index) <= 0).any() or np.unique(place).size != place.size:
                raise ValueError(f"query {q}: images must rise and no rank may repeat")
            for values in (index, place):
                if values.size and (values.min() < 0 or values.max() >= self.number):
                    raise ValueError(f"query {q}: an image or rank outside 0 … {self.number - 1}")

    @classmethod
    def from_ranks(
        cls,
        ranks: np.ndarray,
        labelled: Sequence[np.ndarray],
        *,
        number: int | None = None,
        truncated: bool = False,
    ) -> "Positions":
        """Reads the ranks of labelled images off a ranking.

        Args:
            ranks: (K, Q) integers, database indices, best first, one column a query.
            labelled: per query the indices to look for (`revisited.labelled`).
            number: the size of the database, K where it is not given.
            truncated: leave out labelled images that the ranking does not reach.
        Raises:
            ValueError: an index is out of range or repeated in its column, a labelled image is
                missing and `truncated` is not set, or the number of columns is not len(labelled).
        """
        ranks = np.asarray(ranks)
        if ranks.ndim != 2 or ranks.dtype.kind not in "iu" or ranks.shape[1] != len(labelled):
            raise ValueError(
                f"a ranking for {len(labelled)} queries is an integer array (images, "
                f"{len(labelled)}), one column a query, not {ranks.dtype} {ranks.shape}"
            )
        number = len(ranks) if number is None else number
        indices = [np.sort(np.asarray(index, np.int64)) for index in labelled]
        positions = []
        for q, index in enumerate(indices):
            where = _inverse(ranks[:, q], number, q)[index]
            if not truncated and (where < 0).any():
                raise ValueError(
                    f"the ranking of query {q} does not reach the labelled image "
                    f"{index[where < 0][0]}: give the full ranking or Positions, or set "
                    "truncated=True to count what it misses as never found"
                )
            indices[q], kept = index[where >= 0], where[where >= 0]
            positions.append(kept)
        return cls(indices, positions, number)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes one `.npz` (flat arrays with offsets) atomically and returns its path."""
        return runs.write_arrays(
            Path(path),
            number=np.int64(self.number),
            offsets=np.cumsum([0, *(index.size for index in self.indices)], dtype=np.int64),
            indices=_flat(self.indices),
            positions=_flat(self.positions),
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Positions":
        """Reads what `save` wrote; ValueError names a file that holds something else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                cuts = arrays["offsets"][1:-1]
                empty = arrays["offsets"].size == 1  # no query; np.split would give one
                parts = [[] if empty else np.split(arrays[key], cuts) for key in KEYS]
                return cls(*parts, int(arrays["number"]))
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold positions ({error}); make it again") from error


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *arrays])


def _inverse(column: np.ndarray, number: int, q: int) -> np.ndarray:
    """(number,) int64: the rank of every database image in one column, -1 where it has none."""
    if column.size and not 0 <= column.min() <= column.max() < number:
        bad = column[(column < 0) | (column >= number)][0]
        raise ValueError(
            f"the ranking of query {q} holds the index {bad}, outside the database's {number} "
            "images (give number= where the database is larger than the ranking is long)"
        )
    where = np.full(number, -1, np.int64)
    where[column] = np.arange(column.size)
    if np.count_nonzero(where >= 0) != column.size:
        values, times = np.unique(column, return_counts=True)
        raise ValueError(f"the ranking of query {q} holds image {values[times > 1][0]} twice")
    return where


def labelled_positions(
    queries: np.ndarray,
    database: np.ndarray,
    labelled: Sequence[np.ndarray],
    *,
    block: int = BLOCK,
) -> Positions:
    """Finds the exact rank of every labelled image without ranking the rest.

    A rank is the number of images that are more similar, or as similar with a lower index: counted
    block by block it equals the full stable sort to the last place. Beyond the descriptors each of
    up to four threads takes about (90 bytes x Q + 8 bytes x D) x max(block, 4096), whatever N.

    Args:
        queries: (Q, D) floats.  database: (N, D) floats, memory-mapped or not.
        labelled: per query the database indices to find (`revisited.labelled`); may be empty.
    Raises:
        ValueError: as `search`, or a labelled index is repeated or outside the database.
    """
    queries, database = checked(queries, database)
    if len(labelled) != len(queries):
        raise ValueError(f"{len(queries)} queries, but {len(labelled)} lists of labelled images")
    indices = [np.sort(np.asarray(index, np.int64)) for index in labelled]
    for q, index in enumerate(indices):
        outside = index.size and (index[0] < 0 or index[-1] >= len(database))
        if outside or (np.diff(index) == 0).any():
            raise ValueError(
                f"query {q}: a labelled image is repeated or outside the {len(database)} there are"
            )
    if not any(index.size for index in indices):
        return Positions(indices, [index.copy() for index in indices], len(database))
    parts = _slices(0, len(database), block)
    with threadpool_limits(1, "blas"):
        values = _labelled_similarities(queries, database, indices, block)
        steps = _steps(next(_products(queries, database, parts)), values)
    counts = _in_threads(
        lambda share: _count_ahead(queries, database, share, indices, values, steps), parts
    )
    return Positions(indices, [sum(each) for each in zip(*counts, strict=True)], len(database))


def _labelled_similarities(
    queries: np.ndarray, database: np.ndarray, indices: list[np.ndarray], block: int
) -> list[np.ndarray]:
    """Per query the similarity of each labelled image, as the later count will use it."""
    rows = np.unique(_flat(indices))
    parts = [rows[each] for each in _slices(0, rows.size, block)]
    values = [np.empty(index.size, np.float32) for index in indices]
    for part, products in zip(parts, _products(queries, database, parts), strict=True):
        for q, index in enumerate(indices):
            first, last = np.searchsorted(index, (part[0], part[-1] + 1))
            values[q][first:last] = products[q, np.searchsorted(part, index[first:last])]
    return values


class _Steps(NamedTuple):
    """Equal steps of similarity: low and scale (Q, 1) float32, near (Q, BUCKETS) bool."""

    low: np.ndarray
    scale: np.ndarray
    near: np.ndarray  # the bucket holds a labelled image


def _count_ahead(
    queries: np.ndarray,
    database: np.ndarray,
    parts: list[slice],
    indices: list[np.ndarray],
    values: list[np.ndarray],
    steps: _Steps,
) -> list[np.ndarray]:
    """Per query how many images of these parts rank before each labelled one.

    Sorting every similarity would take longer than computing it. So each falls into one of BUCKETS
    steps; a bucket without a labelled image is only counted, and what shares a bucket with one is
    compared with it exactly.
    """
    counts = [np.zeros(index.size, np.int64) for index in indices]
    tally = np.zeros(steps.near.shape, np.int64)
    rows = np.unique(_flat(indices))
    waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held = 0
    for part, products in zip(parts, _products(queries, database, parts), strict=True):
        if np.diff(np.searchsorted(rows, (part.start, part.stop))):
            _put(products, indices, values, part)
        close = _tally(products, steps, tally)
        places = np.flatnonzero(close)  # row by row: the queries' shares stand one after another
        cuts = np.searchsorted(places, np.arange(len(products) + 1) * products.shape[1])
        waiting.append((cuts, products.ravel()[places], places % products.shape[1] + part.start))
        held += places.size
        if held > products.size or part is parts[-1]:
            _settle(counts, waiting, indices, values)
            waiting, held = [], 0
    for q, value in enumerate(values):
        before = np.where(steps.near[q], 0, tally[q])[::-1].cumsum()[::-1]
        counts[q] += before[_buckets(value, steps.low[q], steps.scale[q])]
    return counts


def _put(
    products: np.ndarray, indices: list[np.ndarray], values: list[np.ndarray], part: slice
) -> None:
    """Writes the labelled images' similarities over their products, where they are in this part.

    The count holds only if every labelled image has one similarity; a product that is computed a
    second time could differ in the last bit.
    """
    for row, index, value in zip(products, indices, values, strict=True):
        first, last = np.searchsorted(index, (part.start, part.stop))
        row[index[first:last] - part.start] = value[first:last]


def _steps(products: np.ndarray, values: list[np.ndarray]) -> _Steps:
    """Steps over the range of the first block; what lies outside falls into the end buckets."""
    finite = np.isfinite(products)
    low = products.min(axis=1, keepdims=True, where=finite, initial=0)
    high = products.max(axis=1, keepdims=True, where=finite, initial=0)
    scale = np.float32(BUCKETS) / np.maximum(high - low, np.float32(1e-6))  # one step at the least
    near = np.zeros((len(values), BUCKETS), bool)
    for q, value in enumerate(values):
        near[q, _buckets(value, low[q], scale[q])] = True
    return _Steps(low, scale, near)


def _buckets(similarities: np.ndarray, low: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The bucket of each similarity; never falls where the similarity rises, rounding included."""
    return np.clip((similarities - low) * scale, 0, BUCKETS - 1).astype(np.int64)


def _tally(products: np.ndarray, steps: _Steps, tally: np.ndarray) -> np.ndarray:
    """Adds a block (Q, B) to the buckets' counts; says which images share one with a label."""
    keys = _buckets(products, steps.low, steps.scale)
    keys += np.arange(len(keys))[:, None] * BUCKETS
    tally += np.bincount(keys.ravel(), minlength=tally.size).reshape(tally.shape)
    return steps.near.ravel()[keys]


def _settle(
    counts: list[np.ndarray],
    waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    indices: list[np.ndarray],
    values: list[np.ndarray],
) -> None:
    """Adds to `counts` the waiting images that rank before a labelled one.

    waiting: similarities and database indices; query q has those from cuts[q] to cuts[q + 1].
    """
    for q, (index, value) in enumerate(zip(indices, values, strict=True)):
        similarities = np.concatenate([s[cuts[q] : cuts[q + 1]] for cuts, s, _ in waiting])
        ordered = np.sort(similarities)
        at, above = (np.searchsorted(ordered, value, side) for side in ("left", "right"))
        counts[q] += ordered.size - above
        ties = np.flatnonzero(at < above)
        if ties.size:
            images = np.concatenate([i[cuts[q] : cuts[q + 1]] for cuts, _, i in waiting])
        for j in ties:
            counts[q][j] += np.count_nonzero(images[similarities == value[j]] < index[j])
