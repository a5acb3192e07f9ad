"""The selection of one photograph's tokens: attention, kept and dropped features."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitgal.data.images import crop_box, resize as resize_image
from vitgal.features.local import LocalFeatures
from vitgal.settings import LocalSettings

REASONS = {
    "overlap": "its patch overlaps a better one",
    "candidates": "not among the candidates of suppression",
    "keypoints": "more than max_keypoints",
}
UNLIMITED = 10**9


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Attention, scores and features of one photograph, or of its box.

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
        """Returns the map of a head, or the scores, of shape (h, w) at the nearest scale."""
        nearest = min(self.scores, key=lambda candidate: abs(candidate - scale))
        return self.scores[nearest] if head is None else self.attention[nearest][head]


class _Recorder:
    """A model for `local_features` that runs once at each scale, then repeats its outputs."""

    def __init__(self, model: Any) -> None:
        self.model, self.code_dim, self.outputs, self.scale = model, model.code_dim, [], 0

    def token_codes(self, images: Any) -> Any:
        """Returns the TokenCodes of images (1, 3, H, W) at the next scale."""
        if self.scale == len(self.outputs):
            self.outputs.append(self.model.token_codes(images))
        self.scale += 1
        return self.outputs[self.scale - 1]


def explain_selection(
    model: Any,
    image: np.ndarray,
    box: Sequence[float] | None = None,
    settings: LocalSettings | None = None,
) -> TokenSelection:
    """Extracts a photograph's kept and dropped local features in one pass.

    Args:
        model: a ViTGaL with autoencoder.
        image: (H, W, 3) uint8 RGB.
        box: (x0, y0, x1, y1) in pixels, the part that is described; None: all.
        settings: of extraction; None: the defaults.
    Raises:
        ValueError: the box does not fit the image, or the model has no autoencoder.
    """
    from vitgal.models.inference import device_of, inference, network_input
    from vitgal.models.local_features import local_features, token_scores

    settings, recorder = settings or LocalSettings(), _Recorder(model)
    crop, box = crop_box(image, box)

    def extract(changed: LocalSettings) -> LocalFeatures:
        """Extracts under other settings of suppression."""
        recorder.scale = 0
        return local_features(recorder, images, [(box, image.shape[:2])], changed)[0]

    with inference(model, settings.precision):
        batch = resize_image(crop, settings.size, "area")[None]
        images = network_input(batch, device_of(model))
        kept = extract(settings)
        survivors = extract(replace(settings, max_keypoints=UNLIMITED))
        unlimited = replace(settings, max_keypoints=UNLIMITED, nms_candidates=UNLIMITED)
        everything = extract(replace(unlimited, nms_overlap=1.0))
        attention, scores = {}, {}
        for scale, output in zip(settings.scales, recorder.outputs, strict=True):
            heads = output.attention[0].float()
            heads = (heads / heads.amax(dim=1, keepdim=True)).cpu().numpy()
            attention[scale] = heads.reshape(len(heads), *output.grid)
            scores[scale] = token_scores(output.attention)[0].cpu().numpy().reshape(output.grid)
    reasons = np.full(len(everything), "overlap", dtype="<U10")
    reasons[settings.nms_candidates :] = "candidates"
    reasons[_among(everything, survivors)] = "keypoints"
    dropped = ~_among(everything, kept)
    return TokenSelection(attention, scores, kept, everything.subset(dropped), reasons[dropped])


def matching_fraction(extracted: LocalFeatures, stored: LocalFeatures) -> float:
    """Returns the fraction of stored features that another extraction gives too; 1 for none.

    Features are compared by position and scale. Another batch or precision
    changes the last bits of a score, which can drop a feature at a threshold.
    """
    return float(_among(stored, extracted).mean()) if len(stored) else 1.0


def _among(features: LocalFeatures, others: LocalFeatures) -> np.ndarray:
    """(N,) bool: which features have the position and scale of one of the others."""
    keys, other_keys = (
        list(zip(*part.keypoints.T.tolist(), part.scales.tolist(), strict=True))
        for part in (features, others)
    )
    stored = set(other_keys)
    return np.array([key in stored for key in keys], bool)
