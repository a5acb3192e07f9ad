"""New rankings: candidates in order of falling inlier count."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vitgal.data.revisited import PROTOCOLS, GroundTruth, ignored, positives
from vitgal.evaluation.protocol import evaluate
from vitgal.retrieval import shortlists
from vitgal.retrieval.ranking import Positions
from vitgal.retrieval.shortlists import PUBLISHED

VARIANTS = (*PROTOCOLS, PUBLISHED)
TIES = ("global", "published")
NOT_VERIFIED = -1  # in the tables of candidates and inlier counts


def rerank(
    ranks: np.ndarray,
    inliers: np.ndarray,
    *,
    candidates: np.ndarray,
    ground_truth: GroundTruth,
    protocol: str,
    top: int = 100,
    ties: str = "global",
) -> np.ndarray:
    """Puts the candidates of one protocol in order of falling inlier count; the rest stays.

    Args:
        ranks: (K, Q) integers, the global ranking, best first, one column a query.
        inliers: (Q, C) inlier counts of `candidates` (Q, C), database indices; both padded with -1.
        protocol: "easy", "medium", "hard": the first `top` images that the protocol does not
            ignore change places among themselves, so that junk costs no candidate a place (as
            DELG does). "published": the plain first `top`, where junk counts 0 inliers.
        ties: "global": equal counts keep their global order. "published": as NumPy's unstable
            sort leaves them, which depends on its version and the processor.
    Returns:
        (K, Q) of the type of `ranks`.
    Raises:
        ValueError: an unknown protocol or ties, a ranking too short, or a candidate of this
            protocol that was not verified.
    """
    reranked = np.array(ranks)
    for q, (places, images) in enumerate(
        _moves(ranks, inliers, candidates, ground_truth, protocol, top, ties)
    ):
        reranked[places, q] = images
    return reranked


def rerank_positions(
    positions: Positions,
    inliers: np.ndarray,
    *,
    ranks: np.ndarray,
    candidates: np.ndarray,
    ground_truth: GroundTruth,
    protocol: str,
    top: int = 100,
    ties: str = "global",
) -> Positions:
    """Where `rerank` would put every labelled image, without the ranks of the others.

    positions: of the whole global ranking, of which `ranks` is the beginning. The rest as for
    `rerank`. Equals reading the labelled images off the whole reranked ranking.
    """
    moved = []
    moves = _moves(ranks, inliers, candidates, ground_truth, protocol, top, ties)
    for index, position, (places, images) in zip(
        positions.indices, positions.positions, moves, strict=True
    ):
        position = position.copy()
        _, ours, theirs = np.intersect1d(index, images, return_indices=True)
        position[ours] = places[theirs]
        moved.append(position)
    return Positions(positions.indices, moved, positions.number)


def _moves(
    ranks: np.ndarray,
    inliers: np.ndarray,
    candidates: np.ndarray,
    ground_truth: GroundTruth,
    protocol: str,
    top: int,
    ties: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per query the ranks that change hands, rising, and the images that now stand there."""
    if protocol not in VARIANTS or ties not in TIES:
        raise ValueError(
            f"protocol {protocol!r}, ties {ties!r}: known are {', '.join(VARIANTS)} and "
            f"{', '.join(TIES)}"
        )
    moves = []
    for q, images in enumerate(shortlists.candidates(ranks, ground_truth, protocol, top=top)):
        places = np.flatnonzero(np.isin(ranks[:, q], images))
        counts = _counts_of(images, candidates[q], inliers[q], ground_truth.queries[q])
        if protocol == PUBLISHED:
            counts[np.isin(images, ground_truth.junk[q])] = 0
        if ties == "global":
            order = np.argsort(-counts, kind="stable")
        else:
            order = np.argsort(-counts.astype(np.float64))
        moves.append((places, images[order]))
    return moves


def _counts_of(
    images: np.ndarray, candidates: np.ndarray, inliers: np.ndarray, query: str
) -> np.ndarray:
    """The counts of `images` out of one row of the tables."""
    known = dict(zip(candidates.tolist(), inliers.tolist(), strict=True))
    counts = np.array([known.get(image, NOT_VERIFIED) for image in images.tolist()], np.int64)
    if (counts == NOT_VERIFIED).any():
        raise ValueError(
            f"database image {images[counts == NOT_VERIFIED][0]} is on the short list of query "
            f"{query}, but was not verified"
        )
    return counts


def query_table(
    before: Positions, after: Positions, ground_truth: GroundTruth, *, protocol: str
) -> pd.DataFrame:
    """What reranking did to each query under one protocol.

    before, after: positions of the labelled images in two rankings. Returns a row a query, named
    by the index: `before`, `after` and `change` are average precisions in [0, 1] (nan without
    positives); `image` is the positive image that rose by most places, `rank_before` and
    `rank_after` its ranks from 1 on among the images that the protocol does not ignore; missing
    where none rose.
    """
    old, new = (evaluate({protocol: p}, ground_truth)[protocol]["ap"] for p in (before, after))
    rows = []
    for q in range(len(ground_truth.queries)):
        images = positives(ground_truth, protocol)[q]
        skipped = ignored(ground_truth, protocol)[q]
        was, now = (_ranks_without(p, q, images, skipped) for p in (before, after))
        best = np.argmax(was - now) if len(images) else 0
        rose = len(images) > 0 and was[best] > now[best]
        name = ground_truth.database[images[best]] if rose else None
        rows.append((name, *((was[best], now[best]) if rose else (pd.NA, pd.NA))))
    table = pd.DataFrame(rows, columns=["image", "rank_before", "rank_after"])
    table = table.astype({"rank_before": "Int64", "rank_after": "Int64"})
    table.insert(0, "before", old)
    table.insert(1, "after", new)
    table.insert(2, "change", new - old)
    return table.set_index(pd.Index(ground_truth.queries, name="query"))


def _ranks_without(
    positions: Positions, q: int, images: np.ndarray, skipped: np.ndarray
) -> np.ndarray:
    """Ranks from 1 on of some images of a query, once the skipped ones are taken out."""
    index, position = positions.indices[q], positions.positions[q]
    places = position[np.searchsorted(index, images)]
    return places - np.searchsorted(np.sort(position[np.isin(index, skipped)]), places) + 1


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    width = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), width), NOT_VERIFIED, np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
