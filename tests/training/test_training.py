"""Training: the schedule, the order, what is random, resuming, and what stops a run."""

import math
import signal
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from tests.training_runs import (
    NANO,
    SETTINGS,
    XCIT,
    die_after_step,
    exit_code,
    fit,
    fit_autoencoder,
    make_trainer,
)
from vitgal import runs
from vitgal.data import splits
from vitgal.models import inference, weights
from vitgal.models.network import build_model
from vitgal.settings import MachineSettings, SplitSettings, TrainingSettings
from vitgal.stages import split as stages_split, train as stages_train
from vitgal.training import augmentation, diagnostics, errors, networks, samples

# The schedule


def test_learning_rates_are_the_published_ones():
    rates = networks.learning_rates(TrainingSettings())
    assert len(rates) == 40
    # The published run's values, to the digits in which they are known
    assert rates[0] == rates[1] == 3e-5
    assert [f"{rate:.3e}" for rate in rates[2:5]] == ["4.992e-05", "4.969e-05", "4.931e-05"]
    assert f"{rates[-1]:.2e}" == "4.07e-07"
    # and every epoch from the cosine itself, stepped one epoch late
    for epoch in range(2, 40):
        cosine = 1 + math.cos(math.pi * (epoch - 1) / 40)
        assert rates[epoch] == pytest.approx(1e-7 + (5e-5 - 1e-7) * cosine / 2, rel=1e-12)


def test_one_epoch_trains_at_the_warm_up_rate():
    assert networks.learning_rates(TrainingSettings(epochs=1)) == [3e-5]


def test_no_warm_up_starts_at_the_full_rate():
    rates = networks.learning_rates(TrainingSettings(epochs=3, warmup_epochs=0))
    assert rates[:2] == [5e-5, 5e-5]


@pytest.mark.parametrize(
    "wrong", [{"augment": "strong"}, {"precision": "int4"}, {"image_size": 100}]
)
def test_a_recipe_names_its_wrong_value(wrong):
    (value,) = wrong.values()
    with pytest.raises(ValueError, match=str(value)):
        TrainingSettings(**wrong)


def test_auto_precision_is_resolved_and_recorded():
    resolved = inference.resolve_precision("auto", forks=True)
    assert resolved in ("bf16", "fp32")
    compared = stages_train.compared(TrainingSettings(), MachineSettings())
    assert compared["precision"] == resolved
    assert "data_workers" not in compared


# Order and randomness


def test_ranks_share_an_epoch_without_overlap():
    def batches(rank: int, epoch: int = 0, first: int = 0) -> list[list[int]]:
        shares = samples.Batches(11, 2, 2, rank, seed=3, epoch=epoch, first=first)
        assert len(shares) == len(list(shares))
        return [[index for _, index in batch] for batch in shares]

    zero, single = batches(0), batches(1)
    assert [len(batch) for batch in zero + single] == [
        2,
        2,
        2,
        2,
    ]  # 11 // (2 * 2) steps, rest dropped
    assert len(set(sum(zero + single, []))) == 8
    assert batches(0, first=1) == zero[1:]
    assert batches(0, epoch=1) != zero
    assert batches(0) == zero


def test_no_whole_batch_is_no_batch():
    assert list(samples.Batches(3, 4, 1, 0, seed=0, epoch=0)) == []


@pytest.mark.parametrize("augment", ["published", "fast"])
def test_a_sample_depends_on_seed_epoch_and_index_alone(augment, images, run):
    recipe = replace(SETTINGS, augment=augment)
    first, again = (samples.read_data(run / "split", images, recipe).train for _ in range(2))
    other = samples.read_data(run / "split", images, replace(recipe, seed=1)).train
    np.random.seed(1)  # the global generators must not matter
    torch.manual_seed(1)
    picture, _, label, index, unreadable, _ = first[2, 3]
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
    assert (label, index, unreadable) == (first.labels[3], 3, -1)
    again[0, 0]
    assert torch.equal(picture, again[2, 3][0])
    assert not torch.equal(picture, first[3, 3][0])
    assert not torch.equal(picture, other[2, 3][0])


def test_large_photographs_are_decoded_at_a_reduced_scale_for_fast_alone(images, run):
    recipe = replace(SETTINGS, image_size=64)  # never enlarged: 1.6 * 64 = 102.4 pixels a side
    train = samples.read_data(run / "split", images, recipe).train
    image = np.full((412, 640, 3), (0, 100, 200), np.uint8)
    cv2.imwrite(str(train.path(0)), image)
    cv2.imwrite(str(train.path(1)), image[:411])
    assert train.read(0).shape == (103, 160, 3)  # a quarter
    assert train.read(1).shape == (206, 320, 3)  # a quarter would be 102.75 pixels high
    assert train[0, 0].picture.shape == (3, 64, 64)
    whole = samples.read_data(run / "split", images, replace(recipe, augment="published"))
    assert whole.train.read(0).shape == image.shape
    assert whole.validation.augment == "none"


class NoDraw:
    """Draws that leave an image as it is: no step is taken, no change is made."""

    def random(self) -> float:
        return 0.99


class HoleAt:
    """Draws a hole at (3, 5)."""

    def random(self) -> float:
        return 0.0

    def integers(self, high: int, size: int) -> np.ndarray:
        return np.array([3, 5])


@pytest.mark.parametrize("transform", [augmentation.augment_published, augmentation.augment_fast])
def test_without_any_draw_an_image_is_only_squashed(transform):
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = (255, 128, 0)
    picture = transform(image, 32, NoDraw())
    assert picture.shape == (32, 32, 3)
    # the square's inside and the ground, away from their borders, whatever the interpolation
    assert np.array_equal(picture[10:22, 10:22], np.broadcast_to([255, 128, 0], (12, 12, 3)))
    assert not picture[:7].any()


def test_the_hole_is_a_quarter_of_the_side():
    holes = [augmentation.draw_hole(64, np.random.default_rng(seed)) for seed in range(40)]
    # of forty draws at p 0.5 some cut it, some do not
    assert {side for _, _, side in holes} == {0, 16}
    assert all(0 <= location <= 64 - 16 for hole in holes for location in hole[:2])


def test_the_network_sees_normalised_pictures_with_holes():
    pictures = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    seen = augmentation.network_input(pictures, torch.tensor([[1, 2, 2], [0, 0, 0]]))
    # white in red: (1 - 0.485) / 0.229 = 2.2489; float32's rounding
    assert seen[1, 0].numpy() == pytest.approx(np.full((4, 4), 2.2489), abs=1e-4)
    hole = torch.zeros(4, 4, dtype=torch.bool)
    hole[1:3, 2:4] = True  # top 1, left 2, side 2
    assert torch.equal(seen[0, 0] == 0, hole)
    assert torch.equal(seen[0, 0][~hole], seen[1, 0][~hole])
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    plain = augmentation.network_input(
        torch.from_numpy(image).permute(2, 0, 1)[None], torch.zeros(1, 3, dtype=torch.int64)
    )
    assert torch.equal(plain, inference.network_input(image[None], "cpu"))  # as at test time
    visible = augmentation.displayable(pictures[0], (1, 2, 2))
    # the hole is ImageNet's mean colour: 0.485 * 255 = 123.7, 0.456 * 255 = 116.3, 103.5
    assert visible[1, 2].tolist() == [124, 116, 104] and visible[0, 0].tolist() == [255] * 3


def test_the_published_hole_is_black_and_the_fast_one_of_the_mean_colour(images, run):
    # As published the hole is zero before the normalisation: (0 - 0.485) / 0.229 = -2.1179 in red.
    for augment, wanted in (("published", -2.1179), ("fast", 0.0)):
        recipe = replace(SETTINGS, image_size=64, augment=augment)
        train = samples.read_data(run / "split", images, recipe).train
        train.transform = lambda image, size, rng: cv2.resize(
            image, (size, size)
        )  # only a hole is drawn
        picture, hole = train.change(np.full((64, 64, 3), 255, np.uint8), 64, HoleAt())
        seen = augmentation.network_input(picture[None], hole[None])[0, 0]
        dark = torch.zeros(64, 64, dtype=torch.bool)
        dark[3:19, 5:21] = True  # a quarter of the side, where the draw puts it
        assert seen[dark].numpy() == pytest.approx(np.full(256, wanted), abs=1e-4)
        assert (seen[~dark] > 2).all()


# One run


def test_a_fit_writes_a_model_without_classifier_and_is_reused(images, run):
    handler = signal.getsignal(signal.SIGTERM)
    folder = fit(run, images, XCIT)
    assert signal.getsignal(signal.SIGTERM) is handler  # the process's own again
    model = weights.load_model(folder / "model.safetensors")
    assert model.code_dim is None and model.embed_dim == 128
    log = stages_train.read_log(folder)
    assert log["epoch"].tolist() == [0, 1]
    steps = len(splits.read_split(run / "split", "train")) // 4  # whole batches of four
    assert log["step"].tolist() == [steps, 2 * steps] and steps > 0
    assert log["val_accuracy"].between(0, 1).all()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert fit(run, images, XCIT) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(runs.StageError, match=r"lr: 0\.001 there, 0\.002 now"):
        fit(run, images, replace(XCIT, lr=0.002))


@pytest.mark.slow
def test_retrieval_is_scored_on_landmarks_that_are_not_trained(tmp_path, images):
    run = tmp_path / "retrieval"
    stages_split.make_split(
        run,
        SplitSettings(val_share=0.2, held_out_classes=1, val_queries=2, val_database=4),
        train_table=images / "train.csv",
        image_folder=images,
    )
    data = samples.read_data(run / "split", images, SETTINGS)
    assert (len(data.queries), len(data.database)) == (2, 4)
    assert set(data.validation.labels[[*data.queries, *data.database]]) == {-1}  # held out
    # All of one landmark: every database image is right, in whatever order.
    features = torch.randn(len(data.validation), 4, generator=torch.Generator().manual_seed(0))
    halves = [(np.arange(len(features))[location::2], features[location::2]) for location in (0, 1)]
    parts = [(index, {"features": half}) for index, half in halves]
    # One landmark has no interval.
    none = {"val_map_low": np.nan, "val_map_high": np.nan}
    assert data.score(parts) == pytest.approx({"val_map": 1.0} | none, nan_ok=True)
    # One right image of four. The first query finds it first: AP 1. The second finds it last, at
    # rank 3: AP (0 / 3 + 1 / 4) / 2 = 0.125.
    features = torch.zeros(len(data.validation), 4)
    features[data.database.tolist()] = torch.eye(4)
    features[data.queries[0]] = torch.tensor([0.9, 0.3, 0.2, 0.1])
    features[data.queries[1]] = torch.tensor([0.1, 0.2, 0.3, 0.9])
    data.ground_truth.easy[:] = [np.array([0])] * 2
    scores = data.score([(np.arange(len(features)), {"features": features})])
    assert scores == pytest.approx({"val_map": 0.5625} | none, nan_ok=True)
    # The retrieval set is looked at after every epoch, all validation images after every second.
    log = stages_train.read_log(fit(run, images, replace(SETTINGS, epochs=3, validate_every=2)))
    assert log["val_map"].between(0, 1).all()
    assert log[["val_map_low", "val_map_high"]].isna().all(axis=None)
    assert log["val_accuracy"].notna().tolist() == [False, True, True]


def test_a_replaced_validation_image_keeps_its_place(images, run, fresh_accelerate, monkeypatch):
    single = make_trainer(run, images, SETTINGS)
    count = len(single.data.validation)
    single.data.validation.path(count - 1).write_bytes(b"")  # image 0 stands for it
    places = []

    def score(_, parts):
        places.extend(location for result, _ in parts for location in result.tolist())

    monkeypatch.setattr(samples.SplitData, "score", score)
    single.validate(range(count))
    assert places == list(range(count))


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(images, run, uninterrupted):
    name = "model.safetensors"
    assert (fit(run, images) / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_state_of_other_settings_is_refused(images, run):
    assert exit_code(lambda: (die_after_step(4), fit(run, images))) == -signal.SIGKILL
    folder = run / "retrieval"
    assert not (folder / "stage.json").exists()
    with pytest.raises(runs.StageError, match="was interrupted"):
        stages_train.read_log(folder)
    with pytest.raises(runs.StageError, match="seed: 0 there, 1 now"):
        fit(run, images, replace(SETTINGS, seed=1))


def test_a_state_within_an_epoch_resumes_there(images, run, fresh_accelerate):
    single = make_trainer(run, images, SETTINGS)
    batches = list(single.read(single.batches(0)))
    single.network.train()
    single.run_step(batches[:1])
    single.save_state()
    other = make_trainer(run, images, SETTINGS)
    other.load_state()
    assert other.progress.step == 1
    other.network.train()
    results = [item.run_step(batches[1:2])["loss"] for item in (single, other)]
    assert torch.equal(*results)
    # the state before the last one stands beside it
    single.save_state()
    assert (run / "retrieval" / "state" / "previous.pt").exists()


def test_an_unreadable_image_is_replaced_and_counted(images, run):
    data = samples.read_data(run / "split", images, SETTINGS)
    data.train.path(2).write_bytes(b"not an image")
    _, _, label, index, unreadable, _ = data.train[0, 2]
    assert (index, unreadable) == (3, 2)
    assert label == data.train.labels[3]
    with pytest.raises(errors.TrainingError, match=f"1 training images.*{data.train.path(2)}"):
        fit(run, images)


def test_no_readable_image_is_reported(images, run):
    data = samples.read_data(run / "split", images, SETTINGS)
    for index in range(len(data.train)):
        data.train.path(index).write_bytes(b"")
    with pytest.raises(errors.TrainingError, match="none of the"):
        data.train[0, 0]


def test_a_missing_image_folder_is_reported(images, run):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(run, images / "nowhere")


def test_training_without_a_split_names_the_notebook(tmp_path, images):
    with pytest.raises(runs.StageError, match="01_data_split"):
        fit(tmp_path / "other", images)


# The autoencoder


@pytest.mark.slow
def test_the_autoencoder_leaves_the_backbone_alone(images, trained):
    retrieval = trained / "retrieval"
    folder = fit_autoencoder(trained, images)
    model = weights.load_model(folder / "model.safetensors")
    assert model.code_dim == 8
    assert diagnostics.same_backbone(model, retrieval / "model.safetensors")
    with torch.no_grad():
        next(model.backbone.parameters())[...] += 1e-6
    assert not diagnostics.same_backbone(model, retrieval / "model.safetensors")
    log = stages_train.read_log(folder)
    assert (log["reconstruction"] > 0).all() and (log["val_reconstruction"] > 0).all()


def test_the_autoencoder_without_a_model_names_the_notebook(images, run):
    with pytest.raises(runs.StageError, match="02_train"):
        fit_autoencoder(run, images)


def test_lost_variance_is_one_for_the_mean_token_and_zero_for_a_copy():
    model = build_model(NANO, code_dim=128, seed=0)
    photographs = [np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)] * 2
    with torch.no_grad():
        for layer in (model.autoencoder.encoder, model.autoencoder.decoder):
            layer.weight.copy_(torch.eye(128))
            layer.bias.zero_()
    # an identity matrix copies to float32's rounding
    assert diagnostics.lost_variance(model, photographs, size=48) < 1e-10
    inputs = inference.network_input(photographs[0][None], "cpu").contiguous()
    tokens = model.token_features(inputs).tokens[0]
    with torch.no_grad():
        model.autoencoder.decoder.weight.zero_()
        model.autoencoder.decoder.bias.copy_(tokens.mean(0))
    assert diagnostics.lost_variance(model, photographs, size=48) == pytest.approx(1, abs=1e-5)
    maps = diagnostics.token_maps(model, photographs, size=48)
    assert {key: [single.shape for single in value] for key, value in maps.items()} == {
        "tokens": [(3, 3, 128)] * 2,
        "error": [(3, 3)] * 2,
        "backbone_attention": [(3, 3)] * 2,
        "attention": [(3, 3)] * 2,
    }
