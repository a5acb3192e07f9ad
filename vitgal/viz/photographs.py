"""Figures of a search among one's own photographs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vitgal.data.photographs import read_upright
from vitgal.viz.galleries import QueryImage, RankedImage, stacked_rankings
from vitgal.viz.matching import MatchedImage, match_lines

if TYPE_CHECKING:  # the stage needs torch, its figures do not
    from vitgal.stages.own import SearchResult

THUMBNAIL = 1200  # pixels, the longer side of a photograph in a ranking


def reduce_image(image: np.ndarray, longest: int) -> tuple[np.ndarray, float]:
    """Reduces an image (H, W, 3) to at most `longest` pixels a side.

    Returns the image and the factor; smaller images keep their size, with factor 1.
    """
    factor = min(1.0, longest / max(image.shape[:2]))
    if factor == 1:
        return image, factor
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), factor


def _thumbnail(path: Path) -> np.ndarray:
    return reduce_image(read_upright(path), THUMBNAIL)[0]


def ranking_figure(result: "SearchResult", *, columns: int = 7) -> np.ndarray:
    """Draws the query with the first photographs by similarity, and below after reranking.

    Returns the axes (2, 1 + columns).
    """
    image, factor = reduce_image(read_upright(result.path), THUMBNAIL)
    box = None if result.box is None else [side * factor for side in result.box]
    before = result.table.sort_values("global_rank").head(columns)
    after = result.table.head(columns)
    thumbnails = {
        name: _thumbnail(result.photographs.path(name))
        for name in {*before["photograph"], *after["photograph"]}
    }
    rankings = {
        "by similarity": [
            RankedImage(row.photograph, thumbnails[row.photograph], caption=_similarity(row))
            for row in before.itertuples()
        ],
        "by inliers": [
            RankedImage(row.photograph, thumbnails[row.photograph], caption=_inliers(row))
            for row in after.itertuples()
        ],
    }
    return stacked_rankings(QueryImage(image, box, result.query), rankings, columns=columns)


def _similarity(row: Any) -> str:
    return f"{row.global_rank}   {row.photograph}\nsimilarity {row.similarity:.2f}"


def _inliers(row: Any) -> str:
    counts = "" if pd.isna(row.inliers) else f"\n{row.inliers} inliers of {row.matches}"
    return f"{row.rank}   {row.photograph}{counts}"


def pair_figure(result: "SearchResult", name: str, *, max_lines: int = 60) -> Axes:
    """Draws the query and one photograph with their matches; returns the axes."""
    query, (features, pair) = result.description.features, result.pair(name)
    return match_lines(
        MatchedImage(read_upright(result.path), query, result.query),
        MatchedImage(read_upright(result.photographs.path(name)), features, name),
        pair,
        max_lines=max_lines,
    )
