"""Exact search in bounded memory.

A similarity is the float64 inner product of two descriptors, rounded to float32. The last bits of
float32 products depend on the block's shape, the row's position and the threads, so two copies of
one image need not tie; float64 products agree beyond the precision of float32. Ties go to the lower
database index. Descriptors are expected L2-normalised but are used as they are.

A database row of zeros stands for an image that could not be read: its similarity is -inf, so it
ranks behind every other image.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vitgal import engines

if TYPE_CHECKING:
    from vitgal.retrieval.refine import WhiteningMap

# Rows of a block: the float64 copy of 2048 x 384 descriptors takes 6 MB, and 70 x 2048 similarities
# stay in the processor's cache while they are worked on.
BLOCK = 2048
THREADS = 4  # at most; each takes the memory of a block
QUERIES = 4096  # searched together: their similarities to a block fill 32 MB
ESTIMATE_FROM = 8  # times k images; float32 estimates save no time in a smaller database
NEAR_TIES = 4096  # images that may nearly tie at a query's last rank before float64 takes over

Hits = tuple[np.ndarray, np.ndarray]  # similarities float32 and database indices of one query


@dataclass(frozen=True, eq=False)
class WhitenedRows:
    """A whitened database (N, D') float32, computed where its rows are read.

    A search takes no more than one of the stored rows: the similarity of a query z and a row x,
    ((x - mean) @ projection / norm) @ z, is (x - mean) @ (projection @ z) / norm.

    stored: (N, D) floats, memory-mapped or not.  norms: (N,) float32 of `whitened_norms`.
    """

    stored: np.ndarray
    whitening: "WhiteningMap"
    norms: np.ndarray
    ndim: ClassVar[int] = 2
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D')."""
        return len(self.stored), self.whitening.projection.shape[1]

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.whitening.apply(self.stored[rows])

    def scales(self, rows: slice | np.ndarray) -> np.ndarray:
        """Returns 1 / norm (B,) float64 of some rows, 0 for an image that could not be read."""
        norms = np.asarray(self.norms[rows], np.float64)
        return np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)


Database = np.ndarray | WhitenedRows  # (N, D)


def search(
    queries: np.ndarray, database: Database, *, k: int, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the `k` most similar database images of every query, exactly.

    Args:
        queries: (Q, D) floats.  database: (N, D) floats, memory-mapped or not, or `WhitenedRows`.
        k: at most N are returned.
        block: database rows that are read at once.
    Returns:
        similarities (K, Q) float32 and ranks (K, Q) int32, best first, one column a query; (0, Q)
        for an empty database, (K, 0) without queries. Up to four threads each take about 40 bytes x
        Q x max(K, block) + 8 bytes x D x block, where Q counts as 4096 at most.
    Raises:
        ValueError: widths differ, k < 1, or a descriptor is not finite (its row is named).
    """
    check_descriptors(queries, database)
    if k < 1:
        raise ValueError(f"k is {k}; at least one image must be wanted")
    k = min(k, len(database))
    if len(queries) > QUERIES:
        groups = [queries[part] for part in block_slices(len(queries), QUERIES)]
        results = [search(group, database, k=max(1, k), block=block) for group in groups]
        similarities, ranks = zip(*results, strict=True)
        return np.concatenate(similarities, axis=1), np.concatenate(ranks, axis=1)
    parts = block_slices(len(database), block)
    hits = None
    if ESTIMATE_FROM * k <= len(database):
        hits = _search_estimated(queries, database, parts, k)
    if hits is None:
        by_thread = in_threads(lambda group: _search_parts(queries, database, group, k), parts)
        hits = [_merge(of_query, k) for of_query in zip(*by_thread, strict=True)]
    similarities = np.array([pair[0] for pair in hits], np.float32).reshape(len(queries), k)
    ranks = np.array([pair[1] for pair in hits], np.int32).reshape(len(queries), k)
    return np.ascontiguousarray(similarities.T), np.ascontiguousarray(ranks.T)


def _search_parts(
    queries: np.ndarray, database: Database, parts: list[slice], k: int
) -> list[Hits]:
    """Per query the best `k` (or all there are) of rising parts of the database."""
    best: list[Hits] = [(np.empty(0, np.float32), np.empty(0, np.int32))] * len(queries)
    blocks = similarity_blocks(queries, database, parts)
    for part, products in zip(parts, blocks, strict=True):
        for q, row in enumerate(products):
            # `>`: of equal similarities the lower index ranks first.
            least = best[q][0][-1] if len(best[q][0]) == k else None
            columns = np.arange(row.size) if least is None else np.flatnonzero(row > least)
            best[q] = _merge([best[q], (row[columns], (columns + part.start).astype(np.int32))], k)
    return best


def _search_estimated(
    queries: np.ndarray, database: Database, parts: list[slice], k: int
) -> list[Hits] | None:
    """Returns the best `k` by float32 estimates and float64 ranks; None if undecided."""
    if queries.dtype != np.float32 or not len(queries):
        return None
    by_thread = in_threads(lambda group: [_estimate(queries, database, group, k)], parts)
    pools = [pool for (pool,) in by_thread]
    if not all(pools):
        return None
    error = max(pool.error for pool in pools)

    def rank_candidates(q: int) -> Hits:
        """Ranks by float64 the images that may be among the best `k` of query `q`."""
        pairs = zip(*(pool.hits[q] for pool in pools), strict=True)
        _, images = _possible_best(*map(np.concatenate, pairs), k, error)
        return rank_images(queries[q], database, np.sort(images), k)

    by_thread = in_threads(lambda group: list(map(rank_candidates, group)), range(len(queries)))
    return [hits for part in by_thread for hits in part]


def _estimate(
    queries: np.ndarray, database: Database, parts: list[slice], k: int
) -> "_CandidatePool | None":
    """Per query the images that may be among the best `k` of these parts; None as above."""
    factors, source, offsets = _factors(queries, database)
    length = float(np.sqrt(np.einsum("ij,ij->i", factors, factors)).max())
    factors = factors.astype(np.float32)
    # Twice the rounding error of a sum of D products, in any order, and of its factors.
    relative = 2 * (factors.shape[1] + 12) * 2.0**-24
    pool = _CandidatePool(len(queries), k)
    products = np.empty((0, len(queries)), np.float32)
    for part in parts:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = source[part]
            rows = np.ascontiguousarray(stored, np.float32)
            if len(products) != len(rows):
                products = np.empty((len(rows), len(queries)), np.float32)
            np.matmul(rows, factors.T, out=products)
            error = length * _length_bound(rows)
            if offsets is not None:
                scales = database.scales(part)
                products -= offsets.astype(np.float32)
                products *= scales.astype(np.float32)[:, None]
                error = (error + float(np.abs(offsets).max())) * float(scales.max())
            error = relative * error + float(np.finfo(np.float32).tiny)
        if not error < 1e30:  # true for nan as well
            return None
        zeros = np.flatnonzero(products[:, 0] == 0)
        # As stored: a value too small for float32 does not make an image unreadable.
        products[zeros[~stored[zeros].any(axis=1)]] = -np.inf
        if not pool.add(products, part.start, error):
            return None
    return pool if pool.merge() else None


def _length_bound(rows: np.ndarray) -> float:
    """Returns an upper bound of the rows' lengths: the length of up to 64 rows together."""
    together = 64 if len(rows) % 64 == 0 else 1
    groups = rows.reshape(-1, together * rows.shape[1])
    return float(np.sqrt(np.einsum("ij,ij->i", groups, groups).max(initial=0)))


class _CandidatePool:
    """Per query the hits that may be among the best `k`; similarities are off by up to `error`."""

    def __init__(self, queries: int, k: int) -> None:
        self.k, self.error = k, 0.0
        self.hits: list[Hits] = [(np.empty(0, np.float32), np.empty(0, np.int32))] * queries
        self.thresholds = np.full(queries, -np.inf)  # no k-th best similarity is lower
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.pending_size = 0

    def add(self, products: np.ndarray, start: int, error: float) -> bool:
        """Adds similarities (B, Q) of the images from `start` on; False as `merge`."""
        self.error = max(self.error, error)
        floor = (self.thresholds - error).astype(np.float32)
        passed = np.flatnonzero(products >= np.nextafter(floor, np.float32(-np.inf)))
        images, owners = np.divmod(passed.astype(np.int32), np.int32(products.shape[1]))
        images += np.int32(start)
        self.pending.append((owners.astype(np.int16), products.ravel()[passed], images))
        self.pending_size += passed.size
        return self.pending_size < self.k * len(self.thresholds) or self.merge()

    def merge(self) -> bool:
        """Drops images that cannot be among the best; False where too many are left."""
        if not self.pending:
            return True
        owners, similarities, images = map(np.concatenate, zip(*self.pending, strict=True))
        order = np.argsort(owners, kind="stable")
        cuts = np.searchsorted(owners[order], np.arange(len(self.thresholds) + 1))
        for q, (first, last) in enumerate(pairwise(cuts)):
            new = order[first:last]
            pairs = zip(self.hits[q], (similarities[new], images[new]), strict=True)
            self.hits[q] = _possible_best(*map(np.concatenate, pairs), self.k, self.error)
            if len(self.hits[q][0]) >= self.k:
                self.thresholds[q] = _kth_best(self.hits[q][0], self.k) - self.error
        self.pending, self.pending_size = [], 0
        return max(len(images) for _, images in self.hits) <= 2 * self.k + NEAR_TIES


def _kth_best(similarities: np.ndarray, k: int) -> float:
    return float(np.partition(similarities, len(similarities) - k)[len(similarities) - k])


def _possible_best(similarities: np.ndarray, images: np.ndarray, k: int, error: float) -> Hits:
    """The hits that may be among the best `k` where each similarity may be off by `error`."""
    if len(similarities) <= k:
        return similarities, images
    near = similarities >= np.float32(_kth_best(similarities, k)) - np.float32(2.1 * error)
    return similarities[near], images[near]


def _merge(hits: Iterable[Hits], k: int) -> Hits:
    """The best `k` of hits whose indices rise from pair to pair wherever similarities tie."""
    similarities, images = (np.concatenate(arrays) for arrays in zip(*hits, strict=True))
    order = np.argsort(-similarities, kind="stable")[:k]
    return similarities[order], images[order]


def similarities(query: np.ndarray, database: Database, images: np.ndarray) -> np.ndarray:
    """Returns the similarities (M,) float32 of one query (D,) and database indices (M,)."""
    return next(similarity_blocks(query[None], database, [images]))[0]


def rank_images(query: np.ndarray, database: Database, images: np.ndarray, k: int) -> Hits:
    """Returns the best `k` hits of one query (D,) among rising database indices (M,)."""
    return _merge([(similarities(query, database, images), images)], k)


# Products, block by block


def in_threads(work: Callable, items: list | range) -> list[list]:
    """Calls `work` on consecutive parts of the items, in up to four threads; results in order.

    Each matrix product runs on one thread: the threads of one product wait for each other in busy
    loops, which takes four times as long on a shared machine.
    """
    workers = max(1, min(THREADS, os.cpu_count() or 1, len(items)))
    cuts = [len(items) * worker // workers for worker in range(workers + 1)]
    parts = [items[first:last] for first, last in pairwise(cuts)]
    with engines.one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, parts))


def check_descriptors(queries: np.ndarray, database: Database) -> None:
    """Raises ValueError where queries (Q, D) and a database (N, D) cannot be searched."""
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


def block_slices(count: int, block: int) -> list[slice]:
    """Returns the slices of `block` rows (the last may be shorter) that make up `count` rows."""
    if block < 1:
        raise ValueError(f"block is {block}; a block has one row at least")
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]


def _factors(
    queries: np.ndarray, database: Database
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Factors (Q, D) float64 of similarities, the rows (N, D) that they multiply, and offsets.

    Offsets (Q,) float64 are subtracted from the products of whitened rows before these are scaled.
    """
    left = np.asarray(queries, np.float64)
    if not isinstance(database, WhitenedRows):
        return left, database, None
    left = left @ database.whitening.projection.T
    return left, database.stored, left @ database.whitening.mean


def similarity_blocks(
    queries: np.ndarray, database: Database, parts: Iterable[slice | np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the similarities (Q, B) float32 of each part of the database, a slice or indices.

    Each part overwrites the last: new memory for every block takes half as long as the product.
    Raises ValueError naming a database image whose descriptor is not finite.
    """
    left, source, offsets = _factors(queries, database)
    buffers: tuple[np.ndarray, ...] = ()
    for part in parts:
        rows = source[part]
        if not buffers or len(buffers[0]) < len(rows):
            buffers = (
                np.empty((len(rows), left.shape[1])),
                np.empty((len(left), len(rows))),
                np.empty((len(left), len(rows)), np.float32),
            )
        right = buffers[0][: len(rows)]
        right[...] = rows
        exact, products = (buffer[:, : len(rows)] for buffer in buffers[1:])
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, with the row's number
            np.matmul(left, right.T, out=exact)
            if offsets is not None:
                exact -= offsets[:, None]
                exact *= database.scales(part)
            products[...] = exact
        if not np.isfinite(products).all():
            column = np.flatnonzero(~np.isfinite(products).all(axis=0))[0]
            row = part.start + column if isinstance(part, slice) else part[column]
            raise ValueError(f"the descriptor of database image {row} is not finite")
        zeros = np.flatnonzero((products == 0).all(axis=0))
        products[:, zeros[~right[zeros].any(axis=1)]] = -np.inf  # an image that was not read
        yield products
