"""Files of other systems: HDF5 that is read as data alone, and the images that it names."""

import contextlib
import math
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import h5py

from vitgal import runs
from vitgal.data.photographs import SUFFIXES

LARGEST = 1 << 16  # values of one descriptor, or of one compressed piece of an HDF5 file
DEPTH = 64  # of groups in groups
LINKS = 16  # that may follow one on another, as in HDF5
FILTERS = {
    getattr(h5py.h5z, f"FILTER_{name}") for name in ("DEFLATE", "SHUFFLE", "FLETCHER32", "LZF")
}
COPY = "write the descriptors themselves into one plain file"


class DescriptorError(runs.UserError, ValueError):
    """A file of descriptors cannot be used; the message names the file, the reason and a remedy."""


@contextlib.contextmanager
def opened_hdf5(path: Path) -> Iterator[h5py.File]:
    """Opens an HDF5 file; DescriptorError where it is damaged or being written."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DescriptorError:
        raise
    except Exception as error:  # HDF5's library reports damage by errors of many types
        if "lock file" in str(error) or "open for write" in str(error):
            raise DescriptorError(
                f"another program writes {path} or did not close it ({error}): wait until it ends, "
                "or make the file again"
            ) from None
        raise DescriptorError(f"{path} is not a whole HDF5 file ({error})") from None


def find_datasets(
    file: h5py.File, path: Path, wanted: Collection[str]
) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yields each dataset of a wanted name with its group's name, by links inside the file alone.

    Raises DescriptorError for a file whose groups hold each other or lie too deep.
    """
    wanted = {name.encode() for name in wanted}
    left = path.stat().st_size // 16  # a link takes more: groups linked over and over end here
    groups: list[tuple[list[str], list[h5py.Group]]] = [([], [file])]
    while groups:
        parts, above = groups.pop()
        for name in above[-1].id:
            left -= 1
            if left < 0:
                raise DescriptorError(f"{path} has groups that hold each other")
            item = follow(above[-1], name, path)
            if isinstance(item, h5py.Group) and item not in above:
                if len(above) > DEPTH:
                    raise DescriptorError(f"{path} has groups in groups more than {DEPTH} deep")
                groups.append(([*parts, os.fsdecode(name)], [*above, item]))
            elif isinstance(item, h5py.Dataset) and name in wanted and parts:
                yield "/".join(parts), item


def follow(group: h5py.Group, name: bytes, path: Path, hops: int = LINKS) -> h5py.HLObject | None:
    """Opens the target of a name in a group, None for none; DescriptorError for another file's."""
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
            item = follow(item, links.get_val(part), path, hops - 1)
    return item


def check_values(item: h5py.Dataset, label: str, most: int = LARGEST, least: int = 1) -> None:
    """Refuses a dataset whose values are not in the file; reads none of them.

    External and virtual storage could copy any file of the user into the results. Unwritten or
    compressed values could claim gigabytes in a few bytes.

    label: begins the message. most, least: number of values. Raises DescriptorError.
    """
    plan, values, kind = item.id.get_create_plist(), item.size or 0, item.dtype
    if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL:
        raise DescriptorError(f"{label} is stored in another file: {COPY}")
    if kind.kind not in "iuf" or not least <= values <= most:
        raise DescriptorError(f"{label} has shape {item.shape} and type {kind}: no list of numbers")
    if plan.get_layout() == h5py.h5d.CHUNKED:
        chunk = math.prod(plan.get_chunk())
        filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
        whole = chunk <= most and set(filters) <= FILTERS
        whole = whole and item.id.get_num_chunks() * chunk >= values
    else:
        whole = item.id.get_storage_size() == values * kind.itemsize
    if not whole:
        raise DescriptorError(f"{label} was never written completely, or is packed: {COPY}")


def plain_name(name: str) -> str:
    """Returns an image's name without `jpg/` before and without its suffix."""
    name = name.removeprefix("./").removeprefix("jpg/")
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def find_names(
    stored: Sequence[str], names: Sequence[str], path: Path, what: str = "descriptor"
) -> list[int]:
    """Returns the positions among a file's image names of the wanted ones.

    Names may have `jpg/` before and a suffix. what: that a missing image lacks. Raises
    DescriptorError for a name that the file has twice, or not (with the file's own and the remedy).
    """
    positions: dict[str, int] = {}
    for position, name in enumerate(map(plain_name, stored)):
        if positions.setdefault(name, position) != position:
            raise DescriptorError(f"{path} names the image {runs.printable(name)} twice")
    missing = [name for name in names if plain_name(name) not in positions]
    if missing:
        raise DescriptorError(
            f"{path} has no {what} of {len(missing)} of {len(names)} images: "
            f"{runs.abbreviate(missing)}; {_remedy(stored, missing)}"
        )
    return [positions[plain_name(name)] for name in names]


def _remedy(stored: Sequence[str], missing: Sequence[str]) -> str:
    """Returns how to rename the images if names differ only in their folders."""
    wanted = {plain_name(name).rpartition("/")[2]: plain_name(name) for name in missing}
    pairs = {name: wanted.get(plain_name(_last(name))) for name in stored}
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
