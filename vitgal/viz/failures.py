"""Failures of a run: a table of its queries, the worst first, and a figure for one query."""

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
from vitgal.runs import printable
from vitgal.settings import MatchingSettings
from vitgal.stages import rerank
from vitgal.viz import galleries
from vitgal.viz.run_figures import GLOBAL_NOTEBOOK, crops_queries, query_image, ranked_images

# The orders of a failure table: column, and whether ascending.
SORTS = {"ap": ("after", True), "change": ("change", True), "miss": ("worst_rank", False)}
EXPLAINED = 6  # images that the table of a failure figure explains


def failure_table(
    run: Path,
    dataset: RetrievalDataset | str,
    by: str = "ap",
    protocol: str = "medium",
    *,
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
        A row a query, indexed by the query's index: `query`, its printable name; `before`,
        `after`, `change`: AP in [0, 1] (where nothing was reranked, `after` is `before`);
        `positives`, their number; `worst`, the name of the one that ranks last, and `worst_rank`,
        its rank from 1 on among the images that the protocol does not ignore. Queries without
        positives come last.
    Raises:
        ValueError: an unknown `by` or protocol.
        StageError: notebook 04 has not been run.
    """
    if by not in SORTS:
        raise ValueError(f"by is {by!r}; a failure table is sorted by {', '.join(SORTS)}")
    benchmark, rankings = _open(run, dataset, protocol, reranked)
    truth = benchmark.ground_truth
    scores = [
        evaluate({protocol: ranking.positions}, truth)[protocol]["ap"] for ranking in rankings
    ]
    names = [printable(name) for name in truth.queries]
    table = pd.DataFrame({"query": names, "before": scores[0], "after": scores[-1]})
    table["change"] = table["after"] - table["before"]
    positives, ignored = revisited.positives(truth, protocol), revisited.ignored(truth, protocol)
    table["positives"] = [len(images) for images in positives]
    worst = [
        _worst_positive(rankings[-1], query, *images)
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
    dataset: RetrievalDataset | str,
    query_index: int,
    protocol: str = "medium",
    *,
    columns: int = 8,
    reranked: bool = True,
) -> Figure:
    """Draws one query's rankings before and after reranking, with reasons for the changes.

    The upper row shows the global ranking with similarities, the lower one the reranked one with
    inliers of matches, if there is one. A table explains the positive image that ranks last and
    those that moved farthest. Ignored images are left out, except junk, which has no rank.
    columns: images in a row. Others and errors: as for `failure_table`; ValueError also for a query
    that does not exist.
    """
    benchmark, rankings = _open(run, dataset, protocol, reranked)
    folder, truth = run / benchmark.name, benchmark.ground_truth
    query = revisited.check_query(truth, query_index)
    positives = revisited.positives(truth, protocol)[query]
    ignored = revisited.ignored(truth, protocol)[query]
    skipped = np.setdiff1d(ignored, truth.junk[query])
    orders = [ranking.order[:, query] for ranking in rankings]
    rows = [row[~np.isin(row, skipped) & (row >= 0)][:columns].tolist() for row in orders]
    worst, _ = _worst_positive(rankings[-1], query, positives, ignored)
    first = [] if worst is None else [worst]
    images = list(dict.fromkeys(sum(rows, first)))
    ranks = [ranking.rank(query, np.array(images, np.int64), ignored) + 1 for ranking in rankings]
    ranks = [
        pd.Series(column, images, "Int64").where(~np.isin(images, ignored) & (column > 0))
        for column in ranks
    ]
    table = _explain(folder, benchmark, query, ranks)
    moved = (ranks[0] - ranks[-1]).abs().dropna().sort_values(ascending=False, kind="stable")
    explained = list(dict.fromkeys([*first, *moved.index]))[:EXPLAINED]
    names = ("before", "after") if len(rows) == 2 else ("ranking",)
    captions = (_similarity_caption, _inlier_caption)
    rankings = {
        name: ranked_images(benchmark, query, row, [caption(table.loc[image]) for image in row])
        for name, row, caption in zip(names, rows, captions, strict=False)
    }
    cropped = query_image(benchmark, query, crop=crops_queries(folder))
    axes = galleries.stacked_rankings(cropped, rankings, table.loc[explained], columns=columns)
    return axes.flat[0].figure


def _open(
    run: Path, dataset: RetrievalDataset | str, protocol: str, reranked: bool
) -> tuple[RetrievalDataset, list[Ranking]]:
    if not isinstance(dataset, RetrievalDataset):
        dataset = revisited.open_dataset(dataset, runs.data_folder(run, None, "benchmark"))
    folder = run / dataset.name
    runs.read_stage(folder / "global", GLOBAL_NOTEBOOK)
    if protocol not in revisited.PROTOCOLS:
        names = ", ".join(revisited.PROTOCOLS)
        raise ValueError(f"unknown protocol {protocol!r}; use one of {names}")
    rankings = [Ranking.load(folder / "global")]
    if reranked and (folder / "rerank" / runs.MANIFEST).exists():
        rankings.append(Ranking.load(folder / "rerank", protocol))
    return dataset, rankings


def _worst_positive(
    ranking: Ranking, query: int, positives: np.ndarray, ignored: np.ndarray
) -> tuple[int | None, int | None]:
    """The positive image that ranks last and its rank from 1 on, without ignored images."""
    if not positives.size:
        return None, None
    ranks = ranking.rank(query, positives, ignored)
    last = int(np.argmax(ranks))
    return int(positives[last]), int(ranks[last]) + 1


def _explain(
    folder: Path, benchmark: RetrievalDataset, query: int, ranks: list[pd.Series]
) -> pd.DataFrame:
    """Explains images, a row each; `ranks` are before and, if there is one, after reranking."""
    images = ranks[0].index
    table = pd.DataFrame(index=images)
    table["image"] = [printable(benchmark.database[image]) for image in images]
    table["label"] = revisited.relevance_labels(benchmark.ground_truth, query, images)
    for name, column in zip(
        ("rank before", "rank after") if len(ranks) == 2 else ("rank",), ranks, strict=True
    ):
        table[name] = column
    order, values = (
        map_array(folder / "global" / name)[:, query] for name in ("ranks.npy", "similarities.npy")
    )
    stored = np.isin(order, images)
    similarities = dict(zip(order[stored].tolist(), values[stored].tolist(), strict=True))
    table["similarity"] = images.map(similarities).astype(float)
    if len(ranks) == 1:
        return table
    inliers = rerank.inlier_counts(folder / "rerank", query)
    matches = _count_matches(folder, benchmark, query, [i for i in images if i in inliers])
    for name, counts in (("matches", matches), ("inliers", inliers)):
        table[name] = pd.array([counts.get(image, pd.NA) for image in images], dtype="Int64")
    table["matches"] = table["matches"].clip(lower=0)
    table["why"] = [
        _reason(before, after, matches.get(image))
        for image, before, after in zip(images, *ranks, strict=True)
    ]
    return table


def _count_matches(
    folder: Path, benchmark: RetrievalDataset, query: int, images: list[int]
) -> dict[int, int]:
    """Database index -> matches with the query; -1 where one has no local feature."""
    store = FeatureStore.open(folder / "local")
    features = store[benchmark.ground_truth.queries[query]]
    parameters = runs.read_stage(folder / "rerank", "notebook 06_rerank")["parameters"]
    settings = MatchingSettings.from_manifest(parameters)
    used, counts = slice(settings.max_keypoints), {}
    for image in images:
        name = benchmark.database[image]
        counts[image] = -1
        if name in store and len(store[name]) and len(features):
            codes = features.descriptors[used], store[name].descriptors[used]
            counts[image] = len(match(*codes, settings.max_distance))
    return counts


def _reason(before: object, after: object, matches: int | None) -> str:
    if matches is None:
        return "not on the short list: nothing verified"
    if matches < 0:
        return "no local features, so no inlier"
    few = f"fewer than {MIN_MATCHES} matches count as no inlier; " if matches < MIN_MATCHES else ""
    if pd.isna(before) or pd.isna(after) or before == after:
        return f"{few}keeps its place"
    if after < before:
        return f"{few}up past {before - after} with fewer inliers"
    return f"{few}down, {after - before} with more inliers pass"


def _similarity_caption(row: pd.Series) -> str:
    rank = row["rank before"] if "rank before" in row else row["rank"]
    value = "" if pd.isna(row["similarity"]) else f"   {row['similarity']:.2f}"
    return f"{'–' if pd.isna(rank) else rank}{value}"


def _inlier_caption(row: pd.Series) -> str:
    old, new = row["rank before"], row["rank after"]
    counts = "" if pd.isna(row["matches"]) else f"   {row['inliers']}/{row['matches']}"
    if pd.isna(new):
        return f"–{counts}"
    if pd.isna(old):
        return f"{new} new{counts}"
    moved = "=" if old == new else f"▲{old}" if old > new else f"▼{old}"
    return f"{new} {moved}{counts}"
