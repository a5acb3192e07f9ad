"""Keypoints, matches and inliers on photographs."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.viz.drawn_samples import features, picture, texts
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import PairInspection, Verification
from vitgal.viz import matching
from vitgal.viz.matching import MatchedImage


def test_keypoints_are_squares_of_a_patch():
    drawn = features([(8, 8), (100, 50)], scales=np.array([1.0, 0.5], np.float32))
    axes = matching.keypoints(picture(150, 240), drawn)
    # An input pixel is half a pixel wide and one high. The first patch is the crop's corner: its
    # 16 x 16 input pixels cover 8 x 16 pixels from the corner's edge (29.5, 39.5).
    best, second = (path.get_extents().extents for path in axes.collections[-1].get_paths()[::-1])
    assert best == pytest.approx([29.5, 39.5, 37.5, 55.5])
    # twice as large round (30 + 50 - 0.5, 40 + 50 - 0.5)
    assert second == pytest.approx([79.5 - 8, 89.5 - 16, 79.5 + 8, 89.5 + 16])
    sky = "; sky (white line): 100% of the box, 100% of them"
    assert axes.get_title() == f"2 local features{sky}"
    assert axes.patches[0].get_bbox().extents == pytest.approx(
        [29.5, 39.5, 229.5, 139.5]
    )  # the box
    assert axes.child_axes  # the scale of the scores


def test_keypoints_cope_with_unknowns():
    nans = np.full(3, np.nan, np.float32)
    axes = matching.keypoints(picture(150, 240), features([(8, 8)] * 3, scores=nans, scales=nans))
    assert axes.collections[-1].get_paths()[0].get_extents().width == pytest.approx(8)
    assert not axes.child_axes
    axes = matching.keypoints(picture(150, 240), features([]))
    assert axes.get_title() == "0 local features" and not axes.collections


def test_feature_counts_are_counted():
    counts = [0, 10, 10, 300]
    images, by_scale = matching.feature_counts(counts, np.float32([0.7071, 0.5, 0.7071, np.nan]))
    assert [bar.get_height() for bar in images.patches if bar.get_height()] == [1, 2, 1]
    assert images.get_title("left") == "320 features of 4 images"
    assert [bar.get_height() for bar in by_scale.patches] == [1, 2, 1]
    by_scale.figure.draw_without_rendering()
    labels = [tick.get_text() for tick in by_scale.get_xticklabels()]
    assert labels == ["0.5", "0.7071", "nan"]
    assert matching.feature_counts([], [])[1].get_title("left").startswith("0 features")


INCHES = 8.42 / 150  # of a pixel, where photographs of 100 and 50 columns lie side by side


def points_of(image: np.ndarray, points: list, box: tuple | None = None) -> LocalFeatures:
    """Features at these pixels of a photograph that the network saw in its own size."""
    height, width = image.shape[:2]
    sizes = {"input_size": (height, width), "image_size": (height, width)}
    shifted = np.array(points, float).reshape(-1, 2) + 0.5
    if box is not None:
        sizes["input_size"] = (box[3] - box[1], box[2] - box[0])
        shifted -= box[:2]
    return features(shifted, box=box or (0, 0, width, height), **sizes)


def compared(pairs: object, inliers: object, homography: np.ndarray | None) -> PairInspection:
    inliers = np.array(inliers, bool)
    verification = Verification(inliers, homography)
    return PairInspection(np.array(pairs, int).reshape(-1, 2), verification)


def draw_matches(homography: np.ndarray | None = None, box=None) -> plt.Axes:
    """A photograph of 100 x 50 pixels beside one of 50 x 50, at one height."""
    first, second = picture(50, 100), picture(50, 50)
    query = points_of(first, [[0, 0], [99, 49], [49.5, 24.5]], box)
    database = points_of(second, [[24.5, 24.5], [0, 0]])
    return matching.match_lines(
        MatchedImage(first, query, "query"),
        MatchedImage(second, database, "database image"),
        compared([[2, 0], [1, 1]], [True, False], homography),
    )


def test_matches_join_the_right_places():
    axes = draw_matches()
    extents = np.array([image.get_extent() for image in axes.images])
    second = 100 * INCHES + 0.08
    assert extents[0] == pytest.approx([0, 100 * INCHES, 50 * INCHES, 0])
    assert extents[1] == pytest.approx([second, second + 50 * INCHES, 50 * INCHES, 0])
    rejected, accepted = (np.array(lines.get_segments()) for lines in axes.collections[:2])
    assert accepted[0] == pytest.approx(  # centre to centre
        np.array([[50, 25], [125, 25]]) * INCHES + [[0, 0], [0.08, 0]]
    )
    assert rejected[0] == pytest.approx(
        np.array([[99.5, 49.5], [100.5, 0.5]]) * INCHES + [[0, 0], [0.08, 0]]
    )
    assert axes.get_title() == "1 inliers of 2 matches"
    assert texts(axes) == ["query", "database image"]


def test_matches_project_the_box():
    # From the input frame of the box, whose corner is (0, 0), to half its coordinates
    halve = np.array([[0.5, 0, 5], [0, 0.5, 5], [0, 0, 1]])
    query, database = draw_matches(halve, box=(10, 10, 50, 30)).patches
    expected = np.array([[10, 10], [50, 10], [50, 30], [10, 30], [10, 10]]) * INCHES
    second = 100 * INCHES + 0.08  # the left edge of the second photograph
    assert query.get_xy() == pytest.approx(expected)
    assert database.get_xy() == pytest.approx(expected / 2 + [second, 0])
    axes = draw_matches(np.eye(3))
    whole, cut = axes.patches
    ends = np.array([100, 50]) * INCHES  # of the first photograph
    assert whole.get_xy().max(axis=0) == pytest.approx(ends - 0.02)  # drawn within the edges
    # twice as wide as the database image: its edges are drawn there
    corner, opposite = np.array([second, 0]), np.array([second, 0]) + 50 * INCHES
    assert cut.get_xy().min(axis=0) == pytest.approx(corner + 0.02)
    assert cut.get_xy().max(axis=0) == pytest.approx(opposite - 0.02)
    edges = axes.transData.inverted().transform(cut.get_clip_box().corners()[[0, 3]])
    assert np.sort(edges, axis=0) == pytest.approx(np.array([corner, opposite]))


def test_matches_without_a_sensible_outline():
    horizon = np.array([[1, 0, 0], [0, 1, 0], [-0.02, 0, 1]])  # w = 0 at x = 50
    assert len(draw_matches(horizon).patches) == 1
    assert len(draw_matches(np.full((3, 3), np.nan)).patches) == 1
    assert len(draw_matches(-np.eye(3)).patches) == 2  # scale and sign are free
    assert len(draw_matches().patches) == 1  # the query's box alone


def test_matches_beside_a_panorama_stay_legible():
    first, second = picture(10, 1000), picture(100, 100)
    axes = matching.match_lines(
        MatchedImage(first, points_of(first, []), "a"),
        MatchedImage(second, points_of(second, []), "b"),
        compared([], [], None),
    )
    assert axes.get_title() == "0 inliers of 0 matches"
    widths = [image.get_extent()[1] - image.get_extent()[0] for image in axes.images]
    # of 8.42 inches; at one height the second would have one hundredth
    assert widths == pytest.approx([0.8 * 8.42, 0.2 * 8.42])
    top, bottom = (image.get_extent()[2:] for image in axes.images)
    assert sum(top) == pytest.approx(sum(bottom))  # centred on one line


def test_matches_are_thinned_evenly_and_checked():
    image, points = picture(50, 50), np.random.default_rng(0).uniform(0, 40, (30, 2))
    side = MatchedImage(image, points_of(image, points), "a")
    pairs = np.column_stack([np.arange(30)] * 2)
    axes = matching.match_lines(side, side, compared(pairs, np.arange(30) < 20, None), max_lines=8)
    assert [len(lines.get_segments()) for lines in axes.collections[:2]] == [8, 8]
    assert axes.get_title() == "20 inliers (8 drawn) of 30 matches"
    ends = [segment[0] for segment in axes.collections[1].get_segments()]
    scale = axes.images[0].get_extent()[1] / 50
    first, last = (points[location] + 0.5 for location in (0, 19))
    np.testing.assert_allclose([ends[0], ends[-1]], np.array([first, last]) * scale, atol=1e-4)
    with pytest.raises(ValueError, match="30 matches, but inliers of shape"):
        matching.match_lines(side, side, compared(pairs, np.ones(29), None))


def test_an_outline_and_attention_are_drawn():
    photo = np.full((48, 64, 3), 200, np.uint8)
    side = MatchedImage(photo, points_of(photo, [[8, 8], [24, 24], [40, 8]]), "a")
    pair = compared([[0, 0], [1, 1], [2, 2]], [True, True, False], np.eye(3))
    axes = matching.match_lines(side, side, pair)
    assert axes.get_title() == "2 inliers of 3 matches"
    assert len(axes.patches) == 2  # the box, and its image under the homography
    assert len(axes.collections) == 3  # rejected, inliers and their ends
    heated = MatchedImage(photo, side.features, "a", heat=np.array([[1.0, 0.0]]))
    axes = matching.match_lines(heated, side, pair)
    heated, plain = (image.get_array() for image in axes.images)
    assert (plain == 200).all() and not (heated == 200).any()
