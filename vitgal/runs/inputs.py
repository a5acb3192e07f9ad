"""Inputs of a stage: fingerprints of their content, read only where files have changed."""

import errno
import functools
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgal.runs.files import plain
from vitgal.runs.lookup import file_facts

CHUNK = 1 << 20  # bytes read at once when hashing
ENDS = 4096  # bytes of an image that are hashed at its beginning and at its end
READERS = 16  # threads that open images: most of the time they wait for the disk
JOINED = 1 << 16  # names that are joined at once when hashing


def fingerprint_file(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Returns the sha256 of plain values (names, numbers, nested lists and dicts), in hex."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_images(names: Sequence[str], paths: Sequence[Path | str]) -> str:
    """Returns the sha256 of each image's name, file size, first and last 4 KiB, in hex.

    Reading a million photographs completely would take an hour; a replaced or truncated one differs
    in its size or at its ends. FileNotFoundError names the first missing file.
    """
    digest = hashlib.sha256()
    for name, (size, ends) in zip(names, threaded(_read_ends, paths, READERS), strict=True):
        # File names may not be Unicode.
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogatepass") + ends)
    return digest.hexdigest()


def _read_ends(path: Path | str) -> tuple[int, bytes]:
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        head = handle.read(ENDS)
        handle.seek(max(0, size - ENDS))
        return size, head + handle.read(ENDS)


def threaded(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int | None = None
) -> Iterator[Any]:
    """Yields `function` of each item in their order, as `map`, computed in threads (None: CPUs).

    At most 4,096 items are submitted at once: millions of futures would fill the memory.
    """
    remaining, threads = iter(items), threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(remaining, 4096)):
            size = max(1, len(batch) // (4 * threads))
            blocks = [batch[start : start + size] for start in range(0, len(batch), size)]
            for results in pool.map(lambda block: [*map(function, block)], blocks):
                yield from results


@dataclass(frozen=True)
class Input:
    """An input: a fingerprint of its content, and a stamp that needs no reading.

    Attributes:
        stamp: Returns a hash of paths, sizes and times. It changes whenever a file is written.
        fingerprint: Returns a hash of the content; reads the files.
        verify: Whether the content is read again even where the stamp is the same.
    """

    stamp: Callable[[], str]
    fingerprint: Callable[[], str]
    verify: bool = False


def file_input(path: Path) -> Input:
    """Returns a file as an input; its fingerprint is `fingerprint_file(path)`."""
    return Input(lambda: images_stamp([""], [path]), lambda: fingerprint_file(path))


def images_input(
    names: Sequence[str], paths: Sequence[Path | str], *, verify: bool = False
) -> Input:
    """Returns a list of images as an input, with the fingerprint of `fingerprint_images`."""
    return Input(
        lambda: images_stamp(names, paths), lambda: fingerprint_images(names, paths), verify
    )


def combined_input(inputs: Sequence[Input], combine: Callable[..., Any]) -> Input:
    """Returns one input for several: the fingerprint of what `combine` makes of theirs."""
    return Input(
        lambda: fingerprint(combine(*(part.stamp() for part in inputs))),
        lambda: fingerprint(combine(*(part.fingerprint() for part in inputs))),
        any(part.verify for part in inputs),
    )


def input_stamps(inputs: Mapping[str, str | Input]) -> dict[str, str]:
    """Returns the present stamps of a stage's inputs; FileNotFoundError names a missing file."""
    return {name: value.stamp() for name, value in inputs.items() if isinstance(value, Input)}


def input_fingerprints(
    inputs: Mapping[str, str | Input], recorded: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Returns the fingerprint of each input; those `recorded` are valid and not computed."""
    recorded = recorded or {}
    return {
        name: value if isinstance(value, str) else recorded.get(name) or value.fingerprint()
        for name, value in inputs.items()
    }


def images_stamp(
    names: Sequence[str], paths: Sequence[Path | str], facts: Callable[[], array] | None = None
) -> str:
    """Returns a hash of names, paths, sizes and times; FileNotFoundError names a missing file.

    facts: returns the `file_facts` of the paths, if they are being looked up already.
    """
    texts = [*map(os.fspath, paths)]
    folder = "" if {text[:1] for text in texts} <= {"/"} else os.getcwd()
    with ThreadPoolExecutor(1) as pool:
        # Meanwhile the names are hashed.
        looked_up = pool.submit(facts or functools.partial(file_facts, texts))
        digest = hashlib.sha256()
        text, separator = itertools.chain([folder], names, [""], texts), ""
        while part := list(itertools.islice(text, JOINED)):
            joined = separator + "\0".join(part)
            digest.update(joined.encode("utf-8", "surrogateescape"))
            separator = "\0"
        values = looked_up.result()
    if min(values, default=0) < 0:
        path = next(text for text, size in zip(texts, values[::3], strict=True) if size < 0)
        os.stat(path)  # a missing file raises here
        raise FileNotFoundError(errno.ENOENT, "This is no file", path)
    digest.update(values)
    return digest.hexdigest()
