"""Exact ranks of labelled images, counted without ranking the rest."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from vitgal.retrieval.products import BLOCK, _in_threads, _products, _slices, checked
from vitgal.retrieval.ranking import Positions

BUCKETS = 4096  # steps of similarity; more of them leave less to sort and take longer to count


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
    rows = np.unique(np.concatenate(indices))
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
    rows = np.unique(np.concatenate(indices))
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
