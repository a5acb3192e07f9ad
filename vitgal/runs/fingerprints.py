"""Fingerprints of files, values and image lists, made of their content and never of paths."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitgal.runs.files import plain

CHUNK = 1 << 20  # bytes read at once when hashing


def fingerprint_file(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Returns the sha256 of plain values (names, numbers, nested lists and dicts), in hex."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_images(names: Iterable[str], paths: Iterable[Path]) -> str:
    """Returns the sha256 of each image's name, file size, first and last 4 KiB, in hex.

    Reading a million photographs completely would take an hour; a replaced or truncated one differs
    in its size or at its ends. FileNotFoundError names the first missing file.
    """
    digest = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            head = handle.read(4096)
            handle.seek(max(0, size - 4096))
            digest.update(f"{name}\0{size}\0".encode() + head + handle.read(4096))
    return digest.hexdigest()
