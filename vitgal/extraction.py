"""Descriptors of image lists: global and local, of a few images in memory or a million on disk.

Images stream through: threads decode, crop and resize ahead of the network, which is given batches
of images of one size. The two stage functions continue where a killed run stopped, the global one
row block by row block, the local one shard by shard.
"""

import contextlib
import errno
import itertools
import os
import shutil
import socket
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from vitgal import approximate, cluster, evaluation, revisited, runs, search, store
from vitgal.features import LocalFeatures
from vitgal.images import MEAN, STD, ImageError, ReadError, crop_box, read_image
from vitgal.images import resize as resize_image
from vitgal.local_features import LADDER, SCALES, Frame, local_features, require_codes
from vitgal.model import ViTGaL, build_model
from vitgal.revisited import RetrievalDataset
from vitgal.weights import load_model

PRECISIONS = ("fp32", "bf16", "auto")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # Linux's names for native bf16 products
UNTRAINED = "untrained:"
BLOCK = 256  # images between two checkpoints of the global stage
AHEAD = 4  # images that each decoding thread may be ahead of the network
GLOBAL_NOTEBOOK = "04_global_evaluation"
# Hashed when the stage ends and again when it is reused. The large arrays of a shard are not: they
# are checked by length on opening, and byte for byte by the checksums that stand here.
SHARD_OUTPUTS = ("items.json", "failures.json", "offsets.npy", "checksums.npy")


# The network as it is run here


def resolve_precision(precision: str, device: torch.device | str = "cpu") -> str:
    """ "fp32" or "bf16"; "auto" is bf16 where the device computes it natively, else fp32.

    Raises ValueError for any other precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        info = Path("/proc/cpuinfo")
        native = info.exists() and bool(BF16_FLAGS & set(info.read_text().split()))
    return "bf16" if native else "fp32"


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """The device named, else the GPU if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def open_model(model: str | Path, device: torch.device | str = "cpu", *, seed: int = 0) -> ViTGaL:
    """The model of a weight file, or for "untrained:<architecture>" one with seeded random weights.

    Raises as `load_model` and `build_model` do.
    """
    if str(model).startswith(UNTRAINED):
        return build_model(str(model).removeprefix(UNTRAINED), seed=seed).to(device)
    return load_model(model, device)


def weights_fingerprint(model: str | Path, *, seed: int = 0) -> str:
    """What says which weights `open_model` takes: the file's sha256, or architecture and seed."""
    if str(model).startswith(UNTRAINED):
        return f"{model}, seed {seed}"
    if not Path(model).is_file():
        from vitgal import download  # slow to import, and needed for this error alone

        source = download.hint(model)
        remedy = (
            f"`vitgal download {source}` brings them"
            if source
            else "train them with 02_train or 03_train_autoencoder, or name a checkpoint"
        )
        raise FileNotFoundError(f"there are no weights {model}: {remedy}")
    return runs.fingerprint_file(Path(model))


@contextlib.contextmanager
def inference(model: ViTGaL, precision: str = "fp32") -> Iterator[None]:
    """The model in eval mode, without gradients, in the precision; afterwards as it was."""
    device, training = _device(model), model.training
    bf16 = resolve_precision(precision, device) == "bf16"
    # fp32 means fp32: cuDNN would round convolutions' inputs to 10 bits (TF32) by default.
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    model.eval()
    try:
        with torch.inference_mode(), exact, _linear_layers(device, bf16):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                yield
    finally:
        model.train(training)


class _OneDNN(TorchFunctionMode):
    """Linear layers in float32 by oneDNN instead of MKL, the same sums in another order.

    MKL leaves the wide registers of AMD's processors unused: oneDNN is 2.2 times as fast there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        ours = func is F.linear and not kwargs and args[0].dtype == torch.float32
        if ours and args[0].numel():
            return _one_dnn_linear(*args)
        return func(*args, **(kwargs or {}))


def _one_dnn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # NOTE: torch.compile's operation on processors, not documented: `_one_dnn_works` tries it.
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _one_dnn_works() -> bool:
    """Whether this PyTorch has the operation, and in float32: tried on a small layer."""
    inputs = torch.linspace(-1, 1, 3 * 16).reshape(3, 16)
    weight, bias = torch.linspace(0.3, -0.7, 5 * 16).reshape(5, 16), torch.linspace(1, 2, 5)
    try:
        found = _one_dnn_linear(inputs, weight, bias)
    except (AttributeError, TypeError, RuntimeError):  # missing, or called in another way
        return False
    # Rounding of 16 products is below 1e-5; with factors cut to bf16 it is above 1e-3.
    return torch.allclose(found, F.linear(inputs, weight, bias), rtol=0, atol=1e-5)


def _linear_layers(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager:
    wanted = device.type == "cpu" and not bf16
    return _OneDNN() if wanted and _one_dnn_works() else contextlib.nullcontext()


@contextlib.contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """torch on so many CPU threads (None: as it is); float sums differ with their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(model: ViTGaL) -> torch.device:
    return next(model.parameters()).device


def network_input(batch: np.ndarray, device: torch.device | str) -> Tensor:
    """A batch (B, H, W, 3) uint8 RGB as the network's (B, 3, H, W) float32, normalised.

    The same operations as `images.normalise`, on the device: a quarter of the bytes are moved.
    """
    # The colours stay last in memory, which convolutions like better (up to 18 % on a CPU).
    pixels = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (MEAN, STD))
    return (pixels - mean) / std


# Images in memory


def extract_global(
    model: ViTGaL,
    images: Sequence[np.ndarray],
    boxes: Sequence[Sequence[float] | None] | None = None,
    size: int = 512,
    resize: str = "squash",
    scales: Sequence[float] = (1.0,),
    batch_size: int = 16,
    *,
    precision: str = "fp32",
) -> np.ndarray:
    """Global descriptors of images in memory.

    Args:
        images: (H, W, 3) uint8 RGB each, of any sizes.
        boxes: per image (x0, y0, x1, y1) in pixels to cut out first (`images.crop_box`), or None.
        size, resize: pixels and mode, see `images.resize`; "squash" is the published way.
        scales: of the network input. Several: the mean of the normalised descriptors, renormalised.
        precision: "fp32", "bf16" or "auto".
    Returns:
        (len(images), D) float32 of length 1, in the order of `images`; no images give (0, D).
    Raises:
        ValueError: a box that does not fit its image, an unknown mode or precision, a descriptor
            that is not finite.
    """
    _check_scales(scales)
    boxes = [None] * len(images) if boxes is None else boxes
    inputs = (
        (position, resize_image(crop_box(image, box)[0], size, resize))
        for position, (image, box) in enumerate(zip(images, boxes, strict=True))
    )
    rows = np.zeros((len(images), model.embed_dim), np.float32)
    with inference(model, precision):
        for positions, batch in batches(inputs, batch_size):
            rows[positions] = describe(model, np.stack(batch), scales)
    return rows


def describe(model: ViTGaL, batch: np.ndarray, scales: Sequence[float] = (1.0,)) -> np.ndarray:
    """Global descriptors (B, D) float32 of length 1 of a batch (B, H, W, 3) uint8 RGB.

    To be called within `inference`. Raises ValueError where a descriptor is not finite.
    """
    images = network_input(batch, _device(model))
    total = torch.zeros(len(batch), model.embed_dim, device=images.device)
    for scale in scales:
        scaled = images
        if scale != 1:
            # As published: sides rounded down, no smoothing.
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        total += F.normalize(model.global_features(scaled).float(), dim=1)
    rows = F.normalize(total, dim=1).cpu().numpy()
    if not np.isfinite(rows).all():
        raise ValueError("a global descriptor is not finite: use precision fp32, or other weights")
    return rows


def extract_local(
    model: ViTGaL,
    image: np.ndarray,
    box: Sequence[float] | None = None,
    *,
    size: int = 512,
    precision: str = "fp32",
    **options: Any,
) -> LocalFeatures:
    """Local features of one image (H, W, 3) uint8 RGB, or of the box (x0, y0, x1, y1) in it.

    Args:
        size: the network input has about size x size pixels in the image's shape, sides multiples
            of 16.
        options: scales, max_keypoints, nms_candidates, nms_overlap, target_per_scale, ladder,
            interpolation: see `local_features.local_features`; the defaults are the published ones.
    Raises:
        ValueError: a box that does not fit, a model without autoencoder, an option out of range.
    """
    crop, taken = crop_box(image, box)
    batch = resize_image(crop, size, "area")[None]
    with inference(model, precision):
        inputs = network_input(batch, _device(model))
        return local_features(model, inputs, [(taken, image.shape[:2])], **options)[0]


def batches(
    inputs: Iterable[tuple[Any, np.ndarray]], batch_size: int
) -> Iterator[tuple[list, list[np.ndarray]]]:
    """Gathers (label, image) into batches of one image size: yields (labels, images).

    A batch goes out when it is full, the incomplete ones at the end; at most `batch_size` - 1
    images of every size wait.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    waiting: dict[tuple, tuple[list, list[np.ndarray]]] = {}
    for label, image in inputs:
        labels, images = waiting.setdefault(image.shape, ([], []))
        labels.append(label)
        images.append(image)
        if len(labels) == batch_size:
            yield waiting.pop(image.shape)
    yield from waiting.values()


# Images on disk


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


@dataclass(eq=False)
class Room:
    """How many images fit on the device at once: learned when a batch does not (0: not yet)."""

    images: int = 0

    def run(self, work: Callable[[slice], Sequence], number: int) -> list:
        """`work` on slices of a batch of `number`, halved until they fit; results in order.

        Says so once a halving. Raises RuntimeError where one image alone does not fit.
        """
        found: list = []
        while len(found) < number:
            most = min(number, self.images or number)
            part = slice(len(found), min(number, len(found) + most))
            try:
                found.extend(work(part))
            except torch.OutOfMemoryError as error:
                size = part.stop - part.start
                if size == 1:
                    raise RuntimeError(
                        "one image alone does not fit into the device's memory: use a smaller size "
                        "or fewer scales, or close other programs that use the device"
                    ) from error
                self.images = size // 2
            else:
                continue
            # Outside the handler: the exception holds the tensors of the batch that was too large.
            torch.cuda.empty_cache()  # does nothing where there is no GPU
            print(f"out of memory with {size} images at once: going on with {self.images}")
        return found


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
        kept: Mapping[str, store.Stored] | None = None,
        **options: Any,
    ) -> tuple[list[tuple[str, LocalFeatures | store.Stored]], list[dict]]:
        """Local features of streamed images as (key, features), in order; the failures.

        kept: what a damaged shard still held is taken as it is. Batches are those of all images,
        so that what is made anew comes out as it did the first time.
        """
        kept, failures = kept or {}, []
        found: dict[int, LocalFeatures | store.Stored] = {}
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


def _check_scales(scales: Sequence[float]) -> None:
    if not len(scales) or not all(0 < scale <= 16 for scale in scales):
        raise ValueError(f"scales must be above 0 and at most 16, one at least; got {scales}")


# The global stage


def evaluate_global(
    run: Path,
    *,
    dataset: str,
    data_folder: Path,
    model: Path | str,
    folder: str = "global",
    size: int = 512,
    resize: str = "squash",
    scales: Sequence[float] = (1.0,),
    crop_queries: bool = True,
    batch_size: int = 16,
    precision: str = "fp32",
    top: int = 100,
    display: int = 1000,
    index: str | None = None,
    distractors: Path | None = None,
    distractor_list: Path | None = None,
    max_failed_share: float = 0.001,
    seed: int = 0,
    threads: int | None = None,
    workers: int = 4,
    device: str | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Ranks a benchmark's database for its queries and scores that: `<run>/<dataset>/global`.

    Args:
        run: the run folder (`runs.run_folder`).
        dataset, data_folder: the benchmark's name, and the folder of `jpg/` and `gnd_<name>.pkl`.
        model: a weight file, or "untrained:<architecture>" for random weights drawn with `seed`.
        folder: the stage's name below `<run>/<dataset>/`; another one keeps another model's result.
        crop_queries: describe the query's box alone, as the protocol demands; False describes the
            whole photograph (marked ^ in the paper).
        top: length of the short lists.  display: ranks kept for display, more if short lists need.
        index: None searches exactly; else a faiss index (`approximate.check`), kept in the stage,
            finds the beginning of every ranking. The scores are then those of that ranking; the
            exact ones and the index's recall stand beside them.
        distractors, distractor_list: see `revisited.open_dataset`.
        max_failed_share: share of database images that may fail to decode; they rank last.
        threads: torch's CPU threads.  workers: decoding threads.
        engine, ray_address: "local", or "ray": on a Ray cluster (see `cluster.connected`). One
            process a GPU describes, without GPUs one for every `threads` (None: 1) CPUs. Where
            threads are the same the result is too; else sums differ in their last bits.
        size, resize, scales, batch_size, precision: see `extract_global`.
    Returns:
        The stage's folder, with database.npy (N, D) and queries.npy (Q, D) float32, names.json,
        ranks.npy (K, Q) int32, similarities.npy (K, Q) float32, positions.npz, shortlist.txt,
        scores.json and failures.json. Killed and run again it continues after the last 256 images.
    Raises:
        StageError: the folder holds other settings, a query or too many images cannot be read.
        FileNotFoundError, ValueError: data set or weights are missing or not what they should be.
    """
    _check_scales(scales)
    cluster.check_engine(engine, ray_address)
    data = revisited.open_dataset(
        dataset, data_folder, distractors=distractors, distractor_list=distractor_list
    )
    parameters = dict(size=size, resize=resize, scales=scales, crop_queries=crop_queries)
    parameters |= dict(precision=precision, top=top, display=display)
    parameters |= {} if index is None else {"index": index}
    inputs = {"dataset": data.fingerprint, "weights": weights_fingerprint(model, seed=seed)}
    how = dict(seed=seed, threads=threads, device=device, precision=precision)
    how |= dict(size=size, resize=resize, batch_size=batch_size, workers=workers)
    with runs.stage(
        run / dataset / folder, "global", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            _report(runs.read_json(stage.folder / "failures.json"), len(data.database))
            return stage.folder
        with _engine(engine, ray_address, model, how) as runner:
            if index is not None:
                approximate.check(index, runner.model.embed_dim, len(data.database))
            jobs, path = query_jobs(data, crop_queries), stage.folder / "database.npy"
            limits = dict(share=max_failed_share, disable=not progress)
            if isinstance(runner, OnCluster):
                queries, rows = _cluster_rows(runner, jobs, data, path, scales, **limits)
            else:
                queries = _query_rows(runner, jobs, scales)
                rows = _database_rows(runner, data, path, scales, **limits)
            recorded = runner.recorded()
        protocol = {key: parameters[key] for key in ("crop_queries", "resize", "scales")}
        protocol |= {"precision": recorded["precision"]}
        evaluation.write_rankings(
            stage, data, queries, rows.path, failures=rows.failures, protocol=protocol
        )
        recorded |= dict(images=len(data.database), failed=len(rows.failures))
        stage.finish(evaluation.global_outputs(parameters), **recorded)
        rows.forget()
        _report(rows.failures, len(data.database))
        return stage.folder


def query_jobs(data: RetrievalDataset, crop: bool) -> list[Job]:
    """The queries of a data set, each with its box where they are to be cropped."""
    truth = data.ground_truth
    boxes = [tuple(map(float, box)) if crop else None for box in truth.boxes]
    return [Job(*job, True) for job in zip(truth.queries, data.query_paths, boxes, strict=True)]


def _query_rows(runner: Runner, jobs: Sequence[Job], scales: Sequence[float]) -> np.ndarray:
    with runner.stream(jobs, disable=True) as results:
        rows, failures = runner.global_rows(results, len(jobs), scales=scales)
    _refuse_failed_query(failures)
    return rows


def _database_rows(
    runner: Runner,
    data: RetrievalDataset,
    path: Path,
    scales: Sequence[float],
    *,
    share: float,
    disable: bool,
) -> store.RowFile:
    """Describes the database block by block into `path`, from where it stands on disk."""
    number = len(data.database)
    settings = {"precision": runner.precision}
    rows = store.RowFile.open(path, (number, runner.model.embed_dim), settings=settings)
    todo = zip(data.database[rows.rows :], data.database_paths[rows.rows :], strict=True)
    jobs = (Job(name, image) for name, image in todo)
    bar = dict(total=number, initial=rows.rows, desc="describing", disable=disable)
    with runner.stream(jobs, **bar) as results:
        while rows.rows < number:
            count = min(BLOCK, number - rows.rows)
            block = itertools.islice(results, count)
            rows.append(*runner.global_rows(block, count, scales=scales))
            _refuse_failures(rows.failures, number, share)
    rows.finish()
    return rows


# The local stage


def extract_shortlist(
    run: Path,
    *,
    dataset: str,
    data_folder: Path,
    model: Path | str,
    size: int = 512,
    scales: Sequence[float] = SCALES,
    max_keypoints: int = 1000,
    nms_candidates: int = 1200,
    nms_overlap: float = 0.5,
    target_per_scale: float = 400,
    ladder: Sequence[float] = LADDER,
    interpolation: str = "size",
    crop_queries: bool = True,
    batch_size: int = 8,
    precision: str = "fp32",
    dtype: str = "float16",
    shard_size: int = 256,
    distractors: Path | None = None,
    distractor_list: Path | None = None,
    max_failed_share: float = 0.001,
    seed: int = 0,
    threads: int | None = None,
    workers: int = 4,
    device: str | None = None,
    worker: int = 0,
    worker_count: int = 1,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Extracts the local features that reranking needs: `<run>/<dataset>/local`, a FeatureStore.

    Exactly the queries (their crops) and the database images (whole) that the global stage's
    shortlist.txt names. Prints how much space they will take at most.

    Args:
        dtype: how descriptors are stored, see `store.encode`.
        shard_size: images a shard. A killed stage continues with the first shard that is missing;
            of a damaged one the images that are whole are kept.
        max_failed_share: share of images that may fail to decode; they are left out of the store.
        worker, worker_count: several processes, on one machine or on several that share the folder,
            may extract together: number `worker` writes shards worker, worker + worker_count, ….
            The result does not depend on it. The last to be done finishes the stage.
        size … interpolation: see `extract_local`.  All others: see `evaluate_global`.
    Returns:
        The stage's folder; `FeatureStore.open` reads it.
    Raises:
        StageError: the global stage is missing, the folder holds other settings, a query or too
            many images cannot be read, or this worker is done and others are not.
        FileNotFoundError, ValueError: as `evaluate_global`; a model without autoencoder.
    """
    cluster.check_engine(engine, ray_address)
    data = revisited.open_dataset(
        dataset, data_folder, distractors=distractors, distractor_list=distractor_list
    )
    chosen = run / dataset / "global"
    listed = runs.output_fingerprint(chosen, "shortlist.txt", GLOBAL_NOTEBOOK)
    jobs = shortlist_jobs(data, chosen / "shortlist.txt", crop_queries)
    options = dict(scales=scales, max_keypoints=max_keypoints, nms_candidates=nms_candidates)
    options |= dict(nms_overlap=nms_overlap, target_per_scale=target_per_scale, ladder=ladder)
    options |= dict(interpolation=interpolation)
    parameters = options | dict(size=size, crop_queries=crop_queries, precision=precision)
    parameters |= dict(dtype=dtype, shard_size=shard_size)
    inputs = {"shortlist": listed, "images": _jobs_fingerprint(jobs)}
    inputs |= {"weights": weights_fingerprint(model, seed=seed)}
    how = dict(seed=seed, threads=threads, device=device, precision=precision)
    how |= dict(size=size, resize="area", batch_size=batch_size, workers=workers)
    shards = dict(dtype=dtype, shard_size=shard_size, options=options)
    shards |= dict(limit=max_failed_share, disable=not progress)
    share = (worker, worker_count)
    opening = dict(parameters=parameters, inputs=inputs, overwrite=overwrite)
    with runs.stage(run / dataset / "local", "local", repair=True, share=share, **opening) as stage:
        if stage.finished and (opened := _opened(stage)) is not None:
            _announce(opened.code_dim, len(jobs), parameters)
            _report(opened.failures, len(jobs))
            return stage.folder
        with _engine(engine, ray_address, model, how) as runner:
            _announce(require_codes(runner.model), len(jobs), parameters)
            _write_shards(runner, jobs, stage.folder, share=share, **shards)
            made = dict(dtype=dtype, settings={"precision": runner.precision})
            recorded = runner.recorded()
        _refuse_unfinished(stage.folder, jobs, shard_size, share, made)
        index = store.write_index(stage.folder)  # first: with it the store is opened at once
        failed = store.FeatureStore.open(stage.folder).failures
        _refuse_failures(_listed(failed), len(jobs), max_failed_share)
        recorded |= dict(images=len(jobs), failed=len(failed))
        stage.finish(_shard_outputs(stage.folder) + index, **recorded)
        _report(failed, len(jobs))
        return stage.folder


def _opened(stage: runs.Stage) -> store.FeatureStore | None:
    """A finished stage's store; None, and the stage reopened, where a shard is torn or gone."""
    try:
        for shard in store.shard_folders(stage.folder):
            store.Shard.open(shard)
        return store.FeatureStore.open(stage.folder)
    except (store.StoreError, FileNotFoundError) as error:
        print(error)
        stage.reopen()
        return None


def _refuse_unfinished(
    folder: Path, jobs: Sequence[Job], shard_size: int, share: tuple[int, int], made: dict
) -> None:
    """StageError where shards of other workers are missing or damaged; these are read whole."""
    keys = [job.key for job in jobs]
    wanted, mine = (shards_of(folder, keys, shard_size, some) for some in (runs.ALONE, share))
    theirs = {where: names for where, names in wanted.items() if where not in mine}
    missing = [where.name for where in theirs if not where.exists()]
    if missing:
        raise runs.StageError(
            f"worker {share[0]} has written its shards of {folder}; {len(missing)} of "
            f"{len(wanted)} ({missing[0]}, ...) are for other workers: the last of them finishes "
            "the stage; if none is at work, run this again with worker_count=1"
        )
    for where in theirs:
        _refuse_other_precision(where, made["settings"]["precision"])
    damaged = [where.name for where, names in theirs.items() if not _whole(where, names, made)]
    if damaged:
        raise runs.StageError(
            f"worker {share[0]} has written its shards of {folder}; of the other workers' "
            f"{len(damaged)} ({damaged[0]}, ...) are damaged: run this again with worker_count=1"
        )


def _whole(where: Path, names: Sequence[str], made: dict) -> bool:
    return store.whole_shard(where, names, **made) is not None


def _listed(failed: Mapping[str, str]) -> list[dict]:
    return [{"name": name, "reason": reason} for name, reason in failed.items()]


def shortlist_jobs(data: RetrievalDataset, path: Path, crop: bool) -> list[Job]:
    """All queries of a data set and the database images that a shortlist.txt names, by key."""
    paths = dict(zip(data.database, data.database_paths, strict=True))
    names = {name for found in search.read_shortlist(path).values() for name in found}
    unknown = sorted(names - set(paths))
    if unknown:
        raise runs.StageError(
            f"{path} names {unknown[0]}, which {data.name} lacks: run {GLOBAL_NOTEBOOK} again"
        )
    queries = [replace(job, key=store.query_key(job.key, paths)) for job in query_jobs(data, crop)]
    if clash := names & {query.key for query in queries}:
        name = min(clash)
        raise runs.StageError(
            f"the database image {name} of {data.name} has the name under which the features of "
            f"query {name.removeprefix(store.QUERY)} are kept: rename one of them"
        )
    return sorted(queries + [Job(name, paths[name]) for name in names], key=lambda job: job.key)


def _jobs_fingerprint(jobs: Sequence[Job]) -> str:
    images = runs.fingerprint_images([job.key for job in jobs], [job.path for job in jobs])
    return runs.fingerprint([images, [job.box for job in jobs]])


def _announce(code_dim: int, images: int, parameters: dict) -> None:
    """Prints the greatest size that the store can have; the same when the stage is reused."""
    most, dtype = parameters["max_keypoints"], parameters["dtype"]
    size = store.forecast(images, most, code_dim, dtype)
    shown = f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"
    print(
        f"local features of {images:,} images, {len(parameters['scales'])} scales, {dtype}: "
        f"at most {shown} ({most:,} features an image, descriptors of {code_dim} values)"
    )


def _write_shards(
    runner: "Runner | OnCluster",
    jobs: Sequence[Job],
    folder: Path,
    *,
    dtype: str,
    shard_size: int,
    options: dict,
    limit: float,
    share: tuple[int, int] = runs.ALONE,
    disable: bool = True,
) -> None:
    """Writes those of a worker's shards that are missing or damaged."""
    by_key = {job.key: job for job in jobs}
    how = dict(dtype=dtype, settings={"precision": runner.precision})
    made = how | {"code_dim": runner.model.code_dim}
    if share == runs.ALONE:
        store.clear_partial(folder)
    failures, missing = [], {}
    mine = shards_of(folder, [job.key for job in jobs], shard_size, share)
    for where, keys in mine.items():
        _refuse_other_precision(where, runner.precision)
        if shard := store.whole_shard(where, keys, **how):
            failures += shard.failures
        else:
            missing[where] = keys
    total, todo = (sum(map(len, parts.values())) for parts in (mine, missing))
    bar = dict(total=total, initial=total - todo, desc="extracting", disable=disable)
    pieces = [Piece(where, [by_key[key] for key in keys]) for where, keys in missing.items()]
    make = _shards_on_cluster if isinstance(runner, OnCluster) else _shards_here
    with contextlib.closing(make(runner, pieces, made, options, bar)) as written:
        for failed in written:
            failures += failed
            _refuse_failures(failures, len(jobs), limit)
    if share == runs.ALONE:
        store.clear_partial(folder)


def _refuse_other_precision(where: Path, precision: str) -> None:
    """StageError where a shard that is there was made in another precision."""
    try:
        made = store.Shard.open(where).header["settings"].get("precision", precision)
    except store.StoreError:  # not there, or damaged
        return
    if made != precision:
        raise runs.StageError(
            f"{where} was made in {made}, and here it would be {precision}: {store.AUTO}"
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """A shard to be made: its folder, and the images that belong there."""

    where: Path
    jobs: list[Job]

    @property
    def keys(self) -> list[str]:
        return [job.key for job in self.jobs]

    def refuse_failed_query(self, failed: Sequence[dict]) -> None:
        """StageError where one of the failures is a query."""
        queries = {job.key for job in self.jobs if job.query}
        _refuse_failed_query([failure for failure in failed if failure["name"] in queries])

    def salvaged(self, made: dict) -> dict[str, store.Stored]:
        """What a damaged shard still holds; says how much."""
        kept = store.salvage(self.where, **made)
        if self.where.exists():
            print(f"{self.where} is damaged: {len(kept)} of {len(self.jobs)} images are kept")
        return kept


def _shards_here(
    runner: Runner, pieces: Sequence[Piece], made: dict, options: dict, bar: dict
) -> Iterator[list[dict]]:
    """Writes one shard after the other; yields the failures of each."""
    todo = [job for piece in pieces for job in piece.jobs]
    with runner.stream(todo, **bar) as results:
        for piece in pieces:
            kept = piece.salvaged(made)
            block = itertools.islice(results, len(piece.jobs))
            items, failed = runner.local_items(block, piece.keys, kept, **options)
            piece.refuse_failed_query(failed)
            store.write_shard(piece.where, items, failures=failed, **made)
            yield failed


def shards_of(
    folder: Path, keys: Iterable[str], shard_size: int, share: tuple[int, int] = runs.ALONE
) -> dict[Path, list[str]]:
    """The shards that one of several workers writes: folder -> keys of its images.

    share: (worker, workers); worker r takes shards r, r + workers, …. The shards are those of
    `store.partition`, whatever the number of workers; without images there is an empty one.
    """
    parts = store.partition(keys, shard_size) or [[]]
    worker, workers = share
    return {
        store.shard_folder(folder, index, len(parts)): parts[index]
        for index in range(worker, len(parts), workers)
    }


def _shard_outputs(folder: Path) -> list[str]:
    shards = store.shard_folders(folder)
    return [f"{shard.name}/{name}" for shard in shards for name in SHARD_OUTPUTS]


# Beyond one machine


@contextlib.contextmanager
def _engine(
    engine: str, address: str | None, model: Path | str, how: dict
) -> Iterator["Runner | OnCluster"]:
    """What a stage's images are described with: here, or on a Ray cluster."""
    if engine == "local":
        with _runner(model, **how) as runner:
            yield runner
        return
    # Here the model tells its widths and nothing else; a mistake in it is found before Ray starts.
    with _runner(model, **(how | {"device": "cpu", "precision": "fp32"})) as here:
        with cluster.connected(address):
            yield OnCluster.of(here.model, model, how)


@dataclass(frozen=True, eq=False)
class OnCluster:
    """How images are described on a Ray cluster: as by a `Runner`, in the same batches.

    model: on this machine, for its widths. source, how: what every actor makes its own Runner of.
    """

    model: ViTGaL
    source: str
    how: dict

    @classmethod
    def of(cls, model: ViTGaL, source: Path | str, how: dict) -> "OnCluster":
        """Chooses device and precision by what the cluster has."""
        name = str(source) if str(source).startswith(UNTRAINED) else str(Path(source).absolute())
        share = _share(how)
        how = how | {"device": "cuda" if share.gpus else "cpu", "threads": how["threads"] or 1}
        if how["precision"] == "auto":
            question = partial(resolve_precision, "auto", how["device"])
            how["precision"] = cluster.ask(question, share)
        return cls(model, name, how)

    @property
    def precision(self) -> str:
        return resolve_precision(self.how["precision"])

    def run(self, pieces: Sequence, read: Callable, describe: Callable, **more: Any) -> Iterator:
        """Results of a pipeline; `describe` is given the Runner of its actor first."""
        make = partial(_Describer, describe, self.source, self.how)
        steps = dict(read=read, describe=make, share=partial(_share, self.how))
        steps |= dict(write=None, name=_named)
        return cluster.Pipeline(**(steps | more)).run(pieces)

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `_read`."""
        return {name: self.how[name] for name in ("size", "resize", "workers")}

    def recorded(self) -> dict[str, Any]:
        """What a stage's manifest keeps of it."""
        names = ("device", "precision", "batch_size", "workers", "threads")
        kept = {name: self.how[name] for name in names}
        return {"engine": "ray", "actors": _share(self.how).actors} | kept


def _share(how: dict) -> cluster.Share:
    about = dict(threads=how["threads"], workers=how["workers"], device=how["device"])
    return cluster.Share.among(cluster.resources(), **about)


class _Describer:
    """In an actor: a Runner for as long as the process lives, and what it does with each piece."""

    def __init__(self, describe: Callable[[Runner, Any], Any], source: str, how: dict):
        self._describe, self._open = describe, contextlib.ExitStack()
        self._runner = self._open.enter_context(_runner(source, **how))

    def __call__(self, value: Any) -> Any:
        with inference(self._runner.model, self._runner.precision):
            return self._describe(self._runner, value)


def _read(jobs: Sequence[Job], *, size: int, resize: str, workers: int) -> list:
    """Every job with its network input or its ImageError, as a list that can be sent."""
    return list(prefetch(partial(load, size=size, resize=resize), jobs, workers=workers))


def _named(piece: "Piece | Sequence[Job]") -> str:
    jobs = piece.jobs if isinstance(piece, Piece) else piece
    ends = " to ".join(dict.fromkeys(job.key for job in (*jobs[:1], *jobs[-1:])))
    return f"the images {ends}" if ends else "no image"


def _absolute(jobs: Iterable[Job]) -> list[Job]:
    return [replace(job, path=Path(job.path).absolute()) for job in jobs]


def _cluster_rows(
    remote: OnCluster,
    queries: Sequence[Job],
    data: RetrievalDataset,
    path: Path,
    scales: Sequence[float],
    *,
    share: float,
    disable: bool,
) -> tuple[np.ndarray, store.RowFile]:
    """The queries' descriptors, and the database's in `path`, from where they stand on disk."""
    number = len(data.database)
    settings = {"precision": remote.precision}
    rows = store.RowFile.open(path, (number, remote.model.embed_dim), settings=settings)
    todo = zip(data.database[rows.rows :], data.database_paths[rows.rows :], strict=True)
    jobs = _absolute(Job(name, image) for name, image in todo)
    blocks = [jobs[first : first + BLOCK] for first in range(0, len(jobs), BLOCK)]
    steps = dict(read=partial(_read, **remote.reading), ordered=True)
    steps |= dict(describe=partial(_describe_block, scales=tuple(scales)))
    found = remote.run([_absolute(queries), *blocks], **steps)
    bar = dict(total=number, initial=rows.rows, desc="describing", unit="image", disable=disable)
    with contextlib.closing(found), tqdm(**bar) as shown:
        described, failures = next(found)
        _refuse_failed_query(failures)
        for block, failures in found:
            rows.append(block, failures)
            shown.update(len(block))
            _refuse_failures(rows.failures, number, share)
    rows.finish()
    return described, rows


def _describe_block(
    runner: Runner, results: list, *, scales: Sequence[float]
) -> tuple[np.ndarray, list[dict]]:
    return runner.global_rows(results, len(results), scales=scales)


def _shards_on_cluster(
    remote: OnCluster, pieces: Sequence[Piece], made: dict, options: dict, bar: dict
) -> Iterator[list[dict]]:
    """Has the shards written, in any order; yields the failures of each that is whole."""
    pieces = [Piece(piece.where.absolute(), _absolute(piece.jobs)) for piece in pieces]
    steps = dict(read=partial(_read_piece, made=made, reading=remote.reading))
    steps |= dict(describe=partial(_describe_piece, options=options))
    steps |= dict(write=partial(_write_piece, made=made))
    with contextlib.closing(remote.run(pieces, **steps)) as found:
        with tqdm(**bar, unit="image") as shown:
            for where, images, failed, node in found:
                # Listed: what a network file system remembers of one name may be old.
                if not where.is_dir() and where.name not in os.listdir(where.parent):
                    raise cluster.ClusterError(
                        f"the node {node} has written {where} to a disk of its own: the run folder "
                        "must lie where every node finds it under the same path"
                    )
                shown.update(images)
                yield failed


@dataclass(frozen=True, eq=False)
class _Filled:
    """A piece on its way: its images, read or described; None: its shard is whole already."""

    piece: Piece
    content: list | None
    kept: dict[str, store.Stored] = field(default_factory=dict)
    failed: list[dict] = field(default_factory=list)


def _read_piece(piece: Piece, *, made: dict, reading: dict) -> _Filled:
    how = {name: made[name] for name in ("dtype", "settings")}
    # Whole where the machine that wrote it died before it could say so.
    if shard := store.whole_shard(piece.where, piece.keys, **how):
        return _Filled(piece, None, failed=shard.failures)
    return _Filled(piece, _read(piece.jobs, **reading), piece.salvaged(made))


def _describe_piece(runner: Runner, read: _Filled, *, options: dict) -> _Filled:
    if read.content is None:
        return read
    piece = read.piece
    items, failed = runner.local_items(read.content, piece.keys, read.kept, **options)
    piece.refuse_failed_query(failed)
    return _Filled(piece, items, failed=failed)


def _write_piece(described: _Filled, *, made: dict) -> tuple[Path, int, list[dict], str]:
    """Writes a shard under a name of its own and moves it: a second writer may be at it.

    (A machine that is given up may still be writing.) Returns the shard's folder, the number of
    images, the failures and this machine's name.
    """
    where = described.piece.where
    if described.content is not None:
        own = where.with_name(f"{store.PARTIAL}{uuid.uuid4().hex}")
        store.write_shard(own / where.name, described.content, failures=described.failed, **made)
        store.drop_index(where.parent)
        shutil.rmtree(where, ignore_errors=True)
        try:
            os.replace(own / where.name, where)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # The second writer was first; its shard is the same.
        shutil.rmtree(own)
    return where, len(described.piece.jobs), described.failed, socket.gethostname()
