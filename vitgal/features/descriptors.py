"""Reads global descriptors of another system, to be ranked and scored like the model's own.

Two layouts are read: a `.npy` (N, D) beside a `.txt` of the same stem with one image name a line,
and hloc's HDF5, one group an image with a dataset `global_descriptor`. Names are the benchmark's,
with or without `jpg/` and suffix; one file holds queries and database images.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from vitgal import runs
from vitgal.data.photographs import SUFFIXES
from vitgal.features.files import map_array

HLOC = "global_descriptor"
LARGEST = 1 << 16  # values of one descriptor, or of one compressed piece of an HDF5 file
DEPTH = 64  # of groups in groups
LINKS = 16  # that may follow one on another, as in HDF5
FILTERS = {
    getattr(h5py.h5z, f"FILTER_{name}") for name in ("DEFLATE", "SHUFFLE", "FLETCHER32", "LZF")
}
COPY = "write the descriptors themselves into one plain file"


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
        DescriptorError: another kind of file, a damaged one, one that reads other files, no matrix
            of floats, another number of names than rows, a repeated name, an image without
            descriptor, or a row that is zero or not finite.
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
        raise DescriptorError(str(error)) from None
    if rows.ndim != 2 or len(rows) != len(lines):
        raise DescriptorError(f"{path} has shape {rows.shape}, {list_file} {len(lines)} names")
    return np.asarray(rows[_positions(lines, names, path)])


def _read_hloc(path: Path, names: Sequence[str]) -> np.ndarray:
    try:
        with h5py.File(path, "r") as file:
            described = dict(_described(file, path))
            stored = sorted(described)
            items = [described[stored[position]] for position in _positions(stored, names, path)]
            for name, item in zip(names, items, strict=True):
                _check(item, f"{path}: the descriptor of {name}")
            if len(widths := {item.size for item in items}) > 1:
                raise DescriptorError(f"{path}: descriptors of different lengths {sorted(widths)}")
            return np.array([item[()].ravel() for item in items])
    except DescriptorError:
        raise
    except Exception as error:  # HDF5's library reports damage by errors of many types
        if "lock file" in str(error) or "open for write" in str(error):
            raise DescriptorError(
                f"another program writes {path} or did not close it ({error}): wait until it ends, "
                "or make the file again"
            ) from None
        raise DescriptorError(f"{path} is not a whole HDF5 file ({error})") from None


def _described(file: h5py.File, path: Path) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yields the name of each group with a descriptor and this, by links inside the file alone."""
    left = path.stat().st_size // 16  # a link takes more: groups linked over and over end here
    groups: list[tuple[list[str], list[h5py.Group]]] = [([], [file])]
    while groups:
        parts, above = groups.pop()
        for name in above[-1].id:
            left -= 1
            if left < 0:
                raise DescriptorError(f"{path} has groups that hold each other")
            item = _follow(above[-1], name, path)
            if isinstance(item, h5py.Group) and item not in above:
                if len(above) > DEPTH:
                    raise DescriptorError(f"{path} has groups in groups more than {DEPTH} deep")
                groups.append(([*parts, os.fsdecode(name)], [*above, item]))
            elif isinstance(item, h5py.Dataset) and name == HLOC.encode() and parts:
                yield "/".join(parts), item


def _follow(group: h5py.Group, name: bytes, path: Path, hops: int = LINKS) -> h5py.HLObject | None:
    """Opens the target of a name in a group; None for a broken soft link."""
    item = group.file if name.startswith(b"/") else group
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if not isinstance(item, h5py.Group) or not item.id.links.exists(part):
            return None
        links = item.id.links
        kind = links.get_info(part).type
        if kind == h5py.h5l.TYPE_HARD:
            item = item[part]
        elif kind != h5py.h5l.TYPE_SOFT:
            raise DescriptorError(f"{path} links to another file at {os.fsdecode(part)!r}: {COPY}")
        elif not hops:
            return None
        else:
            item = _follow(item, links.get_val(part), path, hops - 1)
    return item


def _check(item: h5py.Dataset, label: str) -> None:
    """Refuses a dataset whose values are not in the file; reads none of them.

    External and virtual storage could copy any file of the user into the results. Unwritten or
    compressed values could claim gigabytes in a few bytes.
    """
    plan, values, kind = item.id.get_create_plist(), item.size or 0, item.dtype
    if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL:
        raise DescriptorError(f"{label} is stored in another file: {COPY}")
    if kind.kind not in "iuf" or not 0 < values <= LARGEST:
        raise DescriptorError(f"{label} has shape {item.shape} and type {kind}: no list of numbers")
    if plan.get_layout() == h5py.h5d.CHUNKED:
        chunk = math.prod(plan.get_chunk())
        filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
        whole = chunk <= LARGEST and set(filters) <= FILTERS
        whole = whole and item.id.get_num_chunks() * chunk >= values
    else:
        whole = item.id.get_storage_size() == values * kind.itemsize
    if not whole:
        raise DescriptorError(f"{label} was never written completely, or is packed: {COPY}")


def _plain(name: str) -> str:
    """Returns an image's name without `jpg/` before and without its suffix."""
    name = name.removeprefix("./").removeprefix("jpg/")
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _positions(stored: Sequence[str], names: Sequence[str], path: Path) -> list[int]:
    positions: dict[str, int] = {}
    for position, name in enumerate(map(_plain, stored)):
        if positions.setdefault(name, position) != position:
            raise DescriptorError(f"{path} names the image {runs.printable(name)} twice")
    missing = [name for name in names if _plain(name) not in positions]
    if missing:
        raise DescriptorError(
            f"{path} has no descriptor of {len(missing)} of {len(names)} images: "
            f"{runs.abbreviate(missing)}; {_remedy(stored, missing)}"
        )
    return [positions[_plain(name)] for name in names]


def _remedy(stored: Sequence[str], missing: Sequence[str]) -> str:
    """Returns how to rename the images if names differ only in their folders."""
    wanted = {_plain(name).rpartition("/")[2]: _plain(name) for name in missing}
    pairs = {name: wanted.get(_plain(_last(name))) for name in stored}
    pairs = {name: target for name, target in pairs.items() if target}
    if not pairs:
        few = " and ".join(map(repr, stored[:2])) or "no image"
        return f"describe every query and every database image (the file names {few})"
    few = [f"{name!r} to {target!r}" for name, target in list(pairs.items())[:2]]
    cut = {name[: -len(_last(name))] for name, target in pairs.items() if "/" not in target}
    prefixes = f" (without {' and '.join(map(repr, sorted(cut - {''})[:3]))})" if cut - {""} else ""
    return f"rename its images{prefixes}: {', '.join(few)}"


def _last(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]
