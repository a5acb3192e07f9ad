"""Data sets and weights: from the addresses in third_party/sources.toml to checked local files.

What a source has brought is kept in `<folder>/<name>.download.json`: each file's checksum, and
which archives are unpacked. What is still under way lies in `<folder>/.download-<name>/`. A kill, a
cut line or a full disk at any moment leaves these as they are; the same command goes on from there.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pooch

from vitgal import runs
from vitgal.data.download.archives import _unpack
from vitgal.data.download.fetch import DAMAGED, _disk_errors, _fetch, _free, _sweep
from vitgal.data.download.sources import (
    Item,
    Source,
    _chosen,
    _Job,
    _missing,
    _pending,
    _read_record,
    _record_path,
    _size,
    _some,
    read_sources,
)


def download(
    names: str | Iterable[str],
    *,
    target: str | os.PathLike | None = None,
    progress: bool = True,
    sources: Path | None = None,
) -> dict[str, Path]:
    """Brings data sets and weights by name and returns each one's folder.

    What is whole is not asked for again (no request is made), what is half there is taken up where
    it stopped. A set of images that was unpacked by hand is recognised once its list is there.

    Args:
        target: the folder that all sources' folders lie in; by default data/ of the checkout.
        sources: another list of sources than third_party/sources.toml.
    Raises:
        ValueError: an unknown name, a wrong checksum (both sums are named; the file is removed), a
            damaged archive or one with links, devices or paths that lead out (it is set aside).
        ConnectionError: an address cannot be reached or refuses.
        OSError: there is not disk space enough, before or in the middle of it.
        FileNotFoundError: all archives are unpacked, yet listed images are missing.
    """
    target = runs.resolve("data") if target is None else Path(target).expanduser()
    chosen = _chosen(names, read_sources(sources))
    _check_space(chosen, target, progress=progress)
    return {
        source.name: _bring(source, target / source.folder, progress=progress) for source in chosen
    }


def _bring(source: Source, folder: Path, *, progress: bool) -> Path:
    with _disk_errors(source.name, folder), _locked(folder, source.name):
        job = _Job(source, folder, _read_record(source, folder), progress)
        _sweep(job)
        for item in source.files:
            _bring_file(job, item)
        if source.archives:
            _bring_archives(job)
        shutil.rmtree(job.work, ignore_errors=True)
    if source.note and progress:
        print(f"{source.name}: {source.note}")
    return folder


def _bring_file(job: _Job, item: Item) -> None:
    """One file of its own: verified where it is there already, else fetched and recorded."""
    path = job.folder / item.to
    known, origin = _known_sum(job, item, entry=job.record["files"].get(item.to))
    if path.is_file() and not pooch.hashes.hash_matches(path, known):
        aside = path.with_name(f"{path.name}.bad")
        os.replace(path, aside)
        print(f"{path} does not have the checksum {origin}: kept as {aside.name}, fetched anew")
    if path.is_file():
        if item.to not in job.record["files"]:
            job.record["files"][item.to] = _sums(path)
            job.save()
        return
    fetched = _fetch(job, item, known=known, origin=origin, label=item.name)
    # The record first: what a kill leaves between the two is found whole in the work folder.
    job.record["files"][item.to] = _sums(fetched)
    job.save()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(fetched, path)


def _bring_archives(job: _Job) -> None:
    entries = job.record["archives"]
    if not job.images.is_dir():  # removed to have it anew: the sums stay, and are checked
        for entry in entries.values():
            entry["unpacked"] = False
    if not entries and _missing(job.source, job.folder) == []:
        for item in job.source.archives:  # unpacked by hand, and whole
            entries[item.name] = {"unpacked": True}
        job.save()
    total = len(job.source.archives)
    for number, item in enumerate(job.source.archives, 1):
        if not entries.get(item.name, {}).get("unpacked"):
            label = f"{item.name} ({number}/{total})" if total > 1 else item.name
            _bring_archive(job, item, label=label)
    missing = _missing(job.source, job.folder)
    if missing:
        raise FileNotFoundError(
            f"every archive of {job.source.name} is unpacked, yet {len(missing):,} listed images "
            f"are missing in {job.images}: {_some(missing)}; put them back, or delete that folder "
            "and run the same command again"
        )


def _bring_archive(job: _Job, item: Item, *, label: str) -> None:
    entry = job.record["archives"].get(item.name, {})
    known, origin = _known_sum(job, item, entry=entry)
    archive = _fetch(job, item, known=known, origin=origin, label=label)
    sums = {"md5": known.partition(":")[2]} if item.md5 else _sums(archive)
    try:
        count = _unpack(
            archive, job.images, arrange=item.arrange, label=label, progress=job.progress
        )
    except (*DAMAGED, ValueError) as error:
        aside = job.folder / f"{item.name}.bad"
        os.replace(archive, aside)
        raise ValueError(
            f"{item.url} is refused: {error or type(error).__name__}; nothing of it was unpacked, "
            f"and the archive is kept as {aside}. See {job.source.page}, delete it, and run the "
            "same command again to fetch it anew"
        ) from error
    job.record["archives"][item.name] = sums | {"images": count, "unpacked": True}
    job.save()
    archive.unlink()


def _known_sum(job: _Job, item: Item, *, entry: dict | None) -> tuple[str | None, str]:
    """The checksum a file must have as `algorithm:hex`, and where it comes from."""
    if item.sha256:
        return f"sha256:{item.sha256}", "published with its address"
    if item.md5:
        return f"md5:{_published_md5(job, item)}", f"published in {item.md5}"
    if entry and "sha256" in entry:
        record = _record_path(job.source, job.folder)
        return f"sha256:{entry['sha256']}", f"recorded at the first download in {record}"
    return None, "none"


def _published_md5(job: _Job, item: Item) -> str:
    listed = Item(name=f"{item.name}.md5", url=item.md5, drive=False, bytes=0)
    path = _fetch(job, listed, known=None, origin="none", label=listed.name)
    text = path.read_text(encoding="utf-8", errors="replace")
    path.unlink()
    found = re.match(r"\s*([0-9a-fA-F]{32})\b", text)
    if found is None:
        raise ValueError(f"{item.md5} holds no md5 sum but {text[:60]!r}; see {job.source.page}")
    return found[1].lower()


def _sums(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": runs.fingerprint_file(path)}


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Lets one process at a time bring a source; the kernel frees the lock after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".download-{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is bringing {name} to {folder}; wait for it") from None
        yield


def _check_space(chosen: list[Source], target: Path, *, progress: bool) -> None:
    """Raises OSError before anything is fetched where the disk cannot hold what is to come."""
    pending = [item for source in chosen for item in _pending(source, target / source.folder)]
    if not pending:
        return
    # Archives are fetched, unpacked and deleted one by one: only the largest comes on top.
    largest = max((item.bytes for item in pending if item.arrange), default=0)
    needed = sum(item.bytes for item in pending) + largest
    free = _free(target)
    if progress:
        print(
            f"about {_size(sum(item.bytes for item in pending))} to download in {len(pending)} "
            f"files, {_size(needed)} of disk space; {_size(free)} are free in {target}"
        )
    if needed > free:
        raise OSError(
            f"{', '.join(source.name for source in chosen)} need about {_size(needed)} of disk "
            f"space in {target}, where {_size(free)} are free; make room or choose another folder "
            "(--to)"
        )
