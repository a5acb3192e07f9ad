"""Encodes local features for storage, and predicts the space they take."""

from collections.abc import Mapping, Sequence

import numpy as np

from vitgal import runs
from vitgal.features.local import LocalFeatures
from vitgal.settings.sections import FEATURE_DTYPES

FORMAT = 1
FEATURE_ARRAYS = ("keypoints", "descriptors", "scores", "scales")
ITEM_BYTES = 150  # of one image beside its features: name and sizes in items.json, offset, checksum
FEATURE_BYTES = 16  # of one feature beside its descriptor: keypoint, score, scale
REMEDY = "run 05_local_extraction again: it makes what is missing or damaged"
PRECISION_REMEDY = (
    "inference_precision auto depends on the machine: continue on one like the first, or set "
    "overwrite: true and a named precision"
)


class StoreError(runs.UserError, RuntimeError):
    """A store on disk is damaged or incomplete; the message names the folder or the image."""


def encode(descriptors: np.ndarray, dtype: str) -> np.ndarray:
    """Encodes descriptors for storage.

    int8 is scaled to each descriptor's largest value and "bit" keeps signs alone; `decode` brings
    every descriptor back to length 1. descriptors: (N, C) float32; N may be 0. Returns (N, C) of
    the dtype, for "bit" (N, ceil(C / 8)) uint8. Raises ValueError for another dtype than
    FEATURE_DTYPES, or values that are not finite.
    """
    check_dtype(dtype)
    if not np.isfinite(descriptors).all():
        raise ValueError("descriptors hold nan or infinity")
    if dtype == "bit":
        return np.packbits(descriptors > 0, axis=1)
    if dtype == "int8":
        largest = np.abs(descriptors).max(axis=1, keepdims=True, initial=0)
        return np.round(descriptors * (127 / np.where(largest > 0, largest, 1))).astype(np.int8)
    return descriptors.astype(dtype)


def decode(stored: np.ndarray, dtype: str, code_dim: int) -> np.ndarray:
    """Decodes the result of `encode` to (N, code_dim) float32 of length 1; zero stays zero."""
    if dtype == "bit":
        decoded = np.unpackbits(stored, axis=1, count=code_dim) * np.float32(2) - np.float32(1)
    elif dtype == "float16":
        decoded = _half_to_single(stored)
    else:
        decoded = stored.astype(np.float32)
    length = np.linalg.norm(decoded, axis=1, keepdims=True)
    decoded /= np.where(length > 0, length, 1)
    return decoded


def _half_to_single(half: np.ndarray) -> np.ndarray:
    """Finite float16 as float32: the bits that `astype` gives, in a quarter of its time."""
    bits = half.view(np.int16).astype(np.int32)  # the sign is carried to the top
    bits <<= 13  # float32 has 13 more bits of fraction
    bits &= np.int32(-0x70002000)  # clears the three bits below the sign
    single = bits.view(np.float32)
    single *= np.float32(2.0**112)  # exponent bias 127, that of half precision 15
    return single


def encode_features(features: LocalFeatures, dtype: str) -> dict[str, np.ndarray]:
    """Encodes the arrays of one image's features; `LocalFeatures.sizes` are stored beside them.

    Returns FEATURE_ARRAYS: "descriptors" as `encode` gives them, all others float32 of the same
    shape. Raises ValueError where keypoints or descriptors are not finite.
    """
    if not np.isfinite(features.keypoints).all():
        raise ValueError("keypoints hold nan or infinity")
    arrays = {name: np.asarray(getattr(features, name), np.float32) for name in FEATURE_ARRAYS}
    return arrays | {"descriptors": encode(arrays["descriptors"], dtype)}


def decode_features(
    arrays: Mapping[str, np.ndarray], sizes: Sequence[int], dtype: str, code_dim: int
) -> LocalFeatures:
    """Decodes what `encode_features` returned, and copies it; sizes as `LocalFeatures.sizes`."""
    keypoints, scores, scales = (np.array(arrays[n]) for n in ("keypoints", "scores", "scales"))
    descriptors = decode(arrays["descriptors"], dtype, code_dim)
    frames = tuple(sizes[:2]), tuple(sizes[2:6]), tuple(sizes[6:8])
    return LocalFeatures(keypoints, descriptors, scores, scales, *frames)


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a type that descriptors cannot be stored in."""
    if dtype not in FEATURE_DTYPES:
        raise ValueError(f"unknown descriptor dtype {dtype!r}; known: {', '.join(FEATURE_DTYPES)}")


def stored_type(code_dim: int, dtype: str) -> tuple[np.dtype, int]:
    """Returns NumPy's type and the number of columns of a stored descriptor array."""
    if dtype == "bit":
        return np.dtype(np.uint8), -(-code_dim // 8)
    return np.dtype(dtype), code_dim


def forecast(images: int, mean_features: float, code_dim: int, dtype: str) -> int:
    """Predicts the bytes that a store takes, to within a few per cent.

    mean_features: of an image (published: at most 1000, 877 on average at five scales, 251 at one).
    """
    kind, width = stored_type(code_dim, dtype)
    return round(images * (mean_features * (width * kind.itemsize + FEATURE_BYTES) + ITEM_BYTES))
