"""The training loop: networks with their losses, steps, validation, saved states.

What is random about a sample is a function of (seed, epoch, image index), what is random about a
step one of (seed, step, rank), and the learning rate one of the epoch, so that a state file needs
no generator's state and a run that was killed continues to the same bytes as one that was not.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.model import ArcFace, ViTGaL
from vitgal.recipe import Recipe, TrainingError, learning_rates, resolve_precision
from vitgal.training_data import Batches, SplitData

LOG_EVERY = 50  # steps between two rows of the log


# Networks: model and classifier in one module, so that one forward pass gives the loss


class RetrievalNetwork(nn.Module):
    """The retrieval model under ArcFace: images and labels to loss and accuracy."""

    def __init__(self, model: ViTGaL, head: ArcFace):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S), (B,) int64 -> scalars `loss` and `accuracy` (with the margin)."""
        logits = self.head(self.model.global_features(pictures), labels)
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy(logits, labels)}

    @torch.no_grad()
    def validate(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Features (B, D), and hits (B,) with and without the margin; label -1 never counts."""
        features = self.model.global_features(pictures).float()
        known = labels.clamp(min=0)
        counts = labels >= 0
        return {
            "features": F.normalize(features),
            "val_accuracy": (self.head(features).argmax(1) == known) & counts,
            "val_accuracy_margin": (self.head(features, known).argmax(1) == known) & counts,
        }


class AutoencoderNetwork(nn.Module):
    """The autoencoder on a frozen backbone: cross-entropy plus weighted reconstruction error.

    Source: ViTGaL section 3 and published loss: CE of the autoencoder's own class token + 10 MSE.
    """

    def __init__(self, model: ViTGaL, classifier: nn.Module, reconstruction_weight: float):
        super().__init__()
        self.model, self.classifier = model, classifier
        self.reconstruction_weight = reconstruction_weight

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S), (B,) int64 -> scalars `loss`, `accuracy`, `reconstruction`."""
        features, decoded, tokens = self.model.reconstruct(pictures)
        logits = self.classifier(features).float()
        reconstruction = F.mse_loss(decoded.float(), tokens.float())
        return {
            "loss": F.cross_entropy(logits, labels) + self.reconstruction_weight * reconstruction,
            "accuracy": accuracy(logits, labels),
            "reconstruction": reconstruction,
        }

    @torch.no_grad()
    def validate(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Per image: hits (B,) and the mean squared reconstruction error (B,)."""
        features, decoded, tokens = self.model.reconstruct(pictures)
        hits = self.classifier(features).argmax(1) == labels.clamp(min=0)
        error = (decoded.float() - tokens.float()).square().mean((1, 2))
        return {"val_accuracy": hits & (labels >= 0), "val_reconstruction": error}


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of rows whose largest logit is the label's, a scalar."""
    return (logits.detach().argmax(1) == labels).float().mean()


# The loop


@dataclass
class Progress:
    """How far a run is: what a state file holds beside weights and optimizer."""

    epoch: int = 0
    step: int = 0  # finished steps of this epoch
    rows: list[dict] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)
    best: float = -math.inf


class Trainer:
    """One process's share of a run: network, optimizer, data and the state folder."""

    def __init__(self, network: nn.Module, recipe: Recipe, folder: Path, data: SplitData):
        torch.set_num_threads(recipe.threads or torch.get_num_threads())
        precision = {"fp32": "no"}.get(
            resolve_precision(recipe.precision), resolve_precision(recipe.precision)
        )
        self.accelerator = Accelerator(
            mixed_precision=precision, cpu=torch.cuda.device_count() == 0
        )
        self.recipe, self.folder, self.data = recipe, folder, data
        self.progress = Progress()
        self.rates = learning_rates(recipe)
        decay = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not decay:
            raise TrainingError("the network has no parameter to train")
        optimizer = create_optimizer_v2(
            network,
            opt="adamw",
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            eps=1e-8,
            filter_bias_and_bn=True,
        )
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)

    @property
    def state_file(self) -> Path:
        return self.folder / "state" / "last.pt"

    def load_state(self) -> None:
        """Continues from the last saved state where there is one."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        self.accelerator.unwrap_model(self.network).load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])

    def save_state(self) -> None:
        """Writes the state atomically, keeping the one before as `previous.pt` (rank 0)."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "network": self.accelerator.unwrap_model(self.network).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "progress": dict(self.progress.__dict__),
        }
        if self.state_file.exists():
            with runs.atomic(self.state_file.with_name("previous.pt")) as temporary:
                os.link(self.state_file, temporary)
        with runs.atomic(self.state_file) as temporary:
            torch.save(state, temporary)
        lines = [json.dumps(runs.plain(row)) + "\n" for row in self.progress.rows]
        runs.write_text(self.folder / "log.jsonl", "".join(lines))

    def run(self, watch: Callable[[pd.DataFrame], None] | None, show: bool) -> None:
        """Trains from where the state stands to the last epoch."""
        steps = len(self.batches(0))
        if steps == 0:
            raise TrainingError(
                f"{self.data.train_count} training images are fewer than one batch of "
                f"{self.recipe.batch_size} on each of {self.accelerator.num_processes} processes; "
                "make batch_size smaller"
            )
        total = steps * self.recipe.epochs
        done = steps * self.progress.epoch + self.progress.step
        main = self.accelerator.is_main_process
        with tqdm(total=total, initial=done, disable=not (show and main), unit="step") as bar:
            while self.progress.epoch < self.recipe.epochs:
                self.run_epoch(bar)
                if watch is not None and main:
                    watch(pd.DataFrame(self.progress.rows))
        self.accelerator.wait_for_everyone()

    def batches(self, epoch: int, first: int = 0) -> Batches:
        return Batches(
            count=self.data.train_count,
            batch_size=self.recipe.batch_size,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            seed=self.recipe.seed,
            epoch=epoch,
            first=first,
        )

    def run_epoch(self, bar: tqdm) -> None:
        """One epoch (or what is left of it), its validation, its row in the log, its state."""
        progress, recipe = self.progress, self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[progress.epoch]
        began, saved, sums, seen = time.monotonic(), time.monotonic(), [], []
        self.network.train()
        for batch in self.loader(self.batches(progress.epoch, progress.step)):
            sums.append(self.run_step(batch))
            seen.append(batch[2])
            progress.unreadable += [int(index) for index in batch[3] if index >= 0]
            progress.step += 1
            bar.update()
            last = progress.step == len(self.batches(progress.epoch))
            if last or len(sums) == LOG_EVERY:
                self.add_row(sums, seen, time.monotonic() - began)
                began, sums, seen = time.monotonic(), [], []
                bar.set_postfix(epoch=progress.epoch, loss=f"{progress.rows[-1]['loss']:.3f}")
                if not last and time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                    saved = time.monotonic()
                    self.save_state()
        self.end_epoch()

    def run_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """Forward, backward, update; returns the step's detached scalars."""
        progress, recipe, accelerator = self.progress, self.recipe, self.accelerator
        # Drop path draws from torch's generator: seeded anew each step, so that a resumed run
        # draws what the uninterrupted one did.
        draw = (recipe.seed, progress.epoch, progress.step, accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0] >> 1))
        pictures, labels = batch[0].to(accelerator.device), batch[1].to(accelerator.device)
        result = self.network(pictures, labels)
        accelerator.backward(result["loss"])
        if recipe.clip_grad is not None:
            accelerator.clip_grad_norm_(self.network.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {key: value.detach() for key, value in result.items()}

    def loader(
        self, batches: Sequence[list[tuple[int, int]]], dataset: Dataset | None = None
    ) -> DataLoader:
        return DataLoader(
            self.data.train if dataset is None else dataset,
            batch_sampler=batches,
            num_workers=self.recipe.data_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=_one_thread,
        )

    def add_row(self, sums: list[dict], seen: list[Tensor], seconds: float) -> None:
        """Adds the mean of some steps to the log; stops every rank if a loss is not finite."""
        progress, accelerator = self.progress, self.accelerator
        table = {key: torch.stack([step[key] for step in sums]).float() for key in sums[0]}
        means = accelerator.reduce({key: value.mean() for key, value in table.items()}, "mean")
        if not math.isfinite(means["loss"]):
            self.stop_not_finite(table["loss"].cpu(), seen)
        count = len(sums) * self.recipe.batch_size * accelerator.num_processes
        progress.rows.append(
            {
                "epoch": progress.epoch,
                "step": progress.epoch * len(self.batches(0)) + progress.step,
                "lr": self.rates[progress.epoch],
                **{key: float(value) for key, value in means.items()},
                "images_per_second": count / seconds,
            }
        )

    def stop_not_finite(self, losses: Tensor, seen: list[Tensor]) -> None:
        bad = (~torch.isfinite(losses)).nonzero().flatten()
        where = "on another process"
        if len(bad):
            first = int(bad[0])
            step = self.progress.step - len(losses) + first
            names = [self.data.train.paths[int(index)].name for index in seen[first]]
            where = f"at step {step} of epoch {self.progress.epoch}, images {', '.join(names[:8])}"
        raise TrainingError(
            f"the loss is not finite {where}; the state before stands in {self.state_file}: "
            "lower lr, set clip_grad, or train in fp32"
        )

    def end_epoch(self) -> None:
        """Validation where it is due, the best weights, the state at the epoch's end."""
        progress, recipe = self.progress, self.recipe
        progress.epoch, progress.step = progress.epoch + 1, 0
        failed = sorted(set(progress.unreadable))
        progress.unreadable = failed
        if len(failed) > self.data.max_failed_share * self.data.train_count:
            names = ", ".join(str(self.data.train.paths[index]) for index in failed[:5])
            raise TrainingError(f"{len(failed)} training images cannot be read: {names}")
        due = progress.epoch % recipe.validate_every == 0 or progress.epoch == recipe.epochs
        if due:
            progress.rows[-1] |= self.validate()
        self.save_state()

    def validate(self) -> dict[str, float]:
        """Scores of the validation images, each rank taking its share of them."""
        accelerator, data = self.accelerator, self.data
        network = accelerator.unwrap_model(self.network)
        network.eval()
        mine = range(accelerator.process_index, len(data.validation), accelerator.num_processes)
        parts = []
        size = self.recipe.batch_size
        keys = [[(0, index) for index in mine[at : at + size]] for at in range(0, len(mine), size)]
        for pictures, labels, indices, _ in self.loader(keys, data.validation):
            with accelerator.autocast():
                result = network.validate(
                    pictures.to(accelerator.device), labels.to(accelerator.device)
                )
            parts.append((indices.numpy(), {key: value.cpu() for key, value in result.items()}))
        return data.score(gather_object(parts))


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
