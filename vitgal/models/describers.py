"""Describers, the networks that describe images: ViTGaL, and any network of timm."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgal.models.backbones import Backbone, generalised_mean, renormalisation
from vitgal.models.network import TokenFeatures, ViTGaL
from vitgal.models.sources import VITGAL_SIZE, NetworkError, TimmSource
from vitgal.models.timm_networks import fingerprint_tensors
from vitgal.settings import POOLINGS, GlobalSettings

# Sizes in place of the training size, as benchmarks/README.md measures them.
SIZES = {"tf_efficientnet_lite0": 192}


class TimmDescriber(nn.Module):
    """Any network of timm as a describer, in eval mode; it has no local descriptors of its own.

    Images are (B, 3, H, W) float32, normalised as `inference.normalise` does; the network's own
    means and deviations are applied here.

    pooling: "class" is the class token, "gem" the generalised mean of the tokens (exponent 3,
    Radenovic et al., 2019; of negative numbers the cube keeps the sign), "both" the two side by
    side, each of length 1. None is what the network was made for: the class token where it was
    trained, GeM of a feature map, else timm's own pooling (an attention pool, or the normalised
    mean).

    Raises NetworkError for a pooling that needs a class token where there is none.
    """

    code_dim: int | None = None

    def __init__(self, backbone: Backbone, pooling: str | None = None):
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}")
        if pooling in ("class", "both") and not backbone.has_class_token:
            raise NetworkError(
                f"{backbone.name} has no class token: set pooling to gem, or to null for its own"
            )
        self._pool = pooling or _own_pooling(backbone)
        factor, offset = renormalisation(backbone.mean, backbone.std)
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.eval()

    @functools.cached_property
    def embed_dim(self) -> int:
        """Width of the global descriptor."""
        if self._pool == "both":
            return 2 * self.backbone.embed_dim
        if self._pool != "own":
            return self.backbone.embed_dim
        # Some heads have layers of their own: only timm knows the width.
        with torch.inference_mode():
            image = torch.zeros(1, 3, *self.backbone.native_size, device=self.factor.device)
            return self.backbone.pooled(image).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Computes `global_features` (B, D) of images (B, 3, H, W)."""
        return self.global_features(images)

    def global_features(self, images: Tensor) -> Tensor:
        """Computes global descriptors (B, D) float32, not normalised. Raises as `Backbone`."""
        images = self._renormalised(images)
        if self._pool == "own":
            return self.backbone.pooled(images).float()
        features = self.backbone(images)
        if self._pool == "class":
            return features.class_token.float()
        pooled = generalised_mean(features.tokens)
        if self._pool == "gem":
            return pooled
        return torch.cat(
            [F.normalize(features.class_token.float(), dim=1), F.normalize(pooled, dim=1)], dim=1
        )

    def token_features(self, images: Tensor, block: str | None = None) -> TokenFeatures:
        """Computes the tokens of a named block (`Backbone.blocks`; None: the last) and attention.

        The attention is the class token's in that block; where there is none it is the norm of
        each token, as of one head, (B, 1, N).
        """
        features = self.backbone(self._renormalised(images), block, attention=True)
        tokens, attention = features.tokens.float(), features.attention
        if attention is None:
            attention = tokens.norm(dim=2)[:, None]
        return TokenFeatures(features.grid, tokens, attention, None, None, attention)

    def _renormalised(self, images: Tensor) -> Tensor:
        inputs = images * self.factor + self.offset
        return inputs.contiguous(memory_format=torch.channels_last)


Describer = ViTGaL | TimmDescriber


def _own_pooling(backbone: Backbone) -> str:
    """The pooling that a network was made for: "class", "gem" or "own", timm's."""
    network = backbone.network
    if backbone.has_class_token:
        # With a norm after the mean of all tokens the class token was not trained.
        trained = isinstance(getattr(network, "fc_norm", nn.Identity()), nn.Identity)
        return "class" if trained and not backbone.hierarchical else "own"
    norm = getattr(getattr(network, "head", None), "norm", None)
    normalised = norm is not None and not isinstance(norm, nn.Identity)
    channels_last = getattr(network, "output_fmt", None) == "NHWC"  # Swin's, normalised too
    return "own" if normalised or channels_last or not backbone.hierarchical else "gem"


@dataclass(frozen=True)
class InputFacts:
    """The images that a network was made for."""

    size: int = VITGAL_SIZE  # pixels
    multiple: int | None = None  # of which sides are; None for the published rules of ViTGaL


def facts_of(model: Any) -> InputFacts:
    """Returns the images that an opened model takes."""
    if isinstance(model, TimmDescriber):
        return _backbone_facts(model.backbone)
    on_timm = getattr(model, "on_timm", False)  # ViTGaL's head on a network of timm
    return _backbone_facts(model.backbone.trunk) if on_timm else InputFacts()


def _backbone_facts(backbone: Backbone) -> InputFacts:
    size = SIZES.get(backbone.name.partition(".")[0], max(backbone.native_size))
    # Convolutions take any side, so the photograph's aspect is kept to the pixel.
    fixed = backbone.network.pretrained_cfg.get("fixed_input_size", False)
    return InputFacts(size, backbone.multiple if fixed or not backbone.hierarchical else 1)


def sized_for(name: str, settings: GlobalSettings) -> GlobalSettings:
    """Returns the settings for a network of timm, as `sources.sized`."""
    backbone = _untrained(name)
    facts = _backbone_facts(backbone)
    settings = replace(
        settings,
        size=settings.size or facts.size,
        multiple=settings.multiple or facts.multiple,
    )
    if settings.resize == "squash":
        backbone.check_size(settings.size, settings.size)
    return settings


@functools.lru_cache(maxsize=4)
def _untrained(name: str) -> Backbone:
    """A network on the meta device, for its properties."""
    with torch.device("meta"):
        return Backbone(TimmSource(name, None))


def open_timm(source: TimmSource, pooling: str | None = None) -> TimmDescriber:
    """Opens a network of timm as a describer. Raises as `Backbone` and `TimmDescriber`."""
    return TimmDescriber(Backbone(source), pooling)


@functools.lru_cache(maxsize=16)
def fingerprint_hub(name: str) -> str:
    """Returns the sha256 of the tensors of timm's own weights; they are read once per process."""
    return fingerprint_tensors(Backbone(TimmSource(name)).network)
