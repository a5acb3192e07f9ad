"""Exact search in bounded memory: best matches, exact ranks of labelled images, short lists.

A similarity is the float64 inner product of two descriptors, rounded to float32. Float32 matrix
products differ in their last bits with the block's shape, the row's place in it and the number of
threads, so that two copies of one image need not tie; rounded float64 products agree far beyond
what float32 can show. Ties go to the lower database index. Descriptors are expected L2-normalised
but are used as they are.

A database row of zeros stands for an image that could not be read: its similarity is -inf, so it
ranks behind every other image.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from vitgal.retrieval.products import BLOCK, _in_threads, _products, _slices, checked

QUERIES = 4096  # taken together: their similarities to a block fill 32 MB
LOOK = 8  # of fewer images than so many times those wanted, float32 products spare nothing
NEAR_TIES = 4096  # that a query may have at its last place before float64 takes over


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
