"""How far the homography of a verified pair can be believed."""

from dataclasses import dataclass

import cv2
import numpy as np

from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import PairInspection

# A homography that leaves less of the query's area, or as many times more, is no view of it: the
# longer side would be seen at less than a fifth of its size or at more than five times.
LEAST_AREA = 0.04
# The same of the share of the database image over which its inliers spread: points on a line, or on
# one spot, do not fix a homography.
LEAST_SPREAD = 0.002
# Inliers a feature of the database image, above which the query has collapsed onto few features.
MOST_SHARED = 4
# Matches a feature of the database image, above which its texture is called repeated.
REPEATED = 4


@dataclass(frozen=True)
class Evidence:
    """What supports the homography of a pair, and what speaks against it.

    Attributes:
        matches, inliers: their numbers.
        partners: different features of the database image among the matches.
        features: different features among the inliers, on the side that has fewer.
        orientation: 1 where the homography keeps it at every inlier, -1 where it mirrors the image,
            0 where the inliers lie on both sides of its horizon, or without a homography.
        area: of the query's outline under the homography, in areas of the query; where the horizon
            cuts the outline, of a small piece around the middle of the inliers; 0 without one.
        spread: the convex hull of the inliers in the database image, as a share of its area; nan
            where the size of the network's input is unknown.
    """

    matches: int
    inliers: int
    partners: int
    features: int
    orientation: int
    area: float
    spread: float

    @property
    def doubt(self) -> str:
        """The reason not to believe the homography, in words; "" where there is none."""
        if not self.inliers:
            return ""
        if self.orientation < 0:
            return "mirror image"
        if self.orientation == 0:
            return "inliers on both sides of the horizon"
        if self.inliers > MOST_SHARED * self.features:
            return f"collapsed onto {self.features} features"
        if not LEAST_AREA <= self.area <= 1 / LEAST_AREA:
            return f"outline {_times(self.area)} the query's area"
        if self.spread < LEAST_SPREAD:
            return f"inliers on {_times(self.spread)} the image"
        return ""

    @property
    def repeated(self) -> bool:
        """Whether the matches share few features of the database image, as on repeated texture."""
        return self.matches > REPEATED * self.partners

    def count(self, kind: str) -> int:
        """Returns the number of "inliers", or of "features" among them."""
        return self.features if kind == "features" else self.inliers

    def believed(self, kind: str) -> int:
        """Returns `count`, or 0 where there is a doubt."""
        return 0 if self.doubt else self.count(kind)


def _times(share: float) -> str:
    return f"{share:.0f} times" if share > 10 else f"{100 * share:.2g} % of"


def weigh(query: LocalFeatures, database: LocalFeatures, pair: PairInspection) -> Evidence:
    """Weighs the evidence of a pair that was matched and verified.

    query, database: the features that the matches point into. Without inliers all but the numbers
    of matches and partners is 0.
    """
    matches, verification = pair.matches, pair.verification
    partners = np.unique(matches[:, 1]).size
    homography = verification.homography
    if homography is None or not verification.count:
        return Evidence(len(matches), 0, partners, 0, 0, 0.0, 0.0)
    inliers = matches[verification.inliers]
    indices = np.unique(inliers[:, 0]), np.unique(inliers[:, 1])
    points = query.keypoints[indices[0]].astype(np.float64)
    height, width = database.input_size
    hull = cv2.convexHull(database.keypoints[indices[1]])
    return Evidence(
        matches=len(matches),
        inliers=verification.count,
        partners=partners,
        features=min(map(len, indices)),
        orientation=_orientation(homography, points),
        area=_area(homography, points, query.input_size),
        spread=cv2.contourArea(hull) / (height * width) if height * width else np.nan,
    )


def _orientation(homography: np.ndarray, points: np.ndarray) -> int:
    """1, -1, or 0 where the signs of the Jacobian at points (N, 2) differ."""
    # The determinant of the Jacobian at a point of depth w is det(H) / w^3.
    signs = np.sign(np.linalg.det(homography) * _depths(homography, points))
    return int(signs[0]) if (signs == signs[0]).all() else 0


def _area(homography: np.ndarray, points: np.ndarray, size: tuple[int, int]) -> float:
    """The area of the outline of a query of size (h, w), in areas of it, as `Evidence.area`."""
    height, width = size
    box = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    depths = _depths(homography, box)
    if height * width and depths.min() * depths.max() > 0:
        outline = (np.column_stack([box, np.ones(4)]) @ homography.T)[:, :2] / depths[:, None]
        return cv2.contourArea(outline.astype(np.float32)) / (height * width)
    depth = abs(_depths(homography, points.mean(axis=0)[None])[0])
    return float(abs(np.linalg.det(homography)) / depth**3) if depth else np.inf


def _depths(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ homography[2, :2] + homography[2, 2]
