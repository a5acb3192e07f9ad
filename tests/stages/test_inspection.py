"""What one pass of the network shows, and what knobs change."""

import cv2
import numpy as np
import pytest

from vitgal.features import selection
from vitgal.features.local import LocalFeatures
from vitgal.models import descriptors
from vitgal.models.network import build_model
from vitgal.stages import inspection


@pytest.fixture(scope="module")
def model():
    return build_model("xcit_nano_12_p16_224", code_dim=8, seed=0)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (20, 26, 3), np.uint8)
    return cv2.resize(small, (208, 160), interpolation=cv2.INTER_CUBIC)


OPTIONS = dict(size=160, scales=(0.7071, 1.0, 1.4142), max_keypoints=60, nms_candidates=150)
OPTIONS |= dict(nms_overlap=0.3)


@pytest.mark.parametrize("box", [None, (10, 20, 200, 150)])
def test_kept_features_are_those_of_extraction(model, photograph, box):
    found = inspection.look(model, photograph, box, **OPTIONS)
    wanted = descriptors.extract_local(model, photograph, box, **OPTIONS)
    assert len(wanted) == 60
    for name in ("keypoints", "scores", "scales"):
        np.testing.assert_array_equal(getattr(found.kept, name), getattr(wanted, name))
    # the same products in numpy's and torch's order
    np.testing.assert_allclose(found.kept.descriptors, wanted.descriptors, atol=1e-6)
    for name in ("input_size", "box", "image_size"):
        assert getattr(found.kept, name) == getattr(wanted, name)


def test_every_token_above_the_threshold_is_kept_or_dropped_for_a_reason(model, photograph):
    found = inspection.look(model, photograph, **OPTIONS)
    passed = 0
    for scale, scores in found.scores.items():
        sides = selection.scaled_size(found.kept.input_size, scale)
        assert scores.shape == (sides[0] // 16, sides[1] // 16)
        np.testing.assert_allclose(scores.mean(), 1, rtol=1e-5)
        area = scores.size / (found.kept.input_size[0] * found.kept.input_size[1] / 256)
        passed += len(selection.select_tokens(scores.ravel(), 400 * area))
    assert len(found.kept) + len(found.dropped) == passed == len(found.reasons) + 60
    counts = {reason: int((found.reasons == reason).sum()) for reason in inspection.REASONS}
    assert counts["candidates"] == passed - 150
    # dropped features are weaker than the weakest candidate just where that is the reason
    late = found.dropped.scores[found.reasons == "candidates"]
    assert late.max() <= found.dropped.scores[found.reasons != "candidates"].min()
    assert counts["overlap"] and counts["keypoints"]
    assert (np.diff(found.dropped.scores) <= 0).all()


def test_with_room_for_all_only_overlaps_are_dropped(model, photograph):
    options = OPTIONS | dict(max_keypoints=10_000, nms_candidates=10_000)
    found = inspection.look(model, photograph, **options)
    assert set(found.reasons) == {"overlap"}
    free = inspection.look(model, photograph, **(options | dict(nms_overlap=1.0)))
    assert len(free.dropped) == 0
    assert len(free.kept) == len(found.kept) + len(found.dropped)


def test_attention_has_a_map_a_head_with_its_peak_at_1(model, photograph):
    found = inspection.look(model, photograph, **OPTIONS)
    assert list(found.attention) == list(OPTIONS["scales"])
    for scale, heads in found.attention.items():
        assert heads.shape == (4, *found.scores[scale].shape)
        np.testing.assert_allclose(heads.max(axis=(1, 2)), 1, rtol=1e-6)
        mean = heads.mean(axis=0)
        np.testing.assert_allclose(found.scores[scale], mean / mean.mean(), rtol=1e-4)


def test_a_model_without_autoencoder_is_refused(photograph):
    bare = build_model("xcit_nano_12_p16_224", seed=0)
    with pytest.raises(ValueError, match="no autoencoder"):
        inspection.look(bare, photograph)


# Knobs


def features(count: int, seed: int = 0) -> LocalFeatures:
    """Features on a grid, at scale 1 but every fourth at 0.3535."""
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((count, 16)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    points = np.stack(np.divmod(np.arange(count), 10), axis=1).astype(np.float32) * 16 + 8
    scales = np.where(np.arange(count) % 4, 1.0, 0.3535).astype(np.float32)
    falling = np.linspace(2, 1, count, dtype=np.float32)
    return LocalFeatures(points, codes, falling, scales, (320, 320), (0, 0, 320, 320), (320, 320))


def test_hidden_scales_are_left_out_and_the_others_stay():
    every = features(40)
    left = inspection.without_scales(every, [0.3535])  # as float64, whose last bits differ
    assert len(left) == 30 and (left.scales == 1).all()
    assert len(inspection.without_scales(every, [0.3500])) == 40
    assert len(inspection.without_scales(every, [])) == 40
    assert len(inspection.without_scales(every, [0.3535, 1.0])) == 0
    np.testing.assert_array_equal(left.keypoints, every.keypoints[every.scales == 1])


def test_compare_takes_the_best_of_what_is_left():
    every = features(40)
    pair = inspection.compare(every, every, hidden_scales=[0.3535], max_keypoints=12)
    assert len(pair.query) == len(pair.database) == 12
    np.testing.assert_array_equal(pair.query.scores, every.scores[every.scales == 1][:12])
    assert pair.found.verification.count == 12  # an image against itself
    assert pair.sentence() == "12 inliers of 12 matches"


@pytest.mark.parametrize(
    ("query", "database", "sentence"),
    [
        (features(0), features(9), "the query has no local features left: nothing to match"),
        (features(9), features(0), "the database image has no local features left"),
        (features(4), features(4), "4 matches: below 5 no homography is fitted"),
    ],
)
def test_a_pair_that_cannot_be_verified_is_told(query, database, sentence):
    pair = inspection.compare(query, database)
    assert pair.sentence().startswith(sentence)
    assert pair.found.verification.count == 0


def test_points_on_one_line_fit_no_homography():
    every = features(9)
    flat = np.array(every.keypoints)
    flat[:, 1] = 8
    line = LocalFeatures(flat * 0 + 8, *(getattr(every, name) for name in FIELDS))
    assert "no homography fits the 9 matches" in inspection.compare(line, line).sentence()


FIELDS = ("descriptors", "scores", "scales", "input_size", "box", "image_size")


def test_sweep_turns_one_knob_at_a_time():
    table = inspection.sweep(features(60), features(60, seed=1), max_distance=1.5)
    assert list(dict.fromkeys(table["knob"])) == list(inspection.KNOBS)
    distance = table[table["knob"] == "max_distance"]
    assert distance["matches"].is_monotonic_increasing
    assert (table[table["knob"] == "threshold"]["matches"] == 60).all()
    assert table[table["knob"] == "max_keypoints"]["value"].tolist() == [25, 50]
    assert (table["inliers"] <= table["matches"]).all()


def test_shared_features_counts_places_and_scales():
    def features(places, scales):
        count = len(places)
        codes = np.ones((count, 1), np.float32)
        points = np.array(places, np.float32).reshape(count, 2)
        falling = np.ones(count, np.float32)
        scales = np.array(scales, np.float32)
        return LocalFeatures(points, codes, falling, scales, (64, 64), (0, 0, 64, 64), (64, 64))

    stored = features([(8, 8), (8, 8), (24, 8), (40, 8)], [1, 0.5, 1, 1])
    found = features([(24, 8), (8, 8), (40, 8)], [1, 1, 0.5])
    assert inspection.shared_features(found, stored) == 0.5
    assert inspection.shared_features(stored, stored) == 1
    assert inspection.shared_features(features([], []), stored) == 0
    assert inspection.shared_features(found, features([], [])) == 1
