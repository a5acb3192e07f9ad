"""FeatureStore: local features on disk, ragged, memory-mapped and checked image by image.

A store is a folder of shards. A shard is a folder `shard-NN` with flat arrays over all features of
its images (keypoints, descriptors, scores, scales), `offsets` that give the first row of each
image, one checksum an image, and `items.json` with the names and sizes. Shards are written
atomically, so a store can be read while later shards are still being written. A finished store has
an `index/` with names, sizes and positions of all its items, with which it opens at once.

An item's key is its image's name. The features of a query are those of its crop.
"""

import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vitgal.features.files import map_array_as
from vitgal.features.local import LocalFeatures
from vitgal.features.store.codec import FEATURE_ARRAYS, REMEDY, StoreError, decode_features
from vitgal.features.store.index import Index, Location
from vitgal.features.store.shard import INDEX, Shard, shard_folders

OPEN_SHARDS = 1024  # that a store keeps mapped, four files each (a process may map 65,530)


class FeatureStore(Mapping[str, LocalFeatures]):
    """All shards of a folder as one mapping, key -> LocalFeatures (float32, length 1).

    With an index, a store of any size opens in the same time: a shard is opened when an item of it
    is read, and the shards read last stay open (see `most_open`). Without one, the names and sizes
    in all shards are read. It pickles as its folder, so a worker process opens the files itself.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder = Path(folder)
        self.index = index
        self._format = index.format()
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._most_open = most_open()

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "FeatureStore":
        """Opens the store in `folder`; with `verify` reads everything and checks every item.

        Raises FileNotFoundError where there is no shard, StoreError where one is damaged (with an
        index: when an item of it is read).
        """
        index = Index.read(folder)
        if index is None:
            index = Index.of(map(Shard.open, shard_folders(folder)))
        store = cls(folder, index)
        if verify:
            store.verify()
        return store

    def __getitem__(self, key: str) -> LocalFeatures:
        location = self._locate(key)
        sizes = self.index.arrays["sizes"][location.position].tolist()
        kind = self._format
        return decode_features(self._stored(location), sizes, kind.dtype, kind.code_dim)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.names())

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.locate(key) is not None

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
        return self._format.code_dim

    def raw(self, key: str) -> dict[str, np.ndarray]:
        """Returns one item's arrays as `encode_features` gave them, mapped from the files.

        "keypoints" (N, 2), "scores" and "scales" (N,) are float32; "descriptors" (N, columns) are
        encoded.
        """
        return self._stored(self._locate(key))

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
            raise StoreError(f"{self.folder / INDEX} does not fit the shards; {REMEDY}")

    def _locate(self, key: str) -> Location:
        location = self.index.locate(key)
        if location is not None:
            return location
        if key in self.failures:
            reason = self.failures[key]
            raise KeyError(f"{key} could not be read when {self.folder} was made: {reason}")
        raise KeyError(f"{key} is not in {self.folder}: it was not on the short list")

    def _stored(self, location: Location) -> dict[str, np.ndarray]:
        """Maps an item's arrays and marks its shard as used last."""
        arrays = self._open.pop(location.shard, None)
        if arrays is None:
            arrays = self._map(location)
            while len(self._open) >= self._most_open:
                self._open.pop(next(iter(self._open)), None)  # unused for the longest time
        self._open[location.shard] = arrays
        return {name: array[location.start : location.stop] for name, array in arrays.items()}

    def _map(self, location: Location) -> dict[str, np.ndarray]:
        """Maps a shard's arrays; StoreError where they are not as long as the index states."""
        folder, layout = self.index.shard(location.shard), self._format.layout(location.rows, 0)
        try:
            return {
                name: map_array_as(folder / f"{name}.npy", *layout[name]) for name in FEATURE_ARRAYS
            }
        except ValueError as error:
            raise StoreError(
                f"the shard {folder} does not fit the store's index ({error}); {REMEDY}"
            ) from error
        except OSError as error:
            raise StoreError(f"the shard {folder} is damaged ({error}); {REMEDY}") from error


def most_open() -> int:
    """Returns how many shards a store keeps mapped: OPEN_SHARDS, or fewer by the limit of files.

    Each mapped file counts as open. A sixteenth of the limit leaves room for other stores and
    files.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if files == resource.RLIM_INFINITY else min(OPEN_SHARDS, 1 + files // 16)
