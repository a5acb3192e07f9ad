"""A folder of one's own photographs: what is in it, read upright."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from vitgal import runs
from vitgal.data.images import PATCH, ImageError, read_image

READ = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm"}
UNREAD = {".heic", ".heif", ".avif", ".gif", ".cr2", ".nef", ".arw", ".dng"}  # OpenCV has no reader
ELONGATED = 4.0  # sides in a greater ratio: squashed to a square, little of it is recognisable
LARGE = 10_000  # pixels; what is small in so large a photograph vanishes in the network's input
ORIENTATION = 0x0112  # EXIF
SHOWN = 3  # names in a message


class PhotographError(runs.UserError, ValueError):
    """A folder, a photograph or a box that nothing can be searched with; the message says why."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder and its sub-folders, by name relative to it, sorted.

    names: photographs to read. unread: photographs of formats that are not read here. others: the
    number of all other files.
    """

    folder: Path
    names: list[str]
    unread: list[str]
    others: int


def list_photographs(folder: Path) -> Listing:
    """Lists a folder's photographs, sub-folders included, hidden files and folders left out.

    Raises PhotographError where there is no such folder or no photograph in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PhotographError(f"{folder} is no folder: give the folder of your photographs")
    names = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    kinds = {name: Path(name).suffix.lower() for name in names}
    read = [name for name in names if kinds[name] in READ]
    unread = [name for name in names if kinds[name] in UNREAD]
    if not read:
        there = f"{len(names)} files, such as {names[0]}" if names else "nothing"
        raise PhotographError(
            f"{folder} holds no photograph that can be read ({there}); photographs end in "
            f"{' '.join(sorted(READ))}: convert others to one of these"
        )
    return Listing(folder, read, unread, len(names) - len(read) - len(unread))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden; links are followed, each folder once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if place in seen:
            folders.clear()
        else:
            yield from (Path(root) / name for name in files if not name.startswith("."))
        seen.add(place)


def read_upright(path: Path) -> np.ndarray:
    """A photograph (H, W, 3) uint8 RGB, turned by its EXIF tag; PhotographError says what is wrong.

    One with a side below 16 pixels, a patch of the network, is refused.
    """
    try:
        image = read_image(path, ignore_orientation=False)
    except FileNotFoundError:
        raise PhotographError(f"there is no photograph {path}") from None
    except ImageError as error:
        raise PhotographError(f"{Path(path).name}: {error.reason}") from error
    height, width = image.shape[:2]
    if min(height, width) < PATCH:
        raise PhotographError(
            f"{Path(path).name}: {width} x {height} pixels, less than one patch of {PATCH} x "
            f"{PATCH}: nothing can be recognised in it"
        )
    return image


def remark(height: int, width: int) -> str | None:
    """What to know of a photograph (or box) of unusual shape or size; None for all others."""
    ratio, longest = max(height, width) / min(height, width), max(height, width)
    if ratio > ELONGATED:
        return (
            f"{width} x {height} pixels, one side {ratio:.0f} times the other: hardly recognisable "
            "once squashed to a square; draw a box, or cut it up"
        )
    if longest > LARGE:
        return (
            f"{width} x {height} pixels: what is small in it vanishes when it is reduced for the "
            "network; draw a box to look closer"
        )
    return None


def _digest(path: Path) -> str:
    try:
        return runs.fingerprint_file(path)
    except FileNotFoundError:
        raise PhotographError(f"there is no photograph {path}") from None
    except OSError as error:
        raise PhotographError(f"{Path(path).name}: cannot be read ({error.strerror})") from None


def _orientation(path: Path) -> int:
    """The EXIF tag by which OpenCV has turned the photograph; 1 where there is none."""
    try:
        with PIL.Image.open(path) as image:
            found = image.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError):
        return 1  # a format that only OpenCV reads has no tag that it would obey
    return found if found in range(1, 9) else 1


def _unread(name: str) -> str:
    return f"{Path(name).suffix.lower()} is not read here: convert it to .jpg or .png"
