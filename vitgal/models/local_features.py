"""Local features from patch tokens: which tokens count, at which scales, and which overlap.

Source: ViTGaL, section 3 (local features are the autoencoder's codes of the tokens that its class
attention looks at), and the published extraction code for everything that the paper leaves open:
thresholds, rounding and non-maximum suppression are as that code computes them.

Coordinates are pixels of the network input at scale 1, with the image's top-left corner at (0, 0).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitgal.data.images import PATCH
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import (
    Frame,
    centres,
    patch_boxes,
    scaled_size,
    select_tokens,
    suppress,
)
from vitgal.models.network import ViTGaL
from vitgal.settings.sections import SelectionSettings


def local_features(
    model: ViTGaL,
    images: Tensor,
    frames: Sequence[Frame],
    *,
    scales: Sequence[float] = SelectionSettings.scales,
    max_keypoints: int = SelectionSettings.max_keypoints,
    nms_candidates: int = SelectionSettings.nms_candidates,
    nms_overlap: float = SelectionSettings.nms_overlap,
    target_per_scale: float = SelectionSettings.target_per_scale,
    ladder: Sequence[float] = SelectionSettings.ladder,
    interpolation: str = SelectionSettings.interpolation,
) -> list[LocalFeatures]:
    """Finds the local features of images of one size, at all scales together.

    Args:
        images: (B, 3, h, w) normalised network inputs on the model's device, the sides multiples
            of 16; B may be 0.
        frames: per image the box that was cut out of the photograph and the photograph's size.
        scales: of the network input; at each its sides are rounded up to multiples of 16.
        max_keypoints: features kept of an image.
        nms_candidates: tokens of the highest score that enter non-maximum suppression.
        nms_overlap: a token is dropped where its patch and a better one's have a greater
            intersection over union.
        target_per_scale: tokens wanted at scale 1, in proportion to the area at other scales.
        ladder: thresholds on the score, falling; the first that gives enough tokens is taken.
        interpolation: "size", or "published": see `rescale`.
    Returns:
        One LocalFeatures an image; empty where no token passes the last threshold.
    Raises:
        ValueError: the model has no autoencoder, an option is out of range, or the attention is
            not finite.
    """
    SelectionSettings(  # raises for values out of range
        scales=tuple(scales), ladder=tuple(ladder), interpolation=interpolation
    )
    require_codes(model)
    found: list[list[tuple]] = [[] for _ in frames]
    codes, passed = [], 0  # of the scales so far: the codes, and how many tokens there were
    for scale in scales:
        resized, factors = rescale(images, scale, interpolation)
        features = model.token_codes(resized)
        columns = features.grid[1] if interpolation == "size" else resized.shape[-1] // PATCH
        scores = token_scores(features.attention).cpu().numpy()
        for parts, row in zip(found, scores, strict=True):
            kept = select_tokens(row, target_per_scale * factors[0] * factors[1], ladder)
            nominal = np.full(len(kept), scale, np.float32)
            parts.append((patch_boxes(kept, columns, factors), row[kept], nominal, passed + kept))
        codes.append(features.codes)
        passed += scores.shape[1]
    limits = {"overlap": nms_overlap, "candidates": nms_candidates, "keep": max_keypoints}
    size = tuple(images.shape[-2:])
    return [
        _best(parts, row, limits, size, frame)
        for parts, row, frame in zip(found, torch.cat(codes, dim=1), frames, strict=True)
    ]


def require_codes(model: ViTGaL) -> int:
    """The width of the model's local descriptors; ValueError where it has no autoencoder."""
    if model.code_dim is None:
        raise ValueError(
            "the model has no autoencoder, so it gives no local descriptors: use the weights of "
            "03_train_autoencoder or a published autoencoder checkpoint"
        )
    return model.code_dim


def _best(
    parts: list[tuple], codes: Tensor, limits: dict, size: tuple[int, int], frame: Frame
) -> LocalFeatures:
    """One image's features: what survives suppression over all scales, with its codes."""
    boxes, scores, nominal, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
    kept = suppress(boxes, scores, **limits)
    chosen = codes[torch.from_numpy(tokens[kept]).to(codes.device)].float()
    return LocalFeatures(
        keypoints=centres(boxes[kept]),
        descriptors=F.normalize(chosen, dim=1).cpu().numpy(),
        scores=scores[kept],
        scales=nominal[kept],
        input_size=size,
        box=frame[0],
        image_size=frame[1],
    )


def rescale(
    images: Tensor, scale: float, interpolation: str = "size"
) -> tuple[Tensor, tuple[float, float]]:
    """Images (B, 3, h, w) at a scale, bilinear without smoothing, and the two sides' real factors.

    "published" hands the factors to the interpolation as the published code does, which loses a
    pixel to rounding for some sides (688 at 0.7071; 752 and 880 at 0.5): 495 pixels still make 31
    patches, but that code counts 30, so that where a width is hit its locations are scrambled.
    """
    size = tuple(images.shape[-2:])
    wanted = scaled_size(size, scale)
    factors = (wanted[0] / size[0], wanted[1] / size[1])
    if interpolation == "size":
        # NOTE the published code gives `scale_factor`; the size says the same without rounding.
        how = {"size": wanted}
    else:
        how = {"scale_factor": factors}
    if wanted == size:
        return images, factors
    return F.interpolate(images, **how, mode="bilinear", align_corners=False), factors


def token_scores(attention: Tensor) -> Tensor:
    """Class attention (B, heads, N) to scores (B, N) of mean 1.

    Every head is divided by its peak before the mean over heads, as published.
    Raises ValueError where the attention is not finite.
    """
    if not bool(torch.isfinite(attention).all()):
        raise ValueError("the class attention is not finite: use precision fp32, or other weights")
    heads = attention.float()
    mean = (heads / heads.amax(dim=2, keepdim=True)).mean(dim=1)
    return mean / mean.sum(dim=1, keepdim=True) * mean.shape[1]
