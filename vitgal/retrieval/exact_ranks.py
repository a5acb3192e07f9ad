"""Exact ranks of labelled images, counted without ranking the rest."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitgal import engines
from vitgal.retrieval import exact_search
from vitgal.retrieval.exact_search import BLOCK, Database, similarity_blocks
from vitgal.retrieval.ranking import Positions

BUCKETS = 4096  # of similarity; more buckets leave less to sort but take longer to count


def labelled_positions(
    queries: np.ndarray, database: Database, labelled: Sequence[np.ndarray], *, block: int = BLOCK
) -> Positions:
    """Finds the exact rank of every labelled image without ranking the rest.

    A rank is the number of images that are more similar, or as similar with a lower index: the rank
    in the full stable sort. Up to four threads each take about (90 bytes x Q + 8 bytes x D) x
    max(block, 4096), whatever N.

    labelled: per query the database indices (M,) to find (`revisited.labelled`); may be empty.
    Raises ValueError as `search`, or where a labelled index is repeated or outside the database.
    """
    exact_search.check_descriptors(queries, database)
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
    parts = exact_search.block_slices(len(database), block)
    with engines.one_blas_thread():
        values = _labelled_similarities(queries, database, indices, block)
        steps = _similarity_steps(next(similarity_blocks(queries, database, parts)), values)
    by_thread = exact_search.in_threads(
        lambda group: count_ahead(queries, database, group, indices, values, steps), parts
    )
    ranks = [sum(counts) for counts in zip(*by_thread, strict=True)]
    return Positions(indices, ranks, len(database))


def _labelled_similarities(
    queries: np.ndarray, database: Database, indices: list[np.ndarray], block: int
) -> list[np.ndarray]:
    """Per query the similarity of each labelled image, as the later count uses it."""
    rows = np.unique(np.concatenate(indices))
    parts = [rows[part] for part in exact_search.block_slices(rows.size, block)]
    values = [np.empty(index.size, np.float32) for index in indices]
    blocks = similarity_blocks(queries, database, parts)
    for part, products in zip(parts, blocks, strict=True):
        for q, index in enumerate(indices):
            first, last = np.searchsorted(index, (part[0], part[-1] + 1))
            values[q][first:last] = products[q, np.searchsorted(part, index[first:last])]
    return values


class Steps(NamedTuple):
    """Equal steps of similarity, the buckets of a count."""

    low: np.ndarray  # (Q, 1) float32
    scale: np.ndarray  # (Q, 1) float32
    labelled: np.ndarray  # (Q, BUCKETS) bool: the bucket holds a labelled image


def count_ahead(
    queries: np.ndarray,
    database: Database,
    parts: list[slice],
    indices: list[np.ndarray],
    values: list[np.ndarray],
    steps: Steps,
) -> list[np.ndarray]:
    """Counts the images of some parts of the database that rank before each labelled image.

    Sorting all similarities would take longer than computing them. So they are counted in buckets;
    only images that share a bucket with a labelled one are compared with it exactly.

    indices, values: per query the labelled images (M,) and their similarities (M,) float32.
    Returns per query (M,) int64.
    """
    counts = [np.zeros(index.size, np.int64) for index in indices]
    tally = np.zeros(steps.labelled.shape, np.int64)
    rows = np.unique(np.concatenate(indices))
    pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    pending_size = 0
    blocks = similarity_blocks(queries, database, parts)
    for part, products in zip(parts, blocks, strict=True):
        if np.diff(np.searchsorted(rows, (part.start, part.stop))):
            # A product that is computed again may differ in the last bit, which would falsify the
            # count: the labelled images keep the similarities that they have.
            for row, index, value in zip(products, indices, values, strict=True):
                first, last = np.searchsorted(index, (part.start, part.stop))
                row[index[first:last] - part.start] = value[first:last]
        keys = _buckets(products, steps.low, steps.scale)
        keys += np.arange(len(keys))[:, None] * BUCKETS
        tally += np.bincount(keys.ravel(), minlength=tally.size).reshape(tally.shape)
        # Row by row, so the queries follow each other.
        flat = np.flatnonzero(steps.labelled.ravel()[keys])
        cuts = np.searchsorted(flat, np.arange(len(products) + 1) * products.shape[1])
        pending.append((cuts, products.ravel()[flat], flat % products.shape[1] + part.start))
        pending_size += flat.size
        if pending_size > products.size or part is parts[-1]:
            _compare_exactly(counts, pending, indices, values)
            pending, pending_size = [], 0
    for q, value in enumerate(values):
        above = np.where(steps.labelled[q], 0, tally[q])[::-1].cumsum()[::-1]
        counts[q] += above[_buckets(value, steps.low[q], steps.scale[q])]
    return counts


def _similarity_steps(products: np.ndarray, values: list[np.ndarray]) -> Steps:
    """Steps over the range of the first block; other similarities fall into the end buckets."""
    finite = np.isfinite(products)
    low = products.min(axis=1, keepdims=True, where=finite, initial=0)
    high = products.max(axis=1, keepdims=True, where=finite, initial=0)
    scale = np.float32(BUCKETS) / np.maximum(high - low, np.float32(1e-6))
    labelled = np.zeros((len(values), BUCKETS), bool)
    for q, value in enumerate(values):
        labelled[q, _buckets(value, low[q], scale[q])] = True
    return Steps(low, scale, labelled)


def _buckets(similarities: np.ndarray, low: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns the bucket of each similarity, monotonic even with rounding."""
    return np.clip((similarities - low) * scale, 0, BUCKETS - 1).astype(np.int64)


def _compare_exactly(
    counts: list[np.ndarray],
    pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    indices: list[np.ndarray],
    values: list[np.ndarray],
) -> None:
    """Adds the pending images before a labelled one; query q has cuts[q] to cuts[q + 1]."""
    for q, (index, value) in enumerate(zip(indices, values, strict=True)):
        similarities = np.concatenate([s[cuts[q] : cuts[q + 1]] for cuts, s, _ in pending])
        ordered = np.sort(similarities)
        left, right = (np.searchsorted(ordered, value, side) for side in ("left", "right"))
        counts[q] += ordered.size - right
        ties = np.flatnonzero(left < right)
        if ties.size:
            images = np.concatenate([i[cuts[q] : cuts[q + 1]] for cuts, _, i in pending])
        for j in ties:
            counts[q][j] += np.count_nonzero(images[similarities == value[j]] < index[j])
