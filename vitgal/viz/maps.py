"""Maps over photographs: attention, reconstruction error, dropped features."""

from collections.abc import Mapping, Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from vitgal.features.local import LocalFeatures
from vitgal.viz import drawing
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
    levels = np.clip(cv2.resize(heat, size, interpolation=cv2.INTER_CUBIC), 0, 1)
    colours = (plt.get_cmap(HEAT_MAP)(levels)[..., :3] * 255).astype(np.uint8)
    picture[y0:y1, x0:x1] = cv2.addWeighted(picture[y0:y1, x0:x1], 0.4, colours, 0.6, 0)
    return picture


@styled
def token_figure(
    images: Sequence[drawing.ImageSource],
    tokens: Sequence[np.ndarray],
    errors: Sequence[np.ndarray],
) -> np.ndarray:
    """Draws what tokens see, and what the autoencoder loses of them, beside their photographs.

    In the second row similar colours are similar tokens: their first three principal components,
    over all photographs, as red, green and blue. tokens: per photograph (h, w, D), spanning it.
    errors: the error (h, w) of each token; all share one colour range, from the 1st to the 99th
    percentile. Returns the axes, shape (3, photographs); a sentence without photographs. Raises
    ValueError where the maps are not (h, w) and finite, or a number differs from the images'.
    """
    pictures = [drawing.read_pixels(image) for image in images]
    # Rounded, here and below, so that last digits, which depend on the threads, change no pixel.
    errors = [error.round(2) for error in _check_maps(errors, len(pictures), "error maps")]
    if not pictures:
        return np.array([[drawing.sentence_figure("no photographs")]])
    if len(tokens) != len(pictures):
        raise ValueError(f"{len(tokens)} maps of tokens for {len(pictures)} images: give one each")
    norm, inches = percentile_range(errors, 1), 8.8 / len(pictures)
    tallest = max(min(1.4, picture.shape[0] / picture.shape[1]) for picture in pictures)
    size = (10, 3 * tallest * inches + 0.5)
    figure, axes = plt.subplots(3, len(pictures), figsize=size, squeeze=False)
    drawing.tighten(figure)
    columns = zip(axes.T, pictures, component_colours(tokens), errors, strict=True)
    for cells, picture, colours, error in columns:
        drawing.draw_photograph(cells[0], picture, inches)
        drawing.draw_photograph(cells[1], upsampled(colours, picture), inches)
        _draw_heat(cells[2], picture, error, norm)
    for cell, name in zip(axes[:, 0], ("photograph", "tokens, as colours", "error"), strict=True):
        cell.set_ylabel(name)
    _add_heat_bar(list(axes[2]), norm, "squared error", extend="both")
    return axes


def component_colours(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the first three principal components of tokens as colours.

    tokens: maps (H, W, D). The components are those of all maps together; each is stretched from
    its 2nd to its 98th percentile, in 32 levels. Returns maps (H, W, 3) uint8. The sign is that of
    a component's largest weight.
    """
    rows = np.concatenate([np.asarray(part, float).reshape(-1, part.shape[2]) for part in tokens])
    rows -= rows.mean(axis=0)
    axes = np.linalg.svd(rows.T @ rows)[0][:, :3]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    values = rows @ axes
    low, high = np.percentile(values, (2, 98), axis=0)
    levels = np.clip((values - low) / np.maximum(high - low, 1e-9), 0, 1)
    levels = np.pad(levels, ((0, 0), (0, 3 - levels.shape[1])))  # tokens of one or two values
    ends = np.cumsum([part.shape[0] * part.shape[1] for part in tokens])[:-1]
    parts = np.split((8 * (31 * levels).round()).astype(np.uint8), ends)
    return [row.reshape(*part.shape[:2], 3) for row, part in zip(parts, tokens, strict=True)]


def upsampled(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Returns a map (h, w) or (h, w, 3) smoothly enlarged to a photograph's (H, W).

    No value lies outside the map's range, which cubic curves would leave.
    """
    smooth = cv2.resize(values, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth, values.min(), values.max())


@styled
def attention_maps(
    images: Sequence[drawing.ImageSource], before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> np.ndarray:
    """Draws the class attention before and after the autoencoder over each photograph.

    Each map is divided by its mean, so that 1 is uniform attention. All maps share one colour
    range, cut at the 99th percentile, and are enlarged smoothly. before, after: shape (h, w), one a
    photograph: class attention, summed or averaged over heads, of the backbone and of the
    autoencoder. Returns the axes, shape (photographs, 3); a sentence without photographs. Raises
    ValueError where the maps are not (h, w) and finite, or their number differs from the images'.
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
            _draw_heat(cell, picture, heat, norm)
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
    box: Sequence[int],
) -> np.ndarray:
    """Draws the class attention of every head at every scale, and the score of all heads.

    Every map is drawn relative to its own peak. attention, scores: scale -> maps of shape
    (heads, h, w), and one of shape (h, w). box: (x0, y0, x1, y1), the pixels of the photograph
    that the network saw. Returns the axes, shape (scales, 1 + heads), the scores first; a sentence
    without scales.
    """
    x0, y0, x1, y1 = box
    picture = drawing.read_pixels(image)[y0:y1, x0:x1]
    if not attention:
        return np.array([[drawing.sentence_figure("no scale")]])
    columns = 1 + len(next(iter(attention.values())))
    ratio, inches = picture.shape[0] / picture.shape[1], 10 / columns
    height = min(0.7, ratio) * inches
    inches = max(height / ratio, 0.5 * inches)  # the titles need half of it
    size = (columns * inches, len(attention) * (height + 0.08) + 0.3)
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
    titles: Mapping[str, str],
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
        count, meaning = (reasons == name).sum(), titles.get(name, name)
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


def _draw_heat(axes: Axes, image: np.ndarray, heat: np.ndarray, norm: Normalize) -> None:
    """Draws a map alone, in the colours of its bar: over a photograph they would not match it."""
    small = drawing.reduce_image(image, 400)[0]
    smooth, extent = upsampled(heat, small), drawing.pixel_extent(image)
    colours = plt.get_cmap(HEAT_MAP)(norm(smooth))[..., :3]
    axes.imshow((255 * colours).round().astype(np.uint8), extent=extent)
    drawing.hide_frame(axes)


def _add_heat_bar(
    cells: Sequence[Axes], norm: Normalize, label: str, *, extend: str = "max"
) -> None:
    scale, figure = ScalarMappable(norm, HEAT_MAP), cells[0].figure
    bar = figure.colorbar(scale, ax=cells, extend=extend, aspect=20, pad=0.02, panchor=False)
    bar.outline.set_visible(False)
    bar.set_label(label)
