"""A growing array of rows on disk, continued after a killed run."""

import io
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.features.files import read_json
from vitgal.features.store.codec import PRECISION_REMEDY
from vitgal.features.store.shard import FAILURES

JOURNAL = {
    "settings": dict,
    "shape": [range(1 << 63)] * 2,
    "rows": range(1 << 63),
    "checksum": range(1 << 32),
    "failures": FAILURES,
}


@dataclass
class RowFile:
    """A (rows, width) float32 `.npy` that grows block by block, also after a killed run.

    Blocks are appended to `<name>.partial`; a journal records how many rows are whole, and their
    checksum. It is not mapped: on a full disk a write to mapped memory kills the process.
    """

    path: Path
    shape: tuple[int, int]
    journal: dict

    @classmethod
    def open(cls, path: Path, shape: tuple[int, int], *, settings: Mapping) -> "RowFile":
        """Continues the file after its last whole row, or begins anew.

        path: the `.npy` to be written. shape: (rows, width) of the complete array. settings: plain
        values that must be equal. Raises StageError where there are rows with other settings.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = {"settings": runs.plain(dict(settings)), "shape": list(shape)}
        fresh |= {"rows": 0, "checksum": 0, "failures": []}
        file = cls(path, shape, fresh)
        try:
            journal = read_json(file._journal_path, JOURNAL)
        except ValueError:  # missing or damaged
            journal = None
        if journal and journal["rows"] and journal["settings"] != fresh["settings"]:
            changes = "; ".join(runs.differences(journal["settings"], fresh["settings"]))
            raise runs.StageError(
                f"{path} was begun with other settings ({changes}): {PRECISION_REMEDY}"
            )
        if journal and journal["shape"] == fresh["shape"] and file._is_whole(journal):
            file.journal = journal
        else:
            file.forget()
            file.path.unlink(missing_ok=True)
            file._partial.write_bytes(file._header())
            runs.write_json(file._journal_path, fresh)
        return file

    @property
    def rows(self) -> int:
        """Number of rows that are whole on disk."""
        return self.journal["rows"]

    @property
    def failures(self) -> list[dict[str, str]]:
        """Images that could not be read, each {"name": …, "reason": …}; their rows are zero."""
        return self.journal["failures"]

    def append(self, block: np.ndarray, failures: Sequence[Mapping[str, str]] = ()) -> None:
        """Appends a block (B, D) durably; ValueError for a wrong size, OSError on a full disk."""
        block = np.ascontiguousarray(block, np.float32)
        if block.shape[1:] != self.shape[1:] or self.rows + len(block) > self.shape[0]:
            raise ValueError(f"a block of {block.shape} after row {self.rows} of {self.shape}")
        with open(self._partial, "rb+") as handle:
            handle.truncate(self._bytes(self.rows))  # drops the rest of an append that failed
            handle.seek(0, os.SEEK_END)
            handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        self.journal = self.journal | {
            "rows": self.rows + len(block),
            "checksum": zlib.crc32(block, self.journal["checksum"]),
            "failures": self.failures + [dict(failure) for failure in failures],
        }
        runs.write_json(self._journal_path, self.journal)

    def finish(self) -> Path:
        """Gives the complete file its name and returns it; the journal stays until `forget`."""
        if self.rows != self.shape[0]:
            raise ValueError(f"{self.path} has {self.rows} of {self.shape[0]} rows")
        if self._partial.exists():
            os.replace(self._partial, self.path)
        return self.path

    def forget(self) -> None:
        """Removes the journal; call it once a manifest holds the file's checksum."""
        self._journal_path.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def _journal_path(self) -> Path:
        return self.path.with_name(self.path.name + ".journal.json")

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": tuple(self.shape)}
        np.lib.format.write_array_header_1_0(buffer, layout)
        return buffer.getvalue()

    def _bytes(self, rows: int) -> int:
        return len(self._header()) + 4 * rows * self.shape[1]

    def _is_whole(self, journal: dict) -> bool:
        file = self._partial if self._partial.exists() else self.path
        end = self._bytes(journal["rows"])
        if journal["rows"] > self.shape[0] or not file.exists() or file.stat().st_size < end:
            return False
        checksum = 0
        with open(file, "rb") as handle:
            if handle.read(len(self._header())) != self._header():
                return False
            while handle.tell() < end:
                checksum = zlib.crc32(handle.read(min(runs.CHUNK, end - handle.tell())), checksum)
        return checksum == journal["checksum"]
