"""Reranking: candidates in order of falling inlier count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitgal.data.revisited import PROTOCOLS, GroundTruth
from vitgal.retrieval import shortlists
from vitgal.retrieval.shortlists import PUBLISHED
from vitgal.settings import RerankingSettings
from vitgal.settings.sections import TIES

VARIANTS = (*PROTOCOLS, PUBLISHED)
NOT_VERIFIED = -1  # in the tables of candidates and inlier counts


@dataclass(frozen=True, eq=False)
class Reranking:
    """Verified short lists, and the rules by which they change a ranking.

    candidates: (Q, C) integers, database indices, padded with -1.  inliers: (Q, C) integers, the
    inlier count of each candidate, padded with -1.  protocol, top, ties: as `rerank`.
    Raises ValueError for an unknown protocol or unknown ties.
    """

    candidates: np.ndarray
    inliers: np.ndarray
    ground_truth: GroundTruth
    protocol: str
    top: int = RerankingSettings.top
    ties: str = RerankingSettings.ties

    def __post_init__(self) -> None:
        if self.protocol not in VARIANTS or self.ties not in TIES:
            raise ValueError(
                f"protocol {self.protocol!r}, ties {self.ties!r}: known are "
                f"{', '.join(VARIANTS)} and {', '.join(TIES)}"
            )

    def exchanges(self, order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns per query the candidates' rising ranks (M,), and the images (M,) put there.

        order: (K, Q) integers, the ranking before. Raises ValueError for a ranking too short, or a
        candidate of the protocol that was not verified.
        """
        lists = shortlists.candidates(order, self.ground_truth, self.protocol, top=self.top)
        exchanges = []
        for q, images in enumerate(lists):
            ranks = np.flatnonzero(np.isin(order[:, q], images))
            counts = self._counts(q, images)
            if self.protocol == PUBLISHED:
                counts[np.isin(images, self.ground_truth.junk[q])] = 0
            if self.ties == "global":
                sorter = np.argsort(-counts, kind="stable")
            else:
                sorter = np.argsort(-counts.astype(np.float64))
            exchanges.append((ranks, images[sorter]))
        return exchanges

    def apply(self, order: np.ndarray) -> np.ndarray:
        """Returns the ranking (K, Q) after reranking, in the type of `order`. Raises as above."""
        reranked = np.array(order)
        for q, (ranks, images) in enumerate(self.exchanges(order)):
            reranked[ranks, q] = images
        return reranked

    def _counts(self, query: int, images: np.ndarray) -> np.ndarray:
        row = zip(self.candidates[query].tolist(), self.inliers[query].tolist(), strict=True)
        verified = dict(row)
        counts = np.array(
            [verified.get(image, NOT_VERIFIED) for image in images.tolist()], np.int64
        )
        missing = images[counts == NOT_VERIFIED]
        if missing.size:
            raise ValueError(
                f"database image {missing[0]} is on the short list of query "
                f"{self.ground_truth.queries[query]}, but was not verified"
            )
        return counts


def rerank(
    ranks: np.ndarray,
    inliers: np.ndarray,
    *,
    candidates: np.ndarray,
    ground_truth: GroundTruth,
    protocol: str,
    top: int = RerankingSettings.top,
    ties: str = RerankingSettings.ties,
) -> np.ndarray:
    """Sorts the candidates of one protocol by falling inlier count; others keep their ranks.

    Args:
        ranks: (K, Q) integers, the global ranking, best first, one column a query.
        inliers: (Q, C) inlier counts of `candidates` (Q, C), database indices; both padded with -1.
        protocol: "easy", "medium", "hard": the first `top` images that the protocol does not
            ignore are sorted among themselves (as in DELG); ignored images keep their ranks.
            "published": the plain first `top`, where junk counts 0 inliers.
        ties: "global": equal counts keep their global order. "published": as NumPy's unstable
            sort leaves them, which depends on its version and the processor.
    Returns:
        (K, Q) of the type of `ranks`.
    Raises:
        ValueError: an unknown protocol or ties, a ranking too short, or a candidate of this
            protocol that was not verified.
    """
    return Reranking(candidates, inliers, ground_truth, protocol, top, ties).apply(ranks)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns rows of integers of any lengths as one table (Q, C) int32, padded with -1."""
    width = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), width), NOT_VERIFIED, np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
