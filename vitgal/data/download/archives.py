"""Unpacks archives of photographs and refuses unsafe ones."""

import errno
import gzip
import lzma
import os
import platform
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from vitgal.data import gldv2
from vitgal.data.download.fetch import format_size

STAGING = ".unpacking"  # inside the image folder: on the same disk, even where that is a link
# Photographs hardly compress: an archive of them never unpacks to far more than its size.
MAX_RATIO, MAX_EXTRA_BYTES, MAX_MEMBERS = 10, 16 << 20, 2_000_000
DAMAGE = (
    *(tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
    *(RecursionError, FileExistsError, IsADirectoryError, NotADirectoryError),
)


def unpack(archive: Path, folder: Path, *, arrange: str, label: str, progress: bool) -> int:
    """Unpacks the plain files of a tar archive, all of them or none.

    Args:
        arrange: how files are named below `folder`, a key of ARRANGEMENTS.
        label: name of the archive on the progress bar.
    Returns:
        The number of files.
    Raises:
        ValueError: the archive is damaged, unpacks to far more than its size, has two files of one
            name, or a member that is not a plain file or folder or leads out of the folder.
        OSError: the disk is full.
    """
    if not hasattr(tarfile, "data_filter"):  # Python 3.11.0 to 3.11.3
        raise RuntimeError(
            f"Python {platform.python_version()} cannot check archives (tarfile.data_filter is "
            "missing): download with Python 3.11.4 or newer, or unpack the archive by hand"
        )
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        targets = _extract(archive, staging, arrange=arrange, label=label, progress=progress)
        for target in targets:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / target, folder / target)
    except DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    except OSError as error:
        if error.errno not in (None, errno.ENAMETOOLONG):  # None: the bytes of a .bz2
            raise
        raise ValueError(str(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(targets)


def _extract(
    archive: Path, staging: Path, *, arrange: str, label: str, progress: bool
) -> list[PurePosixPath]:
    limit = MAX_RATIO * archive.stat().st_size + MAX_EXTRA_BYTES
    unpacked = 0
    targets = []
    with (
        tarfile.open(archive) as tar,
        tqdm(desc=f"unpacking {label}", unit=" files", leave=False, disable=not progress) as bar,
    ):
        for count, member in enumerate(tar, 1):
            _check_member(member)
            unpacked += member.size
            if unpacked > limit or count > MAX_MEMBERS:
                size = format_size(limit)
                raise ValueError(f"it unpacks to more than {size} or {MAX_MEMBERS:,} files")
            target = None if member.isdir() else ARRANGEMENTS[arrange](PurePosixPath(member.name))
            if target is None:
                continue
            if (staging / target).exists():
                raise ValueError(f"it holds two files for {target} (the second is {member.name})")
            renamed = member.replace(name=str(target), deep=False)
            tar.extract(renamed, staging, set_attrs=False, filter="data")
            targets.append(target)
            bar.update()
    return targets


def _check_member(member: tarfile.TarInfo) -> None:
    """Raises ValueError for all but plain files and folders, and for paths that lead outside."""
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
    if not plain or member.issparse():
        raise ValueError(f"{member.name} in it is a link, a device or another special file")
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{member.name} in it leads out of the folder")
    if member.size < 0:
        raise ValueError(f"{member.name} in it has a negative size")


def _is_photograph(name: PurePosixPath) -> bool:
    return name.suffix.lower() == ".jpg" and not name.name.startswith(".")


def _flat(name: PurePosixPath) -> PurePosixPath | None:
    return PurePosixPath(name.name) if _is_photograph(name) else None


def _tree(name: PurePosixPath) -> PurePosixPath | None:
    return None if any(part.startswith(".") for part in name.parts) else name


def _by_id(name: PurePosixPath) -> PurePosixPath | None:
    if not _is_photograph(name):
        return None
    if len(name.stem) < 3:
        raise ValueError(f"{name} in it has no id of 3 or more letters")
    return PurePosixPath(gldv2.image_path(name.stem))


# Path of a member below the image folder, or None to leave it out (read-me files, hidden files)
ARRANGEMENTS: dict[str, Callable[[PurePosixPath], PurePosixPath | None]] = {
    "flat": _flat,
    "tree": _tree,
    "by_id": _by_id,
}
