"""Runs networks: device, precision, threads, batches."""

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitgal import runs
from vitgal.data.images import MEAN, STD
from vitgal.engines import devices
from vitgal.models import describers
from vitgal.models.network import ViTGaL, build_model
from vitgal.models.sources import SEED, NetworkError, TimmSource
from vitgal.models.weights import load_model
from vitgal.settings import PRECISIONS, TRAINING_PRECISIONS, GlobalSettings

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # Linux's names for native bf16 products
NARROW = 32  # pixels: a network's last stride, which leaves one column


def resolve_precision(
    precision: str, device: torch.device | str = "cpu", *, forks: bool = False
) -> str:
    """Resolves "auto": "bf16" where the device computes it natively, else "fp32".

    forks: query the GPU in another process, since one that has used CUDA cannot be forked. Raises
    ValueError for an unknown precision.
    """
    if precision not in TRAINING_PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        native = (_capability() if forks else torch.cuda.get_device_capability(device)[0]) >= 8
    else:
        info = Path("/proc/cpuinfo")
        native = info.exists() and bool(BF16_FLAGS & set(info.read_text().split()))
    return "bf16" if native else "fp32"


def _capability() -> int:
    """Returns the GPU's major compute capability, queried in another process."""
    code = "import torch; print(torch.cuda.get_device_capability()[0])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"the GPU cannot be queried: {answer.stderr.strip()[-300:]}")
    return int(answer.stdout)


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """Returns the named device; for None the GPU if there is one, else the CPU."""
    return torch.device(device or devices.find_gpu() or "cpu")


def device_of(network: nn.Module) -> torch.device:
    """Returns the device of a network's parameters."""
    return next(network.parameters()).device


def open_model(
    model: str | Path,
    device: torch.device | str = "cpu",
    *,
    pooling: str | None = None,
) -> ViTGaL | describers.TimmDescriber:
    """Opens a model for inference.

    Args:
        model: a weight file of ViTGaL, "timm:NAME" or "timm:NAME@FILE" (`TimmSource`), or
            "untrained:<architecture>", which is built with random weights drawn from SEED.
        pooling: of a timm network, see `TimmDescriber`.
    Raises:
        FileNotFoundError, ValueError: see `load_model` and `open_timm`.
    """
    if source := TimmSource.parse(model):
        return describers.open_timm(source, pooling).to(device)
    if pooling is not None:
        raise NetworkError("pooling is for networks of timm: set it to null")
    if str(model).startswith(runs.UNTRAINED):
        return build_model(str(model).removeprefix(runs.UNTRAINED), seed=SEED).to(device)
    return load_model(model, device)


@contextlib.contextmanager
def inference(model: nn.Module, precision: str = GlobalSettings.precision) -> Iterator[None]:
    """Runs the model in eval mode, without gradients, in a precision; restores its mode.

    `prepare` makes a faster model for it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    device, training = device_of(model), model.training
    bf16 = resolve_precision(precision, device) == "bf16"
    # By default cuDNN rounds the inputs of convolutions to 10 bits (TF32).
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    model.eval()
    try:
        with torch.inference_mode(), exact:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                yield
    finally:
        model.train(training)


@contextlib.contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Limits torch's CPU threads (None: unchanged); threadpoolctl cannot, as MKL is linked in."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def avoid_onednn_fault(images: Tensor) -> Iterator[None]:
    """Turns oneDNN off for a network input (B, 3, H, W) that it computes wrongly.

    Its strided convolutions in bf16, as of PyTorch 2.15 on a processor with AMX, return memory
    that was never written where their output has one column.
    """
    narrow = images.shape[-1] <= NARROW and images.device.type == "cpu"
    affected = narrow and torch.is_autocast_enabled("cpu") and torch.backends.mkldnn.enabled
    if affected:
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        if affected:
            torch.backends.mkldnn.enabled = True


def normalise(pixels: Tensor) -> Tensor:
    """Normalises uint8 pixels (B, 3, H, W) or (3, H, W) by ImageNet's mean and deviation."""
    mean, std = _mean_and_deviation(pixels.device)
    # A new tensor: a single image may have a stride of 0, which changes the order of sums in
    # convolutions. Then in place: touching new memory takes most of the time.
    return pixels.to(torch.float32).div(255).sub_(mean).div_(std)


@functools.cache
def _mean_and_deviation(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's, (3, 1, 1) float32 each; kept, because copying them waits for a GPU."""
    with torch.inference_mode(False):  # for gradients too
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (MEAN, STD))
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def network_input(batch: Sequence[np.ndarray], device: torch.device | str) -> Tensor:
    """Moves images of one size to the device, as (B, 3, H, W) float32, normalised.

    batch: (H, W, 3) uint8 RGB each, or an array (B, H, W, 3), which may be empty.
    """
    shape = np.shape(batch) if len(batch) < 1 else (len(batch), *batch[0].shape)
    on_gpu = torch.device(device).type == "cuda"
    # Pinned memory is copied while the GPU computes.
    pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
    if len(batch):
        np.stack(batch, out=pixels.numpy())
    # Channels last in memory: convolutions on a CPU are faster.
    return normalise(pixels.to(device, non_blocking=True).permute(0, 3, 1, 2))


def batches(
    inputs: Iterable[tuple[Any, np.ndarray]], batch_size: int
) -> Iterator[tuple[list, list[np.ndarray]]]:
    """Gathers (label, (H, W, 3) image) into batches of one image size; yields (labels, images).

    A full batch is yielded at once, incomplete ones at the end. Raises ValueError for a batch size
    below 1.
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


@dataclass(eq=False)
class BatchLimit:
    """The largest batch that fits on the device, found by halving."""

    images: int = 0  # 0: unknown

    def run(self, compute: Callable[[slice], Sequence], count: int) -> list:
        """Calls `compute` on slices of a batch of `count`, halved until they fit; results in order.

        Raises RuntimeError where one image alone does not fit.
        """
        results: list = []
        while len(results) < count:
            size = min(count - len(results), self.images or count)
            part = slice(len(results), len(results) + size)
            try:
                results.extend(compute(part))
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise RuntimeError(
                        "one image alone does not fit into the device's memory: use a smaller size "
                        "or fewer scales, or close other programs that use the device"
                    ) from error
                self.images = size // 2
            else:
                continue
            # Outside the handler: the exception keeps the tensors of the batch in memory.
            torch.cuda.empty_cache()  # does nothing where there is no GPU
            print(f"out of memory with {size} images at once: going on with {self.images}")
        return results
