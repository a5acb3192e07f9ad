"""Unpacks archives of photographs and refuses unsafe ones."""

import bz2
import errno
import gzip
import lzma
import os
import platform
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import gldv2
from vitgal.data.download.fetch import format_size

STAGING = ".unpacking"  # inside the image folder: on the same disk, even where that is a link
# Photographs hardly compress: an archive of them never unpacks to far more than its size.
MAX_RATIO, MAX_EXTRA_BYTES, MAX_MEMBERS = 10, 16 << 20, 2_000_000
MAX_HEADERS = 256 << 10  # bytes of headers before a member; tarfile reads any number of them
COMPRESSIONS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x5d\0\0": lzma.open,
}
# Errors of the system that a damaged archive or its names cause; None: of a decompressor.
DAMAGE = (
    *(None, errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    *(errno.EINVAL, errno.EILSEQ),
)


def unpack(archive: Path, folder: Path, *, arrange: str, label: str, progress: bool) -> int:
    """Unpacks the plain files of a tar archive, all of them or none, and returns their number.

    arrange: how files are named below `folder`: "flat", "tree" or "by_id", as in sources.toml.

    Raises ValueError where the archive is damaged, unpacks to far more than its size, has two files
    of one name, or a member that is not a plain file or folder or leads out of the folder; OSError
    where the disk is full, or cannot be written.
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
        parents = {parent for target in targets for parent in list(target.parents)[:-1]}
        runs.refuse_links(folder / parent for parent in parents)
        for target in targets:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / target, folder / target)
    except Exception as error:  # zlib.error, EOFError, RecursionError, MemoryError, ...
        if isinstance(error, OSError) and error.errno not in DAMAGE:
            raise
        raise ValueError(runs.printable(str(error) or type(error).__name__)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(targets)


def _extract(
    archive: Path, staging: Path, *, arrange: str, label: str, progress: bool
) -> list[PurePosixPath]:
    limit = MAX_RATIO * archive.stat().st_size + MAX_EXTRA_BYTES
    unpacked = 0
    targets = []
    with open(archive, "rb") as handle:
        start = handle.read(6)
    opener = next((o for magic, o in COMPRESSIONS.items() if start.startswith(magic)), open)
    with (
        opener(archive, "rb") as stream,
        tarfile.open(fileobj=_BoundedStream(stream, limit), mode="r:") as tar,
        tqdm(desc=f"unpacking {label}", unit=" files", leave=False, disable=not progress) as bar,
    ):
        for count, member in enumerate(tar, 1):
            name = runs.short(member.name)
            _check_member(member, name)
            unpacked += member.size
            if unpacked > limit or count > MAX_MEMBERS:
                raise ValueError(_too_large(limit))
            target = None if member.isdir() else _target(PurePosixPath(member.name), arrange)
            if target is not None:
                if (staging / target).exists():
                    raise ValueError(f"it holds two files for {target} (the second is {name})")
                renamed = member.replace(name=str(target), deep=False)
                tar.fileobj.left = member.size
                tar.extract(renamed, staging, set_attrs=False, filter="data")
                targets.append(target)
                bar.update()
            tar.fileobj.left = MAX_HEADERS
    return targets


def _too_large(limit: int) -> str:
    return f"it unpacks to more than {format_size(limit)} or {MAX_MEMBERS:,} files"


class _BoundedStream:
    """An unpacked stream that refuses to read more than `left` bytes, or beyond `limit`."""

    def __init__(self, stream: IO[bytes], limit: int):
        self._stream, self._limit, self.left = stream, limit, MAX_HEADERS
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """Reads `size` bytes; ValueError for more than may be read."""
        self.left -= size
        if self.left < 0:
            raise ValueError(f"a member has headers of more than {format_size(MAX_HEADERS)}")
        if self.tell() > self._limit:
            raise ValueError(_too_large(self._limit))
        return self._stream.read(size)


def _check_member(member: tarfile.TarInfo, name: str) -> None:
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
    if not plain or member.issparse():
        raise ValueError(f"{name} in it is a link, a device or another special file")
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} in it leads out of the folder")
    if member.size < 0:
        raise ValueError(f"{name} in it has a negative size")


def _target(name: PurePosixPath, arrange: str) -> PurePosixPath | None:
    """Returns a member's path below the image folder, None for read-me and hidden files."""
    if arrange == "tree":
        return None if any(part.startswith(".") for part in name.parts) else name
    if name.suffix.lower() != ".jpg" or name.name.startswith("."):
        return None
    if arrange == "flat":
        return PurePosixPath(name.name)
    if len(name.stem) < 3:
        raise ValueError(f"{name} in it has no id of 3 or more letters")
    return PurePosixPath(gldv2.image_path(name.stem))
