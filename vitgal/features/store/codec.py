"""How descriptors are stored: types, widths and sizes."""

import functools
from collections.abc import Container, Mapping

import numpy as np

from vitgal import runs

FORMAT = 1
DTYPES = ("float16", "float32", "int8", "bit")
QUERY = "query/"
AUTO = (
    "inference_precision auto depends on the machine: go on with one like the first, or set "
    "overwrite: true and a precision by name to begin anew"
)
ITEM_BYTES = 150  # of one image beside its features: name and sizes in items.json, offset, checksum
FEATURE_BYTES = 16  # of one feature beside its descriptor: keypoint, score, scale


class StoreError(runs.UserError, RuntimeError):
    """A store on disk that is damaged or incomplete; the message names the folder or the item."""


def query_key(name: str, database: Container[str]) -> str:
    """The key under which a query's features are stored beside those of `database`'s images."""
    # The second case is none that can be stored; it becomes a repeated key, which is refused.
    return QUERY + name if name in database or QUERY + name in database else name


def encode(descriptors: np.ndarray, dtype: str) -> np.ndarray:
    """Descriptors (N, C) float32 as stored: (N, C) of that type, for "bit" (N, ceil(C / 8)) uint8.

    int8 is scaled to each descriptor's largest value and "bit" keeps signs alone: the length is not
    stored, since `decode` brings every descriptor back to length 1. Raises ValueError for an
    unknown dtype or values that are not finite.
    """
    _check_dtype(dtype)
    if not np.isfinite(descriptors).all():
        raise ValueError("descriptors hold nan or infinity")
    if dtype == "bit":
        return np.packbits(descriptors > 0, axis=1)
    if dtype == "int8":
        largest = np.abs(descriptors).max(axis=1, keepdims=True, initial=0)
        return np.round(descriptors * (127 / np.where(largest > 0, largest, 1))).astype(np.int8)
    return descriptors.astype(dtype)


def decode(stored: np.ndarray, dtype: str, code_dim: int) -> np.ndarray:
    """Stored descriptors back as (N, code_dim) float32 of length 1 (all-zero ones stay zero)."""
    if dtype == "bit":
        decoded = _signs()[stored].reshape(len(stored), 8 * stored.shape[1])[:, :code_dim]
    elif dtype == "float16":
        decoded = _single(stored)
    else:
        decoded = stored.astype(np.float32)
    length = np.linalg.norm(decoded, axis=1, keepdims=True)
    decoded /= np.where(length > 0, length, 1)
    return decoded


@functools.cache
def _signs() -> np.ndarray:
    """(256, 8) float32: the bits of every byte, the highest first, as 1 and -1."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return np.where(bits, np.float32(1), np.float32(-1))


def _single(half: np.ndarray) -> np.ndarray:
    """Finite float16 as float32: the bits that `astype` gives, in a quarter of its time."""
    bits = half.view(np.int16).astype(np.int32)  # the sign is carried to the top
    bits <<= 13  # float32 has 13 more bits of fraction
    bits &= np.int32(-0x70002000)  # the sign, and below three bits of it exponent and fraction
    single = bits.view(np.float32)
    single *= np.float32(2.0**112)  # its exponent counts from 127, half precision's from 15
    return single


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown descriptor dtype {dtype!r}; known: {', '.join(DTYPES)}")


def stored_width(code_dim: int, dtype: str) -> int:
    """Columns of a stored descriptor array."""
    return -(-code_dim // 8) if dtype == "bit" else code_dim


def stored_type(dtype: str) -> np.dtype:
    """numpy's type of a stored descriptor array."""
    return np.dtype("uint8" if dtype == "bit" else dtype)


def forecast(images: int, mean_features: float, code_dim: int, dtype: str = "float16") -> int:
    """Bytes that a store of so many images will take, to within a few per cent.

    Args:
        mean_features: features an image (published: at most 1000, 877 on average at five scales
            and 251 at one).
    """
    _check_dtype(dtype)
    code = stored_width(code_dim, dtype) * stored_type(dtype).itemsize
    return round(images * (mean_features * (code + FEATURE_BYTES) + ITEM_BYTES))


def _shown(settings: Mapping) -> str:
    return "".join(f", {name} {settings[name]}" for name in sorted(settings))
