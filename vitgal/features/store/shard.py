"""Shards: a part of a store's images in a few flat arrays, written whole or not at all."""

import functools
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.features.files import conforms, map_array, read_json
from vitgal.features.local import LocalFeatures
from vitgal.features.store.codec import (
    FEATURE_ARRAYS,
    FORMAT,
    REMEDY,
    StoreError,
    check_dtype,
    encode_features,
    stored_type,
)
from vitgal.settings.sections import FEATURE_DTYPES, LocalSettings

ARRAYS = (*FEATURE_ARRAYS, "offsets", "checksums")
SHARD = "shard-"
INDEX, INDEX_HEADER = "index", "index.json"
PARTIAL = ".partial-"  # begins the name of a shard that is being written
FAILURES = [{"name": str, "reason": str}]  # of a JSON file, see `files.conforms`
HEADER = {
    "format": int,
    "dtype": FEATURE_DTYPES,
    "code_dim": int,
    "settings": dict,
    "items": [{"name": str, "input_size": [int] * 2, "box": [int] * 4, "image_size": [int] * 2}],
}


def partition(names: Iterable[str], shard_size: int) -> list[list[str]]:
    """Sorts the names and cuts them into shards of `shard_size`, the last perhaps smaller.

    The shards depend on nothing but the names, so that a later run finds the same ones. No names
    give no shards. Raises ValueError where a name occurs twice or `shard_size` is below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    ordered = sorted(names)
    for name, following in zip(ordered, ordered[1:], strict=False):
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
    """How a shard's descriptors are stored, and with which settings its features were extracted.

    Attributes:
        dtype: of the stored descriptors, one of FEATURE_DTYPES; another raises ValueError.
        code_dim: dimension of a descriptor; None: that of the first image written.
        settings: plain values that are kept beside the items, such as the precision of inference.
    """

    dtype: str = LocalSettings.dtype
    code_dim: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def __str__(self) -> str:
        settings = (f", {name} {value}" for name, value in sorted(self.settings.items()))
        return f"{self.code_dim} values as {self.dtype}{''.join(settings)}"

    def header(self) -> dict[str, Any]:
        """Returns the entries of `items.json` before the items, in their order."""
        header = {"format": FORMAT, "dtype": self.dtype, "code_dim": self.code_dim or 0}
        return header | {"settings": runs.plain(dict(self.settings))}

    def layout(self, rows: int, items: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns type and shape of each array of a shard: `rows` features of `items` images."""
        single, (kind, width) = np.dtype(np.float32), stored_type(self.code_dim or 0, self.dtype)
        return {
            "keypoints": (single, (rows, 2)),
            "descriptors": (kind, (rows, width)),
            "scores": (single, (rows,)),
            "scales": (single, (rows,)),
            "offsets": (np.dtype(np.int64), (items + 1,)),
            "checksums": (np.dtype(np.uint32), (items,)),
        }


@dataclass(frozen=True, eq=False)
class EncodedFeatures:
    """One image's features as a shard stores them.

    Attributes:
        item: the image's entry in `items.json`, see `item_entry`.
        arrays: as `encode_features` returns them.
        checksum: CRC-32 of both when they were written.
    """

    item: dict
    arrays: dict[str, np.ndarray]
    checksum: int

    @classmethod
    def of(cls, key: str, features: LocalFeatures, dtype: str) -> "EncodedFeatures":
        """Encodes features; ValueError names the image whose numbers are not finite."""
        item = item_entry(key, features)
        try:
            arrays = encode_features(features, dtype)
        except ValueError as error:
            raise ValueError(f"the features of {key!r}: {error}") from error
        return cls(item, arrays, _checksum(item, arrays))

    def is_whole(self) -> bool:
        """Tells whether item and arrays still have their checksum."""
        return _checksum(self.item, self.arrays) == self.checksum


def item_entry(key: str, features: LocalFeatures) -> dict[str, Any]:
    """Returns an image's entry in `items.json`: its key as "name", and its sizes as lists."""
    names = ("input_size", "box", "image_size")
    return {"name": key} | {name: [int(side) for side in getattr(features, name)] for name in names}


def _checksum(item: Mapping, arrays: Mapping[str, np.ndarray]) -> int:
    total = zlib.crc32(runs.fingerprint(item).encode())
    for name in FEATURE_ARRAYS:
        total = zlib.crc32(np.ascontiguousarray(arrays[name]), total)
    return total


def write_shard(
    folder: Path,
    items: Iterable[tuple[str, LocalFeatures | EncodedFeatures]],
    shard_format: ShardFormat = ShardFormat(),
    *,
    failures: Iterable[Mapping[str, str]] = (),
) -> Path:
    """Writes one shard whole or not at all, and returns its folder.

    Args:
        folder: the shard's own folder (`shard-NN` in the store's); an existing one is replaced.
        items: (key, features); each is encoded as it comes, so a generator keeps memory small.
            `EncodedFeatures`, from another shard of this format, are written as they are.
        shard_format: its `code_dim` is needed only where `items` may be empty.
        failures: images that belong here but could not be read, each {"name": …, "reason": …};
            read after the items, so that the generator may fill it.
    Raises:
        ValueError: a repeated key, descriptors of different dimensions, or numbers that are not
            finite (the message names the image).
    """
    folder, encoded = Path(folder), []
    for key, features in items:
        if isinstance(features, LocalFeatures):
            if shard_format.code_dim is None:
                shard_format = replace(shard_format, code_dim=features.code_dim)
            if features.code_dim != shard_format.code_dim:
                raise ValueError(
                    f"{key!r} has descriptors of width {features.code_dim}, not "
                    f"{shard_format.code_dim}"
                )
            features = EncodedFeatures.of(key, features, shard_format.dtype)
        encoded.append(features)
    entries = [image.item for image in encoded]
    if len({item["name"] for item in entries}) < len(entries):
        raise ValueError(f"{folder}: two items have the same key")
    arrays = _joined(encoded, shard_format)
    _write_files(folder, arrays, shard_format.header() | {"items": entries}, list(failures))
    return folder


def _joined(encoded: Sequence[EncodedFeatures], shard_format: ShardFormat) -> dict[str, np.ndarray]:
    """The images' arrays concatenated, their offsets and checksums."""
    layout = shard_format.layout(0, 0)  # gives an empty shard its types
    arrays = {
        name: np.concatenate(
            [np.empty(layout[name][1], layout[name][0])] + [image.arrays[name] for image in encoded]
        )
        for name in FEATURE_ARRAYS
    }
    counts = [len(image.arrays["scores"]) for image in encoded]
    arrays["offsets"] = np.cumsum([0, *counts], dtype=np.int64)
    arrays["checksums"] = np.array([image.checksum for image in encoded], np.uint32)
    return arrays


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
            if not conforms(header, HEADER):
                raise ValueError("its items.json")
            arrays = {name: map_array(folder / f"{name}.npy") for name in ARRAYS}
        except (OSError, ValueError) as error:
            raise StoreError(f"the shard {folder} is damaged ({error}); {REMEDY}") from error
        shard = cls(folder, header, arrays)
        if not shard._fits():
            raise StoreError(f"the arrays of the shard {folder} do not fit together; {REMEDY}")
        return shard

    def _fits(self) -> bool:
        count, offsets = len(self.header["items"]), self.arrays["offsets"]
        if offsets.dtype != np.int64 or offsets.shape != (count + 1,):
            return False
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
            return False
        layout = self.format.layout(int(offsets[-1]), count)
        return all((array.dtype, array.shape) == layout[n] for n, array in self.arrays.items())

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
        images = split_images(self.header["items"], self.arrays)
        return [image.item["name"] for image in images if not image.is_whole()]


def split_images(
    items: Sequence[dict], arrays: Mapping[str, np.ndarray]
) -> Iterator[EncodedFeatures]:
    """Yields each image's features out of a shard's arrays, which may be cut short.

    Args:
        items: entries of `items.json`.
        arrays: all of ARRAYS; features (R, ...), offsets (N + 1,), checksums (N,). An image
            whose rows are not all there is left out.
    """
    rows = min(len(arrays[name]) for name in FEATURE_ARRAYS)
    offsets, checksums = arrays["offsets"], arrays["checksums"]
    for item, start, stop, checksum in zip(items, offsets, offsets[1:], checksums, strict=False):
        if 0 <= start <= stop <= rows:
            part = {name: arrays[name][start:stop] for name in FEATURE_ARRAYS}
            yield EncodedFeatures(item, part, int(checksum))
