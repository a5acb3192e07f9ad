"""Random parameters of simulated views: geometry, light and occluders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitgal.data.demo.homography import Matrix, invert, map_points, multiply, translation
from vitgal.data.demo.photographs import Photograph

Ellipse = tuple[float, float, float, float]  # centre x y, half axes, as fractions of a view's sides
QUERY_LEVEL = 0.2  # up to this level a view has no night, occluder, blur or loss of colour
GRID = 32  # visibility of a region is measured at GRID x GRID points
MIN_WINDOW = 0.25  # a view never shows a smaller fraction of a photograph's sides
OVERHANG = 0.06  # fraction of a side that may lie beyond the photograph (filled by reflection)


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


class _RandomNumbers:
    """Numbers from one seeded generator.

    Only raw doubles and integers are drawn: they are the same on every machine.
    """

    def __init__(self, seed: Sequence[int]) -> None:
        self.generator = np.random.default_rng(list(seed))

    def between(self, low: float, high: float) -> float:
        """Draws from [low, high)."""
        return low + (high - low) * float(self.generator.random())

    def signed(self, low: float, high: float) -> float:
        """Draws from [low, high), then the sign."""
        size = self.between(low, high)
        return size if self.happens(0.5) else -size

    def happens(self, probability: float) -> bool:
        """Draws whether an event of this probability happens."""
        return float(self.generator.random()) < probability

    def integer(self) -> int:
        """Draws from 0 to 2 ** 31 - 1."""
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
        seed: numbers that seed the view's own generator.
        view_size: longer side of the view in pixels.
        aside: show a small part of the photograph near a corner, away from the landmark.
    """
    # The order of the draws is part of the demo data.
    rng = _RandomNumbers(seed)
    tilt_x, tilt_y = rng.signed(0.3, 1.0) * 42 * level, rng.signed(0.0, 1.0) * 18 * level
    angles = (tilt_x, tilt_y, rng.signed(0.1, 1.0) * 30 * level)
    window = rng.between(0.28, 0.36) if aside else 1 - rng.between(0.1, 0.65) * level
    size = _view_size(photograph, view_size, 1 + rng.between(-0.25, 0.25) * level)
    x0, y0, x1, y1 = photograph.region
    if aside:  # a corner on the side without the landmark
        right, lower = x0 + x1 < photograph.width, rng.happens(0.5)
        centre = (photograph.width * float(right), photograph.height * float(lower))
    else:  # the landmark's centre, moved by fractions of the landmark's sides
        right, down = level * rng.between(-0.5, 0.5), level * rng.between(-0.5, 0.5)
        centre = ((x0 + x1) / 2 + right * (x1 - x0), (y0 + y1) / 2 + down * (y1 - y0))
    matrix, window = _fit_window(photograph, size, angles, window, centre)
    light = _draw_light(rng, level)
    occluder = _draw_occluder(rng, level)
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
        noise_seed=rng.integer(),
        visible=round(visible, 4),
        strength=round(_strength(tilt, angles[2], window, light), 4),
    )


def _view_size(photograph: Photograph, longer: int, stretch: float) -> tuple[int, int]:
    aspect = photograph.width / photograph.height * stretch
    if aspect >= 1:
        return longer, max(1, round(longer / aspect))
    return max(1, round(longer * aspect)), longer


def _event_level(level: float) -> float:
    return max(0.0, level - QUERY_LEVEL) / (1 - QUERY_LEVEL)


def _draw_light(rng: _RandomNumbers, level: float) -> Light:
    event = _event_level(level)
    night = rng.happens(0.4 * event)
    grey = rng.happens(0.25 * event) and not night
    gain = 2 ** (rng.between(-0.9, 0.7) * (0.3 + 0.7 * level))
    warmth, tint = rng.between(-0.28, 0.28) * level, rng.between(-0.1, 0.1) * level
    blur = rng.between(0.6, 2.6) * level
    return Light(
        gain=gain,
        balance=(1 + warmth, 1 + tint, 1 - warmth),
        contrast=1 + rng.between(-0.4, 0.3) * level,
        grey=grey,
        night=night,
        blur=blur if rng.happens(0.5 * event) else 0.0,
        quality=round(95 - rng.between(0, 60) * level),
    )


def _draw_occluder(rng: _RandomNumbers, level: float) -> Ellipse | None:
    half_width = rng.between(0.08, 0.12 + 0.14 * level)
    half_height = rng.between(0.12, 0.16 + 0.3 * level)
    ellipse = (rng.between(0.1, 0.9), rng.between(0.3, 1.0), half_width, half_height)
    return ellipse if rng.happens(0.6 * _event_level(level)) else None


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
    """Returns the homography photograph -> view, and the fraction of the side that it shows.

    The window shrinks and moves to the photograph's middle until at most OVERHANG of a side lies
    outside.
    """
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

    Args:
        centre: x, y of the photograph that become the view's centre.
        side: longer side of the photograph; the board is 1.7 of it away.
        angles: tilt about the vertical and the horizontal axis, rotation in the view; degrees.
        scale: view pixels a photograph pixel.
        size: width, height of the view.
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
    """Returns how far a view's corners lie outside the photograph, as a fraction of its sides.

    `matrix` maps the photograph of width and height `sides` to the view of `size`.
    """
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
    """Returns the fraction of a region that a view shows in front of any occluder.

    Args:
        matrix: 3 x 3, photograph -> view.
        region: x0 y0 x1 y1 in photograph pixels.
        size: width, height of the view in pixels.
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
