"""Networks of timm as describers: pooling, normalisation, sizes. Weights are random."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.timm_models import build_backbone
from vitgal.data.images import MEAN, STD
from vitgal.models import describers
from vitgal.models.backbones import generalised_mean
from vitgal.models.describers import TimmDescriber
from vitgal.models.descriptors import extract_global
from vitgal.models.network import build_model
from vitgal.models.sources import sized
from vitgal.models.timm_networks import NetworkError
from vitgal.settings import GlobalSettings

VIT = dict(depth=2, embed_dim=48, num_heads=3)


def pixels(size=(64, 96)):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def normalised(values, mean=MEAN, std=STD):
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (mean, std))
    return (values - mean) / std


def test_the_generalised_mean_by_hand():
    tokens = torch.tensor([[[1.0, -1.0, 0.0], [3.0, -3.0, 0.0]]])
    # cube root of (1 + 27) / 2 = 14
    root = 14 ** (1 / 3)
    expected = torch.tensor([[root, -root, 0.0]])
    torch.testing.assert_close(generalised_mean(tokens), expected, atol=1e-5, rtol=1e-5)
    assert generalised_mean(torch.zeros(0, 4, 3)).shape == (0, 3)


def test_an_image_is_shown_as_the_network_was_trained():
    torch.manual_seed(0)
    backbone = build_backbone("tf_efficientnet_lite0")  # mean and deviation 0.5, not ImageNet's
    describer = TimmDescriber(backbone)
    with torch.inference_mode():
        rows = describer.global_features(normalised(pixels()))
        last = backbone.network.forward_features(normalised(pixels(), backbone.mean, backbone.std))
    expected = last.clamp(min=0).pow(3).mean((2, 3)).pow(1 / 3)
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert rows.shape == (2, describer.embed_dim) == (2, 1280) and describer.code_dim is None


def test_poolings_of_a_transformer_by_hand():
    torch.manual_seed(0)
    backbone = build_backbone("test_vit")
    images = normalised(pixels())
    with torch.inference_mode():
        last = backbone.network.forward_features(normalised(pixels(), backbone.mean, backbone.std))
        made = {
            name: TimmDescriber(backbone, name).global_features(images)
            for name in (None, "class", "gem", "both")
        }
    tokens = last[:, 1:].double()
    mean = (tokens**3).mean(1)
    gem = (mean.sign() * mean.abs() ** (1 / 3)).float()
    close = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made[None], last[:, 0], **close)
    torch.testing.assert_close(made["class"], last[:, 0], **close)
    torch.testing.assert_close(made["gem"], gem, **close)
    both = torch.cat([F.normalize(last[:, 0], dim=1), F.normalize(gem, dim=1)], dim=1)
    torch.testing.assert_close(made["both"], both, **close)
    assert TimmDescriber(backbone, "both").embed_dim == 128


@pytest.mark.parametrize(
    ("name", "options", "pooling"),
    [
        ("vit_small_patch14_reg4_dinov2", VIT, "class"),
        ("vit_base_patch16_siglip_224", VIT, "own"),  # an attention pool
        ("eva02_tiny_patch14_224", dict(depth=1), "own"),  # the mean of all tokens, normalised
        ("swin_tiny_patch4_window7_224", dict(depths=(1, 1, 1, 1)), "own"),
        ("convnext_atto", {}, "own"),
        ("resnet10t", {}, "gem"),
    ],
)
def test_the_pooling_that_a_network_was_made_for(name, options, pooling):
    backbone = build_backbone(name, **options)
    describer = TimmDescriber(backbone)
    assert describers._own_pooling(backbone) == pooling
    with torch.inference_mode():
        rows = describer.global_features(normalised(pixels(backbone.native_size)))
    assert rows.shape == (2, describer.embed_dim) and rows.isfinite().all()
    if pooling == "own":
        image = normalised(pixels(backbone.native_size), backbone.mean, backbone.std)
        with torch.inference_mode():
            expected = backbone.network(image)  # without a classifier: what timm pools
        torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)


def test_wrong_poolings_are_refused():
    with pytest.raises(NetworkError, match="test_resnet has no class token: set pooling to gem"):
        TimmDescriber(build_backbone("test_resnet"), "class")
    with pytest.raises(NetworkError, match="pooling 'gem' is for networks of timm"):
        sized(GlobalSettings(pooling="gem"), "model.safetensors")


def test_tokens_are_chosen_by_attention_or_by_their_norm():
    for name, heads in (("test_vit", 2), ("test_resnet", 1)):
        describer = TimmDescriber(build_backbone(name))
        with torch.inference_mode():
            found = describer.token_features(normalised(pixels()))
            inner = describer.token_features(normalised(pixels()), describer.backbone.local_block())
        rows, columns = found.grid
        assert found.attention.shape == (2, heads, rows * columns)
        assert inner.grid == (4, 6) and inner.tokens.shape[:2] == (2, 24)
        if heads == 1:
            assert torch.equal(found.attention[:, 0], found.tokens.norm(dim=2))


def test_sizes_are_the_network_s_own_unless_one_is_set():
    vit = "timm:vit_small_patch14_reg4_dinov2"
    assert sized(GlobalSettings(), "timm:tf_efficientnet_lite0@a.pth").size == 192
    own = sized(GlobalSettings(resize="area"), vit)
    assert (own.size, own.multiple) == (518, 14)
    # A published run's manifest is what it was: nothing new in it.
    published = sized(GlobalSettings(), "model.safetensors").compared()
    assert published == GlobalSettings(size=512).compared() and published["size"] == 512
    assert "multiple" not in published and "pooling" not in published
    with pytest.raises(NetworkError, match="no images of 512 x 512 pixels, only .*504 or 518"):
        sized(GlobalSettings(size=512), vit)
    assert sized(GlobalSettings(size=512, resize="area"), vit).size == 512


def test_images_of_any_shape_are_described_in_multiples_of_the_patch(monkeypatch):
    torch.manual_seed(0)
    describer = TimmDescriber(build_backbone("vit_small_patch14_reg4_dinov2", **VIT))
    images = [np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)] * 2
    seen, forward = [], describer.backbone.forward

    def record(images):
        seen.append(tuple(images.shape[2:]))
        return forward(images)

    monkeypatch.setattr(describer.backbone, "forward", record)
    for resize in ("area", "longest", "squash"):
        rows = extract_global(describer, images, size=140, resize=resize, scales=(0.5, 1.0))
        assert rows.shape == (2, 48)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)
    # 140 squared in area: 108 x 181 -> 98 x 168; longest: 140 wide, 84 tall; halves rounded.
    assert seen == [(56, 84), (98, 168), (42, 70), (84, 140), (70, 70), (140, 140)]


def test_vitgal_is_a_describer_and_its_default_is_the_published_size():
    model = build_model("xcit_nano_12_p16_224", seed=0)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    own, published = (extract_global(model, [image], size=size) for size in (None, 512))
    np.testing.assert_array_equal(own, published)
