"""Pairs compared from stored features under other settings."""

import numpy as np
import pytest

from vitgal.features.local import LocalFeatures
from vitgal.settings import RerankingSettings
from vitgal.stages import inspection

FIELDS = ("descriptors", "scores", "scales", "input_size", "box", "image_size")


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


def test_compare_takes_the_best_remaining():
    every, settings = features(40), RerankingSettings.build({"match_keypoints": 12})
    pair = inspection.compare(every, every, settings, hidden_scales=[0.3535])
    assert len(pair.query) == len(pair.database) == 12
    np.testing.assert_array_equal(pair.query.scores, every.scores[every.scales == 1][:12])
    assert pair.result.verification.count == 12  # an image against itself
    assert pair.sentence().startswith("12 inliers of 12 matches, on 12 features over ")


@pytest.mark.parametrize(
    ("query", "database", "sentence"),
    [
        (features(0), features(9), "the query has no local features left: nothing to match"),
        (features(9), features(0), "the database image has no local features left"),
        (features(4), features(4), "4 matches: below 5 no homography is fitted"),
    ],
)
def test_a_pair_that_cannot_be_verified_is_described(query, database, sentence):
    pair = inspection.compare(query, database, RerankingSettings())
    assert pair.sentence().startswith(sentence)
    assert pair.result.verification.count == 0


def test_points_on_one_line_fit_no_homography():
    every = features(9)
    flat = np.array(every.keypoints)
    flat[:, 1] = 8
    line = LocalFeatures(flat * 0 + 8, *(getattr(every, name) for name in FIELDS))
    assert (
        "no homography fits the 9 matches"
        in inspection.compare(line, line, RerankingSettings()).sentence()
    )


def test_sweep_changes_one_parameter_at_a_time():
    settings = RerankingSettings.build({"max_distance": 1.5})
    table = inspection.sweep(features(60), features(60, seed=1), settings)
    assert list(dict.fromkeys(table["parameter"])) == list(inspection.SWEPT_VALUES)
    distance = table[table["parameter"] == "max_distance"]
    assert distance["matches"].is_monotonic_increasing
    assert (table[table["parameter"] == "threshold"]["matches"] == 60).all()
    assert table[table["parameter"] == "max_keypoints"]["value"].tolist() == [25, 50, 60]
    assert (table["inliers"] <= table["matches"]).all()
