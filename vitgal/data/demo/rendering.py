"""Pixels of simulated views."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from vitgal.data.demo.drawing import Ellipse, View
from vitgal.data.demo.homography import invert, multiply, translation

MIN_MEAN = 28.0  # mean grey value below which a view is brightened


def render(view: View, image: np.ndarray) -> np.ndarray:
    """Renders a view of its photograph.

    The photograph is mirrored at its border. A view with a mean below MIN_MEAN of 255 is brightened
    to it.

    Args:
        image: (H, W, 3) uint8 RGB, the photograph.

    Returns:
        (height, width, 3) uint8 RGB of the view's size.
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
    """Darkens and cools the view and adds a few lamps and sensor noise."""
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


def write_views(targets: Sequence[tuple[View, Path]], *, progress: bool = True) -> None:
    """Renders and writes views as JPEG, each photograph decoded once.

    The files do not depend on the number of threads. ValueError names a photograph that cannot be
    decoded or has another size than its row in ATTRIBUTION.csv.
    """
    groups: dict[Path, list[tuple[View, Path]]] = {}
    for view, target in targets:
        groups.setdefault(view.photograph.path, []).append((view, target))
    bar = tqdm(groups.values(), desc="views", unit="photograph", disable=not progress)
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
