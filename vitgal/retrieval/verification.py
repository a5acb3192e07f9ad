"""Geometric verification: matches, a homography by RANSAC and its inliers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import poselib
import pydegensac

from vitgal import engines
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.matching import Descriptors, match_prepared, matching_device
from vitgal.settings import RerankingSettings, VerificationSettings

MIN_MATCHES = 5  # below it the published code counts no inliers, though four would fix a homography

Model = tuple[np.ndarray | None, np.ndarray | None]  # homography and inlier mask, as estimated


@dataclass(frozen=True, eq=False)
class Verification:
    """The result of RANSAC on the matches of one image pair.

    inliers: (M,) bool. homography: (3, 3) float64 from query points to gallery points, its last
    element 1 unless that is 0; None where no model was found.
    """

    inliers: np.ndarray
    homography: np.ndarray | None

    @property
    def count(self) -> int:
        """The number of inliers."""
        return int(self.inliers.sum())


def verify(
    query_points: np.ndarray,
    gallery_points: np.ndarray,
    estimator: str = VerificationSettings.estimator,
    threshold: float = VerificationSettings.threshold,
    iterations: int = VerificationSettings.iterations,
    confidence: float = VerificationSettings.confidence,
    seed: int = VerificationSettings.seed,
) -> Verification:
    """Fits a homography to matched points by RANSAC and finds the inliers.

    Args:
        query_points, gallery_points: (M, 2) (x, y) in the network inputs' frames; row i of the one
            is matched with row i of the other.
        estimator: "degensac" (pydegensac, published), "magsac" (OpenCV USAC) or "poselib".
        threshold: pixels. For magsac and poselib the greatest distance of a gallery point from its
            projected query point. For degensac, as published, the greatest Sampson distance, and
            symmetric: at equal scale it admits distances up to sqrt(2) * threshold.
        iterations: greatest number.
        confidence: stop once the best model is found with this probability. 1.0: never stop early.
        seed: the same seed gives the same result.
    Returns:
        With fewer than 5 matches, or where no model is found or it is singular: no inlier and no
        homography.
    Raises:
        ValueError: shapes that do not fit, points that are not finite, an unknown estimator, a
            parameter out of range.

    pydegensac draws from the C library's one random state: call it from one thread of a process.
    """
    settings = VerificationSettings(estimator, threshold, iterations, confidence, seed)
    return verify_matches(query_points, gallery_points, settings)


def verify_matches(
    query_points: np.ndarray, gallery_points: np.ndarray, settings: VerificationSettings
) -> Verification:
    """Verifies matched points (M, 2) and (M, 2) as `verify`."""
    query, gallery = _points(query_points), _points(gallery_points)
    if len(query) != len(gallery):
        raise ValueError(f"{len(query)} query points matched with {len(gallery)} gallery points")
    no_inliers = Verification(np.zeros(len(query), bool), None)
    if len(query) < MIN_MATCHES:
        return no_inliers
    homography, mask = ESTIMATORS[settings.estimator](query, gallery, settings)
    if homography is None or not np.isfinite(homography).all() or not np.any(mask):
        return no_inliers
    if np.linalg.matrix_rank(homography) < 3:
        return no_inliers
    scale = homography[2, 2] or 1.0
    return Verification(np.asarray(mask).reshape(-1).astype(bool), homography / scale)


@dataclass(frozen=True, eq=False)
class PairInspection:
    """The matches of two images and their verification, in the frames of the network inputs.

    matches: (M, 2) int64, (query index, database index) into the two images' keypoints.
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
    """Matches and verifies one image pair as reranking does: no features, no inliers."""
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
    its largest image. device: as for `match`. Raises ValueError as `match` and `verify`.
    """
    device = matching_device(device)
    matching, kept = settings.matching, slice(settings.matching.max_keypoints)
    query = query.subset(kept)
    prepared = Descriptors.read(query.descriptors, "query")
    for features in candidates:
        features = features.subset(kept)
        gallery = Descriptors.read(features.descriptors, "gallery")
        # The products are small: where the processor is busy, BLAS's threads mostly wait.
        with engines.one_blas_thread():
            matches = match_prepared(prepared, gallery, matching.max_distance, device, matching)
        points = query.keypoints[matches[:, 0]], features.keypoints[matches[:, 1]]
        yield PairInspection(matches, verify_matches(*points, settings.verification))


def _points(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if not points.size:
        return points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points of shape {points.shape}, not (M, 2)")
    if not np.isfinite(points).all():
        raise ValueError("points hold nan or infinite coordinates")
    return np.ascontiguousarray(points)


def _degensac(query: np.ndarray, gallery: np.ndarray, settings: VerificationSettings) -> Model:
    # NOTE: the published code seeds a patched pydegensac with 0; since 0.3.0 the seed is a
    # parameter.
    try:
        options = settings.threshold, settings.confidence, settings.iterations
        homography, mask = pydegensac.findHomography(query, gallery, *options, seed=settings.seed)
    except np.linalg.LinAlgError:  # the model cannot be inverted: no inliers, as published
        return None, None
    # All zeros stand for "no model".
    return (homography, mask) if np.any(homography) else (None, None)


def _magsac(query: np.ndarray, gallery: np.ndarray, settings: VerificationSettings) -> Model:
    # The plain cv2.USAC_MAGSAC flag ignores seeds, so every field is set here.
    options = cv2.UsacParams()
    options.sampler = cv2.SAMPLING_UNIFORM
    options.score = cv2.SCORE_METHOD_MAGSAC
    options.loMethod = cv2.LOCAL_OPTIM_SIGMA
    options.loIterations = 5
    options.loSampleSize = 14
    options.final_polisher = cv2.MAGSAC
    options.final_polisher_iterations = 3
    options.neighborsSearch = cv2.NEIGH_GRID
    options.isParallel = False
    options.threshold = settings.threshold
    options.maxIterations = settings.iterations
    options.confidence = settings.confidence
    options.randomGeneratorState = settings.seed
    return cv2.findHomography(query, gallery, options)


def _poselib(query: np.ndarray, gallery: np.ndarray, settings: VerificationSettings) -> Model:
    # A success probability of exactly 1 makes PoseLib stop at once; the least number of iterations
    # keeps it from stopping early.
    never, iterations = settings.confidence == 1, settings.iterations
    options = {
        "max_reproj_error": float(settings.threshold),
        "max_iterations": iterations,
        "min_iterations": iterations if never else min(iterations, 50),
        "success_prob": 0.9999 if never else settings.confidence,
        "dyn_num_trials_mult": 3.0,
        "progressive_sampling": False,
        "seed": settings.seed,
    }
    homography, report = poselib.estimate_homography(query, gallery, options, {})
    # On failure it returns the identity, or a model of one or two points.
    return (homography, report["inliers"]) if report["num_inliers"] >= 4 else (None, None)


ESTIMATORS = {"degensac": _degensac, "magsac": _magsac, "poselib": _poselib}
