"""What becomes of a photograph's tokens: kept as extraction keeps them, or dropped for a reason."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from vitgal.features.local import LocalFeatures
from vitgal.features.selection import scaled_size, select_tokens
from vitgal.models import descriptors
from vitgal.models.network import build_model
from vitgal.settings import LocalSettings
from vitgal.stages.inspection import (
    REASONS,
    TokenSelection,
    explain_selection,
    matching_fraction,
)


@pytest.fixture(scope="module")
def model():
    return build_model("xcit_nano_12_p16_224", code_dim=8, seed=0)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (20, 26, 3), np.uint8)
    return cv2.resize(small, (208, 160), interpolation=cv2.INTER_CUBIC)


BOX = (10, 20, 200, 150)
SETTINGS = LocalSettings(
    size=160,
    scales=(0.7071, 1.0, 1.4142),
    max_keypoints=60,
    nms_candidates=150,
    nms_overlap=0.3,
)
OPTIONS = {
    name: getattr(SETTINGS, name)
    for name in ("size", "scales", "max_keypoints", "nms_candidates", "nms_overlap")
}


@pytest.fixture(scope="module")
def selection(model, photograph) -> TokenSelection:
    return explain_selection(model, photograph, BOX, SETTINGS)


def test_kept_features_are_those_of_extraction(model, photograph, selection):
    extracted = descriptors.extract_local(model, photograph, BOX, **OPTIONS)
    assert len(extracted) == 60
    for name in ("keypoints", "descriptors", "scores", "scales"):
        np.testing.assert_array_equal(getattr(selection.kept, name), getattr(extracted, name))
    for name in ("input_size", "box", "image_size"):
        assert getattr(selection.kept, name) == getattr(extracted, name)


def test_every_token_above_the_threshold_is_kept_or_dropped_for_a_reason(selection):
    passed = 0
    for scale, scores in selection.scores.items():
        sides = scaled_size(selection.kept.input_size, scale)
        assert scores.shape == (sides[0] // 16, sides[1] // 16)
        np.testing.assert_allclose(scores.mean(), 1, rtol=1e-5)
        area = scores.size / (selection.kept.input_size[0] * selection.kept.input_size[1] / 256)
        passed += len(select_tokens(scores.ravel(), 400 * area))
    assert len(selection.kept) + len(selection.dropped) == passed == len(selection.reasons) + 60
    counts = {reason: int((selection.reasons == reason).sum()) for reason in REASONS}
    assert counts["candidates"] == passed - 150
    # dropped features are weaker than the weakest candidate just where that is the reason
    late = selection.dropped.scores[selection.reasons == "candidates"]
    assert late.max() <= selection.dropped.scores[selection.reasons != "candidates"].min()
    assert counts["overlap"] and counts["keypoints"]
    assert (np.diff(selection.dropped.scores) <= 0).all()


def test_with_room_for_all_only_overlaps_are_dropped(model, photograph):
    settings = replace(SETTINGS, max_keypoints=10_000, nms_candidates=10_000)
    selection = explain_selection(model, photograph, None, settings)
    assert set(selection.reasons) == {"overlap"}
    free = explain_selection(model, photograph, None, replace(settings, nms_overlap=1.0))
    assert len(free.dropped) == 0
    assert len(free.kept) == len(selection.kept) + len(selection.dropped)


def test_a_map_is_taken_from_the_nearest_scale(selection):
    assert selection.heat(0.9) is selection.scores[1.0]
    np.testing.assert_array_equal(selection.heat(5, 2), selection.attention[1.4142][2])


def test_attention_has_a_map_a_head_with_its_peak_at_1(selection):
    assert list(selection.attention) == list(SETTINGS.scales)
    for scale, heads in selection.attention.items():
        assert heads.shape == (4, *selection.scores[scale].shape)
        np.testing.assert_allclose(heads.max(axis=(1, 2)), 1, rtol=1e-6)
        mean = heads.mean(axis=0)
        np.testing.assert_allclose(selection.scores[scale], mean / mean.mean(), rtol=1e-4)


def test_a_model_without_autoencoder_is_refused(photograph):
    bare = build_model("xcit_nano_12_p16_224", seed=0)
    with pytest.raises(ValueError, match="no autoencoder"):
        explain_selection(bare, photograph)


def test_matching_fraction_counts_positions_and_scales():
    def features(positions, scales):
        count = len(positions)
        codes = np.ones((count, 1), np.float32)
        points = np.array(positions, np.float32).reshape(count, 2)
        falling = np.ones(count, np.float32)
        scales = np.array(scales, np.float32)
        return LocalFeatures(points, codes, falling, scales, (64, 64), (0, 0, 64, 64), (64, 64))

    stored = features([(8, 8), (8, 8), (24, 8), (40, 8)], [1, 0.5, 1, 1])
    extracted = features([(24, 8), (8, 8), (40, 8)], [1, 1, 0.5])
    assert matching_fraction(extracted, stored) == 0.5
    assert matching_fraction(stored, stored) == 1
    assert matching_fraction(features([], []), stored) == 0
    assert matching_fraction(extracted, features([], [])) == 1
