"""Nothing that a sample or a step does grows with the table: counted at two sizes."""

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.training_runs import MACHINE, SETTINGS
from vitgal.models.heads import ArcFace
from vitgal.models.network import build_model
from vitgal.training import fit, loop, networks, samples

SIZES = (100, 200_000)


def enlarged(part: samples.TrainingImages, count: int) -> samples.TrainingImages:
    """Few photographs behind `count` names."""
    chosen = np.arange(count) % len(part)
    table = pd.DataFrame({"path": part.names[chosen], "label": part.labels[chosen]})
    return samples.TrainingImages(part.folder, table, part.settings, part.augment)


def cost(work: Callable[[], object]) -> tuple[int, int]:
    """The lines of this package that `work` executes, and the bytes at its peak."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line" and "vitgal" in frame.f_code.co_filename
        return trace

    work()  # what is built at the first call
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return lines, peak


def same(costs: list[tuple[int, int]]) -> bool:
    """Whether neither lines nor memory grow; 200,000 entries are 200 kB at least."""
    (small, few), (large, several) = costs
    return abs(large - small) < 50 and several - few < 100_000


@pytest.mark.parametrize("augment", ["fast", "published", "none"])
def test_a_sample_costs_the_same_in_any_table(augment, images, run):
    part = samples.read_data(run / "split", images, replace(SETTINGS, augment=augment)).train
    large = [enlarged(part, count) for count in SIZES]
    assert same([cost(lambda dataset=dataset: dataset[1, 3]) for dataset in large])
    part.path(3).write_bytes(b"no image")  # the next one is taken
    assert same([cost(lambda dataset=dataset: dataset[1, 3]) for dataset in large])


def test_a_step_and_a_row_of_the_log_cost_the_same(images, run, fresh_accelerate):
    torch.set_num_threads(1)
    data = samples.read_data(run / "split", images, SETTINGS)
    trainers = []
    for count in SIZES:
        parts = {name: enlarged(getattr(data, name), count) for name in ("train", "validation")}
        model = build_model(SETTINGS.architecture, seed=0)
        network = networks.RetrievalNetwork(model, ArcFace(model.embed_dim, 3))
        settings = replace(SETTINGS, validate_every=2, epochs=40)
        options = fit.Fit(None, settings, MACHINE, run / "retrieval", run / "split", images)
        trainers.append(loop.Trainer(network, options, replace(data, **parts)))
    for single in trainers:
        single.network.train()
    batches = [single.read(single.batches(0)) for single in trainers]

    def step(trainer: loop.Trainer, read) -> None:
        trainer.pending.append(trainer.run_step([next(read)]))
        trainer.add_row(1, 1.0)

    assert same([cost(lambda at=at: step(*at)) for at in zip(trainers, batches, strict=True)])
