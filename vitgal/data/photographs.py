"""Lists and reads a folder of the user's own photographs."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image

from vitgal import runs
from vitgal.data.images import PATCH, ImageError, read_image

SUPPORTED = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm"}
UNSUPPORTED = {".heic", ".heif", ".avif", ".gif", ".cr2", ".nef", ".arw", ".dng"}  # by OpenCV
ELONGATED = 4.0  # ratio of the sides; beyond it little is recognisable once squashed to a square
LARGE = 10_000  # pixels; small details of a larger photograph vanish in the network's input


class PhotographError(runs.UserError, ValueError):
    """A folder, a photograph or a box cannot be searched; the message says why."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder and its sub-folders, sorted by name.

    Attributes:
        folder: the folder; all names are relative to it.
        names: photographs in formats that are supported.
        unsupported: photographs in other formats, each with the remedy.
        other_files: number of files that are no photographs.
    """

    folder: Path
    names: list[str]
    unsupported: dict[str, str]
    other_files: int


def list_photographs(folder: Path) -> Listing:
    """Lists the photographs of a folder and its sub-folders, without hidden files and folders.

    Raises PhotographError where the folder does not exist or holds no supported photograph.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PhotographError(f"{folder} is not a folder: name the folder of your photographs")
    files = sorted(visible_files(folder))
    suffixes = {name: Path(name).suffix.lower() for name in files}
    names = [name for name in files if suffixes[name] in SUPPORTED]
    unsupported = {
        name: f"{suffix} is not read here: convert it to .jpg or .png"
        for name, suffix in suffixes.items()
        if suffix in UNSUPPORTED
    }
    if not names:
        content = f"{len(files)} files, such as {files[0]}" if files else "nothing"
        raise PhotographError(
            f"{folder} holds no photograph that can be read ({content}); photographs end in "
            f"{' '.join(sorted(SUPPORTED))}: convert others to one of these"
        )
    return Listing(folder, names, unsupported, len(files) - len(names) - len(unsupported))


def visible_files(folder: Path) -> Iterator[str]:
    """Yields every file below a folder that is not hidden, relative to it, with forward slashes.

    Links are followed; a folder that several links lead to is visited once.
    """
    visited = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        resolved = os.path.realpath(root)
        if resolved in visited:
            folders.clear()
            continue
        visited.add(resolved)
        prefix = "" if Path(root) == folder else f"{Path(root).relative_to(folder).as_posix()}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def read_upright(path: Path) -> np.ndarray:
    """Reads a photograph as (H, W, 3) uint8 RGB, turned by its EXIF orientation.

    Raises PhotographError where it is missing, cannot be decoded or has a side below 16 pixels,
    one patch of the network.
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


def size_note(height: int, width: int) -> str | None:
    """Returns a warning for a photograph of unusual shape or size in pixels, None for others."""
    ratio, longest = max(height, width) / min(height, width), max(height, width)
    if ratio > ELONGATED:
        return (
            f"{width} x {height} pixels, one side {ratio:.0f} times the other: hardly recognisable "
            "once squashed to a square; draw a box, or cut it up"
        )
    if longest > LARGE:
        return (
            f"{width} x {height} pixels: small details are lost when it is reduced for the "
            "network; draw a box around them"
        )
    return None


def file_digest(path: Path) -> str:
    """Returns the sha256 of a photograph's file in hex; PhotographError where it is unreadable."""
    try:
        return runs.fingerprint_file(path)
    except FileNotFoundError:
        raise PhotographError(f"there is no photograph {path}") from None
    except OSError as error:
        raise PhotographError(f"{Path(path).name}: cannot be read ({error.strerror})") from None


def exif_orientation(path: Path) -> int:
    """Returns the EXIF orientation, 1 to 8, by which OpenCV turns a photograph; 1 without a tag."""
    try:
        with PIL.Image.open(path) as image:
            orientation = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError):
        return 1  # OpenCV reads the format and Pillow does not: such formats carry no tag
    return orientation if orientation in range(1, 9) else 1


def find_photograph(folder: Path, query: str, start: Path) -> Path | None:
    """Returns the file that a query names, or None where there is none.

    A query that is absolute or begins with "~/", "./" or "../" is a path from `start` on. Any other
    is a name in `folder`, and only where that has none a path from `start` on. Names may be written
    in another Unicode normal form than on disk. Raises PhotographError where both are there and are
    different files, and where several files have the name in other normal forms.
    """
    typed = os.path.expanduser(query)
    as_path = _on_disk(start / typed)
    if os.path.isabs(typed) or query.startswith(("./", "../")):
        return as_path
    in_folder = _on_disk(Path(folder) / query)
    if in_folder and as_path and not in_folder.samefile(as_path):
        raise PhotographError(
            f"{query} is both {in_folder} and {as_path}: name the one that is meant by its whole "
            "path"
        )
    return in_folder or as_path


def _on_disk(path: Path) -> Path | None:
    """The regular file at a path, parts of which may be written in another normal form."""
    found = Path(path.absolute().anchor)
    for part in path.absolute().parts[1:]:
        entry, wanted = found / part, unicodedata.normalize("NFC", part)
        if not os.path.lexists(entry):
            try:
                names = [n for n in os.listdir(found) if unicodedata.normalize("NFC", n) == wanted]
            except (OSError, ValueError):
                return None
            if len(names) > 1:
                raise PhotographError(f"several files in {found} are named {part}: rename them")
            entry = found / (names[0] if names else part)
        found = entry
    return found if found.is_file() else None
