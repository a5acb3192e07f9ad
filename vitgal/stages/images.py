"""Images on disk on their way to the network: decoded ahead by threads, failures recorded."""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.images import ImageError, ReadError, crop_box, read_image
from vitgal.data.images import resize as resize_image
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import Frame
from vitgal.models.descriptors import describe
from vitgal.models.inference import (
    Room,
    _device,
    batches,
    inference,
    limited_threads,
    network_input,
    open_model,
    pick_device,
    resolve_precision,
)
from vitgal.models.local_features import local_features
from vitgal.models.network import ViTGaL

BLOCK = 256  # images between two checkpoints of the global stage
AHEAD = 4  # images that each decoding thread may be ahead of the network


@dataclass(frozen=True)
class Job:
    """One image to describe: its key, its file, the box to cut out (None: the whole image)."""

    key: str
    path: Path
    box: tuple[float, ...] | None = None
    query: bool = False


@dataclass(frozen=True, eq=False)
class Loaded:
    """A job's network input (h, w, 3) uint8, and where on the photograph it lies."""

    image: np.ndarray
    frame: Frame


def load(job: Job, *, size: int, resize: str) -> Loaded:
    """Decodes, crops and resizes; ImageError for a bad file, ValueError for a box that is off."""
    image = read_image(job.path)
    try:
        crop, box = crop_box(image, job.box)
    except ValueError as error:
        raise ValueError(f"{job.path}: {error}") from error
    return Loaded(resize_image(crop, size, resize), (box, image.shape[:2]))


def prefetch(
    work: Callable[[Job], Loaded], jobs: Iterable[Job], *, workers: int
) -> Iterator[tuple[Job, Loaded | ImageError]]:
    """Yields every job with its result or its ImageError, in order; threads work a little ahead.

    A ReadError is raised: the disk is at fault, and a run that goes on later has all its images.
    Threads are enough: OpenCV lets Python go on while it decodes. 0 workers: no threads.
    """

    def attempt(job: Job) -> Loaded | ImageError:
        try:
            return work(job)
        except ReadError:
            raise
        except ImageError as error:
            return error

    if workers < 1:
        yield from ((job, attempt(job)) for job in jobs)
        return
    pending: deque[tuple[Job, Future]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                pending.append((job, pool.submit(attempt, job)))
                if len(pending) > AHEAD * workers:
                    job, future = pending.popleft()
                    yield job, future.result()
            while pending:
                job, future = pending.popleft()
                yield job, future.result()
        finally:
            for _, future in pending:
                future.cancel()


Results = Iterable[tuple[Job, Loaded | ImageError]]


@dataclass(frozen=True, eq=False)
class Runner:
    """A model and how images on disk are brought to it.

    precision is "fp32" or "bf16"; size and resize are those of `images.resize`; workers are
    decoding threads. A batch that the device has no memory for is halved, as are all after it.
    """

    model: ViTGaL
    precision: str
    size: int
    resize: str
    batch_size: int
    workers: int
    room: Room = field(default_factory=Room)

    @contextlib.contextmanager
    def stream(self, jobs: Iterable[Job], **bar: Any) -> Iterator[Iterator]:
        """Yields an iterator over the prefetched jobs, with a progress bar, within `inference`."""
        work = partial(load, size=self.size, resize=self.resize)
        loaded = prefetch(work, jobs, workers=self.workers)
        with contextlib.closing(loaded), inference(self.model, self.precision):
            with tqdm(unit="image", **bar) as shown:
                yield _counted(loaded, shown)

    def recorded(self) -> dict[str, Any]:
        """What a stage's manifest keeps of it."""
        return {
            "engine": "local",
            "device": str(_device(self.model)),
            "precision": self.precision,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "threads": torch.get_num_threads(),
        }

    def global_rows(
        self, results: Results, number: int, *, scales: Sequence[float]
    ) -> tuple[np.ndarray, list[dict]]:
        """Global descriptors (number, D) of streamed images; failures, whose rows are zero."""
        failures: list[dict] = []
        rows = np.zeros((number, self.model.embed_dim), np.float32)
        inputs = ((position, loaded.image) for position, loaded in _usable(results, failures))
        for positions, batch in batches(inputs, self.batch_size):
            rows[positions] = self.room.run(
                lambda part, batch=batch: describe(self.model, np.stack(batch[part]), scales),
                len(batch),
            )
        return rows, failures

    def local_items(
        self,
        results: Results,
        keys: Sequence[str],
        kept: Mapping[str, store.EncodedFeatures] | None = None,
        **options: Any,
    ) -> tuple[list[tuple[str, LocalFeatures | store.EncodedFeatures]], list[dict]]:
        """Local features of streamed images as (key, features), in order; the failures.

        kept: what a damaged shard still held is taken as it is. Batches are those of all images,
        so that what is made anew comes out as it did the first time.
        """
        kept, failures = kept or {}, []
        found: dict[int, LocalFeatures | store.EncodedFeatures] = {}
        inputs = (
            ((position, loaded.frame), loaded.image)
            for position, loaded in _usable(results, failures)
        )
        for labels, batch in batches(inputs, self.batch_size):
            positions, frames = zip(*labels, strict=True)
            known = [kept.get(keys[position]) for position in positions]
            if not all(known):
                features = self._local_batch(batch, frames, options)
                known = [old or new for old, new in zip(known, features, strict=True)]
            found.update(zip(positions, known, strict=True))
        return [(keys[position], found[position]) for position in sorted(found)], failures

    def _local_batch(
        self, batch: list[np.ndarray], frames: Sequence[Frame], options: dict
    ) -> list[LocalFeatures]:
        def work(part: slice) -> list[LocalFeatures]:
            images = network_input(np.stack(batch[part]), _device(self.model))
            return local_features(self.model, images, frames[part], **options)

        return self.room.run(work, len(batch))


def _counted(results: Results, bar: tqdm) -> Results:
    for result in results:
        bar.update()
        yield result


def _usable(results: Results, failures: list[dict]) -> Iterator[tuple[int, Loaded]]:
    """Numbers the results and passes the good ones on; the others are added to `failures`."""
    for position, (job, result) in enumerate(results):
        if isinstance(result, ImageError):
            failures.append({"name": job.key, "reason": result.reason})
        else:
            yield position, result


@contextlib.contextmanager
def _runner(
    model: Path | str,
    *,
    seed: int,
    threads: int | None,
    device: str | None,
    precision: str,
    **how: Any,
) -> Iterator[Runner]:
    """A stage's model on its device and threads."""
    place = pick_device(device)
    with limited_threads(threads):
        network = open_model(model, place, seed=seed)
        yield Runner(network, resolve_precision(precision, place), **how)


def _refuse_failures(failures: Sequence[dict], number: int, share: float) -> None:
    """StageError where more than the allowed share of images could not be read."""
    if len(failures) > share * number:
        shown = "; ".join(f"{failure['name']}: {failure['reason']}" for failure in failures[:3])
        more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise runs.StageError(
            f"{len(failures)} of {number} images cannot be read, more than max_failed_share={share}"
            f" allows ({shown}{more}); replace them, or raise max_failed_share to go on without "
            "them: what is done so far is kept"
        )


def _report(failures: Collection, number: int) -> None:
    """Prints how many images failed, if any; the same when the stage is reused."""
    if failures:
        print(f"{len(failures)} of {number} images could not be read: see failures.json")


def _refuse_failed_query(failures: Sequence[dict]) -> None:
    if failures:
        failure = failures[0]
        raise runs.StageError(
            f"the query image {failure['name']} cannot be read: {failure['reason']}; replace it "
            "(a query cannot be left out)"
        )


def query_jobs(data: RetrievalDataset, crop: bool) -> list[Job]:
    """The queries of a data set, each with its box where they are to be cropped."""
    truth = data.ground_truth
    boxes = [tuple(map(float, box)) if crop else None for box in truth.boxes]
    return [Job(*job, True) for job in zip(truth.queries, data.query_paths, boxes, strict=True)]
