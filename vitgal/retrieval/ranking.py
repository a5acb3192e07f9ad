"""Rankings before and after reranking.

A ranking is the first images of every query in order, and the exact rank of each labelled one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth
from vitgal.features.files import FileError, divides, map_array, read_arrays
from vitgal.retrieval import shortlists
from vitgal.retrieval.shortlists import PUBLISHED
from vitgal.settings import RerankingSettings
from vitgal.settings.sections import TIES

VARIANTS = (*PROTOCOLS, PUBLISHED)
NOT_VERIFIED = -1  # in the tables of candidates and inlier counts
SAMPLE = 4  # matches that fix a homography


def fused_scores(
    similarities: np.ndarray,
    evidence: np.ndarray,
    weight: float = RerankingSettings.fused_weight,
    cap: int = RerankingSettings.fused_cap,
) -> np.ndarray:
    """Adds verified evidence, as far as it exceeds chance, to the similarities of a short list.

    The second half of the list by similarity is mostly wrong, so that its evidence is chance.
    Evidence counts from the upper quartile of that half on, and each distance of that quartile from
    the median, four at least, is worth `weight` standard deviations of that half's similarities. So
    features that give many chance inliers count for less, and so does all evidence where
    similarities differ little. Given that half, a score never falls where similarity or evidence
    rises.

    Args:
        similarities: (C,) real numbers of a query's candidates, -inf where one stays last.
        evidence: (..., C) counts of inliers or features, at least 0.
        weight: see above; 0 leaves the similarities.
        cap: the count above which no more is added.
    Returns:
        float64 of the shape of `evidence`.
    """
    similarities = np.asarray(similarities, np.float64)
    evidence = np.minimum(evidence, cap)
    known = np.flatnonzero(np.isfinite(similarities))
    behind = known[np.argsort(-similarities[known], kind="stable")][len(known) // 2 :]
    if not len(behind):
        return np.broadcast_to(similarities, evidence.shape)
    median, quartile = np.quantile(evidence[..., behind], (0.5, 0.75), axis=-1, keepdims=True)
    excess = np.maximum(evidence - quartile, 0) / np.maximum(quartile - median, SAMPLE)
    return similarities + weight * similarities[behind].std() * excess


@dataclass(frozen=True, eq=False)
class Fusion:
    """Similarities that order candidates together with their counts, as `fused_scores`.

    similarities: (Q, C) real numbers of the candidates, -inf where one stays last; padding is
    ignored.  weight, cap: as `fused_scores`.
    """

    similarities: np.ndarray
    weight: float = RerankingSettings.fused_weight
    cap: int = RerankingSettings.fused_cap


@dataclass(frozen=True, eq=False)
class Reranking:
    """Verified short lists, and the rules by which they change a ranking.

    candidates: (Q, C) integers, database indices, padded with -1.  inliers: (Q, C) integers, the
    count of each candidate, padded with -1.  protocol, top, ties, fusion: as `rerank`.
    Raises ValueError for an unknown protocol or unknown ties, or similarities of another shape.
    """

    candidates: np.ndarray
    inliers: np.ndarray
    ground_truth: GroundTruth
    protocol: str
    top: int = RerankingSettings.top
    ties: str = RerankingSettings.ties
    fusion: Fusion | None = None

    def __post_init__(self) -> None:
        if self.protocol not in VARIANTS or self.ties not in TIES:
            raise ValueError(
                f"protocol {self.protocol!r}, ties {self.ties!r}: known are "
                f"{', '.join(VARIANTS)} and {', '.join(TIES)}"
            )
        shape = np.shape(self.candidates)
        if self.fusion is not None and np.shape(self.fusion.similarities) != shape:
            raise ValueError(
                f"similarities of shape {np.shape(self.fusion.similarities)} for candidates {shape}"
            )

    def exchanges(self, order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns per query the candidates' rising ranks (M,), and the images (M,) that take them.

        order: (K, Q) integers, the ranking before. Raises ValueError where it is too short, or a
        candidate of the protocol was not verified.
        """
        lists = shortlists.candidates(order, self.ground_truth, self.protocol, top=self.top)
        exchanges = []
        for q, images in enumerate(lists):
            ranks = np.flatnonzero(np.isin(order[:, q], images))
            scores = self._scores(q, images)
            if self.ties == "global":
                sorter = np.argsort(-scores, kind="stable")
            else:
                sorter = np.argsort(-scores.astype(np.float64))
            exchanges.append((ranks, images[sorter]))
        return exchanges

    def apply(self, order: np.ndarray) -> np.ndarray:
        """Returns the ranking (K, Q) after reranking, in the type of `order`. Raises as above."""
        reranked = np.array(order)
        for q, (ranks, images) in enumerate(self.exchanges(order)):
            reranked[ranks, q] = images
        return reranked

    def _scores(self, query: int, images: np.ndarray) -> np.ndarray:
        """Returns what candidates (M,) are sorted by, falling: (M,) counts or fused scores."""
        name = self.ground_truth.queries[query]
        counts = self._entries(self.inliers, query, images).astype(np.int64)
        missing = images[counts == NOT_VERIFIED]
        if missing.size:
            raise ValueError(
                f"database image {missing[0]} is on the short list of query {name}, but was not "
                "verified"
            )
        if self.protocol == PUBLISHED:
            counts[np.isin(images, self.ground_truth.junk[query])] = 0
        if self.fusion is None:
            return counts
        similarities = self._entries(self.fusion.similarities, query, images).astype(np.float64)
        if np.isnan(similarities).any():
            raise ValueError(f"a similarity of query {name} is not a number")
        return fused_scores(similarities, counts, self.fusion.weight, self.fusion.cap)

    def _entries(self, table: np.ndarray, query: int, images: np.ndarray) -> np.ndarray:
        """Looks images (M,) up in a table (Q, C) of values of the candidates; -1 for others."""
        entries = dict(zip(self.candidates[query].tolist(), table[query].tolist(), strict=True))
        return np.array([entries.get(image, NOT_VERIFIED) for image in images.tolist()])


@dataclass(frozen=True, eq=False)
class Positions:
    """The exact rank of every labelled image in each query's full ranking of the database.

    indices: per query a rising (M,) int64 array of database indices.  ranks: per query the (M,)
    int64 zero-based rank of each.  database_size: N, the number of database images.
    Raises ValueError where an index or a rank repeats or lies outside 0 … N - 1.
    """

    indices: list[np.ndarray]
    ranks: list[np.ndarray]
    database_size: int

    def __post_init__(self) -> None:
        for q, (index, ranks) in enumerate(zip(self.indices, self.ranks, strict=True)):
            if index.shape != ranks.shape:
                raise ValueError(f"query {q}: {index.size} images, but {ranks.size} ranks")
            if (np.diff(index) <= 0).any() or np.unique(ranks).size != ranks.size:
                raise ValueError(f"query {q}: images must rise and no rank may repeat")
            for values in (index, ranks):
                if values.size and (values.min() < 0 or values.max() >= self.database_size):
                    raise ValueError(
                        f"query {q}: an image or rank outside 0 … {self.database_size - 1}"
                    )

    @classmethod
    def from_ranks(
        cls,
        ranks: np.ndarray,
        labelled: Sequence[np.ndarray],
        *,
        database_size: int | None = None,
        truncated: bool = False,
    ) -> "Positions":
        """Reads the ranks of labelled images off a ranking.

        Args:
            ranks: (K, Q) database indices, best first, one column a query.
            labelled: per query the wanted indices (`revisited.labelled`).
            database_size: None: K.
            truncated: leave out labelled images that the ranking does not reach.
        Raises:
            ValueError: an index is out of range or repeated in its column, a labelled image is
                missing, or the number of columns is not len(labelled).
        """
        ranks = np.asarray(ranks)
        if ranks.ndim != 2 or ranks.dtype.kind not in "iu" or ranks.shape[1] != len(labelled):
            raise ValueError(
                f"a ranking for {len(labelled)} queries is an integer array (images, "
                f"{len(labelled)}), one column a query, not {ranks.dtype} {ranks.shape}"
            )
        size = len(ranks) if database_size is None else database_size
        indices = [np.sort(np.asarray(index, np.int64)) for index in labelled]
        ranks_of_labelled = []
        for q, index in enumerate(indices):
            positions = _inverse(ranks[:, q], size, q)[index]
            missing = positions < 0
            if missing.any() and not truncated:
                raise ValueError(
                    f"the ranking of query {q} does not reach the labelled image "
                    f"{index[missing][0]}: give the full ranking or Positions, or set "
                    "truncated=True to count missing images as never found"
                )
            indices[q] = index[~missing]
            ranks_of_labelled.append(positions[~missing])
        return cls(indices, ranks_of_labelled, size)

    def rank(self, query: int, images: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
        """Returns the zero-based ranks (M,) int64 of images (M,) of one query; -1: not known.

        ignored: (I,) integers, labelled images that are taken out of the ranking first, so that
        later images move up; None: none.
        """
        index, ranks = self.indices[query], self.ranks[query]
        images = np.asarray(images, np.int64)
        labelled = np.isin(images, index)
        result = np.full(images.shape, -1, np.int64)
        result[labelled] = ranks[np.searchsorted(index, images[labelled])]
        return self.without(query, result, ignored)

    def without(self, query: int, ranks: np.ndarray, ignored: np.ndarray | None) -> np.ndarray:
        """Returns zero-based ranks (M,) less the number of ignored images before each."""
        if ignored is None:
            return ranks
        of_ignored = self.ranks[query][np.isin(self.indices[query], ignored)]
        return ranks - np.searchsorted(np.sort(of_ignored), ranks)

    def select(self, queries: Sequence[int]) -> "Positions":
        """Returns the positions of some queries, given by index, in this order."""
        return Positions(
            [self.indices[q] for q in queries], [self.ranks[q] for q in queries], self.database_size
        )

    def reranked(self, order: np.ndarray, reranking: Reranking) -> "Positions":
        """Returns the positions after reranking, without the ranks of unlabelled images.

        order: (K, Q) integers, the beginning of the ranking that these positions belong to. Raises
        as `rerank`.
        """
        reranked = []
        exchanges = reranking.exchanges(order)
        for index, ranks, (freed, images) in zip(self.indices, self.ranks, exchanges, strict=True):
            ranks = ranks.copy()
            _, labelled, moved = np.intersect1d(index, images, return_indices=True)
            ranks[labelled] = freed[moved]
            reranked.append(ranks)
        return Positions(self.indices, reranked, self.database_size)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes one `.npz` (flat arrays with offsets) atomically and returns its path."""
        none = np.empty(0, np.int64)
        return runs.write_arrays(
            Path(path),
            {
                "number": np.int64(self.database_size),
                "offsets": np.cumsum([0, *(index.size for index in self.indices)], dtype=np.int64),
                "indices": np.concatenate([none, *self.indices]),
                "positions": np.concatenate([none, *self.ranks]),
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Positions":
        """Reads a file written by `save`; raises FileError for another content."""
        try:
            names = ("number", "offsets", "indices", "positions")
            number, offsets, *flat = read_arrays(path, names).values()
            if any(array.dtype != np.int64 for array in (number, offsets, *flat)):
                raise ValueError("no integers")
            if flat[0].ndim != 1 or not divides(offsets, flat[0].size):
                raise ValueError("its offsets")
            return cls(*(np.split(array, offsets[1:])[:-1] for array in flat), int(number))
        except (TypeError, ValueError) as error:
            raise FileError(f"{path} does not hold positions ({error}); make it again") from error


@dataclass(frozen=True, eq=False)
class Ranking:
    """The rankings of all queries, as one stage of a run stores them.

    order: (K, Q) integers, the first K database indices of each query, best first, one column a
    query.  positions: the exact ranks of all labelled images, also beyond K.
    """

    order: np.ndarray
    positions: Positions

    @property
    def database_size(self) -> int:
        """N, the number of database images."""
        return self.positions.database_size

    @staticmethod
    def files(variant: str | None = None) -> tuple[str, str]:
        """Returns the names of the files of order and positions; None: of the global ranking."""
        if variant is None:
            return "ranks.npy", "positions.npz"
        return f"top_{variant}.npy", f"positions_{variant}.npz"

    @classmethod
    def load(cls, folder: str | os.PathLike, variant: str | None = None) -> "Ranking":
        """Opens a ranking in a stage's folder, its order memory-mapped.

        Raises FileNotFoundError, or ValueError for a file that holds something else.
        """
        order, positions = (Path(folder) / name for name in cls.files(variant))
        ranks, places = map_array(order), Positions.load(positions)
        size = len(places.indices), places.database_size
        if ranks.dtype.kind != "i" or ranks.shape[1:] != size[:1]:
            raise FileError(f"{order} holds {ranks.dtype} {ranks.shape}, no ranking: make it again")
        if ranks.size and not 0 <= ranks.min() <= ranks.max() < size[1]:
            raise FileError(f"{order} names images beyond the {size[1]} of the database")
        return cls(ranks, places)

    def save(self, folder: str | os.PathLike, variant: str | None = None) -> tuple[str, str]:
        """Writes both files into a folder and returns their names."""
        order, positions = self.files(variant)
        runs.write_array(Path(folder) / order, self.order)
        self.positions.save(Path(folder) / positions)
        return order, positions

    def rank(self, query: int, images: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
        """Returns ranks (M,) as `Positions.rank`, also of unlabelled images among the first K."""
        images = np.asarray(images, np.int64)
        ranks = self.positions.rank(query, images)
        column = np.asarray(self.order[:, query])
        unlabelled = np.flatnonzero((ranks < 0) & np.isin(images, column))
        sorter = np.argsort(column)
        ranks[unlabelled] = sorter[np.searchsorted(column, images[unlabelled], sorter=sorter)]
        return self.positions.without(query, ranks, ignored)

    def select(self, queries: Sequence[int]) -> "Ranking":
        """Returns the rankings of some queries, given by index, in this order."""
        return Ranking(self.order[:, queries], self.positions.select(queries))

    def reranked(self, reranking: Reranking) -> "Ranking":
        """Returns the ranking after reranking, order and positions. Raises as `rerank`."""
        return Ranking(reranking.apply(self.order), self.positions.reranked(self.order, reranking))


def rerank(
    ranks: np.ndarray,
    inliers: np.ndarray,
    *,
    candidates: np.ndarray,
    ground_truth: GroundTruth,
    protocol: str,
    top: int = RerankingSettings.top,
    ties: str = RerankingSettings.ties,
    fusion: Fusion | None = None,
) -> np.ndarray:
    """Sorts the candidates of one protocol by falling count or score; others keep their ranks.

    Args:
        ranks: (K, Q) integers, the global ranking, best first, one column a query.
        inliers: (Q, C) counts of `candidates` (Q, C), database indices; both padded with -1.
        protocol: "easy", "medium", "hard": the first `top` images that the protocol does not
            ignore are sorted among themselves (as in DELG); ignored images keep their ranks.
            "published": the plain first `top`, where junk counts 0 inliers.
        ties: "global": equal counts keep their global order. "published": as NumPy's unstable
            sort leaves them, which depends on its version and the processor.
        fusion: sorts by `fused_scores` of similarities and counts; None: by the counts alone.
    Returns:
        (K, Q) of the type of `ranks`.
    Raises:
        ValueError: an unknown protocol or ties, a ranking too short, or a candidate of this
            protocol that was not verified; similarities of another shape, or nan.
    """
    reranking = Reranking(candidates, inliers, ground_truth, protocol, top, ties, fusion)
    return reranking.apply(ranks)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns rows of integers of any lengths as one table (Q, C) int32, padded with -1."""
    width = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), width), NOT_VERIFIED, np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _inverse(column: np.ndarray, size: int, query: int) -> np.ndarray:
    """(size,) int64: the rank of every database image in one column, -1 where it has none."""
    if column.size and not 0 <= column.min() <= column.max() < size:
        bad = column[(column < 0) | (column >= size)][0]
        raise ValueError(
            f"the ranking of query {query} holds the index {bad}, outside the database's {size} "
            "images (state the database's size where the ranking is shorter)"
        )
    ranks = np.full(size, -1, np.int64)
    ranks[column] = np.arange(column.size)
    if np.count_nonzero(ranks >= 0) != column.size:
        values, times = np.unique(column, return_counts=True)
        raise ValueError(f"the ranking of query {query} holds image {values[times > 1][0]} twice")
    return ranks
