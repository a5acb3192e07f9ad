"""Local features, matches and inliers on photographs."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import MaxNLocator

from vitgal.data.images import PATCH
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import PairInspection
from vitgal.viz.drawing import (
    ImageSource,
    draw_photograph,
    hide_frame,
    outlined,
    read_pixels,
    shorten,
    shrink,
)
from vitgal.viz.maps import mix_heat, percentile_range
from vitgal.viz.style import (
    BOX_COLOUR,
    CURVE_COLOURS,
    DROPPED_COLOURS,
    INLIER_COLOUR,
    INLIER_EDGE_COLOUR,
    REJECTED_COLOUR,
    SCORE_MAP,
    styled,
)

# (x, y, scale) of a drawn photograph: the centre of pixel p is at (x, y) + (p + 0.5) * scale
Frame = tuple[float, float, float]


@styled
def keypoints(
    image: ImageSource,
    features: LocalFeatures,
    *,
    max_keypoints: int | None = None,
) -> Axes:
    """Draws local features on their photograph: a square a patch, coloured by its score.

    A feature of scale s covers 16 / s pixels of the network's input, which the square shows in
    the photograph (unknown: s = 1). Colours span the 2nd to the 98th percentile of the
    scores; low scores are faint. Unknown scores have one colour.

    Args:
        image: the photograph that the features were extracted from.
        features: best first; without any, the photograph alone is drawn, and the title says so.
        max_keypoints: draws the best ones alone; None: all.
    """
    picture, drawn = read_pixels(image), features.subset(slice(max_keypoints))
    height = 5 * min(1.3, picture.shape[0] / picture.shape[1])
    _, axes = plt.subplots(figsize=(5.7, height + 0.3))
    draw_photograph(axes, picture, 5)
    axes.set_title(f"{len(drawn)} of {len(features)} local features")
    if not len(drawn):
        return axes
    scores = np.nan_to_num(drawn.scores)
    norm, colours = percentile_range([scores], 2), _bright_map(SCORE_MAP)
    edges = colours(norm(scores))
    edges[:, 3] = 0.35 + 0.65 * np.clip(norm(scores), 0, 1)
    squares = _patch_squares(drawn)[::-1]  # the best on top
    collection = PatchCollection(squares, facecolor="none", edgecolor=edges[::-1], linewidth=1)
    axes.add_collection(collection, autolim=False)
    if np.isfinite(drawn.scores).all():
        beside = axes.inset_axes([1.02, 0.1, 0.025, 0.8])
        scale = ScalarMappable(norm, colours)
        axes.figure.colorbar(scale, cax=beside, extend="both", label="score")
    return axes


def _bright_map(name: str) -> Colormap:
    """A colour map without its darkest part, which cannot be seen on photographs."""
    return LinearSegmentedColormap.from_list(name, plt.get_cmap(name)(np.linspace(0.2, 1, 256)))


def _patch_squares(features: LocalFeatures) -> list[Rectangle]:
    """The patches of the features in pixels of the photograph."""
    x0, y0, x1, y1 = features.box
    height, width = features.input_size
    ratio = np.array([(x1 - x0) / width, (y1 - y0) / height])
    sides = PATCH / np.nan_to_num(features.scales, nan=1.0)[:, None] * ratio  # (N, 2)
    corners = features.original_keypoints() - sides / 2
    return [Rectangle(corner, *side) for corner, side in zip(corners, sides, strict=True)]


@styled
def feature_counts(counts: Sequence[int], scales: Sequence[float] | np.ndarray) -> np.ndarray:
    """Draws the numbers of local features of images, and the scales of those of one image.

    Args:
        counts: (I,) features of each image.
        scales: (N,) of one image's features, nan where unknown.
    Returns:
        The axes, shape (2,). Without images or features, bars are empty and the titles' counts 0.
    """
    counts, scales = np.asarray(counts, dtype=int), np.asarray(scales, dtype=float)
    names, numbers = np.unique(scales.round(4), return_counts=True)
    _, axes = plt.subplots(1, 2, figsize=(9, 2.4))
    axes[0].hist(counts, bins=30, color=CURVE_COLOURS[0])
    axes[0].set(xlabel="local features of an image", ylabel="images")
    axes[0].set_title(f"{counts.sum():,} features of {len(counts):,} images", loc="left")
    axes[1].bar([f"{name:g}" for name in names], numbers, color=CURVE_COLOURS[0])
    axes[1].set(xlabel="scale", ylabel="features")
    axes[1].set_title(f"{len(scales):,} features of one image, by scale", loc="left")
    for panel in axes:
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y")
    return axes


@dataclass(frozen=True, eq=False)
class MatchedImage:
    """One of the two images that `match_lines` draws.

    Attributes:
        image: the photograph.
        features: the local features that the matches point into.
        title: drawn under it.
        dropped: features to mark with crosses; None: none.
        heat: (h, w) >= 0 over the crop that the features were extracted from, drawn over a grey
            copy of it, each map relative to its own peak; None: none.
    """

    image: ImageSource
    features: LocalFeatures
    title: str
    dropped: LocalFeatures | None = None
    heat: np.ndarray | None = None


@styled
def match_lines(
    query: MatchedImage,
    database: MatchedImage,
    pair: PairInspection,
    *,
    outline: bool = True,
    rejected: bool = True,
    max_lines: int = 100,
    width: float = 8.5,
) -> Axes:
    """Draws two photographs with their matches: inliers bold, rejected ones thin and dashed.

    Args:
        query, database: the two images.
        pair: matches of their features and the verification of these matches; may be empty.
        outline: draws the box that the query's features were extracted from, and its image under
            the homography unless part of it falls behind the horizon.
        rejected: draws also the matches that are no inliers.
        max_lines: most lines of each kind, spread evenly over the list.
        width: of the figure, in inches, which are the units of the axes.
    Raises:
        ValueError: inliers do not fit the matches, or a heat map is not (h, w) and finite.
    """
    sides, inliers = (query, database), np.asarray(pair.verification.inliers, dtype=bool)
    matches = np.asarray(pair.matches, dtype=int).reshape(-1, 2)
    if inliers.shape != (len(matches),):
        raise ValueError(f"{len(matches)} matches, but inliers of shape {inliers.shape}")
    pictures = [read_pixels(side.image) for side in sides]
    pictures = [
        picture if side.heat is None else mix_heat(picture, side.heat, side.features.box)
        for side, picture in zip(sides, pictures, strict=True)
    ]
    _, axes = plt.subplots()
    frames = _draw_side_by_side(axes, pictures, width)
    hide_frame(axes)
    ends = [
        _to_inches(side.features.original_keypoints()[matches[:, column]], frame)
        for column, (side, frame) in enumerate(zip(sides, frames, strict=True))
    ]
    lines = np.stack(ends, axis=1)  # (M, 2 ends, 2)
    for side, frame in zip(sides, frames, strict=True):
        if side.dropped is not None:
            _draw_crosses(axes, _to_inches(side.dropped.original_keypoints(), frame))
    if rejected:
        _draw_rejected(axes, lines[~inliers][_spread((~inliers).sum(), max_lines)])
    _draw_inliers(axes, lines[inliers][_spread(inliers.sum(), max_lines)])
    if outline:
        _draw_outlines(axes, sides, pictures, frames, pair.verification.homography)
    for side, picture, (left, top, scale) in zip(sides, pictures, frames, strict=True):
        height, inches = (pixels * scale for pixels in picture.shape[:2])
        title, corner = shorten(side.title, inches, size=8), (left + inches / 2, top + height)
        name = axes.annotate(title, corner, (0, -4), textcoords="offset points", fontsize=8)
        name.set(ha="center", va="top")
    drawn = f" ({max_lines} drawn)" if inliers.sum() > max_lines else ""
    axes.set_title(f"{inliers.sum()} inliers{drawn} of {len(inliers)} matches")
    return axes


def homography_to_pixels(
    homography: np.ndarray, query: LocalFeatures, database: LocalFeatures
) -> np.ndarray:
    """Converts a homography between two network inputs to one between the two photographs.

    homography: (3, 3), from the query's input frame to the database image's, as `verify`
    returns it. Returns (3, 3) float64 from query pixels to database pixels; (0, 0) is the
    centre of the top-left pixel, as in `original_keypoints`.
    """
    to_query, to_database = _input_to_pixels(query), _input_to_pixels(database)
    return to_database @ np.asarray(homography, dtype=float) @ np.linalg.inv(to_query)


def _input_to_pixels(features: LocalFeatures) -> np.ndarray:
    """(3, 3): `original_keypoints` as a matrix."""
    x0, y0, x1, y1 = (float(value) for value in features.box)
    height, width = features.input_size
    scale_x, scale_y = (x1 - x0) / width, (y1 - y0) / height
    return np.array([[scale_x, 0, x0 - 0.5], [0, scale_y, y0 - 0.5], [0, 0, 1]])


def _project(homography: np.ndarray, points: np.ndarray) -> np.ndarray | None:
    """Points (N, 2) through a homography; None where some would lie on or behind the horizon."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ np.asarray(homography, float).T
    depth = mapped[:, 2]
    if not np.isfinite(mapped).all() or depth.min() * depth.max() <= 0:
        return None
    return mapped[:, :2] / depth[:, None]


def _draw_side_by_side(axes: Axes, pictures: Sequence[np.ndarray], width: float) -> list[Frame]:
    """Draws two photographs beside each other, at one height if none gets too narrow by it.

    Units of the axes: inches, y downwards; the figure gets the size that they need.
    """
    gap = 0.08
    aspects = np.array([picture.shape[1] / picture.shape[0] for picture in pictures])
    fractions = np.clip(aspects / aspects.sum(), 0.2, 0.8)
    widths = fractions / fractions.sum() * (width - gap)
    height = min((widths / aspects).max(), 0.55 * width)
    widths = np.minimum(widths, aspects * height)
    frames, left = [], 0.0
    for picture, inches in zip(pictures, widths, strict=True):
        rows, columns = picture.shape[:2]
        scale = inches / columns
        top = (height - rows * scale) / 2
        extent = (left, left + inches, top + rows * scale, top)
        axes.imshow(shrink(picture, max(inches, rows * scale)), extent=extent)
        frames.append((left, top, scale))
        left += inches + gap
    axes.set(xlim=(0, left - gap), ylim=(height, 0), aspect="equal", autoscale_on=False)
    axes.figure.set_size_inches(max(left - gap, 3) + 0.1, height + 0.5)
    return frames


def _to_inches(points: np.ndarray, frame: Frame) -> np.ndarray:
    """Pixels (N, 2) of a photograph to inches of the axes."""
    x, y, scale = frame
    return np.array([x, y]) + (np.asarray(points, dtype=float) + 0.5) * scale


def _spread(count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` indices, spread over the list."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def _draw_rejected(axes: Axes, lines: np.ndarray) -> None:
    """Thin dashed lines; lines: (K, 2 ends, 2) inches."""
    drawn = LineCollection(
        lines, colors=REJECTED_COLOUR, linewidths=0.6, linestyles=(0, (4, 3)), alpha=0.75
    )
    axes.add_collection(drawn, autolim=False)


def _draw_inliers(axes: Axes, lines: np.ndarray) -> None:
    """Bold lines with dots at their ends; lines: (K, 2 ends, 2) inches."""
    wide = 1.2 if len(lines) <= 50 else 0.8
    drawn = LineCollection(lines, colors=INLIER_COLOUR, linewidths=wide)
    drawn.set_path_effects(outlined(INLIER_EDGE_COLOUR, 2 * wide))
    axes.add_collection(drawn, autolim=False)
    (dots,) = axes.plot(*lines.reshape(-1, 2).T, "o", color=INLIER_COLOUR, markersize=2.6 * wide)
    dots.set(markeredgecolor=INLIER_EDGE_COLOUR, markeredgewidth=0.6)


def _draw_crosses(axes: Axes, points: np.ndarray) -> None:
    """Small marks at features that were dropped; points: (N, 2) inches."""
    (marks,) = axes.plot(*points.T, "x", color=DROPPED_COLOURS[0], markersize=3.2, zorder=2)
    marks.set(markeredgewidth=0.8, path_effects=outlined("black", 1.6))


def _draw_outlines(
    axes: Axes,
    sides: Sequence[MatchedImage],
    pictures: Sequence[np.ndarray],
    frames: Sequence[Frame],
    homography: np.ndarray | None,
) -> None:
    """The query's box, and where the homography puts it in the database image."""
    query, database = (side.features for side in sides)
    x0, y0, x1, y1 = (float(edge) - 0.5 for edge in query.box)
    box, projected = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), None
    if homography is not None:
        projected = _project(homography_to_pixels(homography, query, database), box)
    for picture, frame, outline in zip(pictures, frames, (box, projected), strict=True):
        if outline is None:
            continue
        shape = Polygon(_to_inches(outline, frame), fill=False, edgecolor=BOX_COLOUR, linewidth=1.6)
        shape.set_path_effects(outlined("black", 2.8))
        axes.add_patch(shape)
        height, width = picture.shape[:2]
        low, high = _to_inches(np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]]), frame)
        shape.set_clip_path(Rectangle(low, *(high - low), transform=axes.transData))
