"""Describes images on this machine: images go through the network in batches."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from vitgal.data.images import ImageError
from vitgal.features import store
from vitgal.features.codes import Codes
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import Frame
from vitgal.models import descriptors, inference
from vitgal.models.describers import Describer
from vitgal.models.graphs import Graphs
from vitgal.models.local_extractors import LocalExtractor, make_extractor
from vitgal.models.prepared import is_prepared, prepare
from vitgal.models.token_network import TokenNetwork, local_network
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings
from vitgal.stages.images import (
    Failure,
    ImageTask,
    LoadedImage,
    LoadedImages,
    ShardTask,
    load_image,
    prefetch,
)

StageSettings = GlobalSettings | LocalSettings
BATCHES_AHEAD = 2  # on a GPU, whose tokens are not yet selected
SELECTORS = 2  # threads; more wait for Python's lock


def load_images(
    tasks: Iterable[ImageTask],
    settings: StageSettings,
    machine: MachineSettings,
    multiple: int | None = None,
) -> Iterator[tuple[ImageTask, LoadedImage | ImageError]]:
    """Yields each task with its network input or its ImageError, in order.

    multiple: of the sides of inputs for local features; None: as published.
    """
    # As published, local features keep the aspect ratio.
    mode = settings.resize if isinstance(settings, GlobalSettings) else "area"
    multiple = settings.multiple if isinstance(settings, GlobalSettings) else multiple
    load = partial(load_image, size=settings.size, resize_mode=mode, multiple=multiple)
    return prefetch(load, tasks, machine.read_threads)


@dataclass(frozen=True, eq=False)
class LocalDescriber:
    """What describes images on this machine, with its settings.

    memory: a batch that does not fit the device is halved, as are all after it. extractor: finds
    local features in place of the network's tokens. selectors: threads that select tokens while a
    GPU computes; None on a CPU, which has nothing else to do. graphs: of the network at all scales.
    """

    model: Describer | TokenNetwork | None  # None for an `extractor` alone
    settings: StageSettings
    machine: MachineSettings
    precision: str  # "fp32" or "bf16"
    memory: inference.BatchLimit = field(default_factory=inference.BatchLimit)
    extractor: LocalExtractor | None = None
    selectors: ThreadPoolExecutor | None = None
    graphs: Graphs | None = None

    @property
    def code_dim(self) -> int:
        """Dimension of a local descriptor; ValueError for a network without autoencoder."""
        return self.extractor.code_dim if self.extractor else descriptors.require_codes(self.model)

    def running(self) -> contextlib.AbstractContextManager:
        """Opens the context in which images are described."""
        if self.model is None:
            return contextlib.nullcontext()
        return inference.inference(self.model, self.precision)

    @property
    def multiple(self) -> int | None:
        """Of which the sides of inputs for local features are multiples; None: as published."""
        return getattr(self.model, "multiple", None)

    @property
    def batch_size(self) -> int:
        """The images in a batch."""
        is_global = isinstance(self.settings, GlobalSettings)
        return self.machine.batch_size if is_global else self.machine.local_batch_size

    def describe_blocks(
        self, blocks: Sequence[Sequence[ImageTask]], bar: tqdm
    ) -> Iterator[tuple[np.ndarray, list[Failure]]]:
        """Yields each block's global descriptors (B, D) float32, zero for failures, and these."""
        with self.stream(itertools.chain.from_iterable(blocks), bar) as images:
            for block in blocks:
                yield self.global_rows(itertools.islice(images, len(block)), len(block))

    def write_shards(self, shards: Sequence[ShardTask], bar: tqdm) -> Iterator[list[Failure]]:
        """Writes one shard after the other, while the next is described; yields their failures."""
        tasks = itertools.chain.from_iterable(shard.images for shard in shards)
        writing: Future[list[Failure]] | None = None
        with ThreadPoolExecutor(1) as writer, self.stream(tasks, bar) as images:
            for shard in shards:
                block = itertools.islice(images, len(shard.images))
                items, failures = self.local_items(block, shard.keys)
                shard.refuse_failed_query(failures)
                if writing:
                    yield writing.result()
                writing = writer.submit(_write_shard, shard, items, failures)
            if writing:
                yield writing.result()

    def recorded(self) -> dict[str, Any]:
        """Returns the machine's entries for a stage's manifest; no result depends on them."""
        return {
            "engine": "local",
            "device": str(
                self.extractor.device if self.extractor else inference.device_of(self.model)
            ),
            "precision": self.precision,
            "prepared": self.model is not None and is_prepared(self.model),
            "batch_size": self.batch_size,
            "workers": self.machine.read_threads,
            "threads": torch.get_num_threads(),
        }

    @contextlib.contextmanager
    def stream(self, tasks: Iterable[ImageTask], bar: tqdm) -> Iterator[LoadedImages]:
        """Opens an iterator over the loaded images that counts them, within `running`."""
        images = load_images(tasks, self.settings, self.machine, self.multiple)
        with contextlib.closing(images), self.running():
            yield _counted(images, bar)

    def global_rows(self, images: LoadedImages, count: int) -> tuple[np.ndarray, list[Failure]]:
        """Computes the global descriptors of N images, the `count`, within `running`.

        Returns (N, D) float32, zero where an image failed, and the failures.
        """
        failures: list[Failure] = []
        rows = np.zeros((count, self.model.embed_dim), np.float32)
        scales = self.settings.scales
        inputs = ((position, image.pixels) for position, image in _readable(images, failures))
        order, computed = [], []
        for positions, batch in inference.batches(inputs, self.batch_size):
            order += positions
            computed += self.memory.run(
                lambda part, batch=batch: descriptors.global_descriptors(
                    self.model, batch[part], scales
                ),
                len(batch),
            )
        if computed:  # read once, so that a GPU need not be waited for between batches
            rows[order] = descriptors.finite_rows(torch.stack(computed))
        return rows, failures

    def local_items(
        self, images: LoadedImages, keys: Sequence[str]
    ) -> tuple[list[tuple[str, LocalFeatures]], list[Failure]]:
        """Computes the local features of images in the order of `keys`, within `running`.

        Returns (key, features) in order, without the images that failed, and the failures.
        """
        failures: list[Failure] = []
        features: dict[int, LocalFeatures] = {}
        running: deque[tuple[Sequence[int], list]] = deque()

        def settle() -> None:
            """Waits for the oldest batch."""
            positions, items = running.popleft()
            ready = (item() if callable(item) else item for item in items)
            features.update(zip(positions, ready, strict=True))

        inputs = (
            ((position, image.frame), image.pixels)
            for position, image in _readable(images, failures)
        )
        for labels, batch in inference.batches(inputs, self.batch_size):
            positions, frames = zip(*labels, strict=True)
            items = self.memory.run(
                lambda part, batch=batch, frames=frames: self._local(batch[part], frames[part]),
                len(batch),
            )
            running.append((positions, items))
            if len(running) > BATCHES_AHEAD:
                settle()
        while running:
            settle()
        return [(keys[position], features[position]) for position in sorted(features)], failures

    def _local(
        self, batch: list[np.ndarray], frames: Sequence[Frame]
    ) -> Sequence[LocalFeatures | Callable[[], LocalFeatures]]:
        """Computes the features of a batch; on a GPU returns, for each image, how to wait for them.

        There the network is launched here, and selection runs in other threads.
        """
        if self.extractor:
            return self.extractor.extract(batch, frames)
        pixels = inference.network_input(batch, inference.device_of(self.model))
        tokens = descriptors.compute_tokens(self.model, pixels, self.settings, self.graphs)
        if self.selectors is None:
            return descriptors.select_features(tokens, frames, self.settings)
        selected = self.selectors.submit(descriptors.select_features, tokens, frames, self.settings)
        return [lambda at=at: selected.result()[at] for at in range(len(batch))]


def _write_shard(shard: ShardTask, items: Iterable, failures: list[Failure]) -> list[Failure]:
    store.write_shard(shard.folder, items, shard.format, failures=failures)
    return failures


def _counted(images: LoadedImages, bar: tqdm) -> LoadedImages:
    for image in images:
        bar.update()
        yield image


def _readable(images: LoadedImages, failures: list[Failure]) -> Iterator[tuple[int, LoadedImage]]:
    """Yields the position and content of each readable image; adds the others to `failures`."""
    for position, (task, image) in enumerate(images):
        if isinstance(image, ImageError):
            failures.append({"name": task.key, "reason": image.reason})
        else:
            yield position, image


@contextlib.contextmanager
def open_local(
    source: Path | str,
    settings: StageSettings,
    machine: MachineSettings,
    codes: Codes | None = None,
) -> Iterator[LocalDescriber]:
    """Opens what describes images, with its number of threads.

    source: as for `open_model`; read for tokens and global descriptors. codes: of the tokens of a
    timm network; None: the tokens are the local descriptors.
    """
    device = inference.pick_device(machine.device)
    with inference.limited_threads(machine.threads):
        if isinstance(settings, LocalSettings) and not settings.own_tokens:
            extractor = make_extractor(settings, device)
            yield LocalDescriber(None, settings, machine, "fp32", extractor=extractor)
            return
        pooling = settings.pooling if isinstance(settings, GlobalSettings) else None
        model = inference.open_model(source, device, pooling=pooling)
        if isinstance(settings, LocalSettings):
            model = local_network(model, settings, codes)
        precision = inference.resolve_precision(settings.precision, device)
        describer = LocalDescriber(prepare(model, precision), settings, machine, precision)
        if device.type != "cuda" or isinstance(settings, GlobalSettings):
            yield describer
            return
        scales = partial(descriptors.run_scales, model, selection=settings)
        graphs = Graphs(scales) if machine.cuda_graphs else None
        with ThreadPoolExecutor(SELECTORS) as selectors:
            yield replace(describer, selectors=selectors, graphs=graphs)
