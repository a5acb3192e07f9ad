"""Global descriptors and local features of images in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vitgal.data.images import crop_box, resize as resize_image
from vitgal.features.local import LocalFeatures
from vitgal.models.inference import batches, device_of, inference, network_input
from vitgal.models.local_features import local_features
from vitgal.models.network import ViTGaL
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings, SelectionSettings


def extract_global(
    model: ViTGaL,
    images: Sequence[np.ndarray],
    boxes: Sequence[Sequence[float] | None] | None = None,
    size: int = GlobalSettings.size,
    resize: str = GlobalSettings.resize,
    scales: Sequence[float] = GlobalSettings.scales,
    batch_size: int = MachineSettings.batch_size,
    *,
    precision: str = GlobalSettings.precision,
) -> np.ndarray:
    """Computes global descriptors of images in memory.

    Args:
        images: (H, W, 3) uint8 RGB each, of any sizes.
        boxes: per image (x0, y0, x1, y1) in pixels to cut out first (`images.crop_box`), or None.
        size, resize: pixels and mode, see `images.resize`; "squash" is the published way.
        scales: of the network input. Several: the mean of the normalised descriptors, renormalised.
        precision: "fp32", "bf16" or "auto".
    Returns:
        (len(images), D) float32 of length 1, in the order of `images`; no images give (0, D).
    Raises:
        ValueError: a box that does not fit its image, an unknown mode or precision, a scale out of
            range, a descriptor that is not finite.
    """
    settings = GlobalSettings(size=size, resize=resize, scales=tuple(scales), precision=precision)
    boxes = [None] * len(images) if boxes is None else boxes
    inputs = (
        (position, resize_image(crop_box(image, box)[0], size, resize))
        for position, (image, box) in enumerate(zip(images, boxes, strict=True))
    )
    rows = np.zeros((len(images), model.embed_dim), np.float32)
    with inference(model, precision):
        for positions, batch in batches(inputs, batch_size):
            rows[positions] = describe(model, np.stack(batch), settings.scales)
    return rows


def describe(
    model: ViTGaL, batch: np.ndarray, scales: Sequence[float] = GlobalSettings.scales
) -> np.ndarray:
    """Computes global descriptors (B, D) float32 of length 1 of a batch (B, H, W, 3) uint8 RGB.

    To be called within `inference`. Raises ValueError where a descriptor is not finite.
    """
    images = network_input(batch, device_of(model))
    total = torch.zeros(len(batch), model.embed_dim, device=images.device)
    for scale in scales:
        scaled = images
        if scale != 1:
            # As published: sides rounded down, no smoothing.
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        total += F.normalize(model.global_features(scaled).float(), dim=1)
    rows = F.normalize(total, dim=1).cpu().numpy()
    if not np.isfinite(rows).all():
        raise ValueError("a global descriptor is not finite: use precision fp32, or other weights")
    return rows


def extract_local(
    model: ViTGaL,
    image: np.ndarray,
    box: Sequence[float] | None = None,
    *,
    size: int = LocalSettings.size,
    precision: str = LocalSettings.precision,
    **options: Any,
) -> LocalFeatures:
    """Computes the local features of one image (H, W, 3) uint8 RGB.

    Args:
        box: (x0, y0, x1, y1) in pixels to cut out first (`images.crop_box`); None: all of it.
        size: the network input has about size x size pixels in the image's shape, sides multiples
            of 16.
        precision: "fp32", "bf16" or "auto".
        options: fields of SelectionSettings; the defaults are the published ones.
    Raises:
        ValueError: a box that does not fit, a model without autoencoder, an option out of range.
    """
    selection = SelectionSettings(**options)
    crop, crop_frame = crop_box(image, box)
    batch = resize_image(crop, size, "area")[None]
    with inference(model, precision):
        inputs = network_input(batch, device_of(model))
        return local_features(model, inputs, [(crop_frame, image.shape[:2])], selection)[0]
