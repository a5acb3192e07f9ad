"""Global descriptors and local features of images.

Local features (ViTGaL, section 3) are the autoencoder's codes of the tokens of highest class
attention. Their coordinates are pixels of the network input at scale 1, with the image's top-left
corner at (0, 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from vitgal.models import inference
from vitgal.models.describers import VITGAL_SIZE, Describer, facts_of
from vitgal.models.graphs import Graphs
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
    with inference.inference(prepared, precision):
        for positions, batch in inference.batches(inputs, batch_size):
            rows[positions] = describe(prepared, batch, settings.scales)
    return rows


def describe(
    model: Describer, batch: Sequence[np.ndarray], scales: Sequence[float] = GlobalSettings.scales
) -> np.ndarray:
    """Computes the global descriptors of images of one size; call it in `inference`.

    batch: (H, W, 3) uint8 RGB each, at least one. Returns (B, D) float32; raises ValueError where
    one is not finite.
    """
    return finite_rows(global_descriptors(model, batch, scales))


def finite_rows(descriptors: Tensor) -> np.ndarray:
    """Copies descriptors (B, D) to the host; ValueError where one is not finite."""
    rows = descriptors.cpu().numpy()
    if not np.isfinite(rows).all():
        raise ValueError("a global descriptor is not finite: use precision fp32, or other weights")
    return rows


def global_descriptors(
    model: Describer, batch: Sequence[np.ndarray], scales: Sequence[float]
) -> Tensor:
    """Computes what `describe` does, (B, D) on the model's device, without waiting for a GPU."""
    images = inference.network_input(batch, inference.device_of(model))
    total = torch.zeros(len(batch), model.embed_dim, device=images.device)
    step = facts_of(model).multiple
    for scale in scales:
        scaled = images
        if scale != 1 and step:
            size = [max(step, round(side * scale / step) * step) for side in images.shape[-2:]]
            scaled = F.interpolate(images, size, mode="bilinear", align_corners=False)
        elif scale != 1:
            # As published: sides rounded down, no smoothing.
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        with inference.avoid_onednn_fault(scaled):
            total += F.normalize(model.global_features(scaled).float(), dim=1)
    return F.normalize(total, dim=1)


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
    with inference.inference(model, precision):
        inputs = inference.network_input(batch, inference.device_of(model))
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
    return select_features(compute_tokens(model, images, selection), frames, selection)


class ScaleLayout(NamedTuple):
    """How the tokens of a batch lie in the images at one scale."""

    scale: float
    factors: tuple[float, float]  # height and width of the scaled input over those at scale 1
    columns: int  # tokens in a row
    count: int  # tokens of an image


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The tokens of images of one size at all scales, one scale after the other."""

    size: tuple[int, int]  # (h, w) of the network inputs in pixels
    patch: int  # distance of two tokens in pixels of a scaled input
    layouts: Sequence[ScaleLayout]  # one a scale
    scores: Tensor  # (B, N) float32 on the host; on a GPU they are being copied until `copied`
    codes: Tensor  # (B, N, C) on the model's device
    copied: torch.cuda.Event | None  # on a GPU, after which `scores` may be read; None on a CPU


def compute_tokens(
    model: ViTGaL | TokenNetwork,
    images: Tensor,
    selection: SelectionSettings,
    graphs: Graphs | None = None,
) -> TokenBatch:
    """Runs the network on images (B, 3, H, W) at all scales; on a GPU without waiting for it.

    The other arguments are those of `local_features`. graphs: of `run_scales` with this model and
    selection. Raises ValueError where the model has no autoencoder.
    """
    require_codes(model)
    results = graphs(images) if graphs else run_scales(model, images, selection)
    scores, codes, layouts = results
    scores, copied = _to_host(scores)
    return TokenBatch(tuple(images.shape[-2:]), model.patch, layouts, scores, codes, copied)


def run_scales(
    model: ViTGaL | TokenNetwork, images: Tensor, selection: SelectionSettings
) -> tuple[Tensor, Tensor, list[ScaleLayout]]:
    """Computes scores (B, N), codes (B, N, C) and layouts, see `TokenBatch`, on the device."""
    scores, codes, layouts = [], [], []
    for scale in selection.scales:
        resized, factors = rescale(images, scale, selection.interpolation, model.multiple)
        with inference.avoid_onednn_fault(resized):
            features = model.token_codes(resized)
        # NOTE the published code takes the row's length from the input, see `rescale`.
        published = selection.interpolation == "published"
        columns = resized.shape[-1] // model.patch if published else features.grid[1]
        scores.append(token_scores(features.attention))
        codes.append(features.codes)
        layouts.append(ScaleLayout(scale, factors, columns, scores[-1].shape[1]))
    return torch.cat(scores, dim=1), torch.cat(codes, dim=1), layouts


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Starts to copy a tensor from a GPU to the host; returns the copy and when it is complete."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def select_features(
    batch: TokenBatch, frames: Sequence[Frame], selection: SelectionSettings
) -> list[LocalFeatures]:
    """Selects the tokens that become local features; see `local_features`.

    On a GPU it waits for the batch alone, not for what was launched after it, and may run in
    another thread.
    """
    if batch.copied is not None:
        batch.copied.synchronize()
    scores = batch.scores.numpy()
    if not np.isfinite(scores).all():
        raise ValueError("the class attention is not finite: use precision fp32, or other weights")
    kept = [_select_best(row, batch, selection) for row in scores]
    codes = _gather(batch.codes, [tokens for tokens, *_ in kept], batch.copied is not None)
    return [
        LocalFeatures(
            keypoints=centres(boxes),
            descriptors=F.normalize(rows.float(), dim=1).numpy(),
            scores=row[tokens],
            scales=scales,
            input_size=batch.size,
            box=frame[0],
            image_size=frame[1],
        )
        for (tokens, boxes, scales), rows, row, frame in zip(
            kept, codes, scores, frames, strict=True
        )
    ]


def _select_best(
    scores: np.ndarray, batch: TokenBatch, selection: SelectionSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Selects the tokens of one image: those above the thresholds of each scale, less the overlaps.

    scores: (N,). Returns (K,) int64 tokens, their (K, 4) boxes as `patch_boxes` and (K,) float32
    scales, best first.
    """
    tokens, boxes, scales, start = [], [], [], 0
    for scale, factors, columns, count in batch.layouts:
        target = selection.target_per_scale * factors[0] * factors[1]
        above = select_tokens(scores[start : start + count], target, selection.ladder)
        tokens.append(start + above)
        boxes.append(patch_boxes(above, columns, factors, batch.patch))
        scales.append(np.full(len(above), scale, np.float32))
        start += count
    tokens, boxes, scales = (np.concatenate(parts) for parts in (tokens, boxes, scales))
    kept = suppress(
        boxes,
        scores[tokens],
        overlap=selection.nms_overlap,
        candidates=selection.nms_candidates,
        keep=selection.max_keypoints,
    )
    return tokens[kept], boxes[kept], scales[kept]


def _gather(codes: Tensor, tokens: Sequence[np.ndarray], beside: bool) -> Sequence[Tensor]:
    """Copies the codes of each image's tokens to the host, all images at once.

    codes: (B, N, C). beside: on a stream of its own, so that it need not wait for later batches.
    Returns B tensors (K, C).
    """
    rows = [image * codes.shape[1] + kept for image, kept in enumerate(tokens)]
    stream = torch.cuda.Stream(codes.device) if beside else None
    with torch.cuda.stream(stream):
        index = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])).to(codes.device)
        gathered = codes.flatten(0, 1)[index].cpu()
    return gathered.split([len(kept) for kept in tokens])


def require_codes(model: ViTGaL | TokenNetwork) -> int:
    """Returns the dimension of the model's local descriptors; ValueError where it has none."""
    if model.code_dim is None:
        raise ValueError(
            "the model has no autoencoder, so it gives no local descriptors: use the weights of "
            "03_train_autoencoder or a published autoencoder checkpoint"
        )
    return model.code_dim


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
    """Turns class attention (B, heads, N) into scores (B, N) of mean 1.

    Every head is divided by its peak before the mean over heads, as published. Attention that is
    not finite gives scores that are not.
    """
    heads = attention.float()
    mean = (heads / heads.amax(dim=2, keepdim=True)).mean(dim=1)
    return mean / mean.sum(dim=1, keepdim=True) * mean.shape[1]
