"""Training the ViTGaL head on networks of timm: frozen, fine-tuned, with layer-wise decay."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.training_runs import (
    AUTOENCODER,
    SETTINGS,
    XCIT,
    die_after_step,
    exit_code,
    fit,
    fit_autoencoder,
    rows,
    split,
)
from vitgal import runs
from vitgal.models import weights
from vitgal.models.descriptors import extract_global, extract_local
from vitgal.models.heads import ArcFace
from vitgal.models.network import build_model, outline
from vitgal.settings import TrainingSettings
from vitgal.settings.reader import from_command_line
from vitgal.training import diagnostics, networks

TRUNK = "backbone.trunk.network."
VIT = replace(SETTINGS, drop_path=0.0)
CONV = replace(SETTINGS, architecture="timm:test_efficientnet", embed_dim=48, image_size=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Files of two networks of timm with random weights."""
    folder = tmp_path_factory.mktemp("timm")
    for name in ("test_vit", "test_efficientnet"):
        torch.manual_seed(5)
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return {path.stem: str(path) for path in folder.iterdir()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return weights.load_model(path).state_dict()


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("settings", [VIT, CONV], ids=["vit", "conv"])
def test_a_head_on_a_frozen_network(settings, files, run, images):
    name = settings.architecture.removeprefix("timm:")
    settings = replace(settings, freeze_backbone=True, initial_weights=files[name])
    folder = fit(run, images, settings)
    reference = timm.create_model(name, checkpoint_path=files[name]).state_dict()
    result = tensors(folder / "model.safetensors")
    before = build_model(settings.architecture, seed=0, embed_dim=settings.embed_dim).state_dict()
    for key, value in result.items():
        if key.startswith(TRUNK):
            assert torch.equal(value, reference[key.removeprefix(TRUNK)]), key
    assert not torch.equal(result["local_atrous.gamma"], before["local_atrous.gamma"])
    assert all(np.isfinite(row["loss"]) for row in rows(folder))
    parameters = runs.read_json(folder / "stage.json")["parameters"]
    assert parameters["freeze_backbone"] and parameters["architecture"] == settings.architecture
    # The autoencoder and the features that follow.
    folder = fit_autoencoder(run, images, replace(AUTOENCODER, image_size=settings.image_size))
    model = weights.load_model(folder / "model.safetensors")
    assert diagnostics.same_backbone(model, run / "retrieval" / "model.safetensors")
    photograph = np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)
    assert extract_global(model, [photograph], size=64).shape == (1, model.embed_dim)
    local = extract_local(model, photograph, size=96, scales=(1.0,), ladder=(0.01,))
    assert local.descriptors.shape[1] == 8 and len(local.descriptors)
    maps = diagnostics.token_maps(model, [photograph], size=64)
    side = 64 // model.patch
    assert {row.shape[:2] for rows in maps.values() for row in rows} == {(side, side)}


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(files, tmp_path, images):
    settings = replace(VIT, initial_weights=files["test_vit"], layer_decay=0.7, drop_path=0.1)
    whole = fit(split(tmp_path / "whole", images), images, settings)
    run = split(tmp_path / "killed", images)
    assert exit_code(lambda: (die_after_step(5), fit(run, images, settings))) == -9
    resumed = fit(run, images, settings)
    assert rows(resumed) == rows(whole)
    assert (resumed / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    # fine-tuned: the network changes as well
    before = timm.create_model("test_vit", checkpoint_path=files["test_vit"]).state_dict()
    after = tensors(whole / "model.safetensors")
    assert not torch.equal(
        after[f"{TRUNK}blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"]
    )


def test_another_architecture_is_another_run(trained, images):
    with pytest.raises(
        runs.StageError, match='architecture: "timm:test_vit" there, "xcit_nano_12_p16_224" now'
    ):
        fit(trained, images, XCIT)


# What is refused before anything starts


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "timm:test_vot"}, "no network 'test_vot'.*nearest are test_vit"),
        (
            {"architecture": "timm:eva02_tiny_patch14_224", "image_size": 100},
            "image_size: eva02_tiny_patch14_224 takes no images .* multiples of its patch of 14",
        ),
        (
            {"architecture": "timm:mixer_s32_224", "image_size": 64},
            "image_size: mixer_s32_224 takes no images of 64 x 64 pixels.* made for 224 x 224",
        ),
        (
            {"architecture": "timm:coat_tiny", "image_size": 224},
            "the last output of coat_tiny has no spatial tokens",
        ),
        ({"initial_weights": "none.safetensors"}, "none.safetensors"),
    ],
)
def test_a_run_that_cannot_be_does_not_begin(changes, complaint, run, images):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        fit(run, images, replace(VIT, **changes))
    assert not (run / "retrieval").exists()


def test_the_autoencoders_size_is_that_of_the_networks_patch(run, images, tmp_path):
    model = build_model("timm:eva02_tiny_patch14_224", seed=0)
    path = weights.save_model(model, tmp_path / "eva.safetensors")
    settings = replace(AUTOENCODER, backbone_weights=str(path), image_size=96)
    with pytest.raises(ValueError, match="ae_image_size: eva02_tiny_patch14_224 takes no images"):
        fit_autoencoder(run, images, settings)
    xcit = weights.save_model(
        build_model("xcit_nano_12_p16_224", seed=0), tmp_path / "x.safetensors"
    )
    settings = replace(AUTOENCODER, backbone_weights=str(xcit), image_size=98)
    with pytest.raises(ValueError, match="ae_image_size 98 is not a multiple of 16"):
        fit_autoencoder(run, images, settings)
    assert not (run / "autoencoder").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"freeze_backbone": True, "layer_decay": 0.7, "initial_weights": "a"}, "not both"),
        ({"freeze_backbone": True}, "freeze_backbone needs initial_weights"),
        ({"architecture": "timm:test_vit@net.pth"}, "names weights: set initial_weights"),
        ({"architecture": "xcit_nano_12_p16_224", "embed_dim": 64}, "embed_dim is for .*timm:NAME"),
        ({"architecture": "xcit_nano_12_p16_224", "class_token": "gem"}, "class_token gem is for"),
        ({"class_token": "mean"}, "class_token"),
        ({"architecture": "xcit_nano_12_p16_224", "image_size": 100}, "not a multiple of 16"),
        ({"image_size": 30}, "image_size 30 is less than 32"),
    ],
)
def test_contradictory_settings_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(VIT, **changes)


def test_new_settings_are_left_out_of_manifests_at_their_defaults():
    assert (
        not {"embed_dim", "freeze_backbone", "class_token"} & TrainingSettings().compared().keys()
    )


def test_sources_of_weights_are_no_paths_on_the_command_line():
    def read(name, text):
        return from_command_line({name: text}, {}).values[name]

    assert read("initial_weights", "pretrained") == "pretrained"
    assert read("weights", "timm:test_vit") == "timm:test_vit"
    assert read("weights", "untrained:timm:test_vit") == "untrained:timm:test_vit"
    here = Path.cwd()
    assert read("initial_weights", "timm:test_vit@a/b.pth") == f"timm:test_vit@{here / 'a/b.pth'}"
    assert read("initial_weights", "a.pth") == str(here / "a.pth")
    assert read("teacher_weights", "pretrained") == str(here / "pretrained")  # a file of this name
    assert runs.resolve_source("timm:test_vit") == "timm:test_vit"
    assert runs.resolve_source("timm:test_vit@a.pth") == f"timm:test_vit@{runs.resolve('a.pth')}"
    assert runs.resolve_source("a.pth") == runs.resolve("a.pth")


# Learning rates


def test_layer_decay_follows_timms_layers():
    # test_vit: an embedding and six blocks, the norm with the last; what is new comes after.
    built = networks.RetrievalNetwork(build_model("timm:test_vit", seed=0), ArcFace(64, 3))
    optimizer = networks.build_optimizer(built, replace(VIT, layer_decay=0.5, weight_decay=0.25))
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    scales = {
        "head.weight": 1,
        "model.local_atrous.depthwise.weight": 1,
        "model.backbone.cls_attn_blocks.0.mlp.fc1.weight": 1,
        f"model.{TRUNK}norm.weight": 0.5,
        f"model.{TRUNK}blocks.5.mlp.fc1.weight": 0.5,
        f"model.{TRUNK}blocks.0.mlp.fc1.weight": 0.5**6,
        f"model.{TRUNK}patch_embed.proj.weight": 0.5**7,
        f"model.{TRUNK}cls_token": 0.5**7,
    }
    assert {name: groups[name]["lr_scale"] for name in scales} == scales
    assert groups[f"model.{TRUNK}pos_embed"]["weight_decay"] == 0
    assert groups[f"model.{TRUNK}blocks.5.mlp.fc1.weight"]["weight_decay"] == 0.25
    assert len(groups) == len(list(built.parameters()))


def test_only_the_head_is_optimised_on_a_frozen_network():
    model = build_model("timm:test_vit", seed=0).freeze_trunk()
    built = networks.RetrievalNetwork(model, ArcFace(64, 3))
    optimizer = networks.build_optimizer(built, VIT)
    optimised = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    inside = sum(p.numel() for p in model.backbone.trunk.parameters())
    assert optimised == sum(p.numel() for p in built.parameters()) - inside


def test_the_table_of_parameters_counts_all_of_them():
    for shape in (outline("timm:test_efficientnet", embed_dim=48), outline("timm:test_vit")):
        table = diagnostics.parameter_table(shape)
        assert table["part"][0] == shape.architecture
        own = sum(p.numel() for key, p in shape.named_parameters() if key != "backbone.cls_token")
        assert table["parameters"].sum() == own
