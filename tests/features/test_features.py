"""LocalFeatures: shapes, subsets and the way back to the photograph's pixels."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from tests.features.examples import properties
from vitgal.features.local import LocalFeatures


def example(**changed) -> LocalFeatures:
    values = dict(
        keypoints=np.array([[8, 8], [568, 424], [288, 216]], np.float32),
        descriptors=np.eye(3, 4, dtype=np.float32),
        scores=np.array([3, 2, 1], np.float32),
        scales=np.array([1, 1, 0.5], np.float32),
        input_size=(432, 576),
        box=(100, 50, 388, 266),  # a crop of 288 x 216, half the input's size
        image_size=(600, 800),
    )
    return LocalFeatures(**(values | changed))


def test_original_keypoints_by_hand():
    """Input (8, 8) is 4 px into the crop: corner-based (104, 54), half a pixel less by centres."""
    points = example().original_keypoints()
    np.testing.assert_array_equal(points, [[103.5, 53.5], [383.5, 261.5], [243.5, 157.5]])
    assert points.dtype == np.float32


def test_the_identity_moves_pixel_corners_to_pixel_centres():
    whole = example(box=(0, 0, 576, 432), image_size=(432, 576))
    np.testing.assert_array_equal(whole.original_keypoints(), whole.keypoints - 0.5)


def test_unknown_sizes():
    with pytest.raises(ValueError, match="extract them again"):
        example(box=(0, 0, 0, 0), input_size=(0, 0)).original_keypoints()


@pytest.mark.parametrize("index", [[2, 0], np.array([True, False, True]), slice(0, 1)])
def test_subset(index):
    part = example().subset(index)
    np.testing.assert_array_equal(part.keypoints, example().keypoints[index])
    np.testing.assert_array_equal(part.descriptors, example().descriptors[index])
    np.testing.assert_array_equal(part.scores, example().scores[index])
    np.testing.assert_array_equal(part.scales, example().scales[index])
    assert part.box == (100, 50, 388, 266)


def test_no_features():
    none = example().subset(slice(0))
    assert len(none) == 0 and len(example()) == 3
    assert none.code_dim == example().code_dim == 4
    assert none.original_keypoints().shape == (0, 2)
    assert none.sizes == (432, 576, 100, 50, 388, 266, 600, 800)


@properties
@given(data=st.data())
def test_keypoints_to_the_photograph_and_back(data):
    """Back in the network input within a thousandth of a pixel, and inside the crop."""
    height, width = (16 * data.draw(st.integers(1, 80)) for _ in range(2))
    x0, y0 = (data.draw(st.integers(0, 4000)) for _ in range(2))
    box = (x0, y0, *(start + data.draw(st.integers(1, 4000)) for start in (x0, y0)))
    points = data.draw(
        arrays.arrays(np.float32, (3, 2), elements=st.floats(0, 1, width=32))
    ) * np.float32([width, height])
    result = example(keypoints=points, box=box, input_size=(height, width)).original_keypoints()
    lowest, highest = np.array(box[:2]) - 0.5, np.array(box[2:]) - 0.5
    assert (result >= lowest - 1e-3).all() and (result <= highest + 1e-3).all()
    scale = np.array([width, height]) / (np.array(box[2:]) - box[:2])
    # float32 holds pixels of a photograph to 2 ** -12 below 8192
    np.testing.assert_allclose(
        (result - lowest) * scale, points, atol=scale.max() * 2.0**-11 + 1e-3
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"keypoints": np.zeros((3, 3), np.float32)},
        {"descriptors": np.zeros((2, 4), np.float32)},
        {"scores": np.zeros((3, 1), np.float32)},
        {"scales": np.zeros(2, np.float32)},
    ],
)
def test_arrays_that_do_not_fit(changed):
    with pytest.raises(ValueError, match="do not fit together"):
        example(**changed)
