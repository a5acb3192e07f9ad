"""The training loop: steps, epochs, validation, and the log.

Samples are seeded by (seed, epoch, image index), steps by (seed, epoch, step, batch of the step);
the learning rate depends on the epoch. States therefore hold no generator, and a resumed run gives
the same bytes as an uninterrupted one.
"""

import contextlib
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from tqdm.std import tqdm as text_bar

from vitgal import runs
from vitgal.models.inference import resolve_precision
from vitgal.settings import Recipe
from vitgal.training import processes
from vitgal.training.augmentation import network_input, scaled_hole
from vitgal.training.checkpoints import Checkpoints, Progress
from vitgal.training.errors import Preempted, TrainingError, WorkerLost
from vitgal.training.fit import Fit
from vitgal.training.memory import measure_batch
from vitgal.training.networks import build_optimizer, learning_rates
from vitgal.training.samples import Batches, Sample, SplitData
from vitgal.training.trackers import open_trackers

LOG_EVERY = 50  # steps between two rows of the log
NAMED = 8  # images that an error names
MAX_UNREADABLE = 0.001  # fraction of the training images that may be unreadable


@torch.no_grad()
def _restore_buffers(network: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(network.buffers(), values, strict=True):
        buffer.copy_(value)


def _described(change: dict) -> str:
    return f"{change['setting']} {change['from']} -> {change['to']}"


def training_precision(settings: Recipe) -> str:
    """Returns the precision of training, without initialising CUDA."""
    device = "cuda" if torch.cuda.device_count() else "cpu"  # device_count queries NVML, not CUDA
    return resolve_precision(settings.precision, device, forks=True)


class Trainer:
    """One process of a training: network, optimizer, data and progress."""

    def __init__(self, network: nn.Module, fit: Fit, data: SplitData):
        settings, machine, folder = fit.settings, fit.machine, fit.folder
        precision = training_precision(settings)
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=torch.cuda.device_count() == 0,
            kwargs_handlers=processes.process_options(machine, network),
        )
        self.fit, self.data = fit, data
        self.settings, self.machine, self.folder = settings, machine, folder
        batches = self.accelerator.num_processes * settings.accumulate
        self.step_images = batches * settings.batch_size
        self.progress = Progress(images=self.step_images)
        factor = self.step_images / settings.step_images if settings.scale_lr else 1
        self.rates = [factor * rate for rate in learning_rates(settings)]
        self.steps = self.batches(0).steps
        self.pending: list[dict[str, Tensor]] = []  # scalars of the steps since the last row
        self.replaced: list[str] = []  # names of unreadable images that the log lacks
        self.termination = processes.Termination()
        self.stop = False  # whether any rank received an ending signal
        self.seconds_per_validation_image = 0.0
        self.boards: list[GeneralTracker] = []
        self._prepare(network)
        parts = {
            "network": self.bare,
            "optimizer": self.optimizer,
            "average": None if self.average is None else self.average.module,
            "scaler": self.accelerator.scaler,
        }
        self.checkpoints = Checkpoints(folder, fit.owner, parts)

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
        """The trained network, unwrapped."""
        return self.accelerator.unwrap_model(self.network)

    @property
    def result(self) -> nn.Module:
        """The network that is validated and written: the moving average where there is one."""
        return self.bare if self.average is None else self.average.module

    @property
    def finished_steps(self) -> int:
        """Steps since the beginning of the run."""
        return self.progress.epoch * self.steps + self.progress.step

    # A run

    def load_state(self) -> bool:
        """Continues from the last saved state; False without one, else as `Checkpoints.load`."""
        progress = self.checkpoints.load()
        if progress is not None:
            self.progress = progress
            self.pending = self._own_pending(progress.pending)
            if progress.images not in (0, self.step_images):
                # Images of the broken step can come twice; none is left out.
                progress.step = progress.step * progress.images // self.step_images
                progress.step = min(progress.step, self.steps - 1)
            progress.images = self.step_images
        changes = self.fit.changes(self.progress.changes, self.finished_steps)
        self.progress.changes += changes
        if changes and self.accelerator.is_main_process:
            listed = "; ".join(map(_described, changes))
            tqdm.write(f"going on at step {self.finished_steps} with other settings: {listed}")
        return progress is not None

    def _own_pending(self, saved: list[list[dict[str, float]]]) -> list[dict[str, Tensor]]:
        """Returns the pending steps of this rank; their means where there were other ranks."""
        if len(saved) == self.accelerator.num_processes:
            steps = [[step] for step in saved[self.accelerator.process_index]]
        else:
            steps = zip(*saved, strict=True)
        return [
            {key: torch.tensor([rank[key] for rank in ranks]).mean() for key in ranks[0]}
            for ranks in steps
        ]

    def save_state(self) -> None:
        """Saves log and state (rank 0); only after a row of the log or `_gather_pending`."""
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.progress)

    def run(self, watch: Callable[[pd.DataFrame], None] | None, show: bool) -> None:
        """Trains from the current state to the last epoch; raises TrainingError and Preempted.

        watch: called on rank 0 with the log so far after each epoch. show: whether it has a bar.
        """
        if self.steps == 0:
            raise TrainingError(
                f"{len(self.data.train)} training images are fewer than one step of "
                f"{self.settings.batch_size} x {self.settings.accumulate} on each of "
                f"{self.accelerator.num_processes} processes; make batch_size smaller"
            )
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.accelerator.num_processes))
        picture = 3 * (self.settings.image_size**2 + (self.settings.teacher_size or 0) ** 2)
        processes.check_shared_memory(self.machine, self.settings.batch_size * picture, local)
        if show and self.accelerator.is_main_process:
            tqdm.write(self.plan())
        with self.termination, self._trackers(), self._bar(show) as bar:
            device = self.accelerator.device
            if self.finished_steps == 0 and self.machine.dry_run and device.type == "cuda":
                measure_batch(device, self.bare, self.try_step, self.settings.batch_size)
            while self.progress.epoch < self.settings.epochs:
                try:
                    self.run_epoch(bar)
                except RuntimeError as error:
                    self._explain(error)
                    raise
                if watch is not None and self.accelerator.is_main_process:
                    watch(pd.DataFrame(self.progress.rows))
        self.accelerator.wait_for_everyone()

    def plan(self) -> str:
        """Describes a step and the run, and warns of a batch size that does not fit the rates."""
        settings, ranks = self.settings, self.accelerator.num_processes
        parts = f"{ranks} x {settings.batch_size} x {settings.accumulate}"
        text = (
            f"{self.step_images} images a step (processes x batch_size x accumulate: {parts}), "
            f"{self.steps:,} steps an epoch, {self.steps * settings.epochs:,} in all, "
            f"learning rate up to {max(self.rates):.3g}"
        )
        if self.bare.retrieves and self.data.ground_truth is not None:
            labels = self.data.validation.labels[self.data.retrieval_set]
            seen = "are not" if (labels < 0).all() else "are"
            text += f"; the landmarks of retrieval validation {seen} trained on"
        meant = settings.step_images
        if meant is None or meant == self.step_images or settings.scale_lr:
            return text
        batch = meant / (ranks * settings.accumulate)
        remedy = f"batch_size {batch:.0f}" if batch.is_integer() else "another batch_size"
        return (
            f"{text}\nNOTE the recipe's rates are meant for {meant} images a step: set {remedy}, "
            f"or scale_lr: true, which multiplies them by {self.step_images / meant:g}"
        )

    def run_epoch(self, bar: tqdm) -> None:
        """Runs one epoch, or the rest of it: steps, validation, log and state."""
        progress = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[progress.epoch] * group.get("lr_scale", 1.0)
        self.network.train()
        with contextlib.closing(self.read(self.batches(progress.epoch, progress.step))) as batches:
            self._run_steps(batches, bar)
        self.end_epoch()

    def _run_steps(self, batches: Iterator[Sample], bar: tqdm) -> None:
        progress = self.progress
        began = saved = time.monotonic()
        done = 0
        while progress.step < self.steps:
            accumulated = [next(batches) for _ in range(self.settings.accumulate)]
            if scalars := self.run_step(accumulated):
                self.pending.append(scalars)
            done += 1
            bar.update()
            last = progress.step == self.steps
            if last or progress.step % LOG_EVERY == 0:
                self.add_row(done, time.monotonic() - began)
                began, done = time.monotonic(), 0
                loss = progress.rows[-1].get("loss", math.nan)
                bar.set_postfix(epoch=progress.epoch, loss=f"{loss:.3f}")
                minutes = (time.monotonic() - saved) / 60
                if not last and minutes > self.machine.checkpoint_minutes:
                    saved = time.monotonic()
                    self.save_state()
            if self.stop:
                self._stop_preempted()
        next(batches, None)  # the workers end by themselves

    def run_step(self, batches: Sequence[Sample]) -> dict[str, Tensor]:
        """Runs forward and backward of each batch and one update; returns the scalars' means ().

        A loss that is not finite on any rank stops all of them before the update, or is passed over
        by all, which gives no scalars.
        """
        accelerator, results = self.accelerator, []
        buffers = [buffer.clone() for buffer in self.bare.buffers()]
        for number, batch in enumerate(batches):
            last = number + 1 == len(batches)
            self._seed(number)
            # Ranks exchange gradients once, when those of all batches are summed.
            with contextlib.nullcontext() if last else accelerator.no_sync(self.network):
                result = self.network(*self.to_device(batch))
                results.append({key: value.detach() for key, value in result.items()})
                agreement = self._begin_agreement(results) if last else None
                accelerator.backward(result["loss"] / len(batches))
        not_finite, self.stop = agreement()
        if not_finite:
            _restore_buffers(self.bare, buffers)  # BatchNorm's already include the batch
            self._pass_over(self._images_not_finite(batches, results))
            return {}
        self._update()
        for batch in batches:
            self._note_unreadable(batch, self.data.train)
        self.progress.step += 1
        return {key: torch.stack([result[key] for result in results]).mean() for key in results[0]}

    def _seed(self, number: int) -> None:
        """Seeds torch for each batch, so that drop path draws the same in a resumed run."""
        progress, accelerator = self.progress, self.accelerator
        part = number * accelerator.num_processes + accelerator.process_index
        draw = (self.settings.seed, progress.epoch, progress.step, part)
        torch.manual_seed(int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0] >> 1))

    def _begin_agreement(self, results: list[dict[str, Tensor]]) -> Callable[[], list[bool]]:
        """Gathers two flags of all ranks: a loss is not finite; SIGTERM was received."""
        losses = torch.stack([result["loss"] for result in results])
        not_finite = (~torch.isfinite(losses)).any().float()
        stop = torch.tensor(float(bool(self.termination.requested)), device=losses.device)
        return processes.begin_agreement(self.accelerator, torch.stack([not_finite, stop]))

    def _update(self) -> None:
        if self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.bare, step=self.finished_steps + 1)

    # Data

    def batches(self, epoch: int, first: int = 0) -> Batches:
        """Returns this rank's batches of an epoch from step `first` on."""
        return Batches(
            count=len(self.data.train),
            batch_size=self.settings.batch_size,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            seed=self.settings.seed,
            epoch=epoch,
            first=first,
            accumulate=self.settings.accumulate,
            labels=self.data.train.labels if self.settings.balanced else None,
        )

    def read(
        self, batches: Sequence[list[tuple[int, int]]], dataset: Dataset | None = None
    ) -> Iterator[Sample]:
        """Yields batches of training images, or of `dataset`, read by the data workers."""
        dataset = self.data.train if dataset is None else dataset
        pin_memory = self.accelerator.device.type == "cuda"
        return processes.read_batches(dataset, batches, self.machine, pin_memory=pin_memory)

    def to_device(self, batch: Sample) -> tuple[Tensor, ...]:
        """Returns a batch as network input (B, 3, S, S) float32 and labels (B,) on the device.

        A teacher of another size gets its own input (B, 3, T, T) as a third.
        """
        device = self.accelerator.device
        labels = batch.label.to(device, non_blocking=True)
        pictures = network_input(batch.picture.to(device, non_blocking=True), batch.hole)
        if self.settings.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        if batch.view.numel() == 0:
            return pictures, labels
        holes = scaled_hole(batch.hole, batch.view.shape[-1] / batch.picture.shape[-1])
        return pictures, labels, network_input(batch.view.to(device, non_blocking=True), holes)

    def _note_unreadable(self, batch: Sample, dataset: Dataset) -> None:
        indices = batch.unreadable[batch.unreadable >= 0].tolist()
        self.replaced += [str(dataset.names[index]) for index in indices]

    def _gather_unreadable(self) -> None:
        names = gather_object(self.replaced)
        self.progress.unreadable = sorted({*self.progress.unreadable, *names})
        self.replaced = []

    # Validation

    def end_epoch(self) -> None:
        """Validates if due, keeps the best model, saves the state."""
        progress, unreadable = self.progress, self.progress.unreadable
        if len(unreadable) > MAX_UNREADABLE * len(self.data.train):
            names = ", ".join(str(self.data.train.folder / name) for name in unreadable[:5])
            raise TrainingError(f"{len(unreadable)} training images cannot be read: {names}")
        finished = progress.epoch + 1
        images = self.due(finished)
        if len(images):
            self.save_state()  # validation can be long
            began = time.monotonic()
            scores = self.validate(images)
            self.seconds_per_validation_image = (time.monotonic() - began) / len(images)
            progress.rows[-1] |= scores
            self._draw(scores, progress.rows[-1]["step"])
            self._keep_best()
        progress.epoch, progress.step = finished, 0
        self.save_state()

    def due(self, finished: int) -> Sequence[int]:
        """Returns the positions (V,) of the images to validate after `finished` epochs.

        All of them every `validate_every` epochs and at the end, otherwise the retrieval set, which
        the autoencoder does not need.
        """
        settings, data = self.settings, self.data
        if finished % settings.validate_every == 0 or finished == settings.epochs:
            return range(len(data.validation))
        return data.retrieval_set if self.bare.retrieves else range(0)

    def _keep_best(self) -> None:
        row, progress = self.progress.rows[-1], self.progress
        score = row.get("val_map", row.get("val_accuracy", math.nan))
        if score > progress.best:
            progress.best = score
            if self.accelerator.is_main_process:
                self.checkpoints.save_best(self.result.model)

    def validate(self, images: Sequence[int]) -> dict[str, float]:
        """Scores validation images, positions (V,), divided over the ranks."""
        accelerator, data, network = self.accelerator, self.data, self.result
        processes.broadcast_buffers(accelerator, network)
        network.eval()
        own = images[accelerator.process_index :: accelerator.num_processes]
        size = self.settings.batch_size
        starts = range(0, len(own), size)
        keys = ([(0, int(index)) for index in own[at : at + size]] for at in starts)
        results = []
        with contextlib.closing(self.read(keys, data.validation)) as batches:
            for _ in range(-(-len(images) // (size * accelerator.num_processes))):
                results += self._validate_batch(network, next(batches, None))
            next(batches, None)
        self._gather_unreadable()
        return data.score(gather_object(results))

    def _validate_batch(
        self, network: nn.Module, batch: Sample | None
    ) -> list[tuple[np.ndarray, dict[str, Tensor]]]:
        """Returns a batch's positions and the network's results; some ranks have a batch less."""
        results = []
        if batch is not None:
            with self.accelerator.autocast():
                result = network.validate(*self.to_device(batch))
            # The result counts for the requested image even if another replaced it.
            positions = torch.where(batch.unreadable >= 0, batch.unreadable, batch.index)
            results.append((positions.numpy(), {key: value.cpu() for key, value in result.items()}))
            self._note_unreadable(batch, self.data.validation)
        if processes.any_rank(self.accelerator, bool(self.termination.requested)):
            raise Preempted(
                "ended by a signal while validating; the epoch is saved: start the same again"
            )
        return results

    # The log

    def add_row(self, steps: int, seconds: float) -> None:
        """Adds the mean of the pending steps over all ranks to the log.

        steps, seconds: since the last row in this process; a resumed run has more pending steps.
        """
        progress, accelerator = self.progress, self.accelerator
        means = {
            key: torch.stack([step[key] for step in self.pending]).float().mean()
            for key in (self.pending[0] if self.pending else ())
        }
        means = accelerator.reduce(means, "mean")
        self.pending, progress.pending = [], []
        self._gather_unreadable()
        since = progress.rows[-1]["step"] if progress.rows else 0
        changes = [change for change in progress.changes if change["step"] >= since]
        skipped = sum(entry["step"] >= since for entry in progress.skipped)
        row = {
            "epoch": progress.epoch,
            "step": self.finished_steps,
            "lr": self.rates[progress.epoch],
            **{key: float(value) for key, value in means.items()},
            "images_per_second": steps * self.step_images / seconds,
            "hours_left": self._seconds_left(seconds / steps) / 3600,
        }
        row |= {"changed": "; ".join(map(_described, changes))} if changes else {}
        row |= {"skipped_batches": skipped} if skipped else {}
        progress.rows.append(row)
        self._draw(row, row["step"])

    def _seconds_left(self, seconds_per_step: float) -> float:
        epochs = range(self.progress.epoch + 1, self.settings.epochs + 1)
        images = sum(len(self.due(epoch)) for epoch in epochs)
        steps = self.steps * self.settings.epochs - self.finished_steps
        return steps * seconds_per_step + images * self.seconds_per_validation_image

    def _bar(self, show: bool) -> tqdm:
        # A widget needs a notebook, which forked and launched processes do not have.
        return (tqdm if self.accelerator.num_processes == 1 else text_bar)(
            total=self.steps * self.settings.epochs,
            initial=self.finished_steps,
            disable=not (show and self.accelerator.is_main_process),
            unit="step",
        )

    @contextlib.contextmanager
    def _trackers(self) -> Iterator[None]:
        """Writes the log as TensorBoard's files and to `tracker`, anew in a resumed run."""
        if not self.accelerator.is_main_process:
            yield
            return
        if (self.folder / "tensorboard").exists():
            shutil.rmtree(self.folder / "tensorboard")  # it may be ahead of the state
        self.boards = open_trackers(self.machine.tracker, self.folder)
        for row in self.progress.rows:
            self._draw(row, row["step"])
        try:
            yield
        finally:
            for board in self.boards:
                with contextlib.suppress(Exception):  # log and state report a full disk
                    board.finish()
            self.boards = []

    def _draw(self, row: dict[str, float], step: int) -> None:
        values = {key: value for key, value in row.items() if key not in ("epoch", "step")}
        for board in list(self.boards):
            try:
                board.log(values, step=step)
            except Exception as error:  # each tracker raises its own errors
                warnings.warn(f"{board.name} gets no more rows: {error}", stacklevel=2)
                self.boards.remove(board)

    # What stops a run

    def _gather_pending(self) -> None:
        """Collects the pending steps of all ranks; all must call this."""
        steps = [{key: float(value) for key, value in step.items()} for step in self.pending]
        self.progress.pending = gather_object([steps])

    def _stop_preempted(self) -> None:
        self._gather_pending()
        self._gather_unreadable()
        self.save_state()
        self.accelerator.wait_for_everyone()
        raise Preempted(
            f"ended by {self.termination.requested or 'a signal to another process'} after step "
            f"{self.progress.step} of epoch {self.progress.epoch}; the state is saved: start the "
            "same again to continue"
        )

    def _images_not_finite(
        self, batches: Sequence[Sample], results: list[dict[str, Tensor]]
    ) -> list[str]:
        """The images, of all ranks, of the batches whose loss is not finite; all must call this."""
        return gather_object(
            [
                str(self.data.train.names[index])
                for batch, result in zip(batches, results, strict=True)
                if not torch.isfinite(result["loss"])
                for index in batch.index.tolist()
            ]
        )

    def _pass_over(self, images: list[str]) -> None:
        """Skips the update; saves the state and raises where no more steps may be skipped."""
        progress = self.progress
        where = f"the loss is not finite at step {progress.step} of epoch {progress.epoch}, images "
        if len(progress.skipped) < self.settings.skip_bad_batches:
            self.optimizer.zero_grad(set_to_none=True)
            progress.skipped.append({"step": self.finished_steps, "images": images})
            progress.step += 1
            if self.accelerator.is_main_process:
                tqdm.write(f"{where}{', '.join(images)}: passed over")
            return
        self._gather_pending()
        kept = f"the last whole state, if any, is {self.checkpoints.last}"
        if all(bool(torch.isfinite(value).all()) for value in self.bare.state_dict().values()):
            self.save_state()
            kept = f"the state before this step is saved in {self.checkpoints.last}"
        self.accelerator.wait_for_everyone()  # rank 0 must have saved before any rank ends
        raise TrainingError(
            f"{where}{runs.abbreviate(images, NAMED)}; {kept}: continue with a "
            "lower lr, clip_grad, precision fp32, skip_images or skip_bad_batches, and list the "
            "changed settings in may_change"
        )

    def _explain(self, error: RuntimeError) -> None:
        """Raises TrainingError with the remedy for too little memory and for lost data workers."""
        first = str(error).split("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "CPUAllocator" in str(error):
            raise TrainingError(
                f"out of memory at step {self.progress.step} of epoch {self.progress.epoch} "
                f"with batch_size {self.settings.batch_size}; halve it and double accumulate, "
                f"which is the same step but for BatchNorm ({first})"
            ) from error
        # torch reports a dead worker in a signal handler, so any line can raise this.
        if processes.is_worker_error(error):
            kind = TrainingError if "timed out" in str(error) else WorkerLost
            raise kind(
                f"the images are no longer read: {error}; a worker that dies without a message "
                "was most likely killed for memory (lower data_workers), one silent for "
                f"{processes.LOADER_SHARE:g} of timeout_minutes {self.machine.timeout_minutes:g} "
                "waits for the disk; run the same again to go on"
            ) from error

    def try_step(self, count: int) -> None:
        """Runs forward and backward of `count` grey images; the network stays unchanged."""
        network, size = self.bare, self.settings.image_size
        buffers = [buffer.clone() for buffer in network.buffers()]
        network.train()
        zeros = torch.zeros(count, dtype=torch.int64)
        grey = torch.full((count, 3, size, size), 128, dtype=torch.uint8)
        view = grey.new_full((count, 3, *2 * (self.settings.teacher_size or 0,)), 128)
        holes = torch.zeros(count, 3, dtype=torch.int64)
        batch = Sample(grey, holes, zeros, zeros, zeros - 1, view)
        with self.accelerator.autocast():
            network(*self.to_device(batch))["loss"].backward()
        self.optimizer.zero_grad(set_to_none=True)
        _restore_buffers(network, buffers)
