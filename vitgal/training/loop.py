"""The training loop: networks with their losses, steps, validation, saved states.

What is random about a sample is a function of (seed, epoch, image index), what is random about a
step one of (seed, step, batch of the step), and the learning rate one of the epoch, so that a state
file needs no generator's state and a run that was killed continues to the same bytes as one that
was not.
"""

import contextlib
import datetime
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from tqdm.std import tqdm as text_bar

from vitgal import runs
from vitgal.models import weights
from vitgal.models.inference import resolve_precision
from vitgal.settings import MachineSettings, Recipe
from vitgal.training.augmentation import network_input
from vitgal.training.errors import Preempted, TrainingError
from vitgal.training.networks import NAMED, build_optimizer
from vitgal.training.samples import Batches, Sample, SplitData
from vitgal.training.schedule import learning_rates

LOG_EVERY = 50  # steps between two rows of the log
GRACE = 30  # seconds that a data worker outlives a request to end, for the step to finish


@dataclass
class Progress:
    """How far a run is: what a state file holds beside weights and optimizer."""

    epoch: int = 0
    step: int = 0  # finished steps of this epoch
    rows: list[dict] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # names
    best: float = -math.inf
    # Of each rank, the scalars of the steps since the last row.
    pending: list[list[dict[str, float]]] = field(default_factory=list)


class Trainer:
    """One process's share of a run: network, optimizer, data and the state folder.

    owner: the fingerprint of the run's settings; a state of another owner is refused.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: Recipe,
        machine: MachineSettings,
        folder: Path,
        data: SplitData,
        owner: str = "",
    ):
        precision = training_precision(settings)
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=torch.cuda.device_count() == 0,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout(machine))],
        )
        self.settings, self.machine = settings, machine
        self.folder, self.data, self.owner = folder, data, owner
        self.progress = Progress()
        self.rates = learning_rates(settings)
        self.steps = self.batches(0).steps
        self.pending: list[dict[str, Tensor]] = []
        self.replaced: list[str] = []
        self.asked = False  # by SIGTERM, this process
        self.stop = False  # agreed among all
        self.validation_seconds = 0.0  # an image
        self.board = None
        self._prepare(network)

    def _prepare(self, network: nn.Module) -> None:
        settings, accelerator = self.settings, self.accelerator
        on_gpu = accelerator.device.type == "cuda"
        if settings.channels_last:
            network = network.to(memory_format=torch.channels_last)
        if settings.sync_batchnorm and on_gpu and accelerator.num_processes > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = network.to(accelerator.device)
        self.average = None
        if settings.ema_decay is not None:
            self.average = ModelEmaV3(network, decay=settings.ema_decay, use_warmup=True)
        if settings.compile:
            network.compile()
        self.network, self.optimizer = accelerator.prepare(
            network, build_optimizer(network, settings)
        )

    @property
    def bare(self) -> nn.Module:
        """The network that trains, without what distributes it."""
        return self.accelerator.unwrap_model(self.network)

    @property
    def result(self) -> nn.Module:
        """The network that is validated and written: the moving average where there is one."""
        return self.bare if self.average is None else self.average.module

    # States

    @property
    def state_file(self) -> Path:
        return self.folder / "state" / "last.pt"

    def load_state(self) -> bool:
        """Continues from the last saved state; False where there is none.

        A damaged one is passed over, with a warning, for the one before. Raises TrainingError for
        the state of another run, and where no state is whole.
        """
        state = self._read_state()
        if state is None:
            return False
        if state.get("owner") != self.owner:
            raise TrainingError(
                f"{self.state_file} was made by a run with other settings or data; take the "
                "folder state/ away, or set overwrite: true to start anew"
            )
        self.bare.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if self.progress.pending:
            mine = self.progress.pending[self.accelerator.process_index]
            self.pending = [_tensors(step) for step in mine]
        return True

    def _read_state(self) -> dict | None:
        damaged = []
        for path in (self.state_file, self.state_file.with_name("previous.pt")):
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                damaged.append(f"{path} cannot be read ({str(error).splitlines()[0][:100]})")
                continue
            for text in damaged:
                warnings.warn(f"{text}; going on from {path.name}", stacklevel=3)
            return state
        if damaged:
            raise TrainingError("; ".join(damaged) + "; take state/ away to start anew")
        return None

    def save_state(self) -> None:
        """Writes log and state atomically, keeping the state before as `previous.pt` (rank 0).

        Only after a row of the log, or after `share_pending`. A disk that is full leaves both
        states as they are.
        """
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "owner": self.owner,
            "network": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else {},
            "scaler": scaler.state_dict() if scaler is not None else {},
            "progress": dict(self.progress.__dict__),
        }
        try:
            self._write_log()
            with runs.atomic(self.state_file) as temporary:
                with open(temporary, "wb") as handle:  # the file's own errors, not torch's
                    torch.save(state, handle)
                self._keep_previous()
        except (OSError, RuntimeError) as error:
            if _of_data_worker(error):
                raise
            raise TrainingError(
                f"the state cannot be written to {self.state_file} ({error}); the one before it is "
                "whole: make room on the disk and run the same again"
            ) from error

    def _write_log(self) -> None:
        """Before the state: the log may be ahead of it, and a restart then writes it anew."""
        lines = [json.dumps(runs.plain(row)) + "\n" for row in self.progress.rows]
        runs.write_text(self.folder / "log.jsonl", "".join(lines))

    def _keep_previous(self) -> None:
        if self.state_file.exists():
            with runs.atomic(self.state_file.with_name("previous.pt")) as temporary:
                os.link(self.state_file, temporary)

    # A run

    def run(self, watch: Callable[[pd.DataFrame], None] | None, show: bool) -> None:
        """Trains from where the state stands to the last epoch.

        Raises Preempted after SIGTERM, TrainingError for what else stops it.
        """
        if self.steps == 0:
            settings = self.settings
            raise TrainingError(
                f"{self.data.train_count} training images are fewer than one step of "
                f"{settings.batch_size} x {settings.accumulate} on each of "
                f"{self.accelerator.num_processes} processes; make batch_size smaller"
            )
        done = self.steps * self.progress.epoch + self.progress.step
        main = self.accelerator.is_main_process
        # A forked or launched process has no notebook to show a widget in, but it can write text.
        alone = self.accelerator.num_processes == 1
        bar = (tqdm if alone else text_bar)(
            total=self.steps * self.settings.epochs,
            initial=done,
            disable=not (show and main),
            unit="step",
        )
        with self._until_sigterm(), self._boards(), bar:
            if done == 0 and self.machine.dry_run:
                self.dry_run()
            while self.progress.epoch < self.settings.epochs:
                with self._told_errors():
                    self.run_epoch(bar)
                if watch is not None and main:
                    watch(pd.DataFrame(self.progress.rows))
        self.accelerator.wait_for_everyone()

    def batches(self, epoch: int, first: int = 0) -> Batches:
        return Batches(
            count=self.data.train_count,
            batch_size=self.settings.batch_size,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            seed=self.settings.seed,
            epoch=epoch,
            first=first,
            accumulate=self.settings.accumulate,
            labels=self.data.train.labels if self.settings.balanced else None,
        )

    def run_epoch(self, bar: tqdm) -> None:
        """One epoch (or what is left of it), its validation, its row in the log, its state."""
        progress, settings = self.progress, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[progress.epoch] * group.get("lr_scale", 1.0)
        began = saved = time.monotonic()
        done = 0
        self.network.train()
        batches = self.read(self.batches(progress.epoch, progress.step))
        while progress.step < self.steps:
            self.pending.append(self.run_step([next(batches) for _ in range(settings.accumulate)]))
            done += 1
            bar.update()
            last = progress.step == self.steps
            if last or progress.step % LOG_EVERY == 0:
                self.add_row(done, time.monotonic() - began)
                began, done = time.monotonic(), 0
                bar.set_postfix(epoch=progress.epoch, loss=f"{progress.rows[-1]['loss']:.3f}")
                if not last and time.monotonic() - saved > 60 * self.machine.checkpoint_minutes:
                    saved = time.monotonic()
                    self.save_state()
            if self.stop:
                self.stop_preempted()
        batches.close()
        self.end_epoch()

    def run_step(self, batches: Sequence[Sample]) -> dict[str, Tensor]:
        """Forward and backward of each batch, one update; returns the detached mean scalars.

        A loss that is not finite on any rank stops all of them before the update.
        """
        accelerator, results = self.accelerator, []
        before = [buffer.clone() for buffer in self.bare.buffers()]
        for place, batch in enumerate(batches):
            last = place + 1 == len(batches)
            self._seed(place)
            # The gradients of the last batch alone are exchanged, with those before in them.
            with contextlib.nullcontext() if last else accelerator.no_sync(self.network):
                result = self.network(*self.moved(batch))
                results.append({key: value.detach() for key, value in result.items()})
                agreed = self._agree(results) if last else None
                accelerator.backward(result["loss"] / len(batches))
        finite, self.stop = agreed()
        if not finite:
            for buffer, value in zip(self.bare.buffers(), before, strict=True):
                buffer.copy_(value)  # BatchNorm's statistics have seen the batch
            self.stop_not_finite(batches, results)
        self._update()
        for batch in batches:
            self._note_unreadable(batch, self.data.train)
        self.progress.step += 1
        return {key: torch.stack([one[key] for one in results]).mean() for key in results[0]}

    def _seed(self, place: int) -> None:
        """Seeds torch anew for each batch: drop path then draws the same in a resumed run."""
        progress, accelerator = self.progress, self.accelerator
        part = place * accelerator.num_processes + accelerator.process_index
        draw = (self.settings.seed, progress.epoch, progress.step, part)
        torch.manual_seed(int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0] >> 1))

    def moved(self, batch: Sample) -> tuple[Tensor, Tensor]:
        """A batch on the device as the network takes it: normalised pictures, labels."""
        device = self.accelerator.device
        labels = batch.label.to(device, non_blocking=True)
        pictures = network_input(batch.picture.to(device, non_blocking=True), batch.hole)
        if self.settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        return pictures, labels

    def _agree(self, results: list[dict[str, Tensor]]) -> Callable[[], tuple[bool, bool]]:
        """Asks all ranks whether every loss is finite and whether any is to stop.

        Call what it returns for the answer. On a GPU the question is copied back while the backward
        pass already runs, so that nothing waits for it.
        """
        bad = (~torch.isfinite(torch.stack([result["loss"] for result in results]))).any()
        stop = torch.tensor(float(self.asked), device=bad.device)
        flags = torch.stack([bad.float(), stop])
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, "sum")
        if flags.device.type != "cuda":
            return lambda: (not flags[0], bool(flags[1]))
        answer = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> tuple[bool, bool]:
            arrived.synchronize()
            return not answer[0], bool(answer[1])

        return wait

    def _update(self) -> None:
        if self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            finished = self.progress.epoch * self.steps + self.progress.step + 1
            self.average.update(self.bare, step=finished)

    def read(
        self, batches: Sequence[list[tuple[int, int]]], dataset: Dataset | None = None
    ) -> Iterator[Sample]:
        """Batches of training images (or of `dataset`), read by the data workers."""
        loader = DataLoader(
            self.data.train if dataset is None else dataset,
            batch_sampler=batches,
            num_workers=self.machine.data_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=_start_worker,
            timeout=60 * self.machine.timeout_minutes if self.machine.data_workers else 0,
        )
        others = set(multiprocessing.active_children())
        batches = iter(loader)
        workers = set(multiprocessing.active_children()) - others
        try:
            yield from batches
        except RuntimeError as error:
            if _of_data_worker(error):
                _kill(workers)
            raise

    def _note_unreadable(self, batch: Sample, dataset: Dataset) -> None:
        found = batch.unreadable[batch.unreadable >= 0].tolist()
        self.replaced += [str(dataset.names[index]) for index in found]

    def add_row(self, steps: int, seconds: float) -> None:
        """Adds the mean of the pending steps to the log.

        steps, seconds: what this process has just done and how long it took; after a resumption
        fewer steps than are pending.
        """
        progress, accelerator = self.progress, self.accelerator
        table = {
            key: torch.stack([step[key] for step in self.pending]).float()
            for key in self.pending[0]
        }
        means = accelerator.reduce({key: value.mean() for key, value in table.items()}, "mean")
        self.pending, progress.pending = [], []
        self._share_unreadable()
        images = self.settings.batch_size * self.settings.accumulate * accelerator.num_processes
        finished = progress.epoch * self.steps + progress.step
        progress.rows.append(
            {
                "epoch": progress.epoch,
                "step": finished,
                "lr": self.rates[progress.epoch],
                **{key: float(value) for key, value in means.items()},
                "images_per_second": steps * images / seconds,
                "hours_left": self._seconds_left(finished, seconds / steps) / 3600,
            }
        )
        self._show_row(progress.rows[-1])

    def _seconds_left(self, finished: int, each: float) -> float:
        """At this pace, with the images that are still to validate as fast as the last ones."""
        epochs = range(self.progress.epoch + 1, self.settings.epochs + 1)
        due = sum(len(self.due(epoch)) for epoch in epochs)
        left = self.steps * self.settings.epochs - finished
        return left * each + due * self.validation_seconds

    def _share_unreadable(self) -> None:
        found = gather_object(self.replaced)
        self.progress.unreadable = sorted({*self.progress.unreadable, *found})
        self.replaced = []

    def end_epoch(self) -> None:
        """Validation where it is due, the best weights, the state at the epoch's end."""
        progress = self.progress
        failed = progress.unreadable
        if len(failed) > self.data.max_failed_share * self.data.train_count:
            names = ", ".join(str(self.data.train.folder / name) for name in failed[:5])
            raise TrainingError(f"{len(failed)} training images cannot be read: {names}")
        finished = progress.epoch + 1
        images = self.due(finished)
        if len(images):
            self.save_state()  # validation can be long
            began = time.monotonic()
            scores = self.validate(images)
            self.validation_seconds = (time.monotonic() - began) / len(images)
            progress.rows[-1] |= scores
            self._show_row(scores | {"step": progress.rows[-1]["step"]})
            self._keep_best()
        progress.epoch, progress.step = finished, 0
        self.save_state()

    def due(self, finished: int) -> np.ndarray:
        """Positions of the images that are validated after so many epochs.

        All of them every `validate_every` epochs and at the end, otherwise those of the retrieval
        set: far fewer, and the number to watch. The autoencoder has no such number.
        """
        settings, data = self.settings, self.data
        if finished % settings.validate_every == 0 or finished == settings.epochs:
            return np.arange(len(data.validation))
        if self.bare.retrieves and data.ground_truth is not None:
            return np.union1d(data.queries, data.database)
        return np.arange(0)

    def _keep_best(self) -> None:
        """Writes the model as state/best.safetensors where it scores higher than ever before."""
        row, progress = self.progress.rows[-1], self.progress
        score = row.get("val_map", row.get("val_accuracy", math.nan))
        if score > progress.best:
            progress.best = score
            if self.accelerator.is_main_process:
                weights.save_model(self.result.model, self.folder / "state" / "best.safetensors")

    def validate(self, images: np.ndarray | None = None) -> dict[str, float]:
        """Scores of validation images, by position (None: all), each rank taking its share."""
        accelerator, data = self.accelerator, self.data
        images = np.arange(len(data.validation)) if images is None else images
        self._share_statistics()
        network = self.result
        network.eval()
        mine = images[accelerator.process_index :: accelerator.num_processes].tolist()
        parts = []
        size = self.settings.batch_size
        keys = [[(0, index) for index in mine[at : at + size]] for at in range(0, len(mine), size)]
        batches = self.read(keys, data.validation)
        for _ in range(-(-len(images) // (size * accelerator.num_processes))):
            batch = next(batches, None)  # some ranks have one less
            if batch is not None:
                with accelerator.autocast():
                    result = network.validate(*self.moved(batch))
                found = {key: value.cpu() for key, value in result.items()}
                replaced = batch.unreadable >= 0  # by another image, which stands in this place
                place = torch.where(replaced, batch.unreadable, batch.index)
                parts.append((place.numpy(), found))
                self._note_unreadable(batch, data.validation)
            if self._any_asked():
                raise Preempted("asked to end (SIGTERM) while validating; the epoch is saved")
        batches.close()
        self._share_unreadable()
        return data.score(gather_object(parts))

    def _any_asked(self) -> bool:
        """Whether any rank was asked to end; all ranks ask together, and wait for the answer."""
        if self.accelerator.num_processes == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum"))

    def _share_statistics(self) -> None:
        """Gives every rank rank 0's BatchNorm statistics, which are the ones that are written."""
        if self.accelerator.num_processes > 1:
            for buffer in self.result.buffers():
                buffer.copy_(broadcast(buffer))

    # What stops a run

    @contextlib.contextmanager
    def _until_sigterm(self) -> Iterator[None]:
        """Notes SIGTERM instead of dying of it; the step that runs is finished and saved."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread alone
            return

        def note(*_: object) -> None:
            self.asked = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def stop_preempted(self) -> None:
        """Saves the state in the middle of an epoch, what each rank has pending included."""
        steps = [{key: float(value) for key, value in step.items()} for step in self.pending]
        self.progress.pending = gather_object([steps])
        self._share_unreadable()
        self.save_state()
        self.accelerator.wait_for_everyone()
        raise Preempted(
            f"asked to end (SIGTERM) after step {self.progress.step} of epoch "
            f"{self.progress.epoch}; the state is saved: start the same again to go on"
        )

    def stop_not_finite(self, batches: Sequence[Sample], results: list[dict[str, Tensor]]) -> None:
        """Stops every rank, with the images of all; keeps the weights where they are still good."""
        names = [
            str(self.data.train.names[index])
            for batch, result in zip(batches, results, strict=True)
            if not torch.isfinite(result["loss"])
            for index in batch.index.tolist()
        ]
        names = gather_object(names)
        # Gathered before anything is decided: a rank that did not take part would hang the others.
        steps = [{key: float(value) for key, value in step.items()} for step in self.pending]
        self.progress.pending = gather_object([steps])
        shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        kept = f"the last whole state, if any, stands in {self.state_file}"
        if all(bool(torch.isfinite(value).all()) for value in self.bare.state_dict().values()):
            self.save_state()
            kept = f"the state before this step is saved in {self.state_file}"
        self.accelerator.wait_for_everyone()  # a rank that ends now would take rank 0 with it
        raise TrainingError(
            f"the loss is not finite at step {self.progress.step} of epoch {self.progress.epoch}, "
            f"images {shown}; {kept}: lower lr, set clip_grad, or train in fp32"
        )

    @contextlib.contextmanager
    def _told_errors(self) -> Iterator[None]:
        """Says what to do about too little memory and about data workers that are lost.

        A worker's death is raised wherever the process then is, by the signal that tells of it.
        """
        try:
            yield
        except RuntimeError as error:
            first = str(error).split("\n")[0]
            if isinstance(error, torch.OutOfMemoryError) or "CPUAllocator" in str(error):
                raise TrainingError(
                    f"out of memory at step {self.progress.step} of epoch {self.progress.epoch} "
                    f"with batch_size {self.settings.batch_size}; halve it and double accumulate, "
                    f"which is the same step but for BatchNorm ({first})"
                ) from error
            if _of_data_worker(error):
                raise TrainingError(
                    f"the images are no longer read: {error}; a worker that dies without a word "
                    "was most likely killed for memory (lower data_workers), one silent for "
                    f"timeout_minutes = {self.machine.timeout_minutes:g} waits for the disk; run "
                    "the same again to go on"
                ) from error
            raise

    def dry_run(
        self, measure: Callable[[int], int] | None = None, available: int | None = None
    ) -> None:
        """Raises TrainingError with the batch size that fits, where the recipe's does not.

        Two small batches are tried, and the memory that their steps need grows with the batch along
        a line. Without arguments only a GPU is measured.

        Args:
            measure: bytes at the peak of a step with so many images; None measures.
            available: bytes that a step may take.
        """
        if measure is None:
            if self.accelerator.device.type != "cuda":
                return
            measure, available = self._peak_memory, self._memory()
        size = self.settings.batch_size
        fits = fitting_batch({count: measure(count) for count in (2, 4)}, available)
        if size > fits:
            raise TrainingError(
                f"a batch of {size} images needs more memory than the {available / 2**30:.1f} GiB "
                f"there are; about {fits} would fit: set batch_size {fits} or lower, and "
                "accumulate for the same number of images in a step (dry_run: false skips this)"
            )

    def _memory(self) -> int:
        """Bytes of the GPU that a step may take, with a reserve for what is scattered about."""
        device = self.accelerator.device
        free, _ = torch.cuda.mem_get_info(device)
        moments = 2 * sum(
            value.numel() * value.element_size()
            for value in self.bare.parameters()
            if value.requires_grad
        )
        return int(0.94 * (free + torch.cuda.memory_reserved(device))) - moments

    def _peak_memory(self, count: int) -> int:
        torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        self.try_step(count)
        return torch.cuda.max_memory_allocated(self.accelerator.device)

    def try_step(self, count: int) -> None:
        """Forward and backward of `count` grey images, which leave no trace in the network."""
        network, size = self.bare, self.settings.image_size
        kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
        network.train()
        blank = torch.zeros(count, dtype=torch.int64)
        grey = torch.full((count, 3, size, size), 128, dtype=torch.uint8)
        batch = Sample(grey, torch.zeros(count, 3, dtype=torch.int64), blank, blank, blank - 1)
        with self.accelerator.autocast():
            network(*self.moved(batch))["loss"].backward()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(kept[name])

    # TensorBoard

    @contextlib.contextmanager
    def _boards(self) -> Iterator[None]:
        """The log as TensorBoard's files while the run is on; written anew after a restart."""
        if not self.accelerator.is_main_process:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard"
        if folder.exists():
            shutil.rmtree(folder)  # it may be ahead of the state
        with SummaryWriter(str(folder)) as self.board:
            for row in self.progress.rows:
                self._show_row(row)
            yield
        self.board = None

    def _show_row(self, row: dict) -> None:
        if self.board is not None:
            for key in row.keys() - {"epoch", "step"}:
                self.board.add_scalar(key, row[key], row["step"])


def timeout(machine: MachineSettings) -> datetime.timedelta:
    """How long the processes of a run wait for each other."""
    return datetime.timedelta(minutes=machine.timeout_minutes)


def training_precision(settings: Recipe) -> str:
    """Returns the precision of training, "auto" resolved without initialising CUDA."""
    device = "cuda" if torch.cuda.device_count() else "cpu"  # device_count asks NVML, not CUDA
    return resolve_precision(settings.precision, device, forks=True)


def fitting_batch(peaks: dict[int, int], available: int) -> int:
    """The largest batch whose step stays within `available` bytes; 0 where none does.

    peaks: bytes at the peak of a step, of two batch sizes; the rest of the line follows.
    """
    (small, low), (large, high) = sorted(peaks.items())
    each = max((high - low) / (large - small), 1)
    return max(int((available - low) // each) + small, 0)


def _tensors(step: dict[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in step.items()}


def _of_data_worker(error: Exception) -> bool:
    """Whether torch says that a data worker has died or is silent."""
    return isinstance(error, RuntimeError) and "DataLoader" in str(error)


def _kill(workers: Iterable[multiprocessing.Process]) -> None:
    """Ends data workers for good: one that waits for a disk does not hear a request to end."""
    alone = threading.current_thread() is threading.main_thread()
    # torch's handler would raise each death here, in place of the error that is on its way.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if alone else None
    try:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=GRACE)
    finally:
        if alone:
            signal.signal(signal.SIGCHLD, handler)


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    runs.disown_locks()  # or a killed run could not be started again before its workers notice
    # A cluster sends SIGTERM to every process of a job: the worker lets the step that runs finish,
    # and still ends when it alone is told to.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
