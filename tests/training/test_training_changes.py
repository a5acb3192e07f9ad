"""A run that goes on with other settings, without some images, or on other processes."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training_runs import (
    MACHINE,
    SETTINGS,
    die_after_step,
    exit_code,
    fit,
    make_trainer,
    rows,
    split,
)
from vitgal import runs
from vitgal.settings import TrainingSettings
from vitgal.settings.section import SettingsError
from vitgal.stages import describe
from vitgal.training import errors, loop, networks, samples

EAGER = replace(MACHINE, checkpoint_minutes=0.0)


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


def state(folder: Path) -> dict:
    return torch.load(folder / "state" / "last.pt", weights_only=True)


def killed(run: Path, images: Path, step: int, settings=SETTINGS, machine=EAGER) -> None:
    work = lambda: (die_after_step(step), fit(run, images, settings, machine))  # noqa: E731
    assert exit_code(work) == -signal.SIGKILL


def not_finite(monkeypatch, data: samples.SplitData, names: set[str]) -> None:
    """The loss of every batch that holds one of the images is not finite, as on day five."""
    to_device, forward = loop.Trainer.to_device, networks.RetrievalNetwork.forward
    bad = []

    def told(self, batch):
        bad[:] = [bool({str(data.train.names[index]) for index in batch.index.tolist()} & names)]
        return to_device(self, batch)

    def broken(self, pictures, labels):
        result = forward(self, pictures, labels)
        return result | {"loss": result["loss"] * (float("nan") if bad[0] else 1)}

    monkeypatch.setattr(loop.Trainer, "to_device", told)
    monkeypatch.setattr(networks.RetrievalNetwork, "forward", broken)


# Settings


def test_named_settings_change_on_resume_and_are_recorded(images, run):
    killed(run, images, 2)
    changed = replace(SETTINGS, lr=5e-4, clip_grad=1.0, precision="bf16")
    with pytest.raises(
        errors.TrainingError, match="lr: 0.001 there, 0.0005 now.*may_change: .clip"
    ):
        fit(run, images, changed)
    named = replace(changed, may_change=("lr", "clip_grad", "precision"))
    folder = fit(run, images, named)
    manifest = runs.read_json(folder / "stage.json")
    assert manifest["parameters"]["lr"] == 1e-3  # as the run was begun
    changes = manifest["recorded"]["changes"]
    step = changes[0]["step"]
    assert step in (1, 2)
    assert changes == [
        {"step": step, "setting": "clip_grad", "from": None, "to": 1.0},
        {"step": step, "setting": "lr", "from": 1e-3, "to": 5e-4},
        {"step": step, "setting": "precision", "from": "fp32", "to": "bf16"},
    ]
    log = rows(folder)
    (row,) = (row for row in log if "changed" in row)
    assert row["step"] == step + 1
    assert row["changed"] == "clip_grad None -> 1.0; lr 0.001 -> 0.0005; precision fp32 -> bf16"
    assert log[-1]["lr"] < 5e-4 + 1e-9
    assert fit(run, images, named) == folder  # the same command finds the stage finished


def test_unlisted_changes_are_refused(images, run):
    killed(run, images, 1)
    with pytest.raises(runs.StageError, match="weight_decay: 0.005 there, 0.1 now"):
        fit(run, images, replace(SETTINGS, weight_decay=0.1, lr=1e-4, may_change=("lr",)))
    with pytest.raises(SettingsError, match="may_change names weight_decay, which no resumed run"):
        TrainingSettings(may_change=("weight_decay",))


def test_a_change_and_back_is_recorded_twice(images, run):
    killed(run, images, 2)
    named = replace(SETTINGS, may_change=("lr",))
    killed(run, images, 2, replace(named, lr=5e-4))
    folder = fit(run, images, named)
    changes = runs.read_json(folder / "changes.json")["changes"]
    assert [(change["from"], change["to"]) for change in changes] == [(1e-3, 5e-4), (5e-4, 1e-3)]


# Losses that are not finite


def bad_images(run: Path, images: Path, epoch: int, step: int) -> tuple[samples.SplitData, list]:
    data = samples.read_data(run / "split", images, SETTINGS)
    batch = list(samples.Batches(len(data.train), 4, 1, 0, seed=0, epoch=epoch))[step]
    return data, [str(data.train.names[index]) for _, index in batch]


def test_bad_batches_are_skipped(images, run, monkeypatch, capsys):
    data, names = bad_images(run, images, 0, 1)
    not_finite(monkeypatch, data, set(names[:1]))
    folder = fit(run, images, replace(SETTINGS, epochs=1, skip_bad_batches=1))
    recorded = runs.read_json(folder / "stage.json")["recorded"]["skipped_batches"]
    assert recorded == [{"step": 1, "images": names}]
    log = rows(folder)
    assert [row.get("skipped_batches") for row in log] == [None, 1, None]
    assert "loss" not in log[1] and log[2]["loss"] > 0
    assert f"step 1 of epoch 0, images {', '.join(names)}: passed over" in capsys.readouterr().out
    weights = torch.load(folder / "state" / "last.pt", weights_only=True)["network"]
    assert all(value.isfinite().all() for value in weights.values())


def test_the_limit_on_bad_batches_covers_the_whole_run(images, run, monkeypatch):
    data, names = bad_images(run, images, 0, 1)
    again = [name for step in range(3) for name in bad_images(run, images, 1, step)[1]]
    name = next(name for name in names if name in again)
    not_finite(monkeypatch, data, {name})  # once in each epoch
    single = replace(SETTINGS, skip_bad_batches=1)
    with pytest.raises(errors.TrainingError, match="not finite at step . of epoch 1.*skip_images"):
        fit(run, images, single)
    # gone on from without the image
    further = replace(single, skip_images=(name,), may_change=("skip_images",))
    folder = fit(run, images, further)
    result = runs.read_json(folder / "changes.json")
    assert [change["to"] for change in result["changes"]] == [[name]]
    assert len(result["skipped_batches"]) == 1


def test_a_skipped_step_leaves_the_network_as_it_was(images, run, fresh_accelerate, monkeypatch):
    single = make_trainer(run, images, replace(SETTINGS, skip_bad_batches=1, ema_decay=0.9))
    data, names = bad_images(run, images, 0, 0)
    not_finite(monkeypatch, data, set(names))
    single.network.train()
    before = {key: value.clone() for key, value in single.bare.state_dict().items()}
    assert single.run_step([next(single.read(single.batches(0)))]) == {}
    assert all(torch.equal(value, before[key]) for key, value in single.bare.state_dict().items())
    assert (single.progress.step, len(single.optimizer.state)) == (1, 0)


def test_a_skipped_image_is_replaced_by_the_next(images, run):
    data = samples.read_data(run / "split", images, SETTINGS)
    name = str(data.train.names[4])
    without = samples.read_data(run / "split", images, replace(SETTINGS, skip_images=(name,)))
    assert (without.train[0, 4].index, without.train[0, 4].unreadable) == (5, -1)
    assert without.train[0, 5].index == 5
    with pytest.raises(errors.TrainingError, match="skip_images names none.jpg, which"):
        samples.read_data(run / "split", images, replace(SETTINGS, skip_images=("none.jpg",)))


# Another number of processes, batch size or accumulation


TWO = replace(EAGER, num_processes=2)
PAIR = replace(SETTINGS, batch_size=2, drop_path=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("row", [1, 50])  # with pending steps, or without
def test_two_processes_one_and_two_again(row, images, run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", row)
    plain = fit(split(tmp_path / "plain", images), images, PAIR, TWO)
    stops(run, images, PAIR, TWO, step=2)
    stops(run, images, replace(PAIR, accumulate=2), EAGER, step=4)
    folder = fit(run, images, PAIR, TWO)
    changes = runs.read_json(folder / "changes.json")["changes"]
    assert [(change["setting"], change["to"]) for change in changes] == [
        ("accumulate", 2),
        ("num_processes", 1),
        ("accumulate", 1),
        ("num_processes", 2),
    ]
    result, expected = state(folder)["network"], state(plain)["network"]
    # BatchNorm's statistics are rank 0's, or those of all accumulated batches.
    trained = [name for name in result if "running_" not in name and "batches" not in name]
    for name in trained:
        assert (result[name] - expected[name]).abs().max() < 1e-4, name
    log, wanted = rows(folder), rows(plain)
    assert [row["step"] for row in log] == [row["step"] for row in wanted]
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in wanted], abs=1e-3)
    assert fit(run, images, replace(PAIR, accumulate=2), EAGER) == folder  # finished for both


def stops(run: Path, images: Path, settings, machine, step: int) -> None:
    """SIGTERM after a step, which saves the state there."""
    run_step = loop.Trainer.run_step

    def told(self, batches):
        if self.finished_steps + 1 == step:
            self.termination.requested = "SIGTERM"
        return run_step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "run_step", told)
        with pytest.raises(errors.Preempted):
            fit(run, images, settings, machine)
    progress = state(run / "retrieval")["progress"]
    assert progress["epoch"] * 3 + progress["step"] == step


def test_the_same_images_a_step_in_other_batches(images, run, tmp_path):
    stops(run, images, SETTINGS, MACHINE, step=2)
    folder = fit(run, images, replace(SETTINGS, batch_size=2, accumulate=2))
    changes = runs.read_json(folder / "changes.json")["changes"]
    assert {change["setting"] for change in changes} == {"batch_size", "accumulate"}
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_other_images_a_step_only_where_asked_for(images, run):
    stops(run, images, SETTINGS, MACHINE, step=2)  # eight images of the first epoch
    smaller = replace(SETTINGS, batch_size=2)
    with pytest.raises(
        errors.TrainingError, match="batch_size: 4 there, 2 now; may_change: .batch"
    ):
        fit(run, images, smaller)
    folder = fit(run, images, replace(smaller, may_change=("batch_size",)))
    log = rows(folder)
    # 13 images: steps 0 to 3 of six are done
    assert [row["step"] for row in log] == [1, 2, 5, 6, 7, 8, 9, 10, 11, 12]
    assert log[2]["changed"] == "batch_size 4 -> 2"


def test_lost_pending_steps_are_missing_in_their_row_alone(images, run, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 50)
    stops(run, images, SETTINGS, MACHINE, step=2)
    path = run / "retrieval" / "state" / "last.pt"
    saved = torch.load(path, weights_only=True)
    saved["progress"]["pending"] = []
    torch.save(saved, path)
    folder = fit(run, images)
    assert [row["step"] for row in rows(folder)] == [3, 6]


def test_scores_record_the_changes_of_both_trainings(tmp_path):
    change = {"step": 7, "setting": "lr", "from": 1e-3, "to": 5e-4}
    none = {"changes": [], "skipped_batches": []}
    skipped = none | {"skipped_batches": [{"step": 9, "images": ["a.jpg"]}]}
    written = {"retrieval": none | {"changes": [change]}, "autoencoder": skipped}
    for stage, record in written.items():
        runs.write_json(tmp_path / stage / "changes.json", record)
    of_retrieval = ["retrieval, step 7: lr 0.001 -> 0.0005"]
    models = [tmp_path / stage / "model.safetensors" for stage in written]
    record = [describe.training_changes(model) for model in models]
    assert record[0] == {"training_changes": of_retrieval}
    assert record[1] == {"training_changes": [*of_retrieval, "autoencoder, step 9: skipped"]}
    for other in (tmp_path / "other" / "model.safetensors", "untrained:xcit_nano_12_p16_224"):
        assert describe.training_changes(other) == {}
    runs.write_json(tmp_path / "retrieval" / "changes.json", none)
    assert describe.training_changes(models[0]) == {}
