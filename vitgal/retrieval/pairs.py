"""One query against its candidates: matches and their verification."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitgal.features.local import LocalFeatures
from vitgal.retrieval.matching import _Descriptors, _match
from vitgal.retrieval.verification import Verification, verify


@dataclass(frozen=True, eq=False)
class PairInspection:
    """Matches of two images and what verification made of them.

    matches: (M, 2) int64, (query index, database index) into the two images' keypoints.
    verification: of these matches, in the frames of the two network inputs.
    """

    matches: np.ndarray
    verification: Verification


def inspect_pair(
    query: LocalFeatures,
    database: LocalFeatures,
    *,
    max_distance: float = 0.82,
    max_keypoints: int | None = None,
    device: str | None = None,
    **options: Any,
) -> PairInspection:
    """Matches and verifies one image pair, exactly as reranking does.

    max_keypoints: use this many of each image's features, the best first (None: all). device: of
    `match`. options: `verify`'s. No features on either side: no matches, no inliers. Raises
    ValueError as `match` and `verify` do.
    """
    options |= {"max_distance": max_distance, "max_keypoints": max_keypoints, "device": device}
    return next(inspect_shortlist(query, [database], **options))


def inspect_shortlist(
    query: LocalFeatures,
    candidates: Iterable[LocalFeatures],
    *,
    max_distance: float = 0.82,
    max_keypoints: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Iterator[PairInspection]:
    """`inspect_pair` of one query with each of its candidates, the query prepared once.

    The candidates are read one after the other, so that a short list takes no more memory than
    its largest image.
    """
    query = query.subset(slice(max_keypoints))
    prepared = _Descriptors.read(query.descriptors, "query")
    for features in candidates:
        features = features.subset(slice(max_keypoints))
        gallery = _Descriptors.read(features.descriptors, "gallery")
        pairs = _match(prepared, gallery, max_distance, device)
        points = query.keypoints[pairs[:, 0]], features.keypoints[pairs[:, 1]]
        yield PairInspection(pairs, verify(*points, **options))
