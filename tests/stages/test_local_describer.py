"""Images on their way to the network: decoded ahead, counted, in batches that fit."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tqdm import tqdm

from tests.mini_benchmark import LOCAL, MACHINE
from vitgal.data.images import ImageError
from vitgal.settings import GlobalSettings, MachineSettings
from vitgal.stages.images import AHEAD, ImageTask, load_image, prefetch
from vitgal.stages.local_describer import LocalDescriber

HIDDEN = tqdm(disable=True)


def tasks(count: int) -> list[ImageTask]:
    return [ImageTask(str(i), Path("x")) for i in range(count)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetch_keeps_order_and_errors(threads):
    def load(task):
        if task.key == "5":
            raise ImageError(task.path, "cut")
        return task.key * 2

    results = list(prefetch(load, tasks(40), threads))
    assert [task for task, _ in results] == tasks(40)
    assert isinstance(results.pop(5)[1], ImageError)
    assert all(image == task.key * 2 for task, image in results)


@pytest.mark.parametrize("threads", [0, 2])
def test_prefetch_stays_a_little_ahead(threads):
    """Tasks are taken as they are needed, not all at once: a million would not fit."""
    used = []

    def endless():
        for task in tasks(1000):
            used.append(task)
            yield task

    stream = prefetch(lambda task: task.key, endless(), threads)
    next(stream)
    assert len(used) <= AHEAD * threads + 1
    stream.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_an_image_that_vanishes_is_one_failed_image(tmp_path, threads):
    tasks = [ImageTask("a", tmp_path / "a.jpg"), ImageTask("b", tmp_path / "b.jpg")]
    cv2.imwrite(str(tmp_path / "b.jpg"), np.zeros((32, 32, 3), np.uint8))
    load = functools.partial(load_image, size=32, resize_mode="squash")
    (_, gone), (_, loaded) = prefetch(load, tasks, threads)
    assert isinstance(gone, ImageError) and gone.reason == "the file is gone"
    assert loaded.pixels.shape == (32, 32, 3)


def test_other_errors_stop():
    def load(task):
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        list(prefetch(load, tasks(1), 2))


def test_the_bar_counts_every_image(model, finished, capsys):
    describer = LocalDescriber(model, GlobalSettings(size=32), MACHINE, "fp32")
    folder = finished / "benchmark" / "jpg"
    images = [ImageTask(f"{i}", folder / f"image{i}.jpg") for i in range(6)]
    with tqdm(total=6) as bar:
        blocks = list(describer.describe_blocks([images[:4], images[4:]], bar))
    assert [rows.any(axis=1).tolist() for rows, _ in blocks] == [[True] * 4, [True] * 2]
    assert all(failures == [] for _, failures in blocks)
    assert "6/6" in capsys.readouterr().err


class Cramped(torch.nn.Module):
    """A model that runs out of memory above some number of images, as a GPU does."""

    def __init__(self, model, most: int):
        super().__init__()
        self.model, self.most = model, most
        self.embed_dim, self.code_dim = model.embed_dim, model.code_dim
        self.on_timm = False
        self.patch, self.multiple = model.patch, model.multiple

    def global_features(self, images):
        return self._fits(images) or self.model.global_features(images)

    def token_codes(self, images):
        return self._fits(images) or self.model.token_codes(images)

    def _fits(self, images) -> None:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_halves_the_batch(model, finished, capsys):
    """Seven images in one batch go through as 7, 3, 1, 1, …: said twice, for 7 and for 3."""
    task = ImageTask("a", finished / "benchmark/jpg/image0.jpg")
    machine = MachineSettings(batch_size=7, local_batch_size=4, read_threads=0)
    described = []
    for network in (Cramped(model, 2), model):
        describer = LocalDescriber(network, GlobalSettings(size=64), machine, "fp32")
        ((rows, _),) = describer.describe_blocks([[task] * 14], HIDDEN)
        described.append(rows)
    np.testing.assert_allclose(*described, atol=1e-5)  # sums of batches of another size
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("memory with ")[1] for line in lines] == [
        "7 images at once: going on with 3",
        "3 images at once: going on with 1",
    ]
    describer = LocalDescriber(Cramped(model, 2), LOCAL, machine, "fp32")
    with describer.stream([task] * 4, HIDDEN) as images:
        items, _ = describer.local_items(images, list("abcd"))
    assert [key for key, _ in items] == list("abcd")
    assert all(len(features) > 0 for _, features in items)


def test_one_image_that_does_not_fit(model, finished):
    describer = LocalDescriber(Cramped(model, 0), GlobalSettings(size=64), MACHINE, "fp32")
    task = ImageTask("a", finished / "benchmark/jpg/image0.jpg")
    with pytest.raises(RuntimeError, match="one image alone does not fit"):
        list(describer.describe_blocks([[task]], HIDDEN))


def test_selection_in_threads_gives_the_same(model, finished):
    """As on a GPU, where tokens are selected while the next batches run."""
    folder = finished / "benchmark" / "jpg"
    images = [ImageTask(f"{at}", folder / f"image{at % 6}.jpg") for at in range(9)]
    keys = [task.key for task in images]
    machine = MachineSettings(local_batch_size=1, read_threads=0)
    alone = LocalDescriber(model, LOCAL, machine, "fp32")
    with ThreadPoolExecutor(2) as selectors:
        results = []
        for describer in (alone, replace(alone, selectors=selectors, graphs=None)):
            with describer.stream(images, HIDDEN) as loaded:
                results.append(describer.local_items(loaded, keys))
    for (key, first), (other, second) in zip(results[0][0], results[1][0], strict=True):
        assert key == other and len(first) > 0
        for name in ("keypoints", "descriptors", "scores", "scales"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
