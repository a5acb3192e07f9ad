"""Global descriptors that another system made: read, ranked and scored like our own.

Two layouts are read. A `.npy` (N, D) of floats with a text file of the same stem beside it, an
image name a line; or hloc's HDF5, where each image is a group with a dataset `global_descriptor`.
Names are those of the benchmark's images, with or without `jpg/` before and `.jpg` behind them;
queries and database images stand in one file.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np

from vitgal import runs

HLOC = "global_descriptor"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHOWN = 3  # missing names that an error spells out


class DescriptorError(runs.UserError, ValueError):
    """A file of descriptors that cannot be used; the message says which, why and what to do."""


def read_descriptors(path: str | os.PathLike, names: Sequence[str]) -> np.ndarray:
    """The descriptors of these images out of another system's file.

    Args:
        path: `.npy` with `.txt` beside it, or `.h5` / `.hdf5` (hloc).
        names: of a benchmark's images, in the order wanted.
    Returns:
        (len(names), D) float32, each row divided by its length, so that inner products are cosines.
    Raises:
        FileNotFoundError: the file, or the names of a `.npy`, are not there.
        DescriptorError: another kind of file, no matrix of floats, names that are not as many as
            rows or stand twice, an image without descriptor, a row that is zero or not finite.
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
    listed = path.with_suffix(".txt")
    if not listed.is_file():
        raise FileNotFoundError(
            f"{path} needs the names of its rows: write them to {listed}, one image a line"
        )
    lines = [line for line in listed.read_text(encoding="utf-8").splitlines() if line]
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DescriptorError(f"{path} is not a whole .npy of numbers ({error})") from None
    if rows.ndim != 2 or len(rows) != len(lines):
        raise DescriptorError(f"{path} has shape {rows.shape}, {listed} {len(lines)} names")
    places = _places(lines, path)
    return np.asarray(rows[[places[key] for key in _wanted(names, places, path)]])


def _read_hloc(path: Path, names: Sequence[str]) -> np.ndarray:
    try:
        with h5py.File(path, "r") as file:
            found: list[str] = []
            file.visititems(lambda name, item: found.append(name) if HLOC in _keys(item) else None)
            places = _places(found, path)
            chosen = [found[places[key]] for key in _wanted(names, places, path)]
            rows = [np.asarray(file[name][HLOC]).ravel() for name in chosen]
    except OSError as error:
        raise DescriptorError(f"{path} is not a whole HDF5 file ({error})") from None
    widths = {row.size for row in rows}
    if len(widths) > 1:
        raise DescriptorError(f"{path}: descriptors of different lengths {sorted(widths)}")
    return np.array(rows)


def _keys(item: h5py.Group | h5py.Dataset) -> Iterable[str]:
    return item.keys() if isinstance(item, h5py.Group) else ()


def _plain(name: str) -> str:
    """An image's name without `jpg/` before and without its suffix."""
    name = name.removeprefix("./").removeprefix("jpg/")
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _places(names: Sequence[str], path: Path) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if places.setdefault(_plain(name), place) != place:
            raise DescriptorError(f"{path} names the image {_plain(name)} twice")
    return places


def _wanted(names: Sequence[str], places: dict[str, int], path: Path) -> list[str]:
    keys = [_plain(name) for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key not in places]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
        raise DescriptorError(
            f"{path} has no descriptor of {len(missing)} of {len(names)} images: {shown}; describe "
            "every query and every database image"
        )
    return keys
