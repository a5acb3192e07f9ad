"""Archives unpacked without trust in what they hold."""

import os
import platform
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import gldv2
from vitgal.data.download.fetch import STAGING
from vitgal.data.download.sources import _size

# Photographs hardly compress: an archive that unpacks to far more than its size is no set of them.
UNPACKED_RATIO, UNPACKED_SPARE, MAX_MEMBERS = 10, 16 << 20, 2_000_000


def _unpack(archive: Path, folder: Path, *, arrange: str, label: str, progress: bool) -> int:
    """Unpacks plain files into `folder` and returns how many; all of them, or none.

    Raises ValueError on a member that is no plain file or folder or leads out of the folder, on two
    members with one place, and on sizes that no archive of photographs has; what tarfile and gzip
    raise on a damaged archive; OSError on a full disk.
    """
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        places = _extract(archive, staging, arrange=arrange, label=label, progress=progress)
        for place in places:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / place, folder / place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(places)


def _extract(
    archive: Path, staging: Path, *, arrange: str, label: str, progress: bool
) -> list[PurePosixPath]:
    limit = UNPACKED_RATIO * archive.stat().st_size + UNPACKED_SPARE
    unpacked = 0
    places = []
    with (
        tarfile.open(archive) as tar,
        tqdm(desc=f"unpacking {label}", unit=" files", leave=False, disable=not progress) as bar,
    ):
        for count, member in enumerate(tar, 1):
            _vet(member, staging)
            unpacked += member.size
            if unpacked > limit or count > MAX_MEMBERS:
                raise ValueError(f"it unpacks to more than {_size(limit)} or {MAX_MEMBERS:,} files")
            place = None if member.isdir() else ARRANGEMENTS[arrange](PurePosixPath(member.name))
            if place is None:
                continue
            path = staging / place
            if path.exists():
                raise ValueError(f"it holds two files for {place} (the second is {member.name})")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as content, open(path, "wb") as handle:
                shutil.copyfileobj(content, handle, runs.CHUNK)
            places.append(place)
            bar.update()
    return places


def _vet(member: tarfile.TarInfo, staging: Path) -> None:
    """Raises ValueError on all but plain files and folders inside; links pass the data filter."""
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
    if not plain or member.issparse():
        raise ValueError(f"{member.name} in it is a link, a device or another special file")
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{member.name} in it leads out of the folder")
    if not hasattr(tarfile, "data_filter"):  # Python 3.11.0 to 3.11.3
        raise RuntimeError(
            f"Python {platform.python_version()} cannot check archives (tarfile.data_filter is "
            "missing): download with Python 3.11.4 or newer, or unpack the archive by hand"
        )
    try:
        tarfile.data_filter(member, str(staging))
    except tarfile.FilterError as error:
        raise ValueError(f"{member.name} in it is not safe to unpack ({error})") from error


def _photograph(name: PurePosixPath) -> bool:
    return name.suffix.lower() == ".jpg" and not name.name.startswith(".")


def _flat(name: PurePosixPath) -> PurePosixPath | None:
    return PurePosixPath(name.name) if _photograph(name) else None


def _tree(name: PurePosixPath) -> PurePosixPath | None:
    return None if any(part.startswith(".") for part in name.parts) else name


def _by_id(name: PurePosixPath) -> PurePosixPath | None:
    if not _photograph(name):
        return None
    if len(name.stem) < 3:
        raise ValueError(f"{name} in it has no id of 3 or more letters")
    return PurePosixPath(gldv2.image_path(name.stem))


# A member's place below the image folder; None leaves it out (read-me files, hidden files).
ARRANGEMENTS: dict[str, Callable[[PurePosixPath], PurePosixPath | None]] = {
    "flat": _flat,
    "tree": _tree,
    "by_id": _by_id,
}
