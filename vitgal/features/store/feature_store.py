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
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vitgal.features.local import LocalFeatures
from vitgal.features.store.codec import QUERY, StoreError, decode
from vitgal.features.store.index import Index, most_open
from vitgal.features.store.shard import (
    _REMEDY,
    ARRAYS,
    INDEX,
    Shard,
    _layout,
    _mapped_as,
    shard_folders,
)


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
