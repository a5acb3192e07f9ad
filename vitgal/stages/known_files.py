"""Files that are known again without being read: their content by what the file system says."""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from vitgal import runs
from vitgal.data.photographs import PhotographError, end_note, file_digest
from vitgal.features.files import read_json

# A file written within this time of its reading may change again and keep its time: the clocks of
# file systems tick up to every two seconds (FAT).
SETTLED = 2_000_000_000  # nanoseconds
SAVED_EVERY = 5.0  # seconds
DIGEST = re.compile("[0-9a-f]{64}")  # becomes a file's name
ENTRY = [int, int, int, str, str | None]  # size, both times, digest and remark


@dataclass(eq=False)
class KnownFiles:
    """The sha256 of files, and a remark on a damaged end, by device, inode, size and times.

    A renamed or moved file is read again at most once, an unchanged one never.

    file: where this is kept, as JSON; a damaged one counts as empty.
    """

    file: Path
    _entries: dict[str, list] = field(default_factory=dict)
    _saved: float = 0.0
    _changed: bool = False

    def __post_init__(self) -> None:
        try:
            self._entries = read_json(self.file, dict)
        except (OSError, ValueError):
            self._entries = {}
        self._saved = time.monotonic()

    def look(self, path: Path) -> tuple[str, str | None]:
        """Returns a file's sha256 in hex, and the remark of `end_note`.

        Raises PhotographError where the file is missing, unreadable or not regular.
        """
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise PhotographError(f"{path.name}: no regular file, but a folder, pipe or device")
        try:
            status = os.stat(path)
        except OSError:
            return file_digest(path), None  # which says why
        name = f"{status.st_dev}:{status.st_ino}"
        stated = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        entry = self._entries.get(name)
        if runs.conforms(entry, ENTRY) and entry[:3] == stated and DIGEST.fullmatch(entry[3]):
            return entry[3], entry[4]
        begun = time.time_ns()
        digest, note = file_digest(path), end_note(path)
        if begun - max(stated[1:]) > SETTLED:
            self._entries[name], self._changed = [*stated, digest, note], True
        if time.monotonic() - self._saved > SAVED_EVERY:
            self.save()
        return digest, note

    def save(self) -> None:
        """Writes what is new."""
        if self._changed:
            runs.refuse_links([self.file.parent, self.file])
            runs.write_json(self.file, self._entries)
        self._saved, self._changed = time.monotonic(), False
