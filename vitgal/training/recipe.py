"""The recipe: what a training run is made of, its learning rates, its precision."""

import subprocess
import sys
from dataclasses import dataclass, fields

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from vitgal import runs
from vitgal.models import inference

AUGMENTATIONS = ("published", "fast", "none")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# What says how to run and not what comes out.
MACHINE = ("checkpoint_minutes", "data_workers", "timeout_minutes", "dry_run")
# What the published recipe lacks. Left off, an option is no part of a run's settings, so that a run
# that was made before the option existed stays valid.
OPTIONS = (
    "accumulate",
    "ema_decay",
    "layer_decay",
    "rand_augment",
    "rand_augment_magnitude",
    "balanced",
    "label_smoothing",
    "sub_centres",
    "class_chunk",
    "sampled_classes",
    "channels_last",
    "compile",
)
# What only the retrieval model's classifier and layers have.
RETRIEVAL_ONLY = ("layer_decay", "sub_centres", "class_chunk", "sampled_classes")


class TrainingError(runs.UserError, RuntimeError):
    """Training cannot go on; the message says at which step, on which images, and what to do."""


@dataclass(frozen=True)
class Recipe:
    """What one training run is made of; the defaults are the published retrieval recipe.

    `batch_size` is per process, as published (64 on each of two GPUs). `lr`, `warmup_lr` and
    `min_lr` are absolute. All validation images are looked at every `validate_every` epochs, those
    of the retrieval set after every one.

    Options that the published recipe lacks, all off:
        clip_grad: largest norm of the gradient.
        accumulate: batches whose gradients are averaged into one step.
        ema_decay: of the weights' moving average, which is then what is validated and written; it
            warms up as 1 - (1 + step) ** (-2 / 3) (timm's ModelEmaV3).
        layer_decay: the learning rate's factor from each block of the backbone to the one below.
        rand_augment: RandAugment's operations an image, of strength rand_augment_magnitude of 30.
        balanced: an epoch shows every class equally often.
        label_smoothing: the share of the target that all classes divide among themselves.
        sub_centres: directions of a class in ArcFace.
        class_chunk, sampled_classes: see `model.ArcFace`; less memory with many classes.
        channels_last, compile: torch's memory format and compiler.

    How it runs, without effect on the result:
        checkpoint_minutes: between two saved states within an epoch.
        timeout_minutes: after which a data worker or another process that is silent is given up.
        dry_run: on a GPU, measure before the first epoch whether the batch fits.
    `sync_batchnorm` lets BatchNorm see the batch of all GPUs; processors alone cannot.
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
    threads: int | None = None
    num_processes: int = 1
    sync_batchnorm: bool = True
    accumulate: int = 1
    ema_decay: float | None = None
    layer_decay: float | None = None
    rand_augment: int = 0
    rand_augment_magnitude: int = 9
    balanced: bool = False
    label_smoothing: float = 0.0
    sub_centres: int = 1
    class_chunk: int | None = None
    sampled_classes: int | None = None
    channels_last: bool = False
    compile: bool = False
    data_workers: int = 4
    checkpoint_minutes: float = 10.0
    timeout_minutes: float = 30.0
    dry_run: bool = True

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment {self.augment!r} is not one of {', '.join(AUGMENTATIONS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.image_size % 16 or self.image_size < 32:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 16 above 16")
        self._check_ranges()

    def _check_ranges(self) -> None:
        counts = "epochs batch_size validate_every num_processes accumulate sub_centres"
        for name in [*counts.split(), "class_chunk", "sampled_classes", "threads"]:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is below 1")
        for name in ("ema_decay", "layer_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} {value} is not between 0 and 1; null turns it off")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing} is not in [0, 1)")
        if self.rand_augment < 0 or not 0 <= self.rand_augment_magnitude <= 30:
            raise ValueError(
                f"rand_augment {self.rand_augment} is below 0, or rand_augment_magnitude "
                f"{self.rand_augment_magnitude} not in 0 to 30"
            )
        if self.class_chunk and self.sampled_classes:
            raise ValueError("set class_chunk or sampled_classes, not both")

    def affecting(self) -> dict:
        """The parameters that the result depends on."""
        off = {field.name: field.default for field in fields(self)}
        kept = {
            name: value
            for name, value in self.__dict__.items()
            if name not in MACHINE and not (name in OPTIONS and value == off[name])
        }
        if self.num_processes == 1 or self.sync_batchnorm:
            del kept["sync_batchnorm"]
        return kept | {"precision": resolve_precision(self.precision)}

    def retrieval_only(self) -> list[str]:
        """The options in use that only the retrieval model knows."""
        off = {field.name: field.default for field in fields(self)}
        return [name for name in RETRIEVAL_ONLY if getattr(self, name) != off[name]]


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
        return precision if precision == "fp16" else inference.resolve_precision(precision)
    ask = "from vitgal import extraction as e; print(e.resolve_precision('auto', 'cuda'))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if answer.returncode:
        raise TrainingError(f"the GPU does not answer: {answer.stderr.strip()[-300:]}")
    return answer.stdout.strip()
