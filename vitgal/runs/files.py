"""Files that are written completely or not at all, and JSON with plain values."""

import codecs
import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitgal.runs.errors import PathError, StageError, short

TEMPORARY = ".tmp-"
_BYTE_ORDER_MARKS = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` on success.

    A failure removes the temporary file: readers see the old content or the new, never a part.

    Raises:
        OSError: The disk is full; the message has a remedy.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random: machines that share the folder may have equal process ids.
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        with explained_full_disk(path):
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explained_full_disk(path: Path) -> Iterator[None]:
    """Raises the OSError of a full disk with the file that is written, and a remedy."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        raise OSError(
            error.errno or errno.ENOSPC,
            f"no space left to write {path.name}; make room and run the same command again: "
            "complete files are kept",
            str(path.parent),
        ) from error


def disk_full(error: OSError) -> bool:
    """Returns whether a full disk, a quota or a limit on file sizes stopped a write."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # NumPy gives no error number, only "4096 requested and 1024 written".
    return error.errno in full or " requested and " in str(error)


def inside(folder: str | os.PathLike, name: str) -> Path:
    """Returns `folder / name` for a name that a file holds; links are not followed.

    Raises PathError for a name that is absolute, empty, not a str or not UTF-8, or that leads out
    of the folder.
    """
    legal = isinstance(name, str) and name not in ("", ".") and not name.startswith("/")
    if not legal or ".." in name.split("/") or "\0" in name:
        raise PathError(f"{short(name)} is not the path of a file inside {folder}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PathError(
            f"{short(name)} is no UTF-8: rename the file, also where it is listed"
        ) from None
    return Path(folder) / name


def refuse_outside(folder: str | os.PathLike, names: Sequence[str]) -> None:
    """Raises PathError as `inside` does, for the first of many names (N,) that it refuses."""
    joined = "\0".join(names)
    # All at once, and one by one only where a name may be bad: "a..b" is legal, "ä" nearly always.
    doubtful = not {"", ".", "/"}.isdisjoint(name[:1] for name in names) or ".." in joined
    if doubtful or joined.count("\0") >= max(len(names), 1) or not joined.isascii():
        for name in names:
            inside(folder, name)


def refuse_links(paths: Iterable[Path]) -> None:
    """Raises PathError for the first path that is a link: writing there would change its target."""
    if link := next((path for path in paths if os.path.islink(path)), None):
        raise PathError(
            f"{link} is a link to {os.readlink(link)}: vitgal does not write through links; "
            "move it away, or use the folder that it leads to"
        )


def write_text(path: Path, text: str) -> Path:
    """Writes `text` as UTF-8, atomically; returns the path."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def text_encoding(path: str | os.PathLike) -> str:
    """Returns the encoding of a text by its byte order mark, UTF-8 without one.

    Raises ValueError where the text begins like UTF-16 or UTF-32 without a mark.
    """
    with open(path, "rb") as handle:
        start = handle.read(4)
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    if b"\0" in start:
        raise ValueError(f"{path} is no text in UTF-8, perhaps UTF-16: save it as UTF-8")
    return "utf-8"


def read_lines(path: str | os.PathLike) -> list[str]:
    """Reads the lines of a text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    A line ends at a line feed or a carriage return alone: names may hold other separators.

    Raises FileNotFoundError, and ValueError where the file is no such text.
    """
    encoding = text_encoding(path)
    try:
        text = Path(path).read_text(encoding=encoding).removesuffix("\n")
    except UnicodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8, perhaps UTF-16: save it as UTF-8")
    return text.split("\n") if text else []


def write_json(path: Path, value: Any) -> Path:
    """Writes `plain(value)` as JSON, atomically; returns the path."""
    return write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> Path:
    """Writes an array of any shape as `.npy`, atomically; returns the path."""
    with atomic(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, array, allow_pickle=False)
    return Path(path)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes arrays of any shapes as `.npz`, atomically; equal arrays give equal bytes."""
    with atomic(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **arrays)
    return Path(path)


def read_json(path: Path) -> Any:
    """Reads a JSON file; StageError names one that is missing or incomplete."""
    if not Path(path).is_file():
        raise StageError(f"{path} is missing")
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, ...
        raise StageError(
            f"{path} is not complete JSON ({error}); set overwrite: true to make it again"
        ) from None


def plain(value: Any) -> Any:
    """Returns `value` in JSON types: arrays and tuples as lists, nan and infinities as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def conforms(value: Any, schema: Any) -> bool:
    """Returns whether a value from a JSON file has the structure of a schema.

    A type stands for its instances, a range for its integers, a tuple for its members, a dict for
    dicts with at least these entries, a list of one schema for lists of any length, a longer one
    for lists of that length.
    """
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(
            name in value and conforms(value[name], part) for name, part in schema.items()
        )
    if isinstance(schema, list):
        if not isinstance(value, list) or (len(schema) > 1 and len(value) != len(schema)):
            return False
        return all(conforms(part, schema[i % len(schema)]) for i, part in enumerate(value))
    if isinstance(schema, range):
        return type(value) is int and value in schema
    return value in schema if isinstance(schema, tuple) else isinstance(value, schema)
