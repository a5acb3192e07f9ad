"""Local matching, geometric verification, and the reranking of short lists.

A query's local features are matched with those of each candidate on its short list, a homography
is fitted to the matches by RANSAC, and candidates are put in order of falling inlier count. Points
are (x, y) in the network's input frame, where one patch is 16 pixels wide.
"""

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import pandas as pd
import poselib
import pydegensac
from tqdm.auto import tqdm

from vitgal import cluster, runs, search
from vitgal.evaluation import evaluate, scores_document
from vitgal.features import LocalFeatures
from vitgal.revisited import PROTOCOLS, GroundTruth, ignored, load_ground_truth, positives
from vitgal.search import PUBLISHED, Positions
from vitgal.store import FeatureStore, query_key

VARIANTS = (*PROTOCOLS, PUBLISHED)
TIES = ("global", "published")
NOT_VERIFIED = -1  # in the tables of candidates and inlier counts
JOURNAL = "partial"  # counts of the queries that are done, until all are
Model = tuple[np.ndarray | None, np.ndarray | None]  # homography and inlier mask, as estimated
GLOBAL_NOTEBOOK = "04_global_evaluation"
LOCAL_NOTEBOOK = "05_local_extraction"
MOST = 1e38  # as far as a float32 goes
MIN_MATCHES = 5  # below it the published code counts no inliers, though four would fix a homography
BLOCK = 1 << 22  # similarities held at once: 16 MiB
SIEVED = 1 / 500  # more pairs left by the first pass than this take longer than the whole product
SAMPLE = 64  # query descriptors that tell whether the first pass is worth it
PAIRS = 1 << 13  # descriptor pairs measured at once in float64: 8 MiB at 128 dimensions


# Matching


def match(
    query_descriptors: np.ndarray,
    gallery_descriptors: np.ndarray,
    max_distance: float = 0.82,
    *,
    device: str | None = None,
) -> np.ndarray:
    """Matches each query descriptor with its nearest gallery descriptor, one way.

    Args:
        query_descriptors: (N, C) real numbers.
        gallery_descriptors: (M, C) real numbers.
        max_distance: Euclidean; a match lies strictly nearer. `math.inf`: no limit.
        device: of torch, "cuda" or "cuda:1" for example, where the products run; None: NumPy. The
            matches are the same.
    Returns:
        (K, 2) int64, (query index, gallery index) by rising query index. Several query descriptors
        may share one gallery descriptor. Equal distances: the lowest gallery index. No descriptor
        on either side: (0, 2), whatever the widths.
    Raises:
        ValueError: widths that differ, nan or infinite or huge values, a negative `max_distance`, a
            device that torch does not find.

    Distances are those of the published float64 KD-tree, digit by digit: float32 products find the
    few gallery descriptors that may be the nearest, float64 decides among them.
    """
    return match_shortlist(query_descriptors, [gallery_descriptors], max_distance, device=device)[0]


def match_shortlist(
    query_descriptors: np.ndarray,
    galleries: Iterable[np.ndarray],
    max_distance: float = 0.82,
    *,
    device: str | None = None,
) -> list[np.ndarray]:
    """`match` of one query image against each of many images, the query prepared once.

    galleries: (M_i, C) each; they are read one after the other. Returns one (K_i, 2) int64 each;
    no galleries: an empty list. Raises ValueError as `match` does.
    """
    check_device(device)
    query = _Descriptors.read(query_descriptors, "query")
    return [
        _match(query, _Descriptors.read(gallery, "gallery"), max_distance, device)
        for gallery in galleries
    ]


def pick_device(device: str | None) -> str | None:
    """The device as it is named; for "auto" "cuda" where there is a GPU, else None, for NumPy."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else None


def check_device(device: str | None) -> None:
    """Raises ValueError where torch finds no such device; None and "auto" ask for none."""
    if device in (None, "auto"):
        return
    import torch  # only here: matching on the processor does without it

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"matching cannot run on {device!r} ({reason}): name another device, or None for NumPy"
        ) from error


def match_squares(
    query_descriptors: np.ndarray, gallery_descriptors: np.ndarray, matches: np.ndarray
) -> np.ndarray:
    """Squared distances (K,) float64 of the matches (K, 2), as `match` compares them.

    A match (i, j) lies within `max_distance` exactly where its value is below its square.
    """
    query = _Descriptors.read(query_descriptors, "query").values
    gallery = _Descriptors.read(gallery_descriptors, "gallery").values
    return _squared_distances(query, gallery, matches[:, 0], matches[:, 1])


@dataclass(frozen=True, eq=False)
class _Descriptors:
    """Descriptors as given, and half their squared lengths."""

    values: np.ndarray  # (N, C) float32 or float64
    halves: np.ndarray  # (N,) float64

    @classmethod
    def read(cls, descriptors: np.ndarray, side: str) -> "_Descriptors":
        values = np.asarray(descriptors)
        values = values.astype(np.result_type(values, np.float32), copy=False)
        if values.ndim != 2:
            raise ValueError(f"{side} descriptors of shape {values.shape}, not (N, C)")
        halves = np.einsum("ij,ij->i", values, values, dtype=np.float64) / 2
        if not (halves < 1e30).all():  # false for nan as well
            raise ValueError(f"{side} descriptors hold nan, infinite or huge values")
        return cls(values, halves)

    @functools.cached_property
    def left(self) -> np.ndarray:  # (N, C + 1) float32: u, 1
        return self._extended(np.ones(len(self.values)))

    @functools.cached_property
    def right(self) -> np.ndarray:  # (N, C + 1) float32: v, -|v|^2 / 2
        return self._extended(-self.halves)

    @functools.cached_property
    def left_bound(self) -> np.ndarray:  # (N, S + 3): u's first values, |the rest|, 1, -|u|^2 / 2
        return self._shortened(np.ones(len(self.values)), -self.halves)

    @functools.cached_property
    def right_bound(self) -> np.ndarray:  # (N, S + 3): v's, |the rest|, -|v|^2 / 2, 1
        return self._shortened(-self.halves, np.ones(len(self.values)))

    def _shortened(self, *columns: np.ndarray) -> np.ndarray:
        short = self.values.shape[1] * 5 // 8
        rest = self.values[:, short:]
        shortened = np.empty((len(self.values), short + 3), np.float32)
        shortened[:, :short], shortened[:, -2], shortened[:, -1] = self.values[:, :short], *columns
        shortened[:, short] = np.sqrt(np.einsum("ij,ij->i", rest, rest, dtype=np.float64))
        return shortened

    def _extended(self, column: np.ndarray) -> np.ndarray:
        extended = np.empty((len(self.values), self.values.shape[1] + 1), np.float32)
        extended[:, :-1], extended[:, -1] = self.values, column
        return extended


def _match(
    query: _Descriptors, gallery: _Descriptors, max_distance: float, device: str | None = None
) -> np.ndarray:
    if not max_distance >= 0:
        raise ValueError(f"max_distance is {max_distance}, not a distance")
    (count, width), (size, other) = query.values.shape, gallery.values.shape
    if not count or not size:  # before the widths: nothing extracted may have no width either
        return np.empty((0, 2), np.int64)
    if width != other:
        raise ValueError(f"query descriptors are {width} wide, gallery descriptors {other}")
    found = []
    closest = functools.partial(_halving, device) if device is not None else _closest
    worth = math.isfinite(max_distance) and device is None
    for block in _blocks(count, size):
        pairs = _sieved(query, gallery, block, max_distance) if worth else None
        worth = pairs is not None
        found.append(pairs or closest(query, gallery, block, max_distance))
    rows, columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _nearest(query.values, gallery.values, rows, columns, max_distance)


def _blocks(count: int, size: int) -> list[slice]:
    """Query rows to take at once; the first are few and tell whether the first pass is worth it."""
    step = max(1, BLOCK // size)
    sample = min(SAMPLE, step, count)
    later = [slice(first, min(first + step, count)) for first in range(sample, count, step)]
    return [slice(0, sample), *later]


Pairs = tuple[np.ndarray, np.ndarray]  # query and gallery indices, by rising query index


def _sieved(
    query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs | None:
    """All pairs that may lie within the distance; None where these are many.

    By Cauchy and Schwarz u.v is at most the product of the first values of u and v and of the
    lengths of what is left of them: a shorter product than the whole one rules out most pairs. It
    bounds -|u - v|^2 / 2 as a whole, since one number is compared faster than one a row.
    """
    bounds = query.left_bound[block] @ gallery.right_bound.T  # (N, M) float32
    halves = query.halves[block].max(), gallery.halves.max()
    slack = _rounding(*halves, query.values.shape[1])
    floor = -max_distance * max_distance / 2 - slack
    floor = np.nextafter(np.float32(max(floor, -MOST)), np.float32(-np.inf))
    hits = np.flatnonzero(bounds >= floor)
    if hits.size > SIEVED * bounds.size:
        return None
    rows, columns = np.divmod(hits, bounds.shape[1])
    return rows + block.start, columns


def _closest(
    query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs:
    """For each descriptor those that rounding cannot tell from the nearest, if near enough."""
    # The nearest v to u is the one of the greatest u.v - |v|^2 / 2, which a single product gives.
    closeness = query.left[block] @ gallery.right.T  # (N, M) float32
    floor = _floors(closeness.max(axis=1), query, gallery, block, max_distance)
    rows = np.flatnonzero(floor < np.inf)
    if len(rows) < len(closeness):
        closeness = closeness[rows]
    hits = np.flatnonzero(closeness >= floor[rows, None])
    row, column = np.divmod(hits, closeness.shape[1])
    return rows[row] + block.start, column


def _halving(
    device: str, query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs:
    """`_closest_on` in as many parts as the device's memory asks for; the result is the same.

    RuntimeError where a single query descriptor is too much.
    """
    import torch

    try:
        return _closest_on(device, query, gallery, block, max_distance)
    except torch.OutOfMemoryError as error:
        if block.stop - block.start == 1:
            raise RuntimeError(
                f"{device} has no memory left to match one descriptor with {len(gallery.values)}: "
                "close other programs that use it, use fewer workers, or set match_device: null"
            ) from error
    # Outside the handler: the exception holds what was too large.
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    middle = (block.start + block.stop) // 2
    halves = slice(block.start, middle), slice(middle, block.stop)
    parts = [_halving(device, query, gallery, half, max_distance) for half in halves]
    rows, columns = (np.concatenate(both) for both in zip(*parts, strict=True))
    return rows, columns


def _closest_on(
    device: str, query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs:
    """`_closest` by torch; the device sends back a number a row, then the few pairs."""
    import torch

    left, right = (torch.from_numpy(a).to(device) for a in (query.left[block], gallery.right))
    with _float32_products():
        closeness = left @ right.T
    best = closeness.amax(dim=1).cpu().numpy()
    floor = torch.from_numpy(_floors(best, query, gallery, block, max_distance)).to(device)
    row, column = torch.nonzero(closeness >= floor[:, None], as_tuple=True)  # by rising row
    return row.cpu().numpy() + block.start, column.cpu().numpy()


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """No TF32 and no bf16 in torch's products, whatever the program allows: `_rounding` needs it.

    Since PyTorch 2.9 each backend has a setting of its own, and the one for all of them raises
    where these differ.
    """
    import torch

    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _floors(
    best: np.ndarray, query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> np.ndarray:
    """The least closeness (N,) float32 of what may be each row's nearest; inf where none is near.

    best: (N,) float32, each row's greatest closeness.
    """
    best = best.astype(np.float64)
    slack = _rounding(query.halves[block], gallery.halves.max(), query.values.shape[1])
    # Rounded down, so that float32 loses none of those that may be nearest.
    floor = np.nextafter((best - 2 * slack).astype(np.float32), np.float32(-np.inf))
    floor[best + slack < query.halves[block] - max_distance * max_distance / 2] = np.inf
    return floor


def _nearest(
    query: np.ndarray, gallery: np.ndarray, rows: np.ndarray, columns: np.ndarray, bound: float
) -> np.ndarray:
    """The matches (K, 2) among pairs: each row's nearest, the lowest index of equal ones."""
    squares = _squared_distances(query, gallery, rows, columns)
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # where each row's candidates begin
    nearest = np.minimum.reduceat(squares, first) if len(first) else squares
    group = np.repeat(np.arange(len(first)), np.diff(first, append=len(rows)))
    ties = np.flatnonzero(squares == nearest[group])
    lowest = ties[np.flatnonzero(np.diff(rows[ties], prepend=-1))]
    within = squares[lowest] < bound * bound
    return np.column_stack([rows, columns])[lowest][within]


def _rounding(halves: np.ndarray | float, half: float, width: int) -> np.ndarray | float:
    """How far a float32 closeness, or half a square less, may lie from the true one, at worst.

    A sum of n products in float32, in any order, is off by less than n * 2^-24 times the sum of
    their magnitudes; the rest of the factor covers the rounding of the factors themselves.
    """
    relative = (width + 12) * 2.0**-24
    sizes = np.sqrt(2 * halves) * np.sqrt(2 * half) + half + halves
    return relative * sizes + width * float(np.finfo(np.float32).tiny)


def _squared_distances(
    query: np.ndarray, gallery: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Squared Euclidean distances (P,) float64 of pairs, summed in the order of SciPy's KD-tree.

    The order matters where distances are equal but for rounding: it decides which is smaller.
    """
    squares = np.empty(len(rows))
    lanes = query.shape[1] // 4 * 4
    for first in range(0, len(rows), PAIRS):
        part = slice(first, first + PAIRS)
        terms = np.subtract(query[rows[part]], gallery[columns[part]], dtype=np.float64)
        terms *= terms
        sums = np.zeros((len(terms), 4))
        for start in range(0, lanes, 4):
            sums += terms[:, start : start + 4]
        total = sums[:, 0] + sums[:, 1] + sums[:, 2] + sums[:, 3]
        for column in range(lanes, terms.shape[1]):
            total += terms[:, column]
        squares[part] = total
    return squares


# Verification


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


# One query


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


# New rankings


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
    for q, images in enumerate(search.candidates(ranks, ground_truth, protocol, top=top)):
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


# The stage


def rerank_shortlist(
    run: Path,
    *,
    dataset: str,
    data_folder: str | os.PathLike,
    top: int = 100,
    max_distance: float = 0.82,
    estimator: str = "degensac",
    threshold: float = 16.0,
    iterations: int = 2000,
    confidence: float = 1.0,
    seed: int = 0,
    max_keypoints: int | None = None,
    ties: str = "global",
    match_device: str | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Verifies every short list of a run and writes the rankings that follow.

    Args:
        run: the run's folder; `<dataset>/global` and `<dataset>/local` are finished in it.
        data_folder: holds `gnd_<dataset>.pkl`.
        top: candidates a protocol; at most what the short list was made for.
        max_distance, estimator, threshold, iterations, confidence, seed: of `match` and `verify`.
        max_keypoints: features an image, best first (None: all that were extracted).
        ties: order of equal counts in the published ranking; the others keep the global order.
        match_device: of torch, where matching runs; None: NumPy; "auto": on a GPU where a process
            finds one. The result does not depend on it.
        workers: processes (None: one a core). The result does not depend on it.
        engine, ray_address: "local", or "ray": the processes are those of a Ray cluster (see
            `cluster.connected`), which all see the run folder. Nor does it depend on that.
    Returns:
        `<dataset>/rerank` with candidates.npy, inliers.npy, and for easy, medium, hard and
        published positions_*.npz and top_*.npy, and scores.json.
    Raises:
        runs.StageError: an earlier stage is missing, was made for a shorter short list or lacks an
            image's features (it is named), or the folder holds other settings.
        ValueError: features or options that do not fit.

    Interrupted, it keeps the queries that are done. An image that could not be read counts 0.
    """
    run = Path(run)
    cluster.check_engine(engine, ray_address)
    options = dict(estimator=estimator, threshold=threshold, iterations=iterations)
    options |= dict(confidence=confidence, seed=seed)
    _check_options(**options)
    _check_lists(top, ties, max_distance, max_keypoints)
    options |= dict(max_distance=max_distance, max_keypoints=max_keypoints)
    parameters = {"dataset": dataset, "top": top, "ties": ties} | options
    options["device"] = match_device
    if engine == "local":  # a cluster's head need not have what its nodes have
        check_device(match_device)
    ground_truth = load_ground_truth(Path(data_folder) / f"gnd_{dataset}.pkl")
    inputs = _inputs(run / dataset, ground_truth)
    folder = run / dataset / "rerank"
    with runs.stage(
        folder, "rerank", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return folder
        listed = _Shortlist.read(run / dataset, ground_truth, top)
        place = dict(engine=engine, address=ray_address, workers=workers)
        inliers = _verified(folder, listed, run / dataset / "local", options, place, progress)
        outputs = _write_rankings(folder, listed, inliers, top, ties)
        _write_scores(folder, listed, run / dataset / "global", parameters, inputs)
        outputs += ["candidates.npy", "inliers.npy", "scores.json"]
        pairs = int((inliers >= 0).sum())
        return stage.finish(outputs, engine=engine, workers=workers, pairs=pairs)


def _check_lists(top: int, ties: str, max_distance: float, max_keypoints: int | None) -> None:
    """ValueError for what would be found out only once pairs are verified."""
    if top < 1:
        raise ValueError(f"top is {top}; a short list has one candidate at least")
    if ties not in TIES:
        raise ValueError(f"unknown ties {ties!r}; known: {', '.join(TIES)}")
    if not max_distance >= 0:
        raise ValueError(f"max_distance is {max_distance}, not a distance")
    if max_keypoints is not None and max_keypoints < 1:
        raise ValueError(f"max_keypoints is {max_keypoints}; None takes all, else at least 1")


def _inputs(folder: Path, ground_truth: GroundTruth) -> dict[str, str]:
    """Fingerprints of what the stage reads; StageError where a stage before it is missing."""
    inputs = {
        name: runs.output_fingerprint(folder / "global", name, GLOBAL_NOTEBOOK)
        for name in ("names.json", "ranks.npy", "positions.npz", "shortlist.txt")
    }
    local = runs.read_stage(folder / "local", LOCAL_NOTEBOOK)["outputs"]
    return inputs | {
        "local features": runs.fingerprint(local),
        "ground truth": ground_truth.fingerprint,
    }


@dataclass(frozen=True, eq=False)
class _Shortlist:
    """A data set's global ranking and the images to verify for each query."""

    ground_truth: GroundTruth
    database: list[str]  # N names
    ranks: np.ndarray  # (K, Q)
    positions: Positions
    images: list[np.ndarray]  # per query database indices, in global order

    @classmethod
    def read(cls, folder: Path, ground_truth: GroundTruth, top: int) -> "_Shortlist":
        source = folder / "global"
        names = runs.read_json(source / "names.json")
        known = len(ground_truth.database)
        theirs = names["queries"], names["database"][:known]
        if theirs != (ground_truth.queries, ground_truth.database):
            raise runs.StageError(
                f"{source / 'names.json'} lists other images than the ground truth "
                f"{ground_truth.name}: run {GLOBAL_NOTEBOOK} again"
            )
        ranks = np.load(source / "ranks.npy", allow_pickle=False)
        try:
            images = search.shortlist(ranks, ground_truth, top=top)
        except ValueError as error:
            raise runs.StageError(
                f"{source / 'ranks.npy'}: {error}; run {GLOBAL_NOTEBOOK} and {LOCAL_NOTEBOOK} with "
                f"top={top}, or rerank fewer"
            ) from error
        listed = search.read_shortlist(source / "shortlist.txt")
        for query, row in zip(ground_truth.queries, images, strict=True):
            there = set(listed.get(query, ()))
            missing = [names["database"][i] for i in row if names["database"][i] not in there]
            if missing:
                raise runs.StageError(
                    f"top={top} needs {missing[0]} for query {query}, which "
                    f"{source / 'shortlist.txt'} lacks: run {GLOBAL_NOTEBOOK} and "
                    f"{LOCAL_NOTEBOOK} with top={top}, or rerank fewer"
                )
        positions = Positions.load(source / "positions.npz")
        return cls(ground_truth, names["database"], ranks, positions, images)

    @property
    def candidates(self) -> np.ndarray:
        """(Q, C) int32 database indices, padded with -1."""
        return _padded(self.images)


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    width = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), width), NOT_VERIFIED, np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _verified(
    folder: Path,
    listed: _Shortlist,
    local: Path,
    options: dict,
    place: dict,
    progress: bool,
) -> np.ndarray:
    """The inlier counts (Q, C) int32, padded with -1; written together with their candidates."""
    if not (folder / "inliers.npy").exists():
        store = FeatureStore.open(local.absolute())
        _check_store(store, listed)
        rows = _journalled(folder / JOURNAL, listed)
        _verify_queries(folder / JOURNAL, rows, listed, store, options, place, progress)
        runs.write_array(folder / "candidates.npy", listed.candidates)
        runs.write_array(folder / "inliers.npy", _padded([rows[q] for q in sorted(rows)]))
    shutil.rmtree(folder / JOURNAL, ignore_errors=True)
    return np.load(folder / "inliers.npy", allow_pickle=False)


def _check_store(store: FeatureStore, listed: _Shortlist) -> None:
    """Raises StageError where a query or a candidate has no entry in the store."""
    unreadable = store.failures
    database = set(listed.database)
    wanted = {query_key(query, database): query for query in listed.ground_truth.queries}
    wanted |= {
        listed.database[image]: listed.database[image]
        for images in listed.images
        for image in images
        if listed.database[image] not in unreadable
    }
    missing = [name for key, name in wanted.items() if key not in store]
    if missing:
        raise runs.StageError(
            f"{store.folder} has no local features of {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} of the short list: run "
            f"{LOCAL_NOTEBOOK} again"
        )


def _journalled(journal: Path, listed: _Shortlist) -> dict[int, np.ndarray]:
    """The counts of the queries that an interrupted run finished."""
    rows = {int(path.stem): np.load(path, allow_pickle=False) for path in journal.glob("*.npy")}
    return {q: row for q, row in rows.items() if row.shape == listed.images[q].shape}


def _verify_queries(
    journal: Path,
    rows: dict[int, np.ndarray],
    listed: _Shortlist,
    store: FeatureStore,
    options: dict,
    place: dict,
    progress: bool,
) -> None:
    """Verifies the queries that `rows` lacks and adds them to it and to the journal."""
    tasks = [
        (q, listed.ground_truth.queries[q], [listed.database[image] for image in images])
        for q, images in enumerate(listed.images)
        if q not in rows
    ]
    bar = dict(total=len(listed.images), initial=len(rows), desc="verifying short lists")
    # Processes, not threads: pydegensac draws from one random state a process.
    with cluster.parallel(**place, tasks=len(tasks)) as pool:
        results = pool(joblib.delayed(_verify_query)(store, *task, options) for task in tasks)
        for q, counts in tqdm(results, **bar, unit="query", disable=not progress):
            runs.write_array(journal / f"{q}.npy", counts)
            rows[q] = counts


def _verify_query(
    store: FeatureStore, q: int, query: str, names: list[str], options: dict
) -> tuple[int, np.ndarray]:
    """One query's inlier counts; candidates that could not be read count 0."""
    counts = np.zeros(len(names), np.int32)
    options = options | {"device": pick_device(options.get("device"))}
    readable = [place for place, name in enumerate(names) if name in store]
    features = (store[names[place]] for place in readable)
    pairs = inspect_shortlist(store.query(query), features, **options)
    for place in readable:
        try:
            counts[place] = next(pairs).verification.count
        except ValueError as error:
            raise ValueError(
                f"query {query} and database image {names[place]}, features in {store.folder}: "
                f"{error}"
            ) from error
    return q, counts


def _write_rankings(
    folder: Path, listed: _Shortlist, inliers: np.ndarray, top: int, ties: str
) -> list[str]:
    outputs = []
    for variant in VARIANTS:
        options = dict(candidates=listed.candidates, ground_truth=listed.ground_truth, top=top)
        options |= dict(protocol=variant, ties=ties if variant == PUBLISHED else "global")
        ranks = rerank(listed.ranks, inliers, **options)
        positions = rerank_positions(listed.positions, inliers, ranks=listed.ranks, **options)
        runs.write_array(folder / f"top_{variant}.npy", ranks)
        positions.save(folder / f"positions_{variant}.npz")
        outputs += [f"top_{variant}.npy", f"positions_{variant}.npz"]
    return outputs


def _write_scores(
    folder: Path, listed: _Shortlist, source: Path, parameters: dict, inputs: dict[str, str]
) -> None:
    earlier = runs.read_json(source / "scores.json")
    local = runs.read_stage(source.parent / "local", LOCAL_NOTEBOOK)
    known = earlier.get("fingerprints", {})
    passed_on = {key: known.get(key) for key in ("dataset", "weights", "descriptors")}
    passed_on["weights of the local features"] = local["inputs"].get("weights")
    places = {v: Positions.load(folder / f"positions_{v}.npz") for v in VARIANTS}
    ground_truth = listed.ground_truth
    document = scores_document(
        evaluate({protocol: places[protocol] for protocol in PROTOCOLS}, ground_truth),
        protocol=earlier.get("protocol", {})
        | {
            "reranked": True,
            "short_list": "a protocol's first candidates, without the images it ignores",
            "short_list_published": "the plain first candidates, junk counted 0",
            "ties": "global rank",
            "ties_published": parameters["ties"],
        },
        parameters=parameters,
        inputs=inputs | {name: value for name, value in passed_on.items() if value is not None},
        failed=earlier.get("failed_images", 0),
        ground_truth=ground_truth,
        earlier={"global": earlier.get("parameters", {}), "local": local["parameters"]},
        published=evaluate(places[PUBLISHED], ground_truth),
        **{"global": evaluate(listed.positions, ground_truth)},
    )
    runs.write_json(folder / "scores.json", document)


# What notebooks ask of a finished stage


def inlier_counts(folder: Path, query: int) -> dict[int, int]:
    """The inlier counts of one query: database index -> count. folder: `<dataset>/rerank`."""
    runs.read_stage(folder, "notebook 06_rerank")
    candidates = np.load(folder / "candidates.npy", mmap_mode="r")[query]
    counts = np.load(folder / "inliers.npy", mmap_mode="r")[query]
    known = candidates >= 0
    return dict(zip(candidates[known].tolist(), counts[known].tolist(), strict=True))


def hard_candidates(folder: Path, ground_truth: GroundTruth, query: int) -> list[int]:
    """The hard images of a query that were verified, most inliers first, ties by index."""
    counts = inlier_counts(folder, query)
    hard = [image for image in ground_truth.hard[query].tolist() if image in counts]
    return sorted(hard, key=lambda image: (-counts[image], image))


def pair_features(
    features: FeatureStore, ground_truth: GroundTruth, query: int, image: int
) -> tuple[LocalFeatures, LocalFeatures]:
    """The stored features of a query and of a database image, both given by index."""
    key = query_key(ground_truth.queries[query], ground_truth.database)
    return features[key], features[ground_truth.database[image]]
