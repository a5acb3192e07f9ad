"""Shards: a part of a store's images in a few flat arrays, written whole or not at all."""

import functools
import itertools
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.features.files import INT32, divides, map_array, read_json
from vitgal.features.local import LocalFeatures
from vitgal.features.store import codec
from vitgal.features.store.codec import FEATURE_ARRAYS, FORMAT, REMEDY, StoreError
from vitgal.settings.sections import FEATURE_DTYPES, LocalSettings

ARRAYS = (*FEATURE_ARRAYS, "offsets", "checksums")
SHARD = "shard-"
INDEX, INDEX_HEADER = "index", "index.json"
PARTIAL = ".partial-"  # begins the name of a shard that is being written
# Of JSON files, see `runs.conforms`
FAILURES = [{"name": str, "reason": str}]
SIZES = {"input_size": [INT32] * 2, "box": [INT32] * 4, "image_size": [INT32] * 2}
CODE_DIM = range(1 << 20)
HEADER = {
    "format": (FORMAT,),
    "dtype": FEATURE_DTYPES,
    "code_dim": CODE_DIM,
    "settings": dict,
    "items": [{"name": str} | SIZES],
}


def partition(names: Iterable[str], shard_size: int) -> list[list[str]]:
    """Sorts the names and cuts them into shards of `shard_size`, the last perhaps smaller.

    No names give no shards. Raises ValueError for a repeated name or a `shard_size` below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    ordered = sorted(names)
    for name, following in itertools.pairwise(ordered):
        if name == following:
            raise ValueError(f"{name!r} is listed twice: every name in a store must differ")
    return [ordered[start : start + shard_size] for start in range(0, len(ordered), shard_size)]


def shard_folder(folder: Path, index: int, count: int) -> Path:
    """Returns the folder of shard `index` of `count`: two digits, more for over 100 shards."""
    digits = max(2, len(str(count - 1)))
    return Path(folder) / f"{SHARD}{index:0{digits}d}"


def shard_folders(folder: Path) -> list[Path]:
    """Lists the folders of a store's shards by number; FileNotFoundError where there is none."""
    shards = sorted(
        (path for path in Path(folder).glob(f"{SHARD}*") if path.name[len(SHARD) :].isdecimal()),
        key=lambda path: int(path.name[len(SHARD) :]),
    )
    if not shards:
        raise FileNotFoundError(f"{folder} holds no feature store: run 05_local_extraction first")
    return shards


def drop_index(folder: Path) -> None:
    """Removes the index of a store before one of its shards changes."""
    (Path(folder) / INDEX / INDEX_HEADER).unlink(missing_ok=True)


def clear_partial(folder: Path) -> None:
    """Removes shards of a store that a killed process left half-written."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


@dataclass(frozen=True)
class ShardFormat:
    """The storage of a shard's descriptors and the settings of their extraction.

    dtype: one of FEATURE_DTYPES, else ValueError. code_dim: dimension of a descriptor; None: that
    of the first image written. settings: plain values, such as the precision of inference.
    """

    dtype: str = LocalSettings.dtype
    code_dim: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        codec.check_dtype(self.dtype)

    def __str__(self) -> str:
        settings = (f", {name} {value}" for name, value in sorted(self.settings.items()))
        return f"{self.code_dim} values as {self.dtype}{''.join(settings)}"

    def header(self) -> dict[str, Any]:
        """Returns the entries of `items.json` before the items, in their order."""
        header = {"format": FORMAT, "dtype": self.dtype, "code_dim": self.code_dim or 0}
        return header | {"settings": runs.plain(dict(self.settings))}

    def layout(self, rows: int, items: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns type and shape of each array of a shard: `rows` features of `items` images."""
        single = np.dtype(np.float32)
        kind, width = codec.stored_type(self.code_dim or 0, self.dtype)
        return {
            "keypoints": (single, (rows, 2)),
            "descriptors": (kind, (rows, width)),
            "scores": (single, (rows,)),
            "scales": (single, (rows,)),
            "offsets": (np.dtype(np.int64), (items + 1,)),
            "checksums": (np.dtype(np.uint32), (items,)),
        }


def item_entry(key: str, features: LocalFeatures) -> dict[str, Any]:
    """Returns an image's entry in `items.json`: its key as "name", and its sizes as lists."""
    return {"name": key} | {name: [int(n) for n in getattr(features, name)] for name in SIZES}


def _checksum(item: Mapping, arrays: Mapping[str, np.ndarray]) -> int:
    total = zlib.crc32(runs.fingerprint(item).encode())
    for name in FEATURE_ARRAYS:
        total = zlib.crc32(np.ascontiguousarray(arrays[name]), total)
    return total


def write_shard(
    folder: Path,
    items: Iterable[tuple[str, LocalFeatures]],
    shard_format: ShardFormat = ShardFormat(),
    *,
    failures: Iterable[Mapping[str, str]] = (),
) -> Path:
    """Writes one shard whole or not at all, and returns its folder.

    Args:
        folder: the shard's own (`shard-NN` in the store's); an existing one is replaced.
        items: (key, features), encoded as they come.
        shard_format: its `code_dim` is needed only where `items` may be empty.
        failures: images that could not be read, see FAILURES; read after the items, so that their
            generator may fill it.

    Raises ValueError for a repeated key, other dimensions, or numbers that are not finite.
    """
    folder, entries, encoded = Path(folder), [], []
    for key, features in items:
        if shard_format.code_dim is None:
            shard_format = replace(shard_format, code_dim=features.code_dim)
        if features.code_dim != shard_format.code_dim:
            widths = f"{features.code_dim}, not {shard_format.code_dim}"
            raise ValueError(f"{key!r} has descriptors of width {widths}")
        try:
            encoded.append(codec.encode_features(features, shard_format.dtype))
        except ValueError as error:
            raise ValueError(f"the features of {key!r}: {error}") from error
        entries.append(item_entry(key, features))
    if len({item["name"] for item in entries}) < len(entries):
        raise ValueError(f"{folder}: two items have the same key")
    layout = shard_format.layout(0, 0)  # gives an empty shard its types
    arrays = {
        name: np.concatenate(
            [np.empty(layout[name][1], layout[name][0]), *(image[name] for image in encoded)]
        )
        for name in FEATURE_ARRAYS
    }
    counts = (len(image["scores"]) for image in encoded)
    arrays["offsets"] = np.cumsum([0, *counts], dtype=np.int64)
    arrays["checksums"] = np.array(list(map(_checksum, entries, encoded)), np.uint32)
    _write_files(folder, arrays, shard_format.header() | {"items": entries}, list(failures))
    return folder


def _write_files(folder: Path, arrays: Mapping, header: Mapping, failures: list) -> None:
    """Writes a shard's files beside its folder, then moves them there in one step."""
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, array in arrays.items():
            runs.write_array(partial / f"{name}.npy", array)
        runs.write_json(partial / "failures.json", failures)
        runs.write_json(partial / "items.json", header)
        drop_index(folder.parent)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Shard:
    """One open shard: its header (`items.json`) and its memory-mapped arrays."""

    folder: Path
    header: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """Opens a shard without reading its features; StoreError where files do not fit."""
        folder = Path(folder)
        try:
            header = read_json(folder / "items.json", {"format": int})
            if header["format"] != FORMAT:
                raise StoreError(f"{folder} has store format {header['format']}, not {FORMAT}")
            if not runs.conforms(header, HEADER):
                raise ValueError("its items.json")
            shard = cls(folder, header, {})
            count = len(header["items"])
            offsets = map_array(folder / "offsets.npy", np.dtype(np.int64), (count + 1,))
            if not divides(offsets, offsets[-1]):
                raise ValueError("its offsets.npy")
            for name, stated in shard.format.layout(int(offsets[-1]), count).items():
                shard.arrays[name] = map_array(folder / f"{name}.npy", *stated)
        except (OSError, ValueError) as error:
            raise StoreError(f"the shard {folder} is damaged ({error}); {REMEDY}") from error
        return shard

    @property
    def format(self) -> ShardFormat:
        """The format that the header states."""
        return ShardFormat(self.header["dtype"], self.header["code_dim"], self.header["settings"])

    @property
    def names(self) -> list[str]:
        """Keys of the images, in the order written."""
        return [item["name"] for item in self.header["items"]]

    @functools.cached_property
    def failures(self) -> list[dict[str, str]]:
        """Images that belong here but could not be read; StoreError where the list is damaged."""
        try:
            return read_json(self.folder / "failures.json", FAILURES)
        except ValueError as error:
            raise StoreError(f"the shard {self.folder} is damaged ({error}); {REMEDY}") from error

    def damaged(self) -> list[str]:
        """Returns keys of images whose bytes do not match their checksum; reads everything."""
        names = []
        ranges = itertools.pairwise(self.arrays["offsets"])
        for item, rows, checksum in zip(
            self.header["items"], ranges, self.arrays["checksums"], strict=True
        ):
            arrays = {name: self.arrays[name][slice(*rows)] for name in FEATURE_ARRAYS}
            if _checksum(item, arrays) != checksum:
                names.append(item["name"])
        return names


def whole_shard(folder: Path, names: Sequence[str], shard_format: ShardFormat) -> Shard | None:
    """Opens a shard of exactly these images and failures; None where it has to be made again."""
    try:
        shard = Shard.open(folder)
        listed = shard.names + [failure["name"] for failure in shard.failures]
    except StoreError:
        return None
    same = shard.format.header() == shard_format.header() and sorted(listed) == sorted(names)
    return shard if same and not shard.damaged() else None
