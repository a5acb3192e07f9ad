"""Small trainings for tests: noise images of three classes, runs on them, children that die."""

import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from vitgal.data import gldv2
from vitgal.models.heads import ArcFace
from vitgal.models.network import build_model
from vitgal.settings import (
    AutoencoderSettings,
    MachineSettings,
    SplitSettings,
    TrainingSettings,
)
from vitgal.stages import split as stages_split, train
from vitgal.training import checkpoints, fit as fits, loop, networks, samples

CLASSES, IMAGES = 3, 6  # images of each class
NANO = "xcit_nano_12_p16_224"
SETTINGS = TrainingSettings(
    architecture="timm:test_vit",  # an eighth of XCiT's smallest, for all that trains any network
    image_size=32,
    epochs=2,
    batch_size=4,
    lr=1e-3,
    augment="fast",
    precision="fp32",
)
XCIT = replace(SETTINGS, architecture=NANO)
AUTOENCODER = AutoencoderSettings(
    image_size=32,
    epochs=2,
    batch_size=4,
    lr=1e-3,
    augment="fast",
    precision="fp32",
    code_dim=8,
)
MACHINE = MachineSettings(threads=1, data_workers=0)
CLOCK = ["images_per_second", "hours_left"]  # columns of the log that depend on it


def write_images(folder: Path, images: int = IMAGES) -> Path:
    """A table and its photographs: noise around one colour a class."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for label in range(CLASSES):
        for index in range(images):
            name = f"{label:x}{index:x}{'0' * 14}"
            path = folder / gldv2.image_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 80, (40, 56, 3)) + 60 * label
            cv2.imwrite(str(path), image.astype(np.uint8))
            rows.append((name, 10 * label))
    pd.DataFrame(rows, columns=["id", "landmark_id"]).to_csv(folder / "train.csv", index=False)
    return folder


def split(run: Path, images: Path) -> Path:
    """Splits the images into `<run>/split`; returns the run."""
    stages_split.make_split(
        run,
        SplitSettings(val_share=0.2, val_queries=0),
        train_table=images / "train.csv",
        image_folder=images,
    )
    return run


def fit(
    run: Path,
    images: Path,
    settings: TrainingSettings = SETTINGS,
    machine: MachineSettings = MACHINE,
    **options,
) -> Path:
    """Trains the retrieval model without a bar."""
    return train.fit_retrieval(
        run, settings, machine, image_folder=images, progress=False, **options
    )


def fit_autoencoder(
    run: Path,
    images: Path,
    settings: AutoencoderSettings = AUTOENCODER,
    machine: MachineSettings = MACHINE,
) -> Path:
    """Trains the autoencoder without a bar."""
    return train.fit_autoencoder(run, settings, machine, image_folder=images, progress=False)


def rows(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    result = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in CLOCK} for row in result]


def make_trainer(run: Path, images: Path, settings: TrainingSettings = SETTINGS) -> loop.Trainer:
    """A trainer of the retrieval model in this process, at its beginning."""
    data = samples.read_data(run / "split", images, settings)
    model = build_model(settings.architecture, seed=0)
    network = networks.RetrievalNetwork(model, ArcFace(model.embed_dim, data.classes))
    torch.set_num_threads(1)
    options = fits.Fit(None, settings, MACHINE, run / "retrieval", run / "split", images)
    return loop.Trainer(network, options, data)


def in_child(work: Callable[[], object]) -> multiprocessing.Process:
    """Runs `work` in a forked child, in a process group of its own; returns it when begun."""

    def alone() -> None:
        os.setsid()
        torch.set_num_threads(1)  # threads do not survive a fork
        cv2.setNumThreads(0)
        work()

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    return child


def exit_code(work: Callable[[], object]) -> int:
    """The exit code of a child that does `work`: minus the signal that ended it."""
    child = in_child(work)
    child.join()
    return child.exitcode


# Hooks: each makes the process that calls it do something to itself at a chosen point


def after_step(number: int, action: Callable[[], None]) -> None:
    """`action` after the number-th step of this process."""
    step = loop.Trainer.run_step
    done = 0

    def counted(self, *arguments):
        nonlocal done
        result = step(self, *arguments)
        done += 1
        if done == number:
            action()
        return result

    loop.Trainer.run_step = counted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(number: int) -> None:
    after_step(number, kill)


def die_before_rename(number: int) -> None:
    """SIGKILL when the number-th state is written under its temporary name and not yet renamed."""
    rename, seen = os.replace, 0

    def counted(source, target):
        nonlocal seen
        seen += Path(target).name == "last.pt"
        if seen == number:
            kill()
        rename(source, target)

    os.replace = counted


def die_inside_file(number: int) -> None:
    """SIGKILL when half of the number-th state is on the disk."""
    save, seen = checkpoints.torch.save, 0

    def counted(state, handle):
        nonlocal seen
        seen += 1
        if seen == number:
            whole = io.BytesIO()
            save(state, whole)
            handle.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            handle.flush()
            kill()
        save(state, handle)

    checkpoints.torch.save = counted
