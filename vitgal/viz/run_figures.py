"""Figures of a run: its rankings, pairs and computations, read from the files of its stages."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.revisited import GroundTruth, RetrievalDataset
from vitgal.features.files import map_array
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval.ranking import Ranking
from vitgal.retrieval.verification import inspect_pair
from vitgal.settings import GlobalSettings, RerankingSettings
from vitgal.stages import rerank
from vitgal.viz import diagrams, galleries, matching, style
from vitgal.viz.diagrams import Step
from vitgal.viz.galleries import QueryImage, RankedImage

GLOBAL_NOTEBOOK = "notebook 04_global_evaluation"


def existing_queries(truth: GroundTruth, queries: Sequence[int]) -> list[int]:
    """Returns those query indices that exist; prints which do not, and the range."""
    existing = [query for query in queries if 0 <= query < len(truth.queries)]
    for query in queries:
        if query not in existing:
            last = len(truth.queries) - 1
            print(f"query {query} is not drawn: {truth.name} has the queries 0 to {last}")
    return existing


def ranking_gallery(
    benchmark: RetrievalDataset,
    ranks: np.ndarray,
    queries: Sequence[int],
    *,
    columns: int = 8,
    crop: bool = True,
) -> np.ndarray:
    """Draws the first images of some queries' rankings, a row a query.

    ranks: (K, Q) database indices, best first. queries: their indices. crop: draws the query's
    box, as it was searched with. Returns the axes, shape (queries, 1 + columns). Raises
    IndexError for a query that does not exist.
    """
    return galleries.ranking_rows(
        [query_image(benchmark, query, crop=crop) for query in queries],
        [
            [
                ranked_image(benchmark, query, image, caption=str(rank))
                for rank, image in enumerate(ranks[:columns, query].tolist(), 1)
            ]
            for query in queries
        ],
        columns=columns,
    )


def reranked_gallery(
    benchmark: RetrievalDataset,
    folder: Path,
    query: int,
    *,
    protocol: str = "hard",
    columns: int = 8,
) -> np.ndarray:
    """Draws one query's ranking before and after reranking, without what the protocol ignores.

    The note under an image of the second row is its number of inliers. folder:
    `<run>/<dataset>`, with its stages global and rerank. Returns the axes, shape (2, 1 +
    columns). Raises StageError where notebook 06 has not been run.
    """
    ignored = revisited.ignored(benchmark.ground_truth, protocol)[query]
    counts = rerank.inlier_counts(folder / "rerank", query)
    rankings = []
    for ranking in (Ranking.load(folder / "global"), Ranking.load(folder / "rerank", protocol)):
        column = ranking.order[:, query]
        images = column[~np.isin(column, ignored) & (column >= 0)].tolist()
        notes = [f"{counts[image]} inliers" if image in counts else "" for image in images]
        rankings.append(
            [
                ranked_image(benchmark, query, image, caption=note)
                for image, note in zip(images, notes, strict=True)
            ]
        )
    crop = crops_queries(folder)
    return galleries.before_after(
        query_image(benchmark, query, crop=crop), *rankings, columns=columns
    )


def query_image(benchmark: RetrievalDataset, query: int, *, crop: bool) -> QueryImage:
    """Returns a query for `galleries`, with its box where it is cropped; IndexError if unknown."""
    truth = benchmark.ground_truth
    box = truth.boxes[query] if crop else None
    return QueryImage(benchmark.query_paths[query], box, truth.queries[query])


def ranked_image(
    benchmark: RetrievalDataset, query: int, image: int, *, caption: str
) -> RankedImage:
    """Returns a database image, given by index, for `galleries`, with its label for the query."""
    label = revisited.relevance_labels(benchmark.ground_truth, query, [image])[0]
    return RankedImage(image, benchmark.database_paths[image], label, caption)


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
    max_lines: int = 60,
) -> Axes:
    """Draws matches and inliers of a query and a database image, as reranking counts them.

    Args:
        benchmark: the images and their labels.
        features: the local features of both.
        query, image: indices of the query and of the database image.
        settings: of matching and verification.
        max_lines: most inliers, and most rejected matches, that are drawn.
    """
    truth = benchmark.ground_truth
    query_features, image_features = rerank.pair_features(features, truth, query, image)
    label = revisited.relevance_labels(truth, query, [image])[0]
    title = f"{benchmark.database[image]} ({label})"
    return matching.match_lines(
        matching.MatchedImage(benchmark.query_paths[query], query_features, truth.queries[query]),
        matching.MatchedImage(benchmark.database_paths[image], image_features, title),
        inspect_pair(
            query_features,
            image_features,
            settings,
        ),
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

    Returns the paths.
    """
    paths = []
    for image in images:
        axes = pair_matches(benchmark, features, query, image, settings)
        names = benchmark.ground_truth.queries[query], f"{benchmark.database[image]}.png"
        path = Path(folder).joinpath(*map(safe_file_name, names))
        paths.append(style.save_figure(axes, path, close=True))
    return paths


def safe_file_name(name: str) -> str:
    """Returns an image name as a file name: other than word characters, `.` and `-` become `_`."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"


def global_diagram(folder: Path, settings: GlobalSettings) -> Axes:
    """Draws the steps from a photograph to a global descriptor and a position in a ranking.

    folder: a finished global stage, whose shapes are written into the diagram. Returns the axes.
    """
    images, dimension = map_array(folder / "database.npy").shape
    size, side = settings.size, settings.size // 16
    mean = f"mean of {len(settings.scales)} scale(s)"
    return diagrams.step_diagram(
        [
            Step("photograph", "H × W × 3", "cut to the query's box"),
            Step("network input", f"{size} × {size} × 3", "about; resized, normalised"),
            Step("patches", f"{side * side} × {dimension}", "16 × 16 pixels each"),
            Step(
                "XCiT, 12 or 24 blocks",
                f"{side * side} × {dimension}",
                "cross-covariance attention",
            ),
            Step("multi-atrous", f"{side * side} × {dimension}", "five dilations and the mean"),
            Step("class token joins", f"{side * side + 1} × {dimension}", "learnt"),
            Step("class attention, twice", f"1 × {dimension}", "the token looks at the patches"),
            Step(mean, f"{dimension}", "each of length 1, and so the mean"),
            Step("similarities", f"{images:,}", "inner products with the database"),
            Step("ranking", f"{images:,}", "sorted; ties by index"),
        ]
    )


def reranking_diagram(
    benchmark: RetrievalDataset, folder: Path, query: int, settings: RerankingSettings
) -> Axes:
    """Draws the steps from a query and its first candidate to a number of inliers.

    folder: `<run>/<dataset>` with the finished stages global and local, whose shapes are
    written into the diagram. Raises ValueError for a query that does not exist.
    """
    truth = benchmark.ground_truth
    query = revisited.check_query(truth, query)
    store = FeatureStore.open(folder / "local")
    features = store[truth.queries[query]]
    ranked = Ranking.load(folder / "global").order[:, query].tolist()
    names = (benchmark.database[image] for image in ranked)
    name = next((name for name in names if name in store), None)
    candidate = features if name is None else store[name]
    pair = inspect_pair(features, candidate, settings)
    count, matches = pair.verification.count, len(pair.matches)
    return diagrams.step_diagram(
        [
            Step(
                "query's features",
                f"{len(features)} × {features.code_dim}",
                "codes; places (x, y) beside",
            ),
            Step(
                "candidate's features",
                f"{len(candidate)} × {candidate.code_dim}",
                "the first candidate's",
            ),
            Step("distances", f"{len(features)} × {len(candidate)}", "Euclidean, between codes"),
            Step("matches", f"{matches} × 2", "nearest, within max_distance"),
            Step("places of matches", f"{matches} × 4", "x y in both network inputs"),
            Step("homography", "3 × 3", "the best of `iterations` draws"),
            Step("inliers", f"{count} of {matches}", "mapped within the threshold"),
            Step("short list", f"{len(ranked):,} ranks", "the first `top` sorted by inliers"),
        ]
    )
