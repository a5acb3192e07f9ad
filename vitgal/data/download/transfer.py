"""Downloads of data sets and weights.

Incomplete files are in `<folder>/.download-<name>/`. After a kill, a cut connection or a full disk,
the same command continues them.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from vitgal import runs
from vitgal.data.download.archives import STAGING, unpack
from vitgal.data.download.fetch import Checksum, Fetcher, format_size, free_space, matches
from vitgal.data.download.sources import (
    Entry,
    RemoteFile,
    SourceFolder,
    read_sources,
    select_sources,
)


def download(
    names: str | Iterable[str],
    *,
    target: str | os.PathLike | None = None,
    progress: bool = True,
    sources: Path | None = None,
) -> dict[str, Path]:
    """Downloads data sets and weights by name and returns each one's folder.

    Complete files cause no request, interrupted transfers are continued. Images that were unpacked
    by hand are recognised once their list exists.

    target: folder of all sources' folders; None: data/ of the checkout. sources: another list than
    third_party/sources.toml.

    Raises:
        ValueError: an unknown name, a wrong checksum or too large a file (which is deleted), a
            damaged or unsafe archive (it is set aside), a link where files are written.
        ConnectionError: an address cannot be reached, or refuses.
        StageError: another process downloads the same.
        OSError: the disk has too little space.
        FileNotFoundError: all archives are unpacked, yet listed images are missing.
    """
    target = runs.resolve("data") if target is None else Path(target).expanduser()
    selected = select_sources(names, read_sources(sources))
    folders = [SourceFolder(source, target / source.folder) for source in selected]
    _check_space(folders, target, progress=progress)
    for folder in folders:
        try:
            _download_source(folder, progress=progress)
        except OSError as error:
            if not runs.disk_full(error):
                raise
            raise OSError(
                f"no space left for {folder.source.name} in {folder.path} ({error.strerror}); make "
                "room and run the same command again: it continues"
            ) from error
    return {folder.source.name: folder.path for folder in folders}


def _check_space(folders: list[SourceFolder], target: Path, *, progress: bool) -> None:
    pending = [file for folder in folders for file in folder.pending()]
    if not pending:
        return
    download_size = sum(file.bytes for file in pending)
    # Archives are fetched, unpacked and deleted one by one: only the largest is there as well.
    needed = download_size + max((file.bytes for file in pending if file.arrange), default=0)
    free = free_space(target)
    sizes = [format_size(size) for size in (download_size, needed, free)]
    where = runs.printable(target)
    if progress:
        print("about {} to download, {} of disk space; {} are free in".format(*sizes), where)
    if needed > free:
        raise OSError(
            f"{', '.join(folder.source.name for folder in folders)} need about {sizes[1]} of disk "
            f"space in {where}, where {sizes[2]} are free; make room or choose another folder "
            "(--to)"
        )


def _download_source(folder: SourceFolder, *, progress: bool) -> None:
    source = folder.source
    work = folder.path / f".download-{source.name}"
    with runs.locked(work):
        staging = folder.images / STAGING
        runs.refuse_links([staging])
        # A killed process leaves these behind.
        shutil.rmtree(staging, ignore_errors=True)
        for path in folder.path.glob(f"{runs.TEMPORARY}*-{folder.record_path.name}"):
            path.unlink()
        fetcher = Fetcher(work, source.page, progress)
        for file in source.files:
            _download_file(folder, file, fetcher)
        if source.archives:
            _download_archives(folder, fetcher)
        shutil.rmtree(work, ignore_errors=True)
    if source.note and progress:
        print(runs.printable(f"{source.name}: {source.note}"))


def _download_file(folder: SourceFolder, file: RemoteFile, fetcher: Fetcher) -> None:
    path = folder.path / file.to
    runs.refuse_links(folder.path / parent for parent in list(PurePosixPath(file.to).parents)[:-1])
    checksum = _expected_checksum(folder, file, folder.record.files.get(file.to), fetcher)
    if path.is_file() and not matches(path, checksum):
        aside = path.with_name(f"{path.name}.bad")
        os.replace(path, aside)
        text = f"{path} does not have the checksum {checksum.origin}: kept as {aside.name}"
        print(runs.printable(f"{text}, fetched again"))
    if path.is_file():
        if file.to not in folder.record.files:
            folder.record.files[file.to] = _entry(path)
            folder.save_record()
        return
    fetched = fetcher.fetch(file, checksum, label=file.name)
    # The record is saved first: after a kill in between, the file is whole in the work folder.
    folder.record.files[file.to] = _entry(fetched)
    folder.save_record()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(fetched, path)


def _download_archives(folder: SourceFolder, fetcher: Fetcher) -> None:
    archives, record = folder.source.archives, folder.record
    if not folder.images.is_dir():  # deleted, to be downloaded anew: the checksums still hold
        for entry in record.archives.values():
            entry["unpacked"] = False
    if folder.unpacked_by_hand():
        record.archives = {archive.name: {"unpacked": True} for archive in archives}
        folder.save_record()
    for number, archive in enumerate(archives, 1):
        if not folder.is_unpacked(archive):
            of_several = f" ({number}/{len(archives)})" if len(archives) > 1 else ""
            _download_archive(folder, archive, fetcher, label=archive.name + of_several)
    if missing := folder.missing_images():
        raise FileNotFoundError(
            f"every archive of {folder.source.name} is unpacked, yet {len(missing):,} listed "
            f"images are missing in {folder.images}: {runs.abbreviate(missing)}; put them back, or "
            "delete that folder and run the same command again"
        )


def _download_archive(
    folder: SourceFolder, archive: RemoteFile, fetcher: Fetcher, *, label: str
) -> None:
    recorded = folder.record.archives.get(archive.name)
    checksum = _expected_checksum(folder, archive, recorded, fetcher)
    path = fetcher.fetch(archive, checksum, label=label)
    entry = {"md5": checksum.digest} if archive.md5 else _entry(path)
    try:
        count = unpack(
            path, folder.images, arrange=archive.arrange, label=label, progress=fetcher.progress
        )
    except ValueError as error:
        aside = folder.path / f"{archive.name}.bad"
        os.replace(path, aside)
        raise ValueError(
            f"{archive.address} is refused: {error}; nothing of it was unpacked, and the archive "
            f"is kept as {aside}. See {folder.source.page}, delete it, and run the same command "
            "again"
        ) from error
    folder.record.archives[archive.name] = entry | {"images": count, "unpacked": True}
    folder.save_record()
    path.unlink()


def _entry(path: Path) -> Entry:
    return {"bytes": path.stat().st_size, "sha256": runs.fingerprint_file(path)}


def _expected_checksum(
    folder: SourceFolder, file: RemoteFile, recorded: Entry | None, fetcher: Fetcher
) -> Checksum | None:
    if file.sha256:
        return Checksum("sha256", file.sha256, "published with its address")
    if file.md5:
        path = fetcher.fetch(RemoteFile(url=file.md5), None, label=f"{file.name}.md5")
        text = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()
        digest = re.match(r"\s*([0-9a-fA-F]{32})\b", text)
        if digest is None:
            raise ValueError(
                f"{file.md5} holds no md5 sum but {text[:60]!r}; see {folder.source.page}"
            )
        return Checksum("md5", digest[1].lower(), f"published in {file.md5}")
    if recorded and "sha256" in recorded:
        origin = f"recorded at the first download in {folder.record_path}"
        return Checksum("sha256", str(recorded["sha256"]), origin)
    return None
