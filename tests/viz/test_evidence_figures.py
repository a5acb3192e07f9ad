"""Enlarged patches, the warped query, attention and inliers."""

import numpy as np
import pytest

from tests.viz.drawn_samples import features, picture
from tests.viz.test_matching_figures import compared, points_of
from vitgal.viz import evidence_figures, matching
from vitgal.viz.matching import MatchedImage


def test_inlier_rates_are_counted_by_score():
    # Ranks of the scores: feature 1 lowest, then 3, 0, 2: in tenths 0, 2, 5 and 7
    scores = np.array([0.3, 0.1, 0.9, 0.2])
    matches = np.array([[0, 5], [1, 5], [3, 0], [2, 1]])
    shares, numbers = evidence_figures.inlier_rate_by_score(
        scores, matches, np.array([True, False, True, True])
    )
    assert numbers.tolist() == [1, 0, 1, 0, 0, 1, 0, 1, 0, 0]
    assert shares[[0, 2, 5, 7]].tolist() == [0, 1, 1, 1] and np.isnan(shares[numbers == 0]).all()
    shares, numbers = evidence_figures.inlier_rate_by_score(
        np.zeros(0), np.zeros((0, 2), int), np.zeros(0, bool)
    )
    assert np.isnan(shares).all() and numbers.sum() == 0 and len(numbers) == 10


def test_enlarged_matches_are_the_best_of_left_middle_and_right():
    drawn = features([(5 * x, 8) for x in range(7)], scores=np.array([1, 3, 2, 9, 4, 5, 6.0]))
    matches = np.array([[index, 0] for index in (6, 0, 1, 5, 2, 4)])
    # by place 0 1 | 2 4 | 5 6: the best scores are 1, 4 and 6
    assert evidence_figures.spread_matches(matches, drawn)[:, 0].tolist() == [1, 4, 6]
    assert len(evidence_figures.spread_matches(matches[:1], drawn)) == 1
    assert evidence_figures.spread_matches(matches[:0], drawn).shape == (0, 2)


def test_the_warped_query_lies_where_the_homography_puts_it():
    query, database = picture(40, 60, 10), picture(80, 100, 200)
    query[10:20, 20:30] = 250  # seen at (40, 25) to (60, 45): twice as large, 5 down
    double = np.array([[2, 0, 0], [0, 2, 5], [0, 0, 1.0]])
    sides = [MatchedImage(image, points_of(image, [[3, 3]]), "") for image in (query, database)]
    warps = evidence_figures._warps(*sides, double)
    warped = warps["query, warped"][..., 0]
    assert (warped[27:43, 42:58] == 250).all() and (warped[8:20] == 10).all()
    assert (warped[:4] == 235).all()  # not covered by the query
    assert (warps["database image"] == 200).all()
    mixed = warps["checkerboard of both"][..., 0]
    assert set(np.unique(mixed[:4]).tolist()) == {200} and (mixed == 250).any()
    assert evidence_figures._warps(*sides, None) == {}


def test_a_pair_without_inliers_has_its_matches_alone():
    image = picture(40, 60)
    side = MatchedImage(image, points_of(image, [[3, 3], [20, 9]]), "a")
    pair = compared([[0, 0], [1, 1]], [False, False], None)
    assert len(evidence_figures.match_figure(side, side, pair, max_lines=9)) == 1
    inlying = compared([[0, 0], [1, 1]], [True, False], np.eye(3))
    assert len(evidence_figures.match_figure(side, side, inlying, max_lines=9)) == 3
    wrong = compared([[0, 0], [1, 1]], [True], None)
    with pytest.raises(ValueError, match="2 matches, but inliers of shape"):
        evidence_figures.match_figure(side, side, wrong, max_lines=9)


def test_sky_is_the_smooth_area_that_reaches_the_upper_edge():
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    image[:50] = 200  # sky
    image[80:100, 40:120] = 90  # a smooth wall, which does not reach it
    mask = matching.sky(image)
    assert mask[:44].all() and not mask[56:].any()
    assert not matching.sky(image[60:]).any()
    assert matching.sky(picture(1, 1)).shape == (1, 1)


def test_near_points_have_near_colours():
    colours = matching.position_colours(np.array([[0, 0], [1, 0], [90, 0], [0, 100]]), (100, 100))
    assert np.abs(colours[0] - colours[1]).max() < 0.1 < np.abs(colours[0] - colours[2]).max()
    assert colours[3].max() == pytest.approx(0.6)  # darker below
