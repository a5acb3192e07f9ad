"""Augmentation: photographs (H, W, 3) uint8 RGB become pictures (size, size, 3) uint8.

Everything is drawn from one numpy Generator and applied by OpenCV, as the published library does.
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.transforms import v2 as transforms

from vitgal.data import images
from vitgal.models.inference import normalise

# The largest magnification that `augment_fast` can draw: 1.3 by its zoom times 1.22 by its crop. A
# photograph decoded at this many times the network's size is never enlarged.
FAST_MARGIN = 1.6


def augment_published(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Augments (H, W, 3) uint8 RGB to (size, size, 3) as published, but for the hole.

    Source: published training code: flip 0.5; colour jitter 0.4 each, p 0.5; JPEG 99-100, p 0.5;
    shift 0.2, scale 0.3, rotation 10 degrees over a black border, p 0.7; crop of 0.9 to 1 of the
    area, p 0.5; squash; one black hole of a quarter of the side, p 0.5.
    """
    if rng.random() < 0.5:
        image = cv2.flip(image, 1)
    if rng.random() < 0.5:
        for step in _colour_steps(rng):
            image = step(image)
    if rng.random() < 0.5:
        image = through_jpeg(image, int(rng.integers(99, 101)))
    if rng.random() < 0.7:
        image = _shift_scale_rotate(image, rng)
    if rng.random() < 0.5:
        top, left, height, width = _resized_crop(*image.shape[:2], rng)
        image = image[top : top + height, left : left + width]
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def _colour_steps(rng: np.random.Generator) -> list[Callable[[np.ndarray], np.ndarray]]:
    steps = [
        functools.partial(adjust_contrast, factor=rng.uniform(0.6, 1.4), middle=0.0),  # brightness
        functools.partial(adjust_contrast, factor=rng.uniform(0.6, 1.4)),
        functools.partial(adjust_saturation, factor=rng.uniform(0.6, 1.4)),
        functools.partial(adjust_hue, turn=rng.uniform(-0.4, 0.4)),
    ]
    return [steps[step] for step in rng.permutation(4)]


def adjust_contrast(image: np.ndarray, factor: float, middle: float | None = None) -> np.ndarray:
    """Scales the distance of every value of (H, W, 3) uint8 from `middle`; None: the mean grey."""
    if middle is None:
        middle = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    table = np.arange(256) * factor + middle * (1 - factor)
    return cv2.LUT(image, table.clip(0, 255).astype(np.uint8))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the distance of every pixel of (H, W, 3) uint8 from its own grey."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def adjust_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turns every hue of (H, W, 3) uint8 by `turn` of the whole circle, in steps of 1 / 256."""
    colours = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    tables = np.stack([np.arange(256)] * 3, axis=1)
    tables[:, 0] = (tables[:, 0] + round(256 * turn)) % 256
    return cv2.cvtColor(cv2.LUT(colours, tables[None].astype(np.uint8)), cv2.COLOR_HSV2RGB_FULL)


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Encodes and decodes (H, W, 3) uint8 RGB as OpenCV does by default, but faster."""
    coded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")
    return simplejpeg.decode_jpeg(coded, "RGB")


def _shift_scale_rotate(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    angle = rng.uniform(-10, 10)
    shift = [rng.uniform(-0.2, 0.2) * side for side in (width, height)]
    middle = ((width - 1) / 2, (height - 1) / 2)
    matrix = cv2.getRotationMatrix2D(middle, -angle, rng.uniform(0.7, 1.3))
    matrix[:, 2] += shift
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)


def _resized_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width), of 0.9 to 1 of the area, as torchvision does."""
    for _ in range(10):
        area = height * width * rng.uniform(0.9, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            return int(top), int(left), tall, wide
    tall = min(height, max(1, round(width * 4 / 3)))
    wide = min(width, max(1, round(height * 4 / 3)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _random_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws as `_resized_crop`, but once: a side that is too long is shortened."""
    area = height * width * rng.uniform(0.9, 1.0)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    tall = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide


def augment_fast(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Augments (H, W, 3) uint8 RGB to (size, size, 3), by one warp and one colour matrix.

    Flip, shift, scale, rotation, crop and squash are one affine map sampled once at the network's
    size; brightness, contrast, saturation and a rotation of hue about the grey axis are one 3 x 3
    matrix and an offset. There is no JPEG round trip, and no hole yet.
    """
    picture = cv2.warpAffine(
        image, _random_affine(*image.shape[:2], size, rng), (size, size), flags=cv2.INTER_LINEAR
    )
    if rng.random() < 0.5:
        picture = cv2.transform(picture, _random_colours(picture, rng))
    return picture


def _random_affine(height: int, width: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws the (2, 3) map from photograph to network pixels: flip, rotation, crop, squash."""
    to_unit = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]])
    change = np.diag([-1.0 if rng.random() < 0.5 else 1.0, 1.0, 1.0])
    if rng.random() < 0.7:
        angle, zoom = math.radians(rng.uniform(-10, 10)), rng.uniform(0.7, 1.3)
        aspect = width / height
        cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
        shift = rng.uniform(-0.4, 0.4, size=2)  # unit square is two wide: 0.2 of the side
        turn = [[cosine, -sine / aspect, shift[0]], [sine * aspect, cosine, shift[1]], [0, 0, 1]]
        change = np.array(turn) @ change
    if rng.random() < 0.5:
        top, left, tall, wide = _random_crop(height, width, rng)
        middle = (2 * left + wide) / width - 1, (2 * top + tall) / height - 1
        grow = width / wide, height / tall
        crop = [[grow[0], 0, -grow[0] * middle[0]], [0, grow[1], -grow[1] * middle[1]], [0, 0, 1]]
        change = np.array(crop) @ change
    half = size / 2
    return (np.array([[half, 0, half], [0, half, half], [0, 0, 1]]) @ change @ to_unit)[:2]


def _random_colours(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws a (3, 4) colour matrix: contrast about the mean grey, brightness, saturation, hue."""
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, size=3)
    turn = rng.uniform(-0.4, 0.4) * 2 * math.pi
    grey = np.full((3, 3), np.array([0.299, 0.587, 0.114]))
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = math.cos(turn) * np.eye(3) + (1 - math.cos(turn)) * axis + math.sin(turn) * cross
    matrix = brightness * contrast * hue @ (saturation * np.eye(3) + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * picture.mean()
    return np.hstack([matrix, np.full((3, 1), offset)])


def rand_augment(
    picture: np.ndarray, operations: int, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Applies torchvision's RandAugment (Cubuk et al., 2020) to a picture (H, W, 3) uint8.

    magnitude: strength of the operations, at most 30. torch's own generator is unchanged.
    """
    change = transforms.RandAugment(
        operations, magnitude, interpolation=transforms.InterpolationMode.BILINEAR
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        changed = change(torch.from_numpy(picture).permute(2, 0, 1))
    return changed.permute(1, 2, 0).contiguous().numpy()


def draw_hole(size: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Draws (top, left, side) of a square of a quarter of the side with p 0.5, else three zeros."""
    if rng.random() >= 0.5:
        return 0, 0, 0
    side = size // 4
    top, left = rng.integers(size - side + 1, size=2)
    return int(top), int(left), side


def scaled_hole(hole: Tensor, factor: float) -> Tensor:
    """Scales holes, int64 of shape (..., 3), to an image `factor` times as large, rounded."""
    return (hole * factor).round().long()


def cut_hole(picture: np.ndarray, hole: tuple[int, int, int]) -> None:
    """Blackens a hole (top, left, side) of (H, W, 3) uint8 in place, as published."""
    top, left, side = hole
    picture[top : top + side, left : left + side] = 0


def network_input(pictures: Tensor, holes: Tensor) -> Tensor:
    """Normalises pictures (B, 3, S, S) uint8 to float32; zero, the mean colour, in their holes.

    holes: (B, 3) int64 on the CPU: top, left, side.
    """
    inputs = normalise(pictures)
    for index, (top, left, side) in enumerate(holes.tolist()):
        inputs[index, :, top : top + side, left : left + side] = 0
    return inputs


def displayable(picture: Tensor, hole: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Turns a picture (3, H, W) uint8 into (H, W, 3), with its hole in the mean colour."""
    image = picture.permute(1, 2, 0).numpy().copy()
    top, left, side = hole
    image[top : top + side, left : left + side] = np.round(np.array(images.MEAN) * 255)
    return image
