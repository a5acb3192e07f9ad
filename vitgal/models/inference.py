"""A network as it is run: device, precision, threads, batches."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitgal import runs
from vitgal.data.images import MEAN, STD
from vitgal.models.network import ViTGaL, build_model
from vitgal.models.weights import load_model
from vitgal.settings import PRECISIONS, TRAINING_PRECISIONS

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # Linux's names for native bf16 products
UNTRAINED = "untrained:"


def resolve_precision(
    precision: str, device: torch.device | str = "cpu", *, forks: bool = False
) -> str:
    """Resolves "auto": bf16 where the device computes it natively, else fp32.

    Args:
        forks: ask a GPU in another process, since a process that has used CUDA cannot be forked.
    Raises:
        ValueError: an unknown precision.
    """
    if precision not in TRAINING_PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        capability = _forked_capability() if forks else torch.cuda.get_device_capability(device)[0]
        native = capability >= 8
    else:
        info = Path("/proc/cpuinfo")
        native = info.exists() and bool(BF16_FLAGS & set(info.read_text().split()))
    return "bf16" if native else "fp32"


def _forked_capability() -> int:
    code = "import torch; print(torch.cuda.get_device_capability()[0])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"the GPU does not answer: {answer.stderr.strip()[-300:]}")
    return int(answer.stdout)


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
        from vitgal.data.download import sources  # slow to import, and needed for this error alone

        source = sources.source_of(model)
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
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
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
