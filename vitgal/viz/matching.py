"""Local features, matches and inliers on photographs."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LinearSegmentedColormap, hsv_to_rgb
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import MaxNLocator

from vitgal.data.images import PATCH
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import PairInspection
from vitgal.viz import drawing, style
from vitgal.viz.maps import mix_heat, percentile_range

WIDTH = 8.5  # inches, of matches
SMOOTH = 3.0  # grey levels a pixel
LEAST_SKY = 0.01  # of the image, the least area of a part of the sky
MOST_SCALES = 16  # bars of `feature_counts`


@style.styled
def keypoints(image: drawing.ImageSource, features: LocalFeatures) -> Axes:
    """Draws local features on their photograph: a square a patch, coloured by its score.

    A feature of scale s covers 16 / s pixels of the network's input, which the square shows in
    the photograph (unknown: s = 1). Colours span the 2nd to the 98th percentile of the
    scores; low scores are faint. Unknown scores have one colour. The yellow frame is the box that
    the network saw; the title says how much of it is sky, and how many of the features lie there
    (see `sky`). Without features the photograph alone is drawn.
    """
    picture = drawing.read_pixels(image)
    height = 5 * min(1.3, picture.shape[0] / picture.shape[1])
    _, axes = plt.subplots(figsize=(5.7, height + 0.3))
    drawing.draw_photograph(axes, picture, 5)
    axes.set_title(f"{len(features)} local features")
    if not len(features):
        return axes
    _draw_sky(axes, picture, features)
    scores = np.nan_to_num(features.scores)
    norm = percentile_range([scores], 2)
    # The darkest part of the colour map cannot be seen on photographs.
    bright = plt.get_cmap(style.SCORE_MAP)(np.linspace(0.2, 1, 256))
    colours = LinearSegmentedColormap.from_list(style.SCORE_MAP, bright)
    edges = colours(norm(scores))
    edges[:, 3] = 0.25 + 0.75 * np.clip(norm(scores), 0, 1)
    squares = patch_squares(features)[::-1]  # the best on top
    width = 1.0 if len(features) <= 150 else 0.7
    collection = PatchCollection(squares, facecolor="none", edgecolor=edges[::-1], linewidth=width)
    axes.add_collection(collection, autolim=False)
    if np.isfinite(features.scores).all():
        beside = axes.inset_axes([1.02, 0.1, 0.025, 0.8])
        scale = ScalarMappable(norm, colours)
        axes.figure.colorbar(scale, cax=beside, extend="both", label="score")
    return axes


def _draw_sky(axes: Axes, picture: np.ndarray, features: LocalFeatures) -> None:
    """Frames the box that the network saw, outlines the sky in it, and counts what lies there."""
    x0, y0, x1, y1 = features.box
    drawing.draw_box(axes, features.box)
    mask = sky(picture[y0:y1, x0:x1])
    if not mask.any():
        return
    extent = (x0 - 0.5, x1 - 0.5, y0 - 0.5, y1 - 0.5)
    if not mask.all():
        axes.contour(mask.astype(float), [0.5], extent=extent, colors="white", linewidths=0.9)
    columns, rows = (features.original_keypoints() - (x0, y0)).round().astype(int).T
    rows, columns = np.clip(rows, 0, mask.shape[0] - 1), np.clip(columns, 0, mask.shape[1] - 1)
    fractions = f"{mask.mean():.0%} of the box, {mask[rows, columns].mean():.0%} of them"
    axes.set_title(f"{axes.get_title()}; sky (white line): {fractions}")


def sky(image: np.ndarray) -> np.ndarray:
    """Estimates which pixels (H, W) of a photograph (H, W, 3) uint8 show sky.

    Those of the smooth area, with a gradient below `SMOOTH` grey levels a pixel at about 256
    pixels a side, that reaches the upper edge: a wall at the upper edge counts too, clouds may not.
    """
    small, _ = drawing.reduce_image(image, 256)
    grey = cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), (5, 5), 0).astype(np.float32)
    slope = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)) / 8
    smooth = cv2.erode((slope < SMOOTH).astype(np.uint8), np.ones((3, 3), np.uint8))
    _, regions, facts, _ = cv2.connectedComponentsWithStats(smooth, connectivity=4)
    large = np.flatnonzero(facts[:, cv2.CC_STAT_AREA] >= LEAST_SKY * smooth.size)
    reaching = np.setdiff1d(np.intersect1d(regions[:2], large), 0)
    mask = cv2.dilate(np.isin(regions, reaching).astype(np.uint8), np.ones((3, 3), np.uint8))
    return cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)


def patch_squares(features: LocalFeatures) -> list[Rectangle]:
    """Returns each feature's patch of 16 pixels on the photograph, as rectangles.

    Of a network with coarser tokens it is the middle of the patch.
    """
    x0, y0, x1, y1 = features.box
    height, width = features.input_size
    ratio = np.array([(x1 - x0) / width, (y1 - y0) / height])
    sides = PATCH / np.nan_to_num(features.scales, nan=1.0)[:, None] * ratio  # (N, 2)
    corners = features.original_keypoints() - sides / 2
    return [Rectangle(corner, *side) for corner, side in zip(corners, sides, strict=True)]


@style.styled
def feature_counts(counts: Sequence[int], scales: Sequence[float] | np.ndarray) -> np.ndarray:
    """Draws the numbers of local features of images, and the scales of those of one image.

    counts: (I,) features of each image. scales: (N,) of one image's features, nan where unknown.
    Returns the axes, shape (2,). Without images or features, bars are empty and the titles'
    counts 0.
    """
    counts, scales = np.asarray(counts, dtype=int), np.asarray(scales, dtype=float)
    names, numbers = np.unique(scales.round(4), return_counts=True)
    if len(names) > MOST_SCALES:  # those of SIFT are no list: to the next power of two
        with np.errstate(divide="ignore"):
            names, numbers = np.unique(2.0 ** np.log2(scales).round(), return_counts=True)
    blue = style.OURS_COLOUR
    _, axes = plt.subplots(1, 2, figsize=(9, 2.4))
    axes[0].hist(counts, bins=30, color=blue)
    axes[0].set(xlabel="local features of an image", ylabel="images")
    axes[0].set_title(f"{counts.sum():,} features of {len(counts):,} images", loc="left")
    axes[1].bar([f"{name:g}" for name in names], numbers, color=blue)
    axes[1].set(xlabel="scale", ylabel="features")
    axes[1].set_title(f"{len(scales):,} features of one image, by scale", loc="left")
    for panel in axes:
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y")
    return axes


@dataclass(frozen=True, eq=False)
class MatchedImage:
    """One of the two images that `match_lines` draws, and the features that matches point into.

    heat: (h, w) >= 0 over the crop that the features were extracted from, drawn over a grey copy
    of it, each map relative to its own peak; None: none.
    """

    image: drawing.ImageSource
    features: LocalFeatures
    title: str
    heat: np.ndarray | None = None

    def pixels(self) -> np.ndarray:
        """Returns the photograph (H, W, 3) with its heat map."""
        picture = drawing.read_pixels(self.image)
        return picture if self.heat is None else mix_heat(picture, self.heat, self.features.box)


@style.styled
def match_lines(
    query: MatchedImage,
    database: MatchedImage,
    pair: PairInspection,
    *,
    max_lines: int = 100,
    axes: Axes | None = None,
) -> Axes:
    """Draws two photographs with their matches: inliers coloured by position, others dashed.

    The outline is the box that the query's features were extracted from, and its image under the
    homography unless part of it falls behind the horizon.

    pair: may be empty. max_lines: most lines of each kind, spread evenly over the list. axes: to
    draw into, alone in a figure, which takes their size; their units are inches. Raises ValueError
    where inliers do not fit the matches, or a heat map is not (h, w) and finite.
    """
    sides, inliers = (query, database), np.asarray(pair.verification.inliers, dtype=bool)
    matches = np.asarray(pair.matches, dtype=int).reshape(-1, 2)
    if inliers.shape != (len(matches),):
        raise ValueError(f"{len(matches)} matches, but inliers of shape {inliers.shape}")
    pictures = [side.pixels() for side in sides]
    axes = plt.subplots()[1] if axes is None else axes
    panels = _draw_side_by_side(axes, pictures)
    for side, panel in zip(sides, panels, strict=True):
        panel.write_title(axes, side.title)
    ends = [
        panel.inches(side.features.original_keypoints()[matches[:, column]])
        for column, (side, panel) in enumerate(zip(sides, panels, strict=True))
    ]
    lines = np.stack(ends, axis=1)  # (M, 2 ends, 2)
    rejected = LineCollection(_spread(lines[~inliers], max_lines), linewidths=0.5, alpha=0.6)
    rejected.set(color=style.REJECTED_COLOUR, linestyle=(0, (4, 3)))
    axes.add_collection(rejected, autolim=False)
    kept = query.features.keypoints[matches[inliers, 0]]
    colours = position_colours(kept, query.features.input_size)
    ends, colours = _spread(lines[inliers], max_lines), _spread(colours, max_lines)
    drawn = LineCollection(ends, colors=colours, linewidths=0.8, alpha=0.85)
    axes.add_collection(drawn, autolim=False)
    dots = axes.scatter(*ends.reshape(-1, 2).T, s=9, c=np.repeat(colours, 2, axis=0), zorder=3)
    dots.set(edgecolor="black", linewidth=0.4)
    homography = pair.verification.homography
    _draw_outlines(axes, query.features, database.features, panels, homography)
    limit = f" ({max_lines} drawn)" if inliers.sum() > max_lines else ""
    axes.set_title(f"{inliers.sum()} inliers{limit} of {len(inliers)} matches")
    return axes


@dataclass(frozen=True)
class _Panel:
    """A drawn photograph of (height, width) pixels, from its corner (left, top), all in inches.

    The centre of pixel p is at the corner + (p + 0.5) * scale.
    """

    left: float
    top: float
    scale: float
    size: tuple[int, int]

    def inches(self, points: np.ndarray) -> np.ndarray:
        """Pixels (N, 2) of the photograph to inches of the axes."""
        return np.array([self.left, self.top]) + (np.asarray(points, float) + 0.5) * self.scale

    def write_title(self, axes: Axes, title: str) -> None:
        """Writes the name under the photograph."""
        height, width = (side * self.scale for side in self.size)
        title, middle = drawing.shorten(title, width, size=8), self.left + width / 2
        name = axes.annotate(title, (middle, self.top + height), (0, -4), fontsize=8)
        name.set(anncoords="offset points", ha="center", va="top")


def _draw_side_by_side(axes: Axes, pictures: Sequence[np.ndarray]) -> list[_Panel]:
    """Draws two photographs side by side in axes of inches, at one height if possible."""
    gap = 0.08
    aspects = np.array([picture.shape[1] / picture.shape[0] for picture in pictures])
    fractions = np.clip(aspects / aspects.sum(), 0.2, 0.8)
    widths = fractions / fractions.sum() * (WIDTH - gap)
    height = min((widths / aspects).max(), 0.55 * WIDTH)
    widths = np.minimum(widths, aspects * height)
    panels, left = [], 0.0
    for picture, inches in zip(pictures, widths, strict=True):
        rows, columns = picture.shape[:2]
        scale = inches / columns
        top = (height - rows * scale) / 2
        extent = (left, left + inches, top + rows * scale, top)
        small = drawing.shrink(picture, max(inches, rows * scale))
        axes.imshow(small, extent=extent, interpolation="bicubic")
        panels.append(_Panel(left, top, scale, (rows, columns)))
        left += inches + gap
    drawing.hide_frame(axes)
    axes.set(xlim=(0, left - gap), ylim=(height, 0), aspect="equal", autoscale_on=False)
    axes.figure.set_size_inches(max(left - gap, 3) + 0.1, height + 0.5)
    return panels


def _spread(lines: np.ndarray, limit: int) -> np.ndarray:
    """Returns at most `limit` of the lines (M, 2, 2), or of their colours, spread over the list."""
    count = len(lines)
    return lines[np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))]


def position_colours(points: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Returns the RGB colours (N, 3) of points (N, 2) of an input of (height, width) pixels.

    The hue runs from left to right, and the lower, the darker: near matches have near colours.
    """
    across, down = np.clip(np.asarray(points, float) / np.array(size[::-1], float), 0, 1).T
    return hsv_to_rgb(np.stack([0.85 * across, np.full_like(across, 0.9), 1 - 0.4 * down], axis=1))


def _draw_outlines(
    axes: Axes,
    query: LocalFeatures,
    database: LocalFeatures,
    panels: Sequence[_Panel],
    homography: np.ndarray | None,
) -> None:
    height, width = query.input_size
    box = np.array([[0, 0], [width, 0], [width, height], [0, height]])  # in the network's input
    outlines = [box, None if homography is None else _project(homography, box)]
    for features, panel, corners in zip((query, database), panels, outlines, strict=True):
        if corners is None:
            continue
        points = panel.inches(features.to_photograph(corners))
        shape = Polygon(_within(points, panel), fill=False, edgecolor=style.BOX_COLOUR, linewidth=2)
        shape.set(joinstyle="miter", path_effects=drawing.outlined("black", 4))
        axes.add_patch(shape)
        columns, rows = np.multiply(panel.size[::-1], panel.scale)
        frame = Rectangle((panel.left, panel.top), columns, rows, transform=axes.transData)
        shape.set_clip_path(frame)


def _within(points: np.ndarray, panel: _Panel) -> np.ndarray:
    """An outline (4, 2), cut at the photograph's edges where it is convex, so that all is seen."""
    corner, inset = np.array([panel.left, panel.top]), 0.02
    columns, rows = np.multiply(panel.size[::-1], panel.scale)
    steps = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (columns - 2 * inset, rows - 2 * inset)
    frame, outline = (corners.astype(np.float32) for corners in (corner + inset + steps, points))
    if not cv2.isContourConvex(outline):
        return points
    area, cut = cv2.intersectConvexConvex(outline, frame)
    return cut[:, 0].astype(float) if area > 0 else points


def _project(homography: np.ndarray, points: np.ndarray) -> np.ndarray | None:
    """Points (N, 2) through a homography; None where some would lie on or behind the horizon."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ np.asarray(homography, float).T
    depth = mapped[:, 2]
    if not np.isfinite(mapped).all() or depth.min() * depth.max() <= 0:
        return None
    return mapped[:, :2] / depth[:, None]
