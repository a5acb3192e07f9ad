"""Simulated views of photographs: random geometry, light and occluders, then pixels.

Homographies are nested tuples of Python floats, so that they are the same on every machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from vitgal.data.demo.photographs import Photograph

Matrix = tuple[tuple[float, ...], ...]  # 3 x 3
Coordinate = TypeVar("Coordinate", float, np.ndarray)
Ellipse = tuple[float, float, float, float]  # centre x y, half axes, as fractions of a view's sides
QUERY_LEVEL = 0.2  # up to this level a view has no night, occluder, blur or loss of colour
GRID = 32  # visibility of a region is measured at GRID x GRID points
MIN_WINDOW = 0.25  # a view never shows a smaller fraction of a photograph's sides
OVERHANG = 0.06  # fraction of a side that may lie beyond the photograph (filled by reflection)
MIN_MEAN = 28.0  # mean grey value below which a view is brightened


@dataclass(frozen=True)
class Light:
    """The photometric part of a view."""

    gain: float  # exposure
    balance: tuple[float, float, float]  # red, green, blue gain
    contrast: float
    grey: bool
    night: bool
    blur: float  # sigma in view pixels, 0 for none
    quality: int  # JPEG


@dataclass(frozen=True)
class View:
    """The recipe of one view; lengths in photograph pixels unless noted, angles in degrees."""

    name: str
    photograph: Photograph
    size: tuple[int, int]  # width, height of the view
    matrix: Matrix  # photograph -> view; (0, 0) is the corner of an image, not its first pixel
    tilt: float
    rotation: float
    window: float  # fraction of the photograph's side that the view's side shows
    light: Light
    occluder: Ellipse | None
    noise_seed: int
    visible: float  # fraction of the landmark's region that the view shows
    strength: float


def translation(x: float, y: float) -> Matrix:
    """Returns the matrix that moves a point by (x, y) pixels."""
    return ((1.0, 0.0, x), (0.0, 1.0, y), (0.0, 0.0, 1.0))


def multiply(a: Matrix, b: Matrix) -> Matrix:
    """Returns the product of two 3 x 3 matrices: first `b`, then `a`."""
    return tuple(
        tuple(a[i][0] * b[0][j] + a[i][1] * b[1][j] + a[i][2] * b[2][j] for j in range(3))
        for i in range(3)
    )


def invert(matrix: Matrix) -> Matrix:
    """Returns the inverse of a 3 x 3 matrix up to scale (the adjugate)."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )


def map_points(m: Matrix, x: Coordinate, y: Coordinate) -> tuple[Coordinate, Coordinate]:
    """Maps points by a 3 x 3 matrix; x and y are numbers or arrays of one broadcast shape."""
    w = m[2][0] * x + m[2][1] * y + m[2][2]
    return (m[0][0] * x + m[0][1] * y + m[0][2]) / w, (m[1][0] * x + m[1][1] * y + m[1][2]) / w


def draw_view(
    photograph: Photograph,
    name: str,
    level: float,
    *,
    seed: Sequence[int],
    view_size: int,
    aside: bool = False,
) -> View:
    """Draws one view's recipe; `view_size` is its longer side in pixels.

    `level` goes from 0 (the photograph itself) to 1 (tilted by up to 45 degrees, rotated by up to
    30, cropped to 35 per cent of the sides, at night, blurred, behind an occluder, ...). `aside`
    shows a small part of the photograph near a corner, away from the landmark.
    """
    # Only raw doubles and integers are drawn, which are the same on every machine; their order is
    # part of the demo data.
    rng = np.random.default_rng(list(seed))
    tilt_x, tilt_y = _signed(rng, 0.3, 1.0) * 42 * level, _signed(rng, 0.0, 1.0) * 18 * level
    angles = (tilt_x, tilt_y, _signed(rng, 0.1, 1.0) * 30 * level)
    window = _between(rng, 0.28, 0.36) if aside else 1 - _between(rng, 0.1, 0.65) * level
    size = _view_size(photograph, view_size, 1 + _between(rng, -0.25, 0.25) * level)
    x0, y0, x1, y1 = photograph.region
    if aside:  # a corner on the side without the landmark
        right, lower = x0 + x1 < photograph.width, rng.random() < 0.5
        centre = (photograph.width * float(right), photograph.height * float(lower))
    else:  # the landmark's centre, moved by fractions of the landmark's sides
        right, down = level * _between(rng, -0.5, 0.5), level * _between(rng, -0.5, 0.5)
        centre = ((x0 + x1) / 2 + right * (x1 - x0), (y0 + y1) / 2 + down * (y1 - y0))
    matrix, window = _fit_window(photograph, size, angles, window, centre)
    event = max(0.0, level - QUERY_LEVEL) / (1 - QUERY_LEVEL)
    light = _draw_light(rng, level, event)
    occluder = _draw_occluder(rng, level, event)
    visible = visible_fraction(matrix, photograph.region, size, occluder)
    tilt = math.sqrt(tilt_x * tilt_x + tilt_y * tilt_y)
    return View(
        name=name,
        photograph=photograph,
        size=size,
        matrix=matrix,
        tilt=tilt,
        rotation=angles[2],
        window=window,
        light=light,
        occluder=occluder,
        noise_seed=int(rng.integers(1 << 31)),
        visible=round(visible, 4),
        strength=round(_strength(tilt, angles[2], window, light), 4),
    )


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _signed(rng: np.random.Generator, low: float, high: float) -> float:
    size = _between(rng, low, high)
    return size if rng.random() < 0.5 else -size


def _view_size(photograph: Photograph, longer: int, stretch: float) -> tuple[int, int]:
    aspect = photograph.width / photograph.height * stretch
    if aspect >= 1:
        return longer, max(1, round(longer / aspect))
    return max(1, round(longer * aspect)), longer


def _draw_light(rng: np.random.Generator, level: float, event: float) -> Light:
    night = rng.random() < 0.4 * event
    grey = rng.random() < 0.25 * event and not night
    gain = 2 ** (_between(rng, -0.9, 0.7) * (0.3 + 0.7 * level))
    warmth, tint = _between(rng, -0.28, 0.28) * level, _between(rng, -0.1, 0.1) * level
    blur = _between(rng, 0.6, 2.6) * level
    return Light(
        gain=gain,
        balance=(1 + warmth, 1 + tint, 1 - warmth),
        contrast=1 + _between(rng, -0.4, 0.3) * level,
        grey=grey,
        night=night,
        blur=blur if rng.random() < 0.5 * event else 0.0,
        quality=round(95 - _between(rng, 0, 60) * level),
    )


def _draw_occluder(rng: np.random.Generator, level: float, event: float) -> Ellipse | None:
    half_width = _between(rng, 0.08, 0.12 + 0.14 * level)
    half_height = _between(rng, 0.12, 0.16 + 0.3 * level)
    ellipse = (_between(rng, 0.1, 0.9), _between(rng, 0.3, 1.0), half_width, half_height)
    return ellipse if rng.random() < 0.6 * event else None


def _strength(tilt: float, rotation: float, window: float, light: Light) -> float:
    """The strength of a view's changes: about 0.1 for a mild one, above 1 for extreme ones."""
    return (
        0.4 * tilt / 45
        + 0.25 * abs(rotation) / 30
        + 0.3 * (1 - window)
        + 0.4 * light.night
        + 0.2 * light.grey
        + 0.3 * abs(light.gain - 1)
        + 0.5 * abs(light.balance[0] - 1)
        + 0.12 * light.blur
    )


def _fit_window(
    photograph: Photograph,
    size: tuple[int, int],
    angles: tuple[float, float, float],
    window: float,
    centre: tuple[float, float],
) -> tuple[Matrix, float]:
    # The window shrinks and moves to the photograph's middle until at most OVERHANG lies outside.
    sides = (photograph.width, photograph.height)
    scale = max(size[0] / sides[0], size[1] / sides[1])
    x, y = (
        min(max(position, side * window / 2), side * (1 - window / 2))
        for position, side in zip(centre, sides, strict=True)
    )
    while True:
        matrix = tilted_board((x, y), max(sides), angles, scale / window, size)
        if window <= MIN_WINDOW or overhang(matrix, sides, size) <= OVERHANG:
            return matrix, round(window, 4)
        window = max(MIN_WINDOW, window * 0.96)
        x, y = x + 0.06 * (sides[0] / 2 - x), y + 0.06 * (sides[1] / 2 - y)


def tilted_board(
    centre: tuple[float, float],
    side: int,
    angles: tuple[float, float, float],
    scale: float,
    size: tuple[int, int],
) -> Matrix:
    """Returns the 3 x 3 homography of a photograph seen as a flat board from another side.

    `centre` becomes the view's centre. The board is 1.7 of its longer `side` away. `angles` are the
    tilts about the vertical and the horizontal axis and the rotation in the view, in degrees;
    `scale` is view pixels a photograph pixel, `size` the view's width and height.
    """
    (cos_a, sin_a), (cos_b, sin_b), (cos_c, sin_c) = (_cos_sin(angle) for angle in angles)
    distance = 1.7 * side
    tilt = (
        (cos_a, 0.0, 0.0),
        (sin_a * sin_b, cos_b, 0.0),
        (-sin_a * cos_b / distance, sin_b / distance, 1.0),
    )
    to_view = (
        (scale * cos_c, -scale * sin_c, size[0] / 2),
        (scale * sin_c, scale * cos_c, size[1] / 2),
        (0.0, 0.0, 1.0),
    )
    return multiply(to_view, multiply(tilt, translation(-centre[0], -centre[1])))


def _cos_sin(degrees: float) -> tuple[float, float]:
    """Returns an approximate cosine and sine: those of 42.9 degrees for 45."""
    half = degrees * math.pi / 360
    return (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)


def overhang(matrix: Matrix, sides: tuple[int, int], size: tuple[int, int]) -> float:
    """Returns how far a view's corners lie outside the photograph, as a fraction of its sides."""
    inverse = invert(matrix)
    worst = 0.0
    for corner in ((0, 0), (size[0], 0), (0, size[1]), size):
        x, y = map_points(inverse, *corner)
        x, y = x / sides[0], y / sides[1]
        worst = max(worst, -x, x - 1, -y, y - 1)
    return worst


def visible_fraction(
    matrix: Matrix,
    region: tuple[float, float, float, float],
    size: tuple[int, int],
    occluder: Ellipse | None = None,
) -> float:
    """Returns the fraction of a region (x0 y0 x1 y1, photograph pixels) that a view shows.

    `matrix` maps the photograph to the view of width and height `size`.
    """
    steps = (np.arange(GRID) + 0.5) / GRID
    x0, y0, x1, y1 = region
    x, y = map_points(matrix, (x0 + (x1 - x0) * steps)[None, :], (y0 + (y1 - y0) * steps)[:, None])
    x, y = x / size[0], y / size[1]
    visible = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    if occluder is not None:
        dx, dy = (x - occluder[0]) / occluder[2], (y - occluder[1]) / occluder[3]
        visible &= dx * dx + dy * dy > 1
    return int(visible.sum()) / (GRID * GRID)


def query_box(view: View) -> tuple[float, float, float, float]:
    """Returns the landmark's box in a view: x0 y0 x1 y1 in view pixels, clipped, one decimal."""
    x0, y0, x1, y1 = view.photograph.region
    corners = [map_points(view.matrix, x, y) for x, y in ((x0, y0), (x1, y0), (x0, y1), (x1, y1))]
    xs = [min(max(x, 0.0), float(view.size[0])) for x, _ in corners]
    ys = [min(max(y, 0.0), float(view.size[1])) for _, y in corners]
    return round(min(xs), 1), round(min(ys), 1), round(max(xs), 1), round(max(ys), 1)


def render(view: View, image: np.ndarray) -> np.ndarray:
    """Renders a view (h, w, 3) uint8 RGB of its photograph (H, W, 3), mirrored at the border."""
    rng, light = np.random.default_rng(view.noise_seed), view.light
    pixels = _warp(view, image).astype(np.float32) / 255
    if view.occluder is not None:
        pixels = _occlude(pixels, view.occluder, rng)
    if light.night:
        pixels = _night(pixels, rng)
    if light.grey:
        pixels = np.repeat(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    pixels = ((pixels - 0.5) * light.contrast + 0.5).clip(0, 1)
    pixels = pixels * np.float32(light.balance) * light.gain
    if light.blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), light.blur)
    pixels = (pixels + _noise(rng, pixels.shape, 0.012)).clip(0, 1)
    mean = float(pixels.mean()) * 255
    if mean < MIN_MEAN:
        pixels = (pixels * (MIN_MEAN / max(mean, 1.0)) + 1 / 255).clip(0, 1)
    return (pixels * 255 + 0.5).astype(np.uint8)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    # Uniform: normal draws would take a third of the rendering's time.
    return (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(sigma * 12**0.5)


def _warp(view: View, image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    # Shrinking first by area averaging keeps fine texture from turning into moire.
    shrink = min(1.0, max(view.size) / (view.window * max(width, height)))
    small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    if shrink < 1:
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    to_small = ((small[0] / width, 0.0, 0.0), (0.0, small[1] / height, 0.0), (0.0, 0.0, 1.0))
    to_photograph = multiply(to_small, invert(view.matrix))
    # (0, 0) is an image's corner in a recipe, but the centre of the first pixel in OpenCV.
    centred = multiply(translation(-0.5, -0.5), multiply(to_photograph, translation(0.5, 0.5)))
    return cv2.warpPerspective(
        image,
        np.array(centred),
        view.size,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def _occlude(pixels: np.ndarray, ellipse: Ellipse, rng: np.random.Generator) -> np.ndarray:
    """Draws a soft-edged ellipse of dull, leaf-like texture in front."""
    height, width = pixels.shape[:2]
    colour = 0.12 + 0.3 * rng.random() + 0.16 * rng.random(3)
    texture = np.zeros((height, width), np.float32)
    for cell in (12, 3):
        coarse = rng.random((max(2, height // cell), max(2, width // cell)), dtype=np.float32)
        texture += cv2.resize(coarse, (width, height))
    x = ((np.arange(width) + 0.5) / width - ellipse[0]) / ellipse[2]
    y = ((np.arange(height) + 0.5) / height - ellipse[1]) / ellipse[3]
    distance = np.sqrt(x[None, :] ** 2 + y[:, None] ** 2)
    mask = ((1.0 - distance) * 12).clip(0, 1)[..., None].astype(np.float32)
    return pixels * (1 - mask) + np.float32(colour) * texture[..., None] * mask


def _night(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    dark = pixels**1.5 * np.float32([0.38, 0.42, 0.62])
    lamps = np.zeros((height, width), np.float32)
    for _ in range(int(rng.integers(2, 7))):
        x, y = int(rng.integers(width)), int(height * (0.4 + 0.6 * rng.random()))
        cv2.circle(lamps, (x, min(y, height - 1)), int(rng.integers(2, 6)), 1.0, -1)
    glow = cv2.GaussianBlur(lamps, (0, 0), max(width, height) / 40) * 3
    light = np.maximum(lamps, glow.clip(0, 0.8))[..., None] * np.float32([1.0, 0.85, 0.55])
    lit = dark + pixels * light * 0.6 + light * 0.5
    return (lit + _noise(rng, pixels.shape, 0.03)).clip(0, 1)


def write_views(targets: Sequence[tuple[View, Path]]) -> None:
    """Renders and writes views as JPEG, each photograph decoded once (see `Photograph.read`)."""
    groups: dict[Path, list[tuple[View, Path]]] = {}
    for view, target in targets:
        groups.setdefault(view.photograph.path, []).append((view, target))
    bar = tqdm(groups.values(), desc="views", unit="photograph")
    Parallel(n_jobs=-1, prefer="threads")(delayed(_write_group)(group) for group in bar)


def _write_group(group: Sequence[tuple[View, Path]]) -> None:
    image = group[0][0].photograph.read()
    for view, target in group:
        bgr = cv2.cvtColor(render(view, image), cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, view.light.quality])
        # Not atomic: flushing 900 small files to the disk takes longer than rendering them, and an
        # interrupted stage writes all of them again.
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded.tobytes())
