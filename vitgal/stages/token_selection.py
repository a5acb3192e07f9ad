"""What becomes of one photograph's tokens: attention, the features kept, and why others are not."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from vitgal.data.images import PATCH, crop_box
from vitgal.data.images import resize as resize_image
from vitgal.features.local import LocalFeatures
from vitgal.settings import LocalSettings, SelectionSettings

REASONS = {
    "overlap": "its patch overlaps a better one",
    "candidates": "not among the candidates of suppression",
    "keypoints": "more than max_keypoints",
}


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """What the network computed for one photograph, or its box, on the way to local features.

    Attributes:
        attention: scale -> (heads, h, w) float32, each head's class attention over its peak.
        scores: scale -> (h, w) float32 of mean 1: the mean over heads, by which tokens are chosen.
        kept: the features, as extraction returns them.
        dropped: tokens above the threshold that are not kept, best first.
        reasons: (len(dropped),) strings, keys of REASONS.
    """

    attention: dict[float, np.ndarray]
    scores: dict[float, np.ndarray]
    kept: LocalFeatures
    dropped: LocalFeatures
    reasons: np.ndarray

    def heat(self, scale: float, head: int | None = None) -> np.ndarray:
        """Returns the map (h, w) of a head, or the scores of all, at the nearest scale there is."""
        nearest = min(self.scores, key=lambda candidate: abs(candidate - scale))
        return self.scores[nearest] if head is None else self.attention[nearest][head]


def explain_selection(
    model: Any,
    image: np.ndarray,
    box: Sequence[float] | None = None,
    settings: LocalSettings | None = None,
) -> TokenSelection:
    """Extracts a photograph's local features, keeping what extraction forgets.

    Takes one pass of the network.

    Args:
        model: a ViTGaL with autoencoder.
        image: (H, W, 3) uint8 RGB.
        box: (x0, y0, x1, y1) in pixels, the part that is described; None: all.
        settings: of extraction; None: the defaults.
    Raises:
        ValueError: the box does not fit the image, or the model has no autoencoder.
    """
    from vitgal.models import inference, local_features

    settings = settings or LocalSettings()
    local_features.require_codes(model)
    crop, box = crop_box(image, box)
    batch = resize_image(crop, settings.size, "area")[None]
    with inference.inference(model, settings.precision):
        images = inference.network_input(batch, next(model.parameters()).device)
        passes = [_at_scale(model, images, scale, settings) for scale in settings.scales]
    tokens = _Tokens.join([chosen for _, _, chosen in passes])
    size = (batch.shape[1], batch.shape[2])
    kept, dropped, reasons = tokens.choose(settings, (size, box, image.shape[:2]))
    return TokenSelection(
        {scale: heads for scale, (heads, _, _) in zip(settings.scales, passes, strict=True)},
        {scale: scores for scale, (_, scores, _) in zip(settings.scales, passes, strict=True)},
        *(kept, dropped, reasons),
    )


def matching_fraction(extracted: LocalFeatures, stored: LocalFeatures) -> float:
    """Returns the fraction of stored features that another extraction gives too; 1 for none.

    Features are compared by position and scale. The fraction is 1 where the pass computes as
    extraction did. Another batch or precision moves the last bits of a score, and with them a
    feature at a threshold.
    """
    if not len(stored):
        return 1.0
    keys, stored_keys = (
        set(zip(*features.keypoints.T.tolist(), features.scales.tolist(), strict=True))
        for features in (extracted, stored)
    )
    return len(keys & stored_keys) / len(stored_keys)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Tokens above the threshold: boxes (n, 4) int64, scores and scales (n,), codes (n, C)."""

    boxes: np.ndarray
    scores: np.ndarray
    scales: np.ndarray
    codes: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["_Tokens"]) -> "_Tokens":
        arrays = (
            np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)
        )
        return cls(*arrays)

    def choose(
        self, settings: SelectionSettings, sizes: tuple
    ) -> tuple[LocalFeatures, LocalFeatures, np.ndarray]:
        """The features kept, those dropped, and why. sizes: input size, box and image size."""
        from vitgal.features import selection

        order = np.argsort(-self.scores, kind="stable")
        survivors = selection.suppress(
            *(self.boxes, self.scores),
            overlap=settings.nms_overlap,
            candidates=settings.nms_candidates,
            keep=len(self.scores),
        )
        reasons = np.full(len(self.scores), "overlap", dtype="<U10")
        reasons[order[settings.nms_candidates :]] = "candidates"
        reasons[survivors[settings.max_keypoints :]] = "keypoints"
        kept = survivors[: settings.max_keypoints]
        dropped = order[~np.isin(order, kept)]
        length = np.linalg.norm(self.codes, axis=1, keepdims=True)
        codes = self.codes / np.where(length > 0, length, 1)
        centres = selection.centres(self.boxes)
        every = LocalFeatures(centres, codes, self.scores, self.scales, *sizes)
        return every.subset(kept), every.subset(dropped), reasons[dropped]


def _at_scale(
    model: Any, images: Any, scale: float, settings: SelectionSettings
) -> tuple[np.ndarray, np.ndarray, _Tokens]:
    """Attention (heads, h, w), scores (h, w) and the tokens above the threshold at one scale."""
    from vitgal.features import selection
    from vitgal.models import local_features

    resized, factors = local_features.rescale(images, scale, settings.interpolation)
    features = model.token_features(resized)
    scores = local_features.token_scores(features.attention)[0].cpu().numpy()
    target = settings.target_per_scale * factors[0] * factors[1]
    tokens = selection.select_tokens(scores, target, settings.ladder)
    published = settings.interpolation == "published"
    columns = resized.shape[-1] // PATCH if published else features.grid[1]
    heads = features.attention[0].float()
    heads = (heads / heads.amax(dim=1, keepdim=True)).cpu().numpy()
    chosen = _Tokens(
        selection.patch_boxes(tokens, columns, factors),
        scores[tokens],
        np.full(len(tokens), scale, np.float32),
        features.codes[0].float().cpu().numpy()[tokens],
    )
    return heads.reshape(len(heads), *features.grid), scores.reshape(features.grid), chosen
