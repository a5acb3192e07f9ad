"""The ViTGaL head on networks of timm: its parts, its files, what it refuses. Random weights."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitgal.data import images as data_images
from vitgal.models import weights
from vitgal.models.descriptors import extract_global
from vitgal.models.network import build_model, outline
from vitgal.models.timm_networks import efficientnet_names

VIT = "timm:test_vit"  # patch 16, width 64, with a class token
CONV = "timm:test_efficientnet"  # stride 32, width 256
PREFIX = "backbone.trunk.network."


def pictures(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(name, seed=7):
    torch.manual_seed(seed)
    return timm.create_model(name)


@pytest.fixture(scope="module")
def vit():
    return build_model(VIT, code_dim=8, seed=0)


# Arithmetic


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_efficientnet", "test_convnext2"])
def test_the_head_sees_the_tokens_of_timm(name):
    model = build_model(f"timm:{name}", seed=0)
    trunk = model.backbone.trunk.network
    seen = []
    model.local_atrous.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data_images.MEAN, data_images.STD))
    config = timm.data.resolve_model_data_config(trunk)
    its_mean, its_std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        result = model.global_features((pixels - mean) / std)
        found = trunk.forward_features((pixels - its_mean) / its_std)
    if found.ndim == 4:  # a map
        grid, found = tuple(found.shape[2:]), found.flatten(2).transpose(1, 2)
    else:
        grid = (4, 6)
    centred = found - found.mean(2, keepdim=True)
    found = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    ((given, mixed),) = seen
    assert given[1] == grid
    count = grid[0] * grid[1]
    torch.testing.assert_close(given[0], found[:, -count:], atol=2e-3, rtol=0)
    # The class token, timm's or a learnt one, attends twice.
    token = found[:, :1] if name == "test_vit" else model.backbone.cls_token.expand(2, -1, -1)
    (block,) = model.backbone.cls_attn_blocks
    with torch.no_grad():
        expected = model.backbone.norm(block(block(torch.cat([token, mixed], 1)))[:, 0])
    torch.testing.assert_close(result, expected, atol=2e-3, rtol=0)


def test_a_class_token_is_learnt_where_there_is_none(vit):
    assert not hasattr(vit.backbone, "cls_token")
    conv = build_model(CONV, seed=0)
    assert conv.backbone.cls_token.shape == (1, 1, 256)
    assert "backbone.cls_token" in conv.no_weight_decay()
    assert f"{PREFIX}pos_embed" in vit.no_weight_decay()


def test_a_side_between_two_patches_is_padded_with_zeros(vit):
    images = pictures(1, 3, 40, 64)
    padded = torch.zeros(1, 3, 48, 64)
    padded[:, :, :40] = images
    with torch.inference_mode():
        found = vit.token_features(images)
        assert found.grid == (3, 4)
        assert torch.equal(found.tokens, vit.token_features(padded).tokens)


@pytest.mark.parametrize("size", [(64, 96), (96, 32)])
def test_codes_and_tokens_agree(vit, size):
    with torch.inference_mode():
        found, short = (
            vit.token_features(pictures(2, 3, *size)),
            vit.token_codes(pictures(2, 3, *size)),
        )
    assert found.grid == short.grid == (size[0] // 16, size[1] // 16)
    assert torch.equal(found.codes, short.codes) and torch.equal(found.attention, short.attention)
    assert found.tokens.shape == (2, 24 if size[0] == 64 else 12, 64)
    assert found.codes.shape[-1] == 8


@pytest.mark.parametrize(
    ("architecture", "width", "heads"),
    # The divisor of the width that makes heads nearest to 48 in ratio: 64 rather than 32.
    [(VIT, None, 1), (CONV, None, 4), (CONV, 384, 8), (CONV, 768, 16), (CONV, 97, 1)],
)
def test_widths_heads_and_branches(architecture, width, heads):
    model = build_model(architecture, seed=0, embed_dim=width)
    width = width or {VIT: 64, CONV: 256}[architecture]
    assert (model.embed_dim, model.num_heads) == (width, heads)
    # five dilated branches of width // 6, the pooled one takes the rest
    convs = [*model.local_atrous.dilated_convs, model.local_atrous.gap_branch[1]]
    each = width // 6
    assert [conv.out_channels for conv in convs] == [each] * 5 + [width - 5 * each]
    with torch.inference_mode():
        assert model.global_features(pictures(1, 3, 64, 64)).shape == (1, width)


def test_a_new_width_keeps_angles():
    rows = build_model(CONV, seed=0, embed_dim=96).backbone.projection.weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(96), atol=1e-5, rtol=0)


def test_what_a_model_says_of_itself(vit):
    eva = outline("timm:eva02_tiny_patch14_224")
    models = (vit, build_model(CONV, seed=0), build_model("xcit_nano_12_p16_224", seed=0), eva)
    assert [model.patch for model in models] == [16, 32, 16, 14]
    assert [model.multiple for model in models] == [16, 32, 16, 14]
    images = [np.full((50, 80, 3), value, np.uint8) for value in (10, 200)]
    assert extract_global(vit, images, size=64).shape == (2, 64)


@pytest.mark.parametrize("architecture", [VIT, CONV])
def test_the_mean_of_the_tokens_as_class_token(architecture, tmp_path):
    model = build_model(architecture, code_dim=8, seed=3, embed_dim=48, class_token="gem")
    images = pictures(3, 3, 64, 96)
    with torch.no_grad():
        found = model.backbone.trunk(images * model.backbone.factor + model.backbone.offset)
        powers = (found.tokens.sign() * found.tokens.abs() ** 3).mean(1)
        pooled = powers.sign() * powers.abs() ** (1 / 3) @ model.backbone.projection.weight.T
        result = model.global_features(images)
        # before training the descriptor is the mapped mean, of length sqrt(D)
        expected = 48**0.5 * pooled / pooled.norm(dim=1, keepdim=True)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        # and then class attention adds to it, by a factor of each dimension
        model.backbone.gate.data = torch.linspace(-1, 1, 48)
        joined, _ = model._joined(images)
        (block,) = model.backbone.cls_attn_blocks
        added = model.backbone.gate * model.backbone.norm(block(block(joined))[:, 0])
        changed = model.global_features(images)
        torch.testing.assert_close(changed, expected + added, rtol=1e-4, atol=1e-4)
        path = weights.save_model(model, tmp_path / "model.safetensors")
        again = weights.load_model(path)
        assert torch.equal(again.global_features(images), changed)
        assert torch.equal(again.token_codes(images).codes, model.token_features(images).codes)
    assert again.class_token == weights.read_configuration(path)["class_token"] == "gem"
    assert "backbone.cls_token" not in model.state_dict()
    model.global_features(images).sum().backward()
    assert model.backbone.gate.grad.abs().sum() > 0


# Files


@pytest.mark.parametrize("architecture", [VIT, CONV, "timm:eva02_tiny_patch14_224"])
def test_a_written_model_is_read_again(architecture, tmp_path):
    # EVA-02 computes its rotary positions when it is built: they are in no file.
    model = build_model(architecture, code_dim=8, seed=3, embed_dim=48, num_heads=4)
    path = weights.save_model(model, tmp_path / "model.safetensors")
    again = weights.load_model(path)
    side = 4 * model.patch
    with torch.inference_mode():
        assert torch.equal(
            model.global_features(pictures(1, 3, side, side)),
            again.global_features(pictures(1, 3, side, side)),
        )
    assert (again.embed_dim, again.num_heads, again.code_dim) == (48, 4, 8)
    configuration = weights.read_configuration(path)
    assert (configuration["embed_dim"], configuration["num_heads"]) == (48, 4)
    shape = weights.load_outline(path)
    assert next(shape.parameters()).is_meta and shape.embed_dim == 48
    converted = weights.convert(path, tmp_path / "half.safetensors", dtype="float16")
    assert weights.load_model(converted).architecture == architecture


def test_the_published_networks_are_written_as_before(tmp_path):
    path = weights.save_model(
        build_model("xcit_nano_12_p16_224", seed=0), tmp_path / "m.safetensors"
    )
    assert set(weights.read_configuration(path)) == {
        *("format", "architecture", "code_dim", "dilations", "metadata")
    }


def rewritten(path, **changes):
    """A copy of a file of ours with another configuration."""
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    configuration = json.loads(metadata["vitgal"]) | changes
    other = path.with_name("other.safetensors")
    save_file(load_file(path), other, {"vitgal": json.dumps(configuration)})
    return other


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"architecture": "timm:vit_of_mine"},
            "cannot be built: timm has no network 'vit_of_mine'",
        ),
        ({"architecture": "timm:hf-hub:someone/net"}, "cannot be built"),
        ({"architecture": "timm:test_vit3"}, "does not fit timm:test_vit3"),
        ({"embed_dim": 10**12}, "cannot be built|does not fit"),
        ({"num_heads": 7}, "7 heads do not divide a width of 64"),
        ({"num_heads": "many"}, "cannot be built"),
    ],
)
def test_a_file_that_asks_for_another_network_is_refused(changes, complaint, vit, tmp_path):
    path = weights.save_model(vit, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=complaint) as caught:
        weights.load_model(rewritten(path, **changes))
    assert "other.safetensors" in str(caught.value)


# Initial weights


def test_initial_weights_fill_the_network_and_nothing_else(tmp_path):
    reference = trained("test_vit").state_dict()
    save_file(reference, tmp_path / "vit.safetensors")
    for source in (tmp_path / "vit.safetensors", f"{VIT}@{tmp_path / 'vit.safetensors'}"):
        model = build_model(VIT, code_dim=8, seed=0)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        weights.initial_weights(model, source)
        for key, value in model.state_dict().items():
            inside = key.startswith(PREFIX)
            assert torch.equal(
                value, reference[key.removeprefix(PREFIX)] if inside else before[key]
            )
    model = build_model(VIT, seed=0)
    weights.initial_weights(model, reference)  # a state dict
    assert torch.equal(model.state_dict()[f"{PREFIX}cls_token"], reference["cls_token"])


def test_the_names_of_efficientnet_pytorch_are_known(tmp_path):
    own = trained("tf_efficientnet_lite0")
    names = efficientnet_names(own)
    tensors = {}
    for key, value in own.state_dict().items():
        layer, _, part = key.rpartition(".")
        tensors[f"{names[layer]}.{part}"] = value
    torch.save(tensors, tmp_path / "lite.pth")
    model = build_model("timm:tf_efficientnet_lite0", seed=0, embed_dim=96)
    weights.initial_weights(model, tmp_path / "lite.pth")
    found = model.state_dict()[f"{PREFIX}conv_stem.weight"]
    assert torch.equal(found, own.state_dict()["conv_stem.weight"])


def test_a_model_of_ours_fills_the_head_too(vit, tmp_path):
    path = weights.save_model(vit, tmp_path / "model.safetensors")
    model = build_model(VIT, seed=9)
    weights.initial_weights(model, path)
    assert all(
        torch.equal(value, vit.state_dict()[key]) for key, value in model.state_dict().items()
    )


def test_xcit_takes_timms_weights_by_its_name(tmp_path):
    reference = trained("xcit_nano_12_p16_224").state_dict()
    save_file(reference, tmp_path / "xcit.safetensors")
    model = build_model("xcit_nano_12_p16_224", seed=0)
    weights.initial_weights(model, f"timm:xcit_nano_12_p16_224@{tmp_path / 'xcit.safetensors'}")
    key = "blocks.3.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[f"backbone.{key}"], reference[key])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("blocks.0.norm1.weight"), r"missing: blocks\.0\.norm1\.weight"),
        (lambda t: t.update(odd=torch.ones(1)), "unexpected: odd"),
        (lambda t: t.update(cls_token=torch.ones(1, 1, 8)), r"misshapen: cls_token \(\(1, 1, 8\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, complaint, tmp_path):
    tensors = trained("test_vit").state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "net.safetensors")
    model = build_model(VIT, seed=0)
    before = model.state_dict()[f"{PREFIX}cls_token"].clone()
    with pytest.raises(ValueError, match=complaint):
        weights.initial_weights(model, tmp_path / "net.safetensors")
    assert torch.equal(model.state_dict()[f"{PREFIX}cls_token"], before)


def test_weights_of_another_network_are_refused(vit, tmp_path):
    model = build_model(VIT, seed=0)
    with pytest.raises(
        ValueError, match="weights of test_vit2 and the architecture is timm:test_vit"
    ):
        weights.initial_weights(model, "timm:test_vit2@net.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        weights.initial_weights(model, tmp_path / "none.safetensors")
    path = weights.save_model(vit, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit timm:test_vit3"):
        weights.initial_weights(build_model("timm:test_vit3", seed=0), path)


# Refusals


def test_networks_and_sizes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="no network 'test_vot'.*nearest are test_vit"):
        build_model("timm:test_vot")
    with pytest.raises(ValueError, match="unknown architecture 'test_vit'.*timm:NAME for any"):
        build_model("test_vit")
    with pytest.raises(ValueError, match="xcit_nano_12_p16_224 has a fixed width"):
        build_model("xcit_nano_12_p16_224", embed_dim=64)
    eva = outline("timm:eva02_tiny_patch14_224")
    with pytest.raises(ValueError, match="multiples of its patch of 14"):
        eva.check_size(112, 100)
    eva.check_size(112, 98)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        build_model(VIT, seed=0).global_features(torch.zeros(3, 64, 64))


# Freezing


def test_a_frozen_trunk_keeps_its_tensors_and_statistics():
    model = build_model(CONV, seed=0).freeze_trunk().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.global_features(pictures(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed and not any(key.startswith(PREFIX) for key in changed)
    assert {"backbone.cls_token", "local_atrous.norm.running_mean"} <= changed
    xcit = build_model("xcit_nano_12_p16_224", seed=0).freeze_trunk()
    frozen = {key.split(".")[1] for key, p in xcit.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed", "pos_embed", "blocks"}
