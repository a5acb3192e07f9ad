"""Similarities of queries and a database, computed block by block."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from threadpoolctl import threadpool_limits

# Rows of a block: the float64 copy of 2048 x 384 descriptors takes 6 MB, and 70 x 2048 similarities
# stay in the processor's cache while they are worked on.
BLOCK = 2048
THREADS = 4  # at most; each takes the memory of a block


def in_threads(work: Callable[[list], list], items: list) -> list[list]:
    """Calls `work` on consecutive parts of the items, in up to four threads; results in order.

    Each matrix product runs on one thread: the threads of one product wait for each other in busy
    loops, which takes four times as long on a shared machine.
    """
    workers = max(1, min(THREADS, os.cpu_count() or 1, len(items)))
    cuts = [len(items) * worker // workers for worker in range(workers + 1)]
    parts = [items[first:last] for first, last in pairwise(cuts)]
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, parts))


def check_descriptors(queries: np.ndarray, database: np.ndarray) -> None:
    """Raises ValueError where queries (Q, D) and a database (N, D) cannot be searched.

    The values of the database are not looked at; `similarity_blocks` checks them.
    """
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
    """Returns the slices of `block` rows that `count` rows are cut into; the last may be shorter.

    Raises ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"block is {block}; a block has one row at least")
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]


def similarity_blocks(
    queries: np.ndarray, database: np.ndarray, parts: Iterable[slice | np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the similarities (Q, B) float32 of each part of the database, a slice or indices.

    Each part overwrites the last: new memory for every block takes half as long as the product.
    Raises ValueError naming a database image whose descriptor is not finite.
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
        # Only the last part is shorter than the buffers: its products take new memory.
        full = len(rows) == buffers[1].shape[1]
        exact, products = buffers[1:] if full else (None, np.empty((len(left), len(rows)), "f4"))
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, with the row's number
            products[...] = np.matmul(left, right.T, out=exact)
        if not np.isfinite(products).all():
            column = np.flatnonzero(~np.isfinite(products).all(axis=0))[0]
            row = part.start + column if isinstance(part, slice) else part[column]
            raise ValueError(f"the descriptor of database image {row} is not finite")
        zeros = np.flatnonzero((products == 0).all(axis=0))
        products[:, zeros[~right[zeros].any(axis=1)]] = -np.inf  # an image that was not read
        yield products
