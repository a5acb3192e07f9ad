"""The index of a finished store, with which any number of images opens at once."""

import bisect
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.features.store.codec import FORMAT, StoreError, _shown
from vitgal.features.store.shard import (
    _REMEDY,
    INDEX,
    INDEX_HEADER,
    Shard,
    _mapped,
    _sizes,
    shard_folder,
    shard_folders,
)

INDEX_ARRAYS = ("names", "name_ends", "order", "rows", "sizes", "firsts")
OPEN_SHARDS = 1024  # that a store keeps mapped, four files each (a process may map 65,530)


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


def most_open() -> int:
    """How many shards a store keeps mapped: OPEN_SHARDS, less where a process may open few files.

    Each mapped file counts as an open one. A sixteenth of the limit leaves room for a few stores in
    one process, and for whatever else it has open.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if files == resource.RLIM_INFINITY else min(OPEN_SHARDS, 1 + files // 16)


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
