"""The list of data sets and weights that can be downloaded."""

import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from vitgal import runs
from vitgal.data import gldv2, revisited

SOURCES = "third_party/sources.toml"
SHOWN = 3  # names that an error spells out


@dataclass(frozen=True)
class Item:
    """One file to fetch: a file of its own (`to`), or an archive to unpack (`arrange`)."""

    name: str
    url: str
    drive: bool  # on Google Drive
    bytes: int
    to: str | None = None
    arrange: str | None = None
    sha256: str | None = None
    md5: str | None = None  # the address of the published sum


@dataclass(frozen=True)
class Source:
    """One entry of sources.toml."""

    name: str
    about: str
    folder: str
    files: tuple[Item, ...]
    archives: tuple[Item, ...]
    image_folder: str | None
    lists: tuple[str, ...]  # the first that exists says which images there must be
    images: int | None
    tables: tuple[str, ...]
    rows: int | None
    classes: int | None
    page: str
    licence: str
    note: str


@dataclass
class _Job:
    """One source while it is brought: where it goes, what is recorded, how to go about it."""

    source: Source
    folder: Path
    record: dict
    progress: bool
    reached: bool = False  # something has come over the network since the command began

    @property
    def work(self) -> Path:
        return self.folder / f".download-{self.source.name}"

    @property
    def images(self) -> Path:
        return _images(self.source, self.folder)

    def save(self) -> None:
        runs.write_json(_record_path(self.source, self.folder), self.record)


def read_sources(path: Path | None = None) -> dict[str, Source]:
    """The sources by name, from a TOML file; by default third_party/sources.toml.

    Raises FileNotFoundError where the file is missing, ValueError where it is no such file.
    """
    path = runs.resolve(SOURCES) if path is None else Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: _source(name, entry) for name, entry in content.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no list of sources {path}") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of sources: {error!r}") from error


def list_sources(sources: Path | None = None) -> pd.DataFrame:
    """A table of what can be downloaded: a row a name; GB is the disk space it fills."""
    known = read_sources(sources)
    rows = [
        {
            "GB": round(sum(item.bytes for item in (*s.files, *s.archives)) / 1e9, 2),
            "folder": s.folder,
            "about": s.about,
        }
        for s in known.values()
    ]
    return pd.DataFrame(rows, index=pd.Index(known, name="name"))


def hint(path: str | os.PathLike, *, sources: Path | None = None) -> str | None:
    """The source whose folder or file a path is (or lies in); None where it is no source's.

    Only names are compared (`.../roxford5k/jpg` is roxford5k), so that it holds for any target; a
    folder that several sources share belongs to none.
    """
    parts = Path(path).parts
    known = read_sources(sources)
    best: tuple[int, int] = (0, 0)
    found = None
    for source in known.values():
        for place, to_the_end in _places(source, known):
            last = len(parts) - len(place)
            starts = [last] if to_the_end else range(last + 1)
            for start in starts:
                if start >= 0 and parts[start : start + len(place)] == place:
                    if (len(place), start) > best:
                        best, found = (len(place), start), source.name
    return found


def _places(source: Source, known: dict[str, Source]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """A source's own places as path parts, and whether a path must end there (a file)."""
    shared = sum(other.folder == source.folder for other in known.values()) > 1
    folder = PurePosixPath(source.folder)
    if not shared:
        yield folder.parts, False
    if source.image_folder:
        yield (folder / source.image_folder).parts, False
    for file in {*(item.to for item in source.files), *source.tables}:
        yield (folder / file).parts, True


def _source(name: str, entry: dict) -> Source:
    lists = entry.get("list", ())
    return Source(
        name=name,
        about=entry["about"],
        folder=entry["folder"],
        files=tuple(item for part in entry.get("files", ()) for item in _items(part)),
        archives=tuple(item for part in entry.get("archives", ()) for item in _items(part)),
        image_folder=entry.get("image_folder"),
        lists=(lists,) if isinstance(lists, str) else tuple(lists),
        images=entry.get("images"),
        tables=tuple(entry.get("tables", ())),
        rows=entry.get("rows"),
        classes=entry.get("classes"),
        page=entry["page"],
        licence=entry["licence"],
        note=entry.get("note", ""),
    )


def _items(part: dict) -> Iterator[Item]:
    first, last = part.get("numbers", (0, 0))
    for number in range(first, last + 1):
        drive = "drive" in part
        url = f"https://drive.google.com/uc?id={part['drive']}" if drive else part["url"]
        url = url.format(number) if "numbers" in part else url
        md5 = part.get("md5")
        yield Item(
            name=PurePosixPath(part.get("to") or url).name,
            url=url,
            drive=drive,
            bytes=part["bytes"],
            to=part.get("to"),
            arrange=part.get("arrange"),
            sha256=part.get("sha256"),
            md5=md5.format(number) if md5 and "numbers" in part else md5,
        )


def _chosen(names: str | Iterable[str], known: dict[str, Source]) -> list[Source]:
    names = list(dict.fromkeys([names] if isinstance(names, str) else names))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"there is no source named {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return [known[name] for name in names]


def _record_path(source: Source, folder: Path) -> Path:
    return folder / f"{source.name}.download.json"


def _read_record(source: Source, folder: Path) -> dict:
    path = _record_path(source, folder)
    found = runs.read_json(path) if path.is_file() else {}
    return {"source": source.name, "files": {}, "archives": {}} | found


def _pending(source: Source, folder: Path) -> Iterator[Item]:
    yield from (item for item in source.files if not (folder / item.to).is_file())
    entries = _read_record(source, folder)["archives"]
    whole = not entries and _missing(source, folder) == []
    there = _images(source, folder).is_dir()
    for item in source.archives:
        if not whole and not (there and entries.get(item.name, {}).get("unpacked")):
            yield item


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def _images(source: Source, folder: Path) -> Path:
    return folder / (source.image_folder or ".")


def _walk(folder: Path) -> Iterator[str]:
    """Every file below a folder as a path relative to it, hidden ones left out."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(where).relative_to(folder).as_posix()
        for name in files:
            if not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


def _listed(source: Source, folder: Path) -> list[str] | None:
    """Where every image that must be there lies below the image folder; None without a list."""
    path = next((folder / name for name in source.lists if (folder / name).is_file()), None)
    if path is None:
        return None
    if path.suffix == ".pkl":
        truth = revisited.load_ground_truth(path)
        return [name + revisited.EXTENSION for name in (*truth.database, *truth.queries)]
    if path.suffix == ".csv":
        return [gldv2.image_path(image) for image in gldv2.read_landmark_table(path)["id"]]
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _missing(source: Source, folder: Path) -> list[str] | None:
    """The listed images that are not there, sorted; None where there is nothing to compare."""
    if not _images(source, folder).is_dir():
        return None
    try:
        listed = _listed(source, folder)
    except ValueError:  # another table of that name, say: `check` reports it, images come anyway
        return None
    if listed is None:
        return None
    missing = set(listed)
    missing.difference_update(_walk(_images(source, folder)))
    return sorted(missing)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
