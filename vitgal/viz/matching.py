"""Keypoints, matches and inliers on photographs."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import MaxNLocator

from vitgal.features.local import LocalFeatures
from vitgal.viz.maps import _crosses, _heated, _percentiles
from vitgal.viz.style import (
    BOX,
    GRID,
    INLIER,
    INLIER_EDGE,
    REJECTED,
    SERIES,
    STYLE,
    Image,
    _bare,
    _elide,
    _literal,
    _outlined,
    _photograph,
    _pixels,
    _shrink,
)


def keypoints(
    image: Image,
    features: LocalFeatures,
    *,
    max_keypoints: int | None = None,
    patch: int = 16,
    title: str = "",
    width: float = 5.0,
    axes: Axes | None = None,
) -> Axes:
    """Local features on their photograph: a square a patch, coloured by its score.

    features: as extracted from this photograph, best first; the first `max_keypoints` are drawn. A
    feature of scale s covers patch / s pixels of the network's input, which the square shows in the
    photograph (unknown: s = 1). Colours span the scores, but the extreme 2 % at either end; the
    lower the fainter; unknown scores have one colour. axes: draw there, not in a new figure.
    Returns the axes. No feature: the photograph alone, and the title says so.
    """
    picture, drawn = _pixels(image), features.subset(slice(max_keypoints))
    with plt.rc_context(STYLE):
        if axes is None:
            height = width * min(1.3, picture.shape[0] / picture.shape[1])
            _, axes = plt.subplots(figsize=(width + 0.7, height + 0.3), layout="constrained")
        _photograph(axes, picture, width)
        count = f"{len(drawn)} of {len(features)} local features"
        axes.set_title(_literal(f"{title}   {count}".strip()))
        if not len(drawn):
            return axes
        scores = np.nan_to_num(drawn.scores)
        norm, colours = _percentiles([scores], 2), _bright("plasma")
        edges = colours(norm(scores))
        edges[:, 3] = 0.35 + 0.65 * np.clip(norm(scores), 0, 1)
        squares = _squares(drawn, patch)[::-1]  # the best on top
        collection = PatchCollection(squares, facecolor="none", edgecolor=edges[::-1], linewidth=1)
        axes.add_collection(collection, autolim=False)
        if np.isfinite(drawn.scores).all():
            beside = axes.inset_axes([1.02, 0.1, 0.025, 0.8])
            scale = ScalarMappable(norm, colours)
            axes.figure.colorbar(scale, cax=beside, extend="both", label="score")
    return axes


def _bright(name: str) -> Colormap:
    """A colour map without its darkest part, which cannot be seen on photographs."""
    return LinearSegmentedColormap.from_list(name, plt.get_cmap(name)(np.linspace(0.2, 1, 256)))


def _squares(features: LocalFeatures, patch: int) -> list[Rectangle]:
    """The patches of the features in pixels of the photograph."""
    x0, y0, x1, y1 = features.box
    height, width = features.input_size
    ratio = np.array([(x1 - x0) / width, (y1 - y0) / height])
    sides = patch / np.nan_to_num(features.scales, nan=1.0)[:, None] * ratio  # (N, 2)
    corners = features.original_keypoints() - sides / 2
    return [Rectangle(corner, *side) for corner, side in zip(corners, sides, strict=True)]


def feature_counts(
    counts: Sequence[int], scales: Sequence[float] | np.ndarray, *, width: float = 9.0
) -> np.ndarray:
    """How many local features images give, and at which scales those of one image were found.

    counts: features of each image. scales: (N,) of one image's features, nan where unknown.
    Returns the two axes. No images, or an image without features: empty bars, and the title's
    count says so.
    """
    counts, scales = np.asarray(counts, dtype=int), np.asarray(scales, dtype=float)
    names, found = np.unique(scales.round(4), return_counts=True)
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(1, 2, figsize=(width, 2.4), layout="constrained")
        axes[0].hist(counts, bins=30, color=SERIES[0])
        axes[0].set(xlabel="local features of an image", ylabel="images")
        axes[0].set_title(f"{counts.sum():,} features of {len(counts):,} images", loc="left")
        axes[1].bar([f"{name:g}" for name in names], found, color=SERIES[0])
        axes[1].set(xlabel="scale", ylabel="features")
        axes[1].set_title(f"{len(scales):,} features of one image, by scale", loc="left")
        for panel in axes:
            panel.yaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(axis="y", **GRID)
    return axes


def homography_to_pixels(
    homography: np.ndarray, query: LocalFeatures, database: LocalFeatures
) -> np.ndarray:
    """A homography between two network inputs as one between the two photographs.

    homography: (3, 3), from the query's input frame to the database image's, as `verify` gives it.
    Returns (3, 3) float64 from query pixels to database pixels, (0, 0) the centre of the top-left
    pixel, for `matches` together with `original_keypoints()`.
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


def _side_by_side(
    axes: Axes, pictures: Sequence[np.ndarray], width: float
) -> list[tuple[float, float, float]]:
    """Draws two photographs beside each other, at one height if none gets too narrow by it.

    Units of the axes: inches, y downwards; the figure gets the size that they need. Returns
    (x, y, scale) of each: a pixel's centre p is drawn at (x, y) + (p + 0.5) * scale.
    """
    gap = 0.08
    aspects = np.array([picture.shape[1] / picture.shape[0] for picture in pictures])
    shares = np.clip(aspects / aspects.sum(), 0.2, 0.8)
    widths = shares / shares.sum() * (width - gap)
    height = min((widths / aspects).max(), 0.55 * width)
    widths = np.minimum(widths, aspects * height)
    frames, left = [], 0.0
    for picture, place in zip(pictures, widths, strict=True):
        rows, columns = picture.shape[:2]
        scale = place / columns
        top = (height - rows * scale) / 2
        extent = (left, left + place, top + rows * scale, top)
        axes.imshow(_shrink(picture, max(place, rows * scale)), extent=extent)
        frames.append((left, top, scale))
        left += place + gap
    axes.set(xlim=(0, left - gap), ylim=(height, 0), aspect="equal")
    axes.figure.set_size_inches(max(left - gap, 3) + 0.1, height + 0.5)
    return frames


def _place(points: np.ndarray, frame: tuple[float, float, float]) -> np.ndarray:
    """Pixels of a photograph to the inches of `_side_by_side`."""
    x, y, scale = frame
    return np.array([x, y]) + (points + 0.5) * scale


def matches(
    query_image: Image,
    database_image: Image,
    query_keypoints: np.ndarray,
    database_keypoints: np.ndarray,
    matches: np.ndarray,
    inliers: np.ndarray,
    *,
    homography: np.ndarray | None = None,
    box: Sequence[float] | None = None,
    max_lines: int = 100,
    titles: tuple[str, str] = ("query", "database image"),
    width: float = 8.5,
) -> Axes:
    """Two photographs with their matches: inliers as bold lines, rejected ones thin and dashed.

    query_keypoints, database_keypoints: (N, 2), (M, 2) pixels of the photographs
    (`original_keypoints()`). matches: (K, 2) indices into them. inliers: (K,) bool. homography:
    (3, 3) from query pixels to database pixels (`homography_to_pixels`); the outline of the
    query's box (None: of its photograph) is drawn with it in the database image, unless part of
    it falls behind the horizon. max_lines: of each kind, spread evenly over the list. Returns the
    axes, in inches. No matches: the photographs alone. Raises ValueError where shapes do not fit.
    """
    inliers = np.asarray(inliers, dtype=bool)
    points = _matched(query_keypoints, database_keypoints, matches)
    if inliers.shape != (len(points[0]),):
        raise ValueError(f"{len(points[0])} matches, but inliers of shape {inliers.shape}")
    pictures = [_pixels(query_image), _pixels(database_image)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained")
        frames = _side_by_side(axes, pictures, width)
        _bare(axes)
        lines = np.stack([_place(*side) for side in zip(points, frames, strict=True)], axis=1)
        _rejected_lines(axes, lines[~inliers][_evenly((~inliers).sum(), max_lines)])
        _inlier_lines(axes, lines[inliers][_evenly(inliers.sum(), max_lines)])
        _outlines(axes, pictures, frames, box, homography)
        _name_pictures(axes, pictures, frames, titles)
        drawn = f" ({max_lines} drawn)" if inliers.sum() > max_lines else ""
        axes.set_title(f"{inliers.sum()} inliers{drawn} of {len(inliers)} matches")
    return axes


def _matched(
    query_keypoints: np.ndarray, database_keypoints: np.ndarray, matches: np.ndarray
) -> list[np.ndarray]:
    """Both ends (K, 2) of each match."""
    pairs = np.asarray(matches, dtype=int).reshape(-1, 2)
    return [
        np.asarray(points, dtype=float).reshape(-1, 2)[pairs[:, side]]
        for side, points in enumerate((query_keypoints, database_keypoints))
    ]


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` indices, spread over the list."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def _rejected_lines(axes: Axes, lines: np.ndarray) -> None:
    """Thin dashed lines; lines: (K, 2 ends, 2) inches."""
    style = {"colors": REJECTED, "linewidths": 0.6, "linestyles": (0, (4, 3)), "alpha": 0.75}
    axes.add_collection(LineCollection(lines, **style), autolim=False)


def _inlier_lines(axes: Axes, lines: np.ndarray) -> None:
    """Bold lines with dots at their ends; lines: (K, 2 ends, 2) inches."""
    wide = 1.2 if len(lines) <= 50 else 0.8
    drawn = LineCollection(lines, colors=INLIER, linewidths=wide)
    drawn.set_path_effects(_outlined(INLIER_EDGE, 2 * wide))
    axes.add_collection(drawn, autolim=False)
    dots = {"markersize": 2.6 * wide, "color": INLIER, "markeredgecolor": INLIER_EDGE}
    axes.plot(*lines.reshape(-1, 2).T, "o", markeredgewidth=0.6, scalex=False, scaley=False, **dots)


def _outlines(
    axes: Axes,
    pictures: Sequence[np.ndarray],
    frames: Sequence[tuple[float, float, float]],
    box: Sequence[float] | None,
    homography: np.ndarray | None,
) -> None:
    """The query's box, and where the homography puts it in the database image."""
    if box is None and homography is None:
        return
    whole = (0, 0, *pictures[0].shape[1::-1])
    x0, y0, x1, y1 = (float(value) - 0.5 for value in (whole if box is None else box))
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    seen = None if homography is None else _project(homography, corners)
    for picture, frame, outline in zip(pictures, frames, (corners, seen), strict=True):
        if outline is None:
            continue
        shape = Polygon(_place(outline, frame), fill=False, edgecolor=BOX, linewidth=1.6)
        shape.set_path_effects(_outlined("black", 2.8))
        axes.add_patch(shape)
        low, high = _place(np.array([[-0.5, -0.5], picture.shape[1::-1]]) - [[0], [0.5]], frame)
        shape.set_clip_path(Rectangle(low, *(high - low), transform=axes.transData))


def _name_pictures(
    axes: Axes,
    pictures: Sequence[np.ndarray],
    frames: Sequence[tuple[float, float, float]],
    titles: tuple[str, str],
) -> None:
    """Each photograph's name under it."""
    for picture, (left, top, scale), title in zip(pictures, frames, titles, strict=True):
        height, inches = (side * scale for side in picture.shape[:2])
        axes.annotate(
            _elide(title, inches, size=8),
            (left + inches / 2, top + height),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )


def inspection(
    query_image: Image,
    database_image: Image,
    query: LocalFeatures,
    database: LocalFeatures,
    matches: np.ndarray,
    inliers: np.ndarray,
    *,
    homography: np.ndarray | None = None,
    outline: bool = True,
    rejected: bool = True,
    dropped: tuple[LocalFeatures | None, LocalFeatures | None] = (None, None),
    heat: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    max_lines: int = 100,
    titles: tuple[str, str] = ("query", "database image"),
    width: float = 8.5,
) -> Axes:
    """Two photographs with their matches over what the network attends to and has dropped.

    query, database: local features; matches: (K, 2) indices into them; inliers: (K,) bool.
    homography: (3, 3) from the query's input frame to the database image's, as `verify` gives it;
    outline: draw the query's box and its image under it. rejected: draw matches that are no
    inliers. dropped: features to mark with crosses. heat: (h, w) >= 0 over the box that the
    features were extracted from, drawn over it in grey, each map over its own peak. Returns the
    axes, in inches. Raises ValueError where shapes do not fit.
    """
    inliers = np.asarray(inliers, dtype=bool)
    sides = (query, database)
    points = _matched(query.original_keypoints(), database.original_keypoints(), matches)
    if inliers.shape != (len(points[0]),):
        raise ValueError(f"{len(points[0])} matches, but inliers of shape {inliers.shape}")
    pictures = [_pixels(query_image), _pixels(database_image)]
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(layout="constrained")
        heated = [
            picture if one is None else _heated(picture, one, features.box)
            for picture, one, features in zip(pictures, heat, sides, strict=True)
        ]
        frames = _side_by_side(axes, heated, width)
        _bare(axes)
        lines = np.stack([_place(*side) for side in zip(points, frames, strict=True)], axis=1)
        for features, frame in zip(dropped, frames, strict=True):
            if features is not None:
                _crosses(axes, _place(features.original_keypoints(), frame))
        if rejected:
            _rejected_lines(axes, lines[~inliers][_evenly((~inliers).sum(), max_lines)])
        _inlier_lines(axes, lines[inliers][_evenly(inliers.sum(), max_lines)])
        if outline:
            if homography is not None:
                homography = homography_to_pixels(homography, query, database)
            _outlines(axes, pictures, frames, query.box, homography)
        _name_pictures(axes, pictures, frames, titles)
        axes.set_title(f"{inliers.sum()} inliers of {len(inliers)} matches")
    return axes
