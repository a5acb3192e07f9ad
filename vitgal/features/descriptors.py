"""Reads global descriptors of another system, to be ranked and scored like the model's own.

Two layouts are read: a `.npy` (N, D) beside a `.txt` of the same stem with one image name a line,
and hloc's HDF5, one group an image with a dataset `global_descriptor`. Names are the benchmark's,
with or without `jpg/` and suffix; one file holds queries and database images.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.features import foreign
from vitgal.features.files import map_array
from vitgal.features.foreign import DescriptorError

HLOC = "global_descriptor"


def read_descriptors(path: str | os.PathLike, names: Sequence[str]) -> np.ndarray:
    """Reads the descriptors of these images from another system's file.

    Returns (N, D) float32, a row for each of the names, of length 1. Raises FileNotFoundError, also
    for the list of names of a `.npy`; DescriptorError for another kind of file, a damaged one, one
    that reads other files, no matrix of floats, another number of names than rows, a repeated name,
    an image without descriptor, or a row that is zero or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no descriptors {path}: a .npy with names beside it (.txt), or hloc's .h5"
        )
    readers = {".npy": _read_npy, ".h5": _read_hloc, ".hdf5": _read_hloc}
    if path.suffix.lower() not in readers:
        raise DescriptorError(f"{path}: descriptors come as {', '.join(readers)}")
    rows = readers[path.suffix.lower()](path, names)
    if rows.ndim != 2 or rows.dtype.kind != "f" or not rows.shape[1]:
        raise DescriptorError(f"{path} holds {rows.dtype} {rows.shape}, no floats (images, values)")
    with np.errstate(over="ignore"):  # float64 above the range of float32: refused below
        rows = rows.astype(np.float32)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if bad.size:
        raise DescriptorError(
            f"{path}: the descriptor of {names[bad[0]]} is zero or not finite ({bad.size} such): "
            "describe these images again"
        )
    return (rows / lengths[:, None]).astype(np.float32)


def described_images(path: str | os.PathLike) -> list[str]:
    """Lists the images of a file of descriptors in its order; raises as `read_descriptors`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no descriptors {path}")
    if path.suffix.lower() == ".npy":
        return _row_names(path)
    with foreign.opened_hdf5(path) as file:
        return sorted(name for name, _ in foreign.find_datasets(file, path, [HLOC]))


def _row_names(path: Path) -> list[str]:
    list_file = path.with_suffix(".txt")
    if not list_file.is_file():
        raise FileNotFoundError(
            f"{path} needs the names of its rows: write them to {list_file}, one image a line"
        )
    return [line for line in runs.read_lines(list_file) if line]


def _read_npy(path: Path, names: Sequence[str]) -> np.ndarray:
    try:
        stored, rows = _row_names(path), map_array(path)
    except ValueError as error:
        raise DescriptorError(str(error)) from None
    if rows.ndim != 2 or len(rows) != len(stored):
        raise DescriptorError(f"{path} has shape {rows.shape}, its .txt {len(stored)} names")
    return np.asarray(rows[foreign.find_names(stored, names, path)])


def _read_hloc(path: Path, names: Sequence[str]) -> np.ndarray:
    with foreign.opened_hdf5(path) as file:
        described = dict(foreign.find_datasets(file, path, [HLOC]))
        stored = sorted(described)
        positions = foreign.find_names(stored, names, path)
        items = [described[stored[position]] for position in positions]
        for name, item in zip(names, items, strict=True):
            foreign.check_values(item, f"{path}: the descriptor of {name}")
        if len(widths := {item.size for item in items}) > 1:
            raise DescriptorError(f"{path}: descriptors of different lengths {sorted(widths)}")
        return np.array([item[()].ravel() for item in items])
