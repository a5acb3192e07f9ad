"""Scores of a ranking under the Revisited protocol, and its precision and recall.

AP and mP@k are those of Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, as the code
published with the benchmark computes them; every number agrees with that code's to 1e-12.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitgal.data.revisited import PROTOCOLS, GroundTruth, ignored, labelled, positives
from vitgal.retrieval.ranking import Positions, Ranking


def evaluate(
    ranking: np.ndarray | Positions | Mapping[str, np.ndarray | Positions],
    ground_truth: GroundTruth,
    kappas: Sequence[int] = (1, 5, 10),
    *,
    truncated: bool = False,
    database_size: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores a ranking under the Easy, Medium and Hard protocols.

    Args:
        ranking: (N, Q) integers, zero-based database indices, best first, one column a query; or
            the Positions of all labelled images; or a dict protocol -> either, each of which is
            scored under its own protocol only.
        kappas: the k of mP@k.
        truncated: accepts a ranking that misses labelled images. A positive that is missing counts
            as never found, and each protocol's dict then holds "truncated": True.
        database_size: the number of database images, where a (K, Q) array holds fewer. The default
            is the larger of K and the size of the ground truth's database.
    Returns:
        protocol -> {"map": float in [0, 1], "mp_at": {k: float in [0, 1]}, "ap": (Q,) float64}.
        A query without positives has AP nan and is left out of the means; they are nan if no query
        is left.
    Raises:
        ValueError: an index is repeated or out of range, a labelled image is missing, the ranking
            does not fit the ground truth, or a protocol or k is unknown.
    """
    if not all(isinstance(k, (int, np.integer)) and k >= 1 for k in kappas):
        raise ValueError(f"kappas must be integers of at least 1, not {kappas}")
    if isinstance(ranking, Mapping):
        if set(ranking) - set(PROTOCOLS) or not ranking:
            raise ValueError(f"rankings by protocol are for {PROTOCOLS}, not {sorted(ranking)}")
        positions = {
            protocol: _positions(columns, ground_truth, truncated, database_size)
            for protocol, columns in ranking.items()
        }
    else:
        shared = _positions(ranking, ground_truth, truncated, database_size)
        positions = dict.fromkeys(PROTOCOLS, shared)
    return {
        protocol: _scores(positions[protocol], ground_truth, protocol, kappas)
        for protocol in PROTOCOLS
        if protocol in positions
    }


def _positions(
    ranking: np.ndarray | Positions,
    ground_truth: GroundTruth,
    truncated: bool,
    database_size: int | None,
) -> Positions:
    wanted = labelled(ground_truth)
    if not isinstance(ranking, Positions):
        ranking = np.asarray(ranking)
        if database_size is None:
            length = len(ranking) if ranking.ndim else 0
            database_size = max(length, len(ground_truth.database))
        return Positions.from_ranks(
            ranking, wanted, database_size=database_size, truncated=truncated
        )
    if len(ranking.indices) != len(wanted) or ranking.database_size < len(ground_truth.database):
        raise ValueError(
            f"positions of {len(ranking.indices)} queries among {ranking.database_size} images do "
            f"not belong to {ground_truth.name}: {len(wanted)} queries, "
            f"{len(ground_truth.database)} images"
        )
    for query, (present, needed) in enumerate(zip(ranking.indices, wanted, strict=True)):
        missing = np.setdiff1d(needed, present)
        if missing.size and not truncated:
            raise ValueError(
                f"the positions of query {query} miss the labelled image {missing[0]}; make them "
                "from revisited.labelled, or set truncated=True to count it as never found"
            )
    return ranking


def _scores(
    positions: Positions, ground_truth: GroundTruth, protocol: str, kappas: Sequence[int]
) -> dict[str, Any]:
    counts = np.array([images.size for images in positives(ground_truth, protocol)], int)
    ranks = positive_ranks(positions, ground_truth, protocol)
    ranks = [row[row >= 0] for row in ranks]  # -1: never found
    scored, ap = counts > 0, np.full(len(counts), np.nan)
    ap[scored] = list(map(average_precision, ranks, counts[scored]))
    precisions = [[precision_at(row, k) for k in kappas] for row in ranks]
    means = np.mean(precisions, axis=0) if ranks else np.full(len(kappas), np.nan)
    result = {
        "map": float(ap[scored].mean()) if ranks else float("nan"),
        "mp_at": {int(k): float(mean) for k, mean in zip(kappas, means, strict=True)},
        "ap": ap,
    }
    ranked = sum(index.size for index in positions.indices)
    if ranked < sum(index.size for index in labelled(ground_truth)):
        result["truncated"] = True
    return result


def positive_ranks(
    ranking: Ranking | Positions, truth: GroundTruth, protocol: str
) -> list[np.ndarray]:
    """Returns per query the rising zero-based ranks (R,) of its right images.

    Ranks do not count the images that the protocol ignores. Queries without a right image are
    left out.
    """
    images = positives(truth, protocol), ignored(truth, protocol)
    return [
        np.sort(ranking.rank(query, right, left_out))
        for query, (right, left_out) in enumerate(zip(*images, strict=True))
        if len(right)
    ]


def average_precision(ranks: np.ndarray, count: int) -> float | np.ndarray:
    """Returns the area under the precision-recall curve by the trapezoid rule, as published.

    Each positive adds the mean of the precisions just before and at its rank. Before rank 0 the
    precision is 1, so that a single positive at rank 1 scores 0.25.

    Args:
        ranks: (F,) rising zero-based ranks of the retrieved positives; none gives 0. Or (R, F), of
            R rankings, which gives (R,) float64.
        count: the total number of positives, at least 1.
    """
    earlier = np.arange(ranks.shape[-1])
    before = np.divide(earlier, ranks, out=np.ones(ranks.shape), where=ranks > 0)
    at = (earlier + 1) / (ranks + 1)
    areas = (before + at).sum(axis=-1) / (2 * count)
    return float(areas) if ranks.ndim == 1 else areas


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Returns the fraction of positives among the first k, or up to the last positive if nearer.

    The shorter list is the published rule: a query with two positives, ranked first and second, has
    precision 1 at every k >= 2.

    Args:
        ranks: (F,) zero-based ranks of the retrieved positives; none gives 0.
    """
    if not ranks.size:  # NOTE the published code fails here (the maximum of nothing)
        return 0.0
    length = min(int(ranks.max()) + 1, k)
    return np.count_nonzero(ranks < length) / length


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
