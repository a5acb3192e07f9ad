"""Search in bounded memory: best matches, exact ranks of labelled images, short lists.

A similarity is the float64 inner product of two descriptors, rounded to float32. Float32 matrix
products differ in their last bits with the block's shape, the row's place in it and the number of
threads, so that two copies of one image need not tie; rounded float64 products agree far beyond
what float32 can show. A float32 product is therefore only a first look: it decides wherever two
similarities are further apart than rounding can bring them, and float64 decides the rest. Ties go
to the lower database index. Descriptors are expected L2-normalised but are used as they are.

A database row of zeros stands for an image that could not be read: its similarity is -inf, so it
ranks behind every other image.
"""

import os
import threading
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

BLOCK = 8192  # rows taken at once: fewer cost more calls, more leave the processor's cache
PAIRS = 256  # descriptors held in float64 at once: 0.8 MB at 384 dimensions
DENSE = 64  # more than one pair in so many to settle: a product of the whole block is cheaper
THREADS = 8  # at most; each takes the memory of a block
HUGE = 1e300  # an error without bound; infinity would make nan of -inf
KEYS = ("indices", "positions")
PUBLISHED = "published"  # the short list of the published code: the plain top
NO_BOX = (-1, -1, -1, -1)  # how the published list marks a database image, which is never cropped
_ALONE = threading.Lock()  # the number of BLAS threads belongs to the whole process


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
        of up to eight threads takes about 60 bytes x Q x max(K, block) + 16 bytes x D x
        max(block, 256) more.
    Raises:
        ValueError: widths differ, k < 1, or a descriptor is not finite (its row is named).
    """
    queries, database = _checked(queries, database)
    if k < 1:
        raise ValueError(f"k is {k}; at least one match must be wanted")
    k = min(k, len(database))
    parts = _slices(0, len(database), block)
    spans = _in_threads(lambda span: _contenders(queries, database, span, k), parts)
    numbers = list(range(len(queries)))
    shares = _in_threads(
        lambda share: [_best(queries, database, q, [span[q] for span in spans], k) for q in share],
        numbers,
    )
    found = [pair for share in shares for pair in share]
    similarities = np.array([pair[0] for pair in found], np.float32).reshape(len(queries), k)
    ranks = np.array([pair[1] for pair in found], np.int32).reshape(len(queries), k)
    return np.ascontiguousarray(similarities.T), np.ascontiguousarray(ranks.T)


class _Contenders(NamedTuple):
    """Database images that may be among the best of one query.

    values: (n,) float32, similarities at first look.  indices: (n,) int32.  error: how far a
    value may be from the similarity.  floor: what the k-th best similarity is at least.
    """

    values: np.ndarray
    indices: np.ndarray
    error: float
    floor: float


def _contenders(
    queries: np.ndarray, database: np.ndarray, parts: list[slice], k: int
) -> list[_Contenders]:
    """Per query what may be among the best `k` of these parts of the database."""
    nothing = _Contenders(np.empty(0, np.float32), np.empty(0, np.int32), 0.0, -np.inf)
    kept = [nothing] * len(queries)
    waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held = 0
    for look in _looks(queries, database, parts):
        bars = np.array([one.floor for one in kept]) - look.errors
        places = np.flatnonzero(look.products >= _down(bars)[:, None])  # query after query
        cuts = np.searchsorted(places, np.arange(len(queries) + 1) * look.products.shape[1])
        indices = (places % look.products.shape[1] + look.start).astype(np.int32)
        waiting.append((cuts, look.products.ravel()[places], indices))
        errors = np.maximum([one.error for one in kept], look.errors).tolist()
        kept = [one._replace(error=e) for one, e in zip(kept, errors, strict=True)]
        held += places.size
        if held >= k * len(queries):  # trimmed this rarely, it costs next to nothing
            kept = _gathered(queries, database, kept, waiting, k)
            waiting, held = [], 0
    return _gathered(queries, database, kept, waiting, k)


def _gathered(
    queries: np.ndarray,
    database: np.ndarray,
    kept: list[_Contenders],
    waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    k: int,
) -> list[_Contenders]:
    """Adds what waits to what is kept and drops what can no longer be among the best `k`.

    waiting: similarities and database indices; query q has those from cuts[q] to cuts[q + 1].
    """
    result = []
    for q, one in enumerate(kept):
        shares = [(v[cuts[q] : cuts[q + 1]], i[cuts[q] : cuts[q + 1]]) for cuts, v, i in waiting]
        values = np.concatenate([one.values, *(share[0] for share in shares)])
        indices = np.concatenate([one.indices, *(share[1] for share in shares)])
        one = _trimmed(_Contenders(values, indices, one.error, one.floor), k)
        if one.values.size > 2 * k + PAIRS:  # so many cannot be told apart at first look
            exact, indices = _best(queries, database, q, [one], k)
            one = _Contenders(exact, indices, one.error, float(exact[-1]))
        result.append(one)
    return result


def _trimmed(one: _Contenders, k: int) -> _Contenders:
    if one.values.size <= k:
        return one
    last = float(np.partition(one.values, -k)[-k])
    stay = one.values >= _down(last - 2 * one.error)
    floor = max(one.floor, last - one.error)
    return _Contenders(one.values[stay], one.indices[stay], one.error, floor)


def _best(
    queries: np.ndarray, database: np.ndarray, q: int, spans: list[_Contenders], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of a query's contenders: similarities and indices, best first."""
    values, indices, errors, _ = zip(*spans, strict=True)
    joined = _Contenders(np.concatenate(values), np.concatenate(indices), max(errors), -np.inf)
    indices = np.sort(_trimmed(joined, k).indices)
    similarities = _similarities(queries[q], database, indices)
    order = np.argsort(-similarities, kind="stable")[:k]
    return similarities[order], indices[order]


def _in_threads(work: Callable[[list], list], parts: list) -> list[list]:
    """Calls `work` on consecutive shares of the parts, in as many threads; results in order.

    Meanwhile each matrix product keeps to one thread: those of several products would wait for each
    other in busy loops.
    """
    workers = max(1, min(THREADS, os.cpu_count() or 1, len(parts)))
    cuts = [len(parts) * worker // workers for worker in range(workers + 1)]
    shares = [parts[first:last] for first, last in pairwise(cuts)]
    with _ALONE, threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, shares))


def _checked(queries: np.ndarray, database: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for name, array in (("queries", queries), ("database", database)):
        if getattr(array, "ndim", None) != 2 or array.dtype.kind != "f":
            raise ValueError(f"{name} must be a 2-D array of floats, one descriptor a row")
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions and the database {database.shape[1]}: "
            "they come from different models"
        )
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


# Similarities, at first look and exact


class _Look(NamedTuple):
    """A block of the database at first look.

    start: index of its first row.  rows: (B, D) as stored.  products: (Q, B) float32.  errors: (Q,)
    float64, how far a product may be from the similarity.
    """

    start: int
    rows: np.ndarray
    products: np.ndarray
    errors: np.ndarray


def _looks(queries: np.ndarray, database: np.ndarray, parts: Iterable[slice]) -> Iterator[_Look]:
    """Looks at each part; ValueError where a database row is not finite."""
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
    with np.errstate(over="ignore"):
        left = queries.astype(np.float32)
    for part in parts:
        rows = np.asarray(database[part])
        with np.errstate(over="ignore", invalid="ignore"):
            right = rows.astype(np.float32, copy=False)
            products = left @ right.T
            squares = np.einsum("ij,ij->i", right, right)
        errors = _rounding(lengths, float(squares.max(initial=0)), queries.shape[1])
        if not np.isfinite(products).all():  # not finite, or too large for float32 on the way
            products, errors = _settled(queries, rows, part.start), np.full(len(queries), HUGE)
        zero = np.flatnonzero(squares == 0)
        products[:, zero[~rows[zero].any(axis=1)]] = -np.inf
        yield _Look(part.start, rows, products, errors)


def _rounding(lengths: np.ndarray, square: float, width: int) -> np.ndarray:
    """How far a float32 product may lie from the similarity, at worst, for each query's length.

    A sum of n products in float32, in any order, is off by less than n * 2^-24 times the product of
    the lengths; the rest of the factor covers the rounding of the factors, of the squared length
    and of the similarity. What is too small for float32 adds next to nothing to a length.
    """
    relative, small = (width + 12) * 2.0**-24, width**0.5 * 1.1e-19
    with np.errstate(over="ignore"):
        errors = relative * (lengths + small) * (1.01 * square**0.5 + small)
    return np.minimum(errors + width * float(np.finfo(np.float32).tiny), HUGE)


def _down(values: np.ndarray | float) -> np.ndarray:
    """As float32, rounded to a number that is not above."""
    with np.errstate(over="ignore"):
        return np.nextafter(np.asarray(values).astype(np.float32), np.float32(-np.inf))


def _up(values: np.ndarray | float) -> np.ndarray:
    """As float32, rounded to a number that is not below."""
    return -_down(-np.asarray(values))


def _settled(queries: np.ndarray, rows: np.ndarray, start: int) -> np.ndarray:
    """Similarities (Q, B) float32 of a whole block, but for rows of zeros (0 here)."""
    with np.errstate(over="ignore", invalid="ignore"):
        inner = queries.astype(np.float64) @ rows.astype(np.float64).T
        similarities = inner.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(similarities).all(axis=0))
    if bad.size:
        raise ValueError(f"the descriptor of database image {start + bad[0]} is not finite")
    return similarities


def _similarities(query: np.ndarray, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Similarities (P,) float32 of one query (D,) with some of the rows."""
    query = query.astype(np.float64)
    similarities = np.empty(places.size, np.float32)
    for first in range(0, places.size, PAIRS):
        part = slice(first, first + PAIRS)
        right = rows[places[part]].astype(np.float64)
        inner = np.einsum("ij,j->i", right, query)
        suspects = np.flatnonzero(inner == 0)
        inner[suspects[~right[suspects].any(axis=1)]] = -np.inf
        similarities[part] = inner
    return similarities


# Exact ranks of labelled images


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
    up to eight threads takes about (90 bytes x Q + 16 bytes x D) x max(block, 256), whatever N.

    Args:
        queries: (Q, D) floats.  database: (N, D) floats, memory-mapped or not.
        labelled: per query the database indices to find (`revisited.labelled`); may be empty.
    Raises:
        ValueError: as `search`, or a labelled index is repeated or outside the database.
    """
    queries, database = _checked(queries, database)
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
    values = [_similarities(q, database, index) for q, index in zip(queries, indices, strict=True)]
    counts = _in_threads(
        lambda share: _count_ahead(queries, database, share, indices, values),
        _slices(0, len(database), block),
    )
    return Positions(indices, [sum(each) for each in zip(*counts, strict=True)], len(database))


def _count_ahead(
    queries: np.ndarray,
    database: np.ndarray,
    parts: list[slice],
    indices: list[np.ndarray],
    values: list[np.ndarray],
) -> list[np.ndarray]:
    """Per query how many images of these parts rank before each labelled one.

    A block's first look is sorted: all that stands clearly above a labelled image's similarity is
    counted at once, and what is too near to tell is settled exactly.
    """
    counts = [np.zeros(index.size, np.int64) for index in indices]
    for look in _looks(queries, database, parts):
        size = look.products.shape[1]
        ordered = np.sort(look.products, axis=1)
        low, high, near = [], [], []
        for q, value in enumerate(values):
            low.append(np.searchsorted(ordered[q], _down(value - look.errors[q]), "left"))
            high.append(np.searchsorted(ordered[q], _up(value + look.errors[q]), "right"))
            near.append(_covered(low[q], high[q], size))
        if sum(places.size for places in near) * DENSE > look.products.size:
            near = [np.arange(size)] * len(near)  # a product of the whole block is cheaper
        exact = _near_similarities(queries, look, near, indices, values)
        for q, (columns, similarities) in enumerate(exact):
            # Those near any labelled image are left to the exact count.
            counts[q] += size - high[q] - (near[q].size - np.searchsorted(near[q], high[q]))
            if columns.size:
                counts[q] += _ahead(similarities, columns + look.start, values[q], indices[q])
    return counts


def _covered(low: np.ndarray, high: np.ndarray, size: int) -> np.ndarray:
    """Rising numbers below `size` that lie in any of the ranges low … high - 1."""
    if (low == high).all():
        return np.empty(0, np.int64)
    steps = np.bincount(low, minlength=size + 1) - np.bincount(high, minlength=size + 1)
    return np.flatnonzero(np.cumsum(steps[:-1]))


def _near_similarities(
    queries: np.ndarray,
    look: _Look,
    near: list[np.ndarray],
    indices: list[np.ndarray],
    values: list[np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per query the columns that stand at some places of its sorted first look, and what they are.

    near: rising places a query. Yields columns (n,) and their similarities (n,) float32.
    """
    whole = all(places.size == look.products.shape[1] for places in near)
    if whole:
        dense = _settled(queries, look.rows, look.start)
        dense[np.isneginf(look.products)] = -np.inf
    for q, (places, index, value) in enumerate(zip(near, indices, values, strict=True)):
        if whole:
            columns, similarities = places, dense[q]
        else:
            columns = np.argsort(look.products[q])[places] if places.size else places
            similarities = _similarities(queries[q], look.rows, columns)
        # The count holds only if every labelled image has one similarity; a product that is
        # computed a second time could differ in the last bit.
        _, own, theirs = np.intersect1d(columns + look.start, index, True, return_indices=True)
        similarities[own] = value[theirs]
        yield columns, similarities


def _ahead(
    similarities: np.ndarray, images: np.ndarray, value: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """How many of some images rank before each labelled one (`value`, `index`)."""
    ordered = np.sort(similarities)
    at, above = (np.searchsorted(ordered, value, side) for side in ("left", "right"))
    counts = ordered.size - above
    for j in np.flatnonzero(at < above):
        counts[j] += np.count_nonzero(images[similarities == value[j]] < index[j])
    return counts


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
