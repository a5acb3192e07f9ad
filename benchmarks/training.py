"""Training: the published step beside ours, options one by one, the ArcFace head's memory; one run.

    python benchmarks/training.py [--architecture xcit_small_12_p16_224] [--size 224] [--batch 8]
                                  [--classes 81313] [--steps 5] [--compile] [--threads N]
    python benchmarks/training.py --memory [--classes 81313] [--batch 64]

The published step is rebuilt from its description: fp32 weights, fp16 autocast with a gradient
scaler on a GPU (plain fp32 on a processor), ArcFace with a dense one-hot matrix, float pictures
normalised by the data workers, a synchronisation after each step. Variants take turns, so that what
else the machine does hits all of them; the median step counts. Memory is the process's (on a GPU
the allocator's) peak beyond what weights and batch take, each head in a process of its own.
"""

import argparse
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.nn import functional as F

from vitgal.models.heads import ArcFace
from vitgal.models.inference import normalise, resolve_precision
from vitgal.models.network import build_model
from vitgal.settings import TrainingSettings
from vitgal.training import augmentation, networks
from vitgal.training.attention import TrainedAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = {
    "published (one-hot)": {},
    "ours": {},
    "ours, chunks of 8192": {"chunk": 8192},
    "ours, 8192 sampled": {"sampled": 8192},
}


class OneHotArcFace(ArcFace):
    """The published head's way: every logit twice, chosen between by a dense one-hot matrix."""

    def loss(
        self, features: Tensor, labels: Tensor, *, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        cosine = F.linear(F.normalize(features), F.normalize(self.weight)).float()
        sine = (1 - cosine.square()).clamp(min=1e-7).sqrt()
        widened = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        fallback = cosine - self.margin * math.sin(self.margin)
        widened = torch.where(cosine > -math.cos(self.margin), widened, fallback)
        one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1)
        logits = self.scale * (one_hot * widened + (1 - one_hot) * cosine)
        return F.cross_entropy(logits, labels), logits.detach().argmax(1)


def make(kind: type, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(options.architecture, seed=0, drop_path=0.1)
    head = kind(model.embed_dim, options.classes)
    return networks.RetrievalNetwork(model, head).to(DEVICE).train()


def published_step(options: argparse.Namespace) -> Callable[[Tensor, Tensor], float]:
    """One step of the published loop."""
    network = make(OneHotArcFace, options)
    for module in network.modules():
        if type(module) is TrainedAttention:
            module.__class__ = XCA  # normalises queries and keys before their product
    plain = TrainingSettings(weight_decay=0.005)
    optimizer = networks.create_optimizer_v2(network, opt="adamw", lr=plain.lr, weight_decay=0.005)
    half = DEVICE.type == "cuda"
    scaler = torch.amp.GradScaler(enabled=half)

    def step(pictures: Tensor, labels: Tensor) -> float:
        inputs = normalise(pictures).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.float16, enabled=half):
            loss = network(inputs, labels.to(DEVICE))["loss"]
        value = loss.item()  # the published loop stops here where it is not finite
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if half:
            torch.cuda.synchronize()
        return value

    return step


def our_step(
    options: argparse.Namespace, settings: TrainingSettings, *, fused: bool | None = None
) -> Callable[[Tensor, Tensor], float]:
    """One step of ours, without what accelerate adds around it."""
    network = make(ArcFace, options)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = networks.build_optimizer(network, settings)
    if fused is not None:
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=settings.lr, fused=fused)
    if settings.compile:
        network.compile()
    half = resolve_precision(settings.precision, DEVICE) == "bf16"
    holes = torch.zeros(options.batch, 3, dtype=torch.int64)

    def step(pictures: Tensor, labels: Tensor) -> Tensor:
        inputs = augmentation.network_input(pictures.to(DEVICE), holes)
        if settings.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            loss = network(inputs, labels.to(DEVICE))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def steps(options: argparse.Namespace) -> None:
    """The median step of each variant, taken in turns."""
    auto, fp32 = TrainingSettings(), TrainingSettings(precision="fp32")
    variants = {
        "published": published_step(options),
        "ours, fp32": our_step(options, fp32),
        "ours, fp32, channels_last": our_step(options, replace(fp32, channels_last=True)),
        f"ours, auto ({resolve_precision('auto', DEVICE)})": our_step(options, auto),
        "  + channels_last": our_step(options, replace(auto, channels_last=True)),
        "  + fused AdamW": our_step(options, auto, fused=True),
    }
    both = replace(auto, channels_last=True)
    variants["  + both"] = our_step(options, both, fused=True)
    if options.compile:
        variants["  + compile"] = our_step(options, replace(auto, compile=True))
        variants["  + all three"] = our_step(options, replace(both, compile=True), fused=True)
    rng = np.random.default_rng(0)
    shape = (options.batch, 3, options.size, options.size)
    pictures = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, options.classes, options.batch))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.steps + 2):
        for name, step in variants.items():
            began = time.perf_counter()
            step(pictures, labels)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:  # the first ones warm up
                taken[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(values)) for name, values in taken.items()}
    print(f"{options.architecture}, {options.batch} x {options.size} px, {options.classes} classes")
    print(f"{'':28}{'s a step':>10}{'images/s':>10}{'x published':>13}")
    for name, value in medians.items():
        ratio = medians["published"] / value
        print(f"{name:28}{value:10.3f}{options.batch / value:10.2f}{ratio:13.2f}")


def head_peak(name: str, options: argparse.Namespace) -> float:
    """MiB that forward and backward of one head take beyond its weights."""
    torch.manual_seed(0)
    kind = OneHotArcFace if name.startswith("published") else ArcFace
    head = kind(384, options.classes, **HEADS[name]).to(DEVICE)
    features = torch.randn(options.batch, 384, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, options.classes, (options.batch,), device=DEVICE)
    warm = kind(384, 512, **({} if name.startswith("published") else {"chunk": 128})).to(DEVICE)
    warm.loss(features, labels % 512)[0].backward()  # libraries load what they need
    before = _peak()
    head.loss(features, labels)[0].backward()
    return (_peak() - before) / 2**20


def _peak() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(options: argparse.Namespace) -> None:
    print(f"head of 384 x {options.classes}, batch {options.batch}: peak beyond the weights, MiB")
    for name in HEADS:
        command = [sys.executable, __file__, "--head", name]
        command += ["--classes", str(options.classes), "--batch", str(options.batch)]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{name:28}{float(child.stdout):10.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="xcit_small_12_p16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, help="8; with --memory 64")
    parser.add_argument("--classes", type=int, default=81_313)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--head", choices=HEADS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch = options.batch or (64 if options.memory else 8)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.head:
        print(head_peak(options.head, options))
    elif options.memory:
        memory(options)
    else:
        steps(options)


if __name__ == "__main__":
    main()
