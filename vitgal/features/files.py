"""Reads arrays and JSON from files that may be damaged: cut short, changed, or something else."""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"  # of `.npy` format version 1.0, which NumPy writes for plain arrays


def map_array(path: Path) -> np.ndarray:
    """Maps a `.npy` of any shape into memory, read-only; pickled objects are refused.

    Raises OSError where the file cannot be read, ValueError where it is not a whole array.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except OSError:
        raise
    except Exception as error:  # NumPy raises errors of many types for a damaged header
        raise ValueError(f"{path} is not a whole .npy of numbers ({error})") from None


def map_array_as(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Maps a `.npy` of known type and shape without parsing its header, five times faster.

    Raises OSError where the file cannot be read, ValueError where its length differs.
    """
    with open(path, "rb", buffering=0) as handle:
        file = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    start = 10 + int.from_bytes(file[8:10], "little")
    if file[:8] != MAGIC or len(file) != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path.name} is not an array of shape {shape} and type {dtype}")
    return np.ndarray(shape, dtype, file, start)


def leading_rows(path: Path) -> np.ndarray:
    """Reads the whole rows at the beginning of a `.npy` that may be cut short.

    Returns (n, ...) of the file's type; (0,) float64 where the header cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            if np.lib.format.read_magic(handle) != (1, 0):
                return np.empty(0)
            shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
            row = math.prod(shape[1:]) * dtype.itemsize
            if dtype.hasobject or not shape or min(shape) < 0 or not row:
                return np.empty(0)
            data = handle.read()
    except Exception:  # as in `map_array`
        return np.empty(0)
    rows = min(len(data) // row, shape[0])
    return np.frombuffer(data[: rows * row], dtype).reshape(rows, *shape[1:])


def read_json(path: Path, schema: Any) -> Any:
    """Reads JSON that `conforms` to a schema; ValueError where it is damaged or differs."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error})") from None
    if not conforms(value, schema):
        raise ValueError(f"{path} holds other entries than expected")
    return value


def conforms(value: Any, schema: Any) -> bool:
    """Tells whether a value from a JSON file has the structure of a schema.

    A type stands for its instances, a tuple for its members, a dict for dicts with at least these
    entries, a list of one schema for lists of any length, a longer one for lists of that length.
    """
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(
            name in value and conforms(value[name], part) for name, part in schema.items()
        )
    if isinstance(schema, list):
        if not isinstance(value, list) or (len(schema) > 1 and len(value) != len(schema)):
            return False
        return all(conforms(part, schema[i % len(schema)]) for i, part in enumerate(value))
    return value in schema if isinstance(schema, tuple) else isinstance(value, schema)
