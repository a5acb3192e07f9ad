"""Random parameters of simulated views: geometry, light and occluders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vitgal.data.demo.photographs import Ellipse, Matrix, Photograph

T = TypeVar("T", float, np.ndarray)
QUERY_LEVEL = 0.2  # up to this level a view has no night, occluder, blur or loss of colour
GRID = 32  # the landmark's region is sampled at GRID x GRID points to tell its visible share
MIN_WINDOW = 0.25  # a view never shows less than this share of a photograph's sides
OVERHANG = 0.06  # share of a side that may lie beyond the photograph (filled by reflection)


@dataclass(frozen=True)
class Light:
    """The photometric part of a recipe."""

    gain: float  # exposure
    balance: tuple[float, float, float]  # red, green, blue gain
    contrast: float
    grey: bool
    night: bool
    blur: float  # sigma in view pixels, 0 for none
    quality: int  # JPEG


@dataclass(frozen=True)
class View:
    """One view's recipe; lengths in photograph pixels unless said, angles in degrees."""

    name: str
    photograph: Photograph
    size: tuple[int, int]  # width, height of the view
    matrix: Matrix  # photograph -> view; (0, 0) is the corner of an image, not its first pixel
    tilt: float
    rotation: float
    window: float  # share of the photograph's side that the view's side shows
    light: Light
    occluder: Ellipse | None
    noise_seed: int
    visible: float  # share of the landmark's region that the view shows
    strength: float


class _Draw:
    """Numbers from one seeded generator.

    Only its raw doubles are used: they are integers times a power of two, equal everywhere.
    """

    def __init__(self, seed: Sequence[int]) -> None:
        self.generator = np.random.default_rng(list(seed))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def signed(self, low: float, high: float) -> float:
        size = self.between(low, high)
        return size if self.chance(0.5) else -size

    def chance(self, probability: float) -> bool:
        return float(self.generator.random()) < probability

    def integer(self) -> int:
        return int(self.generator.integers(1 << 31))


def draw_view(
    photograph: Photograph,
    name: str,
    level: float,
    *,
    seed: Sequence[int],
    view_size: int,
    aside: bool = False,
) -> View:
    """Draws one view's recipe.

    Args:
        level: from 0 (the photograph itself) to 1 (tilted by up to 45 degrees, rotated by up to
            30, cropped to 35 per cent of the sides, at night, blurred, behind an occluder, ...).
        seed: the words that seed the view's own generator.
        view_size: longer side of the view in pixels.
        aside: look past the landmark, at a small part of the photograph near one of its corners.
    """
    draw = _Draw(seed)
    tilt_x, tilt_y = draw.signed(0.3, 1.0) * 42 * level, draw.signed(0.0, 1.0) * 18 * level
    angles = (tilt_x, tilt_y, draw.signed(0.1, 1.0) * 30 * level)
    window = draw.between(0.28, 0.36) if aside else 1 - draw.between(0.1, 0.65) * level
    size = _view_size(photograph, view_size, 1 + draw.between(-0.25, 0.25) * level)
    if aside:  # a corner on the side where the landmark is not
        x0, _, x1, _ = photograph.region
        right, lower = x0 + x1 < photograph.width, draw.chance(0.5)
        centre = (photograph.width * float(right), photograph.height * float(lower))
    else:
        move = (level * draw.between(-0.5, 0.5), level * draw.between(-0.5, 0.5))
        centre = _towards(photograph, *move)
    matrix, window = _place(photograph, size, angles, window, centre)
    light = _draw_light(draw, level)
    occluder = _draw_occluder(draw, level)
    visible = visible_share(matrix, photograph.region, size, occluder)
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
        noise_seed=draw.integer(),
        visible=round(visible, 4),
        strength=round(_strength(tilt, angles[2], window, light), 4),
    )


def _sides(photograph: Photograph) -> tuple[int, int]:
    return photograph.width, photograph.height


def _view_size(photograph: Photograph, longer: int, stretch: float) -> tuple[int, int]:
    aspect = photograph.width / photograph.height * stretch
    if aspect >= 1:
        return longer, max(1, round(longer / aspect))
    return max(1, round(longer * aspect)), longer


def _towards(photograph: Photograph, right: float, down: float) -> tuple[float, float]:
    """A point of the photograph: its landmark's centre moved by shares of the landmark's sides."""
    x0, y0, x1, y1 = photograph.region
    return (x0 + x1) / 2 + right * (x1 - x0), (y0 + y1) / 2 + down * (y1 - y0)


def _draw_light(draw: _Draw, level: float) -> Light:
    event = max(0.0, level - QUERY_LEVEL) / (1 - QUERY_LEVEL)
    night = draw.chance(0.4 * event)
    grey = draw.chance(0.25 * event) and not night
    gain = 2 ** (draw.between(-0.9, 0.7) * (0.3 + 0.7 * level))
    warmth, tint = draw.between(-0.28, 0.28) * level, draw.between(-0.1, 0.1) * level
    blur = draw.between(0.6, 2.6) * level
    return Light(
        gain=gain,
        balance=(1 + warmth, 1 + tint, 1 - warmth),
        contrast=1 + draw.between(-0.4, 0.3) * level,
        grey=grey,
        night=night,
        blur=blur if draw.chance(0.5 * event) else 0.0,
        quality=round(95 - draw.between(0, 60) * level),
    )


def _draw_occluder(draw: _Draw, level: float) -> Ellipse | None:
    event = max(0.0, level - QUERY_LEVEL) / (1 - QUERY_LEVEL)
    half_width = draw.between(0.08, 0.12 + 0.14 * level)
    half_height = draw.between(0.12, 0.16 + 0.3 * level)
    ellipse = (draw.between(0.1, 0.9), draw.between(0.3, 1.0), half_width, half_height)
    return ellipse if draw.chance(0.6 * event) else None


def _strength(tilt: float, rotation: float, window: float, light: Light) -> float:
    """How strong a change is: about 0.1 for a mild view, above 1 where much changes at once."""
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


def _place(
    photograph: Photograph,
    size: tuple[int, int],
    angles: tuple[float, float, float],
    window: float,
    centre: tuple[float, ...],
) -> tuple[Matrix, float]:
    """The homography photograph -> view, and the share of the photograph's side that it shows.

    A window that reaches far beyond the photograph would show invented pixels: it is made smaller
    and drawn to the photograph's middle until at most OVERHANG of a side lies outside.
    """
    sides = _sides(photograph)
    scale = max(size[0] / sides[0], size[1] / sides[1])
    x, y = (
        min(max(at, side * window / 2), side * (1 - window / 2))
        for at, side in zip(centre, sides, strict=True)
    )
    while True:
        matrix = _homography((x, y), max(sides), angles, scale / window, size)
        if window <= MIN_WINDOW or _overhang(matrix, sides, size) <= OVERHANG:
            return matrix, round(window, 4)
        window = max(MIN_WINDOW, window * 0.96)
        x, y = x + 0.06 * (sides[0] / 2 - x), y + 0.06 * (sides[1] / 2 - y)


def _homography(
    centre: tuple[float, float],
    side: int,
    angles: tuple[float, float, float],
    scale: float,
    size: tuple[int, int],
) -> Matrix:
    """The photograph as a flat board seen from another side, rotated in the image and scaled."""
    (cos_a, sin_a), (cos_b, sin_b), (cos_c, sin_c) = (_cos_sin(angle) for angle in angles)
    distance = 1.7 * side
    to_centre = ((1.0, 0.0, -centre[0]), (0.0, 1.0, -centre[1]), (0.0, 0.0, 1.0))
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
    return _product(to_view, _product(tilt, to_centre))


def _cos_sin(degrees: float) -> tuple[float, float]:
    """A point of the unit circle near the angle (at 45 degrees it stands for 42.9)."""
    half = degrees * math.pi / 360
    return (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)


def _product(a: Matrix, b: Matrix) -> Matrix:
    return tuple(
        tuple(a[i][0] * b[0][j] + a[i][1] * b[1][j] + a[i][2] * b[2][j] for j in range(3))
        for i in range(3)
    )


def _inverse(m: Matrix) -> Matrix:
    """The inverse up to scale (the adjugate), which is all that a homography needs."""
    (a, b, c), (d, e, f), (g, h, i) = m
    return (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )


def _map(m: Matrix, x: T, y: T) -> tuple[T, T]:
    w = m[2][0] * x + m[2][1] * y + m[2][2]
    return (m[0][0] * x + m[0][1] * y + m[0][2]) / w, (m[1][0] * x + m[1][1] * y + m[1][2]) / w


def _overhang(matrix: Matrix, sides: tuple[int, int], size: tuple[int, int]) -> float:
    """How far a view's corners lie outside the photograph, as a share of the photograph's sides."""
    inverse = _inverse(matrix)
    worst = 0.0
    for corner in ((0, 0), (size[0], 0), (0, size[1]), size):
        x, y = _map(inverse, *corner)
        x, y = x / sides[0], y / sides[1]
        worst = max(worst, -x, x - 1, -y, y - 1)
    return worst


def visible_share(
    matrix: Matrix,
    region: tuple[float, float, float, float],
    size: tuple[int, int],
    occluder: Ellipse | None = None,
) -> float:
    """The share of a region's GRID x GRID points that a view shows, those behind its occluder not.

    `matrix` maps photograph to view; `region` x0 y0 x1 y1 in photograph pixels; `size` (width,
    height) of the view; `occluder` an ellipse (centre x, y, half axes) in shares of the view's
    sides.
    """
    steps = (np.arange(GRID) + 0.5) / GRID
    x0, y0, x1, y1 = region
    x, y = _map(matrix, (x0 + (x1 - x0) * steps)[None, :], (y0 + (y1 - y0) * steps)[:, None])
    x, y = x / size[0], y / size[1]
    seen = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    if occluder is not None:
        dx, dy = (x - occluder[0]) / occluder[2], (y - occluder[1]) / occluder[3]
        seen &= dx * dx + dy * dy > 1
    return int(seen.sum()) / (GRID * GRID)


def query_box(view: View) -> tuple[float, float, float, float]:
    """The landmark's box in a view: x0 y0 x1 y1 in view pixels, within the view, one decimal."""
    x0, y0, x1, y1 = view.photograph.region
    points = [_map(view.matrix, x, y) for x, y in ((x0, y0), (x1, y0), (x0, y1), (x1, y1))]
    xs = [min(max(x, 0.0), float(view.size[0])) for x, _ in points]
    ys = [min(max(y, 0.0), float(view.size[1])) for _, y in points]
    return round(min(xs), 1), round(min(ys), 1), round(max(xs), 1), round(max(ys), 1)
