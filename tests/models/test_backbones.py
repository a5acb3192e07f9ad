"""Networks of timm as backbones: tokens, grids, class tokens and attention. Weights are random."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.timm_models import build_backbone, open_backbone
from vitgal.features.files import FileError
from vitgal.models.timm_networks import NetworkError, TimmSource, check_name, fingerprint_tensors

VIT = dict(depth=4, embed_dim=48, num_heads=3)
# A network of each family: its options, its patch or stride, whether it has a class token.
FAMILIES = {
    "vit_small_patch14_reg4_dinov2": (VIT, 14, True),
    "vit_small_patch16_dinov3": (VIT, 16, True),
    "eva02_tiny_patch14_224": (dict(depth=4), 14, True),
    "beit_base_patch16_224": (VIT, 16, True),
    "xcit_nano_12_p16_224": (dict(depth=4), 16, True),
    "vit_base_patch16_siglip_224": (VIT, 16, False),
    "swin_tiny_patch4_window7_224": (
        dict(depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 2, 3, 4)),
        32,
        False,
    ),
    "convnext_atto": ({}, 32, False),
    "test_efficientnet": ({}, 32, False),
}


def images(size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_gives_tokens_and_their_grid_for_a_rectangle(name):
    options, stride, has_class = FAMILIES[name]
    torch.manual_seed(0)
    backbone = build_backbone(name, **options)
    size = (4 * 16, 6 * 16) if stride != 14 else (4 * 14, 6 * 14)
    with torch.inference_mode():
        features = backbone(images(size), attention=True)
    rows, columns = size[0] // stride, size[1] // stride
    assert features.grid == (rows, columns)
    assert features.tokens.shape == (2, rows * columns, backbone.embed_dim)
    assert features.tokens.isfinite().all() and features.tokens.std() > 0
    assert backbone.has_class_token is has_class
    if not has_class:
        assert features.class_token is None and features.attention is None
        return
    assert features.class_token.shape == (2, backbone.embed_dim)
    assert features.attention.shape[::2] == (2, rows * columns)
    total = features.attention.sum(-1)
    assert (total < 1).all() and (total > 0.5).all()  # the rest is for the prefix tokens


def test_tokens_are_where_the_image_is():
    """A changed corner changes the token of that corner most, in every layout of the map."""
    for name in ("swin_tiny_patch4_window7_224", "test_efficientnet", "vit_small_patch16_dinov3"):
        options, _, _ = FAMILIES[name]
        torch.manual_seed(0)
        backbone = build_backbone(name, **options)
        before = images((64, 96))
        after = before.clone()
        after[:, :, -16:, :16] += 3
        for block in (None, backbone.local_block()):
            with torch.inference_mode():
                first, second = (backbone(part, block) for part in (before, after))
            change = (first.tokens - second.tokens).norm(dim=-1)[0].reshape(first.grid)
            row, column = divmod(int(change.argmax()), first.grid[1])
            assert row == first.grid[0] - 1 and column <= 1, (name, block)


def test_a_vision_transformer_by_hand():
    torch.manual_seed(1)
    backbone = build_backbone("vit_small_patch14_reg4_dinov2", **VIT, init_values=None)
    vit, pictures = backbone.network, images((42, 70))
    with torch.no_grad():
        features = backbone(pictures, attention=True)
        inner = backbone(pictures, "blocks.2", attention=True)
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pictures))))
        prefix = vit.num_prefix_tokens
        for index, block in enumerate(vit.blocks):
            by_hand = softmax_by_hand(block.attn, block.norm1(tokens))[:, :, 0, prefix:]
            tokens = block(tokens)
            if index == 2:
                expected = vit.norm(tokens)
                torch.testing.assert_close(inner.tokens, expected[:, prefix:], atol=0, rtol=0)
                torch.testing.assert_close(inner.attention, by_hand)
        last = vit.norm(tokens)
    torch.testing.assert_close(features.tokens, last[:, prefix:], atol=0, rtol=0)
    torch.testing.assert_close(features.class_token, last[:, 0], atol=0, rtol=0)
    torch.testing.assert_close(features.attention, by_hand)


def softmax_by_hand(attention, tokens):
    batch, count, width = tokens.shape
    heads = attention.num_heads
    query, key, _ = attention.qkv(tokens).reshape(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return (query @ key.transpose(-2, -1) / (width // heads) ** 0.5).softmax(-1)


def test_what_a_backbone_says_of_itself():
    lite = build_backbone("tf_efficientnet_lite0")
    assert lite.native_size == (224, 224) and lite.mean == lite.std == (0.5, 0.5, 0.5)
    assert (lite.embed_dim, lite.multiple, lite.stride()) == (1280, 16, 32)
    assert lite.local_block() == "blocks.4" and lite.stride("blocks.4") == 16
    assert lite.width("blocks.4") == 112
    vit = build_backbone("vit_small_patch14_reg4_dinov2", **VIT)
    assert vit.native_size == (518, 518) and vit.multiple == 14 and vit.local_block() == "blocks.1"
    with pytest.raises(NetworkError, match=r"no block 'blocks.9'; it has blocks.0, blocks.1"):
        vit.stride("blocks.9")


def test_sizes_that_a_network_cannot_take_are_refused_with_those_that_it_can():
    vit = build_backbone("vit_small_patch14_reg4_dinov2", **VIT)
    with pytest.raises(NetworkError, match=r"512 x 518 pixels, only .* patch of 14: 518 or 532"):
        vit(images((518, 512)))
    mixer = build_backbone("mixer_s32_224")
    with pytest.raises(NetworkError, match=r"192 x 192 pixels, only 224 x 224"):
        mixer(images((192, 192)))


class WithoutFeatures(torch.nn.Linear):
    """A network that an extension of timm adds: it gives scores alone."""

    pretrained_cfg = timm.models._pretrained.PretrainedCfg().to_dict()


def test_networks_without_spatial_features_are_refused():
    @timm.models.register_model
    def network_of_scores(pretrained=False, **_):
        return WithoutFeatures(3, 2)

    with pytest.raises(NetworkError, match="network_of_scores has no spatial features.*take a tr"):
        build_backbone("network_of_scores")


def test_names_that_timm_does_not_have_are_refused_with_the_nearest():
    with pytest.raises(
        NetworkError,
        match="'efficientnet_lite00'; the nearest are efficientnet_l",
    ):
        check_name("efficientnet_lite00")
    with pytest.raises(NetworkError, match=r"'resnet50.mine'; of resnet50 it has .*50.a1_in1k"):
        check_name("resnet50.mine")
    with pytest.raises(NetworkError, match="no weights for botnet50ts_256: name a file"):
        open_backbone("timm:botnet50ts_256")
    check_name("resnet50"), check_name("resnet50.a1_in1k")


def test_sources_are_read_as_written():
    for text in ("timm:resnet18", "timm:resnet18@a/b@c.pth"):
        assert str(TimmSource.parse(text)) == text
    assert str(TimmSource.parse("timm:resnet18@a/b@c.pth").weights) == "a/b@c.pth"
    assert TimmSource.parse("resnet18") is None and TimmSource.parse("/a/timm:b") is None


def test_a_file_fills_every_tensor_or_is_refused(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model("test_resnet").eval()
    state, file = trained.state_dict(), tmp_path / "net.safetensors"
    save_file(state, file)
    backbone = open_backbone(f"timm:test_resnet@{file}")
    pictures = images((64, 64))
    with torch.inference_mode():
        assert torch.equal(
            backbone.pooled(pictures),
            trained.forward_head(trained.forward_features(pictures), pre_logits=True),
        )
    assert fingerprint_tensors(backbone.network) != fingerprint_tensors(
        build_backbone("test_resnet").network
    )
    torch.save(state, tmp_path / "net.pth")
    again = open_backbone(f"timm:test_resnet@{tmp_path / 'net.pth'}")
    assert fingerprint_tensors(again.network) == fingerprint_tensors(backbone.network)
    wrong = dict(state)
    wrong["conv1.0.weight"] = wrong["conv1.0.weight"][:2].clone()
    del wrong["bn1.weight"]
    save_file(wrong | {"further": torch.zeros(1)}, file)
    with pytest.raises(
        FileError,
        match=r"test_resnet; missing: bn1.weight; unexpected: further; "
        r"misshapen: conv1.0.weight \(\(2, ",
    ):
        open_backbone(f"timm:test_resnet@{file}")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        open_backbone(f"timm:test_resnet@{tmp_path / 'gone.pth'}")
    code = tmp_path / "net.py"
    code.write_text("print('run')")
    with pytest.raises(FileError, match="net.py is no readable checkpoint"):
        open_backbone(f"timm:test_resnet@{code}")
