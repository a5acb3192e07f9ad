"""The network against independent arithmetic: numpy in float64, written from the paper's facts."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from vitgal.models import network as models_network
from vitgal.models.heads import ArcFace, LinearClassifier
from vitgal.models.network import MultiAtrous, build_model

NANO = "xcit_nano_12_p16_224"
# float32 sums of up to 512 terms against float64: about 1e-6, with room for deep networks.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def nano():
    return build_model(NANO, code_dim=48, seed=0)


def pictures(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Arithmetic to compare with


def arrays(module):
    return {key: value.detach().double().numpy() for key, value in module.named_parameters()} | {
        key: value.double().numpy() for key, value in module.named_buffers()
    }


def layer_norm(x, weights, name, eps):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def mlp(x, weights, name):
    return linear(gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def class_attention(block, x):
    """One image's (1 + N, D) through a class-attention block: new tokens, attention (heads, N)."""
    weights, heads = arrays(block), block.attn.num_heads
    normed = layer_norm(x, weights, "norm1", 1e-6)
    query, key, value = (linear(normed, weights, f"attn.{name}") for name in "qkv")
    width = x.shape[1] // heads
    attention, mixed = np.empty((heads, len(x))), np.empty(x.shape[1])
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        score = np.exp(key[:, part] @ query[0, part] / np.sqrt(width))
        attention[head] = score / score.sum()
        mixed[part] = attention[head] @ value[:, part]
    attended = np.vstack([linear(mixed, weights, "attn.proj"), normed[1:]])
    tokens = layer_norm(x + weights["gamma1"] * attended, weights, "norm2", 1e-6)
    token = tokens[:1] + weights["gamma2"] * mlp(tokens[:1], weights, "mlp")
    return np.vstack([token, tokens[1:] + tokens[1:]]), attention[:, 1:]


def convolve(image, weight, bias, *, dilation, groups=1):
    """(D, h, w) through a 3 x 3 convolution with zero padding, one output value at a time."""
    height, width = image.shape[1:]
    out = np.zeros((len(weight), height, width))
    for channel, (kernel, offset) in enumerate(zip(weight, bias, strict=True)):
        inputs = image if groups == 1 else image[channel : channel + 1]
        for y, x, i, j in np.ndindex(height, width, 3, 3):
            row, column = y + (i - 1) * dilation, x + (j - 1) * dilation
            if 0 <= row < height and 0 <= column < width:
                out[channel, y, x] += inputs[:, row, column] @ kernel[:, i, j]
        out[channel] += offset
    return out


def multi_atrous(block, tokens, grid, dilations):
    weights = arrays(block)
    image = tokens.T.reshape(-1, *grid)
    branches = [
        convolve(
            image,
            weights[f"dilated_convs.{i}.weight"],
            weights[f"dilated_convs.{i}.bias"],
            dilation=rate,
        )
        for i, rate in enumerate(dilations)
    ]
    pooled = weights["gap_branch.1.weight"][:, :, 0, 0] @ image.mean((1, 2))
    pooled = gelu(pooled + weights["gap_branch.1.bias"])
    branches.append(np.broadcast_to(pooled[:, None, None], (len(pooled), *grid)))
    mixed = gelu(np.concatenate(branches)) - weights["norm.running_mean"][:, None, None]
    mixed *= (weights["norm.weight"] / np.sqrt(weights["norm.running_var"] + 1e-5))[:, None, None]
    mixed += weights["norm.bias"][:, None, None]
    mixed = convolve(
        mixed, weights["depthwise.weight"], weights["depthwise.bias"], dilation=1, groups=len(mixed)
    )
    tokens = tokens + weights["gamma"] * mixed.reshape(len(mixed), -1).T
    return tokens + weights["gamma2"] * mlp(
        layer_norm(tokens, weights, "norm2", 1e-5), weights, "mlp"
    )


def scramble(module, seed=0):
    """Every parameter and statistic away from its neutral value, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.add_(0.3 * (noise if key.endswith("running_var") else noise - 0.5))
    return module.eval()


# The published behaviours


def test_class_attention_is_the_published_one():
    block = scramble(models_network._class_attention_block(32, 4))
    joined = pictures(2, 7, 32)
    with torch.no_grad():
        tokens, attention = block(joined), models_network.class_attention(block, joined)
    for i in range(2):
        expected, expected_attention = class_attention(block, joined[i].double().numpy())
        np.testing.assert_allclose(tokens[i], expected, atol=CLOSE)
        np.testing.assert_allclose(attention[i], expected_attention, atol=CLOSE)
    # The class token's own share is missing and not made up for.
    assert (attention.sum(-1) < 0.999).all()


def test_backbone_runs_its_class_attention_twice_and_the_autoencoder_once():
    network = scramble(build_model(NANO, code_dim=48, seed=0))
    images = pictures(1, 3, 32, 48)
    with torch.no_grad():
        joined, grid = network._joined(images)
        result, feature = network.token_features(images), network.global_features(images)
    backbone, coder = network.backbone, network.autoencoder
    once, _ = class_attention(backbone.cls_attn_blocks[0], joined[0].double().numpy())
    twice, attention = class_attention(backbone.cls_attn_blocks[0], once)
    last = layer_norm(twice, arrays(backbone), "norm", 1e-6)
    assert result.grid == grid == (2, 3)
    np.testing.assert_allclose(feature[0], last[0], atol=CLOSE)
    np.testing.assert_allclose(result.tokens[0], last[1:], atol=CLOSE)
    np.testing.assert_allclose(result.backbone_attention[0], attention, atol=CLOSE)

    codes = linear(last[1:], arrays(coder), "encoder")
    decoded = linear(codes, arrays(coder), "decoder")
    own = np.vstack([arrays(coder)["cls_token"][0], decoded])
    _, attention = class_attention(coder.cls_attn_blocks[0], own)
    np.testing.assert_allclose(result.codes[0], codes, atol=CLOSE)
    np.testing.assert_allclose(result.decoded[0], decoded, atol=CLOSE)
    np.testing.assert_allclose(result.attention[0], attention, atol=CLOSE)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 32, 48), (3, 3, 80, 64), (2, 3, 16, 16), (0, 3, 32, 32)])
def test_token_codes_are_the_same_bits(shape, bf16):
    """The short way to codes and attention leaves out nothing that they depend on."""
    network = scramble(build_model(NANO, code_dim=48, seed=0))
    images = pictures(*shape)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        wanted, result = network.token_features(images), network.token_codes(images)
    assert result.grid == wanted.grid
    for part in ("codes", "attention"):
        value = getattr(result, part)
        assert value.dtype == torch.float32
        assert torch.equal(value, getattr(wanted, part)), part


def test_token_codes_are_for_whole_models_in_eval_mode():
    network = build_model(NANO, seed=0)
    with pytest.raises(ValueError, match="no autoencoder"):
        network.token_codes(pictures(1, 3, 32, 32))
    network.attach_autoencoder(8).train()
    with pytest.raises(ValueError, match="eval"):
        network.token_codes(pictures(1, 3, 32, 32))
    with pytest.raises(ValueError, match="B, 3, H, W"):
        network.eval().token_codes(pictures(3, 32, 32))


def test_autoencoder_class_feature_is_its_own_normed_class_token():
    network = scramble(build_model(NANO, code_dim=48, seed=0))
    with torch.no_grad():
        feature, decoded, tokens = network.reconstruct(pictures(1, 3, 32, 32))
        again = network.token_features(pictures(1, 3, 32, 32))
    coder = network.autoencoder
    own = np.vstack([arrays(coder)["cls_token"][0], decoded[0].double().numpy()])
    attended, _ = class_attention(coder.cls_attn_blocks[0], own)
    np.testing.assert_allclose(
        feature[0], layer_norm(attended, arrays(coder), "norm", 1e-6)[0], atol=CLOSE
    )
    assert torch.equal(decoded, again.decoded) and torch.equal(tokens, again.tokens)


@pytest.mark.parametrize("grid", [(3, 4), (1, 1)])
def test_multi_atrous_is_the_published_one(grid):
    # Width 13 in six branches: 2 channels each, the pooled one 3.
    block = scramble(MultiAtrous(13, dilations=(1, 2, 3, 6, 12)))
    assert [conv.out_channels for conv in block.dilated_convs] == [2] * 5
    assert block.gap_branch[1].out_channels == 3
    tokens = pictures(2, math.prod(grid), 13)
    with torch.no_grad():
        result = block(tokens, grid)
    for i in range(2):
        expected = multi_atrous(block, tokens[i].double().numpy(), grid, (1, 2, 3, 6, 12))
        np.testing.assert_allclose(result[i], expected, atol=CLOSE)


def test_multi_atrous_comes_before_the_class_attention(nano):
    images = pictures(1, 3, 32, 32)
    seen = []
    hook = nano.local_atrous.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    with torch.no_grad():
        joined, _ = nano._joined(images)
    hook.remove()
    (((_, grid), built),) = seen
    assert grid == (2, 2)
    assert torch.equal(joined[:, 1:], built)
    assert torch.equal(joined[:, :1], nano.backbone.cls_token)


def test_xca_block_runs_patch_interaction_before_its_mlp(nano):
    order, hooks = [], []
    for name in ("norm1", "norm2", "norm3"):
        layer = getattr(nano.backbone.blocks[0], name)
        hooks.append(layer.register_forward_hook(lambda *_, name=name: order.append(name)))
    with torch.no_grad():
        nano(pictures(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    assert order == ["norm1", "norm3", "norm2"]


def test_only_the_multi_atrous_norm_has_the_wider_epsilon(nano):
    result = {name: m.eps for name, m in nano.named_modules() if isinstance(m, nn.LayerNorm)}
    # Three in each of 12 blocks, two in each class attention, two last ones, and this one.
    assert len(result) == 3 * 12 + 2 * 2 + 2 + 1
    assert result.pop("local_atrous.norm2") == 1e-5
    assert set(result.values()) == {1e-6}


def test_no_norm_follows_other_processes_statistics(nano):
    kinds = {type(m) for m in nano.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {nn.BatchNorm2d}


@pytest.mark.parametrize(
    "architecture, width, depth, heads, branches, eta",
    [
        (NANO, 128, 12, 4, [21] * 5 + [23], 1.0),
        ("xcit_small_12_p16_224", 384, 12, 8, [64] * 6, 1.0),
        ("xcit_small_24_p16_224", 384, 24, 8, [64] * 6, 1e-5),
    ],
)
def test_architectures(architecture, width, depth, heads, branches, eta):
    network = build_model(architecture, code_dim=8, seed=0)
    assert (network.architecture, network.embed_dim, network.code_dim) == (architecture, width, 8)
    assert len(network.backbone.blocks) == depth
    assert len(network.backbone.cls_attn_blocks) == 1
    assert network.backbone.cls_attn_blocks[0].tokens_norm
    assert network.backbone.cls_attn_blocks[0].attn.num_heads == heads
    convs = [*network.local_atrous.dilated_convs, network.local_atrous.gap_branch[1]]
    assert [conv.out_channels for conv in convs] == branches
    assert [conv.dilation[0] for conv in convs[:5]] == [1, 3, 6, 9, 12]
    for key, value in network.named_parameters():
        if "gamma" in key:  # the autoencoder starts at 1 whatever the depth, as published
            wanted = 1.0 if key.startswith("autoencoder.") else eta
            assert (value == torch.tensor(wanted)).all(), key


# Building


def test_same_seed_gives_the_same_bytes_and_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    single, two = (build_model(NANO, code_dim=48, seed=0) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert same(state(single), state(two))
    assert not same(state(single), state(build_model(NANO, code_dim=48, seed=1)))
    # The backbone does not depend on whether an autoencoder is built beside it.
    alone = build_model(NANO, seed=0)
    assert same(state(single.backbone), state(alone.backbone))
    assert alone.code_dim is None and not single.training


def test_initial_weights_are_xcits(nano):
    layer = nano.local_atrous.mlp.fc1
    # 0.02 wide and cut at two units of any layer's own: 65,536 draws put the deviation at 0.0200
    # to within 0.0002; torch's default for this layer would be 0.051.
    assert layer.weight.std().item() == pytest.approx(0.02, abs=0.0005)
    assert not layer.bias.any() and not nano.autoencoder.encoder.bias.any()
    assert nano.autoencoder.cls_token.std().item() == pytest.approx(0.02, abs=0.006)  # 128 draws
    assert nano.no_weight_decay() <= set(dict(nano.named_parameters()))


def test_unknown_architecture_names_the_known_ones():
    with pytest.raises(ValueError, match="resnet50.*xcit_nano_12_p16_224.*xcit_small_24_p16_224"):
        build_model("resnet50")


def test_codes_need_a_width():
    with pytest.raises(ValueError, match="code_dim"):
        build_model(NANO, code_dim=0)


# Sizes


@pytest.mark.parametrize(
    "size, grid", [((64, 64), (4, 4)), ((32, 80), (2, 5)), ((33, 16), (3, 1)), ((1, 15), (1, 1))]
)
def test_any_size_is_taken(nano, size, grid):
    with torch.no_grad():
        result = nano.token_features(pictures(2, 3, *size))
    number = grid[0] * grid[1]
    assert result.grid == grid
    assert result.tokens.shape == result.decoded.shape == (2, number, 128)
    assert result.codes.shape == (2, number, 48)
    assert result.attention.shape == result.backbone_attention.shape == (2, 4, number)
    assert nano(pictures(2, 3, *size)).shape == (2, 128)


def test_no_image_gives_no_features(nano):
    with torch.no_grad():
        result = nano.token_features(torch.empty(0, 3, 32, 48))
    assert result.codes.shape == (0, 6, 48) and result.attention.shape == (0, 4, 6)
    assert nano.global_features(torch.empty(0, 3, 32, 48)).shape == (0, 128)


def test_an_image_alone_has_the_features_it_has_in_a_batch(nano):
    images = pictures(3, 3, 48, 32)
    with torch.no_grad():
        together, alone = nano(images), nano(images[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=CLOSE)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_the_image_size_moves_the_position_code(nano):
    # A constant picture has equal patches away from the border; only positions tell them apart.
    with torch.no_grad():
        tokens, grid = nano.backbone.patch_embed(torch.ones(1, 3, 128, 128))
        inner = tokens.unflatten(1, grid)[0, 3:5, 3:5].reshape(4, -1)
        result = nano.token_features(torch.ones(1, 3, 128, 128)).tokens
    assert torch.allclose(inner, inner[:1].expand_as(inner), atol=1e-6)
    assert (
        result.unflatten(1, grid)[0, 3, 3] - result.unflatten(1, grid)[0, 4, 4]
    ).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_wrong_shape_is_named(nano, shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \("):
        nano.global_features(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \("):
        nano.token_features(torch.zeros(shape))


def test_without_autoencoder_the_backbones_attention_is_used():
    network = build_model(NANO, seed=0)
    with torch.no_grad():
        result = network.token_features(pictures(1, 3, 32, 32))
    assert result.codes is None and result.decoded is None
    assert torch.equal(result.attention, result.backbone_attention)
    with pytest.raises(ValueError, match="attach_autoencoder"):
        network.reconstruct(pictures(1, 3, 32, 32))


# Training


def test_attaching_an_autoencoder_keeps_every_bit_of_the_backbone():
    network = scramble(build_model(NANO, seed=0))
    before, image = state(network), pictures(1, 3, 32, 32)
    feature = network(image)
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    network.attach_autoencoder(16, seed=3)
    assert torch.equal(generator, torch.get_rng_state())
    assert same(before, {k: v for k, v in state(network).items() if k in before})
    assert torch.equal(feature, network(image)) and network.code_dim == 16
    first = state(network.autoencoder)
    assert same(first, state(network.attach_autoencoder(16, seed=3).autoencoder))


def test_training_the_autoencoder_leaves_the_backbone_bit_identical():
    network = build_model(NANO, code_dim=48, seed=0).freeze_backbone().train()
    classifier = LinearClassifier(128, 5)
    before, images = state(network), pictures(4, 3, 48, 48)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == len(list(network.autoencoder.parameters()))
    optimizer = torch.optim.AdamW([*trained, *classifier.parameters()], lr=1e-3)
    losses = []
    for _ in range(3):
        feature, decoded, tokens = network.reconstruct(images)
        loss = nn.functional.cross_entropy(classifier(feature), torch.arange(4))
        loss = loss + 10 * nn.functional.mse_loss(decoded, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = state(network)
    for key in before:
        assert torch.equal(before[key], after[key]) != key.startswith("autoencoder."), key
    assert losses[2] < losses[0]


def test_training_mode_stops_at_a_frozen_backbone():
    network = build_model(NANO, code_dim=48, seed=0).train()
    assert network.backbone.training and network.local_atrous.training
    network.freeze_backbone()
    assert network.training and network.autoencoder.training
    assert not any(
        m.training for m in [*network.backbone.modules(), *network.local_atrous.modules()]
    )
    network.eval().train()
    assert network.autoencoder.norm.training
    assert not network.backbone.blocks[0].local_mp.bn.training
    assert not network.eval().autoencoder.training


def test_autoencoder_training_refuses_a_backbone_that_would_drift():
    network = build_model(NANO, code_dim=48, seed=0).train()
    with pytest.raises(ValueError, match="freeze_backbone"):
        network.reconstruct(pictures(2, 3, 32, 32))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_parameter_learns(bfloat16):
    network, head = build_model(NANO, seed=0, drop_path=0.1).train(), ArcFace(128, 4)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = head(network(pictures(4, 3, 48, 32)), torch.arange(4))
        loss = nn.functional.cross_entropy(logits, torch.arange(4))
    loss.backward()
    assert logits.dtype == torch.float32 and loss.isfinite()
    for key, value in [*network.named_parameters(), *head.named_parameters()]:
        assert value.grad is not None and value.grad.isfinite().all(), key
        assert value.grad.any(), key


def test_bfloat16_autocast_changes_little_and_returns_float32(nano):
    images = pictures(2, 3, 64, 64)
    with torch.no_grad():
        exact, exact_feature = nano.token_features(images), nano(images)
        with torch.autocast("cpu", torch.bfloat16):
            result, feature = nano.token_features(images), nano(images)
            reconstruction = nano.reconstruct(images)
    for part in ("tokens", "codes", "decoded", "attention", "backbone_attention"):
        value, wanted = getattr(result, part), getattr(exact, part)
        assert value.dtype == torch.float32
        # bfloat16 has 8 bits: 0.4 % a rounding, some ten times that after twelve blocks.
        assert (value - wanted).norm() < 0.1 * wanted.norm(), part
    assert feature.dtype == torch.float32
    assert (feature - exact_feature).norm() < 0.1 * exact_feature.norm()
    assert {part.dtype for part in reconstruction} == {torch.float32}


# Classifiers


def at_angle(*degrees):
    """Features (len, 2) at these angles from the first class's direction, of various lengths."""
    angle = torch.tensor(degrees).deg2rad()
    return (
        torch.stack([angle.cos(), angle.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]
    )


@pytest.fixture
def arcface():
    head = ArcFace(2, 2, margin=0.15, scale=30.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))  # 0 and 90 degrees
    return head


def test_arcface_without_labels_is_the_scaled_cosine(arcface):
    # cos 60 = 0.5, cos 30 = 0.8660; times 30, whatever the lengths.
    result = arcface(at_angle(60.0, 0.0, 180.0))
    expected = [[15.0, 25.98076], [30.0, 0.0], [-30.0, 0.0]]
    np.testing.assert_allclose(result.detach(), expected, atol=1e-4)


def test_arcface_widens_the_angle_of_the_true_class_alone(arcface):
    # cos 0.15 = 0.988771, sin 0.15 = 0.149438. 60 degrees: 0.5 * 0.988771 - 0.866025 * 0.149438 =
    # 0.364968; 90 degrees: -0.149438. From the second class 60 degrees is 30: 0.866025 * 0.988771 -
    # 0.5 * 0.149438 = 0.781582.
    result = arcface(at_angle(60.0, 90.0, 60.0), torch.tensor([0, 0, 1])).detach()
    expected = [[30 * 0.364968, 25.98076], [30 * -0.149438, 30.0], [15.0, 30 * 0.781582]]
    np.testing.assert_allclose(result, expected, atol=1e-4)  # the constants have 6 digits


def test_arcface_keeps_falling_past_the_margins_end(arcface):
    angles = torch.arange(0.0, 180.5, 0.5).tolist()
    result = arcface(at_angle(*angles), torch.zeros(len(angles), dtype=torch.int64))[:, 0]
    assert (result.diff() < 0).all()
    # At 180 degrees the line gives -1 - 0.15 sin 0.15 = -1.022416.
    assert result[-1].item() == pytest.approx(30 * -1.022416, abs=1e-3)


def test_arcface_has_finite_gradients_where_the_cosine_is_one(arcface):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        features = at_angle(0.0, 180.0).to(dtype).requires_grad_()
        arcface.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = arcface(features, torch.zeros(2, dtype=torch.int64))
        nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
        assert logits.dtype == torch.float32
        assert features.grad.isfinite().all() and arcface.weight.grad.isfinite().all()


def test_classifiers_compute_in_float32_under_autocast(arcface):
    features = pictures(5, 2)
    for head in (arcface, LinearClassifier(2, 3)):
        exact = head(features, torch.zeros(5, dtype=torch.int64))
        with torch.autocast("cpu", torch.bfloat16):
            result = head(features, torch.zeros(5, dtype=torch.int64))
            half = head(features.bfloat16())
        assert torch.equal(result, exact)
        assert half.dtype == torch.float32
        assert head(torch.empty(0, 2)).shape == (0, len(head.weight))


def test_arcface_default_margin_is_the_published_codes():
    head = ArcFace(4, 3)
    assert (head.margin, head.scale, head.weight.shape) == (0.15, 30.0, (3, 4))


def test_linear_classifier_starts_as_xcits_and_ignores_labels():
    head = LinearClassifier(400, 100)
    # 40,000 draws: the deviation is 0.02 to within 0.0003; torch's default would be 0.029.
    assert head.weight.std().item() == pytest.approx(0.02, abs=0.0005) and not head.bias.any()
    features = pictures(3, 400)
    expected = features.double() @ head.weight.detach().double().T
    np.testing.assert_allclose(head(features).detach(), expected, atol=CLOSE)
    assert torch.equal(head(features), head(features, torch.tensor([0, 1, 2])))
