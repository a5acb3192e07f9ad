"""The index of a finished store: a store of any size opens in the same time."""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitgal import runs
from vitgal.features.files import map_array, read_json
from vitgal.features.store.codec import FORMAT, REMEDY, StoreError
from vitgal.features.store.shard import (
    FAILURES,
    INDEX,
    INDEX_HEADER,
    Shard,
    ShardFormat,
    shard_folder,
    shard_folders,
)
from vitgal.settings.sections import FEATURE_DTYPES

INDEX_ARRAYS = ("names", "name_ends", "order", "rows", "sizes", "firsts")
HEADER = {
    "format": (FORMAT,),
    "folders": int,
    "dtype": FEATURE_DTYPES,
    "code_dim": int,
    "failures": FAILURES,
}


class Location(NamedTuple):
    """An item's position in the store, its shard, its rows there, and all rows of the shard."""

    position: int
    shard: int
    start: int
    stop: int
    rows: int


@dataclass(frozen=True, eq=False)
class Index:
    """Names, sizes and rows of the n items of a store, in the order of its shards.

    Attributes:
        store: the store's folder.
        header: "format", "folders" (the number of shards), "dtype", "code_dim", "failures".
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
        """Builds the index of shards, at least one; only the first with features stays open.

        Raises StoreError where a key occurs twice, or shards differ in their format.
        """
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
        """Maps the index of a store; None where it is missing or incomplete.

        The time does not depend on the number of items, so the arrays' contents are not checked.
        """
        folder = Path(store) / INDEX
        try:
            header = read_json(folder / INDEX_HEADER, HEADER)
            arrays = {name: map_array(folder / f"{name}.npy") for name in INDEX_ARRAYS}
        except (OSError, ValueError):
            return None
        index = cls(Path(store), header, arrays)
        return index if index._fits() else None

    def _fits(self) -> bool:
        count = self.arrays["order"].size
        layout = {
            "names": (np.uint8, (self.arrays["names"].size,)),
            "name_ends": (np.int64, (count + 1,)),
            "order": (np.int64, (count,)),
            "rows": (np.int64, (count, 2)),
            "sizes": (np.int32, (count, 8)),
            "firsts": (np.int64, (self.header["folders"] + 1,)),
        }
        fits = all((array.dtype, array.shape) == layout[n] for n, array in self.arrays.items())
        return fits and int(self.arrays["name_ends"][-1]) == self.arrays["names"].size

    def __len__(self) -> int:
        return len(self.arrays["order"])

    def same(self, other: "Index") -> bool:
        """Tells whether both indexes are equal."""
        arrays = ((self.arrays[name], other.arrays[name]) for name in INDEX_ARRAYS)
        return self.header == other.header and all(np.array_equal(*pair) for pair in arrays)

    def shard(self, number: int) -> Path:
        """Returns a shard's folder."""
        if self.shards is not None:
            return self.shards[number]
        return shard_folder(self.store, number, self.header["folders"])

    def format(self) -> ShardFormat:
        """Returns the common format of the shards, without their settings."""
        return ShardFormat(self.header["dtype"], self.header["code_dim"])

    def names(self) -> list[str]:
        """Lists all keys in the order of the shards; StoreError where they are damaged."""
        ends = self.arrays["name_ends"].tolist()
        text = self.arrays["names"].tobytes()
        try:
            return [text[start:end].decode() for start, end in itertools.pairwise(ends)]
        except UnicodeDecodeError:
            raise self._damaged() from None

    def locate(self, key: str) -> Location | None:
        """Finds the features of an item; None where there is no such key.

        Raises StoreError where the index is damaged.
        """
        wanted, order = key.encode(errors="surrogatepass"), self.arrays["order"]
        rows, firsts = self.arrays["rows"], self.arrays["firsts"]
        try:
            rank = bisect.bisect_left(order, wanted, key=self._key)
            if rank == len(order) or self._key(order[rank]) != wanted:
                return None
            position = int(order[rank])
            shard = bisect.bisect_right(firsts, position) - 1
            total = rows[firsts[shard + 1] - 1, 1]
            location = Location(position, shard, *rows[position].tolist(), int(total))
        except IndexError:
            raise self._damaged() from None
        if not 0 <= location.start <= location.stop <= location.rows:
            raise self._damaged()
        return location

    def _key(self, position: int) -> bytes:
        ends = self.arrays["name_ends"]
        return self.arrays["names"][ends[position] : ends[position + 1]].tobytes()

    def _damaged(self) -> StoreError:
        folder = self.store / INDEX
        return StoreError(f"{folder} is damaged: delete it, and the store opens without it")


def write_index(store: Path) -> list[str]:
    """Writes the index of a complete store, so that opening it takes the same time at any size.

    A store without one is opened by reading the names in all its shards; `write_shard` removes the
    index of a store that it changes.

    Returns:
        The index's files, relative to the store.
    Raises:
        StoreError: a shard is missing or damaged, a key occurs twice, or shards differ in format.
        FileNotFoundError: there is no shard.
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
    """The keys of a shard's items in UTF-8, and their sizes (n, 8) int32."""
    items = shard.header["items"]
    sizes = [[*item["input_size"], *item["box"], *item["image_size"]] for item in items]
    try:
        return [name.encode() for name in shard.names], np.array(sizes, np.int32).reshape(-1, 8)
    except (UnicodeEncodeError, OverflowError) as error:
        raise StoreError(f"the shard {shard.folder} is damaged ({error}); {REMEDY}") from error


def _refuse_other_format(shard: Shard, other: Shard) -> None:
    if other.format != shard.format:
        raise StoreError(
            f"the shards of {shard.folder.parent} hold descriptors of several kinds "
            f"({shard.folder.name}: {shard.format}; {other.folder.name}: {other.format}): they "
            "were made by different models or options; delete those that do not belong here"
        )
