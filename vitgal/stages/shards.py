"""The shards of the local stage: which images belong to each, and how it is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitgal import runs
from vitgal.features import store
from vitgal.stages.images import Failure, ImageTask, refuse_failed_query

# The stage hashes these files when it ends and again when it is reused. The large arrays of a shard
# are checked by length on opening, and byte for byte by the checksums in checksums.npy.
SHARD_OUTPUTS = ("items.json", "failures.json", "offsets.npy", "checksums.npy")


@dataclass(frozen=True, eq=False)
class ShardTask:
    """A shard to write: its folder, its images sorted by key, and the format of their features."""

    folder: Path
    images: Sequence[ImageTask]
    format: store.ShardFormat

    @property
    def keys(self) -> list[str]:
        """The keys of the images."""
        return [image.key for image in self.images]

    def written(self) -> store.Shard | None:
        """Opens the shard if it is complete on disk and every checksum is right, else None."""
        return store.whole_shard(self.folder, self.keys, self.format)

    def salvage(self) -> dict[str, store.EncodedFeatures]:
        """Reads the undamaged images of a damaged shard and prints how many there are."""
        kept = store.salvage(self.folder, self.format)
        if self.folder.exists():
            print(f"{self.folder} is damaged: {len(kept)} of {len(self.images)} images are kept")
        return kept

    def refuse_failed_query(self, failures: Sequence[Failure]) -> None:
        """Raises StageError if one of the failed images is a query."""
        queries = {image.key for image in self.images if image.is_query}
        refuse_failed_query([failure for failure in failures if failure["name"] in queries])

    def refuse_other_precision(self) -> None:
        """Raises StageError if the shard on disk was extracted in another precision."""
        try:
            settings = store.Shard.open(self.folder).header["settings"]
        except store.StoreError:  # missing or damaged: it will be written again
            return
        wanted = self.format.settings["precision"]
        precision = settings.get("precision", wanted)
        if precision != wanted:
            raise runs.StageError(
                f"{self.folder} was made in {precision}, and here it would be {wanted}: "
                f"{store.PRECISION_REMEDY}"
            )


def shard_tasks(
    folder: Path, images: Sequence[ImageTask], shard_size: int, shard_format: store.ShardFormat
) -> list[ShardTask]:
    """Divides images into the shards of a store: a fixed partition of the sorted keys.

    Without images there is one empty shard.
    """
    by_key = {image.key: image for image in images}
    parts = store.partition(by_key, shard_size) or [[]]
    return [
        ShardTask(
            store.shard_folder(folder, index, len(parts)),
            [by_key[key] for key in keys],
            shard_format,
        )
        for index, keys in enumerate(parts)
    ]


def shard_outputs(folder: Path) -> list[str]:
    """Lists the files of all shards that the stage's manifest records."""
    shards = store.shard_folders(folder)
    return [f"{shard.name}/{name}" for shard in shards for name in SHARD_OUTPUTS]
