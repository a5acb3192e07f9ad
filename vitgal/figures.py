"""Figures of a run: `plots` fed from a benchmark and the files of a run's stages."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from vitgal import plots, reranking, revisited
from vitgal.revisited import RetrievalDataset
from vitgal.store import FeatureStore


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
    return plots.galleries(
        [benchmark.query_paths[query] for query in queries],
        [truth.boxes[query] if crop else None for query in queries],
        [[benchmark.database_paths[image] for image in images] for images in shown],
        [
            plots.relevance(truth, query, images)
            for query, images in zip(queries, shown, strict=True)
        ],
        query_titles=[truth.queries[query] for query in queries],
        columns=columns,
    )


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
    counts = reranking.inlier_counts(folder / "rerank", query)
    drawn = {*before[:columns], *after[:columns]}
    return plots.before_after(
        benchmark.query_paths[query],
        truth.boxes[query] if crop else None,
        {image: benchmark.database_paths[image] for image in drawn},
        dict(zip(drawn, plots.relevance(truth, query, list(drawn)), strict=True)),
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
    one, other = reranking.pair_features(features, truth, query, image)
    found = reranking.inspect_pair(one, other, **options)
    homography = found.verification.homography
    if homography is not None:
        homography = plots.homography_to_pixels(homography, one, other)
    label = plots.relevance(truth, query, [image])[0]
    return plots.matches(
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
        plots.save(
            pair(benchmark, features, query, image, **options),
            Path(folder) / name / f"{safe_name(benchmark.database[image])}.png",
            close=True,
        )
        for image in images
    ]


def safe_name(name: str) -> str:
    """An image name as one file name: whatever could lead to another folder becomes `_`."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"
