"""Figures of a run and of one's own photographs: rankings and pairs, read from stages' files."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.photographs import read_upright
from vitgal.data.revisited import GroundTruth, RetrievalDataset
from vitgal.evaluation.protocol import mean_precision, mean_recall, positive_ranks
from vitgal.features.files import map_array
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval.ranking import Ranking
from vitgal.retrieval.verification import inspect_pair
from vitgal.runs import printable
from vitgal.settings import RerankingSettings
from vitgal.stages import rerank
from vitgal.viz import galleries, scores, style
from vitgal.viz.drawing import reduce_image
from vitgal.viz.evidence_figures import match_figure
from vitgal.viz.galleries import QueryImage, RankedImage
from vitgal.viz.matching import MatchedImage

if TYPE_CHECKING:  # the stage needs torch, its figures do not
    from vitgal.stages.own import SearchResult

GLOBAL_NOTEBOOK = "notebook 04_global_evaluation"
COLUMNS = 8  # images of a ranking
OWN_COLUMNS = 7  # the same, of one's own photographs
MOST_LINES = 60  # inliers, and rejected matches, of a drawn pair
THUMBNAIL = 1200  # pixels, the longer side of one's own photograph in a ranking


def existing_queries(truth: GroundTruth, queries: Sequence[int]) -> list[int]:
    """Returns the query indices that exist; prints the others and the valid range."""
    count = len(truth.queries)
    for query in queries:
        if not 0 <= query < count:
            name = printable(truth.name)
            print(f"query {query} is not drawn: {name} has the queries 0 to {count - 1}")
    return [query for query in queries if 0 <= query < count]


def ranking_gallery(
    benchmark: RetrievalDataset,
    ranks: np.ndarray,
    queries: Sequence[int],
    *,
    crop: bool = True,
) -> np.ndarray:
    """Draws the first COLUMNS images of some queries' rankings, a row a query.

    ranks: (K, Q) database indices, best first. queries: their indices. crop: draws the query's
    box, as it was searched with. Returns the axes, shape (queries, 1 + COLUMNS). Raises
    IndexError for a query that does not exist.
    """
    rankings = [
        ranked_images(benchmark, query, ranks[:COLUMNS, query], range(1, COLUMNS + 1))
        for query in queries
    ]
    images = [query_image(benchmark, query, crop=crop) for query in queries]
    return galleries.ranking_rows(images, rankings, columns=COLUMNS)


def reranked_gallery(benchmark: RetrievalDataset, folder: Path, query: int) -> np.ndarray:
    """Draws one query's ranking before and after reranking under Hard, without ignored images.

    Captions give the ranks that images went to or came from, and the number of inliers. folder:
    `<run>/<dataset>`, with its stages global and rerank. Returns the axes, shape (2, 1 + COLUMNS).
    Raises StageError where notebook 06 has not been run.
    """
    ignored = revisited.ignored(benchmark.ground_truth, "hard")[query]
    counts = rerank.inlier_counts(folder / "rerank", query)
    before, after = (
        ranking.order[~np.isin(ranking.order[:, query], [*ignored, -1]), query].tolist()
        for ranking in (Ranking.load(folder / "global"), Ranking.load(folder / "rerank", "hard"))
    )
    old, new = ({image: rank for rank, image in enumerate(row, 1)} for row in (before, after))
    upper, lower = [], []
    for image in before[:COLUMNS]:
        rank = new.get(image)
        left = "   ▼ out" if rank is None else f"   ▼ to {rank}" if rank > COLUMNS else ""
        upper.append(f"{old[image]}{left}")
    for image in after[:COLUMNS]:
        rank, origin = new[image], old.get(image)
        moved = "=" if origin == rank else f"{'▲' if (origin or 0) > rank else '▼'} from {origin}"
        note = f"{counts[image]} inliers" if image in counts else ""
        lower.append(f"{rank} {moved if origin else 'new'}\n{note}".strip())
    rankings = {
        "before": ranked_images(benchmark, query, before, upper),
        "after": ranked_images(benchmark, query, after, lower),
    }
    first = query_image(benchmark, query, crop=crops_queries(folder))
    return galleries.stacked_rankings(first, rankings, columns=COLUMNS)


def retrieval_figure(benchmark: RetrievalDataset, folder: Path, *, top: int) -> np.ndarray:
    """Draws how well a global ranking separates, as `scores.retrieval_curves` does.

    folder: a finished global stage. Similarities are those of the ranks that it keeps. top: the
    length of the short list. Returns the axes, shape (3,).
    """
    truth, ranking = benchmark.ground_truth, Ranking.load(folder)
    order, values = map_array(folder / "ranks.npy"), map_array(folder / "similarities.npy")
    labels = np.array([revisited.relevance_labels(truth, *pair) for pair in enumerate(order.T)])
    similarities = {label: values.T[labels == label] for label in ("easy", "hard", "negative")}
    lengths = np.unique(np.geomspace(1, ranking.database_size, 200).round().astype(int))
    precision, recall = {}, {}
    for protocol in revisited.PROTOCOLS:
        ranks = positive_ranks(ranking, truth, protocol)
        precision[protocol] = mean_precision(ranks)
        recall[protocol] = lengths, mean_recall(ranks, lengths)
    return scores.retrieval_curves(similarities, precision, recall, top=top)


def query_image(benchmark: RetrievalDataset, query: int, *, crop: bool) -> QueryImage:
    """Returns a query for `galleries`, with its box where it is cropped; IndexError if unknown."""
    truth = benchmark.ground_truth
    box = truth.boxes[query] if crop else None
    return QueryImage(benchmark.query_paths[query], box, truth.queries[query])


def ranked_images(
    benchmark: RetrievalDataset,
    query: int,
    images: Sequence[int] | np.ndarray,
    captions: Sequence[object],
) -> list[RankedImage]:
    """Returns database images (N,), given by index, for `galleries`, with their labels."""
    images = np.asarray(images, np.int64).tolist()
    labels = revisited.relevance_labels(benchmark.ground_truth, query, images)
    return [
        RankedImage(image, benchmark.database_paths[image], label, str(caption))
        for image, label, caption in zip(images, labels, captions, strict=False)
    ]


def last_positive(
    ranking: Ranking, query: int, positives: np.ndarray, ignored: np.ndarray
) -> tuple[int | None, int | None]:
    """Returns the positive image that ranks last, and its rank from 1 on without ignored images.

    positives, ignored: (P,) and (I,) database indices. Returns None and None without positives.
    """
    if not positives.size:
        return None, None
    ranks = ranking.rank(query, positives, ignored)
    last = int(np.argmax(ranks))
    return int(positives[last]), int(ranks[last]) + 1


def crops_queries(folder: Path) -> bool:
    """Returns whether the global stage of `<run>/<dataset>` described the queries' boxes alone.

    Raises StageError where notebook 04 has not been run.
    """
    parameters = runs.read_stage(folder / "global", GLOBAL_NOTEBOOK)["parameters"]
    return parameters.get("crop_queries", True)


def pair_matches(
    benchmark: RetrievalDataset,
    features: FeatureStore,
    query: int,
    image: int,
    settings: RerankingSettings,
    *,
    max_lines: int = MOST_LINES,
) -> np.ndarray:
    """Draws a query and a database image as `match_figure` does, matched as reranking does it.

    features: of both. query, image: their indices. settings: of matching and verification.
    max_lines: most inliers, and most rejected matches, that are drawn.
    """
    truth = benchmark.ground_truth
    first, second = features[truth.queries[query]], features[truth.database[image]]
    label = revisited.relevance_labels(truth, query, [image])[0]
    title = f"{benchmark.database[image]} ({label})"
    return match_figure(
        MatchedImage(benchmark.query_paths[query], first, truth.queries[query]),
        MatchedImage(benchmark.database_paths[image], second, title),
        inspect_pair(first, second, settings),
        max_lines=max_lines,
    )


def save_pair_matches(
    benchmark: RetrievalDataset,
    features: FeatureStore,
    query: int,
    images: Sequence[int],
    settings: RerankingSettings,
    folder: Path,
) -> list[Path]:
    """Writes the figure of `pair_matches` for each image as `<folder>/<query>/<image>.png`.

    Returns the paths. Raises PathError where a folder is a link.
    """
    query_folder = Path(folder) / safe_file_name(benchmark.ground_truth.queries[query])
    runs.refuse_links([*query_folder.parents[:2], query_folder])
    paths = []
    for image in images:
        axes = pair_matches(benchmark, features, query, image, settings)
        path = query_folder / f"{safe_file_name(benchmark.database[image])}.png"
        paths.append(style.save_figure(axes, path, close=True))
    return paths


def safe_file_name(name: str) -> str:
    """Returns an image name as a file name: other than word characters, `.` and `-` become `_`.

    A name of more than 200 bytes is cut and ends with a digest of the whole.
    """
    safe = re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"
    if len(safe.encode()) <= 200:
        return safe
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{safe.encode()[:180].decode(errors='ignore')}-{digest}"


def ranking_figure(result: "SearchResult") -> np.ndarray:
    """Draws the query with the first photographs by similarity, and below after reranking.

    Returns the axes, shape (2, 1 + OWN_COLUMNS).
    """
    thumbnail, factor = reduce_image(read_upright(result.path), THUMBNAIL)
    box = None if result.box is None else [side * factor for side in result.box]
    before = result.table.sort_values("global_rank").head(OWN_COLUMNS)
    after = result.table.head(OWN_COLUMNS)
    thumbnails = {
        name: reduce_image(read_upright(result.photographs.path(name)), THUMBNAIL)[0]
        for name in {*before["photograph"], *after["photograph"]}
    }
    fused = result.settings.order == "fused"
    reranked = "by similarity and inliers" if fused else f"by {result.settings.count}"

    def ranked(row: Any, rank: int, note: str) -> RankedImage:
        """Returns a photograph with its rank, name and note."""
        caption = f"{rank}   {printable(row.photograph)}{note}"
        return RankedImage(row.photograph, thumbnails[row.photograph], None, caption)

    rankings = {"by similarity": [], reranked: []}
    for row in before.itertuples():
        note = f"\nsimilarity {row.similarity:.2f}"
        rankings["by similarity"].append(ranked(row, row.global_rank, note))
    for row in after.itertuples():
        note = "" if pd.isna(row.inliers) else f"\n{row.inliers} inliers of {row.matches}"
        if not pd.isna(getattr(row, "probability", np.nan)):
            note += f", {100 * row.probability:.0f} %"
        rankings[reranked].append(ranked(row, row.rank, note))
    query = QueryImage(thumbnail, box, result.query)
    return galleries.stacked_rankings(query, rankings, columns=OWN_COLUMNS)


def pair_figure(result: "SearchResult", name: str) -> np.ndarray:
    """Draws the query and one photograph as `match_figure` does; returns the axes."""
    query, (features, pair) = result.description.features, result.pair(name)
    return match_figure(
        MatchedImage(read_upright(result.path), query, result.query),
        MatchedImage(read_upright(result.photographs.path(name)), features, name),
        pair,
        max_lines=MOST_LINES,
    )
