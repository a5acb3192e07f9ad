"""Maps over photographs: attention, reconstruction, dropped features."""

import os
from collections.abc import Mapping, Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from vitgal.features.local import LocalFeatures
from vitgal.viz.style import (
    DROPPED,
    DROPPED_BY,
    HEAT,
    INLIER,
    INLIER_EDGE,
    PANELS,
    STYLE,
    Image,
    _bare,
    _only_says,
    _outlined,
    _photograph,
    _pixels,
    _say,
    _shrink,
    _span,
    _tighten,
)
from vitgal.viz.training_curves import _curves, _present


def _maps(maps: Sequence[np.ndarray], count: int, name: str) -> list[np.ndarray]:
    """Maps (h, w), one a photograph, finite and not empty."""
    maps = [np.asarray(one, dtype=float) for one in maps]
    if len(maps) != count:
        raise ValueError(f"{len(maps)} {name} for {count} images: give one each")
    for one in maps:
        if one.ndim != 2 or not one.size or not np.isfinite(one).all():
            raise ValueError(f"{name} must be (h, w), finite and not empty, not {one.shape}")
    return maps


def _percentiles(maps: Sequence[np.ndarray], cut: float) -> Normalize:
    """One colour scale for several maps, without the lowest and highest `cut` percent."""
    values = np.concatenate([one.ravel() for one in maps])
    low, high = np.percentile(values, (cut, 100 - cut))
    return Normalize(low, high if high > low else low + 1)


def _heat(axes: Axes, image: np.ndarray, heat: np.ndarray, norm: Normalize, inches: float) -> None:
    """A map of patches over the photograph in grey; the map spans the whole photograph."""
    grey = cv2.cvtColor(_shrink(image, inches), cv2.COLOR_RGB2GRAY)
    axes.imshow(grey, extent=_span(image), cmap="gray", vmin=0, vmax=255)
    style = {"cmap": HEAT, "norm": norm, "alpha": 0.6, "interpolation": "nearest"}
    axes.imshow(heat, extent=_span(image), **style)
    _bare(axes)


def _heat_bar(cells: Sequence[Axes], norm: Normalize, label: str) -> None:
    """The scale of the maps, beside them all; the photographs stay where they are."""
    bar = cells[0].figure.colorbar(
        ScalarMappable(norm, HEAT), ax=cells, extend="max", aspect=25, pad=0.02, panchor=False
    )
    bar.outline.set_visible(False)
    bar.set_label(label)


def reconstruction_error(
    log: pd.DataFrame,
    images: Sequence[Image] = (),
    errors: Sequence[np.ndarray] = (),
    *,
    width: float = 10.0,
) -> np.ndarray:
    """The autoencoder's reconstruction error over the steps, and where in photographs it is large.

    log: rows of log.jsonl with `step`, `reconstruction`, `val_reconstruction`. images, errors: per
    photograph the error (h, w) of each token, row by row, spanning the photograph; all maps share
    one scale, from the 1st to the 99th percentile. Returns the axes: the curves, then the
    photographs, then their maps. A log without values says so; no images: curves alone. Raises
    ValueError for maps that are not (h, w) and finite.
    """
    pictures = [_pixels(image) for image in images]
    errors = _maps(errors, len(pictures), "error maps")
    columns = PANELS["reconstruction error"]
    known = _present(log, columns)
    ratios = [1.4] + [1.0] * len(pictures)
    with plt.rc_context(STYLE):
        size = (width if pictures else width / 2, 3.1)
        figure = plt.figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(2, len(ratios), width_ratios=ratios)
        curves = figure.add_subplot(grid[:, 0])
        if known:
            _curves(curves, log, columns, percent=False)
            curves.set_title("reconstruction error", loc="left")
        else:
            _say(curves, "the log holds no\nreconstruction error")
        cells = [figure.add_subplot(grid[row, i]) for row in (0, 1) for i in range(1, len(ratios))]
        if pictures:
            norm, inches = _percentiles(errors, 1), width / sum(ratios)
            for index, (picture, error) in enumerate(zip(pictures, errors, strict=True)):
                _photograph(cells[index], picture, inches)
                _heat(cells[len(pictures) + index], picture, error, norm, inches)
            _heat_bar(cells, norm, "squared error per token")
    return np.array([curves, *cells])


def attention_maps(
    images: Image | Sequence[Image],
    before: np.ndarray | Sequence[np.ndarray],
    after: np.ndarray | Sequence[np.ndarray],
    *,
    names: tuple[str, str] = ("backbone", "autoencoder"),
    width: float = 8.0,
) -> np.ndarray:
    """Class attention before and after the autoencoder as heat over each photograph.

    images: one photograph or several. before, after: (h, w) each (or one a photograph): the
    attention that the class token pays to each token, summed or averaged over heads. Each map is
    divided by its mean: 1 = what every token would get if all got the same. One scale for all, cut
    at the 99th percentile. Returns the axes (photographs, 3). No photograph: one axes that says
    so. Raises ValueError for maps that are not (h, w), finite, and of one number with the images.
    """
    if isinstance(images, str | os.PathLike | np.ndarray):
        images, before, after = [images], [before], [after]
    pictures = [_pixels(image) for image in images]
    first, second = (_maps(maps, len(pictures), "attention maps") for maps in (before, after))
    with plt.rc_context(STYLE):
        if not pictures:
            return np.array([[_only_says("no photographs", width=width / 2)]])
        first, second = ([one / (one.mean() or 1.0) for one in maps] for maps in (first, second))
        norm = Normalize(0, _percentiles(first + second, 1).vmax)
        axes, inches = _photograph_rows(pictures, 3, width)
        for index, (row, picture) in enumerate(zip(axes, pictures, strict=True)):
            _photograph(row[0], picture, inches)
            _heat(row[1], picture, first[index], norm, inches)
            _heat(row[2], picture, second[index], norm, inches)
        for cell, title in zip(axes[0], ("photograph", *names), strict=True):
            cell.set_title(title)
        _heat_bar(list(axes.flat), norm, "attention / mean attention")
    return axes


def _photograph_rows(
    pictures: Sequence[np.ndarray], columns: int, width: float
) -> tuple[np.ndarray, float]:
    """Axes (photographs, columns), rows as high as their photograph needs; a column's inches."""
    inches = 0.88 * width / columns  # a scale beside them takes the rest
    heights = [min(1.4, picture.shape[0] / picture.shape[1]) * inches for picture in pictures]
    figure, axes = plt.subplots(
        *(len(pictures), columns),
        figsize=(width, sum(heights) + 0.06 * len(heights) + 0.25),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    _tighten(figure)
    return axes, inches


def _heated(picture: np.ndarray, heat: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """A photograph with a map over one box of it, mixed into a grey copy as `_heat` draws it."""
    (heat,) = _maps([heat], 1, "attention maps")
    x0, y0, x1, y1 = box
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    shares = cv2.resize(
        heat / (heat.max() or 1.0), (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST
    )
    colours = (plt.get_cmap(HEAT)(shares)[..., :3] * 255).astype(np.uint8)
    picture[y0:y1, x0:x1] = cv2.addWeighted(picture[y0:y1, x0:x1], 0.4, colours, 0.6, 0)
    return picture


def _crosses(axes: Axes, points: np.ndarray) -> None:
    """Small marks at features that were dropped; points: (N, 2) inches."""
    style = {"color": DROPPED, "markersize": 3.2, "markeredgewidth": 0.8}
    (marks,) = axes.plot(*points.T, "x", scalex=False, scaley=False, zorder=2, **style)
    marks.set_path_effects(_outlined("black", 1.6))


def attention_heads(
    image: Image,
    attention: Mapping[float, np.ndarray],
    scores: Mapping[float, np.ndarray],
    *,
    box: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    width: float = 10.0,
) -> np.ndarray:
    """The class attention of every head at every scale, and the score that they make together.

    attention: scale -> (heads, h, w), each head over its peak. scores: scale -> (h, w), of mean 1.
    box: what of the photograph was given to the network, None: all. scales: the rows; None: all.
    Every map is drawn over its own peak. Returns the axes (scales, 1 + heads), the scores first. No
    scale: one axes that says so. Raises ValueError for maps that are not finite.
    """
    scales = list(attention) if scales is None else list(scales)
    picture = _pixels(image)
    if box is not None:
        x0, y0, x1, y1 = (int(side) for side in box)
        picture = picture[y0:y1, x0:x1]
    with plt.rc_context(STYLE):
        if not scales:
            return np.array([[_only_says("no scale", width=width / 2)]])
        columns = 1 + len(attention[scales[0]])
        inches = width / columns
        height = min(1.4, picture.shape[0] / picture.shape[1]) * inches
        size = (width, len(scales) * (height + 0.08) + 0.3)
        figure, axes = plt.subplots(
            len(scales), columns, figsize=size, squeeze=False, layout="constrained"
        )
        _tighten(figure)
        small = _shrink(picture, inches)
        whole = (0, 0, small.shape[1], small.shape[0])
        for row, scale in zip(axes, scales, strict=True):
            for cell, heat in zip(row, (scores[scale], *attention[scale]), strict=True):
                _photograph(cell, _heated(small, heat, whole), inches)
            row[0].set_ylabel(f"scale {scale:g}")
        heads = (f"head {number}" for number in range(1, columns))
        for cell, title in zip(axes[0], ("score: all heads", *heads), strict=True):
            cell.set_title(title)
    return axes


def dropped_features(
    image: Image,
    kept: LocalFeatures,
    dropped: LocalFeatures,
    reasons: Sequence[str],
    *,
    titles: Mapping[str, str] | None = None,
    width: float = 9.0,
) -> np.ndarray:
    """The features that were kept, and those that were dropped, by reason.

    reasons: one a dropped feature. titles: reason -> what it means, for the legend. Returns the two
    axes, kept and dropped. Raises ValueError for another number of reasons than of features.
    """
    reasons = np.asarray(reasons, dtype=str)
    if reasons.shape != (len(dropped),):
        raise ValueError(f"{len(dropped)} dropped features, but {reasons.shape} reasons")
    picture = _pixels(image)
    with plt.rc_context(STYLE):
        height = width / 2 * min(1.3, picture.shape[0] / picture.shape[1])
        figure, axes = plt.subplots(1, 2, figsize=(width, height + 0.6), layout="constrained")
        for panel in axes:
            _photograph(panel, picture, width / 2)
        style = {"markersize": 3.5, "scalex": False, "scaley": False}
        axes[0].plot(*kept.original_keypoints().T, "o", color=INLIER, mec=INLIER_EDGE, **style)
        axes[0].set_title(f"{len(kept)} kept")
        axes[1].set_title(f"{len(dropped)} dropped")
        points = dropped.original_keypoints()
        for name, marker, colour in zip(sorted(set(reasons)), "x+1", DROPPED_BY, strict=False):
            label = f"{(reasons == name).sum()}: {(titles or {}).get(name, name)}"
            (marks,) = axes[1].plot(
                *points[reasons == name].T, marker, color=colour, label=label, **style
            )
            marks.set_path_effects(_outlined("black", 2.2))
        if len(dropped):
            figure.legend(loc="outside lower right")
    return axes
