"""Where a run fails: a table of its queries, the worst first, and a figure that explains one."""

from collections.abc import Sequence
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
from vitgal.retrieval.matching import match
from vitgal.retrieval.ranking import Ranking
from vitgal.retrieval.verification import MIN_MATCHES
from vitgal.settings import MatchingSettings
from vitgal.stages import rerank
from vitgal.viz import galleries
from vitgal.viz.run_figures import GLOBAL_NOTEBOOK, crops_queries, query_image, ranked_image

# The orders of a failure table: column, and whether ascending.
SORTS = {"ap": ("after", True), "change": ("change", True), "miss": ("worst_rank", False)}
EXPLAINED = 6  # images that the table of a failure figure explains


def failure_table(
    run: Path,
    dataset: RetrievalDataset | str,
    by: str = "ap",
    *,
    protocol: str = "medium",
    reranked: bool = True,
) -> pd.DataFrame:
    """Lists the queries of a run, the worst first.

    Args:
        run: the run's folder.
        dataset: an opened benchmark, or the name of the run's own.
        by: "ap", the lowest AP after reranking; "change", the most AP lost by reranking; "miss",
            the positive image that ranks last. Ties keep the queries' order.
        protocol: "easy", "medium" or "hard".
        reranked: False uses only the global ranking.
    Returns:
        A row a query, indexed by the query's index: its name `query`; `before`, `after`, `change`:
        AP in [0, 1] (where nothing was reranked, `after` is `before`); `positives`, their number;
        `worst`, the name of the one that ranks last, and `worst_rank`, its rank from 1 on among
        the images that the protocol does not ignore. Queries without positives come last.
    Raises:
        ValueError: an unknown `by` or protocol.
        StageError: notebook 04 has not been run.
    """
    if by not in SORTS:
        raise ValueError(f"by is {by!r}; a failure table is sorted by {', '.join(SORTS)}")
    benchmark = _open_benchmark(run, dataset)
    truth = benchmark.ground_truth
    rankings = _open_rankings(run / benchmark.name, protocol, reranked)
    scores = [
        evaluate({protocol: ranking.positions}, truth)[protocol]["ap"] for ranking in rankings
    ]
    table = pd.DataFrame({"query": truth.queries, "before": scores[0], "after": scores[-1]})
    table["change"] = table["after"] - table["before"]
    positives, ignored = revisited.positives(truth, protocol), revisited.ignored(truth, protocol)
    table["positives"] = [len(images) for images in positives]
    worst = [
        _worst_positive(rankings[-1], query, *images)
        for query, images in enumerate(zip(positives, ignored, strict=True))
    ]
    table["worst"] = [entry and benchmark.database[entry[0]] for entry in worst]
    ranks = [pd.NA if entry is None else entry[1] for entry in worst]
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
    reranked: bool = True,
) -> Figure:
    """Draws one query's ranking before and after reranking, what moved, and why.

    The upper row shows the global ranking with similarities, the lower one the reranked one with
    inliers of matches, if there is one. A table explains the positive image that ranks last and
    those that moved farthest. Ignored images are left out, except junk, which has no rank.

    Args:
        run, dataset, protocol, reranked: as for `failure_table`.
        query_index: the query.
        columns: images in a row.
    Returns:
        The figure.
    Raises:
        ValueError: there is no such query; the message states the range.
        StageError: notebook 04 has not been run.
    """
    benchmark = _open_benchmark(run, dataset)
    folder, truth = run / benchmark.name, benchmark.ground_truth
    query = revisited.check_query(truth, query_index)
    rankings = _open_rankings(folder, protocol, reranked)
    positives, ignored = revisited.positives(truth, protocol), revisited.ignored(truth, protocol)
    skipped = np.setdiff1d(ignored[query], truth.junk[query])
    rows = [_first_images(ranking.order[:, query], skipped, columns) for ranking in rankings]
    worst = _worst_positive(rankings[-1], query, positives[query], ignored[query])
    images = list(dict.fromkeys([*sum(rows, []), *([worst[0]] if worst else [])]))
    ranks = [_counted_ranks(ranking, query, images, ignored[query]) for ranking in rankings]
    evidence = _Evidence.gather(folder, benchmark, query, images, ranks)
    captions = (evidence.similarity_caption, evidence.inlier_caption)
    names = ("before", "after") if len(rows) == 2 else ("ranking",)
    axes = galleries.stacked_rankings(
        query_image(benchmark, query, crop=crops_queries(folder)),
        {
            name: [ranked_image(benchmark, query, image, caption=caption(image)) for image in row]
            for name, row, caption in zip(names, rows, captions, strict=False)
        },
        evidence.table(benchmark, query, _explained(rows, ranks, worst)),
        columns=columns,
    )
    return axes.flat[0].figure


def _open_benchmark(run: Path, dataset: RetrievalDataset | str) -> RetrievalDataset:
    if isinstance(dataset, RetrievalDataset):
        return dataset
    return revisited.open_dataset(dataset, runs.data_folder(run, None, "benchmark"))


def _open_rankings(folder: Path, protocol: str, reranked: bool) -> list[Ranking]:
    """The global ranking of `<run>/<dataset>`, then the reranked one if there is one."""
    runs.read_stage(folder / "global", GLOBAL_NOTEBOOK)
    if protocol not in revisited.PROTOCOLS:
        names = ", ".join(revisited.PROTOCOLS)
        raise ValueError(f"unknown protocol {protocol!r}; use one of {names}")
    rankings = [Ranking.load(folder / "global")]
    if reranked and (folder / "rerank" / runs.MANIFEST).exists():
        rankings.append(Ranking.load(folder / "rerank", protocol))
    return rankings


def _worst_positive(
    ranking: Ranking, query: int, positives: np.ndarray, ignored: np.ndarray
) -> tuple[int, int] | None:
    """The positive image that ranks last and its rank from 1 on, without what is ignored."""
    if not positives.size:
        return None
    ranks = ranking.rank(query, positives, ignored)
    last = int(np.argmax(ranks))
    return int(positives[last]), int(ranks[last]) + 1


def _first_images(order: np.ndarray, skipped: np.ndarray, columns: int) -> list[int]:
    """The first images of one ranking (K,), without those that are skipped."""
    return order[~np.isin(order, skipped) & (order >= 0)][:columns].tolist()


def _counted_ranks(
    ranking: Ranking, query: int, images: Sequence[int], ignored: np.ndarray
) -> dict[int, int]:
    """Ranks from 1 on; ignored images have none."""
    ranks = ranking.rank(query, np.array(images, np.int64), ignored) + 1
    counted = ~np.isin(images, ignored) & (ranks > 0)
    return {
        image: int(rank) for image, rank, kept in zip(images, ranks, counted, strict=True) if kept
    }


def _explained(
    rows: Sequence[Sequence[int]],
    ranks: Sequence[dict[int, int]],
    worst: tuple[int, int] | None,
) -> list[int]:
    """The images to explain: the worst positive, then those that moved farthest or lead."""
    drawn = dict.fromkeys(sum(rows, []))
    ranked = [image for image in drawn if all(image in ranking for ranking in ranks)]
    ranked.sort(key=lambda image: -abs(ranks[0][image] - ranks[-1][image]))
    first = [] if worst is None else [worst[0]]
    return list(dict.fromkeys([*first, *ranked]))[:EXPLAINED]


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Why images rank as they do: database index -> value, missing where there is none.

    ranks: of the global ranking and, if there is one, the reranked ranking, from 1 on.
    """

    ranks: list[dict[int, int]]
    similarities: dict[int, float]
    matches: dict[int, int]
    inliers: dict[int, int]
    without_features: set[int]

    @classmethod
    def gather(
        cls,
        folder: Path,
        benchmark: RetrievalDataset,
        query: int,
        images: Sequence[int],
        ranks: list[dict[int, int]],
    ) -> "_Evidence":
        """Reads what the stages of `<run>/<dataset>` hold of a query and some images."""
        order, values = (
            map_array(folder / "global" / name)[:, query]
            for name in ("ranks.npy", "similarities.npy")
        )
        stored = np.isin(order, images)
        similarities = dict(zip(order[stored].tolist(), values[stored].tolist(), strict=True))
        if len(ranks) == 1:
            return cls(ranks, similarities, {}, {}, set())
        inliers = rerank.inlier_counts(folder / "rerank", query)
        store = FeatureStore.open(folder / "local")
        query_features = store[benchmark.ground_truth.queries[query]]
        parameters = runs.read_stage(folder / "rerank", "notebook 06_rerank")["parameters"]
        matching = MatchingSettings.from_manifest(parameters)
        used = slice(matching.max_keypoints)
        matches, without_features = {}, set()
        for image in sorted(set(images) & inliers.keys()):
            name = benchmark.database[image]
            if name in store and len(store[name]) and len(query_features):
                codes = query_features.descriptors[used], store[name].descriptors[used]
                matches[image] = len(match(*codes, matching.max_distance))
            else:
                without_features.add(image)
                matches[image] = 0
        return cls(ranks, similarities, matches, inliers, without_features)

    def similarity_caption(self, image: int) -> str:
        """Rank and similarity."""
        similarity = self.similarities.get(image)
        value = "" if similarity is None else f"   {similarity:.2f}"
        return f"{self.ranks[0].get(image, '–')}{value}"

    def inlier_caption(self, image: int) -> str:
        """Rank, the rank before, inliers of matches."""
        old, new = (ranks.get(image) for ranks in self.ranks)
        verified = image in self.matches
        counts = f"   {self.inliers[image]}/{self.matches[image]}" if verified else ""
        if new is None:
            return f"–{counts}"
        moved = "new" if old is None else "=" if old == new else f"{'▲' if old > new else '▼'}{old}"
        return f"{new} {moved}{counts}"

    def table(self, benchmark: RetrievalDataset, query: int, images: Sequence[int]) -> pd.DataFrame:
        """A row an image: ranks, similarity, matches, inliers, and their effect in words."""
        labels = revisited.relevance_labels(benchmark.ground_truth, query, images)
        names = [benchmark.database[image] for image in images]
        table = pd.DataFrame({"image": names, "label": labels})
        reranked = len(self.ranks) == 2
        for name, ranks in zip(
            ("rank before", "rank after") if reranked else ("rank",), self.ranks, strict=True
        ):
            table[name] = _integers(ranks, images)
        table["similarity"] = [self.similarities.get(image, np.nan) for image in images]
        if reranked:
            table["matches"] = _integers(self.matches, images)
            table["inliers"] = _integers(self.inliers, images)
            table["why"] = [self.explain(image) for image in images]
        return table

    def explain(self, image: int) -> str:
        """The effect of reranking on one image, in words."""
        before, after = (ranks.get(image) for ranks in self.ranks)
        if image not in self.matches:
            return "not on the short list: nothing verified"
        if image in self.without_features:
            return "no local features, so no inlier"
        few = f"fewer than {MIN_MATCHES} matches count as no inlier; "
        few = few if self.matches[image] < MIN_MATCHES else ""
        if before is None or after is None or before == after:
            return f"{few}keeps its place"
        if after < before:
            return f"{few}up past {before - after} with fewer inliers"
        return f"{few}down, {after - before} with more inliers pass"


def _integers(values: dict[int, int], images: Sequence[int]) -> pd.api.extensions.ExtensionArray:
    return pd.array([values.get(image, pd.NA) for image in images], dtype="Int64")
