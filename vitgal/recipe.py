"""The recipe: what a training run is made of, its learning rates, its precision."""

import subprocess
import sys
from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from vitgal import extraction

AUGMENTATIONS = ("published", "fast", "none")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, on which images, and what to do."""


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
