"""Exact search in bounded memory: best matches, exact ranks of labelled images, short lists.

A similarity is the float64 inner product of two descriptors, rounded to float32. Float32 matrix
products differ in their last bits with the block's shape, the row's place in it and the number of
threads, so that two copies of one image need not tie; rounded float64 products agree far beyond
what float32 can show. Ties go to the lower database index. Descriptors are expected L2-normalised
but are used as they are.

A database row of zeros stands for an image that could not be read: its similarity is -inf, so it
ranks behind every other image.
"""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from vitgal import runs
from vitgal.revisited import PROTOCOLS, GroundTruth, RetrievalDataset, ignored

# Rows taken at once: the float64 copy of 2048 x 384 descriptors takes 6 MB, and what is done to
# 70 x 2048 similarities stays in the processor's cache.
BLOCK = 2048
THREADS = 4  # at most; each takes the memory of a block
QUERIES = 4096  # taken together: their similarities to a block fill 32 MB
LOOK = 8  # of fewer images than so many times those wanted, float32 products spare nothing
NEAR_TIES = 4096  # that a query may have at its last place before float64 takes over
BUCKETS = 4096  # steps of similarity; more of them leave less to sort and take longer to count
KEYS = ("indices", "positions")
PUBLISHED = "published"  # the short list of the published code: the plain top
NO_BOX = (-1, -1, -1, -1)  # how the published list marks a database image, which is never cropped


# Search


def search(
    queries: np.ndarray, database: np.ndarray, *, k: int, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the `k` most similar database images of every query, exactly.

    Args:
        queries: (Q, D) floats.  database: (N, D) floats, memory-mapped or not.
        k: matches wanted; at most N are returned.
    Returns:
        similarities (K, Q) float32 and ranks (K, Q) int32, best first, one column a query: the
        first K rows of the full stable sort. An empty database gives (0, Q), no query (K, 0). Each
        of up to four threads takes about 40 bytes x Q x max(K, block) + 8 bytes x D x block more,
        for 4096 queries at most, which are taken together.
    Raises:
        ValueError: widths differ, k < 1, or a descriptor is not finite (its row is named).
    """
    queries, database = checked(queries, database)
    if k < 1:
        raise ValueError(f"k is {k}; at least one match must be wanted")
    k = min(k, len(database))
    if len(queries) > QUERIES:
        shares = [queries[part] for part in _slices(0, len(queries), QUERIES)]
        found = [search(share, database, k=max(1, k), block=block) for share in shares]
        similarities, ranks = zip(*found, strict=True)
        return np.concatenate(similarities, axis=1), np.concatenate(ranks, axis=1)
    parts = _slices(0, len(database), block)
    found = _looked_up(queries, database, parts, k) if LOOK * k <= len(database) else None
    if found is None:
        spans = _in_threads(lambda span: _best_of(queries, database, span, k), parts)
        found = [_merged(pairs, k) for pairs in zip(*spans, strict=True)]
    similarities = np.array([pair[0] for pair in found], np.float32).reshape(len(queries), k)
    ranks = np.array([pair[1] for pair in found], np.int32).reshape(len(queries), k)
    return np.ascontiguousarray(similarities.T), np.ascontiguousarray(ranks.T)


Matches = tuple[np.ndarray, np.ndarray]  # similarities and database indices of one query


def _best_of(
    queries: np.ndarray, database: np.ndarray, parts: list[slice], k: int
) -> list[Matches]:
    """Per query the best `k` (or all there are) of these rising parts of the database."""
    kept: list[list[Matches]] = [
        [(np.empty(0, np.float32), np.empty(0, np.int32))] for _ in queries
    ]
    waiting = np.zeros(len(queries), np.int64)
    bars: list[float | None] = [None] * len(queries)  # the k-th best; None until k are there
    for part, products in zip(parts, _products(queries, database, parts), strict=True):
        for q, row in enumerate(products):
            # An equal similarity with a higher index loses to what is kept, hence strictly more.
            places = np.arange(row.size) if bars[q] is None else np.flatnonzero(row > bars[q])
            kept[q].append((row[places], (places + part.start).astype(np.int32)))
            waiting[q] += places.size
            if waiting[q] >= k:  # merged this rarely, a long list costs little more than one sort
                kept[q], waiting[q] = [_merged(kept[q], k)], 0
                bars[q] = kept[q][0][0][-1]
    return [_merged(pairs, k) for pairs in kept]


def _looked_up(
    queries: np.ndarray, database: np.ndarray, parts: list[slice], k: int
) -> list[Matches] | None:
    """The same by float32 products, which leave few images for float64 to rank.

    None where these are no help: queries of another type, values that are not finite (`_best_of`
    names them) or too large, or more images that nearly tie than are worth keeping.
    """
    if queries.dtype != np.float32 or not len(queries):
        return None
    pools = [pool for (pool,) in _in_threads(lambda p: [_look(queries, database, p, k)], parts)]
    if not all(pools):
        return None
    error = max(pool.error for pool in pools)

    def settled(q: int) -> Matches:
        pairs = zip(*(pool.kept[q] for pool in pools), strict=True)
        _, images = _near(*map(np.concatenate, pairs), k, error)
        return ranked(queries[q], database, np.sort(images), k)

    shares = _in_threads(lambda share: list(map(settled, share)), list(range(len(queries))))
    return [found for share in shares for found in share]


def _look(queries: np.ndarray, database: np.ndarray, parts: list[slice], k: int) -> "_Pool | None":
    """Per query what may be among the best `k` of these parts; None as `_looked_up`."""
    length = float(np.sqrt(np.einsum("ij,ij->i", queries, queries, dtype=np.float64)).max())
    # The rounding of a sum of D products, in any order, and of what is added up, twice over.
    relative = 2 * (queries.shape[1] + 12) * 2.0**-24
    pool = _Pool(len(queries), k)
    products = np.empty((0, len(queries)), np.float32)
    for part in parts:
        with np.errstate(over="ignore", invalid="ignore"):
            given = database[part]
            rows = np.ascontiguousarray(given, np.float32)
            if len(products) != len(rows):
                products = np.empty((len(rows), len(queries)), np.float32)
            np.matmul(rows, queries.T, out=products)
            error = relative * length * _longest(rows) + float(np.finfo(np.float32).tiny)
        if not error < 1e30:  # true for nan as well
            return None
        blank = np.flatnonzero(products[:, 0] == 0)
        # As given: what float32 cannot hold is not an image that could not be read.
        products[blank[~given[blank].any(axis=1)]] = -np.inf
        if not pool.add(products, part.start, error):
            return None
    return pool if pool.merge() else None


def _longest(rows: np.ndarray) -> float:
    """No row is longer; nan or infinite where a value is. Of rows of one length 8 times theirs."""
    together = 64 if len(rows) % 64 == 0 else 1
    groups = rows.reshape(-1, together * rows.shape[1])
    return float(np.sqrt(np.einsum("ij,ij->i", groups, groups).max(initial=0)))


class _Pool:
    """The best `k` images of every query so far and all that may be, by inexact similarities.

    kept: similarities float32 and database indices int32 of each query, off by `error` at most.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k, self.error = k, 0.0
        self.kept: list[Matches] = [(np.empty(0, np.float32), np.empty(0, np.int32))] * queries
        self.bars = np.full(queries, -np.inf)  # no k-th best similarity is lower
        self.waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.held = 0

    def add(self, products: np.ndarray, start: int, error: float) -> bool:
        """Takes similarities (B, Q) of the images from `start` on; False as `merge`."""
        self.error = max(self.error, error)
        bars = np.nextafter((self.bars - error).astype(np.float32), np.float32(-np.inf))
        hits = np.flatnonzero(products >= bars)
        images, owners = np.divmod(hits.astype(np.int32), np.int32(products.shape[1]))
        images += np.int32(start)
        self.waiting.append((owners.astype(np.int16), products.ravel()[hits], images))
        self.held += hits.size
        return self.held < self.k * len(self.bars) or self.merge()

    def merge(self) -> bool:
        """Drops what cannot be among the best; False where too much is left."""
        if not self.waiting:
            return True
        owners, similarities, images = map(np.concatenate, zip(*self.waiting, strict=True))
        order = np.argsort(owners, kind="stable")
        cuts = np.searchsorted(owners[order], np.arange(len(self.bars) + 1))
        for q, (first, last) in enumerate(pairwise(cuts)):
            mine = order[first:last]
            pairs = zip(self.kept[q], (similarities[mine], images[mine]), strict=True)
            self.kept[q] = _near(*map(np.concatenate, pairs), self.k, self.error)
            if len(self.kept[q][0]) >= self.k:
                self.bars[q] = _kth(self.kept[q][0], self.k) - self.error
        self.waiting, self.held = [], 0
        return max(len(images) for _, images in self.kept) <= 2 * self.k + NEAR_TIES


def _kth(similarities: np.ndarray, k: int) -> float:
    """The k-th greatest."""
    return float(np.partition(similarities, len(similarities) - k)[len(similarities) - k])


def _near(similarities: np.ndarray, images: np.ndarray, k: int, error: float) -> Matches:
    """Those that may be among the best `k` where each similarity may be off by `error`."""
    if len(similarities) <= k:
        return similarities, images
    near = similarities >= np.float32(_kth(similarities, k)) - np.float32(2.1 * error)
    return similarities[near], images[near]


def _merged(pairs: Iterable[Matches], k: int) -> Matches:
    """The best `k` of matches whose indices rise from pair to pair wherever similarities tie."""
    similarities, indices = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    order = np.argsort(-similarities, kind="stable")[:k]
    return similarities[order], indices[order]


def similarities(query: np.ndarray, database: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The similarities (M,) float32 of one query (D,) and images (M,), integers."""
    return next(_products(query[None], database, [images]))[0]


def ranked(query: np.ndarray, database: np.ndarray, images: np.ndarray, k: int) -> Matches:
    """The `k` most similar of these images, indices that rise: similarities and indices."""
    return _merged([(similarities(query, database, images), images)], k)


def _in_threads(work: Callable[[list], list], parts: list) -> list[list]:
    """Calls `work` on consecutive shares of the parts, in as many threads; results in order.

    Each product is left to one thread: those of one product wait for each other in busy loops,
    which on a shared machine takes four times as long.
    """
    workers = max(1, min(THREADS, os.cpu_count() or 1, len(parts)))
    cuts = [len(parts) * worker // workers for worker in range(workers + 1)]
    shares = [parts[first:last] for first, last in pairwise(cuts)]
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, shares))


def checked(queries: np.ndarray, database: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as they are; ValueError as `search` has it, but for values of the database."""
    for name, array in (("queries", queries), ("database", database)):
        if getattr(array, "ndim", None) != 2 or array.dtype.kind != "f":
            raise ValueError(f"{name} must be a 2-D array of floats, one descriptor a row")
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions and the database {database.shape[1]}: "
            "they come from different models"
        )
    if not queries.shape[1] and len(database):
        raise ValueError("the descriptors have no dimension")
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if bad.size:
        raise ValueError(f"the descriptor of query {bad[0]} is not finite")
    if len(database) > np.iinfo(np.int32).max:
        raise ValueError(f"{len(database)} database images do not fit into int32 ranks")
    return queries, database


def _slices(start: int, stop: int, block: int) -> list[slice]:
    if block < 1:
        raise ValueError(f"block is {block}; at least one row must be taken at once")
    return [slice(at, min(at + block, stop)) for at in range(start, stop, block)]


def _products(
    queries: np.ndarray, database: np.ndarray, parts: Iterable[slice | np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the similarities (Q, B) float32 of each part of the database: a slice or rows.

    What is yielded is overwritten by the next part: memory that is new for every block costs as
    much as half of the product.
    """
    left = np.asarray(queries, np.float64)
    buffers: tuple[np.ndarray, ...] = ()
    for part in parts:
        rows = database[part]
        if not buffers or len(buffers[0]) < len(rows):
            buffers = (
                np.empty((len(rows), queries.shape[1])),
                np.empty((len(left), len(rows))),
                np.empty((len(left), len(rows)), np.float32),
            )
        right = buffers[0][: len(rows)]
        right[...] = rows
        # Only the last part is shorter than the buffers: its products stand in new memory.
        whole = len(rows) == buffers[1].shape[1]
        exact, products = buffers[1:] if whole else (None, np.empty((len(left), len(rows)), "f4"))
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, with the row's number
            products[...] = np.matmul(left, right.T, out=exact)
        if not np.isfinite(products).all():
            place = np.flatnonzero(~np.isfinite(products).all(axis=0))[0]
            row = part.start + place if isinstance(part, slice) else part[place]
            raise ValueError(f"the descriptor of database image {row} is not finite")
        suspects = np.flatnonzero((products == 0).all(axis=0))
        products[:, suspects[~right[suspects].any(axis=1)]] = -np.inf
        yield products


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


# Short lists


def shortlist_depth(ground_truth: GroundTruth, number: int, *, top: int = 100) -> int:
    """How many ranks a short list of `top` needs: `top` and as many as any query ignores.

    number: N, the size of the database, which is never exceeded.
    """
    most = max((a.size for p in PROTOCOLS for a in ignored(ground_truth, p)), default=0)
    return min(number, top + most)


def candidates(
    ranks: np.ndarray, ground_truth: GroundTruth, protocol: str, *, top: int = 100
) -> list[np.ndarray]:
    """Lists what one protocol reranks: per query int64 indices, best first, `top` at most.

    Args:
        ranks: (K, Q) integers, best first, K at least `shortlist_depth` (or the whole database).
        protocol: "easy", "medium" or "hard": the first `top` that the protocol does not ignore, as
            DELG does; or "published": the first `top` as they come.
    Raises:
        ValueError: the ranking is too short, or has another number of queries.
    """
    if protocol == PUBLISHED:
        skipped = [np.empty(0, np.int64)] * len(ground_truth.queries)
    else:
        skipped = ignored(ground_truth, protocol)
    if ranks.ndim != 2 or ranks.shape[1] != len(skipped):
        raise ValueError(
            f"a ranking of {len(skipped)} queries has that many columns, not {ranks.shape}"
        )
    # K ranks may be all there are only where K is at least the labelled database's size.
    whole = len(ranks) >= len(ground_truth.database)
    found = []
    for q, skip in enumerate(skipped):
        column = ranks[: top + skip.size, q].astype(np.int64)
        kept = column[~np.isin(column, skip)][:top]
        if kept.size < top and not whole:
            raise ValueError(
                f"{len(ranks)} ranks leave {kept.size} of {top} candidates to query {q} "
                f"({protocol}); search with k=shortlist_depth(...)"
            )
        found.append(kept)
    return found


def shortlist(ranks: np.ndarray, ground_truth: GroundTruth, *, top: int = 100) -> list[np.ndarray]:
    """Lists the images that any reranking needs: the union of all protocols' and the published one.

    Args and raises as `candidates`. Returns per query int64 database indices in ranking order.
    """
    lists = [
        candidates(ranks, ground_truth, protocol, top=top) for protocol in (*PROTOCOLS, PUBLISHED)
    ]
    reach = ranks[: shortlist_depth(ground_truth, len(ranks), top=top)].astype(np.int64)
    return [
        column[np.isin(column, np.concatenate(parts))]
        for column, parts in zip(reach.T, zip(*lists, strict=True), strict=True)
    ]


# Files


def write_shortlist(
    path: str | os.PathLike,
    lists: Sequence[np.ndarray],
    *,
    queries: Sequence[str],
    database: Sequence[str],
) -> Path:
    """Writes `shortlist.txt`: query name, tab, database name, a line each, best first.

    The separator is a tab because names may contain spaces; a name with a tab or a line break is a
    ValueError. lists: per query database indices (`shortlist`).
    """
    lines = [
        f"{_whole(query)}\t{_whole(database[index])}\n"
        for query, indices in zip(queries, lists, strict=True)
        for index in indices
    ]
    return runs.write_text(Path(path), "".join(lines))


def read_shortlist(path: str | os.PathLike) -> dict[str, list[str]]:
    """Reads `shortlist.txt`: query name -> database names, both in the file's order.

    A query without candidates has no line and no entry. ValueError names a line that is not two
    names separated by a tab.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), start=1):
        names = line.split("\t")
        if len(names) != 2 or not all(names):
            raise ValueError(f"{path}, line {number}: not a query and an image around one tab")
        found.setdefault(names[0], []).append(names[1])
    return found


def write_rerank_paths(
    path: str | os.PathLike, dataset: RetrievalDataset, *, lists: Sequence[np.ndarray]
) -> Path:
    """Writes the published `rerank_path.txt`, from which the published code extracts features.

    A line is an image path and four integers, separated by spaces: each query with its box
    truncated to whole pixels, then its candidates with -1 -1 -1 -1. The published reader cannot
    take paths with spaces; ours can.

    lists: per query database indices, best first (the published one: `candidates(...,
    "published")`).
    """
    lines = []
    boxes = dataset.ground_truth.boxes.astype(np.int64)
    for query, box, indices in zip(dataset.query_paths, boxes, lists, strict=True):
        lines.append((query, box))
        lines += [(dataset.database_paths[index], NO_BOX) for index in indices]
    return runs.write_text(
        Path(path),
        "".join(f"{_whole(str(name))} {' '.join(map(str, box))}\n" for name, box in lines),
    )


def read_rerank_paths(
    path: str | os.PathLike,
) -> list[tuple[str, tuple[int, int, int, int], list[str]]]:
    """Reads a published `rerank_path.txt`: per query its path, its box and its candidates' paths.

    Raises ValueError naming a line that is not a path and four integers, or a candidate that
    stands before the first query.
    """
    found: list[tuple[str, tuple[int, int, int, int], list[str]]] = []
    for number, line in enumerate(_lines(path), start=1):
        name, *box = line.rsplit(" ", 4)
        try:
            box = tuple(int(value) for value in box)
        except ValueError:
            box = ()
        if len(box) != 4 or (box == NO_BOX and not found):
            raise ValueError(
                f"{path}, line {number}: not a path and a box (x0 y0 x1 y1; -1 -1 -1 -1 for a "
                "candidate, which follows its query)"
            )
        if box == NO_BOX:
            found[-1][2].append(name)
        else:
            found.append((name, box, []))
    return found


def write_global_rank(path: str | os.PathLike, ranks: np.ndarray) -> Path:
    """Writes the published `global_rank.npy`: (N, Q) int64, best first, one column a query.

    The published code needs the whole ranking (`search` with k=N): 8 bytes x N x Q.
    """
    return runs.write_array(Path(path), np.ascontiguousarray(ranks, dtype=np.int64))


def read_global_rank(path: str | os.PathLike) -> np.ndarray:
    """Opens a published `global_rank.npy`, memory-mapped: (N, Q) integers, best first.

    Its indices mean what they meant to the program that wrote it: with distractors, the published
    code's order depends on the file system. Raises ValueError for another kind of array.
    """
    try:
        ranks = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy array ({error})") from error
    if getattr(ranks, "ndim", None) != 2 or ranks.dtype.kind not in "iu":
        raise ValueError(f"{path} is no ranking: a 2-D integer array, one column a query, is")
    return ranks


def _lines(path: str | os.PathLike) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def _whole(name: str) -> str:
    if not name or any(character in name for character in "\t\n\r"):
        raise ValueError(
            f"the name {name!r} is empty or holds a tab or line break: rename the image"
        )
    return name
