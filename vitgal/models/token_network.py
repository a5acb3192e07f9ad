"""Tokens of a network of timm as local features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgal.features.codes import CodeError, Codes
from vitgal.models.describers import TimmDescriber
from vitgal.models.inference import device_of
from vitgal.models.network import TokenCodes, ViTGaL
from vitgal.models.timm_networks import NetworkError
from vitgal.settings import LocalSettings


class TokenNetwork(nn.Module):
    """A block of a timm network for `local_features`: tokens, their codes and their scores.

    Tokens are selected by the class token's attention in the same block, or by their norm where
    there is none. block: one of `Backbone.blocks`. codes: the map from tokens to codes; None: the
    normalised tokens themselves.

    Raises NetworkError for a block that the network does not have, with those that it has, and
    CodeError for codes of another block's tokens.
    """

    def __init__(
        self, describer: TimmDescriber, block: str | None = None, codes: Codes | None = None
    ):
        super().__init__()
        backbone = describer.backbone
        self.describer = describer
        self.block = block or backbone.local_block()
        width = backbone.width(self.block)
        self.patch = backbone.stride(self.block)  # distance of two tokens in pixels
        self.multiple = math.lcm(self.patch, backbone.multiple)  # of which sides are multiples
        self.code_dim = width if codes is None else codes.code_dim  # of a local descriptor
        if codes is not None and len(codes.mean) != width:
            raise CodeError(
                f"the codes are for tokens of {len(codes.mean)} values, and those of {self.block} "
                f"of {backbone.name} have {width}: use a run_dir for each network and block"
            )
        for name in ("mean", "projection"):
            value = None if codes is None else torch.tensor(getattr(codes, name))
            self.register_buffer(name, value, persistent=False)
        self.eval()

    def token_codes(self, images: Tensor) -> TokenCodes:
        """Computes codes (B, N, C) and attention of images (B, 3, H, W), sides of `multiple`."""
        features = self.describer.token_features(images, self.block)
        tokens = F.normalize(features.tokens, dim=2)
        if self.projection is not None:
            tokens = (tokens - self.mean) @ self.projection
        return TokenCodes(features.grid, tokens, features.attention)


def local_network(
    model: ViTGaL | TimmDescriber, settings: LocalSettings, codes: Codes | None = None
) -> ViTGaL | TokenNetwork:
    """Returns the network for a model's local features: a TokenNetwork, or a ViTGaL itself.

    Raises as `TokenNetwork`, and NetworkError for a block of ViTGaL, whose tokens are its last.
    """
    if isinstance(model, TimmDescriber):
        return TokenNetwork(model, settings.block, codes).to(device_of(model))
    if settings.block is not None:
        raise NetworkError(
            f"local_block {settings.block!r} is for networks of timm; ViTGaL's local features are "
            "its last tokens: set local_block to null"
        )
    return model
