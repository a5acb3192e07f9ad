"""Failures of a run: a table of its queries, the worst first, and a figure for one query."""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.revisited import RetrievalDataset
from vitgal.evaluation.protocol import evaluate
from vitgal.features.files import map_array
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval.evidence import Evidence, weigh
from vitgal.retrieval.ranking import Ranking
from vitgal.retrieval.verification import MIN_MATCHES, inspect_pair
from vitgal.runs import printable
from vitgal.stages import rerank
from vitgal.viz import galleries, run_figures

# The orders of a failure table: column, and whether ascending.
SORTS = {"ap": ("after", True), "change": ("change", True), "miss": ("worst_rank", False)}
EXPLAINED = 6  # images that the table of a failure figure explains
PASSING = {  # faults of images that pass another, by `Evidence.kind`: of one, of several
    "mirrored": ("is a mirror image", "are mirror images"),
    "collapsed": ("collapsed", "collapsed"),
    "outline": ("shrank to a spot", "shrank to a spot"),
    "spread": ("lies on one spot", "lie on one spot"),
    "repeated": ("shows repeated texture", "show repeated texture"),
}


def failure_table(
    run: Path,
    benchmark: RetrievalDataset,
    by: str = "ap",
    protocol: str = "medium",
    *,
    reranked: bool = True,
) -> pd.DataFrame:
    """Lists the queries of a run, the worst first.

    Args:
        by: "ap", the lowest AP after reranking; "change", the most AP lost by reranking; "miss",
            the positive image that ranks last. Ties keep the queries' order.
        protocol: "easy", "medium" or "hard".
        reranked: False uses only the global ranking.
    Returns:
        A row a query, indexed by the query's index: `query`, its printable name; `before`,
        `after`, `change`: AP in [0, 1] (where nothing was reranked, `after` is `before`);
        `positives`, their number; `worst`, the name of the one that ranks last, and `worst_rank`,
        its rank from 1 on among the images that the protocol does not ignore. Queries without
        positives come last.
    Raises:
        ValueError: an unknown `by` or protocol.  StageError: notebook 04 has not been run.
    """
    if by not in SORTS:
        raise ValueError(f"by is {by!r}; a failure table is sorted by {', '.join(SORTS)}")
    truth = benchmark.ground_truth
    positives, ignored = revisited.positives(truth, protocol), revisited.ignored(truth, protocol)
    rankings = _rankings(run / benchmark.name, protocol, reranked)
    scores = [
        evaluate({protocol: ranking.positions}, truth)[protocol]["ap"] for ranking in rankings
    ]
    names = [printable(name) for name in truth.queries]
    table = pd.DataFrame({"query": names, "before": scores[0], "after": scores[-1]})
    table["change"] = table["after"] - table["before"]
    table["positives"] = [len(images) for images in positives]
    worst = [
        run_figures.last_positive(rankings[-1], query, *images)
        for query, images in enumerate(zip(positives, ignored, strict=True))
    ]
    table["worst"] = [
        None if image is None else printable(benchmark.database[image]) for image, _ in worst
    ]
    table["worst_rank"] = pd.array([rank for _, rank in worst], dtype="Int64")
    column, rising = SORTS[by]
    return table.sort_values(column, ascending=rising, kind="stable", na_position="last")


def failure_figure(
    run: Path,
    benchmark: RetrievalDataset,
    query_index: int,
    protocol: str = "medium",
    *,
    columns: int = 8,
    reranked: bool = True,
) -> Figure:
    """Draws one query's rankings before and after reranking, with reasons for the changes.

    The upper row shows the global ranking with similarities, the lower one the reranked one with
    inliers of matches, if there is one; each image has its name in the table. The table explains
    the positive image that ranks last and those that moved farthest: why its homography is
    implausible, or those of the images that pass it are, or that it has no more inliers than wrong
    images have. Ignored images are left out, except junk, which has no rank.
    columns: images in a row. Others and errors: as for `failure_table`; ValueError also for a query
    that does not exist.
    """
    folder, truth = run / benchmark.name, benchmark.ground_truth
    query = revisited.check_query(truth, query_index)
    positives = revisited.positives(truth, protocol)[query]
    ignored = revisited.ignored(truth, protocol)[query]
    rankings = _rankings(folder, protocol, reranked)
    skipped = np.setdiff1d(ignored, truth.junk[query])
    orders = [ranking.order[:, query] for ranking in rankings]
    rows = [row[~np.isin(row, skipped) & (row >= 0)][:columns].tolist() for row in orders]
    worst, _ = run_figures.last_positive(rankings[-1], query, positives, ignored)
    first = [] if worst is None else [worst]
    images = list(dict.fromkeys(sum(rows, first)))
    ranks = [ranking.rank(query, np.array(images, np.int64), ignored) + 1 for ranking in rankings]
    ranks = [
        pd.Series(column, images, "Int64").where(~np.isin(images, ignored) & (column > 0))
        for column in ranks
    ]
    table = _describe(folder, benchmark, query, ranks)
    if len(rankings) == 2:
        _explain(table, _Reasons.read(folder, benchmark, query, rankings, ignored))
    moved = (ranks[0] - ranks[-1]).abs().dropna().sort_values(ascending=False, kind="stable")
    explained = list(dict.fromkeys([*first, *moved.index]))[:EXPLAINED]
    names = ("before", "after") if len(rows) == 2 else ("ranking",)
    captions = (_similarity_caption, _inlier_caption)
    rankings = {
        name: run_figures.ranked_images(
            benchmark, query, row, [caption(table.loc[image]) for image in row]
        )
        for name, row, caption in zip(names, rows, captions, strict=False)
    }
    cropped = run_figures.query_image(benchmark, query, crop=run_figures.crops_queries(folder))
    axes = galleries.stacked_rankings(cropped, rankings, table.loc[explained], columns=columns)
    return axes.flat[0].figure


def _rankings(folder: Path, protocol: str, reranked: bool) -> list[Ranking]:
    """The global ranking and, where there is one and it is asked for, the reranked one."""
    runs.read_stage(folder / "global", run_figures.GLOBAL_NOTEBOOK)
    rankings = [Ranking.load(folder / "global")]
    if reranked and (folder / "rerank" / runs.MANIFEST).exists():
        rankings.append(Ranking.load(folder / "rerank", protocol))
    return rankings


def _describe(
    folder: Path, benchmark: RetrievalDataset, query: int, ranks: list[pd.Series]
) -> pd.DataFrame:
    """One row per image; `ranks` are those before and, if there is one, after reranking."""
    images = ranks[0].index
    order, values = (
        map_array(folder / "global" / name)[:, query] for name in ("ranks.npy", "similarities.npy")
    )
    similarities = pd.Series(values, order, float)[order >= 0]
    names = ("rank before", "rank after") if len(ranks) == 2 else ("rank",)
    columns = {
        "image": [printable(benchmark.database[image]) for image in images],
        "label": revisited.relevance_labels(benchmark.ground_truth, query, images),
        **dict(zip(names, ranks, strict=True)),
        "similarity": similarities.reindex(images),
    }
    return pd.DataFrame(columns, images)


def _explain(table: pd.DataFrame, reasons: "_Reasons") -> None:
    """Adds matches, inliers and the reason of each move."""
    matches = {image: seen.matches if seen else 0 for image, seen in reasons.evidence.items()}
    for name, counts in (("matches", matches), ("inliers", reasons.inliers)):
        table[name] = pd.Series(counts, dtype="Int64").reindex(table.index)
    moves = zip(table.index, table["rank before"], table["rank after"], strict=True)
    table["why"] = [reasons.reason(*move) for move in moves]


@dataclass(frozen=True, eq=False)
class _Reasons:
    """Why images moved: the verified images of one query, by database index."""

    inliers: dict[int, int]  # the stored count
    evidence: dict[int, Evidence | None]  # None without local features
    places: dict[int, tuple[int, int]]  # zero-based ranks before and after, of images that count
    fused: bool
    right: frozenset[int] = frozenset()  # where it is empty, chance explains nothing

    @functools.cached_property
    def chance(self) -> float:
        """The median of the inliers that wrong images have; nan without such images."""
        wrong = [count for image, count in self.inliers.items() if image not in self.right]
        return float(np.median(wrong)) if wrong else np.nan

    @classmethod
    def read(
        cls,
        folder: Path,
        benchmark: RetrievalDataset,
        query: int,
        rankings: list[Ranking],
        ignored: np.ndarray,
    ) -> "_Reasons":
        """Matches and verifies the query's candidates again, under the settings of reranking."""
        inliers = rerank.inlier_counts(folder / "rerank", query)
        settings = rerank.used_settings(folder / "rerank")
        store, evidence = FeatureStore.open(folder / "local"), dict.fromkeys(inliers)
        features = store[benchmark.ground_truth.queries[query]]
        for image in inliers:
            name = benchmark.database[image]
            if name in store and len(store[name]) and len(features):
                pair = inspect_pair(features, store[name], settings)
                evidence[image] = weigh(features, store[name], pair)
        images = np.setdiff1d(list(inliers), ignored).astype(np.int64)
        ranks = (ranking.rank(query, images, ignored).tolist() for ranking in rankings)
        places = dict(zip(images.tolist(), zip(*ranks, strict=True), strict=True))
        truth = benchmark.ground_truth
        right = frozenset(np.concatenate([truth.easy[query], truth.hard[query]]).tolist())
        return cls(inliers, evidence, places, settings.order == "fused", right)

    def reason(self, image: int, before: object, after: object) -> str:
        """Explains the move of an image from one rank to another; NA where it has none."""
        if image not in self.evidence:
            return "not on the short list: nothing verified"
        own = self._doubt(image)
        if self.evidence[image] is None:
            return own
        if pd.isna(before) or pd.isna(after) or before == after:
            move = "keeps its place"
        elif after < before:
            less = "a lower score" if self.fused else "fewer inliers"
            move = f"up past {before - after} with {less}"
            if self.right and image not in self.right and not own:
                own = "wrong, but its homography is plausible"
        else:
            move = self._passing(image, after - before)
        return f"{own}; {move}" if own else move

    def _doubt(self, image: int) -> str:
        """The reason not to trust the count of an image; "" where there is none."""
        evidence = self.evidence[image]
        if evidence is None:
            return "no local features, so no inlier"
        if evidence.matches < MIN_MATCHES:
            return f"fewer than {MIN_MATCHES} matches count as no inlier"
        return evidence.doubt or ("repeated texture" if evidence.repeated else "")

    def _passing(self, image: int, count: int) -> str:
        """States how many images passed one, and why most of their homographies fail."""
        more = "a higher score" if self.fused else "more inliers"
        before, after = self.places[image]
        passing = [other for other, (b, a) in self.places.items() if b > before and a < after]
        doubts = Counter(map(self._kind, passing))
        kind, number = max(
            doubts.items(), key=lambda item: (bool(item[0]), item[1]), default=("", 0)
        )
        if not kind:
            own, usual = self.inliers[image], 1.5 * self.chance
            known = image in self.right and own <= usual
            cause = f": no more inliers than by chance ({self.chance:.0f})" if known else ""
            return f"down, {count} with {more} pass{cause}"
        first = min((i for i in passing if self._kind(i) == kind), key=lambda i: self.places[i][1])
        example = self._doubt(first).removeprefix("collapsed ") if kind == "collapsed" else ""
        example = f", the first {example}" if example else ""
        return f"down, {number} of {count} that pass {PASSING[kind][number > 1]}{example}"

    def _kind(self, image: int) -> str:
        evidence = self.evidence[image]
        if evidence is None:
            return ""
        return evidence.kind or ("repeated" if evidence.repeated else "")


def _similarity_caption(row: pd.Series) -> str:
    rank = row["rank before"] if "rank before" in row else row["rank"]
    value = "" if pd.isna(row["similarity"]) else f"   {row['similarity']:.2f}"
    return f"{'–' if pd.isna(rank) else rank}{value}\n{row['image']}"


def _inlier_caption(row: pd.Series) -> str:
    old, new = row["rank before"], row["rank after"]
    counts = "" if pd.isna(row["matches"]) else f"   {row['inliers']}/{row['matches']}"
    known = not pd.isna(old) and not pd.isna(new)
    moved = "" if not known else " =" if old == new else f" ▲{old}" if old > new else f" ▼{old}"
    rank_text = "–" if pd.isna(new) else f"{new} new" if pd.isna(old) else f"{new}{moved}"
    return f"{rank_text}{counts}\n{row['image']}"
