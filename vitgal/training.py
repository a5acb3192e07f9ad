"""Training: the retrieval model with ArcFace (notebook 02), the autoencoder on its tokens (03).

Both fits are one loop over epochs on Hugging Face accelerate. What is random about a sample is a
function of (seed, epoch, image index), what is random about a step one of (seed, step, rank), and
the learning rate one of the epoch, so that a state file needs no generator's state and a run that
was killed continues to the same bytes as one that was not.
"""

import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torchvision.transforms.v2.functional as tv
from accelerate import Accelerator, notebook_launcher
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vitgal import evaluation, extraction, images, landmarks, runs, search, weights
from vitgal.model import ArcFace, LinearClassifier, ViTGaL, build_model
from vitgal.revisited import GroundTruth

AUGMENTATIONS = ("published", "fast", "none")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LOG_EVERY = 50  # steps between two rows of the log


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, on which images, and what to do."""


# Augmentation: parameters drawn from one numpy Generator, applied by torchvision or OpenCV


def augment_published(image: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """The published training augmentation, step for step, at the photograph's full size.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: side of the square network input in pixels.
        rng: all randomness comes from here.
    Returns:
        (3, size, size) float32, ImageNet-normalised, zero where the hole was cut.

    Source: published training code: flip 0.5; colour jitter 0.4 each, p 0.5; JPEG 99-100, p 0.5;
    shift 0.2, scale 0.3, rotation 10 degrees over a black border, p 0.7; crop of 0.9 to 1 of the
    area, p 0.5; squash; one zero hole of a quarter of the side, p 0.5.
    """
    picture = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
    if rng.random() < 0.5:
        picture = tv.horizontal_flip(picture)
    if rng.random() < 0.5:
        picture = _jitter_colours(picture, rng)
    if rng.random() < 0.5:
        picture = tv.jpeg(picture.contiguous(), int(rng.integers(99, 101)))
    if rng.random() < 0.7:
        height, width = picture.shape[-2:]
        picture = tv.affine(
            picture,
            angle=float(rng.uniform(-10, 10)),
            translate=[float(rng.uniform(-0.2, 0.2) * side) for side in (width, height)],
            scale=float(rng.uniform(0.7, 1.3)),
            shear=[0.0, 0.0],
            interpolation=tv.InterpolationMode.BILINEAR,
            fill=0,
        )
    if rng.random() < 0.5:
        top, left, height, width = _random_crop(*picture.shape[-2:], rng)
        picture = tv.crop(picture, top, left, height, width)
    # NOTE antialias off: the published code squashes with plain bilinear sampling
    picture = tv.resize(picture, [size, size], antialias=False)
    return _cut_hole(normalised(picture), rng)


def _jitter_colours(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue by up to 0.4 each, in a random order."""
    steps = [
        functools.partial(tv.adjust_brightness, brightness_factor=rng.uniform(0.6, 1.4)),
        functools.partial(tv.adjust_contrast, contrast_factor=rng.uniform(0.6, 1.4)),
        functools.partial(tv.adjust_saturation, saturation_factor=rng.uniform(0.6, 1.4)),
        functools.partial(tv.adjust_hue, hue_factor=rng.uniform(-0.4, 0.4)),
    ]
    for step in rng.permutation(4):
        picture = steps[step](picture)
    return picture


def _random_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of 0.9 to 1 of the area at 3:4 to 4:3 of the aspect."""
    area = height * width * rng.uniform(0.9, 1.0)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    tall = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide


def _cut_hole(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Sets one square of a quarter of the side to zero (the mean colour) with p 0.5, in place."""
    if rng.random() < 0.5:
        side = picture.shape[-1] // 4
        top, left = rng.integers(picture.shape[-1] - side + 1, size=2)
        picture[:, top : top + side, left : left + side] = 0
    return picture


def augment_fast(image: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """The published augmentation's kinds of change in one warp and one colour matrix.

    Flip, shift, scale, rotation, crop and squash are one affine map sampled once at the network's
    size; brightness, contrast, saturation and a rotation of hue about the grey axis are one 3 x 3
    matrix and an offset. No JPEG round trip. Shapes and steps otherwise as `augment_published`.
    """
    picture = cv2.warpAffine(
        image, _random_affine(*image.shape[:2], size, rng), (size, size), flags=cv2.INTER_LINEAR
    )
    if rng.random() < 0.5:
        picture = cv2.transform(picture, _random_colours(picture, rng))
    return _cut_hole(normalised(torch.from_numpy(picture).permute(2, 0, 1)), rng)


def _random_affine(height: int, width: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(2, 3) map from photograph to network pixels: flip, shift-scale-rotate, crop, squash."""
    to_unit = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]])
    change = np.diag([-1.0 if rng.random() < 0.5 else 1.0, 1.0, 1.0])
    if rng.random() < 0.7:
        angle, zoom = math.radians(rng.uniform(-10, 10)), rng.uniform(0.7, 1.3)
        aspect = width / height
        cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
        shift = rng.uniform(-0.4, 0.4, size=2)  # unit square is two wide: 0.2 of the side
        turn = [[cosine, -sine / aspect, shift[0]], [sine * aspect, cosine, shift[1]], [0, 0, 1]]
        change = np.array(turn) @ change
    if rng.random() < 0.5:
        top, left, tall, wide = _random_crop(height, width, rng)
        middle = (2 * left + wide) / width - 1, (2 * top + tall) / height - 1
        grow = width / wide, height / tall
        crop = [[grow[0], 0, -grow[0] * middle[0]], [0, grow[1], -grow[1] * middle[1]], [0, 0, 1]]
        change = np.array(crop) @ change
    half = size / 2
    return (np.array([[half, 0, half], [0, half, half], [0, 0, 1]]) @ change @ to_unit)[:2]


def _random_colours(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(3, 4) colour matrix: contrast about the mean grey, brightness, saturation, hue rotation."""
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, size=3)
    turn = rng.uniform(-0.4, 0.4) * 2 * math.pi
    grey = np.full((3, 3), np.array([0.299, 0.587, 0.114]))
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = math.cos(turn) * np.eye(3) + (1 - math.cos(turn)) * axis + math.sin(turn) * cross
    matrix = brightness * contrast * hue @ (saturation * np.eye(3) + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * picture.mean()
    return np.hstack([matrix, np.full((3, 1), offset)])


def squashed(image: np.ndarray, size: int, rng: np.random.Generator | None = None) -> Tensor:
    """(3, size, size) float32: squashed as at test time, normalised; `rng` is not used."""
    return torch.from_numpy(images.normalise(images.resize(image, size, "squash")))


def normalised(picture: Tensor) -> Tensor:
    """(3, H, W) uint8 -> float32 with ImageNet's mean and deviation."""
    mean = torch.tensor(images.MEAN, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(images.STD, dtype=torch.float32).view(3, 1, 1)
    return (picture.to(torch.float32) / 255 - mean) / std


# Data: images by (epoch, index), batches by (epoch, step)


class TrainingImages(Dataset):
    """Images of a split by (epoch, index); the augmentation's randomness follows from both.

    `dataset[epoch, index]` gives ((3, size, size) float32, label, index, unreadable). An image that
    cannot be decoded is replaced by the next readable one, and `unreadable` is its index, else -1.
    """

    def __init__(self, folder: Path, table: pd.DataFrame, size: int, augment: str, seed: int):
        self.paths = [Path(folder) / path for path in table["path"]]
        self.labels = table["label"].to_numpy()
        self.size, self.seed = size, seed
        self.transform = {
            "published": augment_published,
            "fast": augment_fast,
            "none": squashed,
        }[augment]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        unreadable = -1
        for used in (*range(index, len(self)), *range(index)):
            try:
                image = images.read_image(self.paths[used])
            except images.ImageError:
                unreadable = index
                continue
            return self.transform(image, self.size, rng), int(self.labels[used]), used, unreadable
        raise TrainingError(f"none of the {len(self)} images can be read, {self.paths[0]} first")


@dataclass(frozen=True)
class Batches:
    """One rank's batches of one epoch from `first` on: lists of (epoch, index) keys.

    The epoch's order is a permutation by (seed, epoch); a step takes `batch_size * processes` of
    it and rank r its r-th part. What is left over after the last whole step is dropped.
    """

    count: int
    batch_size: int
    processes: int
    rank: int
    seed: int
    epoch: int
    first: int = 0

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.processes) - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        for step in range(self.first, self.first + len(self)):
            start = (step * self.processes + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


# The recipe


@dataclass(frozen=True)
class Recipe:
    """What one training run is made of; the defaults are the published retrieval recipe.

    `batch_size` is per process, as published (64 on each of two GPUs). `lr`, `warmup_lr` and
    `min_lr` are absolute; `checkpoint_minutes` is the time between two saved states.
    """

    image_size: int = 512
    epochs: int = 40
    warmup_epochs: int = 1
    batch_size: int = 64
    lr: float = 5e-5
    warmup_lr: float = 3e-5
    min_lr: float = 1e-7
    weight_decay: float = 0.005
    clip_grad: float | None = None
    augment: str = "published"
    precision: str = "auto"
    seed: int = 0
    validate_every: int = 1
    checkpoint_minutes: float = 10.0
    threads: int | None = None
    data_workers: int = 4
    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment {self.augment!r} is not one of {', '.join(AUGMENTATIONS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.image_size % 16 or self.image_size < 32:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 16 above 16")

    def affecting(self) -> dict:
        """The parameters that the result depends on."""
        left_out = ("checkpoint_minutes", "data_workers")
        kept = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return kept | {"precision": resolve_precision(self.precision)}


def learning_rates(recipe: Recipe) -> list[float]:
    """The learning rate of every epoch: timm's cosine, one epoch late as published.

    The published loop steps its schedule with the number of the epoch that has just ended, so the
    first value serves twice: one warm-up epoch becomes the paper's two.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs,
        lr_min=recipe.min_lr,
        warmup_t=recipe.warmup_epochs,
        warmup_lr_init=recipe.warmup_lr,
    )
    return [schedule._get_lr(max(epoch - 1, 0))[0] for epoch in range(recipe.epochs)]


def resolve_precision(precision: str) -> str:
    """ "auto" becomes bf16 where the GPU or processor computes it natively, else fp32.

    The GPU is asked in a process of its own: CUDA must stay untouched here, since the processes of
    a launch are forked from this one.
    """
    if precision != "auto" or not torch.cuda.device_count():  # device_count asks NVML, not CUDA
        return precision if precision == "fp16" else extraction.resolve_precision(precision)
    ask = "from vitgal import extraction as e; print(e.resolve_precision('auto', 'cuda'))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if answer.returncode:
        raise TrainingError(f"the GPU does not answer: {answer.stderr.strip()[-300:]}")
    return answer.stdout.strip()


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

    def __init__(self, network: nn.Module, recipe: Recipe, folder: Path, data: "SplitData"):
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


# Data of one run


@dataclass(frozen=True)
class SplitData:
    """The images of one split folder as training reads them.

    `validation` holds the images of val.csv and val_retrieval.csv, each once, label -1 where its
    class is not trained; `queries` and `database` are positions in it.
    """

    train: TrainingImages
    validation: TrainingImages
    queries: np.ndarray
    database: np.ndarray
    ground_truth: GroundTruth | None
    classes: int
    max_failed_share: float = 0.001

    @property
    def train_count(self) -> int:
        return len(self.train)

    def score(self, parts: list[tuple[np.ndarray, dict[str, Tensor]]]) -> dict[str, float]:
        """Means over the validation images, and mAP of the retrieval validation set."""
        order = np.argsort(np.concatenate([indices for indices, _ in parts]))
        values = {
            key: torch.cat([result[key] for _, result in parts]).float().numpy()[order]
            for key in parts[0][1]
        }
        trained = self.validation.labels >= 0
        scores = {
            key: float(value[trained].mean()) if trained.any() else math.nan
            for key, value in values.items()
            if key != "features"
        }
        if "features" in values and self.ground_truth is not None:
            features = values["features"]
            database = features[self.database]
            _, ranks = search.search(features[self.queries], database, k=len(database))
            scores["val_map"] = evaluation.evaluate(ranks, self.ground_truth)["medium"]["map"]
        return scores


def read_data(
    split: Path, image_folder: Path, recipe: Recipe, max_failed_share: float = 0.001
) -> SplitData:
    """The training and validation images of a split folder, ready for the loop.

    Raises FileNotFoundError where the image folder is missing, ValueError where labels are not
    0 .. classes - 1.
    """
    if not Path(image_folder).is_dir():
        raise FileNotFoundError(f"the image folder {image_folder} does not exist")
    train = landmarks.read_split(split, "train")
    classes = int(train["label"].max()) + 1
    if train["label"].min() < 0 or train["label"].nunique() != classes:
        raise ValueError(f"labels in {split / 'train.csv'} are not 0 to {classes - 1} without gaps")
    retrieval = landmarks.read_split(split, "val_retrieval")
    val = landmarks.read_split(split, "val")[["path", "label"]]
    val = pd.concat([val, retrieval[["path", "label"]]]).drop_duplicates("path", ignore_index=True)
    place = pd.Series(val.index, index=val["path"])
    queries, database = (retrieval[retrieval["role"] == role] for role in ("query", "database"))
    shown = val.assign(label=val["label"].where(val["label"] < classes, -1))
    return SplitData(
        train=TrainingImages(image_folder, train, recipe.image_size, recipe.augment, recipe.seed),
        validation=TrainingImages(image_folder, shown, recipe.image_size, "none", recipe.seed),
        queries=place[queries["path"]].to_numpy(),
        database=place[database["path"]].to_numpy(),
        ground_truth=_class_ground_truth(queries, database) if len(queries) else None,
        classes=classes,
        max_failed_share=max_failed_share,
    )


def _class_ground_truth(queries: pd.DataFrame, database: pd.DataFrame) -> GroundTruth:
    """Every database image of the query's class is a positive (easy); nothing else is labelled."""
    of_class = database.reset_index(drop=True).groupby("label").indices
    nothing = np.zeros(0, np.int64)
    return GroundTruth(
        name="val_retrieval",
        database=tuple(database["path"]),
        queries=tuple(queries["path"]),
        boxes=np.zeros((len(queries), 4)),
        easy=[np.asarray(of_class.get(label, nothing)) for label in queries["label"]],
        hard=[nothing] * len(queries),
        junk=[nothing] * len(queries),
    )


# The two fits


def fit_retrieval(
    run: Path,
    *,
    image_folder: Path,
    architecture: str = "xcit_small_12_p16_224",
    initial_weights: Path | None = None,
    recipe: Recipe | None = None,
    drop_path: float = 0.1,
    margin: float = 0.15,
    scale: float = 30.0,
    overwrite: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> Path:
    """Trains the retrieval model with ArcFace on `<run>/split`; returns `<run>/retrieval`.

    Writes model.safetensors (backbone and multi-atrous head, no classifier), log.jsonl (a row every
    50 steps and at each epoch's end) and state/ (to resume from, with the classifier). A finished
    stage returns at once, an interrupted one continues from its last state.

    Args:
        image_folder: what the paths of the split are relative to.
        initial_weights: ImageNet XCiT weights; None starts from random ones.
        margin: ArcFace's angular margin in radians; published code 0.15, paper 0.1.
        watch: called with the log so far after each epoch (one process only).
    Raises:
        TrainingError: too few images, a loss that is not finite, too many unreadable images.

    Source: ViTGaL section 4, and the published training code where the two differ.
    """
    recipe = recipe or Recipe()
    split = run / "split"
    inputs = split_inputs(split)
    if initial_weights is not None:
        inputs["initial_weights"] = runs.fingerprint_file(initial_weights)
    parameters = recipe.affecting() | {
        "architecture": architecture,
        "drop_path": drop_path,
        "margin": margin,
        "scale": scale,
    }
    with runs.stage(
        run / "retrieval", "retrieval", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if not stage.finished:
            build = functools.partial(
                _retrieval_network, architecture, initial_weights, drop_path, margin, scale
            )
            _launch(build, recipe, stage.folder, split, image_folder, watch, progress)
            stage.finish(["model.safetensors", "log.jsonl"], **_recorded(recipe))
    return run / "retrieval"


def fit_autoencoder(
    run: Path,
    *,
    image_folder: Path,
    source: Path | None = None,
    code_dim: int = 128,
    reconstruction_weight: float = 10.0,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> Path:
    """Trains the autoencoder on the frozen retrieval model; returns `<run>/autoencoder`.

    Writes the complete model (backbone and autoencoder) as model.safetensors, log.jsonl and state/;
    the backbone's tensors stay bit-identical. Resumes and returns as `fit_retrieval` does.

    Args:
        source: the retrieval model; None takes `<run>/retrieval/model.safetensors`.
        code_dim: length of a local descriptor; published 128 where the tokens have 384.
        reconstruction_weight: of the mean squared error beside the cross-entropy; published 10.
    """
    recipe = recipe or Recipe(epochs=25)
    split = run / "split"
    if source is None:
        runs.read_stage(run / "retrieval", "notebook 02_train")
        source = run / "retrieval" / "model.safetensors"
    inputs = split_inputs(split) | {"weights": runs.fingerprint_file(source)}
    parameters = recipe.affecting() | {
        "code_dim": code_dim,
        "reconstruction_weight": reconstruction_weight,
    }
    with runs.stage(
        run / "autoencoder",
        "autoencoder",
        parameters=parameters,
        inputs=inputs,
        overwrite=overwrite,
    ) as stage:
        if not stage.finished:
            build = functools.partial(_autoencoder_network, source, code_dim, reconstruction_weight)
            _launch(build, recipe, stage.folder, split, image_folder, watch, progress)
            stage.finish(["model.safetensors", "log.jsonl"], **_recorded(recipe))
    return run / "autoencoder"


def split_inputs(split: Path) -> dict[str, str]:
    """Fingerprints of the split that training depends on, from its manifest."""
    return {
        name: runs.output_fingerprint(split, f"{name}.csv", "notebook 01_data_split")
        for name in ("train", "val", "val_retrieval")
    }


def read_log(folder: Path) -> pd.DataFrame:
    """A fit's log.jsonl as a table, a row every 50 steps and at each epoch's end."""
    runs.read_stage(folder, "the notebook that trains it")
    return pd.read_json(folder / "log.jsonl", lines=True)


def _retrieval_network(
    architecture: str,
    initial_weights: Path | None,
    drop_path: float,
    margin: float,
    scale: float,
    classes: int,
    seed: int,
) -> RetrievalNetwork:
    model = build_model(architecture, seed=seed, drop_path=drop_path)
    if initial_weights is not None:
        weights.initial_weights(model, initial_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ArcFace(model.embed_dim, classes, margin, scale)
    return RetrievalNetwork(model, head)


def _autoencoder_network(
    source: Path, code_dim: int, reconstruction_weight: float, classes: int, seed: int
) -> AutoencoderNetwork:
    model = weights.load_model(source).attach_autoencoder(code_dim, seed=seed).freeze_backbone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = LinearClassifier(model.embed_dim, classes)
    return AutoencoderNetwork(model, classifier, reconstruction_weight)


def _launch(build: Callable, recipe: Recipe, *arguments) -> None:
    """Runs the fit here, or in `num_processes` forked processes that accelerate joins."""
    if PartialState._shared_state:
        raise TrainingError(
            "accelerate was already started in this process; restart the kernel and run the "
            "training cell once"
        )
    if recipe.num_processes == 1:
        try:
            _fit(build, recipe, *arguments)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    else:
        notebook_launcher(_fit, (build, recipe, *arguments), num_processes=recipe.num_processes)


def _fit(
    build: Callable,
    recipe: Recipe,
    folder: Path,
    split: Path,
    image_folder: Path,
    watch: Callable[[pd.DataFrame], None] | None,
    show: bool,
) -> None:
    """One process's fit: trains, and on rank 0 writes the model."""
    data = read_data(split, image_folder, recipe)
    trainer = Trainer(build(classes=data.classes, seed=recipe.seed), recipe, folder, data)
    trainer.load_state()
    trainer.run(watch, show)
    if trainer.accelerator.is_main_process:
        network = trainer.accelerator.unwrap_model(trainer.network)
        weights.save_model(network.model, folder / "model.safetensors")
    trainer.accelerator.end_training()


def _recorded(recipe: Recipe) -> dict:
    return {
        "device": "cuda" if torch.cuda.device_count() else "cpu",
        "data_workers": recipe.data_workers,
        "processes": recipe.num_processes,
    }


# What notebooks 02 and 03 show


def displayable(picture: Tensor) -> np.ndarray:
    """A normalised network input (3, H, W) as (H, W, 3) uint8 RGB."""
    mean, std = (torch.tensor(value, dtype=torch.float32) for value in (images.MEAN, images.STD))
    pixels = (picture.permute(1, 2, 0) * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).numpy()


def schedule_table(recipe: Recipe) -> pd.DataFrame:
    """The learning rate of each epoch as a log: columns step (the epoch) and lr."""
    rates = learning_rates(recipe)
    return pd.DataFrame({"step": range(len(rates)), "lr": rates})


def parameter_table(model: ViTGaL) -> pd.DataFrame:
    """Parameters of each part of the network: columns part, parameters, share."""
    backbone = model.backbone
    parts = {
        "patch embedding": (backbone.patch_embed, backbone.pos_embed),
        "XCiT blocks": (backbone.blocks,),
        "multi-atrous block": (model.local_atrous,),
        "class attention": (backbone.cls_attn_blocks, backbone.norm),
    }
    if model.autoencoder is not None:
        parts["autoencoder"] = (model.autoencoder,)
    counts = [
        sum(parameter.numel() for module in modules for parameter in module.parameters())
        for modules in parts.values()
    ]
    shares = [f"{100 * count / sum(counts):.0f} %" for count in counts]
    return pd.DataFrame({"part": list(parts), "parameters": counts, "share": shares})


def validation_photographs(split: Path, image_folder: Path, *, count: int) -> list[np.ndarray]:
    """`count` validation images, (H, W, 3) uint8 RGB each, spread evenly over their list."""
    paths = landmarks.read_split(split, "val")["path"].tolist()
    chosen = np.linspace(0, len(paths) - 1, num=min(count, len(paths)), dtype=int)
    return [images.read_image(Path(image_folder) / paths[index]) for index in chosen]


@torch.no_grad()
def token_maps(
    model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int
) -> dict[str, list[np.ndarray]]:
    """Per photograph (h, w) maps: the codes' reconstruction error, and attention before and after.

    Args:
        photographs: (H, W, 3) uint8 RGB; each is squashed to `size` x `size` pixels.
    Returns:
        "error": mean squared difference of tokens and decoded tokens; "backbone_attention" and
        "attention": the means over heads of the two class attentions.
    """
    maps: dict[str, list[np.ndarray]] = {"error": [], "backbone_attention": [], "attention": []}
    for photograph in photographs:
        found = model.token_features(squashed(photograph, size)[None])
        maps["error"].append((found.decoded - found.tokens).square().mean(2)[0])
        maps["backbone_attention"].append(found.backbone_attention.mean(1)[0])
        maps["attention"].append(found.attention.mean(1)[0])
    grid = (size // 16, size // 16)
    return {key: [one.reshape(grid).numpy() for one in value] for key, value in maps.items()}


@torch.no_grad()
def lost_variance(model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int) -> float:
    """The share of the tokens' variance that the autoencoder loses: 0 is perfect, 1 the mean token.

    photographs: (H, W, 3) uint8 RGB, each squashed to `size` x `size` pixels.
    """
    found = [model.token_features(squashed(photograph, size)[None]) for photograph in photographs]
    tokens = torch.cat([one.tokens[0] for one in found])
    decoded = torch.cat([one.decoded[0] for one in found])
    return float((decoded - tokens).square().sum() / (tokens - tokens.mean(0)).square().sum())


def same_backbone(model: ViTGaL, source: Path) -> bool:
    """Whether every tensor of the model but its autoencoder's is, bit for bit, that of `source`."""
    other = weights.load_model(source).state_dict()
    return all(
        torch.equal(value, other[key])
        for key, value in model.state_dict().items()
        if not key.startswith("autoencoder.")
    )
