"""Maps over photographs: attention, reconstruction error, dropped features."""

from collections.abc import Mapping, Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from vitgal.features.local import LocalFeatures
from vitgal.viz import drawing
from vitgal.viz.charts import PANELS, draw_curves, filled_columns
from vitgal.viz.style import DROPPED_COLOURS, HEAT_MAP, INLIER_COLOUR, INLIER_EDGE_COLOUR, styled


def percentile_range(maps: Sequence[np.ndarray], cut: float) -> Normalize:
    """Returns one colour range for maps of any shape, without the lowest and highest `cut` %."""
    values = np.concatenate([heat.ravel() for heat in maps])
    low, high = np.percentile(values, (cut, 100 - cut))
    return Normalize(low, high if high > low else low + 1)


def mix_heat(picture: np.ndarray, heat: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """Mixes a map of shape (h, w), >= 0, into one box of a grey copy of a photograph (H, W, 3).

    The map is drawn relative to its peak and spans the box (x0, y0, x1, y1) in pixels. Returns
    (H, W, 3) uint8 RGB. Raises ValueError for a map that is not (h, w) and finite.
    """
    (heat,) = _check_maps([heat], 1, "attention maps")
    x0, y0, x1, y1 = box
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    heat, size = heat / (heat.max() or 1.0), (x1 - x0, y1 - y0)
    levels = cv2.resize(heat, size, interpolation=cv2.INTER_NEAREST)
    colours = (plt.get_cmap(HEAT_MAP)(levels)[..., :3] * 255).astype(np.uint8)
    picture[y0:y1, x0:x1] = cv2.addWeighted(picture[y0:y1, x0:x1], 0.4, colours, 0.6, 0)
    return picture


@styled
def reconstruction_error(
    log: pd.DataFrame,
    images: Sequence[drawing.ImageSource] = (),
    errors: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Draws the autoencoder's reconstruction error over the steps, and its maps over photographs.

    log: rows of log.jsonl with `step`, `reconstruction`, `val_reconstruction`. errors: per
    photograph the error (h, w) of each token, spanning it; all maps share one colour range, from
    the 1st to the 99th percentile. Returns the axes, shape (1 + 2 * photographs,): the curves, then
    the photographs, then their maps. Raises ValueError where the maps are not (h, w) and finite, or
    their number differs from the images'.
    """
    pictures = [drawing.read_pixels(image) for image in images]
    errors = _check_maps(errors, len(pictures), "error maps")
    columns = PANELS["reconstruction error"]
    ratios = [1.4] + [1.0] * len(pictures)
    width = 10 if pictures else 5
    figure = plt.figure(figsize=(width, 3.1))
    grid = figure.add_gridspec(2, len(ratios), width_ratios=ratios)
    curves = figure.add_subplot(grid[:, 0])
    if filled_columns(log, columns):
        draw_curves(curves, log, columns, percent=False)
        curves.set_title("reconstruction error", loc="left")
    else:
        drawing.write_sentence(curves, "the log holds no\nreconstruction error")
    cells = [figure.add_subplot(grid[row, i]) for row in (0, 1) for i in range(1, len(ratios))]
    if pictures:
        norm, inches = percentile_range(errors, 1), width / sum(ratios)
        for index, (picture, error) in enumerate(zip(pictures, errors, strict=True)):
            drawing.draw_photograph(cells[index], picture, inches)
            _draw_heat(cells[len(pictures) + index], picture, error, norm, inches)
        _add_heat_bar(cells, norm, "squared error per token")
    return np.array([curves, *cells])


@styled
def attention_maps(
    images: Sequence[drawing.ImageSource], before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> np.ndarray:
    """Draws the class attention before and after the autoencoder over each photograph.

    Each map is divided by its mean, so that 1 is uniform attention. All maps share one colour
    range, cut at the 99th percentile. before, after: shape (h, w), one a photograph: class
    attention, summed or averaged over heads, of the backbone and of the autoencoder. Returns the
    axes, shape (photographs, 3); a sentence without photographs. Raises ValueError where the maps
    are not (h, w) and finite, or their number differs from the images'.
    """
    pictures = [drawing.read_pixels(image) for image in images]
    before, after = (
        [heat / (heat.mean() or 1.0) for heat in _check_maps(maps, len(pictures), "attention maps")]
        for maps in (before, after)
    )
    if not pictures:
        return np.array([[drawing.sentence_figure("no photographs")]])
    norm = Normalize(0, percentile_range(before + after, 1).vmax)
    inches = 0.88 * 8 / 3  # the colour bar takes the rest
    heights = [min(1.4, picture.shape[0] / picture.shape[1]) * inches for picture in pictures]
    size = (8, sum(heights) + 0.06 * len(heights) + 0.25)
    rows = len(pictures)
    figure, axes = plt.subplots(rows, 3, figsize=size, height_ratios=heights, squeeze=False)
    drawing.tighten(figure)
    for row, picture, *maps in zip(axes, pictures, before, after, strict=True):
        drawing.draw_photograph(row[0], picture, inches)
        for cell, heat in zip(row[1:], maps, strict=True):
            _draw_heat(cell, picture, heat, norm, inches)
    for cell, title in zip(axes[0], ("photograph", "backbone", "autoencoder"), strict=True):
        cell.set_title(title)
    _add_heat_bar(list(axes.flat), norm, "attention / mean attention")
    return axes


@styled
def attention_heads(
    image: drawing.ImageSource,
    attention: Mapping[float, np.ndarray],
    scores: Mapping[float, np.ndarray],
    *,
    box: Sequence[int] | None = None,
) -> np.ndarray:
    """Draws the class attention of every head at every scale, and the score of all heads.

    Every map is drawn relative to its own peak. attention, scores: scale -> maps of shape
    (heads, h, w), and one of shape (h, w). box: (x0, y0, x1, y1), the pixels of the photograph
    that the network saw; None: all. Returns the axes, shape (scales, 1 + heads), the scores first;
    a sentence without scales.
    """
    picture = drawing.read_pixels(image)
    if box is not None:
        x0, y0, x1, y1 = (int(side) for side in box)
        picture = picture[y0:y1, x0:x1]
    if not attention:
        return np.array([[drawing.sentence_figure("no scale")]])
    columns = 1 + len(next(iter(attention.values())))
    inches = 10 / columns
    height = min(1.4, picture.shape[0] / picture.shape[1]) * inches
    size = (10, len(attention) * (height + 0.08) + 0.3)
    figure, axes = plt.subplots(len(attention), columns, figsize=size, squeeze=False)
    drawing.tighten(figure)
    small = drawing.shrink(picture, inches)
    whole = (0, 0, small.shape[1], small.shape[0])
    for row, (scale, heads) in zip(axes, attention.items(), strict=True):
        for cell, heat in zip(row, (scores[scale], *heads), strict=True):
            drawing.draw_photograph(cell, mix_heat(small, heat, whole), inches)
        row[0].set_ylabel(f"scale {scale:g}")
    titles = ["score: all heads", *(f"head {number}" for number in range(1, columns))]
    for cell, title in zip(axes[0], titles, strict=True):
        cell.set_title(title)
    return axes


@styled
def dropped_features(
    image: drawing.ImageSource,
    kept: LocalFeatures,
    dropped: LocalFeatures,
    reasons: Sequence[str],
    *,
    titles: Mapping[str, str] | None = None,
) -> np.ndarray:
    """Draws the features of a photograph that were kept, and those that were dropped, by reason.

    reasons: one a dropped feature. titles: reason -> its meaning, for the legend. Returns the
    axes, shape (2,). Raises ValueError where the number of reasons differs from that of dropped
    features.
    """
    reasons = np.asarray(reasons, dtype=str)
    if reasons.shape != (len(dropped),):
        raise ValueError(f"{len(dropped)} dropped features, but {reasons.shape} reasons")
    picture = drawing.read_pixels(image)
    height = 4.5 * min(1.3, picture.shape[0] / picture.shape[1])
    figure, axes = plt.subplots(1, 2, figsize=(9, height + 0.6))
    for panel in axes:
        drawing.draw_photograph(panel, picture, 4.5)
        panel.autoscale(False)
    (dots,) = axes[0].plot(*kept.original_keypoints().T, "o", color=INLIER_COLOUR, markersize=3.5)
    dots.set_markeredgecolor(INLIER_EDGE_COLOUR)
    axes[0].set_title(f"{len(kept)} kept")
    axes[1].set_title(f"{len(dropped)} dropped")
    points = dropped.original_keypoints()
    for name, marker, colour in zip(sorted(set(reasons)), "x+1", DROPPED_COLOURS, strict=False):
        count, meaning = (reasons == name).sum(), (titles or {}).get(name, name)
        (marks,) = axes[1].plot(*points[reasons == name].T, marker, color=colour, markersize=3.5)
        marks.set_path_effects(drawing.outlined("black", 2.2))
        marks.set_label(drawing.drawable(f"{count}: {meaning}"))
    if len(dropped):
        figure.legend(loc="outside lower right")
    return axes


def _check_maps(maps: Sequence[np.ndarray], count: int, name: str) -> list[np.ndarray]:
    maps = [np.asarray(heat, dtype=float) for heat in maps]
    if len(maps) != count:
        raise ValueError(f"{len(maps)} {name} for {count} images: give one each")
    for heat in maps:
        if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
            raise ValueError(f"{name} must be (h, w), finite and not empty, not {heat.shape}")
    return maps


def _draw_heat(
    axes: Axes, image: np.ndarray, heat: np.ndarray, norm: Normalize, inches: float
) -> None:
    grey = cv2.cvtColor(drawing.shrink(image, inches), cv2.COLOR_RGB2GRAY)
    extent = drawing.pixel_extent(image)
    axes.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=255)
    axes.imshow(heat, cmap=HEAT_MAP, norm=norm, alpha=0.6, interpolation="nearest", extent=extent)
    drawing.hide_frame(axes)


def _add_heat_bar(cells: Sequence[Axes], norm: Normalize, label: str) -> None:
    scale, figure = ScalarMappable(norm, HEAT_MAP), cells[0].figure
    bar = figure.colorbar(scale, ax=cells, extend="max", aspect=25, pad=0.02, panchor=False)
    bar.outline.set_visible(False)
    bar.set_label(label)
