"""Descriptors and features that go into storage come out with a bounded error."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from tests.features.examples import assert_same, features, properties
from vitgal.features import store
from vitgal.features.store import codec
from vitgal.settings.sections import FEATURE_DTYPES

MATRICES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.integers(1, 20)),
    elements=st.floats(-1, 1, width=16),
)


def unit(codes: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(codes.astype(np.float64), axis=1, keepdims=True)
    return codes / np.where(length > 0, length, 1)


# Error of one value over the largest of its descriptor before the length is made 1: float16 keeps
# 11 bits, float32 24, int8 rounds to half of 1 / 127. The length moves by at most as much again.
PRECISIONS = {"float32": 2.0**-23, "float16": 2.0**-11, "int8": 0.5 / 127}


@properties
@given(codes=MATRICES, dtype=st.sampled_from(sorted(PRECISIONS)))
def test_the_error_of_a_descriptor_is_bounded(codes, dtype):
    codes = unit(codes).astype(np.float32)
    decoded = codec.decode(codec.encode(codes, dtype), dtype, codes.shape[1])
    assert decoded.shape == codes.shape and decoded.dtype == np.float32
    error = np.linalg.norm(decoded - codes, axis=1)
    assert (error <= 2 * PRECISIONS[dtype] * codes.shape[1] ** 0.5 + 1e-6).all()


@properties
@given(codes=MATRICES, dtype=st.sampled_from(FEATURE_DTYPES))
def test_stored_features_are_stored_again_unchanged(codes, dtype):
    """Lengths are 1 or 0, and a second passage changes at most the last bit of a value."""
    stored = codec.encode(codes, dtype)
    decoded = codec.decode(stored, dtype, codes.shape[1])
    lengths = np.linalg.norm(decoded.astype(np.float64), axis=1)
    assert (np.isclose(lengths, 1, atol=1e-6) | (lengths == 0)).all()
    again = codec.encode(decoded, dtype)
    assert (again.dtype, again.shape) == (stored.dtype, stored.shape)
    twice = codec.decode(again, dtype, codes.shape[1])
    tolerance = {"bit": 0, "float32": 2.0**-22, "float16": 2.0**-10, "int8": 1e-6}[dtype]
    np.testing.assert_allclose(twice, decoded, atol=tolerance)


@properties
@given(codes=MATRICES)
def test_bits_are_signs(codes):
    dimension = codes.shape[1]
    stored = codec.encode(codes, "bit")
    assert stored.dtype == np.uint8 and stored.shape == (len(codes), -(-dimension // 8))
    decoded = codec.decode(stored, "bit", dimension)
    np.testing.assert_array_equal(decoded > 0, codes > 0)
    np.testing.assert_allclose(np.abs(decoded), dimension**-0.5, rtol=1e-6)


def test_half_precision_is_numpys():
    """Every finite float16, of both signs, zeros and subnormal numbers included."""
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    stored = np.stack([half, np.zeros_like(half)], axis=1)
    expected = stored.astype(np.float32)
    expected /= np.where(half == 0, 1, np.linalg.norm(expected, axis=1))[:, None]
    np.testing.assert_array_equal(codec.decode(stored, "float16", 2), expected)


def test_bits_by_hand():
    codes = np.array([[0.3, -0.2, 0.1, 0.0, 0.9, -0.1, 0.2, 0.1, -0.5, 0.4]], np.float32)
    stored = codec.encode(codes, "bit")
    assert stored.tolist() == [[0b10101011, 0b01000000]]
    signs = np.array([1, -1, 1, -1, 1, -1, 1, 1, -1, 1])
    np.testing.assert_allclose(codec.decode(stored, "bit", 10)[0], signs / np.sqrt(10), rtol=1e-6)


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
def test_zero_stays_finite(dtype):
    zero = codec.decode(codec.encode(np.zeros((1, 9), np.float32), dtype), dtype, 9)
    assert np.isfinite(zero).all()
    assert dtype == "bit" or not zero.any()


def test_what_cannot_be_stored():
    with pytest.raises(ValueError, match="float32, float16, int8, bit"):
        codec.encode(np.zeros((1, 2)), "half")
    with pytest.raises(ValueError, match="nan"):
        codec.encode(np.array([[np.nan, 1]]), "float16")


@pytest.mark.parametrize("count", [0, 1, 7])
def test_features(count):
    original = features(count)
    arrays = store.encode_features(original, "float32")
    decoded = store.decode_features(arrays, original.sizes, "float32", 10)
    assert_same(decoded, original, 1e-6)
    assert decoded.scores is not arrays["scores"]


def test_the_forecast_is_within_ten_per_cent(tmp_path):
    for dtype in FEATURE_DTYPES:
        images = ((f"image_{i:04}", features(100, i, 128)) for i in range(40))
        shard = store.write_shard(tmp_path / dtype, images, store.ShardFormat(dtype))
        size = sum(path.stat().st_size for path in shard.iterdir())
        # The headers of 128 bytes a file, and the names in JSON, are estimates.
        assert store.forecast(40, 100, 128, dtype) == pytest.approx(size, rel=0.1)
