"""The index of a finished store, with which any number of images opens at once."""

import bisect
import itertools
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.features.npy import map_array
from vitgal.features.store.codec import FORMAT, REMEDY, StoreError
from vitgal.features.store.shard import (
    INDEX,
    INDEX_HEADER,
    SIZES,
    Shard,
    ShardFormat,
    is_failure_list,
    shard_folder,
    shard_folders,
)
from vitgal.settings.sections import FEATURE_DTYPES

INDEX_ARRAYS = ("names", "name_ends", "order", "rows", "sizes", "firsts")
OPEN_SHARDS = 1024  # that a store keeps mapped, four files each (a process may map 65,530)


@dataclass(frozen=True, eq=False)
class Index:
    """Names, sizes and positions of all items of a store, in the order of its n items.

    Attributes:
        header: "format", "folders" (the number of shards), "dtype", "code_dim", "failures".
        arrays: "names" (bytes,) uint8, all keys in UTF-8; "name_ends" (n + 1,) int64; "order" (n,)
            int64, positions by rising key; "rows" (n, 2) int64, first row and end of an item's
            features in its shard; "sizes" (n, 8) int32, see `LocalFeatures.sizes`; "firsts"
            (shards + 1,) int64, the first item of each shard.
        folders: names of the shards' folders; None: those that `shard_folder` gives.
    """

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folders: tuple[str, ...] | None = None

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "Index":
        """Builds the index of shards, at least one, without keeping any of them open.

        Raises StoreError where a key occurs twice, or shards differ in their format.
        """
        keys: list[bytes] = []
        folders: list[Path] = []
        firsts, rows, sizes, failures = [0], [], [], []
        formats: dict[str, tuple[ShardFormat, Path]] = {}  # of the shards with any feature
        for shard in shards:
            shard_format = shard.format
            if len(shard.arrays["scores"]):
                formats.setdefault(_described(shard_format), (shard_format, shard.folder))
            keys += [name.encode() for name in shard.names]
            folders.append(shard.folder)
            firsts.append(len(keys))
            bounds = np.array(shard.arrays["offsets"])
            rows.append(np.stack([bounds[:-1], bounds[1:]], axis=1))
            sizes += [
                [side for name in SIZES for side in item[name]] for item in shard.header["items"]
            ]
            failures += shard.failures
        _refuse_mixture(formats)
        arrays = {
            "names": np.frombuffer(b"".join(keys), np.uint8),
            "name_ends": np.cumsum([0, *map(len, keys)], dtype=np.int64),
            "order": np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64),
            "rows": np.concatenate(rows),
            "sizes": np.array(sizes, np.int32).reshape(-1, 8),
            "firsts": np.array(firsts, np.int64),
        }
        _refuse_repeated(keys, arrays["order"], folders, firsts)
        shard_format, _ = next(iter(formats.values()), (shard_format, None))
        header = {
            "format": FORMAT,
            "folders": len(folders),
            "dtype": shard_format.dtype,
            "code_dim": shard_format.code_dim,
            "failures": failures,
        }
        return cls(header, arrays, tuple(folder.name for folder in folders))

    def write(self, store: Path) -> Path:
        """Writes the index to the folder `index` of a store, the header last; returns it."""
        folder = Path(store) / INDEX
        for name, array in self.arrays.items():
            runs.write_array(folder / f"{name}.npy", array)
        runs.write_json(folder / INDEX_HEADER, self.header)
        return folder

    @classmethod
    def read(cls, store: Path) -> "Index | None":
        """Maps the index of a store; None where there is none, or none that is whole.

        The time does not depend on the number of items, so the arrays' contents are not checked.
        """
        folder = Path(store) / INDEX
        if not (folder / INDEX_HEADER).exists():
            return None
        try:
            header = runs.read_json(folder / INDEX_HEADER)
            arrays = {name: map_array(folder / f"{name}.npy") for name in INDEX_ARRAYS}
        except (runs.StageError, OSError, ValueError, RecursionError):
            return None
        index = cls(header, arrays)
        return index if _is_header(header) and index._fits() else None

    def _fits(self) -> bool:
        names, order = self.arrays["names"], self.arrays["order"]
        count, ends = len(order) if order.ndim else 0, self.arrays["name_ends"]
        layout = {
            "names": (np.uint8, names.shape[:1]),
            "name_ends": (np.int64, (count + 1,)),
            "order": (np.int64, (count,)),
            "rows": (np.int64, (count, 2)),
            "sizes": (np.int32, (count, 8)),
            "firsts": (np.int64, (self.header["folders"] + 1,)),
        }
        return all(
            (array.dtype, array.shape) == layout[n] for n, array in self.arrays.items()
        ) and int(ends[-1]) == len(names)

    def __len__(self) -> int:
        return len(self.arrays["order"])

    def same(self, other: "Index") -> bool:
        """Tells whether both state the same of every item."""
        arrays = ((self.arrays[name], other.arrays[name]) for name in INDEX_ARRAYS)
        return self.header == other.header and all(np.array_equal(*pair) for pair in arrays)

    def shard(self, number: int) -> str:
        """Returns the name of a shard's folder."""
        if self.folders is not None:
            return self.folders[number]
        return shard_folder(Path(), number, self.header["folders"]).name

    def names(self) -> Iterator[str]:
        """Iterates over all keys in the order of the shards."""
        ends = self.arrays["name_ends"].tolist()
        text = self.arrays["names"].tobytes()
        return (text[start:end].decode() for start, end in zip(ends, ends[1:], strict=False))

    def find(self, key: str) -> int | None:
        """Returns the position of an item; None where there is no such key."""
        wanted, order = key.encode(errors="surrogatepass"), self.arrays["order"]
        at = bisect.bisect_left(order, wanted, key=self._key)
        return int(order[at]) if at < len(order) and self._key(order[at]) == wanted else None

    def _key(self, position: int) -> bytes:
        ends = self.arrays["name_ends"]
        return self.arrays["names"][ends[position] : ends[position + 1]].tobytes()


def write_index(folder: Path) -> list[str]:
    """Writes the index of a complete store, so that opening it takes the same time at any size.

    A store without one is opened by reading the names in all its shards; `write_shard` removes the
    index of a store that it changes.

    Returns:
        The index's files, relative to the store.
    Raises:
        StoreError: a shard is missing or damaged, a key occurs twice, or shards differ in format.
        FileNotFoundError: there is no shard.
    """
    shards = shard_folders(folder)
    if [path.name for path in shards] != [
        shard_folder(folder, number, len(shards)).name for number in range(len(shards))
    ]:
        raise StoreError(f"the shards of {folder} are not numbered from 0 on; {REMEDY}")
    Index.of(map(Shard.open, shards)).write(folder)
    return [*(f"{INDEX}/{name}.npy" for name in INDEX_ARRAYS), f"{INDEX}/{INDEX_HEADER}"]


def most_open() -> int:
    """Returns how many shards a store keeps mapped: OPEN_SHARDS, or less by the limit of files.

    Each mapped file counts as an open one. A sixteenth of the limit leaves enough for a few stores
    in one process, and for whatever else it has open.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if files == resource.RLIM_INFINITY else min(OPEN_SHARDS, 1 + files // 16)


def _described(shard_format: ShardFormat) -> str:
    settings = sorted(shard_format.settings.items())
    values = f"{shard_format.code_dim} values as {shard_format.dtype}"
    return values + "".join(f", {name} {value}" for name, value in settings)


def _refuse_mixture(formats: Mapping[str, tuple[ShardFormat, Path]]) -> None:
    """StoreError where there is more than one format: description -> format, first shard."""
    if len(formats) > 1:
        kinds = "; ".join(f"{path.name}: {text}" for text, (_, path) in formats.items())
        _, path = next(iter(formats.values()))
        raise StoreError(
            f"the shards of {path.parent} hold descriptors of several kinds ({kinds}): they were "
            "made by different models or options; delete those that do not belong here"
        )


def _refuse_repeated(
    keys: Sequence[bytes], order: np.ndarray, folders: Sequence[Path], firsts: Sequence[int]
) -> None:
    """StoreError where a key occurs twice; `order` (n,) sorts the keys."""
    for first, second in itertools.pairwise(order.tolist()):
        if keys[first] == keys[second]:
            number = bisect.bisect_right(firsts, max(first, second)) - 1
            raise StoreError(
                f"{folders[number]} holds a key of an earlier shard ({keys[first].decode()!r}); "
                f"{REMEDY}"
            )


def _is_header(header: object) -> bool:
    return (
        isinstance(header, dict)
        and header.get("format") == FORMAT
        and all(isinstance(header.get(name), int) for name in ("folders", "code_dim"))
        and header.get("dtype") in FEATURE_DTYPES
        and is_failure_list(header.get("failures"))
    )
