"""Figures of a search among one's own photographs."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vitgal.data.photographs import read_upright
from vitgal.stages.own import Found
from vitgal.viz import matching, rankings


def picture(path: Path, longest: int = 1200) -> tuple[np.ndarray, float]:
    """An upright photograph, reduced to at most `longest` pixels, and by what factor."""
    return reduced(read_upright(path), longest)


def reduced(image: np.ndarray, longest: int) -> tuple[np.ndarray, float]:
    """An image with at most `longest` pixels a side, and by what factor it was reduced."""
    factor = min(1.0, longest / max(image.shape[:2]))
    if factor == 1:
        return image, factor
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), factor


def ranking_figure(found: Found, *, columns: int = 7) -> np.ndarray:
    """The query, its first photographs by similarity, and its first ones after reranking.

    Returns the axes of `plots.two_rankings`.
    """
    image, factor = picture(found.path)
    box = None if found.box is None else [side * factor for side in found.box]
    before = found.table.sort_values("global_rank").head(columns)
    after = found.table.head(columns)
    shown = {
        name: picture(found.photographs.path(name))[0]
        for name in {*before["photograph"], *after["photograph"]}
    }
    return rankings.two_rankings(
        image,
        box,
        [(shown[row.photograph], _before(row)) for row in before.itertuples()],
        [(shown[row.photograph], _after(row)) for row in after.itertuples()],
        query_title=found.query,
        columns=columns,
    )


def _before(row: Any) -> str:
    return f"{row.global_rank}   {row.photograph}\nsimilarity {row.similarity:.2f}"


def _after(row: Any) -> str:
    counts = "" if pd.isna(row.inliers) else f"\n{row.inliers} inliers of {row.matches}"
    return f"{row.rank}   {row.photograph}{counts}"


def pair_figure(found: Found, name: str, *, max_lines: int = 60) -> Axes:
    """The query and one photograph with their matches; returns the axes of `plots.matches`."""
    features, pair = found.pair(name)
    homography = pair.verification.homography
    if homography is not None:
        homography = matching.homography_to_pixels(homography, found.described.features, features)
    return matching.matches(
        read_upright(found.path),
        read_upright(found.photographs.path(name)),
        found.described.features.original_keypoints(),
        features.original_keypoints(),
        pair.matches,
        pair.verification.inliers,
        homography=homography,
        box=found.box,
        max_lines=max_lines,
        titles=(found.query, name),
    )
