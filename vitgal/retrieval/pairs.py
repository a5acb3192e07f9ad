"""Matching and verification of a query with its candidates, as reranking counts inliers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from vitgal.features.local import LocalFeatures
from vitgal.retrieval.matching import Descriptors, match_prepared, matching_device
from vitgal.retrieval.verification import Verification, verify_matches
from vitgal.settings import RerankingSettings


@dataclass(frozen=True, eq=False)
class PairInspection:
    """The matches of two images and their verification.

    matches: (M, 2) int64, (query index, database index) into the two images' keypoints.
    verification: of these matches, in the frames of the two network inputs.
    """

    matches: np.ndarray
    verification: Verification


def inspect_pair(
    query: LocalFeatures,
    database: LocalFeatures,
    settings: RerankingSettings,
    *,
    device: str | None = None,
) -> PairInspection:
    """Matches and verifies one image pair, exactly as reranking does.

    No features on either side: no matches, no inliers. device: as for `match`. Raises ValueError as
    `match` and `verify`.
    """
    return next(inspect_shortlist(query, [database], settings, device=device))


def inspect_shortlist(
    query: LocalFeatures,
    candidates: Iterable[LocalFeatures],
    settings: RerankingSettings,
    *,
    device: str | None = None,
) -> Iterator[PairInspection]:
    """Matches and verifies one query with each of its candidates; the query is prepared once.

    The candidates are read one after the other, so that a short list takes no more memory than
    its largest image. device and errors: as for `inspect_pair`.
    """
    device = matching_device(device)
    max_distance, kept = settings.matching.max_distance, slice(settings.matching.max_keypoints)
    query = query.subset(kept)
    prepared = Descriptors.read(query.descriptors, "query")
    for features in candidates:
        features = features.subset(kept)
        gallery = Descriptors.read(features.descriptors, "gallery")
        matches = match_prepared(prepared, gallery, max_distance, device)
        points = query.keypoints[matches[:, 0]], features.keypoints[matches[:, 1]]
        yield PairInspection(matches, verify_matches(*points, settings.verification))
