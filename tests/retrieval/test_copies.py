"""Copies: proposals against brute force, groups by hand, decisions on drawn and moved pictures."""

import cv2
import numpy as np
import pytest

from vitgal.retrieval import copies
from vitgal.retrieval.copies import NOTHING, View, compare_views


def turned(image: np.ndarray) -> np.ndarray:
    """An image turned by 3 degrees; what it lays bare is black."""
    turn = cv2.getRotationMatrix2D((image.shape[1] / 2, image.shape[0] / 2), 3, 1.0)
    return cv2.warpAffine(image, turn, image.shape[1::-1])


def screenshot(image: np.ndarray) -> np.ndarray:
    """An image across a white screen of twice its height, with words above and below."""
    screen = np.full((2 * len(image), *image.shape[1:]), 245, np.uint8)
    screen[60 : 60 + len(image)] = image
    for row in (30, 340):
        cv2.putText(screen, "12:42  holiday", (20, row), 0, 0.6, [20] * 3, 2, cv2.LINE_AA)
    return screen


def picture(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """Noise of two sizes: corners everywhere, no two alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 20, width // 20, 3), np.uint8)
    fine = rng.integers(0, 90, (height // 5, width // 5, 3), np.uint8)
    coarse, fine = (cv2.resize(part, (width, height)) for part in (coarse, fine))
    return (coarse // 2 + fine).astype(np.uint8)


IMAGE = picture(0)
VIEW = View.of(IMAGE)


def test_a_mirrored_third_is_a_copy_with_its_share():
    part = IMAGE[60:198, 40:225]  # 138 x 185 of 240 x 320 pixels: 33.2 %
    found = compare_views(VIEW, View.of(part[:, ::-1]), mirrored=True)
    assert found.is_copy and found.changes == ("mirrored", "cut to 33%")
    assert found.shared == pytest.approx((138 * 185 / (240 * 320), 1), abs=0.02)
    assert compare_views(VIEW, View.of(part[:, ::-1])) == NOTHING, "unless it is mirrored back"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image, ()),
        (lambda image: cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA),
         ("0.50 times the size",)),
        (lambda image: 255 - image, None),  # a negative correlates with nothing
        (lambda image: (image * [1.0, 0.7, 0.5]).astype(np.uint8), ("recoloured",)),
        (lambda image: cv2.copyMakeBorder(image, *[30] * 4, cv2.BORDER_CONSTANT), ("a border",)),
        (lambda image: np.vstack([image[:190], np.zeros_like(image[190:])]), ("a caption",)),
        (turned, ("turned by -3 degrees",)),
        (screenshot, ("the first is 50% of it",)),
    ],
)  # fmt: skip
def test_changes_are_named(change, words):
    found = compare_views(VIEW, View.of(np.ascontiguousarray(change(IMAGE))))
    assert found.is_copy == (words is not None)
    assert found.changes == (words or ())


def test_sizes_are_of_the_images_not_of_what_is_compared():
    large = cv2.resize(IMAGE, (1280, 960), interpolation=cv2.INTER_CUBIC)
    assert compare_views(VIEW, View.of(large)).changes == ("4.00 times the size",)


def test_one_wall_in_two_photographs_is_a_place_but_no_copy():
    """The wall fits one homography; around it everything differs, as in another season."""
    one, other = picture(1), picture(2)
    one[60:180, 80:240] = other[60:180, 90:250] = IMAGE[60:180, 80:240]
    found = compare_views(View.of(one), View.of(other))
    assert found.is_place and not found.is_copy and found.inliers >= 12


def test_a_camera_that_moved_makes_no_copy():
    corners = np.float32([[0, 0], [320, 0], [320, 240], [0, 240]])
    moved = np.float32([[0, 0], [290, 40], [290, 200], [0, 240]])
    slanted = cv2.warpPerspective(IMAGE, cv2.getPerspectiveTransform(corners, moved), (320, 240))
    found = compare_views(VIEW, View.of(slanted))
    assert found.is_place and not found.is_copy


@pytest.mark.parametrize("other", [picture(9), np.full((50, 60, 3), 7, np.uint8)])
def test_unrelated_and_empty_images_share_nothing(other):
    assert compare_views(VIEW, View.of(other)) == NOTHING
    assert not compare_views(View.of(other), VIEW).is_place


def test_proposals_are_those_of_brute_force():
    rng = np.random.default_rng(3)
    plain, mirrored, other = (rng.standard_normal((n, 8)).astype("f4") for n in (7, 7, 9))
    expected = {}
    for flag, queries in enumerate((plain, mirrored)):
        for image, row in enumerate(queries @ other.T):
            expected |= {(image, int(found), flag): row[found] for found in np.argsort(-row)[:3]}
    pairs, similarities = copies.copy_candidates(plain, mirrored, other, count=3)
    found = dict(zip(map(tuple, pairs.tolist()), similarities, strict=True))
    assert found == pytest.approx(expected, abs=1e-5)
    within, similarities = copies.copy_candidates(plain, mirrored, count=6)  # all: 7 * 6 / 2, twice
    assert len(within) == 42 and (within[:, 0] < within[:, 1]).all()
    one, other, _ = within[within[:, 2] == 0].T
    products = (plain[one] * plain[other]).sum(axis=1)
    assert similarities[within[:, 2] == 0] == pytest.approx(products, abs=1e-5)
    for count in (0, 1):
        pairs, similarities = copies.copy_candidates(plain[:count], mirrored[:count], count=3)
        assert pairs.shape == (0, 3) and similarities.shape == (0,)


def test_proposals_for_more_images_than_are_searched_at_once():
    rng = np.random.default_rng(4)
    plain, other = rng.standard_normal((4100, 4)).astype("f2"), rng.standard_normal((5, 4))
    pairs, _ = copies.copy_candidates(plain, -plain, other.astype("f2"), count=1)
    products = plain.astype("f8") @ other.astype("f2").astype("f8").T
    for flag, nearest in enumerate((products.argmax(axis=1), products.argmin(axis=1))):
        expected = [[image, at] for image, at in enumerate(nearest.tolist())]
        assert pairs[pairs[:, 2] == flag, :2].tolist() == expected


def test_groups_by_hand():
    assert copies.group_pairs(np.array([[1, 3], [3, 4]]), 6).tolist() == [0, 1, 2, 1, 1, 3]
    assert copies.group_pairs(np.zeros((0, 2), np.int64), 2).tolist() == [0, 1]
