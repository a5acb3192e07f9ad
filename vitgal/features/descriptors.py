"""Reads global descriptors of another system, to be ranked and scored like our own.

Two layouts are read: a `.npy` (N, D) beside a `.txt` of the same stem with one image name a line,
and hloc's HDF5, one group an image with a dataset `global_descriptor`. Names are the benchmark's,
with or without `jpg/` and suffix; one file holds queries and database images.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from vitgal import runs
from vitgal.features.files import map_array

HLOC = "global_descriptor"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class DescriptorError(runs.UserError, ValueError):
    """A file of descriptors cannot be used; the message names the file, the reason and a remedy."""


def read_descriptors(path: str | os.PathLike, names: Sequence[str]) -> np.ndarray:
    """Reads the descriptors of these images from another system's file.

    Args:
        path: `.npy` with `.txt` beside it, or `.h5` / `.hdf5` (hloc).
        names: of a benchmark's images, in the order wanted.
    Returns:
        (N, D) float32, a row a name, each of length 1, so that inner products are cosines.
    Raises:
        FileNotFoundError: the file, or the list of names of a `.npy`, is missing.
        DescriptorError: another kind of file, a damaged one, no matrix of floats, another number of
            names than rows, a repeated name, an image without descriptor, or a row that is zero or
            not finite.
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
    rows = rows.astype(np.float32)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if bad.size:
        raise DescriptorError(
            f"{path}: the descriptor of {names[bad[0]]} is zero or not finite ({bad.size} such): "
            "describe these images again"
        )
    return (rows / lengths[:, None]).astype(np.float32)


def _read_npy(path: Path, names: Sequence[str]) -> np.ndarray:
    list_file = path.with_suffix(".txt")
    if not list_file.is_file():
        raise FileNotFoundError(
            f"{path} needs the names of its rows: write them to {list_file}, one image a line"
        )
    try:
        lines = [line for line in runs.read_lines(list_file) if line]
        rows = map_array(path)
    except ValueError as error:
        raise DescriptorError(f"{path} and {list_file.name} cannot be read: {error}") from None
    if rows.ndim != 2 or len(rows) != len(lines):
        raise DescriptorError(f"{path} has shape {rows.shape}, {list_file} {len(lines)} names")
    return np.asarray(rows[_positions(lines, names, path)])


def _read_hloc(path: Path, names: Sequence[str]) -> np.ndarray:
    try:
        with h5py.File(path, "r") as file:
            groups: list[str] = []
            file.visititems(
                lambda name, item: (
                    groups.append(name) if isinstance(item, h5py.Group) and HLOC in item else None
                )
            )
            wanted = [groups[position] for position in _positions(groups, names, path)]
            rows = [np.asarray(file[name][HLOC]).ravel() for name in wanted]
    except DescriptorError:
        raise
    except Exception as error:  # HDF5's library reports damage by errors of many types
        raise DescriptorError(f"{path} is not a whole HDF5 file ({error})") from None
    widths = {row.size for row in rows}
    if len(widths) > 1:
        raise DescriptorError(f"{path}: descriptors of different lengths {sorted(widths)}")
    return np.array(rows)


def _plain(name: str) -> str:
    """An image's name without `jpg/` before and without its suffix."""
    name = name.removeprefix("./").removeprefix("jpg/")
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _positions(stored: Sequence[str], names: Sequence[str], path: Path) -> list[int]:
    """Positions of `names` in the list `stored`; DescriptorError where one is missing."""
    positions: dict[str, int] = {}
    for position, name in enumerate(map(_plain, stored)):
        if positions.setdefault(name, position) != position:
            raise DescriptorError(f"{path} names the image {name} twice")
    missing = [name for name in names if _plain(name) not in positions]
    if missing:
        raise DescriptorError(
            f"{path} has no descriptor of {len(missing)} of {len(names)} images: "
            f"{runs.abbreviate(missing)}; "
            "describe every query and every database image"
        )
    return [positions[_plain(name)] for name in names]
