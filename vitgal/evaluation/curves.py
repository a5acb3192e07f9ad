"""Precision and recall of rankings, from the exact ranks of the right images."""

from collections.abc import Sequence

import numpy as np

from vitgal.data import revisited
from vitgal.data.revisited import GroundTruth
from vitgal.retrieval.ranking import Positions, Ranking


def positive_ranks(
    ranking: Ranking | Positions, truth: GroundTruth, protocol: str
) -> list[np.ndarray]:
    """Returns per query the rising zero-based ranks (R,) of its right images.

    Ranks do not count the images that the protocol ignores. Queries without a right image are
    left out.
    """
    images = revisited.positives(truth, protocol), revisited.ignored(truth, protocol)
    return [
        np.sort(ranking.rank(query, right, ignored))
        for query, (right, ignored) in enumerate(zip(*images, strict=True))
        if len(right)
    ]


def mean_precision(ranks: Sequence[np.ndarray], levels: int = 101) -> np.ndarray:
    """Returns the interpolated precision at evenly spaced levels of recall, mean over queries.

    ranks: as `positive_ranks` returns them. At a level, precision is the best at that recall or a
    higher one (Manning et al., Introduction to Information Retrieval, 8.4). Returns shape
    (levels,), nan without queries.
    """
    curves = np.full((len(ranks), levels), np.nan)
    for curve, row in zip(curves, ranks, strict=True):
        precision = np.arange(1, len(row) + 1) / (row + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        needed = np.ceil(np.linspace(0, 1, levels) * len(row) - 1e-9).astype(int)
        curve[:] = best[np.maximum(needed, 1) - 1]
    return curves.mean(axis=0) if len(ranks) else np.full(levels, np.nan)


def mean_recall(ranks: Sequence[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Returns the share of right images within the first `lengths` (L,) images, mean over queries.

    ranks: as `positive_ranks` returns them. Returns shape (L,), nan without queries. At the length
    of the short list it is the most that reranking can bring to the front.
    """
    if not ranks:
        return np.full(len(lengths), np.nan)
    return np.mean([np.searchsorted(row, lengths) / len(row) for row in ranks], axis=0)
