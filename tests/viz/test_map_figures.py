"""Maps over photographs."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.decomposition import PCA

from tests.viz.drawn_samples import features, photographs, picture
from vitgal.viz import maps


def test_error_maps_share_one_scale_whose_colours_are_those_of_the_bar():
    errors, tokens = [np.zeros((2, 3)), np.full((4, 4), 100.0)], [np.ones((2, 2, 3))] * 2
    axes = maps.token_figure(photographs(2), tokens, errors)
    assert axes.shape == (3, 2)
    low, high = (cell.images[0].get_array() for cell in axes[2])
    inferno = plt.get_cmap("inferno")
    for drawn, end in ((low, 0.0), (high, 1.0)):
        colour = np.round(255 * np.array(inferno(end)[:3]))
        assert (drawn == colour).all()  # no photograph is mixed in
    assert axes[2, 0].images[0].get_extent() == [-0.5, 79.5, 59.5, -0.5]
    for wrong in ([np.ones(4)], [np.full((2, 2), np.nan)], []):
        with pytest.raises(ValueError, match="error maps"):
            maps.token_figure(photographs(1), tokens[:1], wrong)
    with pytest.raises(ValueError, match="0 maps of tokens for 1 images"):
        maps.token_figure(photographs(1), [], [np.eye(2)])


def test_components_of_tokens_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal((4, 5, 6)) * [9, 5, 3, 1, 1, 1] for _ in range(2)]
    colours = maps.component_colours(tokens)
    assert [part.shape for part in colours] == [(4, 5, 3)] * 2 and colours[0].dtype == np.uint8
    rows = np.concatenate([part.reshape(-1, 6) for part in tokens])
    expected = PCA(3).fit_transform(rows)
    drawn = np.concatenate([part.reshape(-1, 3) for part in colours]).astype(float)
    for column in range(3):  # but for the sign, and the cut at the 2nd and 98th percentile
        assert abs(np.corrcoef(drawn[:, column], expected[:, column])[0, 1]) > 0.98
    (few,) = maps.component_colours([np.array([[[0.0, 1.0], [2.0, 1.0]]])])
    assert few[0, :, 0].tolist() == [0, 248] and (few[..., 1:] == 0).all()


def test_attention_is_drawn_relative_to_its_mean():
    before, after = np.array([[1.0, 3.0]]), np.array([[0.0, 0.0], [0.0, 8.0]])
    axes = maps.attention_maps([picture(10, 20)], [before], [after])
    assert axes.shape == (1, 3)
    # divided by the mean: 0.5 and 1.5 beside 0, 0, 0 and 4, which share one range from 0 on
    norm = maps.percentile_range([before / 2, after / 2], 1)
    left = np.asarray(axes[0, 1].images[0].get_array())[5, 0]
    expected = plt.get_cmap("inferno")(0.5 / norm.vmax)[:3]
    assert left == pytest.approx(255 * np.array(expected), abs=1)
    assert (axes[0, 2].images[0].get_array()[0, 0] <= [1, 1, 8]).all()  # inferno's darkest
    several = maps.attention_maps(photographs(2), [before] * 2, [after] * 2)
    assert several.shape == (2, 3)
    flat = maps.attention_maps([picture(4, 4)], [np.zeros((2, 2))], [np.zeros((2, 2))])
    assert (flat[0, 1].images[0].get_array() == [0, 0, 4]).all()


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
    nothing = maps.dropped_features(photo, three, three.subset(slice(0)), [], titles={})
    assert nothing[1].get_title() == "0 dropped"
    with pytest.raises(ValueError, match="3 dropped features, but"):
        maps.dropped_features(photo, three, three, ["overlap"], titles={})
