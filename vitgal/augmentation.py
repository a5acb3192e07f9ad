"""Augmentation: what is done to a photograph before the network sees it in training.

Parameters are drawn from one numpy Generator and applied by torchvision or OpenCV.
"""

import functools
import math

import cv2
import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from vitgal import images


def augment_published(image: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """The published training augmentation, step for step, at the photograph's full size.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: side of the square network input in pixels.
        rng: all randomness comes from here.
    Returns:
        (3, size, size) float32, ImageNet-normalised, zero where the hole was cut.

    Source: published training code: flip 0.5; colour jitter 0.4 each, p 0.5; JPEG 99-100, p 0.5;
    shift 0.2, scale 0.3, rotation 10 degrees over a black border, p 0.7; crop of 0.9 to 1 of the
    area, p 0.5; squash; one zero hole of a quarter of the side, p 0.5.
    """
    picture = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
    if rng.random() < 0.5:
        picture = tv.horizontal_flip(picture)
    if rng.random() < 0.5:
        picture = _jitter_colours(picture, rng)
    if rng.random() < 0.5:
        picture = tv.jpeg(picture.contiguous(), int(rng.integers(99, 101)))
    if rng.random() < 0.7:
        height, width = picture.shape[-2:]
        picture = tv.affine(
            picture,
            angle=float(rng.uniform(-10, 10)),
            translate=[float(rng.uniform(-0.2, 0.2) * side) for side in (width, height)],
            scale=float(rng.uniform(0.7, 1.3)),
            shear=[0.0, 0.0],
            interpolation=tv.InterpolationMode.BILINEAR,
            fill=0,
        )
    if rng.random() < 0.5:
        top, left, height, width = _random_crop(*picture.shape[-2:], rng)
        picture = tv.crop(picture, top, left, height, width)
    # NOTE antialias off: the published code squashes with plain bilinear sampling
    picture = tv.resize(picture, [size, size], antialias=False)
    return _cut_hole(normalised(picture), rng)


def _jitter_colours(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue by up to 0.4 each, in a random order."""
    steps = [
        functools.partial(tv.adjust_brightness, brightness_factor=rng.uniform(0.6, 1.4)),
        functools.partial(tv.adjust_contrast, contrast_factor=rng.uniform(0.6, 1.4)),
        functools.partial(tv.adjust_saturation, saturation_factor=rng.uniform(0.6, 1.4)),
        functools.partial(tv.adjust_hue, hue_factor=rng.uniform(-0.4, 0.4)),
    ]
    for step in rng.permutation(4):
        picture = steps[step](picture)
    return picture


def _random_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of 0.9 to 1 of the area at 3:4 to 4:3 of the aspect."""
    area = height * width * rng.uniform(0.9, 1.0)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    tall = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide


def _cut_hole(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Sets one square of a quarter of the side to zero (the mean colour) with p 0.5, in place."""
    if rng.random() < 0.5:
        side = picture.shape[-1] // 4
        top, left = rng.integers(picture.shape[-1] - side + 1, size=2)
        picture[:, top : top + side, left : left + side] = 0
    return picture


def augment_fast(image: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """The published augmentation's kinds of change in one warp and one colour matrix.

    Flip, shift, scale, rotation, crop and squash are one affine map sampled once at the network's
    size; brightness, contrast, saturation and a rotation of hue about the grey axis are one 3 x 3
    matrix and an offset. No JPEG round trip. Shapes and steps otherwise as `augment_published`.
    """
    picture = cv2.warpAffine(
        image, _random_affine(*image.shape[:2], size, rng), (size, size), flags=cv2.INTER_LINEAR
    )
    if rng.random() < 0.5:
        picture = cv2.transform(picture, _random_colours(picture, rng))
    return _cut_hole(normalised(torch.from_numpy(picture).permute(2, 0, 1)), rng)


def _random_affine(height: int, width: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(2, 3) map from photograph to network pixels: flip, shift-scale-rotate, crop, squash."""
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
    """(3, 4) colour matrix: contrast about the mean grey, brightness, saturation, hue rotation."""
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, size=3)
    turn = rng.uniform(-0.4, 0.4) * 2 * math.pi
    grey = np.full((3, 3), np.array([0.299, 0.587, 0.114]))
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = math.cos(turn) * np.eye(3) + (1 - math.cos(turn)) * axis + math.sin(turn) * cross
    matrix = brightness * contrast * hue @ (saturation * np.eye(3) + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * picture.mean()
    return np.hstack([matrix, np.full((3, 1), offset)])


def squashed(image: np.ndarray, size: int, rng: np.random.Generator | None = None) -> Tensor:
    """(3, size, size) float32: squashed as at test time, normalised; `rng` is not used."""
    return torch.from_numpy(images.normalise(images.resize(image, size, "squash")))


def normalised(picture: Tensor) -> Tensor:
    """(3, H, W) uint8 -> float32 with ImageNet's mean and deviation."""
    mean = torch.tensor(images.MEAN, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(images.STD, dtype=torch.float32).view(3, 1, 1)
    return (picture.to(torch.float32) / 255 - mean) / std


def displayable(picture: Tensor) -> np.ndarray:
    """A normalised network input (3, H, W) as (H, W, 3) uint8 RGB."""
    mean, std = (torch.tensor(value, dtype=torch.float32) for value in (images.MEAN, images.STD))
    pixels = (picture.permute(1, 2, 0) * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).numpy()
