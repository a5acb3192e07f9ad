"""Scores of a ranking under the Revisited protocol, their uncertainty and their records.

AP and mP@k are those of Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, as the code
published with the benchmark computes them; every number equals its to 1e-12.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitgal.data.revisited import PROTOCOLS, GroundTruth, ignored, labelled, positives
from vitgal.retrieval.ranking import Positions

Ranking = np.ndarray | Positions


def evaluate(
    ranking: Ranking | Mapping[str, Ranking],
    ground_truth: GroundTruth,
    kappas: Sequence[int] = (1, 5, 10),
    *,
    truncated: bool = False,
    number: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores a ranking under the Easy, Medium and Hard protocols.

    Args:
        ranking: (N, Q) integers, zero-based database indices, best first, one column a query; or
            Positions of every labelled image; or a dict protocol -> either, which is then scored
            under its own protocol alone.
        kappas: the k of mP@k.
        truncated: accept a ranking that misses labelled images; a positive that it misses counts
            as never found, and the protocol's dict then holds "truncated": True.
        number: the size of the database, where an array is shorter (top K of a database with
            distractors). Without it an index must be below the larger of K and the ground truth's
            database.
    Returns:
        protocol -> {"map": float in [0, 1], "mp_at": {k: float in [0, 1]}, "ap": (Q,) float64}.
        A query without positives has nan and counts in no mean; without any other query (no query
        at all included) the means are nan.
    Raises:
        ValueError: an index is repeated or out of range, a labelled image is missing, shapes do
            not fit the ground truth, or a protocol or k makes no sense.
    """
    if not all(isinstance(k, (int, np.integer)) and k >= 1 for k in kappas):
        raise ValueError(f"kappas are whole numbers from 1 on, not {kappas}")
    if isinstance(ranking, Mapping):
        unknown = set(ranking) - set(PROTOCOLS)
        if unknown or not ranking:
            raise ValueError(f"rankings by protocol are for {PROTOCOLS}, not {sorted(ranking)}")
        places = {p: _positions(r, ground_truth, truncated, number) for p, r in ranking.items()}
    else:
        places = dict.fromkeys(PROTOCOLS, _positions(ranking, ground_truth, truncated, number))
    return {p: _scores(places[p], ground_truth, p, kappas) for p in PROTOCOLS if p in places}


def _positions(
    ranking: Ranking, ground_truth: GroundTruth, truncated: bool, number: int | None
) -> Positions:
    wanted = labelled(ground_truth)
    if not isinstance(ranking, Positions):
        ranking = np.asarray(ranking)
        least = max(len(ranking) if ranking.ndim else 0, len(ground_truth.database))
        return Positions.from_ranks(
            ranking, wanted, database_size=least if number is None else number, truncated=truncated
        )
    if len(ranking.indices) != len(wanted) or ranking.database_size < len(ground_truth.database):
        raise ValueError(
            f"positions of {len(ranking.indices)} queries among {ranking.database_size} images do "
            f"not belong to {ground_truth.name}: {len(wanted)} queries, "
            f"{len(ground_truth.database)} images"
        )
    for q, (have, want) in enumerate(zip(ranking.indices, wanted, strict=True)):
        missing = np.setdiff1d(want, have)
        if missing.size and not truncated:
            raise ValueError(
                f"the positions of query {q} miss the labelled image {missing[0]}; make them from "
                "revisited.labelled, or set truncated=True to count it as never found"
            )
    return ranking


def _scores(
    places: Positions, ground_truth: GroundTruth, protocol: str, kappas: Sequence[int]
) -> dict[str, Any]:
    correct, skipped = positives(ground_truth, protocol), ignored(ground_truth, protocol)
    ap = np.full(len(correct), np.nan)
    precisions = np.full((len(correct), len(kappas)), np.nan)
    for q, wanted in enumerate(correct):
        if not wanted.size:
            continue
        index, place = places.indices[q], places.ranks[q]
        found = np.sort(place[np.isin(index, wanted)])
        # Ignored images are taken out of the ranking: what follows moves up.
        found -= np.searchsorted(np.sort(place[np.isin(index, skipped[q])]), found)
        ap[q] = average_precision(found, wanted.size)
        precisions[q] = [precision_at(found, k) for k in kappas]
    scored = ~np.isnan(ap)
    means = precisions[scored].mean(axis=0) if scored.any() else np.full(len(kappas), np.nan)
    result = {
        "map": float(ap[scored].mean()) if scored.any() else float("nan"),
        "mp_at": {int(k): float(mean) for k, mean in zip(kappas, means, strict=True)},
        "ap": ap,
    }
    known = sum(index.size for index in places.indices)
    if known < sum(index.size for index in labelled(ground_truth)):
        result["truncated"] = True
    return result


def average_precision(ranks: np.ndarray, count: int) -> float:
    """The area under the precision-recall curve by the trapezoid rule, as the benchmark defines it.

    ranks: (F,) rising zero-based ranks of the positives found.  count: all positives, at least 1.
    Each positive adds the mean of the precisions just before and at its rank; before rank 0 the
    precision is 1, so that one positive found second scores 0.25. None found: 0.
    """
    found = np.arange(ranks.size)
    before = np.divide(found, ranks, out=np.ones(ranks.size), where=ranks > 0)
    at = (found + 1) / (ranks + 1)
    return float((before + at).sum() / (2 * count))


def precision_at(ranks: np.ndarray, k: int) -> float:
    """The share of positives among the first `k`, or up to the last positive where that is nearer.

    ranks: (F,) zero-based ranks of the positives found; none: 0. The shorter list is the published
    rule: a query with two positives, ranked first and second, has precision 1 at every k >= 2.
    """
    if not ranks.size:  # NOTE the published code fails here (the maximum of nothing)
        return 0.0
    length = min(int(ranks.max()) + 1, k)
    return np.count_nonzero(ranks < length) / length
