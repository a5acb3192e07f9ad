"""Tokens of timm networks as local features; weights are random."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.timm_models import build_backbone
from vitgal.features import CodeError, Codes
from vitgal.models import NetworkError, TokenNetwork, local_network
from vitgal.models.describers import TimmDescriber
from vitgal.models.descriptors import local_features
from vitgal.models.network import build_model
from vitgal.settings import LocalSettings

NETWORKS = {"test_vit": "blocks.3", "test_vit2": "blocks.5", "test_efficientnet": "blocks.3"}


def describer(name: str, **options) -> TimmDescriber:
    torch.manual_seed(0)
    return TimmDescriber(build_backbone(name, **options))


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_of_the_default_block(name):
    network = TokenNetwork(describer(name))
    assert (network.block, network.patch, network.multiple) == (NETWORKS[name], 16, 16)
    with torch.inference_mode():
        found = network.token_codes(images(64, 96))
        raw = network.describer.token_features(images(64, 96), network.block)
    assert found.grid == (4, 6) and found.codes.shape == (2, 24, network.code_dim)
    np.testing.assert_allclose(found.codes.norm(dim=2), 1, rtol=1e-5)
    np.testing.assert_array_equal(found.codes, F.normalize(raw.tokens, dim=2))
    # With a class token its attention decides, else the tokens' norm.
    heads = found.attention.shape[1]
    if name == "test_vit":
        assert heads > 1
    else:
        np.testing.assert_allclose(found.attention[:, 0], raw.tokens.norm(dim=2), rtol=1e-6)


def test_codes_are_computed_as_they_were_fitted():
    codes = Codes(
        np.linspace(-1, 1, 48, dtype=np.float32),
        np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32),
    )
    plain, coded = (TokenNetwork(describer("test_efficientnet"), None, c) for c in (None, codes))
    with torch.inference_mode():
        tokens = plain.token_codes(images(64, 64)).codes.numpy()
        found = coded.token_codes(images(64, 64)).codes.numpy()
    assert coded.code_dim == 5
    np.testing.assert_allclose(found, (tokens - codes.mean) @ codes.projection, atol=1e-4)
    with pytest.raises(CodeError, match=r"tokens of 48 values, and those of blocks.4 .* have 64"):
        TokenNetwork(describer("test_efficientnet"), "blocks.4", codes)


def test_the_patch_of_the_network_places_the_features():
    """At patch 14 and scale 1 the centres are 7, 21, 35; the grid of 42 x 56 pixels is 3 x 4."""
    name = "vit_small_patch14_reg4_dinov2"
    network = TokenNetwork(describer(name, depth=4, embed_dim=48, num_heads=3))
    assert (network.patch, network.block) == (14, "blocks.1")
    settings = LocalSettings(scales=(1.0,), ladder=(1e-6,), nms_overlap=1.0)
    frames = [((0, 0, 56, 42), (42, 56))] * 2
    with torch.inference_mode():
        found = local_features(network, images(42, 56), frames, settings)[0]
        scaled = local_features(
            network, images(42, 56), frames, LocalSettings(scales=(0.5, 2.0), ladder=(1e-6,))
        )[0]
    places = sorted(map(tuple, found.keypoints.tolist()))
    assert places == sorted((x, y) for x in (7, 21, 35, 49) for y in (7, 21, 35))
    # At half the size 42 x 56 becomes 28 x 28, since sides are rounded up to multiples of 14; a
    # patch of it covers 21 x 28 pixels of the input.
    half = scaled.keypoints[scaled.scales == 0.5]
    assert {tuple(place) for place in half.tolist()} <= {(14, 10), (42, 10), (14, 31), (42, 31)}
    assert len(half)


def test_blocks_are_named_where_there_is_none():
    with pytest.raises(NetworkError, match=r"no block 'blocks.9'; it has blocks.0, blocks.1"):
        TokenNetwork(describer("test_vit"), "blocks.9")
    with pytest.raises(NetworkError, match="is for networks of timm"):
        local_network(build_model("xcit_nano_12_p16_224", code_dim=4), LocalSettings(block="b"))
