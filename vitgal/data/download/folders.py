"""A source's folder: its record of downloads, and which files and images are there or missing.

`<folder>/<name>.download.json` records the checksum of each downloaded file, and which archives are
unpacked.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vitgal import runs
from vitgal.data import gldv2, revisited
from vitgal.data.download.sources import RemoteFile, Source, validate
from vitgal.data.photographs import visible_files

Entry = dict[str, int | str | bool]


@dataclass
class Record:
    """What was downloaded: an entry for each file's path and for each archive's name.

    An entry holds `bytes` and `sha256` (or `md5`); an archive's also `images`, the number of files
    that it held, and `unpacked`.
    """

    source: str
    files: dict[str, Entry] = field(default_factory=dict)
    archives: dict[str, Entry] = field(default_factory=dict)


def read_record(path: Path, source: str) -> Record:
    """Reads the record of a source's downloads, an empty one where there is no file.

    Raises ValueError for a file that is no such record.
    """
    try:
        return validate(Record, json.loads(path.read_bytes()))
    except FileNotFoundError:
        return Record(source)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a record of downloads ({error}); delete it and run `vitgal download` "
            "again: it keeps the files that are there"
        ) from None


@dataclass
class SourceFolder:
    """The folder of one source."""

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
        """The record; ValueError where its file is damaged."""
        return read_record(self.record_path, self.source.name)

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
        """Returns the paths below `images` of all images of the set, None without a list.

        Raises ValueError for a list that cannot be read.
        """
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
        """Returns the listed images that are missing, sorted; None where nothing can be compared.

        A list that cannot be read counts as none: `check` reports it.
        """
        if not self.images.is_dir():
            return None
        try:
            listed = self.listed_images()
        except ValueError:
            return None
        if listed is None:
            return None
        return sorted(set(listed).difference(visible_files(self.images)))
