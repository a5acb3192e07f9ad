"""Evidence of pairs whose homographies are known."""

from dataclasses import replace

import numpy as np
import pytest

from tests.retrieval_cases import image_pair, local_features
from vitgal.retrieval.evidence import Evidence, weigh
from vitgal.retrieval.verification import PairInspection, Verification, inspect_pair
from vitgal.settings import MatchingSettings, RerankingSettings, VerificationSettings

GRID = np.stack(np.meshgrid(np.arange(56.0, 500, 100), np.arange(56.0, 500, 100)), -1).reshape(
    -1, 2
)


def pair_under(homography: np.ndarray, partners: np.ndarray | None = None) -> Evidence:
    """25 features in a grid, each matched with the same place under the homography.

    partners: (25,) indices of the database's features; None: each its own.
    """
    mapped = np.column_stack([GRID, np.ones(25)]) @ np.asarray(homography, float).T
    database = local_features(mapped[:, :2] / mapped[:, 2:], np.eye(25))
    partners = np.arange(25) if partners is None else partners
    verification = Verification(np.ones(25, bool), np.asarray(homography, float))
    pair = PairInspection(np.stack([np.arange(25), partners], axis=1), verification)
    return weigh(local_features(GRID, np.eye(25)), database, pair)


def test_the_evidence_of_a_scaled_and_moved_view():
    half = pair_under([[0.5, 0, 30], [0, 0.5, 10], [0, 0, 1]])
    assert (half.matches, half.inliers, half.partners, half.features) == (25, 25, 25, 25)
    assert half.orientation == 1 and half.area == pytest.approx(0.25, rel=1e-4)
    # The outer grid points are 400 pixels apart, 200 in the database image of 512 x 512.
    assert half.spread == pytest.approx(200**2 / 512**2)
    assert half.doubt == "" and not half.repeated
    assert half.believed("inliers") == half.believed("features") == 25


@pytest.mark.parametrize(
    "homography, doubt",
    [
        ([[-1, 0, 512], [0, 1, 0], [0, 0, 1]], "mirror image"),
        ([[0.1, 0, 200], [0, 0.2, 200], [0, 0, 1]], "outline 2 % of the query"),
        # The line x = 120 is the horizon: four columns of the grid lie behind it, mirrored.
        ([[1, 0, 0], [0, 1, 0], [-1 / 120, 0, 1]], "mirror image"),
    ],
)
def test_homographies_that_no_view_explains_are_doubted(homography, doubt):
    evidence = pair_under(homography)
    assert evidence.doubt == doubt
    assert evidence.inliers == evidence.count("inliers") == 25  # the published count stays
    assert evidence.believed("inliers") == evidence.believed("features") == 0


def test_a_horizon_outside_the_inliers_leaves_the_middle_to_judge():
    # The horizon x = 490 cuts the query's outline, right of the last column at 456.
    evidence = pair_under([[1, 0, 0], [0, 1, 0], [-1 / 490, 0, 1]])
    assert evidence.orientation == 1
    assert evidence.area == pytest.approx((1 - 256 / 490) ** -3)  # det(H) is 1; depth at x = 256


def test_a_collapse_onto_few_features():
    collapsed = pair_under(np.eye(3), np.arange(25) % 5)
    assert (collapsed.inliers, collapsed.features, collapsed.partners) == (25, 5, 5)
    assert collapsed.doubt == "collapsed onto 5 features" and collapsed.repeated
    assert collapsed.count("features") == 5 and collapsed.believed("features") == 0
    shared = pair_under(np.eye(3), np.arange(25) % 10)
    assert shared.doubt == "" and shared.believed("features") == 10
    assert shared.believed("inliers") == 25


def test_evidence_without_inliers():
    query, database = local_features(GRID, np.eye(25)), local_features(GRID[:0], np.empty((0, 25)))
    for pair in (
        inspect_pair(query, database, RerankingSettings()),
        PairInspection(np.array([[3, 4], [5, 4]]), Verification(np.zeros(2, bool), None)),
    ):
        evidence = weigh(query, query, pair)
        assert evidence.matches == len(pair.matches) and evidence.partners == min(
            1, len(pair.matches)
        )
        assert (evidence.inliers, evidence.features, evidence.orientation) == (0, 0, 0)
        assert evidence.believed("inliers") == 0 and evidence.doubt == ""


@pytest.mark.parametrize("estimator", ["degensac", "magsac", "poselib"])
def test_a_planted_view_is_believed(estimator):
    query, database = image_pair(30, 30)
    settings = RerankingSettings(
        matching=MatchingSettings(max_distance=0.5),
        verification=VerificationSettings(estimator=estimator),
    )
    evidence = weigh(query, database, inspect_pair(query, database, settings))
    assert evidence.doubt == "" and evidence.believed("features") == 30
    # PLANTED's determinant is 0.9945; depths fall from 1.06 to 1 over the image.
    assert 0.8 < evidence.area < 1.0 and evidence.spread > 0.3


def test_features_of_unknown_input_size_have_no_outline_and_no_spread():
    query = replace(local_features(GRID, np.eye(25)), input_size=(0, 0))
    matches = np.stack([np.arange(25)] * 2, axis=1)
    pair = PairInspection(matches, Verification(np.ones(25, bool), np.diag([2.0, 2, 1])))
    evidence = weigh(query, query, pair)
    assert evidence.area == pytest.approx(4) and np.isnan(evidence.spread) and not evidence.doubt
