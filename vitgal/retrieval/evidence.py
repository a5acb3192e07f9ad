"""Whether the homography of a verified pair is plausible."""

from dataclasses import dataclass

import cv2
import numpy as np

from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import PairInspection

# A homography that leaves less than this share of the query's area shrinks it to a spot: its sides
# would have a fifth of their lengths. There is no upper limit: near the horizon areas grow large.
LEAST_AREA = 0.04
# The least share of the database image that the inliers cover: points on a line, or on one spot, do
# not determine a homography.
LEAST_SPREAD = 0.002
# Inliers per feature of the database image above which the query has collapsed onto few features.
MOST_SHARED = 4
# Matches per feature of the database image above which its texture is called repeated.
REPEATED = 4

KINDS = {
    "mirrored": "mirror image",
    "collapsed": "collapsed onto {features} features",
    "outline": "outline {area} the query",
    "spread": "inliers on {spread} the image",
}


@dataclass(frozen=True)
class Evidence:
    """What supports the homography of a pair, and what makes it implausible.

    Attributes:
        matches, inliers: their numbers.
        partners: different features of the database image among the matches.
        features: different features among the inliers, on the side that has fewer.
        orientation: 1 where the homography keeps the orientation at most inliers, -1 where it
            mirrors the image there, 0 without a homography.
        area: of the query's outline under the homography, as a multiple of the query's area; where
            the horizon cuts the outline, of a small piece around the middle of the inliers; 0
            without a homography.
        spread: area of the inliers' convex hull in the database image, as a share of the image; nan
            where the size of the network input is unknown.
    """

    matches: int
    inliers: int
    partners: int
    features: int
    orientation: int
    area: float
    spread: float

    @property
    def kind(self) -> str:
        """What makes the homography implausible, a key of KINDS; "" where nothing does."""
        if not self.inliers:
            return ""
        if self.orientation < 0:
            return "mirrored"
        if self.inliers > MOST_SHARED * self.features:
            return "collapsed"
        if self.area < LEAST_AREA:
            return "outline"
        return "spread" if self.spread < LEAST_SPREAD else ""

    @property
    def doubt(self) -> str:
        """The reason why the homography is implausible, in words; "" where there is none."""
        if not self.kind:
            return ""
        return KINDS[self.kind].format(
            features=self.features, area=_times(self.area), spread=_times(self.spread)
        )

    @property
    def repeated(self) -> bool:
        """Whether the matches share few features of the database image, as on repeated texture."""
        return self.matches > REPEATED * self.partners

    def count(self, kind: str) -> int:
        """Returns the number of "inliers", or of "features" among them."""
        return self.features if kind == "features" else self.inliers

    def believed(self, kind: str) -> int:
        """Returns `count`, or 0 where there is a doubt."""
        return 0 if self.kind else self.count(kind)


def _times(share: float) -> str:
    return f"{share:.2g} times" if share > 1 else f"{100 * share:.2g} % of"


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
    """1 or -1: the sign of the Jacobian at most of the points (N, 2)."""
    # The determinant of the Jacobian at a point of depth w is det(H) / w^3. A horizon among the
    # inliers alone is no doubt: on validation, right images of few inliers have it as well.
    signs = np.sign(np.linalg.det(homography) * _depths(homography, points))
    return 1 if signs.sum() >= 0 else -1


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
