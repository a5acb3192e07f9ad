"""Global descriptors and local features of images.

Local features (ViTGaL, section 3) are the autoencoder's codes of the tokens of highest class
attention. Their coordinates are pixels of the network input at scale 1, with the image's top-left
corner at (0, 0).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitgal.data.images import PATCH, crop_box, resize as resize_image
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import (
    Frame,
    centres,
    patch_boxes,
    scaled_size,
    select_tokens,
    suppress,
)
from vitgal.models.describers import VITGAL_SIZE, Describer, facts_of
from vitgal.models.inference import batches, device_of, inference, network_input
from vitgal.models.network import ViTGaL
from vitgal.models.prepared import prepare
from vitgal.models.token_network import TokenNetwork
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings, SelectionSettings


def extract_global(
    model: Describer,
    images: Sequence[np.ndarray],
    boxes: Sequence[Sequence[float] | None] | None = None,
    size: int | None = VITGAL_SIZE,
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
        size, resize: pixels and mode, see `images.resize`; "squash" is the published way. None is
            the size that the network was made for.
        scales: of the network input. Several: the mean of the normalised descriptors, renormalised.
        precision: "fp32", "bf16" or "auto".
    Returns:
        (len(images), D) float32 of length 1; no images give (0, D).
    Raises:
        ValueError: a box that does not fit its image, an unknown mode or precision, a scale out of
            range, a descriptor that is not finite.
    """
    settings = GlobalSettings(size=size, resize=resize, scales=tuple(scales), precision=precision)
    facts = facts_of(model)
    size, multiple = size or facts.size, facts.multiple
    boxes = [None] * len(images) if boxes is None else boxes
    inputs = (
        (position, resize_image(crop_box(image, box)[0], size, resize, multiple))
        for position, (image, box) in enumerate(zip(images, boxes, strict=True))
    )
    rows = np.zeros((len(images), model.embed_dim), np.float32)
    prepared = prepare(model, precision)
    with inference(prepared, precision):
        for positions, batch in batches(inputs, batch_size):
            rows[positions] = describe(prepared, np.stack(batch), settings.scales)
    return rows


def describe(
    model: Describer, batch: np.ndarray, scales: Sequence[float] = GlobalSettings.scales
) -> np.ndarray:
    """Computes the global descriptors (B, D) of a batch (B, H, W, 3); call it in `inference`."""
    images = network_input(batch, device_of(model))
    total = torch.zeros(len(batch), model.embed_dim, device=images.device)
    multiple = facts_of(model).multiple
    for scale in scales:
        scaled = images
        if scale != 1 and multiple:
            step = multiple
            size = [max(step, round(side * scale / step) * step) for side in images.shape[-2:]]
            scaled = F.interpolate(images, size, mode="bilinear", align_corners=False)
        elif scale != 1:
            # As published: sides rounded down, no smoothing.
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        total += F.normalize(model.global_features(scaled).float(), dim=1)
    rows = F.normalize(total, dim=1).cpu().numpy()
    if not np.isfinite(rows).all():
        raise ValueError("a global descriptor is not finite: use precision fp32, or other weights")
    return rows


def extract_local(
    model: ViTGaL | TokenNetwork,
    image: np.ndarray,
    box: Sequence[float] | None = None,
    *,
    size: int = LocalSettings.size,
    precision: str = LocalSettings.precision,
    **options: Any,
) -> LocalFeatures:
    """Computes the local features of one image (H, W, 3) uint8 RGB.

    Args:
        box, precision: as for `extract_global`.
        size: the network input has about size x size pixels in the image's shape, sides multiples
            of the model's `multiple` (16).
        options: fields of SelectionSettings; the defaults are the published ones.
    Raises:
        ValueError: a box that does not fit, a model without autoencoder, an option out of range.
    """
    selection = SelectionSettings(**options)
    require_codes(model)
    crop, crop_frame = crop_box(image, box)
    batch = resize_image(crop, size, "area", model.multiple)[None]
    model = prepare(model, precision)
    with inference(model, precision):
        inputs = network_input(batch, device_of(model))
        return local_features(model, inputs, [(crop_frame, image.shape[:2])], selection)[0]


def local_features(
    model: ViTGaL | TokenNetwork,
    images: Tensor,
    frames: Sequence[Frame],
    selection: SelectionSettings,
) -> list[LocalFeatures]:
    """Finds the local features of images of one size, at all scales together.

    Thresholds, rounding and suppression are those of the published extraction code.

    Args:
        images: (B, 3, h, w) normalised network inputs on the model's device, the sides multiples
            of the model's `multiple` (16); B may be 0.
        frames: per image the box that was cut out of the photograph and the photograph's size.
        selection: which tokens become features. At each scale the sides of the input are rounded
            up to multiples again; `target_per_scale` is in proportion to the area.
    Returns:
        One LocalFeatures an image; empty where no token passes the last threshold.
    Raises:
        ValueError: the model has no autoencoder, or the attention is not finite.
    """
    require_codes(model)
    candidates: list[list[tuple]] = [[] for _ in frames]
    codes, count = [], 0  # of the scales so far: the codes, and the number of tokens
    for scale in selection.scales:
        resized, factors = rescale(images, scale, selection.interpolation, model.multiple)
        features = model.token_codes(resized)
        # NOTE the published code takes the row's length from the input, see `rescale`.
        published = selection.interpolation == "published"
        columns = resized.shape[-1] // model.patch if published else features.grid[1]
        target = selection.target_per_scale * factors[0] * factors[1]
        scores = token_scores(features.attention).cpu().numpy()
        for parts, row in zip(candidates, scores, strict=True):
            tokens = select_tokens(row, target, selection.ladder)
            nominal = np.full(len(tokens), scale, np.float32)
            boxes = patch_boxes(tokens, columns, factors, model.patch)
            parts.append((boxes, row[tokens], nominal, count + tokens))
        codes.append(features.codes)
        count += scores.shape[1]
    size = tuple(images.shape[-2:])
    return [
        _select_best(parts, row, selection, size, frame)
        for parts, row, frame in zip(candidates, torch.cat(codes, dim=1), frames, strict=True)
    ]


def require_codes(model: ViTGaL | TokenNetwork) -> int:
    """Returns the dimension of the model's local descriptors; ValueError where it has none."""
    if model.code_dim is None:
        raise ValueError(
            "the model has no autoencoder, so it gives no local descriptors: use the weights of "
            "03_train_autoencoder or a published autoencoder checkpoint"
        )
    return model.code_dim


def _select_best(
    parts: list[tuple],
    codes: Tensor,
    selection: SelectionSettings,
    size: tuple[int, int],
    frame: Frame,
) -> LocalFeatures:
    """One image's features and codes after suppression over all scales."""
    boxes, scores, nominal, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
    kept = suppress(
        boxes,
        scores,
        overlap=selection.nms_overlap,
        candidates=selection.nms_candidates,
        keep=selection.max_keypoints,
    )
    kept_codes = codes[torch.from_numpy(tokens[kept]).to(codes.device)].float()
    return LocalFeatures(
        keypoints=centres(boxes[kept]),
        descriptors=F.normalize(kept_codes, dim=1).cpu().numpy(),
        scores=scores[kept],
        scales=nominal[kept],
        input_size=size,
        box=frame[0],
        image_size=frame[1],
    )


def rescale(
    images: Tensor,
    scale: float,
    interpolation: str = SelectionSettings.interpolation,
    multiple: int = PATCH,
) -> tuple[Tensor, tuple[float, float]]:
    """Scales images (B, 3, h, w), bilinear without smoothing; returns them and both sides' factors.

    "published" passes the factors to the interpolation, as the published code does. Rounding then
    costs some sides a pixel (688 at 0.7071; 752 and 880 at 0.5). A width of 495 pixels has 31
    patches, but that code assumes 30 and gets wrong locations.
    """
    size = tuple(images.shape[-2:])
    target = scaled_size(size, scale, multiple)
    factors = (target[0] / size[0], target[1] / size[1])
    if target == size:
        return images, factors
    # NOTE the published code gives `scale_factor`; the size is the same without rounding.
    size, scale_factor = (target, None) if interpolation == "size" else (None, factors)
    return F.interpolate(images, size, scale_factor, "bilinear", align_corners=False), factors


def token_scores(attention: Tensor) -> Tensor:
    """Turns class attention (B, heads, N), which must be finite, into scores (B, N) of mean 1.

    Every head is divided by its peak before the mean over heads, as published.
    """
    if not bool(torch.isfinite(attention).all()):
        raise ValueError("the class attention is not finite: use precision fp32, or other weights")
    heads = attention.float()
    mean = (heads / heads.amax(dim=2, keepdim=True)).mean(dim=1)
    return mean / mean.sum(dim=1, keepdim=True) * mean.shape[1]
