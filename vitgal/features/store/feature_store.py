"""FeatureStore: local features on disk, ragged, memory-mapped and checked image by image.

A store is a folder of shards. A shard is a folder `shard-NN` with flat arrays over all features of
its images (keypoints, descriptors, scores, scales), `offsets` that give the first row of each
image, one checksum an image, and `items.json` with the names and sizes. Shards are written
atomically, so a store can be read while later shards are still being written. A finished store has
an `index/` with names, sizes and positions of all its items, with which it opens at once. An index
that does not fit is ignored.

An item's key is its image's name. The features of a query are those of its crop.
"""

import bisect
import functools
import itertools
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.features.files import FileError, divides, map_array, read_json
from vitgal.features.local import LocalFeatures
from vitgal.features.store.codec import FEATURE_ARRAYS, FORMAT, REMEDY, StoreError, decode_features
from vitgal.features.store.shard import (
    CODE_DIM,
    FAILURES,
    INDEX,
    INDEX_HEADER,
    SIZES,
    Shard,
    ShardFormat,
    shard_folder,
    shard_folders,
)
from vitgal.settings.sections import FEATURE_DTYPES

OPEN_SHARDS = 1024  # that a store keeps mapped, four files each (a process may map 65,530)
INDEX_ARRAYS = ("names", "name_ends", "order", "rows", "sizes", "firsts")
HEADER = {
    "format": (FORMAT,),
    "folders": range(1, 1 << 31),
    "dtype": FEATURE_DTYPES,
    "code_dim": CODE_DIM,
    "failures": FAILURES,
}


class FeatureStore(Mapping[str, LocalFeatures]):
    """All shards of a folder as one mapping, key -> LocalFeatures (float32, length 1).

    A shard is opened when an item of it is read; the last `most_open()` stay open. Without an index
    the names and sizes in all shards are read first. A store pickles as its folder.
    """

    def __init__(self, folder: Path, index: "Index"):
        self.folder = Path(folder)
        self.index = index
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._most_open = most_open()

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "FeatureStore":
        """Opens the store in `folder`; with `verify` reads everything and checks every item.

        Raises FileNotFoundError where there is no shard, StoreError where one is damaged (with an
        index: when an item of it is read).
        """
        index = Index.read(folder)
        store = cls(folder, index or Index.of(map(Shard.open, shard_folders(folder))))
        if verify:
            store.verify()
        return store

    def __getitem__(self, key: str) -> LocalFeatures:
        position, arrays = self._read(key)
        sizes, kind = self.index.arrays["sizes"][position].tolist(), self.index.format
        return decode_features(arrays, sizes, kind.dtype, kind.code_dim)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._locate(key) is not None

    def __reduce__(self):
        return FeatureStore.open, (self.folder,)

    @property
    def names(self) -> list[str]:
        """All keys in the order of the shards."""
        return self.index.names()

    @property
    def failures(self) -> dict[str, str]:
        """Key -> reason of the images that could not be read when the store was written."""
        return {failure["name"]: failure["reason"] for failure in self.index.header["failures"]}

    @property
    def code_dim(self) -> int:
        """Dimension of a descriptor; 0 for a store without any feature."""
        return self.index.format.code_dim

    def raw(self, key: str) -> dict[str, np.ndarray]:
        """Returns one item's arrays as `encode_features` gave them, mapped from the files.

        "keypoints" (N, 2), "scores" and "scales" (N,) are float32; "descriptors" (N, columns) are
        encoded.
        """
        return self._read(key)[1]

    def verify(self) -> None:
        """Reads everything; raises StoreError naming the items whose bytes have changed."""
        shards = shard_folders(self.folder)
        damaged = [name for path in shards for name in Shard.open(path).damaged()]
        if damaged:
            raise StoreError(
                f"{self.folder}: the features of {runs.abbreviate(damaged)} do not match their "
                "checksums; delete their shards and run 05_local_extraction again"
            )
        if not self.index.same(Index.of(map(Shard.open, shards))):
            raise StoreError(f"{self.folder / INDEX} does not fit the shards; {REMEDY}")

    def _locate(self, key: str) -> tuple[int, int, slice] | None:
        """Finds an item; an index whose keys are in no order counts as none."""
        location = self.index.locate(key)
        if location is None and not self.index.is_sorted:
            self._rebuild()
            location = self.index.locate(key)
        return location

    def _rebuild(self) -> None:
        self.index = Index.of(map(Shard.open, shard_folders(self.folder)))
        self._open.clear()

    def _read(self, key: str) -> tuple[int, dict[str, np.ndarray]]:
        """Returns an item's position and its mapped arrays, and marks its shard as used last."""
        location = self._locate(key)
        if location is None and key in self.failures:
            reason = self.failures[key]
            raise KeyError(f"{key} could not be read when {self.folder} was made: {reason}")
        if location is None:
            raise KeyError(f"{key} is not in {self.folder}: it was not on the short list")
        position, number, rows = location
        arrays = self._open.pop(number, None)
        if arrays is None:
            try:
                arrays = self._map(number)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) or self.index.shards is not None:
                    shard = self.index.shard(number)
                    raise StoreError(f"the shard {shard} is damaged ({error}); {REMEDY}") from error
                # If the shards are whole, the index belongs to others and is ignored.
                self._rebuild()
                return self._read(key)
            while len(self._open) >= self._most_open:
                self._open.pop(next(iter(self._open)), None)  # unused for the longest time
        self._open[number] = arrays
        return position, {name: array[rows] for name, array in arrays.items()}

    def _map(self, number: int) -> dict[str, np.ndarray]:
        """Maps a shard's arrays; FileError where they do not fit the index."""
        folder, ends = self.index.shard(number), self.index.ends(number)
        layout = self.index.format.layout(int(ends[-1]), len(ends))
        names = (*FEATURE_ARRAYS, "offsets")
        arrays = {name: map_array(folder / f"{name}.npy", *layout[name]) for name in names}
        if not np.array_equal(arrays.pop("offsets")[1:], ends):
            raise FileError(f"{self.folder / INDEX} belongs to other shards")
        return arrays


def most_open() -> int:
    """Returns how many shards a store keeps mapped: OPEN_SHARDS, or fewer by the limit of files."""
    # Each mapped file counts as open: a sixteenth leaves room for other stores and files.
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if files == resource.RLIM_INFINITY else min(OPEN_SHARDS, 1 + files // 16)


@dataclass(frozen=True, eq=False)
class Index:
    """Names, sizes and rows of the n items of a store, in the order of its shards.

    Attributes:
        header: as HEADER; "folders" is the number of shards.
        arrays: "names" (bytes,) uint8, all keys in UTF-8; "name_ends" (n + 1,) int64; "order" (n,)
            int64, positions by rising key; "rows" (n, 2) int64, first row and end of an item's
            features in its shard; "sizes" (n, 8) int32, see `LocalFeatures.sizes`; "firsts"
            (shards + 1,) int64, the first item of each shard.
        shards: the shards' folders; None: those that `shard_folder` returns.
    """

    store: Path
    header: dict[str, Any]
    arrays: dict[str, np.ndarray]
    shards: Sequence[Path] | None = None

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "Index":
        """Builds the index of one shard or more; StoreError for a key twice or two formats."""
        keys: list[bytes] = []
        folders: list[Path] = []
        firsts, rows, sizes, failures = [0], [], [], []
        first_filled: Shard | None = None  # the first shard with any feature
        for shard in shards:
            if len(shard.arrays["scores"]):
                first_filled = first_filled or shard
                _refuse_other_format(first_filled, shard)
            encoded, part = _names_and_sizes(shard)
            keys += encoded
            sizes.append(part)
            folders.append(shard.folder)
            firsts.append(len(keys))
            rows.append(np.stack([shard.arrays["offsets"][:-1], shard.arrays["offsets"][1:]], 1))
            failures += shard.failures
        arrays = {
            "names": np.frombuffer(b"".join(keys), np.uint8),
            "name_ends": np.cumsum([0, *map(len, keys)], dtype=np.int64),
            "order": np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64),
            "rows": np.concatenate(rows),
            "sizes": np.concatenate(sizes),
            "firsts": np.array(firsts, np.int64),
        }
        for first, second in itertools.pairwise(arrays["order"].tolist()):
            if keys[first] == keys[second]:
                number = bisect.bisect_right(firsts, max(first, second)) - 1
                raise StoreError(
                    f"{folders[number]} holds a key of an earlier shard "
                    f"({keys[first].decode()!r}); {REMEDY}"
                )
        kind = (first_filled or shard).format
        header = {"format": FORMAT, "folders": len(folders), "dtype": kind.dtype}
        header |= {"code_dim": kind.code_dim, "failures": failures}
        return cls(folders[0].parent, header, arrays, folders)

    @classmethod
    def read(cls, store: Path) -> "Index | None":
        """Maps the index of a store; None where it is missing, incomplete or damaged."""
        folder = Path(store) / INDEX
        try:
            header = read_json(folder / INDEX_HEADER, HEADER)
            arrays = {name: map_array(folder / f"{name}.npy") for name in INDEX_ARRAYS}
        except (OSError, ValueError):
            return None
        index = cls(Path(store), header, arrays)
        return index if index._fits() else None

    def _fits(self) -> bool:
        names, ends, order, rows, _, firsts = (self.arrays[name] for name in INDEX_ARRAYS)
        count = order.size
        layout = {
            "names": (np.uint8, (names.size,)),
            "name_ends": (np.int64, (count + 1,)),
            "order": (np.int64, (count,)),
            "rows": (np.int64, (count, 2)),
            "sizes": (np.int32, (count, 8)),
            "firsts": (np.int64, (self.header["folders"] + 1,)),
        }
        if any((array.dtype, array.shape) != layout[n] for n, array in self.arrays.items()):
            return False
        if not (divides(ends, names.size) and divides(firsts, count)):
            return False
        starts = np.concatenate([np.zeros(1, np.int64), rows[:, 1]])  # an item's at another's end
        starts[firsts] = 0
        if (rows[:, 0] != starts[:-1]).any() or (rows[:, 0] > rows[:, 1]).any():
            return False
        if not np.array_equal(np.sort(order), np.arange(count)):
            return False
        beginnings = names[ends[:-1][np.diff(ends) > 0]]
        try:
            str(names.data, "utf-8")
        except UnicodeDecodeError:
            return False
        return not (beginnings & 0xC0 == 0x80).any()  # the rest of a cut UTF-8 character

    @functools.cached_property
    def format(self) -> ShardFormat:
        """The common format of the shards, without their settings."""
        return ShardFormat(self.header["dtype"], self.header["code_dim"])

    @functools.cached_property
    def is_sorted(self) -> bool:
        """Whether `order` lists the keys rising, each once; read where a key is not found."""
        keys = map(self._key, self.arrays["order"])
        return all(key < following for key, following in itertools.pairwise(keys))

    def __len__(self) -> int:
        return len(self.arrays["order"])

    def same(self, other: "Index") -> bool:
        """Returns whether both indexes are equal."""
        arrays = ((self.arrays[name], other.arrays[name]) for name in INDEX_ARRAYS)
        return self.header == other.header and all(np.array_equal(*pair) for pair in arrays)

    def shard(self, number: int) -> Path:
        """Returns a shard's folder."""
        if self.shards is not None:
            return self.shards[number]
        return shard_folder(self.store, number, self.header["folders"])

    def ends(self, number: int) -> np.ndarray:
        """Returns the end of each of a shard's N items, (N,) int64, as a row number."""
        first, end = self.arrays["firsts"][number : number + 2]
        return self.arrays["rows"][first:end, 1]

    def names(self) -> list[str]:
        """Lists all keys in the order of the shards."""
        ends, text = self.arrays["name_ends"].tolist(), self.arrays["names"].tobytes()
        return [text[start:end].decode() for start, end in itertools.pairwise(ends)]

    def locate(self, key: str) -> tuple[int, int, slice] | None:
        """Finds an item's position, shard and rows there; None where there is no such key."""
        wanted, order = key.encode(errors="surrogatepass"), self.arrays["order"]
        rank = bisect.bisect_left(order, wanted, key=self._key)
        if rank == len(order) or self._key(order[rank]) != wanted:
            return None
        position = int(order[rank])
        shard = bisect.bisect_right(self.arrays["firsts"], position) - 1
        return position, shard, slice(*self.arrays["rows"][position].tolist())

    def _key(self, position: int) -> bytes:
        ends = self.arrays["name_ends"]
        return self.arrays["names"][ends[position] : ends[position + 1]].tobytes()


def write_index(store: Path) -> list[str]:
    """Writes the index of a complete store, and returns its files, relative to the store.

    `write_shard` removes the index of a store that it changes. Raises FileNotFoundError where there
    is no shard, StoreError where one is missing or damaged, a key occurs twice, or formats differ.
    """
    shards = shard_folders(store)
    if shards != [shard_folder(store, number, len(shards)) for number in range(len(shards))]:
        raise StoreError(f"the shards of {store} are not numbered from 0 on; {REMEDY}")
    index = Index.of(map(Shard.open, shards))
    for name, array in index.arrays.items():
        runs.write_array(Path(store) / INDEX / f"{name}.npy", array)
    runs.write_json(Path(store) / INDEX / INDEX_HEADER, index.header)
    return [*(f"{INDEX}/{name}.npy" for name in INDEX_ARRAYS), f"{INDEX}/{INDEX_HEADER}"]


def _names_and_sizes(shard: Shard) -> tuple[list[bytes], np.ndarray]:
    """Returns the keys of a shard's items in UTF-8, and their sizes (n, 8) int32."""
    sizes = [[side for name in SIZES for side in item[name]] for item in shard.header["items"]]
    try:
        keys = [name.encode() for name in shard.names]
    except UnicodeEncodeError as error:
        raise StoreError(f"the shard {shard.folder} is damaged ({error}); {REMEDY}") from error
    return keys, np.array(sizes, np.int32).reshape(-1, 8)


def _refuse_other_format(shard: Shard, other: Shard) -> None:
    if other.format != shard.format:
        raise StoreError(
            f"the shards of {shard.folder.parent} hold descriptors of several kinds "
            f"({shard.folder.name}: {shard.format}; {other.folder.name}: {other.format}): they "
            "were made by different models or options; delete those that do not belong here"
        )
