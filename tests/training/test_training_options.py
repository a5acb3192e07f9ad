"""The options beyond the published recipe, each against a value worked out by hand."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from tests.training_runs import (
    NANO,
    SETTINGS,
    XCIT,
    die_after_step,
    exit_code,
    fit,
    make_trainer,
    rows,
)
from vitgal.models import weights
from vitgal.models.heads import ArcFace
from vitgal.models.network import build_model
from vitgal.settings import AutoencoderSettings, MachineSettings, Recipe, TrainingSettings
from vitgal.stages import train
from vitgal.training import diagnostics, loop, networks, samples


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulate": 0},
        {"epochs": 0},
        {"ema_decay": 1.0},
        {"layer_decay": 0.0},
        {"label_smoothing": 1.0},
        {"rand_augment": -1},
        {"rand_augment_magnitude": 31},
        {"sub_centres": 0},
        {"class_chunk": 0},
    ],
)
def test_a_recipe_names_the_wrong_option(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        TrainingSettings(**wrong)


def test_chunks_and_samples_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        TrainingSettings(class_chunk=5, sampled_classes=5)


def test_an_option_that_is_off_is_no_part_of_the_settings():
    machine = MachineSettings()
    off = train.compared(TrainingSettings(), machine)
    assert "ema_decay" not in off and "accumulate" not in off and off["clip_grad"] is None
    assert train.compared(TrainingSettings(ema_decay=0.9), machine) == off | {"ema_decay": 0.9}
    fast = MachineSettings(timeout_minutes=1, dry_run=False, data_workers=9)
    assert train.compared(TrainingSettings(), fast) == off


def test_batchnorm_over_processes_is_compared_where_there_are_several():
    separate, two = TrainingSettings(sync_batchnorm=False), MachineSettings(num_processes=2)
    assert "sync_batchnorm" not in train.compared(separate, MachineSettings())
    assert "sync_batchnorm" not in train.compared(TrainingSettings(), two)
    assert train.compared(separate, two)["sync_batchnorm"] is False


def test_the_autoencoder_has_settings_of_its_own():
    values = {"lr": 0.5, "ae_lr": 0.25, "layer_decay": 0.5, "ema_decay": 0.5, "seed": 3}
    settings = AutoencoderSettings.build(values)
    assert (settings.lr, settings.seed, settings.ema_decay) == (0.25, 3, None)
    assert settings.layer_decay is None


# ArcFace


def head(*, margin: float = 0.0, scale: float = 2.0, rows=((1, 0), (0, 1)), **options) -> ArcFace:
    count = len(rows) // options.get("sub_centres", 1)
    built = ArcFace(2, count, margin, scale, **options)
    with torch.no_grad():
        built.weight.copy_(torch.tensor(rows, dtype=torch.float32))
    return built


FEATURE, LABEL = torch.tensor([[3.0, 0.0]]), torch.tensor([0])


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"sampled": 2}])
def test_the_loss_by_hand(options):
    # cosines 1 and 0, scale 2: log(e^2 + e^0) - 2 = 0.126928
    loss, result = head(**options).loss(FEATURE, LABEL)
    assert loss.item() == pytest.approx(0.126928, abs=1e-6)
    assert result.tolist() == [0]
    # smoothing 0.1: log(e^2 + 1) - 0.95 * 2 - 0.05 * 0 = 0.226928
    loss, _ = head(**options).loss(FEATURE, LABEL, smoothing=0.1)
    assert loss.item() == pytest.approx(0.226928, abs=1e-6)
    # margin 0.5: the true class's cosine is cos 0.5 = 0.877583, its logit 1.755165
    loss, _ = head(margin=0.5, **options).loss(FEATURE, LABEL)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.755165)), abs=1e-3)


def test_the_nearest_sub_centre_counts():
    centres = ((1, 0), (0, 1), (-1, 0), (0, -1))
    built = head(scale=3.0, rows=centres, sub_centres=2)
    assert built.classes == 2
    # cosines of (0, 2): class 0 max(0, 1) = 1, class 1 max(0, -1) = 0
    assert built(torch.tensor([[0.0, 2.0]])).tolist() == [[3.0, 0.0]]
    loss, result = built.loss(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(math.exp(3) + 1), abs=1e-6)
    loss.backward()
    moved = built.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, False]  # class 1's nearest is orthogonal: 0 > -1
    assert result.tolist() == [0]


@pytest.mark.parametrize("sub_centres", [1, 3])
@pytest.mark.parametrize("chunk", [1, 4, 10])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_change_nothing(sub_centres, chunk, smoothing):
    torch.manual_seed(0)
    features, labels = torch.randn(7, 5), torch.tensor([0, 3, 3, 10, 9, 4, 10])
    result = []
    for size in (None, chunk):
        torch.manual_seed(1)
        built = ArcFace(5, 11, 0.3, 8.0, sub_centres=sub_centres, chunk=size)
        inputs = features.clone().requires_grad_()
        loss, best = built.loss(inputs, labels, smoothing=smoothing)
        (3 * loss).backward()
        result.append((loss.detach(), best, inputs.grad, built.weight.grad))
    for single, other in zip(*result, strict=True):
        # float32 sums in another order
        torch.testing.assert_close(single, other, atol=2e-6, rtol=1e-5)


def test_sampled_classes_hold_the_batchs_own():
    built = ArcFace(4, 50, 0.2, 5.0, sampled=6)
    features, labels = torch.randn(3, 4), torch.tensor([7, 40, 7])
    torch.manual_seed(3)
    kept = built._sample(labels)
    assert len(kept.unique()) == 6 and {7, 40} <= set(kept.tolist())
    torch.manual_seed(3)
    loss, result = built.loss(features, labels)
    # the same by the full logits of the classes kept
    logits = built(features, labels)[:, kept]
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits, torch.searchsorted(kept, labels)).item(), abs=1e-6
    )
    assert result.tolist() == kept[logits.argmax(1)].tolist()
    loss.backward()
    assert set((built.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist()) == set(
        kept.tolist()
    )
    assert not torch.equal(built._sample(labels), kept)  # drawn anew
    with pytest.raises(ValueError, match="1 sampled classes for a batch of 2"):
        ArcFace(4, 50, sampled=1).loss(features, labels)


@pytest.mark.parametrize("options", [{"chunk": 0}, {"sampled": -1}, {"sub_centres": 0}])
def test_head_options_below_one_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        ArcFace(4, 5, **options)


# The published losses and optimizer


class Given(torch.nn.Module):
    """Stands where a model does and gives what it was given."""

    def __init__(self, *results: torch.Tensor):
        super().__init__()
        self.results = results

    def global_features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.results[0]

    def reconstruct(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.results


def test_validation_counts_with_and_without_the_margin():
    # Classes at 0 and 90 degrees, features at 44, 10 and 44. 44 is nearer to 0 than to 90, but not
    # once the margin of 0.15 (8.6 degrees) is added. The third belongs to no trained class.
    angles = torch.tensor([44.0, 10.0, 44.0]).deg2rad()
    head = ArcFace(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    network = networks.RetrievalNetwork(Given(features), head)
    result = network.validate(torch.zeros(3, 3, 32, 32), torch.tensor([0, 0, -1]))
    assert result["val_accuracy"].tolist() == [True, True, False]
    assert result["val_accuracy_margin"].tolist() == [False, True, False]


def test_the_autoencoders_loss_by_hand():
    # Logits 0, 0: the cross-entropy is log 2. Two of four numbers are off by 0.5: the mean of the
    # squares is 0.125, ten times which is 1.25.
    tokens = torch.zeros(1, 2, 2)
    decoded = torch.tensor([[[0.5, 0.0], [0.0, -0.5]]])
    classifier = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(classifier.weight), torch.nn.init.zeros_(classifier.bias)
    model = Given(torch.ones(1, 2), decoded, tokens)
    result = networks.AutoencoderNetwork(model, classifier, AutoencoderSettings())(
        None, torch.tensor([1])
    )
    assert result["loss"].item() == pytest.approx(math.log(2) + 1.25, rel=1e-6)
    assert result["reconstruction"].item() == pytest.approx(0.125, rel=1e-6)


def test_the_optimizer_is_the_published_one():
    built = networks.build_optimizer(network(), TrainingSettings())
    assert type(built) is torch.optim.AdamW
    for group in built.param_groups:
        assert (group["lr"], group["eps"], group["betas"]) == (5e-5, 1e-8, (0.9, 0.999))
        assert group["weight_decay"] in (0, 0.005)


# Parameter groups


def network() -> networks.RetrievalNetwork:
    return networks.RetrievalNetwork(build_model(NANO, seed=0), ArcFace(128, 3))


def groups(settings: Recipe) -> dict[str, dict]:
    built = network()
    optimizer = networks.build_optimizer(built, replace(settings, architecture=NANO))
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_vectors_biases_and_class_tokens_do_not_decay(layer_decay):
    result = groups(replace(SETTINGS, weight_decay=0.25, layer_decay=layer_decay))
    assert result["model.backbone.cls_token"]["weight_decay"] == 0
    assert result["model.backbone.blocks.3.mlp.fc1.bias"]["weight_decay"] == 0
    assert result["model.local_atrous.gamma"]["weight_decay"] == 0
    assert result["model.backbone.blocks.3.mlp.fc1.weight"]["weight_decay"] == 0.25
    assert result["head.weight"]["weight_decay"] == 0.25
    assert len(result) == len(list(network().parameters()))


def test_layer_decay_halves_from_block_to_block(images, run, fresh_accelerate):
    result = groups(replace(SETTINGS, layer_decay=0.5))
    # twelve blocks: what is new on top at the full rate, the last block at half of it, the stem
    # below the first at 0.5 ** 13
    scales = {
        "head.weight": 1,
        "model.local_atrous.depthwise.weight": 1,
        "model.backbone.cls_attn_blocks.0.mlp.fc1.weight": 1,
        "model.backbone.blocks.11.mlp.fc1.weight": 0.5,
        "model.backbone.blocks.0.mlp.fc1.weight": 0.5**12,
        "model.backbone.cls_token": 0.5**13,
        "model.backbone.patch_embed.proj.0.0.weight": 0.5**13,
    }
    assert {name: result[name]["lr_scale"] for name in scales} == scales
    single = make_trainer(run, images, replace(SETTINGS, epochs=1, layer_decay=0.5))
    single.run(None, False)
    rates = {group["lr"] / group["lr_scale"] for group in single.optimizer.param_groups}
    assert [*rates] == [pytest.approx(single.rates[0], rel=1e-12)] * len(rates)


# Steps


def test_the_average_follows_the_weights(images, run, fresh_accelerate):
    single = make_trainer(run, images, replace(SETTINGS, ema_decay=0.9))
    name = "head.weight"
    batches = list(single.read(single.batches(0)))
    single.network.train()
    seen = []
    for batch in batches[:2]:
        single.run_step([batch])
        seen.append(single.bare.state_dict()[name].clone())
    # step 1: the weights themselves; step 2: decay 1 - 2 ** (-2 / 3) = 0.370039
    expected = 0.370039 * seen[0] + 0.629961 * seen[1]
    assert not torch.equal(*seen)
    torch.testing.assert_close(
        single.average.module.state_dict()[name], expected, atol=1e-6, rtol=0
    )


@pytest.mark.slow
def test_the_averaged_model_is_written(images, run):
    folder = fit(run, images, replace(XCIT, ema_decay=0.5))
    state = torch.load(folder / "state" / "last.pt", weights_only=True)
    written = weights.load_model(folder / "model.safetensors").state_dict()
    key = "backbone.cls_token"
    assert torch.equal(written[key], state["average"][f"model.{key}"])
    assert not torch.equal(written[key], state["network"][f"model.{key}"])


def test_gradients_are_clipped_to_the_norm(images, run, fresh_accelerate, monkeypatch):
    single = make_trainer(run, images, replace(SETTINGS, clip_grad=0.5))
    norms = []
    monkeypatch.setattr(
        single.optimizer,
        "step",
        lambda: norms.append(
            torch.stack(
                [p.grad.norm() for p in single.bare.parameters() if p.grad is not None]
            ).norm()
        ),
    )
    single.network.train()
    single.run_step([next(single.read(single.batches(0)))])
    assert norms[0].item() == pytest.approx(0.5, rel=1e-3)  # an untrained loss has more


def test_accumulated_batches_are_those_of_more_processes():
    def batches(**given) -> list[list[int]]:
        built = samples.Batches(**({"count": 13, "batch_size": 2, "seed": 0, "epoch": 0} | given))
        assert len(list(built)) == len(built)
        return [[index for _, index in batch] for batch in built]

    alone = batches(processes=1, rank=0, accumulate=2)
    pair = [batches(processes=2, rank=rank) for rank in (0, 1)]
    assert alone == [batch for step in zip(*pair, strict=True) for batch in step]
    assert len(alone) == 6  # 13 // (2 * 2) = 3 steps of two batches
    assert batches(processes=1, rank=0, accumulate=2, first=1) == alone[2:]


def test_balanced_epochs_show_every_class_equally_often():
    labels = np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    built = functools.partial(
        samples.Batches, 10, 1, 1, 0, seed=0, accumulate=1, labels=labels, first=0
    )
    order = built(epoch=0).order()
    assert np.bincount(labels[order]).tolist() == [5, 5]
    assert np.array_equal(order, built(epoch=0).order())
    seen = np.concatenate([built(epoch=epoch).order() for epoch in range(100)])
    # of 500 draws of class 1 about 250 show each of its two images: sigma is 11
    assert abs(np.count_nonzero(seen == 0) - 250) < 60
    assert set(seen) == set(range(10))
    single = samples.Batches(3, 1, 1, 0, seed=0, epoch=0, labels=np.zeros(3, int))
    assert set(single.order()) <= {0, 1, 2} and len(single.order()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"channels_last": True}, {"class_chunk": 2}])
def test_formats_and_chunks_only_round(option, images, run, uninterrupted):
    plain = rows(uninterrupted)
    other = rows(fit(run, images, replace(SETTINGS, **option)))
    # the first epoch, at the warm-up rate: sums in another order
    assert other[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-3)


# Seeing it


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_shows_the_log_once(images, run, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    assert exit_code(lambda: (die_after_step(5), fit(run, images))) < 0
    folder = fit(run, images)
    visible, log = scalars(folder), rows(folder)
    assert {"loss", "lr", "accuracy", "images_per_second", "hours_left"} <= visible.keys()
    for tag in ("loss", "lr", "val_accuracy", "val_accuracy_margin"):
        expected = [(row["step"], row[tag]) for row in log if tag in row]
        # as float32; no row twice, although the run was killed
        assert [step for step, _ in visible[tag]] == [step for step, _ in expected]
        assert [v for _, v in visible[tag]] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_the_table_of_epochs_by_hand():
    log = pd.DataFrame(
        {
            "epoch": [0, 1],
            "step": [5, 10],
            "lr": [3e-5, 0.00012],
            "loss": [2.0, 1.23456],
            "accuracy": [0.1, 0.25],
            "images_per_second": [10.0, 99.96],
            "val_accuracy": [math.nan, 0.5],
            "val_map": [math.nan, 0.78349],
        }
    )
    result = diagnostics.epoch_table(log.assign(val_map_low=[math.nan, 0.7], val_map_high=0.85))
    assert list(result)[6:] == ["mAP %", "95 % interval", "images/s"]
    assert result["95 % interval"].tolist() == ["70.0 to 85.0"]
    assert diagnostics.epoch_table(log).to_dict("list") == {
        "epoch": ["1"],
        "step": ["10"],
        "lr": ["1.2e-04"],
        "loss": ["1.235"],
        "train %": ["25.0"],
        "val %": ["50.0"],
        "mAP %": ["78.3"],
        "images/s": ["100.0"],
    }
    # an epoch of which the retrieval set alone is scored
    result = diagnostics.epoch_table(log.assign(val_map=[0.5, 0.78349]))
    assert result["val %"].tolist() == ["-", "50.0"] and result["mAP %"].tolist() == [
        "50.0",
        "78.3",
    ]
    assert (
        len(diagnostics.epoch_table(log[:0])) == len(diagnostics.epoch_table(pd.DataFrame())) == 0
    )


def test_the_time_left_by_hand(images, run, fresh_accelerate):
    single = make_trainer(run, images, replace(SETTINGS, epochs=4, validate_every=3))
    single.seconds_per_validation_image = 0.7
    assert len(single.data.validation) == 5
    # 3 steps an epoch: 12 in all, 2 done, 0.5 s each; validation is due after epochs 3 and 4
    single.progress.step = 2
    assert single._seconds_left(0.5) == pytest.approx(10 * 0.5 + 2 * 5 * 0.7, abs=1e-9)
    single.progress.epoch, single.progress.step = 3, 3
    assert single._seconds_left(0.5) == pytest.approx(5 * 0.7, abs=1e-9)


@pytest.mark.slow
def test_unreadable_images_are_replaced_and_listed(images, run, monkeypatch):
    data = samples.read_data(run / "split", images, SETTINGS)
    data.train.path(2).write_bytes(b"not an image")
    data.validation.path(1).write_bytes(b"")
    monkeypatch.setattr(loop, "MAX_UNREADABLE", 0.5)
    folder = fit(run, images)
    listed = json.loads((folder / "failures.json").read_text())
    assert listed == sorted([str(data.train.names[2]), str(data.validation.names[1])])
    manifest = json.loads((folder / "stage.json").read_text())
    assert manifest["recorded"]["unreadable"] == 2


# The plan that is said before the first step


def test_the_plan_by_hand(images, run, fresh_accelerate):
    single = make_trainer(run, images, replace(SETTINGS, accumulate=2, batch_size=2))
    assert single.plan() == (
        "4 images a step (processes x batch_size x accumulate: 1 x 2 x 2), 3 steps an epoch, 6 in "
        "all, learning rate up to 3e-05"
    )
    single = make_trainer(run, images, replace(SETTINGS, accumulate=2, batch_size=2, step_images=1))
    assert single.plan().endswith(
        "for 1 images a step: set another batch_size, or scale_lr: true, which multiplies them by 4"
    )


def test_rates_are_scaled_from_the_images_they_are_meant_for(images, run, fresh_accelerate):
    plain = make_trainer(run, images, SETTINGS)
    scaled = make_trainer(run, images, replace(SETTINGS, step_images=16, scale_lr=True))
    assert scaled.rates == [rate / 4 for rate in plain.rates]
    assert "NOTE" not in scaled.plan()
    note = make_trainer(run, images, replace(SETTINGS, step_images=2)).plan()
    assert "NOTE the recipe's rates are meant for 2 images a step: set batch_size 2, or" in note
    with pytest.raises(ValueError, match="scale_lr needs step_images"):
        TrainingSettings(scale_lr=True)
    settings = replace(SETTINGS, step_images=16, scale_lr=True)
    assert train.compared(settings, MachineSettings())["step_images"] == 16
    assert "step_images" not in train.compared(SETTINGS, MachineSettings())
