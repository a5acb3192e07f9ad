"""A teacher: its weights, what it says, what it leaves in the student and what not."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.training_runs import MACHINE, SETTINGS, die_after_step, exit_code, fit, rows, split
from vitgal import runs
from vitgal.app import train_command
from vitgal.data import gldv2, images as data_images
from vitgal.models import timm_networks, weights
from vitgal.models.heads import ArcFace
from vitgal.models.network import build_model
from vitgal.models.teacher import Teacher
from vitgal.settings import TrainingSettings
from vitgal.stages import train
from vitgal.training import fit as fits, loop, samples
from vitgal.training.augmentation import draw_hole, scaled_hole
from vitgal.training.networks import DistilledNetwork, disagreement

SMALL = "test_efficientnet"  # timm's: 0.4 million parameters, 256 numbers a picture
LITE = "tf_efficientnet_lite0"
NAMES = {  # written down from both networks' listings
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_blocks.0._depthwise_conv": "blocks.0.0.conv_dw",
    "_blocks.0._project_conv": "blocks.0.0.conv_pw",
    "_blocks.1._expand_conv": "blocks.1.0.conv_pw",
    "_blocks.1._bn0": "blocks.1.0.bn1",
    "_blocks.2._depthwise_conv": "blocks.1.1.conv_dw",
    "_blocks.15._project_conv": "blocks.6.0.conv_pwl",
    "_blocks.15._bn2": "blocks.6.0.bn3",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


SIZE = 64, 64


def network(name: str = SMALL) -> torch.nn.Module:
    torch.manual_seed(5)
    made = timm.create_model(name)
    for module in made.modules():  # BatchNorm that does something
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return made.eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(network().state_dict(), path)
    return path


def taught(file: Path) -> TrainingSettings:
    return replace(SETTINGS, teacher=SMALL, teacher_weights=str(file))


# What it says


def test_disagreement_by_hand():
    # Columns (0, 2) and (5, 1): mean 1 and 3, deviation 1 and 2 -> rows (-1, 1) and (1, -1).
    teacher = torch.tensor([[0.0, 5.0], [2.0, 1.0]])
    same = torch.tensor([[-3.0, 3.0], [1.0, -1.0]])
    # 1e-5: what keeps a number that never changes from dividing by 0 is 1e-6 of the deviation
    assert disagreement(same, teacher).item() == pytest.approx(0.0, abs=1e-5)
    assert disagreement(-same, teacher).item() == pytest.approx(2.0, abs=1e-5)
    half = torch.tensor([[-3.0, 3.0], [1.0, 1.0]])  # cosines 1 and 0
    assert disagreement(half, teacher).item() == pytest.approx(0.5, abs=1e-5)
    constant = torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    assert math.isfinite(disagreement(same, constant).item())
    with pytest.raises(ValueError, match="two pictures"):
        disagreement(same[:1], teacher[:1])


def test_a_picture_is_shown_as_the_teacher_was_trained(file):
    teacher = Teacher(SMALL, file, SIZE)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data_images.MEAN, data_images.STD))
    config = timm.data.resolve_model_data_config(network())
    its_mean, its_std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        maps = network().forward_features((pixels - its_mean) / its_std)
    pooled = maps.clamp(min=1e-6).double().pow(3).mean((2, 3)).pow(1 / 3)
    result = teacher.describe((pixels - mean) / std)
    assert result.shape == (2, 256) and teacher.dim == 256 and result.dtype == torch.float32
    # float32 in another order of operations
    torch.testing.assert_close(result.double(), pooled, atol=1e-4, rtol=1e-3)


def test_a_transformer_teaches_by_its_own_pooling(tmp_path):
    save_file(network("test_vit").state_dict(), tmp_path / "vit.safetensors")
    teacher = Teacher("test_vit", tmp_path / "vit.safetensors", SIZE)
    assert teacher.describe(torch.zeros(3, 3, *SIZE)).shape == (3, 64) and teacher.dim == 64


# Its weights


def test_layers_have_the_names_of_both_kinds_of_efficientnet():
    made = timm.create_model(LITE)
    result = timm_networks.efficientnet_names(made)
    assert {timms: its for its, timms in NAMES.items()}.items() <= result.items()
    assert set(result) == {name.rpartition(".")[0] for name in made.state_dict()}
    assert timm_networks.efficientnet_names(timm.create_model("test_resnet")) == {}


def test_a_file_in_the_other_names_fills_the_network(tmp_path):
    own = network(LITE)
    reference = timm_networks.efficientnet_names(own)
    tensors = {}
    for name, value in own.state_dict().items():
        layer, _, part = name.rpartition(".")
        tensors[f"{reference[layer]}.{part}"] = value
    assert "_blocks.0._depthwise_conv.weight" in tensors
    torch.save(tensors, tmp_path / "net.pth")
    teacher = Teacher(LITE, tmp_path / "net.pth", SIZE)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(teacher.network.state_dict()[name], value, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("conv_stem.weight"), "missing: conv_stem.weight"),
        (lambda t: t.update(odd=torch.zeros(1)), "unexpected: odd"),
        (lambda t: t.update({"bn1.bias": torch.zeros(1)}), "misshapen: bn1.bias"),
    ],
)
def test_a_misfitting_file_is_reported(change, complaint, tmp_path):
    tensors = dict(network().state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=complaint):
        Teacher(SMALL, tmp_path / "net.pth", SIZE)


def test_wrong_teachers_are_named(file, tmp_path):
    with pytest.raises(ValueError, match="timm has no network 'resnet_of_mine'"):
        Teacher("resnet_of_mine", file, SIZE)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        Teacher(SMALL, tmp_path / "none.pth", SIZE)
    for half in ({"teacher": SMALL}, {"teacher_weights": str(file)}):
        with pytest.raises(ValueError, match="set both"):
            TrainingSettings(**half)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"distill_weight .*{wrong}"):
            TrainingSettings(distill_weight=wrong)


# Learning from it


def made(file: Path, weight: float) -> DistilledNetwork:
    torch.manual_seed(1)
    model = build_model(SETTINGS.architecture, seed=0)
    head = ArcFace(model.embed_dim, 3)
    return DistilledNetwork(model, head, Teacher(SMALL, file, SIZE), weight)


def test_the_loss_is_shared_out(file):
    pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    student = made(file, 0.75).eval()
    result = student(pictures, labels)
    features = student.model.global_features(pictures)
    arcface, _ = student.head.loss(features, labels)
    output = student.teacher.describe(pictures)
    # Of pictures so small some of the numbers are the same for all: they say nothing.
    output = ((output - output.mean(0)) / output.std(0, correction=0)).nan_to_num(0, 0, 0)
    cosine = F.cosine_similarity(student.projection(features), output).mean().item()
    # float32, and 1e-6 beside deviations of about 0.1
    assert result["distilled"].item() == pytest.approx(1 - cosine, abs=1e-4)
    expected = 0.25 * arcface.item() + 0.75 * (1 - cosine)
    assert result["loss"].item() == pytest.approx(expected, abs=1e-4)


def test_a_teacher_alone_teaches(file):
    # The labels count for nothing, and the student comes to agree on eight pictures.
    pictures = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student = made(file, 1.0).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = student(pictures, torch.zeros(8, dtype=torch.int64))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8  # a random map of random features agrees with nothing
    assert losses[-1] < 0.5 * losses[0]
    assert student.head.weight.grad.abs().max() == 0


@pytest.mark.slow
def test_the_teacher_stays_as_it_is_and_out_of_every_file(file, run, images):
    folder = fit(run, images, taught(file))
    state = torch.load(folder / "state" / "last.pt", weights_only=True)["network"]
    names = {name.split(".")[0] for name in state}
    assert names == {"model", "head", "projection"}
    model = weights.load_model(folder / "model.safetensors")
    assert model.state_dict().keys() == build_model(SETTINGS.architecture).state_dict().keys()
    recorded = runs.read_json(folder / "stage.json")
    assert recorded["parameters"]["teacher"] == SMALL
    assert recorded["parameters"]["distill_weight"] == 0.8
    assert recorded["inputs"]["teacher_weights"] == runs.fingerprint_file(file)
    assert all(0 < row["distilled"] < 2 for row in rows(folder))
    again = Teacher(SMALL, file, SIZE)
    assert not any(parameter.requires_grad for parameter in again.network.parameters())
    assert not again.network.training
    with pytest.raises(runs.StageError, match="distill_weight: 0.8 there, 0.5 now"):
        fit(run, images, replace(taught(file), distill_weight=0.5))


@pytest.mark.slow
def test_without_a_teacher_nothing_is_recorded_of_it(uninterrupted):
    recorded = runs.read_json(uninterrupted / "stage.json")
    assert not {"teacher", "distill_weight"} & recorded["parameters"].keys()
    assert "teacher_weights" not in recorded["inputs"]


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(file, tmp_path, images):
    settings = replace(taught(file), ema_decay=0.9)
    whole = fit(split(tmp_path / "whole", images), images, settings)
    run = split(tmp_path / "killed", images)
    assert exit_code(lambda: (die_after_step(5), fit(run, images, settings))) == -9
    resumed = fit(run, images, settings)
    assert rows(resumed) == rows(whole)
    name = "model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    single, other = (
        torch.load(folder / "state" / "last.pt", weights_only=True) for folder in (whole, resumed)
    )
    assert torch.equal(
        single["network"]["projection.weight"], other["network"]["projection.weight"]
    )


@pytest.mark.slow
def test_the_command_line_takes_a_teacher(file, run, images):
    values = {"teacher": SMALL, "teacher_weights": str(file), "image_folder": str(images)}
    values |= {"epochs": "1", "image_size": "32", "batch_size": "4"}
    _, settings = train_command.read_notebook_settings(
        runs.resolve("params/tiny.yaml"), only="02", overrides=values, output=run
    )
    folder = train_command.train("02", run, settings["02"])
    assert runs.read_json(folder / "stage.json")["parameters"]["teacher"] == SMALL


# A view of its own size


def sample(images: Path, **changes) -> samples.Sample:
    table = pd.DataFrame({"path": [gldv2.image_path(f"00{'0' * 14}")], "label": [0]})
    settings = replace(SETTINGS, teacher="any", teacher_weights="any", **changes)
    return samples.TrainingImages(images, table, settings)[3, 0]


@pytest.mark.parametrize("augment", ["published", "fast", "none"])
def test_the_teachers_view_is_the_students_at_its_own_size(augment, images):
    plain = sample(images, augment=augment, image_size=64)
    assert plain.view.numel() == 0
    other = sample(images, augment=augment, image_size=64, teacher_size=128)
    assert torch.equal(plain.picture, other.picture) and torch.equal(plain.hole, other.hole)
    assert other.view.shape == (3, 128, 128) and other.view.dtype == torch.uint8
    # Halved by the mean of four pixels it is the student's but for interpolation of noise.
    halved = other.view.float().unflatten(1, (64, 2)).unflatten(3, (64, 2)).mean((2, 4))
    match = torch.corrcoef(torch.stack([halved.flatten(), plain.picture.float().flatten()]))
    assert match[0, 1] > 0.9


def test_a_hole_grows_with_the_view():
    # Of the seeds some have a hole: 16 of 64 pixels for the student, 48 of 192 for the teacher.
    settings = replace(
        SETTINGS, teacher="any", teacher_weights="any", image_size=64, teacher_size=192
    )
    for augment in ("published", "fast"):
        data = samples.TrainingImages(
            Path(),
            pd.DataFrame({"path": ["x.jpg"], "label": [0]}),
            replace(settings, augment=augment),
        )
        white = np.full((100, 120, 3), 255, np.uint8)
        holes = []
        for seed in range(30):
            draw = np.random.default_rng(seed)
            data.transform(white, 64, draw)
            hole = draw_hole(64, draw)
            teachers, _ = data.change(white, 192, np.random.default_rng(seed))
            assert teachers.shape == (3, 192, 192)
            if hole[2] and augment == "published":
                top, left, side = (3 * value for value in hole)
                assert teachers[:, top : top + side, left : left + side].max() == 0
            holes.append(hole[2])
        assert set(holes) == {0, 16}
    assert scaled_hole(torch.tensor([[4, 6, 16], [0, 0, 0]]), 3).tolist() == [[12, 18, 48], [0] * 3]


def test_the_teacher_describes_the_larger_view(file, run, images, fresh_accelerate, monkeypatch):
    settings = replace(taught(file), teacher_size=96)
    data = samples.read_data(run / "split", images, settings)
    network = train._retrieval_network(settings, data.classes)
    options = fits.Fit(None, settings, MACHINE, run / "retrieval", run / "split", images)
    trainer = loop.Trainer(network, options, data)
    shown = []
    describe = network.teacher.describe
    monkeypatch.setattr(network.teacher, "describe", lambda v: (shown.append(v), describe(v))[1])
    batch = next(trainer.read(trainer.batches(0)))
    trainer.network.train()
    assert 0 < trainer.run_step([batch])["distilled"] < 2
    assert [tuple(view.shape) for view in shown] == [(4, 3, 96, 96)]
    pixels = batch.view[0].float() / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data_images.MEAN, data_images.STD))
    expected = (pixels - mean) / std
    top, left, side = (3 * value for value in batch.hole[0].tolist())
    expected[:, top : top + side, left : left + side] = 0
    torch.testing.assert_close(shown[0][0], expected, atol=1e-5, rtol=0)
    trainer.try_step(2)
    assert shown[-1].shape == (2, 3, 96, 96)
    assert len(trainer.validate(trainer.due(1))) > 0  # validation asks no teacher
    assert len(shown) == 2


def test_a_size_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher_size needs a teacher"):
        TrainingSettings(teacher_size=192)
    assert "teacher_size" not in TrainingSettings().compared()
