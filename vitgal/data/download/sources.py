"""The data sets and weights that can be downloaded, third_party/sources.toml, and their folders."""

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pandas as pd

from vitgal import runs
from vitgal.data import gldv2, revisited
from vitgal.data.photographs import visible_files

SOURCES = "third_party/sources.toml"
MAX_NUMBERS = 10_000  # files of one numbered entry

Entry = dict[str, int | str | bool]


@dataclass(frozen=True)
class RemoteFile:
    """One file to download: a file with a path of its own, or an archive to unpack.

    The fields are those of sources.toml: `bytes`, the size, is rounded where no sha256 is known;
    `drive` is an id on Google Drive in place of `url`; `to` is the path below the source's folder,
    None for an archive; `arrange` says how an archive is unpacked; `md5` is the address of a text
    file with the sum; `mirrors` are further addresses of the same bytes, tried in turn; `form` says
    what to click on the page `url`, where a web form gives the file out.
    """

    bytes: int = 0
    url: str = ""
    drive: str | None = None
    to: str | None = None
    arrange: Literal["flat", "tree", "by_id"] | None = None
    sha256: str | None = None
    md5: str | None = None
    mirrors: tuple[str, ...] = ()
    form: str = ""

    @property
    def name(self) -> str:
        """The name of the file, also of the archive in records."""
        return PurePosixPath(self.to or self.url).name

    @property
    def address(self) -> str:
        """The address to download from."""
        return f"https://drive.google.com/uc?id={self.drive}" if self.drive else self.url

    @property
    def limit(self) -> int:
        """The bytes after which a transfer is stopped; larger where `bytes` is rounded."""
        return self.bytes if self.sha256 and self.bytes else 2 * self.bytes + (1 << 20)


@dataclass(frozen=True)
class Source:
    """One entry of sources.toml, which explains the fields.

    The first of `lists` that exists names the images. One of the landmark tables `tables` is
    needed, with `rows` images of `classes` classes.
    """

    name: str
    about: str
    folder: str
    page: str
    licence: str
    note: str = ""
    files: tuple[RemoteFile, ...] = ()
    archives: tuple[RemoteFile, ...] = ()
    image_folder: str | None = None
    lists: tuple[str, ...] = ()
    images: int | None = None
    tables: tuple[str, ...] = ()
    rows: int | None = None
    classes: int | None = None

    def check(self) -> None:
        """Raises ValueError for a path outside the folder, or a file without path or address."""
        if any(f.mirrors and not (f.sha256 or f.md5) for f in (*self.files, *self.archives)):
            raise ValueError(f"{self.name}: a file with mirrors needs a sha256 or md5")
        if any(file.to is None for file in self.files):
            raise ValueError(f"{self.name}: `to` is missing")
        if self.archives and (not self.image_folder or not all(a.arrange for a in self.archives)):
            raise ValueError(f"{self.name}: archives need `arrange` and an image_folder")
        remote = (*self.files, *self.archives)
        paths = [self.name.replace("/", "/../"), self.folder, self.image_folder, *self.lists]
        paths += [*self.tables, *(file.to for file in self.files), *(file.name for file in remote)]
        for path in paths:
            if path is not None:
                runs.inside(self.folder, path)
        mirrors = [address for file in remote for address in file.mirrors]
        for address in (*(f.address for f in remote), *(f.md5 for f in remote), *mirrors):
            if address is not None and not address.startswith(("https://", "http://")):
                raise ValueError(f"{self.name}: {runs.short(address)} is no web address")


def read_sources(path: Path | None = None) -> dict[str, Source]:
    """Reads the sources by name from a TOML file, by default third_party/sources.toml.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not a list of sources, or a path in it leads out of its folder.
    """
    path = runs.resolve(SOURCES) if path is None else Path(path)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
        completed = {name: _complete(name, entry) for name, entry in entries.items()}
        sources = validate(dict[str, Source], completed)
        for source in sources.values():
            source.check()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no list of sources {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is not a list of sources: {error}") from error
    return sources


def validate(kind: Any, value: Any) -> Any:
    """Returns plain values as the type `kind` declares; ValueError names the first wrong one."""
    import pydantic  # slow to import

    try:
        return pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _complete(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry with its name, its lists as a list, and numbered files one by one."""
    lists = entry.get("list", ())
    parts = {
        kind: [file for part in entry.get(kind, ()) for file in _number(part)]
        for kind in ("files", "archives")
    }
    return entry | parts | {"name": name, "lists": [lists] if isinstance(lists, str) else lists}


def _number(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a numbered part's files: {} or {:03d} in their addresses is the number."""
    if "numbers" not in part:
        return [part]
    first, last = part["numbers"]
    if last - first >= MAX_NUMBERS:
        raise ValueError(f"numbers = [{first}, {last}] are more than {MAX_NUMBERS:,}")
    return [
        part
        | {key: _fill_in(part[key], number) for key in ("url", "md5") if key in part}
        | {"mirrors": [_fill_in(mirror, number) for mirror in part.get("mirrors", ())]}
        for number in range(first, last + 1)
    ]


def _fill_in(address: str, number: int) -> str:
    return re.sub(r"\{(?::0(\d)d)?\}", lambda match: f"{number:0{match[1] or 1}d}", address)


def select_sources(names: str | Iterable[str], sources: dict[str, Source]) -> list[Source]:
    """Returns the sources of one or several names, each once; ValueError for an unknown name."""
    names = list(dict.fromkeys([names] if isinstance(names, str) else names))
    if unknown := [name for name in names if name not in sources]:
        raise ValueError(
            f"there is no source named {', '.join(unknown)}; known are {', '.join(sources)}"
        )
    return [sources[name] for name in names]


def list_sources() -> pd.DataFrame:
    """Returns a table of the sources: one row a name, with GB of disk space, folder and about."""
    rows = {
        name: {
            "GB": round(sum(file.bytes for file in (*source.files, *source.archives)) / 1e9, 2),
            "folder": source.folder,
            "about": source.about,
        }
        for name, source in read_sources().items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def source_of(path: str | os.PathLike) -> str | None:
    """Returns the name of the source that a path belongs to, None where there is none.

    Only the path's parts are compared (`.../roxford5k/jpg` belongs to roxford5k), so the target
    folder may be any. A folder that several sources share belongs to none of them.
    """
    parts = Path(path).parts
    matches = [
        (len(location), start, name)
        for name, location in _locations(read_sources())
        for start in range(len(parts) - len(location) + 1)
        if parts[start : start + len(location)] == location
    ]
    return max(matches)[2] if matches else None


def _locations(sources: dict[str, Source]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the folders and files that belong to one source alone, as path parts."""
    folders = [source.folder for source in sources.values()]
    for name, source in sources.items():
        content = {source.image_folder, *source.tables, *(file.to for file in source.files)}
        if folders.count(source.folder) == 1:
            content.add("")
        for path in content - {None}:
            yield name, PurePosixPath(source.folder, path).parts


@dataclass
class Record:
    """The record of downloads, `<folder>/<name>.download.json`: an entry per file and archive.

    An entry holds `bytes` and `sha256` (or `md5`); an archive's also `images`, the number of files
    that it held, and `unpacked`.
    """

    source: str
    files: dict[str, Entry] = field(default_factory=dict)
    archives: dict[str, Entry] = field(default_factory=dict)


@dataclass
class SourceFolder:
    """The folder of one source, with its present and missing files and images."""

    source: Source
    path: Path

    @property
    def images(self) -> Path:
        """The folder of the images."""
        return self.path / (self.source.image_folder or ".")

    @property
    def record_path(self) -> Path:
        """The file of the record."""
        return self.path / f"{self.source.name}.download.json"

    @cached_property
    def record(self) -> Record:
        """The record, empty where there is no file; ValueError where the file is damaged."""
        try:
            return validate(Record, json.loads(self.record_path.read_bytes()))
        except FileNotFoundError:
            return Record(self.source.name)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.record_path} is not a record of downloads ({error}); delete it and run "
                "`vitgal download` again: it keeps the files that are there"
            ) from None

    def save_record(self) -> None:
        """Writes the record, atomically."""
        runs.write_json(self.record_path, dataclasses.asdict(self.record))

    def is_unpacked(self, archive: RemoteFile) -> bool:
        """Whether the record says that an archive is unpacked."""
        return bool(self.record.archives.get(archive.name, {}).get("unpacked"))

    def pending(self) -> Iterator[RemoteFile]:
        """Yields the files and archives that have to be downloaded."""
        yield from (file for file in self.source.files if not (self.path / file.to).is_file())
        if not self.unpacked_by_hand():
            for archive in self.source.archives:
                if not (self.images.is_dir() and self.is_unpacked(archive)):
                    yield archive

    def unpacked_by_hand(self) -> bool:
        """Whether all listed images are there although no archive was downloaded."""
        return not self.record.archives and self.missing_images() == []

    def listed_images(self) -> list[str] | None:
        """Returns all images' paths below `images`, None without a list; ValueError for damage."""
        lists = [self.path / name for name in self.source.lists]
        path = next((path for path in lists if path.is_file()), None)
        if path is None:
            return None
        if path.suffix == ".pkl":
            truth = revisited.load_ground_truth(path)
            return [name + revisited.EXTENSION for name in (*truth.database, *truth.queries)]
        if path.suffix == ".csv":
            return [gldv2.image_path(image) for image in gldv2.read_landmark_table(path)["id"]]
        return [line.strip() for line in runs.read_lines(path) if line.strip()]

    def missing_images(self) -> list[str] | None:
        """Returns the missing images, sorted; None without a list that can be read."""
        try:
            listed = self.listed_images() if self.images.is_dir() else None
        except ValueError:
            return None
        return listed and sorted(set(listed).difference(visible_files(self.images)))
