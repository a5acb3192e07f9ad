"""Verification of data folders against what their publisher lists."""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import gldv2
from vitgal.data import images as data_images
from vitgal.data.download.fetch import BATCH
from vitgal.data.download.sources import (
    Source,
    _chosen,
    _images,
    _listed,
    _read_record,
    _some,
    _walk,
    read_sources,
)


@dataclass(frozen=True)
class Report:
    """What `check` found; `str` gives it line by line, every missing or unreadable image named.

    images: files in the image folder.  listed: how many the list names (None: there is no list).
    missing: listed images that are not there.  unreadable: (place, reason) of listed images, or of
    all where there is no list.  unlisted: the same of images that no result depends on.
    problems: everything else that is wrong, a line each.
    """

    name: str
    folder: Path
    problems: tuple[str, ...] = ()
    images: int | None = None
    listed: int | None = None
    missing: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    unlisted: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where nothing is wrong that a result depends on."""
        return not (self.problems or self.missing or self.unreadable)

    def __str__(self) -> str:
        lines = [f"{self.name} in {self.folder}: {'whole' if self.ok else 'NOT whole'}"]
        if self.images is not None:
            listed = "no list" if self.listed is None else f"{self.listed:,} listed"
            lines.append(f"  {self.images:,} images ({listed})")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  missing: {place}" for place in self.missing]
        lines += [f"  unreadable: {place}: {reason}" for place, reason in self.unreadable]
        lines += [f"  unreadable, not listed: {place}: {reason}" for place, reason in self.unlisted]
        return "\n".join(lines)


def check(
    name: str,
    *,
    folder: str | os.PathLike,
    progress: bool = True,
    threads: int | None = None,
    sources: Path | None = None,
) -> Report:
    """Verifies a folder without changing it: checksums, counts, layout, every image decoded.

    Args:
        folder: the folder that `download` was given as target, or the source's own folder.
        threads: that decode at once; by default one a processor.
    Raises ValueError on an unknown name; all that is wrong with the folder is in the report.
    """
    known = read_sources(sources)
    (source,) = _chosen(name, known)
    folder = _own_folder(source, Path(folder).expanduser())
    if not folder.is_dir():
        return Report(name, folder, (f"it is not there; `vitgal download {name}` brings it",))
    report = Report(name, folder, (*_check_files(source, folder), *_check_archives(source, folder)))
    if source.tables:
        report = _check_tables(source, report)
    if not source.image_folder:
        return report
    return _check_images(source, report, threads=threads, progress=progress)


def _own_folder(source: Source, folder: Path) -> Path:
    inside = folder / source.folder
    if inside.is_dir():
        return inside
    marks = [item.to for item in source.files] + [*source.tables, source.image_folder or ""]
    own = any(mark and (folder / mark).exists() for mark in marks)
    return folder if own else inside


def _check_files(source: Source, folder: Path) -> Iterator[str]:
    entries = _read_record(source, folder)["files"]
    for item in source.files:
        if not (folder / item.to).is_file():
            if item.to not in source.tables:  # one of several tables will do: see _check_tables
                yield f"{item.to} is missing; `vitgal download {source.name}` brings it"
            continue
        expected = item.sha256 or entries.get(item.to, {}).get("sha256")
        found = runs.fingerprint_file(folder / item.to)
        if expected and found != expected:
            kind = "published" if item.sha256 else "recorded"
            yield f"{item.to} has the sha256 {found}, the {kind} one is {expected}"


def _check_archives(source: Source, folder: Path) -> Iterator[str]:
    entries = _read_record(source, folder)["archives"]
    left = [i.name for i in source.archives if not entries.get(i.name, {}).get("unpacked")]
    if entries and left:
        yield (
            f"{len(left)} of {len(source.archives)} archives are not unpacked yet ({_some(left)}); "
            f"`vitgal download {source.name}` goes on with them"
        )


def _check_tables(source: Source, report: Report) -> Report:
    problems, notes = [], []
    present = [table for table in source.tables if (report.folder / table).is_file()]
    if not present:
        problems.append(
            f"neither of {', '.join(source.tables)} is there; `vitgal download {source.name}` "
            "brings the first"
        )
    for name in present:
        try:
            table = gldv2.read_landmark_table(report.folder / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        counts = (len(table), table["landmark_id"].nunique())
        notes.append(f"{name}: {counts[0]:,} images of {counts[1]:,} classes")
        if source.rows is not None and counts != (source.rows, source.classes):
            problems.append(
                f"{name} lists {counts[0]:,} images of {counts[1]:,} classes; the clean set has "
                f"{source.rows:,} of {source.classes:,}"
            )
    return dataclasses.replace(
        report, problems=(*report.problems, *problems), notes=(*report.notes, *notes)
    )


def _check_images(source: Source, report: Report, *, threads: int | None, progress: bool) -> Report:
    folder = _images(source, report.folder)
    if not folder.is_dir():
        problem = f"{source.image_folder}/ is missing; `vitgal download {source.name}` brings it"
        return dataclasses.replace(report, problems=(*report.problems, problem), images=0)
    present = sorted(_walk(folder))
    problems = list(report.problems)
    try:
        listed = _listed(source, report.folder)
    except ValueError as error:
        problems.append(str(error))
        listed = None
    missing = sorted(set(listed or ()) - set(present))
    problems += _misplaced(source, missing, present=present)
    if listed is None and source.images is not None and len(present) != source.images:
        problems.append(f"{len(present):,} images; the whole set has {source.images:,}")
    failures = _unreadable(folder, present, threads=threads, progress=progress)
    wanted = set(present if listed is None else listed)
    return dataclasses.replace(
        report,
        problems=tuple(problems),
        images=len(present),
        listed=None if listed is None else len(listed),
        missing=tuple(missing),
        unreadable=tuple(failure for failure in failures if failure[0] in wanted),
        unlisted=tuple(failure for failure in failures if failure[0] not in wanted),
    )


def _misplaced(source: Source, missing: list[str], *, present: list[str]) -> Iterator[str]:
    """Listed images that lie in another sub-folder: the usual slip of unpacking by hand."""
    elsewhere = {PurePosixPath(place).name: place for place in present} if missing else {}
    found = [(place, elsewhere.get(PurePosixPath(place).name)) for place in missing]
    moved = [f"{there} for {place}" for place, there in found if there]
    if moved:
        yield (
            f"{len(moved):,} missing images lie elsewhere in {source.image_folder}/ "
            f"({_some(moved)}): move them"
        )


def _unreadable(
    folder: Path, places: list[str], *, threads: int | None, progress: bool
) -> list[tuple[str, str]]:
    def failure(place: str) -> str | None:
        try:
            data_images.read_image(folder / place)
        except data_images.ImageError as error:
            return error.reason
        return None

    failures = []
    bar = tqdm(desc="reading", total=len(places), unit=" images", disable=not progress)
    with bar, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        # In batches: a future for each of four million images would fill the memory.
        for start in range(0, len(places), BATCH):
            batch = places[start : start + BATCH]
            for place, reason in zip(batch, pool.map(failure, batch), strict=True):
                bar.update()
                if reason is not None:
                    failures.append((place, reason))
    return failures
