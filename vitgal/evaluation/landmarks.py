"""Which queries show one landmark: the clusters that intervals and paired tests resample."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitgal.data import revisited
from vitgal.data.revisited import GroundTruth

# Of two queries' labelled images, intersection over union. On ROxford and RParis every value from
# 0.2 to 0.5 gives their eleven landmarks each.
OVERLAP = 0.3
NAMED = re.compile(r"(.+)_[0-9]+")  # all_souls_000013
SOURCES = {
    "labels": "queries that share labelled images show one",
    "names": "told by the names of the queries",
    "queries": "each is taken for a landmark of its own",
}


@dataclass(frozen=True, eq=False)
class Landmarks:
    """The landmark of each query.

    groups: (Q,) int64, equal for queries of one landmark, numbered by first appearance. source: a
    key of SOURCES, where the landmarks come from.
    """

    groups: np.ndarray
    source: str

    @classmethod
    def numbered(cls, labels: Iterable[Any], source: str) -> "Landmarks":
        """Numbers the labels of Q queries, which are hashable and equal for one landmark."""
        labels = list(labels)
        order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        return cls(np.array([order[label] for label in labels], np.int64), source)

    @property
    def count(self) -> int:
        """The number of landmarks."""
        return len(np.unique(self.groups))

    @property
    def clusters(self) -> np.ndarray | None:
        """The groups (Q,) for `bootstrap_interval` and `paired_test`; None: a query is its own."""
        return None if self.source == "queries" else self.groups

    @property
    def recorded(self) -> dict[str, Any]:
        """What a scores.json holds beside the parameters of the bootstrap."""
        return {"landmarks": self.groups, "landmarks_from": self.source}

    def __str__(self) -> str:
        """States how many landmarks are resampled, where they come from, and if they are few."""
        kinds = ("query", "queries") if self.source == "queries" else ("landmark", "landmarks")
        number = f"{self.count} {kinds[self.count != 1]}"
        text = f"intervals and tests resample {number} ({SOURCES[self.source]})"
        if self.count == 1:
            return f"{text}: one alone has no interval"
        if self.count == 2:
            return f"{text}: with two, an interval reaches from the one's mean to the other's"
        return text


def find_landmarks(ground_truth: GroundTruth) -> Landmarks:
    """Finds the queries of one landmark by their labels.

    Two queries belong together where their labelled images (easy, hard, junk) have an intersection
    over union of at least OVERLAP, and where a third connects them. The names of the queries are
    not used: ROxford's oxford_002985 shows All Souls. A query without labels stays alone.
    """
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    images = revisited.labelled(ground_truth)
    sizes = np.array([each.size for each in images], np.int64)
    if not sizes.sum():
        return Landmarks(np.arange(len(images)), "queries")
    entries = np.ones(sizes.sum()), np.concatenate(images), np.cumsum([0, *sizes])
    incidence = sparse.csr_array(entries, (len(images), len(ground_truth.database)))
    common = (incidence @ incidence.T).tocoo()
    union = sizes[common.row] + sizes[common.col] - common.data
    linked = common.data >= OVERLAP * union
    ends = common.row[linked], common.col[linked]
    graph = sparse.csr_array((np.ones(len(ends[0])), ends), (len(images), len(images)))
    count, groups = connected_components(graph, directed=False)
    return Landmarks.numbered(groups.tolist(), "labels" if count < len(images) else "queries")


def landmarks_by_names(queries: Sequence[str]) -> Landmarks:
    """Finds the queries of one landmark by names `<landmark>_<digits>`, as of the Revisited sets.

    Each query has a landmark of its own where a name is another, or where all name one landmark.
    """
    named = [NAMED.fullmatch(query) for query in queries]
    if all(named) and 1 < len({match[1] for match in named}) < len(named):
        return Landmarks.numbered([match[1] for match in named], "names")
    return Landmarks(np.arange(len(queries)), "queries")
