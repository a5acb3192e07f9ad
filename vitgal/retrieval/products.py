"""Similarities of queries and a database, block by block."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from threadpoolctl import threadpool_limits

# Rows taken at once: the float64 copy of 2048 x 384 descriptors takes 6 MB, and what is done to
# 70 x 2048 similarities stays in the processor's cache.
BLOCK = 2048
THREADS = 4  # at most; each takes the memory of a block


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
