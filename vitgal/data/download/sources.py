"""The list of data sets and weights that can be downloaded, third_party/sources.toml."""

import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from vitgal import runs

SOURCES = "third_party/sources.toml"


@dataclass(frozen=True)
class RemoteFile:
    """One file to download: a file with a path of its own, or an archive to unpack.

    The fields are those of sources.toml: `bytes`, the size, is rounded where no sha256 is known;
    `drive` is an id on Google Drive in place of `url`; `to` is the path below the source's folder,
    None for an archive; `arrange` says how an archive is unpacked; `md5` is the address of a text
    file with the sum.
    """

    bytes: int = 0
    url: str = ""
    drive: str | None = None
    to: str | None = None
    arrange: str | None = None
    sha256: str | None = None
    md5: str | None = None

    @property
    def name(self) -> str:
        """The name of the file, also of the archive in records."""
        return PurePosixPath(self.to or self.url).name

    @property
    def address(self) -> str:
        """The address to download from."""
        return f"https://drive.google.com/uc?id={self.drive}" if self.drive else self.url


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


def read_sources(path: Path | None = None) -> dict[str, Source]:
    """Reads the sources by name from a TOML file, by default third_party/sources.toml.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not a list of sources.
    """
    path = runs.resolve(SOURCES) if path is None else Path(path)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
        completed = {name: _complete(name, entry) for name, entry in entries.items()}
        return validate(dict[str, Source], completed)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no list of sources {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a list of sources: {error}") from error


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
    if "numbers" not in part:
        return [part]
    first, last = part["numbers"]
    addresses = {key: part[key] for key in ("url", "md5") if key in part}
    return [
        part | {key: address.format(number) for key, address in addresses.items()}
        for number in range(first, last + 1)
    ]


def select_sources(names: str | Iterable[str], sources: dict[str, Source]) -> list[Source]:
    """Returns the sources of one or several names, each once; ValueError for an unknown name."""
    names = list(dict.fromkeys([names] if isinstance(names, str) else names))
    unknown = [name for name in names if name not in sources]
    if unknown:
        raise ValueError(
            f"there is no source named {', '.join(unknown)}; known are {', '.join(sources)}"
        )
    return [sources[name] for name in names]


def list_sources(sources: Path | None = None) -> pd.DataFrame:
    """Returns a table of the sources: one row a name, with GB of disk space, folder and about."""
    rows = {
        name: {
            "GB": round(sum(file.bytes for file in (*source.files, *source.archives)) / 1e9, 2),
            "folder": source.folder,
            "about": source.about,
        }
        for name, source in read_sources(sources).items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def source_of(path: str | os.PathLike, *, sources: Path | None = None) -> str | None:
    """Returns the name of the source that a path belongs to, None where there is none.

    Only the path's parts are compared (`.../roxford5k/jpg` belongs to roxford5k), so that any
    target folder will do. A folder that several sources share belongs to none of them.
    """
    parts = Path(path).parts
    matches = [
        (len(location), start, name)
        for name, location in _locations(read_sources(sources))
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
