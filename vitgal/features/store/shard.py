"""Shards: a part of a store's images in a few flat arrays."""

import contextlib
import functools
import json
import math
import mmap
import os
import shutil
import tokenize
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.features.local import LocalFeatures
from vitgal.features.store.codec import (
    DTYPES,
    FORMAT,
    StoreError,
    _check_dtype,
    decode,
    encode,
    stored_type,
    stored_width,
)

ARRAYS = ("keypoints", "descriptors", "scores", "scales", "offsets", "checksums")
SHARD = "shard-"
INDEX, INDEX_HEADER = "index", "index.json"
PARTIAL = ".partial-"  # a shard being written; nothing else in a store begins so


def partition(names: Iterable[str], shard_size: int) -> list[list[str]]:
    """The names sorted and cut into shards of `shard_size`, the last perhaps smaller.

    It depends on nothing but the names, so that a later run finds the same shards. No names give
    no shards. Raises ValueError where a name occurs twice or `shard_size` is below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    ordered = sorted(names)
    for one, other in zip(ordered, ordered[1:], strict=False):
        if one == other:
            raise ValueError(f"{one!r} is listed twice: every name in a store must differ")
    return [ordered[at : at + shard_size] for at in range(0, len(ordered), shard_size)]


def shard_folder(folder: Path, index: int, count: int) -> Path:
    """The folder of shard `index` of `count`: two digits, more where there are over 100."""
    digits = max(2, len(str(count - 1)))
    return Path(folder) / f"{SHARD}{index:0{digits}d}"


@dataclass(frozen=True, eq=False)
class Stored:
    """One image's features as they stand on disk: its line of items.json, arrays, checksum."""

    item: dict
    arrays: dict[str, np.ndarray]
    checksum: int

    @classmethod
    def of(cls, key: str, features: LocalFeatures, dtype: str) -> "Stored":
        """Encodes features; ValueError names the image whose numbers are not finite."""
        item = _item(key, features)
        try:
            arrays = _stored_arrays(features, dtype)
        except ValueError as error:
            raise ValueError(f"the features of {key!r}: {error}") from error
        return cls(item, arrays, _checksum(item, arrays))


def write_shard(
    folder: Path,
    items: Iterable[tuple[str, LocalFeatures | Stored]],
    *,
    dtype: str = "float16",
    failures: Iterable[Mapping[str, str]] = (),
    code_dim: int | None = None,
    settings: Mapping | None = None,
) -> Path:
    """Writes one shard whole or not at all, and returns its folder.

    Args:
        folder: the shard's own folder (`shard-NN` in the store's); one that is there is replaced.
        items: (key, features); each is encoded as it comes, so a generator keeps memory small.
            `Stored` ones, from another shard of this dtype, are written as they are.
        dtype: how descriptors are stored, one of DTYPES.
        failures: images that belong here but could not be read, each {"name": …, "reason": …};
            read after the items, so that the generator may fill it.
        code_dim: descriptor width; needed only where `items` may be empty.
        settings: plain values kept in `items.json`, such as the precision features were made in.
    Raises:
        ValueError: a key twice, descriptors of different widths, numbers that are not finite (the
            image is named), an unknown dtype.
    """
    _check_dtype(dtype)
    found: list[Stored] = []
    for key, features in items:
        if isinstance(features, LocalFeatures):
            code_dim = features.code_dim if code_dim is None else code_dim
            if features.code_dim != code_dim:
                raise ValueError(
                    f"{key!r} has descriptors of width {features.code_dim}, not {code_dim}"
                )
            features = Stored.of(key, features, dtype)
        found.append(features)
    listed = [each.item for each in found]
    if len({item["name"] for item in listed}) < len(listed):
        raise ValueError(f"{folder}: two items have the same key")
    header = {"format": FORMAT, "dtype": dtype, "code_dim": code_dim or 0}
    header |= {"settings": runs.plain(dict(settings or {})), "items": listed}
    arrays = _joined([each.arrays for each in found], dtype, code_dim or 0)
    arrays["checksums"] = np.array([each.checksum for each in found], np.uint32)
    _place(Path(folder), arrays, header, list(failures))
    return Path(folder)


def _item(key: str, features: LocalFeatures) -> dict:
    sizes = {"input_size": features.input_size, "box": features.box}
    sizes["image_size"] = features.image_size
    return {"name": key} | {name: [int(side) for side in size] for name, size in sizes.items()}


def _joined(blocks: Sequence[dict], dtype: str, code_dim: int) -> dict[str, np.ndarray]:
    """Each image's arrays one after another, and where each image's begin."""
    none = _stored_arrays(LocalFeatures.empty(code_dim, (0, 0), (0, 0, 0, 0), (0, 0)), dtype)
    arrays = {name: np.concatenate([none[name], *(b[name] for b in blocks)]) for name in none}
    arrays["offsets"] = np.cumsum([0, *(len(b["scores"]) for b in blocks)], dtype=np.int64)
    return arrays


def _stored_arrays(features: LocalFeatures, dtype: str) -> dict[str, np.ndarray]:
    if not np.isfinite(features.keypoints).all():
        raise ValueError("keypoints hold nan or infinity")
    return {
        "keypoints": np.asarray(features.keypoints, np.float32),
        "descriptors": encode(np.asarray(features.descriptors, np.float32), dtype),
        "scores": np.asarray(features.scores, np.float32),
        "scales": np.asarray(features.scales, np.float32),
    }


def _checksum(item: Mapping, arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of one image's name, sizes and stored arrays."""
    total = zlib.crc32(runs.fingerprint(item).encode())
    for name in ARRAYS[:4]:
        total = zlib.crc32(np.ascontiguousarray(arrays[name]), total)
    return total


def _place(folder: Path, arrays: dict, header: dict, failures: list) -> None:
    """Writes a shard's files beside its place, then moves them there in one step."""
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


def clear_partial(folder: Path) -> None:
    """Removes shards of a store that a killed process left half-written."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


@dataclass(frozen=True)
class Shard:
    """One open shard: its header and its memory-mapped arrays."""

    folder: Path
    header: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """Opens a shard without reading its features; StoreError where files do not fit."""
        folder = Path(folder)
        try:
            header = runs.read_json(folder / "items.json")
            arrays = {name: _mapped(folder / f"{name}.npy") for name in ARRAYS}
        except (runs.StageError, OSError, ValueError, EOFError, tokenize.TokenError) as error:
            raise StoreError(f"the shard {folder} is damaged ({error}); {_REMEDY}") from error
        shard = cls(folder, header, arrays)
        if isinstance(header, dict) and header.get("format", FORMAT) != FORMAT:
            raise StoreError(f"{folder} has store format {header['format']}, not {FORMAT}")
        if not _is_header(header):
            raise StoreError(f"the shard {folder} is damaged (its items.json); {_REMEDY}")
        if not shard._fits():
            raise StoreError(f"the arrays of the shard {folder} do not fit together; {_REMEDY}")
        return shard

    def _fits(self) -> bool:
        count, offsets = len(self.header["items"]), self.arrays["offsets"]
        if offsets.dtype != np.int64 or offsets.shape != (count + 1,):
            return False
        rows = int(offsets[-1])
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
            return False
        layout = _layout(self.header["code_dim"], self.header["dtype"], rows, count)
        return all((array.dtype, array.shape) == layout[n] for n, array in self.arrays.items())

    @property
    def names(self) -> list[str]:
        """Keys of the items, as written."""
        return [item["name"] for item in self.header["items"]]

    @functools.cached_property
    def failures(self) -> list[dict[str, str]]:
        """Images that belong here but could not be read; StoreError where the list is damaged."""
        failures = runs.read_json(self.folder / "failures.json")
        if not isinstance(failures, list) or not all(map(_is_failure, failures)):
            raise StoreError(f"the shard {self.folder} is damaged (its failures.json); {_REMEDY}")
        return failures

    def stored(self, index: int) -> dict[str, np.ndarray]:
        """The stored arrays of one item, as views of the mapped files."""
        start, stop = self.arrays["offsets"][index : index + 2]
        return {name: self.arrays[name][start:stop] for name in ARRAYS[:4]}

    def features(self, index: int) -> LocalFeatures:
        """One item, decoded."""
        item, stored = self.header["items"][index], self.stored(index)
        return LocalFeatures(
            keypoints=np.array(stored["keypoints"]),
            descriptors=decode(
                stored["descriptors"], self.header["dtype"], self.header["code_dim"]
            ),
            scores=np.array(stored["scores"]),
            scales=np.array(stored["scales"]),
            input_size=tuple(item["input_size"]),
            box=tuple(item["box"]),
            image_size=tuple(item["image_size"]),
        )

    def damaged(self) -> list[str]:
        """Keys of the items whose bytes do not match their checksum; reads the whole shard."""
        return [
            item["name"]
            for index, item in enumerate(self.header["items"])
            if _checksum(item, self.stored(index)) != self.arrays["checksums"][index]
        ]


def _is_header(header: object) -> bool:
    """Whether an items.json has all that is read from it."""
    kinds = {"format": int, "dtype": str, "code_dim": int, "settings": dict, "items": list}
    if not isinstance(header, dict) or header.get("dtype") not in DTYPES:
        return False
    if not all(isinstance(header.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(map(_is_item, header["items"]))


def _is_failure(failure: object) -> bool:
    texts = ("name", "reason")
    return isinstance(failure, dict) and all(isinstance(failure.get(key), str) for key in texts)


def _is_item(item: object) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return False
    sizes = [item.get(key) for key in ("input_size", "box", "image_size")]
    if not all(isinstance(size, list) for size in sizes) or list(map(len, sizes)) != [2, 4, 2]:
        return False
    return all(isinstance(side, int) for size in sizes for side in size)


Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]  # array -> type and shape


def _layout(code_dim: int, dtype: str, rows: int, items: int) -> Layout:
    """The arrays of a shard of so many features and items."""
    single, code = np.dtype(np.float32), stored_width(code_dim, dtype)
    return {
        "keypoints": (single, (rows, 2)),
        "descriptors": (stored_type(dtype), (rows, code)),
        "scores": (single, (rows,)),
        "scales": (single, (rows,)),
        "offsets": (np.dtype(np.int64), (items + 1,)),
        "checksums": (np.dtype(np.uint32), (items,)),
    }


_REMEDY = "run 05_local_extraction again: it makes what is missing or damaged"


def _mapped(path: Path) -> np.ndarray:
    """A memory-mapped array as a plain view; no pickles."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _mapped_as(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """`_mapped` of a file whose type and shape are known, in a fifth of the time.

    Raises ValueError where the file is not as long as that.
    """
    with open(path, "rb", buffering=0) as handle:
        file = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    start = 10 + int.from_bytes(file[8:10], "little")  # format version 1.0
    if file[:8] != b"\x93NUMPY\x01\x00" or len(file) != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path.name} is no array of {shape} {dtype}")
    return np.ndarray(shape, dtype, file, start)


def whole_shard(
    folder: Path, names: Sequence[str], *, dtype: str, settings: Mapping | None = None
) -> Shard | None:
    """The shard in `folder` if it holds just these names and every checksum is right, else None.

    `names` are those of the partition: items and failures together must be the same.
    """
    if not Path(folder).exists():
        return None
    try:
        shard = Shard.open(folder)
        listed = shard.names + [failure["name"] for failure in shard.failures]
    except (StoreError, runs.StageError):
        return None
    made_so = (shard.header["dtype"], shard.header["settings"]) == (
        dtype,
        runs.plain(dict(settings or {})),
    )
    return shard if made_so and sorted(listed) == sorted(names) and not shard.damaged() else None


def salvage(
    folder: Path, *, dtype: str, code_dim: int, settings: Mapping | None = None
) -> dict[str, Stored]:
    """What a damaged shard still holds: key -> every image whose bytes match its checksum.

    Any of its files may be cut short, changed or missing. Nothing that was made in another way
    (dtype, width, settings) is taken; a shard that is not there gives nothing.
    """
    folder = Path(folder)
    header, items = _leading_items(folder / "items.json")
    wanted = {"format": FORMAT, "dtype": dtype, "code_dim": code_dim}
    wanted["settings"] = runs.plain(dict(settings or {}))
    if header != wanted:
        return {}
    arrays = {name: _leading_rows(folder / f"{name}.npy") for name in ARRAYS}
    for name, (kind, shape) in _layout(code_dim, dtype, 0, 0).items():
        if (arrays[name].dtype, arrays[name].shape[1:]) != (kind, shape[1:]):
            return {}
    offsets, checksums = arrays.pop("offsets"), arrays.pop("checksums")
    rows = min(map(len, arrays.values()))
    found = {}
    for item, start, stop, checksum in zip(items, offsets, offsets[1:], checksums, strict=False):
        if not 0 <= start <= stop <= rows:
            continue
        part = {name: np.array(array[start:stop]) for name, array in arrays.items()}
        if _checksum(item, part) == checksum:
            found[item["name"]] = Stored(item, part, int(checksum))
    return found


def _leading_items(path: Path) -> tuple[dict, list[dict]]:
    """The header and the whole items at the beginning of an items.json, which may be cut short."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    head, _, rest = text.partition('"items": [')
    items: list[dict] = []
    try:
        header = json.loads(head.rstrip().rstrip(",") + "}")
    except json.JSONDecodeError:
        return {}, items
    with contextlib.suppress(json.JSONDecodeError):  # where the file ends, or was changed
        while (rest := rest.lstrip(", \n")).startswith("{"):
            item, end = json.JSONDecoder().raw_decode(rest)
            items.append(item)
            rest = rest[end:]
    return header, items


def _leading_rows(path: Path) -> np.ndarray:
    """The whole rows at the beginning of a `.npy`, which may be cut short; else none."""
    try:
        with open(path, "rb") as handle:
            version = np.lib.format.read_magic(handle)
            if version != (1, 0):
                raise ValueError("another version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
            if dtype.hasobject or not shape:
                raise ValueError("no rows of plain numbers")
            data = handle.read()
    except (OSError, ValueError, tokenize.TokenError):  # the last: NumPy's, of a changed header
        return np.empty(0)
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    rows = min(len(data) // row, shape[0]) if row else 0
    return np.frombuffer(data[: rows * row], dtype).reshape(rows, *shape[1:])


def drop_index(folder: Path) -> None:
    """Removes the index of a store, one of whose shards is about to change."""
    (Path(folder) / INDEX / INDEX_HEADER).unlink(missing_ok=True)


def shard_folders(folder: Path) -> list[Path]:
    """The folders of a store's shards, by number; FileNotFoundError where there is none."""
    shards = sorted(
        (path for path in Path(folder).glob(f"{SHARD}*") if path.name[len(SHARD) :].isdigit()),
        key=lambda path: int(path.name[len(SHARD) :]),
    )
    if not shards:
        raise FileNotFoundError(f"{folder} holds no feature store: run 05_local_extraction first")
    return shards


def _sizes(items: Sequence[Mapping]) -> np.ndarray:
    """(n, 8) int32: input size, box and image size of each item."""
    sizes = [[*item["input_size"], *item["box"], *item["image_size"]] for item in items]
    return np.array(sizes, np.int32).reshape(-1, 8)
