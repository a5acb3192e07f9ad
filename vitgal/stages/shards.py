"""Shards of the local stage: which there are, and how one is made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitgal import runs
from vitgal.features import store
from vitgal.stages.images import Job, _refuse_failed_query

# Hashed when the stage ends and again when it is reused. The large arrays of a shard are not: they
# are checked by length on opening, and byte for byte by the checksums that stand here.
SHARD_OUTPUTS = ("items.json", "failures.json", "offsets.npy", "checksums.npy")


def _whole(where: Path, names: Sequence[str], made: store.ShardFormat) -> bool:
    return store.whole_shard(where, names, made) is not None


def _refuse_other_precision(where: Path, precision: str) -> None:
    """StageError where a shard that is there was made in another precision."""
    try:
        made = store.Shard.open(where).header["settings"].get("precision", precision)
    except store.StoreError:  # not there, or damaged
        return
    if made != precision:
        raise runs.StageError(
            f"{where} was made in {made}, and here it would be {precision}: "
            f"{store.PRECISION_REMEDY}"
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """A shard to be made: its folder, and the images that belong there."""

    where: Path
    jobs: list[Job]

    @property
    def keys(self) -> list[str]:
        return [job.key for job in self.jobs]

    def refuse_failed_query(self, failed: Sequence[dict]) -> None:
        """StageError where one of the failures is a query."""
        queries = {job.key for job in self.jobs if job.query}
        _refuse_failed_query([failure for failure in failed if failure["name"] in queries])

    def salvaged(self, made: store.ShardFormat) -> dict[str, store.EncodedFeatures]:
        """What a damaged shard still holds; says how much."""
        kept = store.salvage(self.where, made)
        if self.where.exists():
            print(f"{self.where} is damaged: {len(kept)} of {len(self.jobs)} images are kept")
        return kept


def shards_of(
    folder: Path, keys: Iterable[str], shard_size: int, slot: runs.WorkerSlot = runs.ALONE
) -> dict[Path, list[str]]:
    """The shards that one of several workers writes: folder -> keys of its images.

    Worker `slot.number` takes the shards number, number + count, …. The shards are those of
    `store.partition`, whatever the number of workers; without images there is an empty one.
    """
    parts = store.partition(keys, shard_size) or [[]]
    return {
        store.shard_folder(folder, index, len(parts)): parts[index]
        for index in slot.indices(len(parts))
    }


def _shard_outputs(folder: Path) -> list[str]:
    shards = store.shard_folders(folder)
    return [f"{shard.name}/{name}" for shard in shards for name in SHARD_OUTPUTS]
