"""Verification on planted homographies."""

import inspect
import math

import numpy as np
import pytest

from tests.retrieval_cases import PLANTED, planted, project
from vitgal.retrieval import verification
from vitgal.retrieval.matching import match
from vitgal.retrieval.ranking import rerank
from vitgal.retrieval.verification import verify

ESTIMATORS = sorted(verification.ESTIMATORS)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("confidence", [0.999, 1.0])
def test_verify_finds_the_planted_homography(estimator, confidence):
    query, gallery = planted(40, 40)
    result = verify(query, gallery, estimator, threshold=8.0, confidence=confidence)
    assert result.inliers.dtype == bool and result.inliers.shape == (80,)
    assert result.inliers[:40].all()
    # By chance an outlier may lie near the model that its own weight bends a little.
    assert 40 <= result.count <= 42 and result.count == result.inliers.sum()
    corners = np.array([[0, 0], [512, 0], [512, 512], [0, 512]], float)
    # The direction is query to gallery. One pixel: the noise-free points fix the model, robust
    # refinement may weigh in an outlier.
    np.testing.assert_allclose(
        project(corners, result.homography), project(corners, PLANTED), atol=1.0
    )
    assert result.homography[2, 2] == 1 and result.homography.dtype == np.float64


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verify_is_the_same_for_the_same_seed(estimator):
    # A handful of planted matches among many: another seed finds another small set.
    query, gallery = planted(5, 60, seed=1)
    options = {"estimator": estimator, "iterations": 50, "threshold": 4.0}
    by_seed = [verify(query, gallery, seed=s, **options).inliers.tolist() for s in range(12)]
    again = [verify(query, gallery, seed=s, **options).inliers.tolist() for s in range(12)]
    assert by_seed == again
    assert len({tuple(row) for row in by_seed}) > 1, "the seed reaches the sampler"


def test_verify_confidence_one_tries_every_iteration():
    # Few true matches: stopping at PoseLib's least number of iterations would miss them.
    query, gallery = planted(60, 240, seed=2)
    for estimator in ESTIMATORS:
        counts = [verify(query, gallery, estimator, 4.0, seed=seed).count for seed in range(4)]
        assert min(counts) >= 60, estimator


def displaced(scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact matches that pin a scaling down, then matches off by 10 to 40 px in the gallery."""
    rng = np.random.default_rng(0)
    exact, off = rng.uniform(0, 512, (4000, 2)), rng.uniform(100, 400, (121, 2))
    distances, angle = np.linspace(10, 40, 121), rng.uniform(0, 2 * np.pi, 121)
    shift = distances[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    return (
        np.vstack([exact, off]),
        np.vstack([exact, off]) * scale + np.vstack([np.zeros((4000, 2)), shift]),
        distances,
    )


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("estimator", ["magsac", "poselib"])
def test_verify_threshold_is_a_distance_in_the_gallery_image(estimator, scale):
    query, gallery, distances = displaced(scale)
    inliers = verify(query, gallery, estimator, threshold=16.0).inliers[4000:]
    # Half a pixel: the 121 displaced matches move the model by a fraction of a pixel.
    assert inliers[distances < 15.5].all() and not inliers[distances > 16.5].any()


def test_verify_threshold_of_degensac_is_a_sampson_distance():
    query, gallery, distances = displaced(1.0)
    inliers = verify(query, gallery, "degensac", threshold=16.0).inliers[4000:]
    # Squared Sampson distance at equal scale: distance^2 / 2, so 16 px admit 22.63 px.
    assert inliers[distances < 22.1].all() and not inliers[distances > 23.1].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verify_needs_five_matches(estimator):
    query, gallery = planted(5, 0)
    assert verify(query, gallery, estimator).count == 5
    for count in (0, 1, 4):
        result = verify(query[:count], gallery[:count], estimator)
        assert result.count == 0 and result.homography is None and result.inliers.shape == (count,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verify_without_a_model_counts_nothing(estimator):
    query = np.random.default_rng(0).uniform(0, 512, (12, 2))
    for gallery in (np.full((12, 2), 7.0), np.column_stack([np.full(12, 8.0), query[:, 1]])):
        result = verify(query, gallery, estimator)
        assert result.count == 0 and result.homography is None and not result.inliers.any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"estimator": "ransac"}, "unknown estimator 'ransac'; known: degensac"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"confidence": 0.0}, "confidence is 0.0"),
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_verify_refuses_options_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        verify(*planted(8, 0), **wrong)


@pytest.mark.parametrize("estimator", sorted(verification.ESTIMATORS))
def test_all_matches_on_one_gallery_point_are_no_model(estimator):
    """A homography that maps the plane to a point or a line; poselib gives one in case 115."""
    rng = np.random.default_rng(0)
    for _ in range(160):
        number = int(rng.integers(5, 41))
        query = rng.integers(0, 32, (number, 2)) * 16.0 + 8
        gallery = np.tile(rng.integers(0, 32, (1, 2)) * 16.0 + 8, (number, 1))
        result = verify(query, gallery, estimator)
        assert result.homography is None or np.linalg.matrix_rank(result.homography) == 3


def test_verify_refuses_points_that_do_not_fit():
    query, gallery = planted(8, 0)
    with pytest.raises(ValueError, match="8 query points matched with 7"):
        verify(query, gallery[:7])
    with pytest.raises(ValueError, match=r"shape \(8, 3\)"):
        verify(np.ones((8, 3)), gallery)
    query[3, 0] = math.nan
    with pytest.raises(ValueError, match="nan or infinite"):
        verify(query, gallery)


@pytest.mark.parametrize("function", [match, verify, rerank])
def test_defaults_are_the_published(function):
    published = dict(estimator="degensac", threshold=16.0, iterations=2000, confidence=1.0, seed=0)
    published |= dict(max_distance=0.82, top=100, max_keypoints=None)  # 1000 are stored at most
    result = inspect.signature(function).parameters
    shared = published.keys() & result.keys()
    assert len(shared) >= 1
    assert {name: result[name].default for name in shared} == {n: published[n] for n in shared}
