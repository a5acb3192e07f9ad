"""Checks data folders against the publisher's lists."""

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import gldv2
from vitgal.data.download.sources import SourceFolder, read_sources, select_sources
from vitgal.data.images import ImageError, read_image
from vitgal.data.photographs import visible_files


@dataclass
class Report:
    """The state of a source's folder; `str` gives it line by line."""

    name: str
    folder: Path
    problems: list[str] = field(default_factory=list)  # faults that are in no other list
    images: int | None = None  # files in the image folder
    listed: int | None = None  # images that the list names, None without a list
    missing: list[str] = field(default_factory=list)  # listed images that are not there
    # Path and reason: of listed images, or of all without a list; of images that no result needs.
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Returns whether all files that results depend on are intact."""
        return not (self.problems or self.missing or self.unreadable)

    def __str__(self) -> str:
        lines = [f"{self.name} in {self.folder}: {'whole' if self.ok else 'NOT whole'}"]
        if self.images is not None:
            listed = "no list" if self.listed is None else f"{self.listed:,} listed"
            lines.append(f"  {self.images:,} images ({listed})")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  missing: {path}" for path in self.missing]
        lines += [f"  unreadable: {path}: {reason}" for path, reason in self.unreadable]
        lines += [f"  unreadable, not listed: {path}: {reason}" for path, reason in self.unlisted]
        return "\n".join(map(runs.printable, lines))


def check(
    name: str, *, folder: str | os.PathLike, progress: bool = True, sources: Path | None = None
) -> Report:
    """Checks a folder without changing it: checksums, counts, layout, every image decoded.

    folder: the target folder of `download`, or the source's own. Raises ValueError for an unknown
    name; the folder's faults are in the report.
    """
    (source,) = select_sources(name, read_sources(sources))
    path = Path(folder).expanduser()
    content = [*(file.to for file in source.files), *source.tables, source.image_folder]
    is_own = any(part and (path / part).exists() for part in content)
    if not is_own or (path / source.folder).is_dir():
        path /= source.folder
    own, report = SourceFolder(source, path), Report(name, path)
    if not path.is_dir():
        report.problems.append(f"it is not there; `vitgal download {name}` brings it")
        return report
    try:
        _check_files(own, report)
    except ValueError as error:  # a damaged record
        report.problems.append(str(error))
    if source.tables:
        _check_tables(own, report)
    if source.image_folder:
        _check_images(own, report, progress)
    return report


def _check_files(folder: SourceFolder, report: Report) -> None:
    for file in folder.source.files:
        path = folder.path / file.to
        expected = file.sha256 or folder.record.files.get(file.to, {}).get("sha256")
        if not path.is_file():
            if file.to not in folder.source.tables:  # any of the tables will do
                remedy = f"`vitgal download {report.name}` brings it"
                report.problems.append(f"{file.to} is missing; {remedy}")
        elif expected and expected != (actual := runs.fingerprint_file(path)):
            origin = "published" if file.sha256 else "recorded"
            report.problems.append(
                f"{file.to} has the sha256 {actual}, the {origin} one is {expected}"
            )
    archives = folder.source.archives
    pending = [archive.name for archive in archives if not folder.is_unpacked(archive)]
    if folder.record.archives and pending:
        report.problems.append(
            f"{len(pending)} of {len(archives)} archives are not unpacked yet "
            f"({runs.abbreviate(pending)}); `vitgal download {report.name}` continues"
        )


def _check_tables(folder: SourceFolder, report: Report) -> None:
    source = folder.source
    tables = [name for name in source.tables if (folder.path / name).is_file()]
    if not tables:
        report.problems.append(
            f"neither of {', '.join(source.tables)} is there; `vitgal download {report.name}` "
            "brings the first"
        )
    for name in tables:
        try:
            table = gldv2.read_landmark_table(folder.path / name)
        except ValueError as error:
            report.problems.append(str(error))
            continue
        rows, classes = len(table), table["landmark_id"].nunique()
        report.notes.append(f"{name}: {rows:,} images of {classes:,} classes")
        if source.rows is not None and (rows, classes) != (source.rows, source.classes):
            report.problems.append(
                f"{name} lists {rows:,} images of {classes:,} classes; the clean set has "
                f"{source.rows:,} of {source.classes:,}"
            )


def _check_images(folder: SourceFolder, report: Report, progress: bool) -> None:
    name, count = f"{folder.source.image_folder}/", folder.source.images
    if not folder.images.is_dir():
        report.images = 0
        report.problems.append(f"{name} is missing; `vitgal download {report.name}` brings it")
        return
    images = sorted(visible_files(folder.images))
    report.images, required, listed = len(images), set(images), None
    try:
        listed = folder.listed_images()
    except ValueError as error:
        report.problems.append(str(error))
    if listed is not None:
        report.listed, required = len(listed), set(listed)
        report.missing = sorted(required.difference(images))
        # After unpacking by hand, images may be in another sub-folder.
        by_name = {PurePosixPath(path).name: path for path in images} if report.missing else {}
        elsewhere = [(by_name.get(PurePosixPath(path).name), path) for path in report.missing]
        if moves := [f"{other} for {path}" for other, path in elsewhere if other]:
            report.problems.append(
                f"{len(moves):,} missing images are elsewhere in {name} "
                f"({runs.abbreviate(moves)}): move them"
            )
    elif count is not None and len(images) != count:
        report.problems.append(f"{len(images):,} images; the whole set has {count:,}")

    def failure(path: str) -> str | None:
        """Returns why the image cannot be decoded; None if it can."""
        try:
            read_image(folder.images / path)
        except ImageError as error:
            return error.reason
        return None

    reasons = runs.threaded(failure, images)
    bar = tqdm(reasons, "reading", total=len(images), unit=" images", disable=not progress)
    for path, reason in zip(images, bar, strict=True):
        if reason is not None:
            (report.unreadable if path in required else report.unlisted).append((path, reason))
