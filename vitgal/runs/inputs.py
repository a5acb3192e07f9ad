"""Inputs of a stage, read only where their files have changed."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgal.runs.fingerprints import fingerprint, fingerprint_file, fingerprint_images


@dataclass(frozen=True)
class Input:
    """An input: a fingerprint of its content, and a stamp made without reading it.

    Attributes:
        stamp: Returns a hash of paths, sizes and times. It changes whenever a file is written.
        fingerprint: Returns a hash of the content; reads the files.
    """

    stamp: Callable[[], str]
    fingerprint: Callable[[], str]


def file_input(path: Path) -> Input:
    """Returns a file as an input; its fingerprint is `fingerprint_file(path)`."""
    return Input(lambda: _stamp([""], [path]), lambda: fingerprint_file(path))


def images_input(names: Sequence[str], paths: Sequence[Path]) -> Input:
    """Returns a list of images as an input, with the fingerprint of `fingerprint_images`."""
    return Input(lambda: _stamp(names, paths), lambda: fingerprint_images(names, paths))


def combined_input(inputs: Sequence[Input], combine: Callable[..., Any]) -> Input:
    """Returns one input for several.

    Args:
        combine: Takes one fingerprint for each of `inputs` and returns plain values, which
            `fingerprint` combines; it may add further values to compare.
    """
    return Input(
        lambda: fingerprint(combine(*(part.stamp() for part in inputs))),
        lambda: fingerprint(combine(*(part.fingerprint() for part in inputs))),
    )


def input_stamps(inputs: Mapping[str, str | Input]) -> dict[str, str]:
    """Returns the present stamps of a stage's inputs; FileNotFoundError names a missing file."""
    return {name: value.stamp() for name, value in inputs.items() if isinstance(value, Input)}


def input_fingerprints(
    inputs: Mapping[str, str | Input], recorded: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Returns the fingerprint of each input.

    Args:
        recorded: Fingerprints that are still valid, by the input's name; these files are not read.
    """
    recorded = recorded or {}
    return {
        name: value if isinstance(value, str) else recorded.get(name) or value.fingerprint()
        for name, value in inputs.items()
    }


def _stamp(names: Iterable[str], paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        status = os.stat(path)
        # The kernel sets ctime: it changes even where a new file keeps an old file's mtime.
        facts = status.st_size, status.st_mtime_ns, status.st_ctime_ns
        digest.update("\0".join(map(str, (name, os.path.abspath(path), *facts, ""))).encode())
    return digest.hexdigest()
