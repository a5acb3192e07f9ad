"""FeatureStore: local features on disk, ragged, memory-mapped and checked item by item.

A store is a folder of shards. A shard is a folder `shard-NN` with flat arrays over all features of
its images (keypoints, descriptors, scores, scales), `offsets` that say where each image's features
begin, one checksum an image, and `items.json` with the names and sizes. A shard appears whole or
not at all, so a store can be read while later shards are still being made. A finished store has an
`index/` with the names, sizes and places of all its items, which makes opening it instant.

An item's key is its image's name. The one exception: a query (its features are those of its crop)
that has the name of a database image is kept under `query/<name>`. `FeatureStore.query` knows.
"""

import bisect
import contextlib
import functools
import io
import json
import math
import mmap
import os
import resource
import shutil
import tokenize
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.features import LocalFeatures

FORMAT = 1
DTYPES = ("float16", "float32", "int8", "bit")
ARRAYS = ("keypoints", "descriptors", "scores", "scales", "offsets", "checksums")
SHARD = "shard-"
INDEX, INDEX_HEADER = "index", "index.json"
INDEX_ARRAYS = ("names", "name_ends", "order", "rows", "sizes", "firsts")
OPEN_SHARDS = 1024  # that a store keeps mapped, four files each (a process may map 65,530)
PARTIAL = ".partial-"  # a shard being written; nothing else in a store begins so
QUERY = "query/"
AUTO = (
    "inference_precision auto depends on the machine: go on with one like the first, or set "
    "overwrite: true and a precision by name to begin anew"
)
ITEM_BYTES = 150  # of one image beside its features: name and sizes in items.json, offset, checksum
FEATURE_BYTES = 16  # of one feature beside its descriptor: keypoint, score, scale


class StoreError(runs.Told, RuntimeError):
    """A store on disk that is damaged or incomplete; the message names the folder or the item."""


def query_key(name: str, database: Container[str]) -> str:
    """The key under which a query's features are stored beside those of `database`'s images."""
    # The second case is none that can be stored; it becomes a repeated key, which is refused.
    return QUERY + name if name in database or QUERY + name in database else name


# Descriptors as stored


def encode(descriptors: np.ndarray, dtype: str) -> np.ndarray:
    """Descriptors (N, C) float32 as stored: (N, C) of that type, for "bit" (N, ceil(C / 8)) uint8.

    int8 is scaled to each descriptor's largest value and "bit" keeps signs alone: the length is not
    stored, since `decode` brings every descriptor back to length 1. Raises ValueError for an
    unknown dtype or values that are not finite.
    """
    _check_dtype(dtype)
    if not np.isfinite(descriptors).all():
        raise ValueError("descriptors hold nan or infinity")
    if dtype == "bit":
        return np.packbits(descriptors > 0, axis=1)
    if dtype == "int8":
        largest = np.abs(descriptors).max(axis=1, keepdims=True, initial=0)
        return np.round(descriptors * (127 / np.where(largest > 0, largest, 1))).astype(np.int8)
    return descriptors.astype(dtype)


def decode(stored: np.ndarray, dtype: str, code_dim: int) -> np.ndarray:
    """Stored descriptors back as (N, code_dim) float32 of length 1 (all-zero ones stay zero)."""
    if dtype == "bit":
        decoded = _signs()[stored].reshape(len(stored), 8 * stored.shape[1])[:, :code_dim]
    elif dtype == "float16":
        decoded = _single(stored)
    else:
        decoded = stored.astype(np.float32)
    length = np.linalg.norm(decoded, axis=1, keepdims=True)
    decoded /= np.where(length > 0, length, 1)
    return decoded


@functools.cache
def _signs() -> np.ndarray:
    """(256, 8) float32: the bits of every byte, the highest first, as 1 and -1."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return np.where(bits, np.float32(1), np.float32(-1))


def _single(half: np.ndarray) -> np.ndarray:
    """Finite float16 as float32: the bits that `astype` gives, in a quarter of its time."""
    bits = half.view(np.int16).astype(np.int32)  # the sign is carried to the top
    bits <<= 13  # float32 has 13 more bits of fraction
    bits &= np.int32(-0x70002000)  # the sign, and below three bits of it exponent and fraction
    single = bits.view(np.float32)
    single *= np.float32(2.0**112)  # its exponent counts from 127, half precision's from 15
    return single


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown descriptor dtype {dtype!r}; known: {', '.join(DTYPES)}")


def stored_width(code_dim: int, dtype: str) -> int:
    """Columns of a stored descriptor array."""
    return -(-code_dim // 8) if dtype == "bit" else code_dim


def stored_type(dtype: str) -> np.dtype:
    """numpy's type of a stored descriptor array."""
    return np.dtype("uint8" if dtype == "bit" else dtype)


def forecast(images: int, mean_features: float, code_dim: int, dtype: str = "float16") -> int:
    """Bytes that a store of so many images will take, to within a few per cent.

    Args:
        mean_features: features an image (published: at most 1000, 877 on average at five scales
            and 251 at one).
    """
    _check_dtype(dtype)
    code = stored_width(code_dim, dtype) * stored_type(dtype).itemsize
    return round(images * (mean_features * (code + FEATURE_BYTES) + ITEM_BYTES))


# Writing


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


# Reading


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


# One file of sizes and places for all shards


@dataclass(frozen=True, eq=False)
class Index:
    """What a store knows of its items without opening a shard, as arrays in the order of shards.

    Attributes:
        header: "format", "folders" (how many shards), "dtype", "code_dim", "failures".
        folders: names of the shards' folders; None: those that `shard_folder` gives.
        arrays: "names" (uint8, all keys in UTF-8), "name_ends" (n + 1), "order" (n, positions by
            rising key), "rows" (n, 2: where an item's features begin and end in its shard),
            "sizes" (n, 8: input size, box, image size), "firsts" (shards + 1: first items).
    """

    header: dict
    arrays: dict[str, np.ndarray]
    folders: tuple[str, ...] | None = None

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "Index":
        """Collects it from shards, one at least, none of which is kept open.

        Raises StoreError where a key occurs twice or descriptors are of several kinds.
        """
        keys: list[bytes] = []
        places: list[Path] = []
        firsts, rows, sizes, failures = [0], [], [], []
        kinds: dict[tuple[str, int, str], Path] = {}  # of the shards with any feature
        for shard in shards:
            kind = shard.header["dtype"], shard.header["code_dim"], _shown(shard.header["settings"])
            if len(shard.arrays["scores"]):
                kinds.setdefault(kind, shard.folder)
            keys += [name.encode() for name in shard.names]
            places.append(shard.folder)
            firsts.append(len(keys))
            bounds = np.array(shard.arrays["offsets"])
            rows.append(np.stack([bounds[:-1], bounds[1:]], axis=1))
            sizes.append(_sizes(shard.header["items"]))
            failures += shard.failures
        _refuse_mixture(kinds)
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        for one, other in zip(order, order[1:], strict=False):
            if keys[one] == keys[other]:
                at = bisect.bisect_right(firsts, max(one, other)) - 1
                raise StoreError(
                    f"{places[at]} holds a key of an earlier shard ({keys[one].decode()!r}); "
                    f"{_REMEDY}"
                )
        arrays = {
            "names": np.frombuffer(b"".join(keys), np.uint8),
            "name_ends": np.cumsum([0, *map(len, keys)], dtype=np.int64),
            "order": order,
            "rows": np.concatenate(rows),
            "sizes": np.concatenate(sizes),
            "firsts": np.array(firsts, np.int64),
        }
        dtype, code_dim, _ = next(iter(kinds), kind)
        header = {"format": FORMAT, "folders": len(places), "dtype": dtype}
        header |= {"code_dim": code_dim, "failures": failures}
        return cls(header, arrays, tuple(place.name for place in places))

    def write(self, folder: Path) -> Path:
        """Writes it to `index/` of a store, the header last, and returns that folder."""
        place = Path(folder) / INDEX
        for name, array in self.arrays.items():
            runs.write_array(place / f"{name}.npy", array)
        runs.write_json(place / INDEX_HEADER, self.header)
        return place

    @classmethod
    def read(cls, folder: Path) -> "Index | None":
        """The index of a store, memory-mapped; None where there is none that is whole."""
        place = Path(folder) / INDEX
        if not (place / INDEX_HEADER).exists():
            return None
        try:
            header = runs.read_json(place / INDEX_HEADER)
            arrays = {name: _mapped(place / f"{name}.npy") for name in INDEX_ARRAYS}
        except (runs.StageError, OSError, ValueError, EOFError):
            return None
        index = cls(header, arrays)
        return index if header.get("format") == FORMAT and index._fits() else None

    def _fits(self) -> bool:
        count = len(self)
        shapes = {"name_ends": (count + 1,), "rows": (count, 2), "sizes": (count, 8)}
        shapes |= {"names": (int(self.arrays["name_ends"][-1]),)}
        shapes |= {"firsts": (self.header["folders"] + 1,)}
        return all(self.arrays[name].shape == shape for name, shape in shapes.items())

    def __len__(self) -> int:
        return len(self.arrays["order"])

    def same(self, other: "Index") -> bool:
        """Whether both say the same of every item."""
        arrays = ((self.arrays[name], other.arrays[name]) for name in INDEX_ARRAYS)
        return self.header == other.header and all(np.array_equal(*pair) for pair in arrays)

    def shard(self, number: int) -> str:
        """The name of a shard's folder."""
        if self.folders is not None:
            return self.folders[number]
        return shard_folder(Path(), number, self.header["folders"]).name

    def names(self) -> Iterator[str]:
        """All keys in the order of the shards."""
        ends = self.arrays["name_ends"].tolist()
        text = self.arrays["names"].tobytes()
        return (text[a:b].decode() for a, b in zip(ends, ends[1:], strict=False))

    def find(self, key: str) -> int | None:
        """The position of an item; None where there is no such key."""
        wanted, order = key.encode(), self.arrays["order"]
        at = bisect.bisect_left(order, wanted, key=self._key)
        found = at < len(order) and self._key(order[at]) == wanted
        return int(order[at]) if found else None

    def _key(self, position: int) -> bytes:
        ends = self.arrays["name_ends"]
        return self.arrays["names"][ends[position] : ends[position + 1]].tobytes()


def write_index(folder: Path) -> list[str]:
    """Gives a complete store its index, so that opening it takes the same time at any size.

    Returns the index's files, relative to the store. A store without one is opened by reading the
    names in all its shards; `write_shard` removes the index of a store that it changes. Raises as
    `FeatureStore.open`, and StoreError where a shard is missing.
    """
    paths = shard_folders(folder)
    if [path.name for path in paths] != [
        shard_folder(folder, number, len(paths)).name for number in range(len(paths))
    ]:
        raise StoreError(f"the shards of {folder} are not numbered from 0 on; {_REMEDY}")
    Index.of(map(Shard.open, paths)).write(folder)
    return [f"{INDEX}/{name}" for name in (*(f"{each}.npy" for each in INDEX_ARRAYS), INDEX_HEADER)]


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


class FeatureStore(Mapping[str, LocalFeatures]):
    """All shards of a folder as one mapping, key -> LocalFeatures (float32, length 1).

    A finished store has an index and opens in a time that does not depend on its size: nothing is
    read and no shard is opened before an item is asked for, and those asked for last stay open (see
    `most_open`). One that is still being made is opened by reading the names and sizes in all its
    shards. It pickles as its folder, so a worker process opens the files itself.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder = Path(folder)
        self.index = index
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._most = most_open()

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "FeatureStore":
        """Opens the store in `folder`; with `verify` reads everything and checks every item.

        Raises FileNotFoundError where there is no shard, StoreError where one is damaged (with an
        index: when it is first needed).
        """
        index = Index.read(folder)
        if index is None:
            index = Index.of(map(Shard.open, shard_folders(folder)))
        store = cls(folder, index)
        if verify:
            store.verify()
        return store

    def __getitem__(self, key: str) -> LocalFeatures:
        position, stored = self._stored(key)
        sizes = self.index.arrays["sizes"][position].tolist()
        header = self.index.header
        return LocalFeatures(
            keypoints=np.array(stored["keypoints"]),
            descriptors=decode(stored["descriptors"], header["dtype"], header["code_dim"]),
            scores=np.array(stored["scores"]),
            scales=np.array(stored["scales"]),
            input_size=tuple(sizes[:2]),
            box=tuple(sizes[2:6]),
            image_size=tuple(sizes[6:]),
        )

    def __iter__(self) -> Iterator[str]:
        return self.index.names()

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.find(key) is not None

    def __reduce__(self):
        return FeatureStore.open, (self.folder,)

    @property
    def names(self) -> list[str]:
        """All keys in the order of the shards."""
        return list(self.index.names())

    @property
    def failures(self) -> dict[str, str]:
        """Key -> reason of the images that could not be read when the store was made."""
        return {failure["name"]: failure["reason"] for failure in self.index.header["failures"]}

    @property
    def code_dim(self) -> int:
        """The descriptors' width; 0 for a store without any feature."""
        return self.index.header["code_dim"]

    def query(self, name: str) -> LocalFeatures:
        """A query's features by its name, also where a database image has the same name."""
        return self[QUERY + name if QUERY + name in self else name]

    def raw(self, key: str) -> dict[str, np.ndarray]:
        """One item's keypoints, descriptors, scores and scales as stored, mapped from the files."""
        return self._stored(key)[1]

    def verify(self) -> None:
        """Reads everything; raises StoreError naming the items whose bytes have changed."""
        shards = shard_folders(self.folder)
        damaged = [name for path in shards for name in Shard.open(path).damaged()]
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            raise StoreError(
                f"{self.folder}: the features of {', '.join(damaged[:3])}{more} do not match their "
                "checksums; delete their shards and run 05_local_extraction again"
            )
        if not self.index.same(Index.of(map(Shard.open, shards))):
            raise StoreError(f"{self.folder / INDEX} does not fit the shards; {_REMEDY}")

    def _stored(self, key: str) -> tuple[int, dict[str, np.ndarray]]:
        position = self.index.find(key)
        if position is None:
            raise KeyError(self._why_missing(key))
        number = bisect.bisect_right(self.index.arrays["firsts"], position) - 1
        arrays = self._open.pop(number, None)
        if arrays is None:
            arrays = self._map(number)
            while len(self._open) >= self._most:
                self._open.pop(next(iter(self._open)), None)  # asked for longest ago
        self._open[number] = arrays
        start, stop = self.index.arrays["rows"][position].tolist()
        return position, {name: array[start:stop] for name, array in arrays.items()}

    def _map(self, number: int) -> dict[str, np.ndarray]:
        """Maps a shard's arrays; StoreError where they are not as long as the index says."""
        folder, dtype = self.folder / self.index.shard(number), self.index.header["dtype"]
        last = self.index.arrays["firsts"][number + 1] - 1
        rows = int(self.index.arrays["rows"][last, 1])
        layout = _layout(self.code_dim, dtype, rows, 0)
        try:
            return {name: _mapped_as(folder / f"{name}.npy", *layout[name]) for name in ARRAYS[:4]}
        except ValueError as error:
            raise StoreError(
                f"the shard {folder} does not fit the store's index ({error}); {_REMEDY}"
            ) from error
        except OSError as error:
            raise StoreError(f"the shard {folder} is damaged ({error}); {_REMEDY}") from error

    def _why_missing(self, key: str) -> str:
        if key in self.failures:
            return f"{key} could not be read when {self.folder} was made: {self.failures[key]}"
        return f"{key} is not in {self.folder}: the short list that it was made from lacks it"


def most_open() -> int:
    """How many shards a store keeps mapped: OPEN_SHARDS, less where a process may open few files.

    Each mapped file counts as an open one. A sixteenth of the limit leaves room for a few stores in
    one process, and for whatever else it has open.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if files == resource.RLIM_INFINITY else min(OPEN_SHARDS, 1 + files // 16)


def _sizes(items: Sequence[Mapping]) -> np.ndarray:
    """(n, 8) int32: input size, box and image size of each item."""
    sizes = [[*item["input_size"], *item["box"], *item["image_size"]] for item in items]
    return np.array(sizes, np.int32).reshape(-1, 8)


def _shown(settings: Mapping) -> str:
    return "".join(f", {name} {settings[name]}" for name in sorted(settings))


def _refuse_mixture(kinds: Mapping[tuple[str, int, str], Path]) -> None:
    """StoreError where there is more than one kind of shard: dtype, width, settings -> a shard."""
    if len(kinds) > 1:
        shown = "; ".join(
            f"{place.name}: {width} values as {dtype}{settings}"
            for (dtype, width, settings), place in kinds.items()
        )
        folder = next(iter(kinds.values())).parent
        raise StoreError(
            f"the shards of {folder} hold descriptors of several kinds ({shown}): they were made "
            "by different models or options; delete those that do not belong here"
        )


# Other systems' formats


def export_hloc(store: FeatureStore, path: Path, *, suffix: str = ".jpg") -> Path:
    """Writes an HDF5 file of features as hloc reads them, and returns its path.

    One group an image, named by its key and `suffix` (hloc names images with their extension), with
    `keypoints` (N, 2) float32 in pixels of the photograph, (0, 0) the centre of the top-left pixel,
    `descriptors` (C, N) float16, `scores` (N,) float32 and `image_size` (2,) as width, height.
    Source: hloc, extract_features.
    """
    import h5py

    with runs.atomic(path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        for key, features in store.items():
            group = file.create_group(key + suffix)
            group["keypoints"] = features.original_keypoints()
            # As hloc has it: one pixel of the network input, in pixels of the photograph.
            crop = np.subtract(features.box[2:], features.box[:2])
            noise = float(np.mean(crop / features.input_size[::-1]))
            group["keypoints"].attrs["uncertainty"] = noise
            group["descriptors"] = features.descriptors.T.astype(np.float16)
            group["scores"] = features.scores
            group["image_size"] = np.array(features.image_size[::-1], np.int64)
    return Path(path)


def published_name(path: str) -> str:
    """The file name under which the published code stores an image's features."""
    return path.replace("../", "").replace("/", "__") + ".npy"


def published_path(name: str) -> str:
    """The image path that the published code makes of such a file name.

    Right for paths of the form ../folder/image.jpg alone: absolute paths, ./image.jpg and names
    with __ come out wrong, which is why `export_published` writes an index too.
    """
    return "../" + name.removesuffix(".npy").replace("__", "/")


def export_published(store: FeatureStore, folder: Path, paths: Mapping[str, str]) -> Path:
    """Writes features as the published code stores them, and returns the folder.

    `Descriptions/` holds (N, C) float32, `Locations/` (N, 2) integers (y, x) in the network input's
    frame, one `.npy` an image. `index.json` beside them keeps the paths and what the published
    files lose: sizes, boxes.

    Args:
        paths: key -> the image's path as the published image list has it; every key of the store.
    Raises:
        ValueError: a key has no path, or two paths get one published file name.
    """
    index = {}
    for key in store:
        if key not in paths:
            raise ValueError(f"no path is given for {key!r}")
        path = str(paths[key])
        name = published_name(path)
        if name in index:
            raise ValueError(f"{path} and {index[name]['path']} would both be stored as {name}")
        index[name] = {"path": path}
    folder = Path(folder)
    for name, (key, features) in zip(index, store.items(), strict=True):
        whole = np.rint(features.keypoints)
        points = (
            whole.astype(np.int64) if (whole == features.keypoints).all() else features.keypoints
        )
        runs.write_array(folder / "Locations" / name, points[:, ::-1])
        runs.write_array(folder / "Descriptions" / name, features.descriptors)
        index[name] |= _item(key, features)
    runs.write_json(folder / "index.json", index)
    return folder


def import_published(
    folder: Path, paths: Iterable[str] = ()
) -> Iterator[tuple[str, LocalFeatures]]:
    """Yields (image path, features) from a folder of published files, ready for `write_shard`.

    Scores and scales are nan, since the published files lack them; the order is kept, best first.
    Without our `index.json` boxes and sizes are zero, and a file's path is that of `paths`, the
    images that may be there, whose published name it has; failing that the one that the published
    code would read, which is right for `../folder/image.jpg` alone.

    Raises FileNotFoundError where a folder or one of a pair of files is missing, ValueError where
    two of `paths` have one published name.
    """
    known: dict[str, str] = {}
    for path in map(str, paths):
        if known.setdefault(published_name(path), path) != path:
            name = published_name(path)
            raise ValueError(f"{known[name]} and {path} would both have been stored as {name}")
    folder = Path(folder)
    names = sorted(path.name for path in (folder / "Locations").glob("*.npy"))
    if not names:
        raise FileNotFoundError(f"{folder / 'Locations'} holds no .npy files")
    index = runs.read_json(folder / "index.json") if (folder / "index.json").exists() else {}
    for name in names:
        item = index.get(name, {"path": known.get(name, published_path(name))})
        points = np.load(folder / "Locations" / name, allow_pickle=False)
        codes = np.load(folder / "Descriptions" / name, allow_pickle=False)
        unknown = np.full(len(points), np.nan, np.float32)
        yield (
            item["path"],
            LocalFeatures(
                keypoints=points[:, ::-1].astype(np.float32),
                descriptors=codes.astype(np.float32),
                scores=unknown,
                scales=unknown,
                input_size=tuple(item.get("input_size", (0, 0))),
                box=tuple(item.get("box", (0, 0, 0, 0))),
                image_size=tuple(item.get("image_size", (0, 0))),
            ),
        )


# Rows of one large array, block by block


@dataclass
class RowFile:
    """A (rows, width) float32 `.npy` that grows block by block and survives a kill.

    Blocks are appended to `<name>.partial`; after each a small journal says how many rows are whole
    and what their checksum is. Opened again, the file is cut back to what the journal vouches for.
    Plain appends, not a mapped file: on a full disk they raise an error, a mapped file kills the
    process. `finish` gives the file its name.
    """

    path: Path
    shape: tuple[int, int]
    journal: dict

    @classmethod
    def open(cls, path: Path, shape: tuple[int, int], *, settings: Mapping) -> "RowFile":
        """Continues the file where it stands; begins anew where there is none to continue.

        Args:
            settings: plain values that must be equal for rows to be continued.
        Raises:
            runs.StageError: there are rows with other settings; they are left as they are.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = {"settings": runs.plain(dict(settings)), "shape": list(shape)}
        fresh |= {"rows": 0, "checksum": 0, "failures": []}
        file = cls(path, shape, fresh)
        if file._journal_path.exists():
            found = runs.read_json(file._journal_path)
            if found.get("rows") and found.get("settings") != fresh["settings"]:
                raise runs.StageError(
                    f"{path} was begun with other settings "
                    f"({'; '.join(runs.differences(found['settings'], fresh['settings']))}): "
                    f"{AUTO}"
                )
            if found.get("shape") == fresh["shape"] and file._whole(found):
                file.journal = found
                return file
        file._begin()
        return file

    @property
    def rows(self) -> int:
        """Rows that are whole on disk."""
        return self.journal["rows"]

    @property
    def failures(self) -> list[dict[str, str]]:
        """Images that could not be read, each {"name": …, "reason": …}; their rows are zero."""
        return self.journal["failures"]

    def append(self, block: np.ndarray, failures: Sequence[Mapping[str, str]] = ()) -> None:
        """Adds rows (n, width) after those that are there; they are on disk when this returns."""
        block = np.ascontiguousarray(block, np.float32)
        if block.shape[1:] != self.shape[1:] or self.rows + len(block) > self.shape[0]:
            raise ValueError(f"a block of {block.shape} after row {self.rows} of {self.shape}")
        with open(self._partial, "rb+") as handle:
            handle.truncate(self._bytes(self.rows))  # what an append that failed has left
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
        """Removes the journal, once something else vouches for the file."""
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

    def _begin(self) -> None:
        self.forget()
        self.path.unlink(missing_ok=True)
        self._partial.write_bytes(self._header())
        runs.write_json(self._journal_path, self.journal)

    def _whole(self, found: dict) -> bool:
        """True where the rows that the journal counts are on disk, byte for byte."""
        file = self._partial if self._partial.exists() else self.path
        end = self._bytes(found["rows"])
        if not file.exists() or file.stat().st_size < end:
            return False
        checksum = 0
        with open(file, "rb") as handle:
            if handle.read(len(self._header())) != self._header():
                return False
            while handle.tell() < end:
                checksum = zlib.crc32(handle.read(min(runs.CHUNK, end - handle.tell())), checksum)
        return checksum == found["checksum"]
