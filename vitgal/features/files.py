"""Reads arrays and JSON from files that may be damaged, or malicious."""

import functools
import io
import json
import math
import mmap
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitgal import runs

INT32 = range(-(2**31), 2**31)


class FileError(runs.UserError, ValueError):
    """A file is damaged or holds something else; the message names it."""


def map_array(
    path: Path, dtype: np.dtype | None = None, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Maps a `.npy` of plain numbers into memory, read-only.

    Args:
        path: of a file in format 1.0, which NumPy writes for plain arrays.
        dtype, shape: together the only type and shape that are accepted, in C order.
    Raises:
        OSError: the file cannot be read.
        FileError: it is not a whole array of integers or floats, or of another type or shape.
    """
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as handle:
            stated, start = _read_header(handle), handle.tell()
            if dtype is not None and stated != (dtype, shape, "C"):
                raise ValueError(f"an array of shape {stated[1]} and type {stated[0]}")
            file = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return _array(file, start, *stated)
    except Exception as error:  # NumPy raises errors of many types for a damaged header
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        reason = f"{path} is not a whole .npy of numbers"
        if dtype is not None:
            reason += f", {dtype} of shape {shape}"
        raise FileError(f"{reason} ({error})") from None


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file without waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads arrays of any shape from an `.npz` that `runs.write_arrays` wrote; they are read-only.

    Raises FileNotFoundError, or FileError where one is missing or not a whole array of numbers.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file, zipfile.ZipFile(file) as archive:
            return {name: _read_member(archive, name, os.path.getsize(path)) for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise FileError(f"{path} is not a whole .npz of {', '.join(names)} ({error})") from None


def _read_member(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    # A compressed array could unpack to a thousand times the file's size.
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > limit:
        raise ValueError(f"{name} is compressed")
    data = archive.read(member)
    stream = io.BytesIO(data)
    stated = _read_header(stream)
    return _array(data, stream.tell(), *stated)


def _read_header(file: BinaryIO) -> tuple[np.dtype, tuple[int, ...], str]:
    """Reads type, shape and order ("C" or "F") from a `.npy` header; refuses object arrays."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another format than 1.0")
    size = file.read(2)
    return _parse_header(size + file.read(int.from_bytes(size, "little")))


@functools.lru_cache  # many files have the same few headers
def _parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], str]:
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {shape} and type {dtype}")
    return dtype, shape, "F" if is_fortran else "C"


def _array(data: Any, start: int, dtype: np.dtype, shape: tuple[int, ...], order: str):
    if len(data) != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes do not hold {dtype} of shape {shape}")
    return np.ndarray(shape, dtype, data, start, order=order)


def divides(offsets: np.ndarray, size: int) -> bool:
    """Returns whether offsets (N + 1,) of N parts rise from 0 to a size."""
    rising = offsets.ndim == 1 and offsets.size and (offsets[1:] >= offsets[:-1]).all()
    return bool(rising and offsets[0] == 0 and offsets[-1] == size)


def read_json(path: Path, schema: Any) -> Any:
    """Reads JSON that conforms to a schema, see `runs.conforms`; FileError for another one."""
    try:
        with open(path, encoding="utf-8", opener=_without_waiting) as handle:
            value = json.loads(handle.read())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is not whole JSON ({error})") from None
    if not runs.conforms(value, schema):
        raise FileError(f"{path} holds other entries than expected")
    return value
