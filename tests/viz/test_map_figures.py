"""Maps over photographs."""

import numpy as np
import pytest

from tests.viz.drawn_samples import features, log, photographs, picture
from vitgal.viz import maps


def test_reconstruction_error_maps_share_one_scale_and_span_the_photograph():
    errors = [np.arange(6.0).reshape(2, 3), np.full((4, 4), 100.0)]
    axes = maps.reconstruction_error(log(), photographs(2), errors)
    assert len(axes) == 5
    first, second = axes[3].images[1], axes[4].images[1]
    assert np.array_equal(first.get_array(), errors[0])
    assert first.norm is second.norm
    assert first.get_extent() == [-0.5, 79.5, 59.5, -0.5]
    assert axes[0].lines[1].get_xydata().tolist() == [[20, 0.6], [30, 0.5]]
    for wrong in ([np.ones(4)], [np.full((2, 2), np.nan)], []):
        with pytest.raises(ValueError, match="error maps"):
            maps.reconstruction_error(log(), photographs(1), wrong)


def test_attention_is_drawn_relative_to_its_mean():
    before, after = np.array([[1.0, 3.0]]), np.array([[0.0, 0.0], [0.0, 8.0]])
    axes = maps.attention_maps([picture(10, 20)], [before], [after])
    assert axes.shape == (1, 3)
    assert axes[0, 1].images[1].get_array().tolist() == [[0.5, 1.5]]
    assert axes[0, 2].images[1].get_array().tolist() == [[0, 0], [0, 4]]
    several = maps.attention_maps(photographs(2), [before] * 2, [after] * 2)
    assert several.shape == (2, 3)
    flat = maps.attention_maps([picture(4, 4)], [np.zeros((2, 2))], [np.zeros((2, 2))])
    assert flat[0, 1].images[1].get_array().tolist() == [[0, 0], [0, 0]]


def test_heat_lies_over_the_box_alone():
    photo = np.full((48, 64, 3), 200, np.uint8)
    heat = np.array([[1.0, 0.0]])
    mixed = maps.mix_heat(photo, heat, (10, 5, 50, 35))
    assert (mixed[:5] == 200).all() and (mixed[:, 50:] == 200).all()
    # 0.4 of the grey photograph and 0.6 of the colour map's ends: bright left, black right
    assert mixed[20, 15].max() > 200 and (np.abs(mixed[20, 45].astype(int) - 80) <= 3).all()
    assert (photo == 200).all()
    with pytest.raises(ValueError, match="finite"):
        maps.mix_heat(photo, np.array([[np.nan]]), (0, 0, 64, 48))


def test_attention_has_a_row_a_scale_and_a_column_a_head():
    photo = np.zeros((48, 64, 3), np.uint8)
    attention = {scale: np.random.default_rng(0).random((4, 3, 4)) for scale in (0.5, 1.0)}
    scores = {scale: heads.mean(axis=0) for scale, heads in attention.items()}
    axes = maps.attention_heads(photo, attention, scores, box=(0, 0, 32, 48))
    assert axes.shape == (2, 5)
    assert [cell.get_title() for cell in axes[0]] == [
        *("score: all heads", "head 1", "head 2", "head 3", "head 4"),
    ]
    assert [row[0].get_ylabel() for row in axes] == ["scale 0.5", "scale 1"]


def test_dropped_features_are_counted_by_reason():
    photo = np.zeros((150, 240, 3), np.uint8)
    three = features([(8, 8), (24, 24), (40, 8)])
    axes = maps.dropped_features(
        *(photo, three.subset(slice(1)), three, ["overlap", "keypoints", "overlap"]),
        titles={"overlap": "too near"},
    )
    assert [panel.get_title() for panel in axes] == ["1 kept", "3 dropped"]
    labels = [line.get_label() for line in axes[1].lines]
    assert labels == ["1: keypoints", "2: too near"]
    assert maps.dropped_features(photo, three, three.subset(slice(0)), [])[1].get_title() == (
        "0 dropped"
    )
    with pytest.raises(ValueError, match="3 dropped features, but"):
        maps.dropped_features(photo, three, three, ["overlap"])
