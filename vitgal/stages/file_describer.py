"""Copies another system's local features into a feature store, shard by shard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from vitgal.data.images import ImageError, stored_size
from vitgal.features import store
from vitgal.features.feature_file import FeatureFile
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import MIN_MATCHES
from vitgal.settings import LocalSettings
from vitgal.stages.images import Failure, ImageTask, ShardTask


@dataclass(frozen=True, eq=False)
class FileDescriber:
    """Reads features from a file, in place of a LocalDescriber of the local stage."""

    file: FeatureFile
    settings: LocalSettings  # how many features are kept
    counts: dict[str, int] = field(default_factory=dict)  # of the images read so far, in the file
    precision = "fp32"

    @property
    def code_dim(self) -> int:
        """Dimension of a descriptor."""
        return self.file.code_dim

    def write_shards(self, shards: Sequence[ShardTask], bar: tqdm) -> Iterator[list[Failure]]:
        """Writes one shard after the other and yields the failures of each."""
        for shard in shards:
            items, failures = [], []
            for task in shard.images:
                try:
                    items.append((task.key, self._read(task)))
                except ImageError as error:
                    failures.append({"name": task.key, "reason": error.reason})
                bar.update()
            shard.refuse_failed_query(failures)
            store.write_shard(shard.folder, items, shard.format, failures=failures)
            yield failures
        self._report()

    def recorded(self) -> dict[str, str]:
        """Returns the entries for a stage's manifest; no result depends on them."""
        return {"engine": "local", "device": "cpu", "precision": self.precision}

    def _read(self, task: ImageTask) -> LocalFeatures:
        # The header alone: a photograph is not decoded for its size.
        size = stored_size(task.path)
        self.counts[task.key] = self.file.count(task.key)
        return self.file.read(task.key, size, task.box, self.settings.max_keypoints)

    def _report(self) -> None:
        """Prints which images have more features than are kept, or too few to be verified."""
        most = self.settings.max_keypoints
        many = {name: count for name, count in self.counts.items() if count > most}
        few = [name for name, count in self.counts.items() if count < MIN_MATCHES]
        if many:
            name = max(many, key=many.__getitem__)
            print(
                f"images with more than max_keypoints = {most:,} features, of which the best by "
                f"score are kept: {len(many)}, most of all {name} with {many[name]:,}"
            )
        if few:
            print(
                f"images with fewer than {MIN_MATCHES} features, which are never verified: "
                f"{len(few)}, the first {few[0]}"
            )
