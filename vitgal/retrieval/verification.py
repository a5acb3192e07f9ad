"""Geometric verification: a homography by RANSAC and its inliers."""

from dataclasses import dataclass

import cv2
import numpy as np
import poselib
import pydegensac

Model = tuple[np.ndarray | None, np.ndarray | None]  # homography and inlier mask, as estimated
MIN_MATCHES = 5  # below it the published code counts no inliers, though four would fix a homography


@dataclass(frozen=True, eq=False)
class Verification:
    """What RANSAC found in the matches of one image pair.

    inliers: (M,) bool, one a match. homography: (3, 3) float64 from query points to gallery
    points, its last element 1 unless that is 0; None where no model was found.
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
    estimator: str = "degensac",
    threshold: float = 16.0,
    iterations: int = 2000,
    confidence: float = 1.0,
    seed: int = 0,
) -> Verification:
    """Fits a homography to matched points by RANSAC and tells the inliers.

    Args:
        query_points, gallery_points: (M, 2) (x, y), row i of the one matched with row i of the
            other, in the network's input frame.
        estimator: "degensac" (pydegensac, published), "magsac" (OpenCV USAC) or "poselib".
        threshold: pixels. For magsac and poselib the greatest distance of a gallery point from its
            projected query point. For degensac, as published, the greatest Sampson distance, and
            symmetric: at equal scale it admits distances up to sqrt(2) * threshold.
        iterations: the most that are tried.
        confidence: stop once the best model is found with this probability. 1.0: never stop early.
        seed: of the sampling; the same seed gives the same result.
    Returns:
        With fewer than 5 matches, or where no model is found or it is singular: no inlier and no
        homography.
    Raises:
        ValueError: shapes that do not fit, points that are not finite, an unknown estimator, a
            parameter out of range.

    pydegensac draws from the C library's one random state: call it from one thread of a process.
    """
    query, gallery = _points(query_points), _points(gallery_points)
    if len(query) != len(gallery):
        raise ValueError(f"{len(query)} query points matched with {len(gallery)} gallery points")
    _check_options(estimator, threshold, iterations, confidence, seed)
    nothing = Verification(np.zeros(len(query), bool), None)
    if len(query) < MIN_MATCHES:
        return nothing
    estimate = ESTIMATORS[estimator]
    homography, mask = estimate(query, gallery, threshold, iterations, confidence, seed)
    if homography is None or not np.isfinite(homography).all() or not np.any(mask):
        return nothing
    if np.linalg.matrix_rank(homography) < 3:
        return nothing
    scale = homography[2, 2] or 1.0
    return Verification(np.asarray(mask).reshape(-1).astype(bool), homography / scale)


def _points(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if not points.size:
        return points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points of shape {points.shape}, not (M, 2)")
    if not np.isfinite(points).all():
        raise ValueError("points hold nan or infinite coordinates")
    return np.ascontiguousarray(points)


def _check_options(
    estimator: str, threshold: float, iterations: int, confidence: float, seed: int
) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    if not 0 < threshold < np.inf:
        raise ValueError(f"threshold is {threshold}; it is a number of pixels above 0")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    if not 0 < confidence <= 1:
        raise ValueError(f"confidence is {confidence}; it lies above 0 and up to 1")
    if not 0 <= seed < 2**31:  # a negative seed would mean the clock to pydegensac
        raise ValueError(f"seed is {seed}; it lies between 0 and {2**31 - 1}")


def _degensac(
    query: np.ndarray,
    gallery: np.ndarray,
    threshold: float,
    iterations: int,
    confidence: float,
    seed: int,
) -> Model:
    # NOTE: the published code seeds a patched pydegensac with 0; since 0.3.0 the seed is a
    # parameter.
    try:
        homography, mask = pydegensac.findHomography(
            query, gallery, threshold, confidence, iterations, seed=seed
        )
    except np.linalg.LinAlgError:  # the model cannot be inverted: no inliers, as published
        return None, None
    # All zeros stand for "no model".
    return (homography, mask) if np.any(homography) else (None, None)


def _magsac(
    query: np.ndarray,
    gallery: np.ndarray,
    threshold: float,
    iterations: int,
    confidence: float,
    seed: int,
) -> Model:
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
    options.threshold = threshold
    options.maxIterations = iterations
    options.confidence = confidence
    options.randomGeneratorState = seed
    return cv2.findHomography(query, gallery, options)


def _poselib(
    query: np.ndarray,
    gallery: np.ndarray,
    threshold: float,
    iterations: int,
    confidence: float,
    seed: int,
) -> Model:
    # A success probability of exactly 1 makes PoseLib stop at once, so "never stop early" is said
    # by the least number of iterations.
    never = confidence == 1
    options = {
        "max_reproj_error": float(threshold),
        "max_iterations": iterations,
        "min_iterations": iterations if never else min(iterations, 50),
        "success_prob": 0.9999 if never else confidence,
        "dyn_num_trials_mult": 3.0,
        "progressive_sampling": False,
        "seed": seed,
    }
    homography, found = poselib.estimate_homography(query, gallery, options, {})
    # Where it fails it returns its start, the identity, or one that a point or two lie near.
    return (homography, found["inliers"]) if found["num_inliers"] >= 4 else (None, None)


ESTIMATORS = {"degensac": _degensac, "magsac": _magsac, "poselib": _poselib}
