"""Weight files: the three layouts, strictness, and files that are broken or mean harm."""

import argparse
import fractions
import json
import pickle
import re
import resource
import struct
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests import layouts
from vitgal.models.checkpoint_files import read_checkpoint, read_safetensors, rounded
from vitgal.models.network import build_model
from vitgal.models.weights import (
    convert,
    initial_weights,
    load_model,
    read_configuration,
    save_model,
)

NANO = "xcit_nano_12_p16_224"
PARITY = Path(__file__).parents[1] / "parity"


@pytest.fixture(scope="module")
def nano():
    """A network whose every tensor has its own values."""
    network = build_model(NANO, code_dim=48, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator) / 10)
    return network


@pytest.fixture(scope="module")
def published(nano):
    """`nano` as the published code would have saved it: a dict of names and tensors."""
    return layouts.published(nano.state_dict())


@pytest.fixture(scope="module")
def fresh():
    """Two equal networks, which stay equal."""
    return build_model(NANO, seed=0), build_model(NANO, seed=0)


@pytest.fixture(scope="module")
def imagenet():
    """timm's nano as it comes: with a classifier and two class-attention blocks."""
    torch.manual_seed(3)
    return timm.create_model(NANO).state_dict()


def small_tensors(depth, with_autoencoder):
    """S12 or S24 with the published names and shapes; equal rows, so that the file stays small."""
    prefix = "retrieval_back_bone."
    shapes = json.loads((PARITY / "spec_s12_ae.json").read_text())
    if not with_autoencoder:
        shapes = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}
    for key in [key for key in shapes if ".blocks." in f".{key}"]:
        before, index, after = re.split(r"(?<=blocks\.)(\d+)", key)
        if depth == 24:  # blocks 12 to 23 have the shapes of 0 to 11
            shapes[f"{before}{int(index) + 12}{after}"] = shapes[key]
    generator = torch.Generator().manual_seed(0)
    return {
        key: (0.5 + torch.rand(shape[-1:], generator=generator)).expand(shape)
        if not key.endswith("num_batches_tracked")
        else torch.tensor(1000)
        for key, shape in shapes.items()
    }


def checkpoint(path, tensors):
    args = argparse.Namespace(model="xcit", batch_size=64)
    torch.save({"model": tensors, "optimizer": {}, "epoch": 29, "args": args}, path)
    return path


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Published checkpoints


@pytest.mark.slow
# S12 with autoencoder is loaded in test_parity.py.
@pytest.mark.parametrize("depth, with_autoencoder", [(12, False), (24, False), (24, True)])
def test_published_checkpoints_are_distinguished_by_depth(tmp_path, depth, with_autoencoder):
    tensors = small_tensors(depth, with_autoencoder)
    path = checkpoint(tmp_path / "x.pth", tensors | {"head.weight": torch.zeros(9, 384)})
    torch.manual_seed(7)
    before = torch.get_rng_state()
    network = load_model(path)
    assert torch.equal(before, torch.get_rng_state())
    assert network.architecture == f"xcit_small_{depth}_p16_224" and not network.training
    assert network.embed_dim == 384 and network.code_dim == (128 if with_autoencoder else None)
    assert len(network.backbone.blocks) == depth
    # Every number of the file but the classifier's is in the network, and none beside.
    loaded = network.state_dict()
    assert sum(v.numel() for v in loaded.values()) == sum(v.numel() for v in tensors.values())
    key = f"blocks.{depth - 1}.mlp.fc2.weight"
    reference = f"retrieval_back_bone.{key}" if with_autoencoder else key
    assert torch.equal(loaded[f"backbone.{key}"], tensors[reference])
    with torch.inference_mode():
        result = network.token_features(torch.ones(1, 3, 32, 48))
        feature = network.global_features(torch.ones(1, 3, 32, 48))
    assert result.tokens.shape == (1, 6, 384) and feature.shape == (1, 384)
    assert result.attention.shape == (1, 8, 6)
    assert result.tokens.isfinite().all() and feature.isfinite().all() and feature.std() > 0.1


def test_a_checkpoint_of_any_known_width_loads(published, nano, tmp_path):
    path = checkpoint(tmp_path / "nano.pth", published | {"head.bias": torch.zeros(3)})
    assert same(load_model(path), nano)
    torch.save(published, tmp_path / "bare.pth")
    assert same(load_model(tmp_path / "bare.pth"), nano)


@pytest.mark.parametrize(
    "key",
    [
        "cls_token",
        "whitening_layer.weight",
        "whitening_layer.bias",
        "ae_decoder_layer.weight",
        "cls_attn_blocks.0.attn.qkv.bias",
        "retrieval_back_bone.cls_token",
        "retrieval_back_bone.blocks.11.norm3.weight",
        "retrieval_back_bone.blocks.3.local_mp.bn.num_batches_tracked",
        "retrieval_back_bone.pos_embeder.token_projection.weight",
        "retrieval_back_bone.local_atrous.norm2.weight",
        "retrieval_back_bone.cls_attn_blocks.0.attn.qkv.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(published, tmp_path, key):
    path = tmp_path / "bad.pth"
    checkpoint(path, {name: value for name, value in published.items() if name != key})
    with pytest.raises(ValueError, match=rf"bad\.pth.*{re.escape(key)}"):
        load_model(path)
    checkpoint(path, published | {key: torch.zeros(5, 3)})
    with pytest.raises(ValueError, match=rf"bad\.pth.*{re.escape(key)}.*5"):
        load_model(path)


@pytest.mark.parametrize(
    "key", ["foo.weight", "retrieval_back_bone.head.weight", "cls_attn_blocks.1.gamma1"]
)
def test_an_unexpected_tensor_is_named(published, tmp_path, key):
    path = checkpoint(tmp_path / "bad.pth", published | {key: torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"bad\.pth.*unexpected: {re.escape(key)}"):
        load_model(path)


def test_a_tensor_of_another_kind_is_named(published, tmp_path):
    key = "retrieval_back_bone.norm.weight"
    path = checkpoint(tmp_path / "bad.pth", published | {key: published[key].to(torch.int8)})
    with pytest.raises(
        ValueError, match=rf"{re.escape(key)} \(torch.int8 instead of torch.float32"
    ):
        load_model(path)


def test_another_architecture_is_named(published, imagenet, tmp_path):
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.weight": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"bad\.pth.*no ViTGaL weights.*conv1\.weight"):
        load_model(checkpoint(tmp_path / "bad.pth", resnet))
    wide = published | {"retrieval_back_bone.cls_token": torch.zeros(1, 1, 192)}
    with pytest.raises(ValueError, match=r"bad\.pth.*another architecture.*192.*xcit_small_12"):
        load_model(checkpoint(tmp_path / "bad.pth", wide))
    with pytest.raises(ValueError, match=r"bad\.pth has no local_atrous.*initial_weights"):
        load_model(checkpoint(tmp_path / "bad.pth", imagenet))
    thirteen = published | {"retrieval_back_bone.blocks.12.gamma1": torch.zeros(128)}
    with pytest.raises(ValueError, match=r"bad\.pth.*another architecture.*number 13"):
        load_model(checkpoint(tmp_path / "bad.pth", thirteen))


# Files that are no checkpoint


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("read", [load_model, read_checkpoint])
def test_a_malicious_pickle_is_refused(published, tmp_path, zipped, read):
    marker, path = tmp_path / "harmed", tmp_path / "evil.pth"
    content = {"model": published, "args": Harm(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth was refused.*(io|_io|builtins)\.open"):
        read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the harm is real: without the refusal it happens
    assert marker.exists()


def test_a_malicious_plain_pickle_is_refused(tmp_path):
    marker, path = tmp_path / "harmed", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": Harm(marker)}, protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load_model(path)
    assert not marker.exists()


def test_arguments_are_allowed_only_while_reading(published, tmp_path):
    path = checkpoint(tmp_path / "x.pth", published)
    assert read_checkpoint(path)["args"].batch_size == 64
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_off_file_is_named(published, nano, tmp_path, name, share):
    path = tmp_path / name
    save_model(nano, path) if path.suffix == ".safetensors" else checkpoint(path, published)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_model(path)


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_a_file_of_another_kind_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text("<html>Too many downloads of this file</html>\n" * 100)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_model(path)


def test_a_checkpoint_without_weights_is_named(tmp_path):
    for content in ([1, 2], {"model": {"a": 1}}, {"epoch": 3}, {}, {"model": {0: torch.ones(1)}}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=r"odd\.pth holds no"):
            load_model(tmp_path / "odd.pth")


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "folder.pth"])
def test_an_absent_file_is_named(nano, tmp_path, name):
    (tmp_path / "folder.pth").mkdir()
    for call in (load_model, read_checkpoint, lambda path: initial_weights(nano, path)):
        with pytest.raises(FileNotFoundError, match=name):
            call(tmp_path / name)


# Checkpoints of one's own


def averaged(tensors):
    return {"n_averaged": torch.tensor(3)} | {f"module.{key}": v for key, v in tensors.items()}


@pytest.mark.parametrize(
    "ours, wrap, said",
    [
        (True, lambda t: {f"module.{key}": v for key, v in t.items()}, "state dict, its names"),
        (
            False,
            lambda t: {"model": {f"_orig_mod.{k}": v for k, v in t.items()}},
            "read model, its names",
        ),
        (
            True,
            lambda t: {"state_dict": {f"module._orig_mod.{k}": v for k, v in t.items()}},
            "prefixes",
        ),
        (
            False,
            lambda t: {"state_dict": {f"model.{key}": v for key, v in t.items()}, "epoch": 3},
            "names",
        ),
        (True, lambda t: {"state_dict": t, "hyper_parameters": {"lr": 1e-3}}, "read state_dict"),
        (False, lambda t: {"model": {"state_dict": t}}, "read model.state_dict"),
        (
            True,
            lambda t: {"model_ema": averaged(t), "optimizer": {"state": {}}},
            "model_ema, its names",
        ),
        (False, lambda t: {"model": {"fc.bias": torch.zeros(3)}, "ema": t}, "read ema\n"),
        (
            True,
            lambda t: {k.replace("norm.", "norm._orig_mod."): v for k, v in t.items()},
            "prefixes",
        ),
        (False, lambda t: t, None),
        (True, lambda t: {"model": t, "model_ema": t}, None),
    ],
)
def test_a_wrapped_checkpoint_is_read_and_reported(
    nano, published, tmp_path, capsys, ours, wrap, said
):
    tensors = nano.state_dict() if ours else published
    path = tmp_path / "own.pth"
    torch.save(wrap(dict(tensors)), path)
    assert same(load_model(path), nano)
    printed = capsys.readouterr().out
    assert (printed == "") == (said is None) and (said or "") in printed
    assert printed.count("\n") == (said is not None)


def test_initial_weights_of_a_wrapped_network(imagenet, tmp_path, capsys):
    network = build_model(NANO, seed=0)
    save_file({f"module.{k}": v for k, v in imagenet.items()}, tmp_path / "own.safetensors")
    initial_weights(network, tmp_path / "own.safetensors")
    assert torch.equal(network.backbone.cls_token, imagenet["cls_token"])
    assert "without prefixes" in capsys.readouterr().out


def test_a_misfit_is_reported_by_the_stripped_name(published, tmp_path):
    wrapped = {f"module.{k}": v for k, v in published.items() if k != "cls_token"}
    torch.save(wrapped | {"module.loss.centres": torch.zeros(3)}, tmp_path / "own.pth")
    message = (
        r"own\.pth does not fit.*missing: cls_token; unexpected: loss\.centres.*state_dict\(\)"
    )
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "own.pth")
    torch.save(published | {"epoch": 3}, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"own\.pth: epoch is no plain tensor; .*state_dict\(\)"):
        load_model(tmp_path / "own.pth")
    torch.save(published | {"a\x1b[2J\n": torch.zeros(1)}, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"unexpected: a\\x1b\[2J\\n;"):
        load_model(tmp_path / "own.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_and_paths_among_the_arguments(nano, published, tmp_path, zipped):
    args = argparse.Namespace(lr=np.float64(0.1), out=Path("runs/x"), n=np.arange(3), sizes={1, 2})
    args.windows, args.best = PureWindowsPath("C:/x"), {"map": np.float32(0.5), "raw": b"\xff"}
    content = {"model": published, "args": args, "epoch": np.int64(3)}
    torch.save(content, tmp_path / "own.pth", _use_new_zipfile_serialization=zipped)
    assert same(load_model(tmp_path / "own.pth"), nano)


def test_another_type_among_the_arguments_is_refused_with_the_remedy(published, tmp_path):
    torch.save({"model": published, "args": fractions.Fraction(1, 3)}, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"fractions\.Fraction.*of your own.*state_dict\(\)"):
        load_model(tmp_path / "own.pth")


# Ours


@pytest.mark.parametrize("code_dim", [None, 48])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, code_dim):
    network = build_model(NANO, code_dim=code_dim, seed=4, dilations=(1, 2, 4))
    path = save_model(network, tmp_path / "new" / "model.safetensors", seed=4, shares=(0.5, 1))
    loaded = load_model(path)
    assert same(loaded, network) and not loaded.training
    assert (loaded.architecture, loaded.code_dim, loaded.dilations) == (NANO, code_dim, (1, 2, 4))
    assert [conv.dilation[0] for conv in loaded.local_atrous.dilated_convs] == [1, 2, 4]
    assert read_configuration(path) == {
        "format": 1,
        "architecture": NANO,
        "code_dim": code_dim,
        "dilations": [1, 2, 4],
        "metadata": {"seed": 4, "shares": [0.5, 1]},
    }


def test_a_trained_models_mode_and_random_state_do_not_matter(tmp_path):
    network = build_model(NANO, code_dim=48, seed=0).freeze_backbone().train()
    save_model(network, tmp_path / "a.safetensors")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "a.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training and not loaded.backbone_frozen


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name, metadata in [("a", {"x": 1, "y": "z"}), ("b", {"y": "z", "x": 1})]:
        save_model(build_model(NANO, seed=0), tmp_path / f"{name}.safetensors", **metadata)
    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_float16_halves_the_file_and_loads_as_float32(nano, tmp_path):
    path = save_model(nano, tmp_path / "half.safetensors", dtype="float16")
    full = save_model(nano, tmp_path / "full.safetensors")
    assert path.stat().st_size < 0.52 * full.stat().st_size
    loaded = load_model(path).state_dict()
    for key, value in nano.state_dict().items():
        assert loaded[key].dtype == value.dtype
        wanted = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded[key], wanted), key


def test_eight_bits_are_a_quarter_with_a_scale_per_row(nano, tmp_path):
    kernel = torch.tensor([[0.0, -2.54, 0.013], [0.0, 0.0, 0.0]])  # a step is 0.02, and nothing
    found = rounded({"a": kernel, "b": kernel[0], "c": torch.tensor([[3]])})
    assert found["a"].tolist() == [[0, -127, 1], [0, 0, 0]] and found["a"].dtype == torch.int8
    assert found["a.scales"].flatten().tolist() == pytest.approx([0.02, 0], abs=1e-9)
    assert set(found) == {"a", "a.scales", "b", "c"}
    path = save_model(nano, tmp_path / "int8.safetensors", dtype="int8")
    full = save_model(nano, tmp_path / "full.safetensors")
    assert path.stat().st_size < 0.3 * full.stat().st_size
    loaded = load_model(path).state_dict()
    for key, value in nano.state_dict().items():
        assert loaded[key].dtype == value.dtype
        if value.ndim < 2:
            assert torch.equal(loaded[key], value), key
        else:
            limit = value.flatten(1).abs().amax(1) / 254 * 1.001
            assert ((loaded[key] - value).flatten(1).abs().amax(1) <= limit).all(), key


@pytest.mark.parametrize("shape", [(2,), (3, 1), (2, 2), (1, 1)])
def test_scales_that_do_not_fit_are_refused(shape, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.int8), "a.scales": torch.ones(shape)}, path)
    with pytest.raises(ValueError, match=r"a\.safetensors: a\.scales fits no 8-bit tensor"):
        read_safetensors(path)
    save_file({"b.scales": torch.ones(2, 1)}, path)  # of nothing
    with pytest.raises(ValueError, match=r"b\.scales fits no 8-bit tensor"):
        read_safetensors(path)


def test_what_cannot_be_saved_is_refused(nano, tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        save_model(nano, tmp_path / "a.safetensors", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"a\.pth.*safetensors"):
        save_model(nano, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_model(nano, tmp_path):
    path = save_model(build_model(NANO, seed=0), tmp_path / "model.safetensors")
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors could not be written.*too large"):
            save_model(nano, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def rewritten(path, change, metadata=True):
    """Our file with its configuration changed (None: without one)."""
    configuration = read_configuration(path)
    change(configuration)
    text = {"vitgal": json.dumps(configuration)} if metadata else None
    save_file(load_file(path), path, metadata=text)


def test_a_foreign_or_wrong_configuration_is_named(nano, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(nano, path)
    rewritten(path, lambda found: None, metadata=False)
    with pytest.raises(ValueError, match=r"model\.safetensors holds no ViTGaL configuration"):
        load_model(path)
    for change, message in [
        (lambda found: found.update(format=99), "format 99"),
        (lambda found: found.update(architecture="resnet50"), "resnet50"),
        (lambda found: found.update(code_dim="many"), "cannot be built"),
        (lambda found: found.pop("format"), "broken"),
        (lambda found: found.update(code_dim=None), "unexpected: autoencoder"),
        (lambda found: found.update(code_dim=32), r"misshapen: autoencoder.encoder.weight \(\(48"),
        (lambda found: found.update(architecture="xcit_small_12_p16_224"), "misshapen"),
    ]:
        save_model(nano, path)
        rewritten(path, change)
        with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
            load_model(path)
    save_file({"a": torch.ones(1)}, path, metadata={"vitgal": "{"})
    with pytest.raises(ValueError, match=r"model\.safetensors.*broken"):
        load_model(path)


def test_a_missing_tensor_is_named(nano, tmp_path):
    path = save_model(nano, tmp_path / "model.safetensors")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b"backbone.norm.weight", b"backbone.norm.height")
    path.write_bytes(content[:8] + header + content[8 + length :])
    message = r"missing: backbone\.norm\.weight; unexpected: backbone\.norm\.height"
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_convert_keeps_the_outputs_of_the_checkpoint(published, nano, tmp_path):
    source = checkpoint(tmp_path / "s.pth", published | {"head.weight": torch.zeros(3, 128)})
    target = convert(source, tmp_path / "s.safetensors")
    assert same(load_model(target), nano)
    assert len(read_configuration(target)["metadata"]["source_sha256"]) == 64
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_model(target)(images), load_model(source)(images))
    with pytest.raises(ValueError, match=r"t\.pth"):
        convert(source, tmp_path / "t.pth")


# ImageNet


@pytest.mark.parametrize("form", ["official.pth", "timm.pth", "timm.safetensors", "state dict"])
def test_initial_weights_fill_all_but_the_multi_atrous_block(imagenet, tmp_path, form):
    network = build_model(NANO, code_dim=48, seed=0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    source = tmp_path / form
    if form == "official.pth":
        torch.save({"model": layouts.official(imagenet)}, source)
    elif form == "timm.pth":
        torch.save(imagenet, source)
    elif form == "timm.safetensors":
        save_file(imagenet, source)
    else:
        source = imagenet
    assert initial_weights(network, source) is None
    filled = 0
    for key, value in network.state_dict().items():
        if key.startswith("backbone."):
            assert torch.equal(value, imagenet[key.removeprefix("backbone.")]), key
            filled += 1
        else:
            assert torch.equal(value, before[key]), key
    dropped = [key for key in imagenet if key.startswith(("head.", "cls_attn_blocks.1."))]
    assert filled == len(imagenet) - len(dropped) and len(dropped) > 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({"foo.bar": torch.ones(1)}), r"unexpected: foo\.bar"),
        (lambda t: t.update({"cls_attn_blocks.2.gamma1": torch.ones(1)}), r"cls_attn_blocks\.2"),
        (lambda t: t.update({"local_atrous.gamma": torch.ones(128)}), r"local_atrous\.gamma"),
        (lambda t: t.pop("norm.bias"), r"missing: norm\.bias"),
        (lambda t: t.pop("cls_attn_blocks.0.gamma2"), r"missing: cls_attn_blocks\.0\.gamma2"),
        (lambda t: t.update({"norm.bias": torch.ones(3)}), r"norm\.bias \(\(3,\) instead of \(128"),
    ],
)
@pytest.mark.parametrize("layout", [dict, layouts.official])
def test_other_initial_weights_are_named_and_change_nothing(
    fresh, imagenet, change, message, layout
):
    network, unchanged = fresh
    tensors = layout(imagenet)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        initial_weights(network, tensors)
    assert same(network, unchanged)


@pytest.mark.slow
@pytest.mark.parametrize("code_dim", [None, 8])
def test_a_vitgal_model_is_trained_further(code_dim, tmp_path):
    trained = build_model(NANO, code_dim=code_dim, seed=1)
    path = save_model(trained, tmp_path / "ours.safetensors")
    network = build_model(NANO, code_dim=48, seed=0)
    initial_weights(network, path)
    result, expected = network.state_dict(), trained.state_dict()
    fresh = build_model(NANO, code_dim=48, seed=0).state_dict()
    for key, value in result.items():
        other = fresh if key.startswith("autoencoder.") else expected
        assert torch.equal(value, other[key]), key
    with pytest.raises(ValueError, match=r"does not fit xcit_small_12.*misshapen"):
        initial_weights(build_model("xcit_small_12_p16_224", seed=0), path)


def test_initial_weights_of_another_architecture_are_named(imagenet, tmp_path):
    path = checkpoint(tmp_path / "nano.pth", layouts.official(imagenet))
    with pytest.raises(ValueError, match=r"nano\.pth does not fit xcit_small_12.*misshapen"):
        initial_weights(build_model("xcit_small_12_p16_224", seed=0), path)
