"""Lists and reads a folder of the user's own photographs."""

import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data import formats, images

# A file with one of these endings is reported if it cannot be read, whatever its content.
SUFFIXES = frozenset(
    """
    .jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm .gif .avif
    .heic .heif .jxl
    """.split()
)
RAW = frozenset(".cr2 .cr3 .nef .arw .dng .orf .raf .rw2".split())  # most of them begin as a TIFF
# Folders of storage systems and archives, with thumbnails, deleted files or file attributes.
SYSTEM_FOLDERS = frozenset(
    ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"]
)
ELONGATED = 4.0  # ratio of the sides; beyond it little is recognisable once squashed to a square
LARGE = 10_000  # pixels; small details of a larger photograph vanish in the network's input


class PhotographError(runs.UserError, ValueError):
    """A folder, a photograph or a box cannot be searched; the message has the reason."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder and its sub-folders, sorted by name, relative to it."""

    folder: Path
    names: list[str]  # of photographs
    unsupported: dict[str, str]  # photographs and folders that cannot be read: the reason
    other_files: int  # number of files that are no photographs


def list_photographs(folder: Path, without: Iterable[Path] = ()) -> Listing:
    """Lists the photographs of a folder and its sub-folders, without hidden and system folders.

    A photograph is a file with the content or the name of one. without: sub-folders that are passed
    over, such as that of the run. Raises PhotographError where the folder does not exist or holds
    no photograph.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PhotographError(f"{folder} is not a folder: name the folder of your photographs")
    names, unsupported = [], {}

    def not_listed(error: OSError) -> None:
        """Records a sub-folder that cannot be listed."""
        name = os.path.relpath(error.filename, folder)
        unsupported[f"{name}/"] = f"the folder cannot be listed ({error.strerror})"

    files = sorted(visible_files(folder, not_listed, without))
    faults = len(unsupported)
    for name in files:
        is_photograph, fault = _inspect(folder / name)
        if fault:
            unsupported[name] = fault
        elif is_photograph:
            names.append(name)
    if not names:
        content = f"{len(files)} files, such as {runs.printable(files[0])}" if files else "nothing"
        if unsupported:
            name, fault = next(iter(unsupported.items()))
            content = f"{len(files)} files, {runs.printable(name)}: {fault}"
        raise PhotographError(
            f"{folder} holds no photograph that can be read ({content}); convert photographs to "
            ".jpg or .png"
        )
    other_files = len(files) - len(names) - (len(unsupported) - faults)
    return Listing(folder, names, unsupported, other_files)


def _inspect(path: Path) -> tuple[bool, str | None]:
    """Returns whether a file is a photograph by content or name, and why it cannot be read."""
    suffix = path.suffix.lower()
    named = suffix in SUFFIXES or suffix in RAW
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return named, "it is no regular file" if named else None
        if not status.st_size:  # as of all in /proc, of which some never end
            return named, "the file is empty" if named else None
        if named and status.st_size > images.MOST_BYTES:
            return True, images.TOO_LARGE
        with open(path, "rb") as handle:
            kind = formats.image_format(handle.read(formats.HEAD))
    except OSError as error:
        return named, f"it cannot be read ({error.strerror})" if named else None
    if suffix in RAW or kind not in (None, *formats.DECODED):
        kind = "camera raw" if suffix in RAW else kind
        return True, f"{kind} is not read here: convert it to .jpg or .png"
    return named or kind not in (None, "PPM"), None  # many text files begin like a PPM


def visible_files(
    folder: Path, not_listed: Callable[[OSError], None] | None = None, without: Iterable[Path] = ()
) -> Iterator[str]:
    """Yields every file below a folder that is not hidden, relative to it, with forward slashes.

    Hidden folders and SYSTEM_FOLDERS are skipped. Links are followed, but not to a folder that
    holds the link; a folder that several links lead to is visited once. `not_listed` is called with
    the error of a sub-folder that cannot be listed. without: sub-folders that are skipped.
    """
    top, visited = os.path.realpath(folder), set(map(os.path.realpath, without))
    visited.discard(top)
    for root, folders, files in os.walk(folder, onerror=not_listed, followlinks=True):
        visible = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(set(visible) - SYSTEM_FOLDERS)
        resolved = os.path.realpath(root)
        if root != os.fspath(folder):
            above, parent = os.path.join(resolved, ""), os.path.realpath(os.path.dirname(root))
            if resolved in visited or top.startswith(above) or f"{parent}/".startswith(above):
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
    return read_oriented(path)[0]


def read_oriented(path: Path) -> tuple[np.ndarray, int]:
    """Reads (H, W, 3) uint8 RGB as `read_upright`, and the stored EXIF orientation, 1 to 8."""
    try:
        image, orientation, _ = images.read_photograph(path)
    except FileNotFoundError:
        raise PhotographError(f"there is no photograph {path}") from None
    except images.ImageError as error:
        raise PhotographError(f"{Path(path).name}: {error.reason}") from error
    image = images.turn(image, orientation)
    height, width = image.shape[:2]
    patch = images.PATCH
    if min(height, width) < patch:
        raise PhotographError(
            f"{Path(path).name}: {width} x {height} pixels, less than one patch of {patch} x "
            f"{patch}: nothing can be recognised in it"
        )
    return image, orientation


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


def end_note(path: Path) -> str | None:
    """Returns a remark on a JPEG that lacks its end mark, None for all other files."""
    try:
        with open(path, "rb") as handle:
            handle.seek(-2, os.SEEK_END)
            if handle.read() == b"\xff\xd9":
                return None
        return images.end_remark(images.read_file(path))
    except (OSError, images.ImageError):
        return None


def file_digest(path: Path) -> str:
    """Returns the sha256 of a photograph's file in hex; PhotographError where it is unreadable."""
    try:
        return runs.fingerprint_file(path)
    except FileNotFoundError:
        raise PhotographError(f"there is no photograph {path}") from None
    except OSError as error:
        raise PhotographError(f"{Path(path).name}: cannot be read ({error.strerror})") from None


def find_photograph(folder: Path, query: str, start: Path) -> Path | None:
    """Returns the file that a query names, or None where there is none.

    A query that is absolute or begins with "~/", "./" or "../" is a path relative to `start`. Any
    other is a name in `folder`, else a path relative to `start`. Its Unicode normal form may differ
    from the file's. Raises PhotographError for an ambiguous query.
    """
    typed = os.path.expanduser(query)
    as_path = _on_disk(start / typed)
    if os.path.isabs(typed) or query.startswith(("./", "../")):
        return as_path
    in_folder = _on_disk(Path(folder) / query)
    if in_folder and as_path and not in_folder.samefile(as_path):
        raise PhotographError(
            f"{query} is both {in_folder} and {as_path}: give the absolute path of one"
        )
    return in_folder or as_path


def _on_disk(path: Path) -> Path | None:
    """Returns the regular file at a path, parts of which may be written in another normal form."""
    base = Path(path.absolute().anchor)
    for part in path.absolute().parts[1:]:
        entry, wanted = base / part, unicodedata.normalize("NFC", part)
        if not os.path.lexists(entry):
            try:
                names = [n for n in os.listdir(base) if unicodedata.normalize("NFC", n) == wanted]
            except (OSError, ValueError):
                return None
            if len(names) > 1:
                raise PhotographError(f"several files in {base} are named {part}: rename them")
            entry = base / (names[0] if names else part)
        base = entry
    return base if base.is_file() else None
