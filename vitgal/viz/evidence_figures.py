"""Figures that show why a pair was counted: enlarged patches, the warped query, attention."""

from collections.abc import Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from vitgal.features.local import LocalFeatures
from vitgal.retrieval.verification import PairInspection
from vitgal.viz import drawing, matching, style

CROPS = 3  # matches that are enlarged
AROUND = 3.0  # sides of a crop, in sides of the patch
PIXELS = 1000  # the longer side of the warped photographs
GROUPS = 10  # of features, by score
SQUARES = 8  # of the checkerboard, along the longer side


@style.styled
def match_figure(
    query: matching.MatchedImage,
    database: matching.MatchedImage,
    pair: PairInspection,
    *,
    max_lines: int,
) -> np.ndarray:
    """Draws the matches of a pair, three of them enlarged, and the query warped as a proof.

    The enlarged ones are inliers from left, middle and right of the query. The homography, if
    there is one, warps the query's box onto the database image; a checkerboard of both shows
    whether edges continue. Arguments and errors: as for `match_lines`. Returns the axes: matches,
    crops and, with a homography, the warped query.
    """
    warps = _warps(query, database, pair.verification.homography)
    rows = 1 + bool(pair.verification.count) + bool(warps)
    figure, axes = plt.subplots(rows, 1, squeeze=False)
    axes = axes[:, 0]
    matching.match_lines(query, database, pair, max_lines=max_lines, axes=axes[0])
    heights = [figure.get_figheight()]
    if pair.verification.count:
        inliers = pair.matches[pair.verification.inliers]
        heights.append(_draw_crops(axes[1], (query, database), inliers) + 0.25)
    if warps:
        heights.append(_draw_row(axes[-1], warps) + 0.25)
    axes[0].get_gridspec().set_height_ratios(heights)
    figure.set_size_inches(matching.WIDTH + 0.1, sum(heights))
    drawing.tighten(figure)
    return axes


def spread_matches(matches: np.ndarray, features: LocalFeatures) -> np.ndarray:
    """Returns CROPS of the matches (M, 2), or all: the query's best feature in each part of it.

    The parts lie from left to right, with as many matches in each.
    """
    order = np.argsort(features.keypoints[matches[:, 0], 0], kind="stable")
    parts = [part for part in np.array_split(matches[order], CROPS) if len(part)]
    best = [part[np.argmax(np.nan_to_num(features.scores[part[:, 0]]))] for part in parts]
    return np.array(best, int).reshape(-1, 2)


def _draw_crops(axes: Axes, sides: Sequence[matching.MatchedImage], inliers: np.ndarray) -> float:
    """Draws crops around both ends of some matches; returns the height in inches."""
    chosen = spread_matches(inliers, sides[0].features)
    gap, between = 0.04, 0.3
    inches = (matching.WIDTH - 2 * between - 3 * gap) / 6
    query = sides[0].features
    colours = matching.position_colours(query.keypoints[chosen[:, 0]], query.input_size)
    for number, (match, colour) in enumerate(zip(chosen, colours, strict=True)):
        for column, side in enumerate(sides):
            left = number * (2 * inches + gap + between) + column * (inches + gap)
            (square,) = matching.patch_squares(side.features.subset([match[column]]))
            wide, high = (max(3, round(AROUND * side)) for side in square.get_bbox().size)
            pixels = cv2.getRectSubPix(
                drawing.read_pixels(side.image),
                (wide, high),
                tuple(map(float, square.get_center())),
            )
            extent = (left, left + inches, inches, 0)
            axes.imshow(pixels, extent=extent, interpolation="bicubic")
            for corner, length, line, edge in (
                ((left, 0), inches, 3.0, colour),
                ((left + inches / 3, inches / 3), inches / 3, 1.2, style.BOX_COLOUR),
            ):
                axes.add_patch(
                    Rectangle(corner, length, length, fill=False, edgecolor=edge, linewidth=line)
                )
    drawing.hide_frame(axes)
    axes.set(xlim=(-0.03, matching.WIDTH), ylim=(inches + 0.03, -0.03), aspect="equal")
    axes.set_title("three of the inliers, enlarged (query left; the square is the patch)")
    return inches


def _warps(
    query: matching.MatchedImage, database: matching.MatchedImage, homography: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The query's box warped onto the database image, the image, and a checkerboard of both."""
    if homography is None or not np.isfinite(homography).all():
        return {}
    (first, first_scale), (second, second_scale) = (
        drawing.reduce_image(drawing.read_pixels(side.image), PIXELS) for side in (query, database)
    )
    whole = _to_pixels(database.features, second_scale) @ homography
    whole = whole @ np.linalg.inv(_to_pixels(query.features, first_scale))
    inside = np.zeros(first.shape[:2], np.uint8)
    x0, y0, x1, y1 = (round(side * first_scale) for side in query.features.box)
    inside[y0:y1, x0:x1] = 1
    size = second.shape[1::-1]
    warped = cv2.warpPerspective(first, whole, size, borderMode=cv2.BORDER_REPLICATE)
    covered = cv2.warpPerspective(inside, whole, size, flags=cv2.INTER_NEAREST)[..., None] > 0
    side = max(1, max(size) // SQUARES)
    rows, columns = np.indices(second.shape[:2]) // side
    odd = ((rows + columns) % 2 == 1)[..., None]
    return {
        "query, warped": np.where(covered, warped, 235).astype(np.uint8),
        "database image": second,
        "checkerboard of both": np.where(covered & odd, warped, second),
    }


def _to_pixels(features: LocalFeatures, scale: float) -> np.ndarray:
    """The matrix (3, 3) from the network's input to pixels of the reduced photograph."""
    (left, top), (right, bottom) = features.to_photograph(np.array([[0, 0], [1, 1]]))
    matrix = np.array(
        [[right - left, 0, left + 0.5], [0, bottom - top, top + 0.5], [0, 0, 1 / scale]]
    )
    return matrix * scale - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]


def _draw_row(axes: Axes, pictures: dict[str, np.ndarray]) -> float:
    """Draws pictures of one size side by side; returns the height in inches."""
    gap = 0.08
    inches = (matching.WIDTH - gap * (len(pictures) - 1)) / len(pictures)
    rows, columns = next(iter(pictures.values())).shape[:2]
    height = min(inches * rows / columns, 2.0)
    wide = height * columns / rows
    for number, (name, pixels) in enumerate(pictures.items()):
        left = number * (inches + gap) + (inches - wide) / 2
        small, extent = drawing.shrink(pixels, max(wide, height)), (left, left + wide, height, 0)
        axes.imshow(small, extent=extent, interpolation="bicubic")
        note = axes.annotate(name, (left + wide / 2, height), (0, -4), fontsize=8)
        note.set(anncoords="offset points", ha="center", va="top")
    drawing.hide_frame(axes)
    axes.set(xlim=(0, matching.WIDTH), ylim=(height, 0), aspect="equal")
    return height


@style.styled
def attention_and_inliers(query: matching.MatchedImage, pair: PairInspection) -> np.ndarray:
    """Draws where the query's attention lies, where its inliers lie, and how the two agree.

    Left the photograph with `query.heat`, in the middle its features: inliers filled, matches
    that geometry rejects as crosses, unmatched ones as points; right the share of matches that are
    inliers, by tenths of the features from the lowest scores to the highest. Returns the axes,
    shape (3,).
    """
    picture = drawing.read_pixels(query.image)
    inches = 3.4
    height = inches * min(1.3, picture.shape[0] / picture.shape[1])
    figure, axes = plt.subplots(
        1, 3, figsize=(10, max(2.7, height + 0.75)), width_ratios=[3.4, 3.4, 3]
    )
    drawing.draw_photograph(axes[0], query.pixels(), inches)
    axes[0].set_title("attention")
    drawing.draw_photograph(axes[1], picture, inches)
    points, matches = query.features.original_keypoints(), pair.matches
    inliers = pair.verification.inliers
    unmatched = np.setdiff1d(np.arange(len(points)), matches[:, 0])
    dark = drawing.outlined("black", 1.4)
    for chosen, marker, colour, size, name in (
        (unmatched, ".", "white", 2, "no match"),
        (matches[~inliers, 0], "x", style.REJECTED_COLOUR, 3, "rejected"),
        (matches[inliers, 0], "o", style.INLIER_COLOUR, 3.5, "inlier"),
    ):
        (marks,) = axes[1].plot(*points[chosen].T, marker, color=colour, markersize=size)
        marks.set(label=f"{name}: {len(chosen)}", path_effects=dark)
    axes[1].set_title("the query's features")
    legend = axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3)
    plt.setp(legend.get_texts(), fontsize=7.5)
    legend.get_frame().set(facecolor="#555555", alpha=0.15)
    _draw_rates(axes[2], *inlier_rate_by_score(query.features.scores, matches, inliers))
    return axes


def inlier_rate_by_score(
    scores: np.ndarray, matches: np.ndarray, inliers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share of a query's matches that are inliers, by score, and the matches' number.

    scores: (N,) of the query's features. matches: (M, 2). inliers: (M,) bool. The features are
    divided by rank into GROUPS, the lowest scores first; ties keep their order. Returns shares and
    numbers, shape (GROUPS,); nan where a group has no match.
    """
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    group = (ranks * GROUPS // max(1, len(scores)))[matches[:, 0]]
    number = np.bincount(group, minlength=GROUPS)
    right = np.bincount(group[np.asarray(inliers, bool)], minlength=GROUPS)
    shares = np.divide(right, number, out=np.full(GROUPS, np.nan), where=number > 0)
    return shares, number


def _draw_rates(axes: Axes, shares: np.ndarray, numbers: np.ndarray) -> None:
    positions = np.arange(1, len(shares) + 1)
    axes.bar(positions, 100 * shares, color=style.INLIER_CURVE_COLOUR, width=0.8)
    for x, rate, number in zip(positions, shares, numbers, strict=True):
        text = axes.text(x, 2 + 100 * np.nan_to_num(rate), number, ha="center", fontsize=7)
        text.set_color(style.INK)
    axes.set(
        xlabel="tenth of the features, by score (10: highest)", ylabel="inliers of matches (%)"
    )
    axes.set(ylim=(0, 110), xticks=positions)
    axes.set_title("numbers: matches", loc="left")
    axes.grid(axis="y")
