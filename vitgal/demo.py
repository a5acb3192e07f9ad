"""The demo data set: views of bundled photographs in the on-disk layouts of the real data sets.

Every view is one recipe (a homography and a few photometric changes) applied to one photograph.
A recipe is drawn from a generator of its own, seeded by (seed, part, photograph, view), so that it
depends on no other photograph and on no order of work. Recipes, boxes and labels use plain float64
arithmetic on the size that ATTRIBUTION.csv states, never pixels: they are the same on every
machine, while pixels depend on the JPEG decoder.
"""

import csv
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from vitgal import images, runs
from vitgal.revisited import GroundTruth, write_ground_truth

PHOTOGRAPHS = "third_party/landmarks"
ATTRIBUTION = "ATTRIBUTION.csv"
REGIONS = "REGIONS.csv"
ATTRIBUTION_COLUMNS = ("file", "author", "licence", "source", "width", "height")
REGION_COLUMNS = ("file", "x0", "y0", "x1", "y1")
Matrix = tuple[tuple[float, ...], ...]  # 3 x 3
Ellipse = tuple[float, float, float, float]  # centre x y, half axes, in shares of a view's sides
TABLES = ("train.csv", "views.csv", "benchmark/views.csv", "benchmark/gnd_demo.pkl")
T = TypeVar("T", float, np.ndarray)

# Ten landmarks with two or three photographs, and fourteen that are well known, look different from
# each other and are mostly large photographs. Notre-Dame and the Arc du Carrousel are here because
# a Paris test set shows them: nothing that it holds may be trained on.
BENCHMARK_LANDMARKS = (
    "chenonceau",
    "christ_the_redeemer",
    "eiffel_tower",
    "louvre_pyramid",
    "mount_rushmore",
    "neuschwanstein",
    "qutub_minar",
    "statue_of_liberty",
    "sydney_opera",
    "taj_mahal",
    "arc_du_carrousel",
    "brandenburg_gate",
    "chambord",
    "chichen_itza",
    "colosseum",
    "giza_pyramids",
    "golden_temple",
    "great_pyramid",
    "hawa_mahal",
    "nagoya_castle",
    "notre_dame_paris",
    "petra",
    "reims_cathedral",
    "tower_bridge",
)
# Landmarks that show one place: their views are neither right nor wrong answers to each other.
SAME_PLACE = (("giza_pyramids", "great_pyramid"),)

CENTRAL_REGION = (12, 10, 88, 92)  # x0 y0 x1 y1 in per cent, for a photograph not in REGIONS.csv
EASY_VISIBLE, EASY_STRENGTH = 0.6, 0.45
JUNK_VISIBLE = 0.15
OTHER_VISIBLE, OTHER_STRENGTH = 0.5, 0.6  # beyond, two photographs share too little to tell
QUERY_LEVEL = 0.2  # up to this level a view has no night, occluder, blur or loss of colour
ASIDE_LEVEL = 0.5
GRID = 32  # the landmark's region is sampled at GRID x GRID points to tell its visible share
MIN_WINDOW = 0.25  # a view never shows less than this share of a photograph's sides
OVERHANG = 0.06  # share of a side that may lie beyond the photograph (filled by reflection)
MIN_MEAN = 28.0  # mean grey value below which a view is brightened
TRAIN_ID_STEP = 37  # landmark ids of the training part are neither 0, 1, 2, ... nor contiguous


@dataclass(frozen=True)
class Photograph:
    """One bundled photograph; `region` is where it shows its landmark, in pixels x0 y0 x1 y1."""

    landmark: str
    name: str  # landmark_number
    path: Path
    width: int
    height: int
    author: str
    licence: str
    source: str
    region: tuple[float, float, float, float]


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


# The bundled photographs


def read_photographs(folder: Path) -> list[Photograph]:
    """The photographs that ATTRIBUTION.csv lists, sorted by file.

    Where a photograph shows its landmark stands in REGIONS.csv (per cent of its sides); one that
    is not listed there shows it in CENTRAL_REGION.

    Raises FileNotFoundError where the folder, the table or a listed photograph is missing, and
    ValueError where a table's columns, a size, a region or a row is wrong.
    """
    folder = Path(folder)
    table = folder / ATTRIBUTION
    if not table.is_file():
        raise FileNotFoundError(
            f"{table} is missing: it lists the demo's photographs; restore the folder from the "
            "repository (git checkout third_party/landmarks)"
        )
    rows = _read_table(table, ATTRIBUTION_COLUMNS)
    missing = [row["file"] for row in rows if not (folder / row["file"]).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} photographs listed in {table} are missing, first "
            f"{', '.join(missing[:3])}; restore them or remove their rows"
        )
    regions = _read_regions(folder / REGIONS)
    return [_photograph(folder, row, regions) for row in rows]


def _read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or tuple(rows[0]) != columns:
        raise ValueError(f"{path} must hold rows with the columns {','.join(columns)}")
    files = [row["file"] for row in rows]
    if len(set(files)) < len(files):
        twice = next(name for name in files if files.count(name) > 1)
        raise ValueError(f"{path} lists {twice} more than once; keep one row")
    return sorted(rows, key=lambda row: row["file"])


def _read_regions(path: Path) -> dict[str, tuple[float, ...]]:
    regions = {}
    for row in _read_table(path, REGION_COLUMNS) if path.is_file() else ():
        try:
            x0, y0, x1, y1 = (float(row[side]) for side in REGION_COLUMNS[1:])
        except (TypeError, ValueError):
            raise ValueError(f"{path}: the region of {row['file']} is not four numbers") from None
        if not (0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 100):
            raise ValueError(
                f"{path}: the region of {row['file']} must hold 0 <= x0 < x1 <= 100 and "
                "0 <= y0 < y1 <= 100 (per cent of the photograph's sides)"
            )
        regions[row["file"]] = (x0, y0, x1, y1)
    return regions


def _photograph(folder: Path, row: dict[str, str], regions: dict) -> Photograph:
    table, file = folder / ATTRIBUTION, row["file"]
    landmark, number = Path(file).parent.name, Path(file).stem
    if not (landmark and row["licence"] and row["author"]):
        raise ValueError(f"{table}: {file} needs a landmark's folder, an author and a licence")
    try:
        width, height = int(row["width"]), int(row["height"])
    except (TypeError, ValueError):
        raise ValueError(f"{table}: width and height of {file} are not integers") from None
    if min(width, height) < 1:
        raise ValueError(f"{table}: {file} is said to be {width} x {height} pixels")
    x0, y0, x1, y1 = regions.get(file, CENTRAL_REGION)
    return Photograph(
        landmark=landmark,
        name=f"{landmark}_{number}",
        path=folder / file,
        width=width,
        height=height,
        author=row["author"],
        licence=row["licence"],
        source=row["source"],
        region=(x0 * width / 100, y0 * height / 100, x1 * width / 100, y1 * height / 100),
    )


# Recipes


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


# Geometry in plain float64 arithmetic: no trigonometric function, whose last bit differs between
# machines, and no linear algebra library


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


# Pixels


def render(view: View, image: np.ndarray) -> np.ndarray:
    """Applies a view's recipe to its photograph: (H, W, 3) uint8 RGB in, view-sized uint8 RGB out.

    Beyond the photograph's border its mirror image stands, never black; a view whose mean would
    fall below MIN_MEAN of 255 is brightened to it.
    """
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
    # Uniform, scaled to the standard deviation: a normal draw would take a third of the rendering.
    return (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(sigma * 12**0.5)


def _warp(view: View, image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    # Shrinking first by area averaging keeps fine texture from turning into moire.
    shrink = min(1.0, max(view.size) / (view.window * max(width, height)))
    small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    if shrink < 1:
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    to_small = ((small[0] / width, 0.0, 0.0), (0.0, small[1] / height, 0.0), (0.0, 0.0, 1.0))
    to_photograph = _product(to_small, _inverse(view.matrix))
    # A recipe's (0, 0) is an image's corner, OpenCV's the centre of its first pixel.
    centred = _product(_shift(-0.5), _product(to_photograph, _shift(0.5)))
    return cv2.warpPerspective(
        image,
        np.array(centred),
        view.size,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def _shift(by: float) -> Matrix:
    return ((1.0, 0.0, by), (0.0, 1.0, by), (0.0, 0.0, 1.0))


def _occlude(pixels: np.ndarray, ellipse: Ellipse, rng: np.random.Generator) -> np.ndarray:
    """Something in front: a soft-edged ellipse of dull, leaf-like texture."""
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
    """Night: dark and blue, with a few lamps and sensor noise."""
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


# The data set


def make_demo(
    run: Path,
    *,
    photographs: str | Path = PHOTOGRAPHS,
    seed: int = 0,
    view_size: int = 320,
    train_views: int = 12,
    benchmark_views: int = 8,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Makes the demo data set, the stage `<run>/data`, and returns its folder.

    Every photograph of BENCHMARK_LANDMARKS gives one mild query view with a box around the landmark
    and `benchmark_views` database views, from mild to strong; the last of them looks past the
    landmark. Every other photograph gives `train_views` training views; its landmark is a class.
    For a query, a database view is (see `label`)

        easy    same photograph, at least 60 % of the landmark visible, change at most 0.45
        hard    same photograph, at least 15 % visible, not easy;
                or another photograph of the landmark, at least 50 % visible and at
                most 0.6 strong
        junk    less than that visible; or a landmark at the same place (SAME_PLACE)

    where the visible part is the share of the landmark's box that lies inside the view and is not
    behind its occluder, and the change is the weighted sum of tilt, rotation, zoom, night, loss of
    colour, exposure, white balance and blur in `_strength`.

    Args:
        photographs: folder with ATTRIBUTION.csv; a relative one lies in the checkout.
        view_size: longer side of every view in pixels.
    Writes:
        train.csv (id, landmark_id), train/a/b/c/<id>.jpg as Google Landmarks v2; views.csv recipes
        benchmark/jpg/<name>.jpg, benchmark/gnd_demo.pkl as ROxford; benchmark/views.csv recipes,
        with `label` as seen from the same photograph's query. Both views.csv name every view's
        photograph, author, licence and source.
    Raises:
        FileNotFoundError: the folder, its table or a photograph is missing.
        ValueError: a table is wrong, a photograph unreadable or not of the size that it states.
    """
    if min(view_size, train_views, benchmark_views) < 1:
        raise ValueError("view_size, train_views and benchmark_views must be at least 1")
    folder = runs.resolve(photographs)
    listed = read_photographs(folder)
    parameters = {
        "seed": seed,
        "view_size": view_size,
        "train_views": train_views,
        "benchmark_views": benchmark_views,
    }
    inputs = {"photographs": _fingerprint(folder, listed)}
    parts = split_photographs(listed)
    where = Path(run) / "data"
    if overwrite or not (where / runs.MANIFEST).exists():
        check_photographs(listed)
    with runs.stage(
        where, "data", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if not stage.finished:
            outputs = _write_demo(stage.folder, *parts, progress=progress, **parameters)
            stage.finish(outputs, views=len(outputs) - len(TABLES))
    return stage.folder


def _write_demo(
    folder: Path,
    train: Sequence[Photograph],
    benchmark: Sequence[Photograph],
    *,
    seed: int,
    view_size: int,
    train_views: int,
    benchmark_views: int,
    progress: bool,
) -> list[Path]:
    drawn = {"seed": seed, "view_size": view_size}
    training = training_recipes(train, train_views, **drawn)
    queries, database = benchmark_recipes(benchmark, benchmark_views, **drawn)
    targets = [(view, train_path(view.name)) for view in training]
    targets += [(view, jpg_path(view.name)) for view in queries + database]
    write_views([(view, folder / path) for view, path in targets], progress=progress)
    write_tables(folder, training, queries, database)
    return [path for _, path in targets] + [Path(name) for name in TABLES]


def train_path(name: str) -> Path:
    """Where a training view lies in the data folder."""
    return Path("train", name[0], name[1], name[2], f"{name}.jpg")


def jpg_path(name: str) -> Path:
    """Where a benchmark view, query or database, lies in the data folder."""
    return Path("benchmark", "jpg", f"{name}.jpg")


def _fingerprint(folder: Path, photographs: Sequence[Photograph]) -> str:
    tables = [path for path in (folder / ATTRIBUTION, folder / REGIONS) if path.is_file()]
    return runs.fingerprint(
        {
            "tables": [runs.fingerprint_file(path) for path in tables],
            "photographs": [
                [photograph.name, runs.fingerprint_file(photograph.path)]
                for photograph in photographs
            ],
        }
    )


def split_photographs(
    photographs: Iterable[Photograph],
) -> tuple[list[Photograph], list[Photograph]]:
    """Training and benchmark photographs: no landmark is in both; ValueError where one is empty."""
    photographs = list(photographs)
    train = [item for item in photographs if item.landmark not in BENCHMARK_LANDMARKS]
    benchmark = [item for item in photographs if item.landmark in BENCHMARK_LANDMARKS]
    if not train or not benchmark:
        raise ValueError(
            f"of the photographs {len(train)} are for training and {len(benchmark)} for the "
            "benchmark, both need some: use the bundled third_party/landmarks"
        )
    return train, benchmark


def training_recipes(
    photographs: Sequence[Photograph], views: int, *, seed: int, view_size: int
) -> list[View]:
    """The training part's recipes, named by 16 hexadecimal digits, in order of photograph."""
    made = []
    for photograph in photographs:
        for index in range(views):
            text = f"{seed}/{photograph.name}/{index}"
            made.append(
                draw_view(
                    photograph,
                    hashlib.sha256(text.encode()).hexdigest()[:16],
                    _level(index, views),
                    seed=_words(seed, "train", photograph.name, index),
                    view_size=view_size,
                )
            )
    return made


def benchmark_recipes(
    photographs: Sequence[Photograph], views: int, *, seed: int, view_size: int
) -> tuple[list[View], list[View]]:
    """The query recipes and `views` database recipes of each photograph.

    A photograph gives one query, the only one of its landmark two: two or three queries a landmark,
    so that those with several photographs do not decide the score alone.
    """
    size = {"view_size": view_size}
    landmarks = [photograph.landmark for photograph in photographs]
    queries, database = [], []
    for photograph in photographs:
        for index in range(2 if landmarks.count(photograph.landmark) == 1 else 1):
            words = _words(seed, "query", photograph.name, index)
            name = f"{photograph.name}_q{index}"
            queries.append(draw_view(photograph, name, QUERY_LEVEL, seed=words, **size))
        for index in range(views):
            aside = index > 0 and index == views - 1
            level = ASIDE_LEVEL if aside else _level(index, views - 1)
            words = _words(seed, "database", photograph.name, index)
            name = f"{photograph.name}_v{index:02d}"
            database.append(draw_view(photograph, name, level, seed=words, aside=aside, **size))
    return queries, database


def _level(index: int, views: int) -> float:
    """Spread evenly from mild to strong, so that every photograph has views of each kind."""
    return QUERY_LEVEL + (1 - QUERY_LEVEL) * index / max(1, views - 1)


def _words(seed: int, part: str, name: str, index: int) -> list[int]:
    digest = hashlib.sha256(f"{part}/{name}".encode()).digest()
    return [seed, int.from_bytes(digest[:8], "big"), index]


def write_views(targets: Sequence[tuple[View, Path]], *, progress: bool = True) -> None:
    """Renders and writes views as JPEG, each photograph decoded once.

    The files do not depend on the number of threads. ValueError names a photograph that cannot be
    decoded or has another size than ATTRIBUTION.csv says.
    """
    groups: dict[Path, list[tuple[View, Path]]] = {}
    for view, target in targets:
        groups.setdefault(view.photograph.path, []).append((view, target))
    bar = tqdm(groups.values(), desc="views", unit="photograph", disable=not progress)
    Parallel(n_jobs=-1, prefer="threads")(delayed(_write_group)(group) for group in bar)


def _write_group(group: Sequence[tuple[View, Path]]) -> None:
    image = _read(group[0][0].photograph)
    for view, target in group:
        bgr = cv2.cvtColor(render(view, image), cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, view.light.quality])
        # Not one by one atomically: flushing 900 small files to the disk takes longer than making
        # them, and an interrupted stage, which has no manifest, writes all of them again.
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded.tobytes())


def check_photographs(photographs: Iterable[Photograph]) -> None:
    """Decodes every photograph; ValueError names one that is unreadable or of another size."""
    for photograph in photographs:
        _read(photograph)


def _read(photograph: Photograph) -> np.ndarray:
    image = images.read_image(photograph.path)
    if image.shape[:2] != (photograph.height, photograph.width):
        raise ValueError(
            f"{photograph.path} is {image.shape[1]} x {image.shape[0]} pixels, {ATTRIBUTION} says "
            f"{photograph.width} x {photograph.height}; correct the table or restore the file"
        )
    return image


# Labels and tables


def label(query: View, view: View) -> str:
    """What a database view is for a query: "easy", "hard", "junk" or "wrong" (see `make_demo`)."""
    landmarks = {query.photograph.landmark, view.photograph.landmark}
    if len(landmarks) == 2:
        return "junk" if any(landmarks <= set(places) for places in SAME_PLACE) else "wrong"
    if query.photograph.name != view.photograph.name:
        kept = view.visible >= OTHER_VISIBLE and view.strength <= OTHER_STRENGTH
        return "hard" if kept else "junk"
    if view.visible < JUNK_VISIBLE:
        return "junk"
    easy = view.visible >= EASY_VISIBLE and view.strength <= EASY_STRENGTH
    return "easy" if easy else "hard"


def write_tables(
    folder: Path, training: Sequence[View], queries: Sequence[View], database: Sequence[View]
) -> None:
    """Writes TABLES below the data folder: train.csv, both views.csv and the ground truth."""
    landmarks = sorted({view.photograph.landmark for view in training})
    ids = {name: 1000 + TRAIN_ID_STEP * index for index, name in enumerate(landmarks)}
    rows = sorted((view.name, ids[view.photograph.landmark]) for view in training)
    table = pd.DataFrame(rows, columns=["id", "landmark_id"])
    runs.write_text(folder / "train.csv", table.to_csv(index=False))
    runs.write_text(folder / "views.csv", recipe_table(training).to_csv(index=False))
    recipes = recipe_table([*queries, *database])
    own = {query.photograph.name: query for query in queries}
    labels = [label(own[view.photograph.name], view) for view in database]
    recipes.insert(3, "label", ["query"] * len(queries) + labels)
    runs.write_text(folder / "benchmark" / "views.csv", recipes.to_csv(index=False))
    truth = ground_truth(queries, database)
    write_ground_truth(folder / "benchmark" / "gnd_demo.pkl", truth)


def recipe_table(views: Sequence[View]) -> pd.DataFrame:
    """One row a view: what was done to which photograph, whose it is and under which licence."""
    return pd.DataFrame(
        {
            "name": view.name,
            "landmark": view.photograph.landmark,
            "photograph": view.photograph.name,
            "visible": view.visible,
            "strength": view.strength,
            "tilt": round(view.tilt, 1),
            "rotation": round(view.rotation, 1),
            "window": view.window,
            "gain": round(view.light.gain, 3),
            "night": int(view.light.night),
            "grey": int(view.light.grey),
            "blur": round(view.light.blur, 2),
            "occluder": int(view.occluder is not None),
            "quality": view.light.quality,
            "author": view.photograph.author,
            "licence": view.photograph.licence,
            "source": view.photograph.source,
        }
        for view in views
    )


def ground_truth(queries: Sequence[View], database: Sequence[View]) -> GroundTruth:
    """The benchmark's ground truth: every query's box, and its labels by `label`."""
    labels = [[label(query, view) for view in database] for query in queries]
    found = {
        kind: [np.flatnonzero([given == kind for given in row]) for row in labels]
        for kind in ("easy", "hard", "junk")
    }
    return GroundTruth(
        name="demo",
        database=[view.name for view in database],
        queries=[view.name for view in queries],
        boxes=np.array([query_box(query) for query in queries]),
        **found,
    )


def sheet(
    folder: Path, landmarks: Sequence[str], views: int = 6
) -> dict[str, list[tuple[str, Path]]]:
    """Names and image files of each landmark's first `views` views, for a contact sheet.

    `folder` is `<run>/data`; the landmarks may be of either part. ValueError names one that the
    demo set does not hold.
    """
    folder, found = Path(folder), {}
    parts = [
        (pd.read_csv(folder / "benchmark" / "views.csv"), jpg_path),
        (pd.read_csv(folder / "views.csv", dtype={"name": str}), train_path),
    ]
    for landmark in landmarks:
        found[landmark] = [
            (name, folder / path(name))
            for table, path in parts
            for name in table.loc[table["landmark"] == landmark, "name"]
        ][:views]
        if not found[landmark]:
            raise ValueError(f"the demo set in {folder} has no landmark {landmark!r}")
    return found
