"""Copies and near copies: pairs of images whose pixels agree once one is moved onto the other.

A copy was cut out, resized, recompressed, mirrored, turned, recoloured or framed. Two photographs
of one landmark fit one homography on its facade alone; copies agree wherever they overlap, sky and
passers-by included.
"""

import functools
import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vitgal.retrieval.exact_search import QUERIES, block_slices, search
from vitgal.retrieval.matching import match
from vitgal.retrieval.verification import verify

SIDE = 400  # pixels of the longer side at which two images are compared
FEATURES = 600
RATIO = 0.85  # of the nearest descriptor's distance to the next one's
THRESHOLD = 3.0  # pixels, of RANSAC
WINDOW = 15  # pixels of a side, within which brightness may change by a factor and an offset
TEXTURE = 8.0  # grey levels: least deviation of a window that is compared
CORRELATION = 0.9  # of a window that agrees
# This and the next numbers were chosen on photographs of ten places and of Paris: docs/audit.md.
AGREEMENT = 0.82  # least share of the windows of a copy that agree
LEAST_SHARED = 0.08  # of the larger image's area
LEAST_INLIERS = 12  # of two images of one place
FLAT = 12.0  # grey levels: greatest deviation in a border of one colour
CAPTION = 0.25  # of the shared height: greatest of a caption at the upper or lower edge
BENT = 0.03  # of the diagonal: greatest distance of a corner from where a similarity moves it
RECOLOURED = 5.0  # grey levels: median difference of two copies' colours
SAME = 0.03  # of an area, or a factor: what two images of the same extent may differ by
TURNED = 2.0  # degrees


def copy_candidates(
    descriptors: np.ndarray, mirrored: np.ndarray, database: np.ndarray | None = None, *, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs images with their most similar ones, as they are and mirrored.

    descriptors, mirrored: (N, D) floats of the images and of their mirror images. database: (M, D)
    of other images; None: these same. All may be memory-mapped. Returns (P, 3) int64: image, image
    of the database, 1 where one is mirrored; sorted, among the same images each pair once, the
    lower one first; and their similarities (P,) float32. Memory as for `search`, and 120 bytes a
    pair; no image gives (0, 3).
    """
    same = database is None
    database = descriptors if same else database
    parts, scores = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.float32)]
    for flag, queries in enumerate((descriptors, mirrored)):
        for part in block_slices(len(queries) if len(database) else 0, QUERIES):
            rows = np.asarray(queries[part], np.float32)
            similarities, ranks = search(rows, database, k=count + same)
            scores.append(similarities.ravel())
            images = np.tile(np.arange(part.start, part.stop), len(ranks))
            parts.append(np.stack([images, ranks.ravel(), np.full(images.size, flag)], axis=1))
    pairs, similarities = np.concatenate(parts), np.concatenate(scores)
    if same:
        pairs[:, :2].sort(axis=1)
        others = pairs[:, 0] != pairs[:, 1]
        pairs, similarities = pairs[others], similarities[others]
    pairs, kept = np.unique(pairs, axis=0, return_index=True)
    return pairs, similarities[kept]


def group_pairs(pairs: np.ndarray, count: int) -> np.ndarray:
    """Numbers the groups (count,) int64 that pairs (P, 2) connect, by their first image."""
    ones = np.ones(len(pairs), bool)
    graph = coo_array((ones, tuple(np.reshape(pairs, (-1, 2)).T)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


@dataclass(frozen=True, eq=False)
class View:
    """An image as it is compared, reduced to SIDE pixels at most.

    pixels: (h, w, 3) uint8 RGB. points: (n, 2) float32 (x, y), (0, 0) the centre of the first
    pixel. descriptors: (n, 128) float32, RootSIFT. size: (height, width) of the image.
    """

    pixels: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray
    size: tuple[int, int]

    @classmethod
    def of(cls, image: np.ndarray) -> "View":
        """Reduces an image (H, W, 3) uint8 RGB and finds its features, perhaps none."""
        factor = min(1.0, SIDE / max(image.shape[:2]))
        height, width = (max(1, round(side * factor)) for side in image.shape[:2])
        pixels = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        detector = cv2.SIFT_create(FEATURES, contrastThreshold=0.01, enable_precise_upscale=True)
        keypoints, histograms = detector.detectAndCompute(grey, None)
        points = np.array([keypoint.pt for keypoint in keypoints], np.float32).reshape(-1, 2)
        if histograms is None:
            histograms = np.zeros((0, 128), np.float32)
        sums = np.maximum(histograms.sum(axis=1, keepdims=True), 1)
        return cls(pixels, points, np.sqrt(histograms / sums), image.shape[:2])

    @functools.cached_property
    def mirrored(self) -> "View":
        """The view of the image mirrored left to right."""
        view = View.of(np.ascontiguousarray(self.pixels[:, ::-1]))
        return View(view.pixels, view.points, view.descriptors, self.size)


@dataclass(frozen=True)
class Comparison:
    """What two images share, the second perhaps mirrored before.

    inliers: matched features that one homography explains. agreement: share of the textured windows
    of the shared area whose pixels correlate. shared: the shared area as a part of the first and of
    the second image. changes: what makes the second of the first, in words; empty where they are
    the same. probability: that both show one place, by a model of presence; 0 without one.
    """

    inliers: int
    agreement: float
    shared: tuple[float, float]
    changes: tuple[str, ...] = ()
    probability: float = 0.0

    @property
    def is_copy(self) -> bool:
        """Whether the one was made of the other, or both of a third."""
        return self.agreement >= AGREEMENT and max(self.shared) >= LEAST_SHARED

    @property
    def is_place(self) -> bool:
        """Whether both show one place, as copies do."""
        return self.is_copy or self.inliers >= LEAST_INLIERS


NOTHING = Comparison(0, 0.0, (0.0, 0.0))


def compare_views(first: View, second: View, *, mirrored: bool = False) -> Comparison:
    """Compares two images; mirrored: the second is mirrored before.

    First without features, the one stretched over the other, then under the homography of matched
    features. Images that share nothing give no agreement.
    """
    second = second.mirrored if mirrored else second
    stretched = np.diag([*np.divide(second.pixels.shape[1::-1], first.pixels.shape[1::-1]), 1.0])
    best = _overlap(first, second, stretched, mirrored, inliers=0)
    if best.is_copy:
        return best
    matches = match(
        first.descriptors, second.descriptors, math.inf, method="mutual_ratio", ratio=RATIO
    )
    points = first.points[matches[:, 0]], second.points[matches[:, 1]]
    fit = verify(*points, "magsac", THRESHOLD, 2000, 0.999)
    if fit.count < LEAST_INLIERS // 2 or not _plausible(fit.homography, first.pixels.shape):
        return NOTHING
    return _overlap(first, second, fit.homography, mirrored, inliers=fit.count)


def _corners(shape: tuple[int, ...]) -> np.ndarray:
    height, width = shape[:2]
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)


def _plausible(homography: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a homography keeps the outline of an image (h, w) convex and unmirrored."""
    moved = np.column_stack([_corners(shape), np.ones(4)]) @ homography.T
    if (moved[:, 2] <= 1e-6).any():
        return False
    moved = moved[:, :2] / moved[:, 2:]
    sides = np.roll(moved, -1, axis=0) - moved
    after = np.roll(sides, -1, axis=0)
    return bool((sides[:, 0] * after[:, 1] - sides[:, 1] * after[:, 0] > 0).all())


def _overlap(
    first: View, second: View, homography: np.ndarray, mirrored: bool, inliers: int
) -> Comparison:
    """Compares the pixels where the first image lies under a homography on the second."""
    # In the frame of the coarser one: enlarged pixels would correlate with nothing.
    swapped = abs(np.linalg.det(homography[:2, :2])) > 1
    target, moved = (first, second) if swapped else (second, first)
    onto = np.linalg.inv(homography) if swapped else homography
    pixels, inside = _moved(moved.pixels, onto, target.pixels.shape)
    if inside.sum() < WINDOW**2:
        return NOTHING
    agreement, caption = _agreement(*_correlated(target.pixels, pixels, inside), inside)
    if _bent(homography, first.pixels.shape):
        agreement = 0.0
    back = _moved(target.pixels, np.linalg.inv(onto), moved.pixels.shape)[1]
    masks = (inside, back) if swapped else (back, inside)
    result = Comparison(inliers, agreement, (float(masks[0].mean()), float(masks[1].mean())))
    if not result.is_copy:
        return result
    # The colours of small details differ wherever the images are shifted by half a pixel.
    colours = [cv2.blur(image, (WINDOW, WINDOW)).astype(np.float32)[inside]
               for image in (target.pixels, pixels)]  # fmt: skip
    changes = [
        *(["mirrored"] if mirrored else []),
        *_extent_changes((first, second), masks, result.shared),
        *_size_changes(homography, first, second),
        *(["a caption"] if caption else []),
        *(["recoloured"] if np.median(np.abs(colours[0] - colours[1])) > RECOLOURED else []),
    ]
    return replace(result, changes=tuple(changes))


def _moved(image: np.ndarray, onto: np.ndarray, shape: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image (h, w, 3) moved into another frame, and where it lies there, (H, W) bool."""
    size = shape[1::-1]
    whole = np.full(image.shape[:2], 255, np.uint8)
    inside = cv2.warpPerspective(whole, onto, size, flags=cv2.INTER_NEAREST) > 0
    return cv2.warpPerspective(image, onto, size, flags=cv2.INTER_AREA), inside


def _extent_changes(
    views: tuple[View, View], masks: tuple[np.ndarray, np.ndarray], shared: tuple[float, float]
) -> list[str]:
    """Says in words which part of the first image the second shows, and what it adds."""
    whole = [part >= 1 - SAME for part in shared]
    border = [
        mask.any() and not mask.all() and view.pixels[~mask].std(axis=0).max() < FLAT
        for view, mask in zip(views, masks, strict=True)
    ]
    if whole[0] and not whole[1]:
        return ["a border" if border[1] else f"the first is {shared[1]:.0%} of it"]
    if whole[1] and not whole[0]:
        return ["without border" if border[0] else f"cut to {shared[0]:.0%}"]
    return [] if whole[0] else [f"cut elsewhere, {min(shared):.0%} shared"]


def _size_changes(homography: np.ndarray, first: View, second: View) -> list[str]:
    """Says in words how much larger or smaller the second shows the same, and whether turned."""
    across, factor = homography[:2, 0], np.sqrt(abs(np.linalg.det(homography[:2, :2])))
    enlarged = [max(view.size) / max(view.pixels.shape[:2]) for view in (first, second)]
    factor *= enlarged[1] / enlarged[0]
    changes = [] if abs(factor - 1) < SAME else [f"{factor:.2f} times the size"]
    angle = np.degrees(np.arctan2(across[1], across[0]))
    return changes + ([f"turned by {angle:.0f} degrees"] if abs(angle) > TURNED else [])


def _bent(homography: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a homography slants an image (h, w): a camera has moved, and no copy was made.

    A copy is turned, moved and scaled, both sides by a factor of their own.
    """
    moved = cv2.perspectiveTransform(_corners(shape)[None], homography)[0]
    across = (moved[1] + moved[2] - moved[0] - moved[3]) / 2
    down = (moved[2] + moved[3] - moved[0] - moved[1]) / 2
    diagonal = np.hypot(*(moved[2] - moved[0]))
    # A parallelogram's corners add up; a rectangle's sides are at right angles.
    twist = np.hypot(*(moved[0] - moved[1] + moved[2] - moved[3])) / 4
    slant = abs(across @ down) / max(np.hypot(*across), np.hypot(*down), 1e-9) / 2
    return max(twist, slant) > BENT * diagonal


def _agreement(agrees: np.ndarray, textured: np.ndarray, inside: np.ndarray) -> tuple[float, bool]:
    """Returns the share of textured windows (h, w) that agree, and whether a caption was left out.

    A caption is a band of up to CAPTION of the shared height at its upper or lower edge.
    """
    rows = np.flatnonzero(inside.any(axis=1))
    band = int(CAPTION * (rows[-1] + 1 - rows[0]))
    parts = slice(None), slice(rows[0] + band, None), slice(0, rows[-1] + 1 - band)
    shares = [agrees[part][textured[part]].mean() if textured[part].any() else 0 for part in parts]
    caption = max(shares[1:]) > shares[0] + CAPTION / 4
    return float(max(shares) if caption else shares[0]), caption


def _correlated(
    first: np.ndarray, second: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, w) bool: windows that correlate, and windows with enough texture to tell."""
    one, other = (
        cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 1.0).astype(np.float32)
        for image in (first, second)
    )
    window = (WINDOW, WINDOW)
    mean, mean_other = cv2.blur(one, window), cv2.blur(other, window)
    variance = np.maximum(cv2.blur(one * one, window) - mean**2, 0)
    variance_other = np.maximum(cv2.blur(other * other, window) - mean_other**2, 0)
    covariance = cv2.blur(one * other, window) - mean * mean_other
    whole = cv2.erode(inside.astype(np.uint8), np.ones(window, np.uint8), borderValue=0) > 0
    textured = whole & (np.maximum(variance, variance_other) >= TEXTURE**2)
    return covariance > CORRELATION * np.sqrt(variance * variance_other), textured
