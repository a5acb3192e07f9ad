"""Counts the inliers of a data set's short lists, in parallel over queries."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import GroundTruth
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval.ranking import Ranking, padded
from vitgal.settings import MachineSettings

GLOBAL_NOTEBOOK = "04_global_evaluation"
LOCAL_NOTEBOOK = "05_local_extraction"
JOURNAL = "partial"  # folder of the counts of finished queries, until all are finished

# (store, name of a query, names of its C candidates) -> counts (..., C) int32
Counter = Callable[[FeatureStore, str, list[str]], np.ndarray]


@dataclass(frozen=True, eq=False)
class CandidateLists:
    """A data set's global ranking and the images that are verified for each query.

    database: N names, those of the ground truth first.  images: per query (C,) int64 database
    indices, best first.
    """

    ground_truth: GroundTruth
    database: list[str]
    ranking: Ranking
    images: list[np.ndarray]

    @property
    def candidates(self) -> np.ndarray:
        """(Q, C) int32 database indices, padded with -1."""
        return padded(self.images)

    def names(self, query: int) -> list[str]:
        """Returns the names of a query's candidates."""
        return [self.database[image] for image in self.images[query]]

    def missing_features(self, store: FeatureStore) -> list[str]:
        """Returns the queries and candidates that the store neither holds nor lists as failed."""
        unreadable = store.failures
        names = dict.fromkeys(self.ground_truth.queries)  # each once, in order
        for query in range(len(self.images)):
            names |= dict.fromkeys(name for name in self.names(query) if name not in unreadable)
        return [name for name in names if name not in store]


def candidate_inputs(
    folder: Path, ground_truth: GroundTruth, files: tuple[str, ...]
) -> dict[str, str]:
    """Returns the fingerprints of what verification reads, by name.

    folder: `<run>/<dataset>`. files: those of its global stage. StageError names the notebook to
    run where an earlier stage is missing.
    """
    inputs = {
        name: runs.output_fingerprint(
            folder / "global", name, f"{GLOBAL_NOTEBOOK} with dataset {folder.name}"
        )
        for name in files
    }
    local = runs.read_stage(folder / "local", f"{LOCAL_NOTEBOOK} with dataset {folder.name}")
    inputs["local features"] = runs.fingerprint(local["outputs"])
    return inputs | {"ground truth": ground_truth.fingerprint}


def count_queries(
    lists: CandidateLists,
    store: FeatureStore,
    count: Counter,
    machine: MachineSettings,
    *,
    journal: Path,
    label: str,
    progress: bool,
) -> list[np.ndarray]:
    """Counts the inliers of every query's candidates.

    Args:
        count: a function that can be pickled.
        machine: its engine, ray_address and workers. The result does not depend on them.
        journal: folder of the finished queries. An interrupted run goes on from there.
        label: of the progress bar; progress: whether it is shown.
    Returns:
        Per query what `count` returned: int32 of shape (..., C).
    """
    counts = {int(path.stem): np.load(path, allow_pickle=False) for path in journal.glob("*.npy")}
    counts = {q: row for q, row in counts.items() if row.shape[-1] == lists.images[q].size}
    queries = lists.ground_truth.queries
    tasks = [(q, queries[q], lists.names(q)) for q in range(len(queries)) if q not in counts]
    # Processes, not threads: pydegensac draws from one random state a process.
    with (
        engines.parallel(
            machine.engine, machine.ray_address, workers=machine.workers, tasks=len(tasks)
        ) as pool,
        tqdm(
            total=len(queries),
            initial=len(counts),
            desc=label,
            unit="query",
            disable=not progress,
        ) as bar,
    ):
        for q, row in pool(joblib.delayed(_count_query)(count, store, *task) for task in tasks):
            runs.write_array(journal / f"{q}.npy", row)
            counts[q] = row
            bar.update()
    return [counts[q] for q in range(len(queries))]


def _count_query(
    count: Counter, store: FeatureStore, q: int, query: str, names: list[str]
) -> tuple[int, np.ndarray]:
    return q, count(store, query, names)
