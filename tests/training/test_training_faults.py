"""Training that is killed, told to end or meets what is broken: it says so and goes on exactly."""

import gc
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training_runs import (
    AUTOENCODER,
    MACHINE,
    SETTINGS,
    XCIT,
    after_step,
    die_after_step,
    die_before_rename,
    die_inside_file,
    exit_code,
    fit,
    fit_autoencoder,
    in_child,
    kill,
    make_trainer,
    rows,
    split,
    write_images,
)
from vitgal import runs
from vitgal.app import train_command
from vitgal.data import splits
from vitgal.settings import MachineSettings
from vitgal.stages import train
from vitgal.training import checkpoints, errors, loop, memory, networks, processes, samples

# Every option that holds a state of its own or draws at random, and a state after each step.
MODERN = replace(
    XCIT,
    epochs=3,
    clip_grad=1.0,
    accumulate=2,
    batch_size=2,
    ema_decay=0.9,
    layer_decay=0.8,
    rand_augment=1,
    balanced=True,
    label_smoothing=0.1,
    sub_centres=2,
    sampled_classes=2,
    precision="bf16",
)
EAGER = replace(MACHINE, checkpoint_minutes=0.0)
STEPS = 3  # in an epoch of the small data
ONE_EPOCH = replace(SETTINGS, epochs=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """The images, and the folder of an uninterrupted run of every option on them."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        return images, fit(split(folder / "run", images), images, MODERN, EAGER)


def drawn(seed: int, last: int) -> int:
    return int(np.random.default_rng(seed).integers(1, last + 1))


@pytest.mark.slow
# Killed, by SIGKILL, at three seeded points. A state is written after each of the first two steps
# of an epoch, before its validation and at its end: 12 of them in three epochs.
@pytest.mark.parametrize(
    ("die", "number"),
    [
        (die_after_step, drawn(0, 3 * STEPS - 1)),
        pytest.param(die_before_rename, drawn(1, 12), marks=pytest.mark.slow),
        pytest.param(die_inside_file, drawn(2, 12), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_in_the_same_bytes(die, number, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    images, uninterrupted = whole
    run = split(tmp_path / "run", images)
    assert exit_code(lambda: (die(number), fit(run, images, MODERN, EAGER))) == -signal.SIGKILL
    folder = run / "retrieval"
    assert not (folder / "stage.json").exists()
    assert fit(run, images, MODERN, EAGER) == folder
    for name in ("model.safetensors", "state/best.safetensors"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert rows(folder) == rows(uninterrupted)
    assert len(rows(folder)) == 3 * STEPS
    assert not list(folder.rglob(f"{runs.TEMPORARY}*"))


# What the autoencoder's fit shares of these options; its last batch norm is the frozen backbone's.
CODES = replace(
    AUTOENCODER,
    clip_grad=1.0,
    accumulate=2,
    batch_size=2,
    ema_decay=0.9,
    rand_augment=1,
    label_smoothing=0.1,
    precision="bf16",
)


@pytest.fixture(scope="module")
def whole_codes(whole) -> tuple[Path, Path]:
    """The images, and the folder of an uninterrupted autoencoder on the run above."""
    images, retrieval = whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        return images, fit_autoencoder(retrieval.parent, images, CODES, EAGER)


# Six steps, and 8 states: after each of the first two steps of an epoch, before its validation and
# at its end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("die", "number"),
    [
        (die_after_step, drawn(3, 2 * STEPS - 1)),
        (die_before_rename, drawn(4, 8)),
        (die_inside_file, drawn(5, 8)),
    ],
)
def test_a_killed_autoencoder_ends_in_the_same_bytes(
    die, number, whole_codes, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    images, uninterrupted = whole_codes
    run = tmp_path / "run"
    for part in ("split", "retrieval"):
        shutil.copytree(uninterrupted.parent / part, run / part)
    killed = exit_code(lambda: (die(number), fit_autoencoder(run, images, CODES, EAGER)))
    assert killed == -signal.SIGKILL
    folder = run / "autoencoder"
    assert not (folder / "stage.json").exists()
    assert fit_autoencoder(run, images, CODES, EAGER) == folder
    for name in ("model.safetensors", "state/best.safetensors"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert rows(folder) == rows(uninterrupted)
    assert len(rows(folder)) == 2 * STEPS


@pytest.mark.slow
def test_the_last_two_states_and_the_best_are_kept(whole):
    _, folder = whole
    states = {
        name: torch.load(folder / "state" / f"{name}.pt", weights_only=True)["progress"]
        for name in ("last", "previous")
    }
    assert (states["last"]["epoch"], states["last"]["step"]) == (3, 0)
    assert (states["previous"]["epoch"], states["previous"]["step"]) == (2, STEPS)
    best = max(row["val_accuracy"] for row in rows(folder) if "val_accuracy" in row)
    assert states["last"]["best"] == best
    assert (folder / "state" / "best.safetensors").exists()


# Told to end


def preempted(
    run: Path, images: Path, machine: MachineSettings, step: int, number=signal.SIGTERM
) -> None:
    """A signal to the whole process group after a step, as a cluster or a terminal sends it."""
    signal.signal(number, signal.SIG_DFL)  # under nohup a hang-up is ignored
    after_step(step, lambda: os.killpg(0, number))
    try:
        fit(run, images, machine=machine)
    except errors.Preempted:
        os._exit(os.EX_TEMPFAIL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGHUP)]
)
def test_sigterm_saves_the_state_for_a_restart(
    workers, number, images, run, uninterrupted, monkeypatch
):
    # The workers would end by themselves only after the test's own time-out.
    monkeypatch.setattr(processes, "GRACE_SECONDS", 10_000)
    machine = replace(MACHINE, data_workers=workers)
    assert exit_code(lambda: preempted(run, images, machine, 1, number)) == 75
    folder = run / "retrieval"
    state = torch.load(folder / "state" / "last.pt", weights_only=True)
    # the step in which the signal is heard is the second, in the middle of a row of the log
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (0, 2)
    assert len(state["progress"]["pending"][0]) == 2 and not state["progress"]["rows"]
    fit(run, images, machine=machine)
    assert (folder / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()
    assert rows(folder) == rows(uninterrupted)


def test_a_lost_terminal_does_not_end_a_run_under_nohup(images, run):
    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        after_step(1, lambda: os.killpg(0, signal.SIGHUP))
        fit(run, images, ONE_EPOCH, replace(MACHINE, data_workers=1))

    assert exit_code(work) == 0
    assert (run / "retrieval" / "stage.json").exists()


def test_the_command_line_ends_with_75(monkeypatch, capsys, tmp_path):
    def stop(*_):
        raise errors.Preempted("asked to end")

    monkeypatch.setattr(train_command, "train", stop)
    params = Path(__file__).parents[2] / "params" / "tiny.yaml"
    assert train_command.main([str(params), "--output", str(tmp_path / "run")]) == 75
    assert "asked to end" in capsys.readouterr().err


# Losses that are not finite


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_state_before(images, run, uninterrupted, monkeypatch):
    forward, seen = networks.RetrievalNetwork.forward, []

    def broken(self, pictures, labels):
        result = forward(self, pictures, labels)
        seen.append(pictures)
        return result | {"loss": result["loss"] * (float("inf") if len(seen) == 5 else 1)}

    with monkeypatch.context() as patch:
        patch.setattr(networks.RetrievalNetwork, "forward", broken)
        with pytest.raises(errors.TrainingError, match="step 1 of epoch 1, images ") as error:
            fit(run, images)
    data = samples.read_data(run / "split", images, SETTINGS)
    order = list(samples.Batches(len(data.train), 4, 1, 0, seed=0, epoch=1))
    for _, index in order[1]:
        assert data.train.names[index] in str(error.value)
    # the weights before the step stand, so that the same run without the fault goes on exactly
    folder = fit(run, images)
    assert (folder / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()
    assert rows(folder) == rows(uninterrupted)


def test_weights_that_are_not_finite_are_not_saved(images, run, fresh_accelerate):
    broken = make_trainer(run, images, SETTINGS)
    with torch.no_grad():
        broken.network.head.weight.fill_(float("nan"))
    with pytest.raises(errors.TrainingError, match=r"step 0 of epoch 0, images [\w/]+\.jpg"):
        broken.run(None, False)
    assert not broken.checkpoints.last.exists()


# Data workers


def in_worker(action):
    """`read` of the training images that does something to the worker it runs in."""
    read, main = samples.TrainingImages.read, os.getpid()

    def changed(self, index):
        if os.getpid() != main:
            action()
        return read(self, index)

    return changed


def test_a_data_worker_collects_no_garbage_of_its_process(tmp_path, monkeypatch):
    """Not even before it begins: `torch.set_num_threads` is what a worker calls first."""
    processes_of_del, set_threads = tmp_path / "processes", torch.set_num_threads

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            with processes_of_del.open("a") as file:
                file.write(f"{os.getpid()}\n")

    def collecting(number):
        gc.collect()
        set_threads(number)

    monkeypatch.setattr(torch, "set_num_threads", collecting)
    machine = replace(MACHINE, data_workers=2)
    gc.disable()
    try:
        Cycle()
        batches = processes.read_batches([5, 6], [[1], [0]], machine, pin_memory=False)
        assert [batch.tolist() for batch in batches] == [[6], [5]]
        assert not processes_of_del.exists()
    finally:
        gc.enable()
        gc.collect()
    assert processes_of_del.read_text() == f"{os.getpid()}\n"


def test_a_dead_data_worker_permits_three_restarts(images, run, monkeypatch):
    machine = replace(MACHINE, data_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(samples.TrainingImages, "read", in_worker(kill))
        killed = run / "retrieval" / "state" / "killed.json"
        for count in (1, 3):
            with pytest.raises(errors.Preempted, match="no longer read.* worker .*pid.*goes on"):
                fit(run, images, machine=machine)
            assert len(runs.read_json(killed)) == count
            runs.write_json(killed, (2 * runs.read_json(killed))[:3])  # as after one more
        with pytest.raises(errors.TrainingError, match="time 4 within an hour") as record:
            fit(run, images, machine=machine)
        assert not isinstance(record.value, errors.Preempted)
        # an hour later, and where the clock has jumped back, it is the first time again
        for seconds in (-3601, 1e6):
            runs.write_json(killed, [time.time() + seconds] * 4)
            with pytest.raises(errors.Preempted):
                fit(run, images, machine=machine)
    assert (fit(run, images, machine=machine) / "stage.json").exists()


def test_too_little_shared_memory_is_reported_before_the_first_batch(images, run, monkeypatch):
    class Small:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    with pytest.raises(errors.TrainingError, match="shared memory .*--shm-size 2g, or lower"):
        fit(run, images, machine=replace(MACHINE, data_workers=1))
    fit(run, images, ONE_EPOCH)  # none is needed without workers
    # eight workers with two batches each, and the one that trains: 64 x 3 x 512 x 512 bytes
    with pytest.raises(errors.TrainingError, match="0.86 GB .* 1.71 GB in all, .* 0.00 GB"):
        processes.check_shared_memory(MachineSettings(data_workers=8), 64 * 3 * 512**2, 2)


@pytest.mark.slow
def test_a_silent_data_worker_ends_the_run(images, run, monkeypatch):
    monkeypatch.setattr(samples.TrainingImages, "read", in_worker(lambda: time.sleep(10_000)))
    before = set(multiprocessing.active_children())
    with pytest.raises(errors.TrainingError, match="timed out after"):
        fit(run, images, machine=replace(MACHINE, data_workers=1, timeout_minutes=1 / 60))
    # The worker is killed: one that waits for a disk hears no request, and the run would not end.
    assert set(multiprocessing.active_children()) <= before


def test_a_worker_that_dies_during_a_step_is_reported(images, run, monkeypatch):
    """Torch raises its death wherever the process is: here while a state is written."""

    def dead(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(checkpoints.torch, "save", dead)
    with pytest.raises(errors.TrainingError, match="no longer read: DataLoader worker .pid 1."):
        fit(run, images)


# The disk and the clock


@pytest.mark.slow
def test_a_slow_disk_and_a_clock_that_jumps_change_nothing(images, run, uninterrupted, monkeypatch):
    read, hours = samples.TrainingImages.read, itertools.count(start=500_000, step=-1)

    def late(self, index):
        time.sleep(0.02)  # at each open
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(samples.TrainingImages, "read", late)
        patch.setattr(time, "time", lambda: 3600.0 * next(hours))  # an hour back at each look
        folder = fit(run, images, machine=replace(MACHINE, data_workers=1))
    for name in ("model.safetensors", "state/best.safetensors"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert rows(folder) == rows(uninterrupted)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(row["images_per_second"] > 0 <= row["hours_left"] for row in log)


@pytest.mark.slow
def test_a_torn_log_of_tomorrow_is_written_anew(images, run, uninterrupted):
    state = interrupted(run, images)
    log = run / "retrieval" / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"epoch": 1, "st')
    assert len(checkpoints.read_rows(log)) == whole.count("\n") == 1
    tomorrow = time.time() + 86_400
    for path in (log, state):
        os.utime(path, (tomorrow, tomorrow))
    folder = fit(run, images)
    assert rows(folder) == rows(uninterrupted)
    assert (folder / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()


def test_the_rows_of_a_torn_log(tmp_path):
    log = tmp_path / "log.jsonl"
    for text, count in [("", 0), ('{"st', 0), ('{"step": 1}\n', 1), ('{"step": 1}\n{"step"', 1)]:
        log.write_text(text)
        assert len(checkpoints.read_rows(log)) == count
    log.write_bytes(b'{"step": 7}\n{"name": "caf\xc3')  # inside a letter
    assert checkpoints.read_rows(log)["step"].tolist() == [7]


def test_a_finished_run_s_damaged_log_is_named(trained):
    folder = trained / "retrieval"
    log = folder / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    with pytest.raises(runs.StageError, match=r"log\.jsonl is damaged .*overwrite: true"):
        train.read_log(folder)


def full_disk(run: Path, images: Path, settings, step: int, size: int, said: str) -> None:
    """After a step no file may grow beyond `size` bytes, which is what a full disk is like."""
    after_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    try:
        fit(run, images, settings)
    except errors.TrainingError as error:
        os._exit(41 if f"{said}: make room on the disk" in str(error) else 42)


@pytest.mark.parametrize("size", [0, 50_000])
def test_a_full_disk_before_the_first_state(size, images, run):
    output = "there is none before it"
    assert exit_code(lambda: full_disk(run, images, ONE_EPOCH, 1, size, output)) == 41
    folder = run / "retrieval"
    assert not list(folder.rglob("*.pt")) and not list(folder.rglob(f"{runs.TEMPORARY}*"))
    assert (fit(run, images, ONE_EPOCH) / "stage.json").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_state_before(images, run, uninterrupted):
    limit = 1_000_000  # less than a state
    output = "the one before it is whole"
    assert exit_code(lambda: full_disk(run, images, SETTINGS, STEPS + 1, limit, output)) == 41
    folder = run / "retrieval"
    for name in ("last", "previous"):
        state = torch.load(folder / "state" / f"{name}.pt", weights_only=True)
        assert state["progress"]["epoch"] <= 1
    assert not list(folder.rglob(f"{runs.TEMPORARY}*"))
    assert (fit(run, images) / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()


def interrupted(run: Path, images: Path) -> Path:
    """A run that was killed in its second epoch; its state's file."""
    assert exit_code(lambda: (die_after_step(STEPS + 1), fit(run, images))) == -signal.SIGKILL
    return run / "retrieval" / "state" / "last.pt"


@pytest.mark.slow
def test_a_damaged_state_is_passed_over_for_the_one_before(images, run, uninterrupted):
    state = interrupted(run, images)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="last.pt cannot be read.*continuing from previous.pt"):
        folder = fit(run, images)
    assert (folder / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_run_without_a_whole_state_is_refused(images, run):
    state = interrupted(run, images)
    for path in (state, state.with_name("previous.pt")):
        path.write_bytes(b"no state")
    with pytest.raises(errors.TrainingError, match="previous.pt cannot.*take state/ away"):
        fit(run, images)


# Bad input


@pytest.mark.slow
def test_the_state_of_another_run_is_refused(images, run, tmp_path):
    other = interrupted(split(tmp_path / "other", images), images)
    settings = replace(SETTINGS, seed=1)
    assert exit_code(lambda: (die_after_step(1), fit(run, images, settings))) == -signal.SIGKILL
    shutil.copytree(other.parent, run / "retrieval" / "state", dirs_exist_ok=True)
    with pytest.raises(errors.TrainingError, match="made by a run with other settings"):
        fit(run, images, settings)


@pytest.mark.slow
def test_two_runs_in_one_folder_at_once(images, run):
    stop = after_step_stop(run, images)
    with pytest.raises(runs.StageError, match="another process is working in"):
        fit(run, images)
    os.kill(stop.pid, signal.SIGKILL)  # which releases the lock
    stop.join()
    assert (fit(run, images) / "stage.json").exists()


def test_a_helper_that_lives_on_does_not_hold_the_folder(tmp_path):
    def stand() -> None:
        runs.disown_locks()
        os.kill(os.getpid(), signal.SIGSTOP)

    with runs.locked(tmp_path):
        helper = in_child(stand)
        os.waitpid(helper.pid, os.WUNTRACED)
        with pytest.raises(runs.StageError, match="another process"), runs.locked(tmp_path):
            pass  # the helper has given up its copy, not the lock
    with runs.locked(tmp_path):
        os.kill(helper.pid, signal.SIGKILL)
    helper.join()


def after_step_stop(run: Path, images: Path) -> multiprocessing.Process:
    """A child that stands still after its first step, holding the folder."""

    def stand() -> None:
        after_step(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        fit(run, images)

    child = in_child(stand)
    os.waitpid(child.pid, os.WUNTRACED)  # returns when it has stopped
    return child


def test_a_listed_image_that_is_missing(images, run):
    name = splits.read_split(run / "split", "train")["path"][3]
    (images / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 18 images of the split.*first {name}"):
        fit(run, images)


def change_labels(run: Path, change: dict[int, int]) -> None:
    table = splits.read_split(run / "split", "train")
    table = table.assign(label=table["label"].replace(change))
    table.to_csv(run / "split" / "train.csv", index=False)


def test_a_label_beyond_the_classes(images, run):
    change_labels(run, {1: 7})
    with pytest.raises(ValueError, match="label 7 in row 4, .* classes 0 to 2"):
        samples.read_data(run / "split", images, SETTINGS)


def test_a_negative_label(images, run):
    change_labels(run, {0: -1})
    with pytest.raises(ValueError, match="label -1 in row 0"):
        samples.read_data(run / "split", images, SETTINGS)


def test_an_empty_class(images, run):
    change_labels(run, {1: 2})
    with pytest.raises(ValueError, match="1 of the 3 classes have no image .*class 1 first"):
        samples.read_data(run / "split", images, SETTINGS)


def test_a_split_without_images(images, run):
    table = splits.read_split(run / "split", "train")
    table[:0].to_csv(run / "split" / "train.csv", index=False)
    with pytest.raises(ValueError, match="lists no image"):
        samples.read_data(run / "split", images, SETTINGS)


def test_a_batch_larger_than_the_data(images, run):
    with pytest.raises(errors.TrainingError, match="make batch_size smaller"):
        fit(run, images, replace(SETTINGS, batch_size=6, accumulate=3))


# Memory


@pytest.mark.parametrize(("available", "fitting"), [(500, 40), (509, 40), (740, 64), (100, 0)])
def test_the_dry_run_names_the_batch_that_fits(available, fitting):
    def measure(count):  # bytes: 100 for the network and 10 an image
        return 100 + 10 * count

    with pytest.raises(errors.TrainingError, match=f"batch of 65 .* about {fitting} would fit"):
        memory.check_batch_size(65, measure, available)
    memory.check_batch_size(fitting, measure, available)


def test_trying_a_step_leaves_no_trace(images, run, fresh_accelerate):
    single = make_trainer(run, images, SETTINGS)
    before = {key: value.clone() for key, value in single.bare.state_dict().items()}
    single.try_step(2)
    after = single.bare.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in single.bare.parameters())


def test_out_of_memory_is_reported(images, run, fresh_accelerate, monkeypatch):
    def full(self, pictures, labels):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(networks.RetrievalNetwork, "forward", full)
    with pytest.raises(errors.TrainingError, match="step 0 of epoch 0 with batch_size 4; halve"):
        make_trainer(run, images, SETTINGS).run(None, False)
