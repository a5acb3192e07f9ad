"""Figures of a run: `plots` fed from a benchmark and the files of a run's stages."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.revisited import GroundTruth, RetrievalDataset
from vitgal.evaluation import protocol as evaluation_protocol
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval import matching as retrieval_matching
from vitgal.retrieval import pairs as retrieval_pairs
from vitgal.retrieval import verification
from vitgal.retrieval.ranking import Positions
from vitgal.stages import rerank
from vitgal.viz import failure_figure as viz_failure_figure
from vitgal.viz import matching, paths, style
from vitgal.viz import rankings as viz_rankings

# What a failure table is sorted by: its column, and whether the least comes first
SORTS = {"ap": ("after", True), "change": ("change", True), "miss": ("worst_rank", False)}
NAMES = {1: ("ranking",), 2: ("before", "after")}  # of the rows of a failure's figure
REASONS = 6  # images that a failure's table explains


def rankings(
    benchmark: RetrievalDataset,
    ranks: np.ndarray,
    queries: Sequence[int],
    *,
    columns: int = 8,
    crop: bool = True,
) -> np.ndarray:
    """The first images of some queries' rankings, a row a query.

    ranks: (K, Q) database indices, best first. queries: their indices. crop: draw the query's box,
    as it was searched with. Returns the axes of `plots.galleries`; IndexError for an unknown query.
    """
    truth = benchmark.ground_truth
    shown = [ranks[:columns, query] for query in queries]
    return viz_rankings.galleries(
        [benchmark.query_paths[query] for query in queries],
        [truth.boxes[query] if crop else None for query in queries],
        [[benchmark.database_paths[image] for image in images] for images in shown],
        [
            viz_rankings.relevance(truth, query, images)
            for query, images in zip(queries, shown, strict=True)
        ],
        query_titles=[truth.queries[query] for query in queries],
        columns=columns,
    )


def known_queries(truth: GroundTruth, queries: Sequence[int]) -> list[int]:
    """Those of these queries that the ground truth has; says which it has not, and the range."""
    known = [query for query in queries if 0 <= query < len(truth.queries)]
    for query in queries:
        if query not in known:
            last = len(truth.queries) - 1
            print(f"query {query} is not drawn: {truth.name} has the queries 0 to {last}")
    return known


def reranked(
    benchmark: RetrievalDataset,
    folder: Path,
    query: int,
    *,
    protocol: str = "hard",
    columns: int = 8,
    crop: bool = True,
) -> np.ndarray:
    """One query's ranking before and after reranking, without what the protocol ignores.

    folder: `<run>/<dataset>`, with its stages global and rerank. The note under an image of the
    second row is its number of inliers. Returns the axes of `plots.before_after`.
    """
    truth = benchmark.ground_truth
    skipped = revisited.ignored(truth, protocol)[query]
    both = (folder / "global" / "ranks.npy", folder / "rerank" / f"top_{protocol}.npy")
    before, after = (np.load(path, mmap_mode="r")[:, query] for path in both)
    before, after = (ranking[~np.isin(ranking, skipped)] for ranking in (before, after))
    before, after = (ranking[ranking >= 0].tolist() for ranking in (before, after))
    counts = rerank.inlier_counts(folder / "rerank", query)
    drawn = {*before[:columns], *after[:columns]}
    return viz_rankings.before_after(
        benchmark.query_paths[query],
        truth.boxes[query] if crop else None,
        {image: benchmark.database_paths[image] for image in drawn},
        dict(zip(drawn, viz_rankings.relevance(truth, query, list(drawn)), strict=True)),
        before,
        after,
        notes={image: f"{counts[image]} inliers" for image in drawn if image in counts},
        query_title=truth.queries[query],
        columns=columns,
    )


def pair(
    benchmark: RetrievalDataset,
    features: FeatureStore,
    query: int,
    image: int,
    *,
    crop: bool = True,
    max_lines: int = 60,
    **options: Any,
) -> Axes:
    """Matches and inliers of a query and a database image, matched and verified as in reranking.

    features: the store of both. image: its database index. options: `reranking.inspect_pair`'s.
    Returns the axes of `plots.matches`.
    """
    truth = benchmark.ground_truth
    one, other = rerank.pair_features(features, truth, query, image)
    found = retrieval_pairs.inspect_pair(one, other, **options)
    homography = found.verification.homography
    if homography is not None:
        homography = matching.homography_to_pixels(homography, one, other)
    label = viz_rankings.relevance(truth, query, [image])[0]
    return matching.matches(
        benchmark.query_paths[query],
        benchmark.database_paths[image],
        one.original_keypoints(),
        other.original_keypoints(),
        found.matches,
        found.verification.inliers,
        homography=homography,
        box=truth.boxes[query] if crop else None,
        max_lines=max_lines,
        titles=(truth.queries[query], f"{benchmark.database[image]} ({label})"),
    )


def save_pairs(
    benchmark: RetrievalDataset,
    features: FeatureStore,
    query: int,
    images: Sequence[int],
    folder: Path,
    **options: Any,
) -> list[Path]:
    """Writes `pair`'s figure of each image as `<folder>/<query>/<image>.png`; returns the paths."""
    name = safe_name(benchmark.ground_truth.queries[query])
    return [
        style.save(
            pair(benchmark, features, query, image, **options),
            Path(folder) / name / f"{safe_name(benchmark.database[image])}.png",
            close=True,
        )
        for image in images
    ]


def safe_name(name: str) -> str:
    """An image name as one file name: whatever could lead to another folder becomes `_`."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"


def failure_table(
    run: Path,
    dataset: RetrievalDataset | str,
    by: str = "ap",
    *,
    protocol: str = "medium",
    reranked: bool = True,
) -> pd.DataFrame:
    """A run's queries under one protocol, the greatest failure first.

    Args:
        run: the run's folder. dataset: an opened benchmark, or the name of one of the run's own.
        by: "ap", the lowest AP after reranking; "change", the most AP lost by reranking; "miss",
            the positive image that ranks farthest behind. Equal ones stand in the queries' order.
        reranked: False looks at the global ranking alone, also where a reranked one is there.
    Returns:
        A row a query, indexed by the query's index: its name `query`; `before`, `after`, `change`:
        AP in [0, 1] (where nothing was reranked, `after` is `before`); `positives`, how many there
        are; `worst`, the name of the one that ranks last, and `worst_rank`, its rank from 1 on
        among the images that the protocol does not ignore. Queries without positives come last.
    Raises:
        ValueError: an unknown `by` or protocol.  StageError: notebook 04 has not been run.
    """
    if by not in SORTS:
        raise ValueError(f"by is {by!r}; a failure table is sorted by {', '.join(SORTS)}")
    benchmark = _opened(run, dataset)
    truth = benchmark.ground_truth
    ranking = _Ranking.read(run / benchmark.name, protocol, reranked)
    scores = [
        evaluation_protocol.evaluate({protocol: one}, truth)[protocol]["ap"]
        for one in ranking.positions
    ]
    table = pd.DataFrame({"query": truth.queries, "before": scores[0], "after": scores[-1]})
    table["change"] = table["after"] - table["before"]
    table["positives"] = [len(images) for images in revisited.positives(truth, protocol)]
    worst = [_worst(ranking.positions[-1], truth, protocol, q) for q in range(len(truth.queries))]
    table["worst"] = [None if one is None else benchmark.database[one[0]] for one in worst]
    ranks = [pd.NA if one is None else one[1] for one in worst]
    table["worst_rank"] = pd.array(ranks, dtype="Int64")
    column, rising = SORTS[by]
    return table.sort_values(column, ascending=rising, kind="stable", na_position="last")


def failure_figure(
    run: Path,
    dataset: RetrievalDataset | str,
    query_index: int,
    *,
    protocol: str = "medium",
    columns: int = 8,
    crop: bool = True,
    reranked: bool = True,
) -> Figure:
    """One query's ranking before and after reranking, what moved, and why.

    The query with its box; the first `columns` images of both rankings in their frames, the upper
    row with similarities, the lower one with inliers of matches; below, the positive image that
    ranks last and what moved farthest, in numbers and words. Images that the protocol ignores are
    left out, but for junk, which is shown without a rank. Without a reranked result: one row.

    Args as `failure_table`; columns: images in a row. crop: draw the query's box, as searched with.
    The figure is pyplot's, as all of `plots`.
    Raises:
        ValueError: there is no such query; the message states the range.
        StageError: notebook 04 has not been run.
    """
    benchmark = _opened(run, dataset)
    truth, folder = benchmark.ground_truth, run / benchmark.name
    query = revisited.check_query(truth, query_index)
    ranking = _Ranking.read(folder, protocol, reranked)
    lists = [ranking.images(truth, place, query) for place in range(len(ranking.positions))]
    places = [_ranks(images, truth, query) for images in lists]
    told = _telling(lists, places, columns, _worst(ranking.positions[-1], truth, protocol, query))
    drawn = {image for images in lists for image in images[:columns]}
    shown = drawn | set(told)
    evidence = _Evidence.gather(folder, truth, benchmark.database, query, shown, len(lists) == 2)
    captions = [[(image, _first_caption(image, places, evidence)) for image in lists[0][:columns]]]
    if len(lists) == 2:
        lower = [(image, _second_caption(image, places, evidence)) for image in lists[1][:columns]]
        captions.append(lower)
    labels = dict(zip(drawn, viz_rankings.relevance(truth, query, list(drawn)), strict=True))
    axes = viz_failure_figure.failure(
        benchmark.query_paths[query],
        truth.boxes[query] if crop else None,
        {image: benchmark.database_paths[image] for image in drawn},
        labels,
        dict(zip(NAMES[len(lists)], captions, strict=True)),
        _reasons(told, places, evidence, benchmark, query),
        query_title=truth.queries[query],
    )
    return axes.flat[0].figure


def _opened(run: Path, dataset: RetrievalDataset | str) -> RetrievalDataset:
    if isinstance(dataset, RetrievalDataset):
        return dataset
    return revisited.open_dataset(dataset, runs.data_folder(run, None, "benchmark"))


@dataclass(frozen=True, eq=False)
class _Ranking:
    """A data set's rankings in one run: the global one, then the reranked one if there is one."""

    protocol: str
    positions: list[Positions]
    ranks: list[np.ndarray]  # (K, Q) each

    @classmethod
    def read(cls, folder: Path, protocol: str, reranked: bool) -> "_Ranking":
        runs.read_stage(folder / "global", "notebook 04_global_evaluation")
        places, ranks = [folder / "global" / "positions.npz"], [folder / "global" / "ranks.npy"]
        if protocol not in revisited.PROTOCOLS:
            known = ", ".join(revisited.PROTOCOLS)
            raise ValueError(f"unknown protocol {protocol!r}; use one of {known}")
        if reranked and (folder / "rerank" / runs.MANIFEST).exists():
            places.append(folder / "rerank" / f"positions_{protocol}.npz")
            ranks.append(folder / "rerank" / f"top_{protocol}.npy")
        positions = [Positions.load(path) for path in places]
        return cls(protocol, positions, [np.load(path, mmap_mode="r") for path in ranks])

    def images(self, truth: GroundTruth, place: int, query: int) -> list[int]:
        """One ranking's images, best first, without what is ignored and is not junk."""
        column = self.ranks[place][:, query]
        skipped = revisited.ignored(truth, self.protocol)[query]
        skipped = np.setdiff1d(skipped, truth.junk[query])
        return column[~np.isin(column, skipped) & (column >= 0)].tolist()


def _worst(
    positions: Positions, truth: GroundTruth, protocol: str, query: int
) -> tuple[int, int] | None:
    """The positive image that ranks last and its rank from 1 on, without what is ignored."""
    images = revisited.positives(truth, protocol)[query]
    if not images.size:
        return None
    index, place = positions.indices[query], positions.ranks[query]
    ranks = place[np.searchsorted(index, images)]
    skipped = np.sort(place[np.isin(index, revisited.ignored(truth, protocol)[query])])
    last = int(np.argmax(ranks))
    return int(images[last]), int(ranks[last] - np.searchsorted(skipped, ranks[last]) + 1)


def _ranks(images: Sequence[int], truth: GroundTruth, query: int) -> dict[int, int]:
    """Ranks from 1 on; junk has none."""
    junk = set(truth.junk[query].tolist())
    counted = [image for image in images if image not in junk]
    return {image: rank for rank, image in enumerate(counted, 1)}


def _telling(
    lists: Sequence[Sequence[int]],
    places: Sequence[dict[int, int]],
    columns: int,
    worst: tuple[int, int] | None,
) -> list[int]:
    """The images to explain: the worst positive, then what moved farthest, or else what leads."""
    seen = list(dict.fromkeys(image for images in lists for image in images[:columns]))
    seen = [image for image in seen if all(image in one for one in places)]
    seen.sort(key=lambda image: -abs(places[0][image] - places[-1][image]))
    first = [] if worst is None else [worst[0]]
    return list(dict.fromkeys([*first, *seen]))[:REASONS]


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What is known of a query and some database images: by image, missing where it is not."""

    similarities: dict[int, float]
    matches: dict[int, int]
    inliers: dict[int, int]
    bare: set[int]  # images without local features

    @classmethod
    def gather(
        cls,
        folder: Path,
        truth: GroundTruth,
        database: Sequence[str],
        query: int,
        images: set[int],
        reranked: bool,
    ) -> "_Evidence":
        ranks, values = (
            np.load(folder / "global" / name, mmap_mode="r")[:, query]
            for name in ("ranks.npy", "similarities.npy")
        )
        known = np.isin(ranks, sorted(images))
        similarities = dict(zip(ranks[known].tolist(), values[known].tolist(), strict=True))
        if not reranked:
            return cls(similarities, {}, {}, set())
        inliers = rerank.inlier_counts(folder / "rerank", query)
        store = FeatureStore.open(folder / "local")
        ours = store[truth.queries[query]]
        options = runs.read_stage(folder / "rerank", "notebook 06_rerank")["parameters"]
        matches, bare = {}, set()
        for image in sorted(images & inliers.keys()):
            name = database[image]
            theirs = store[name] if name in store else None
            if theirs is None or not len(theirs) or not len(ours):
                bare.add(image)
                matches[image] = 0
            else:
                kept = slice(options["max_keypoints"])
                both = ours.descriptors[kept], theirs.descriptors[kept]
                matches[image] = len(retrieval_matching.match(*both, options["max_distance"]))
        return cls(similarities, matches, inliers, bare)


def _first_caption(image: int, places: Sequence[dict[int, int]], evidence: _Evidence) -> str:
    """Rank and similarity."""
    similarity = evidence.similarities.get(image)
    shown = "" if similarity is None else f"   {similarity:.2f}"
    return f"{places[0].get(image, '–')}{shown}"


def _second_caption(image: int, places: Sequence[dict[int, int]], evidence: _Evidence) -> str:
    """Rank, where it came from, inliers of matches."""
    old, new = (one.get(image) for one in places)
    counted = image in evidence.matches
    shown = f"   {evidence.inliers[image]}/{evidence.matches[image]}" if counted else ""
    if new is None:
        return f"–{shown}"
    came = "new" if old is None else "=" if old == new else f"{'▲' if old > new else '▼'}{old}"
    return f"{new} {came}{shown}"


def _reasons(
    images: Sequence[int],
    places: Sequence[dict[int, int]],
    evidence: _Evidence,
    benchmark: RetrievalDataset,
    query: int,
) -> pd.DataFrame:
    """A line an image: its ranks, similarity, matches and inliers, and in words what they did."""
    labels = viz_rankings.relevance(benchmark.ground_truth, query, images)
    table = pd.DataFrame(
        {"image": [benchmark.database[image] for image in images], "label": labels}
    )
    for name, ranks in zip(("rank before", "rank after"), places, strict=False):
        name = name if len(places) == 2 else "rank"
        table[name] = pd.array([ranks.get(image, pd.NA) for image in images], dtype="Int64")
    table["similarity"] = [evidence.similarities.get(image, np.nan) for image in images]
    if len(places) == 2:
        for name in ("matches", "inliers"):
            known = getattr(evidence, name)
            table[name] = pd.array([known.get(image, pd.NA) for image in images], dtype="Int64")
        table["why"] = [_why(image, places, evidence) for image in images]
    return table


def _why(image: int, places: Sequence[dict[int, int]], evidence: _Evidence) -> str:
    before, after = places[0].get(image), places[1].get(image)
    if image not in evidence.matches:
        return "not on the short list: nothing verified"
    if image in evidence.bare:
        return "no local features, so no inlier"
    few = f"fewer than {verification.MIN_MATCHES} matches count as no inlier; "
    few = few if evidence.matches[image] < verification.MIN_MATCHES else ""
    if before is None or after is None or before == after:
        return f"{few}keeps its place"
    if after < before:
        return f"{few}up past {before - after} with fewer inliers"
    return f"{few}down, {after - before} with more inliers pass"


def global_path(folder: Path, *, size: int, scales: Sequence[float] = (1.0,)) -> Axes:
    """How a photograph becomes a global descriptor and a place in a ranking, step by step.

    folder: a finished global stage, whose shapes are shown. size: pixels of the network's square
    input at scale 1. Returns the axes of `plots.tensor_path`.
    """
    images, width = np.load(folder / "database.npy", mmap_mode="r").shape
    side = size // 16
    return paths.tensor_path(
        [
            ("photograph", "H × W × 3", "cut to the query's box"),
            ("network input", f"{size} × {size} × 3", "about; resized, normalised"),
            ("patches", f"{side * side} × {width}", "16 × 16 pixels each"),
            ("XCiT, 12 or 24 blocks", f"{side * side} × {width}", "cross-covariance attention"),
            ("multi-atrous", f"{side * side} × {width}", "five dilations and the mean"),
            ("class token joins", f"{side * side + 1} × {width}", "learnt"),
            ("class attention, twice", f"1 × {width}", "the token looks at the patches"),
            (f"mean of {len(scales)} scale(s)", f"{width}", "each of length 1, and so the mean"),
            ("similarities", f"{images:,}", "inner products with the database"),
            ("ranking", f"{images:,}", "sorted; ties by index"),
        ]
    )


def rerank_path(benchmark: RetrievalDataset, folder: Path, query: int, **options: Any) -> Axes:
    """How a query and its first candidate become a number of inliers, with their own numbers.

    folder: `<run>/<dataset>` with global and local finished. options: `reranking.inspect_pair`'s.
    Returns the axes of `plots.tensor_path`. Raises ValueError for an unknown query.
    """
    truth = benchmark.ground_truth
    query = revisited.check_query(truth, query)
    store = FeatureStore.open(folder / "local")
    ours = store[truth.queries[query]]
    ranks = np.load(folder / "global" / "ranks.npy", mmap_mode="r")[:, query].tolist()
    image = next((image for image in ranks if benchmark.database[image] in store), None)
    theirs = ours if image is None else store[benchmark.database[image]]
    found = retrieval_pairs.inspect_pair(ours, theirs, **options)
    pairs = len(found.matches)
    return paths.tensor_path(
        [
            ("query's features", f"{len(ours)} × {ours.code_dim}", "codes; places (x, y) beside"),
            ("candidate's features", f"{len(theirs)} × {theirs.code_dim}", "the first candidate's"),
            ("distances", f"{len(ours)} × {len(theirs)}", "Euclidean, between codes"),
            ("matches", f"{pairs} × 2", "nearest, within max_distance"),
            ("places of matches", f"{pairs} × 4", "x y in both network inputs"),
            ("homography", "3 × 3", "the best of `iterations` draws"),
            ("inliers", f"{found.verification.count} of {pairs}", "mapped within the threshold"),
            ("short list", f"{len(ranks):,} ranks", "the first `top` sorted by inliers"),
        ]
    )
