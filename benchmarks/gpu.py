"""Local extraction on a GPU: images a second, launches, gaps, and results beside the CPU's.

    python benchmarks/gpu.py [--images 512] [--batch 32] [--architecture xcit_small_12_p16_224]

The bundled photographs over and over, XCiT-S12 with seeded random weights, five scales, shards of
2,048 images. On a machine without a GPU it counts what can be counted there: kernels a batch, and
how busy the main thread is beside a network of 3.3 ms an image that is only waited for.
"""

import argparse
import contextlib
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from vitgal.features.selection import scaled_size
from vitgal.features.store import FeatureStore, ShardFormat, write_index
from vitgal.models.descriptors import ScaleLayout, compute_tokens, run_scales, select_features
from vitgal.models.graphs import Graphs
from vitgal.models.inference import inference, network_input
from vitgal.models.network import ViTGaL, build_model
from vitgal.settings import LocalSettings, MachineSettings
from vitgal.stages.images import ImageTask, load_image, shard_tasks
from vitgal.stages.inspection import matching_fraction
from vitgal.stages.local_describer import SELECTORS, LocalDescriber

PHOTOGRAPHS = Path(__file__).parent.parent / "third_party" / "landmarks"
NETWORK_SECONDS = 0.0033  # an image, at the 300 images a second that the design aims at
READ_THREADS = 12  # as params/machines/gpu.yaml
HIDDEN = tqdm(disable=True)
# Operations that only describe the same memory anew: no kernel.
VIEWS = frozenset(
    "view _unsafe_view permute transpose t slice select split split_with_sizes expand unsqueeze "
    "squeeze alias detach as_strided unbind empty empty_strided".split()
)


class Kernels(TorchDispatchMode):
    """Counts the operations of a computation that would each be a launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(n for name, n in self.names.items() if name not in VIEWS)


class Waiting(torch.nn.Module):
    """A network that is only waited for, in the place of `Graphs`; its tokens are random."""

    patch = multiple = 16
    code_dim = 128

    def __init__(self, settings: LocalSettings, batch: int):
        super().__init__()
        # Without content: what comes before the network would run on the GPU.
        self.parameter = torch.nn.Parameter(torch.zeros(1, device="meta"))
        self.settings = settings
        random = torch.Generator().manual_seed(0)
        patches = sum((settings.size * scale / 16) ** 2 for scale in settings.scales)
        tokens = int(1.1 * batch * patches)
        self.scores = torch.rand(tokens, generator=random)
        self.codes = torch.rand(tokens, self.code_dim, generator=random)

    def forward(self, images: torch.Tensor) -> tuple:
        time.sleep(NETWORK_SECONDS * len(images))
        size, layouts = images.shape[-2:], []
        for scale in self.settings.scales:
            height, width = scaled_size(size, scale)
            factors = height / size[0], width / size[1]
            layouts.append(ScaleLayout(scale, factors, width // 16, height * width // 256))
        shape = len(images), sum(layout.count for layout in layouts)
        rows = shape[0] * shape[1]
        return self.scores[:rows].view(shape), self.codes[:rows].view(*shape, -1), layouts


class WaitingDescriber(LocalDescriber):
    def running(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # torch has no autocast for tensors without content


def tasks(count: int) -> list[ImageTask]:
    paths = sorted(PHOTOGRAPHS.rglob("*.jpg"))
    return [ImageTask(f"{at:06d}", paths[at % len(paths)]) for at in range(count)]


def write(describer: LocalDescriber, count: int, folder: Path) -> tuple[float, float]:
    """Writes a store; returns wall seconds and those in which the main thread computed."""
    kind = ShardFormat("float16", describer.code_dim, {})
    shards = shard_tasks(folder, tasks(count), 2048, kind)
    wall, busy = time.perf_counter(), time.thread_time()
    for _ in describer.write_shards(shards, HIDDEN):
        pass
    return time.perf_counter() - wall, time.thread_time() - busy


def machine(batch: int) -> MachineSettings:
    return MachineSettings(local_batch_size=batch, read_threads=READ_THREADS)


def count_on_a_processor(architecture: str, batch: int, images: int) -> None:
    settings = LocalSettings()
    model = build_model(architecture, code_dim=128, seed=0).eval()
    small = [np.zeros((64, 64, 3), np.uint8)] * 2  # their number does not depend on the size
    with torch.inference_mode(), Kernels() as launched:
        run_scales(model, network_input(small, "cpu"), settings)
    print(f"kernels a batch, {len(settings.scales)} scales, plain: {launched.count:,}")
    print("with a CUDA graph: 4, for the input, the graph and two results")
    network = Waiting(settings, batch)
    with ThreadPoolExecutor(SELECTORS) as selectors, tempfile.TemporaryDirectory() as folder:
        here = WaitingDescriber(
            network, settings, machine(batch), "fp32", selectors=selectors, graphs=network
        )
        wall, busy = write(here, images, Path(folder))
    own, budget = 1000 * busy / images, 1000 * NETWORK_SECONDS
    print(f"beside a network of {budget} ms an image that is waited for, the main thread computes")
    print(f"{own:.2f} ms an image: it is idle {1 - own / budget:.0%}")
    print(f"{images / wall:.0f} images a second on these cores, which decode the photographs too")


def measure(architecture: str, batch: int, images: int) -> None:
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    model = build_model(architecture, code_dim=128, seed=0).to("cuda").eval()
    for precision, recorded in (("fp32", False), ("bf16", False), ("bf16", True)):
        with ThreadPoolExecutor(SELECTORS) as selectors, tempfile.TemporaryDirectory() as folder:
            settings = LocalSettings(precision=precision)
            graphs = Graphs(partial(run_scales, model, selection=settings)) if recorded else None
            here = LocalDescriber(
                model, settings, machine(batch), precision, selectors=selectors, graphs=graphs
            )
            write(here, min(images, 256), Path(folder) / "warm-up")
            wall, busy = write(here, images, Path(folder) / "store")
            name = f"{precision}{', graphs' if recorded else ''}"
            print(f"{name}: {images / wall:.0f} images a second,", end=" ")
            print(f"main thread idle {1 - busy / wall:.0%}")
            write_index(Path(folder) / "store")
            compare(model, FeatureStore.open(Path(folder) / "store"))
        parts(model, batch, precision)


def parts(model: ViTGaL, batch: int, precision: str) -> None:
    """Prints what a batch of one size takes: launching, computing, selecting; kernels and gaps."""
    settings = LocalSettings(precision=precision)
    images = [load_image(tasks(1)[0], settings.size, "area").pixels] * batch
    frames = [((0, 0, 1, 1), (1, 1))] * batch
    with inference(model, precision):
        for _ in range(2):
            select_features(
                compute_tokens(model, network_input(images, "cuda"), settings), frames, settings
            )
        torch.cuda.synchronize()
        events = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=events) as profile:
            began = time.perf_counter()
            tokens = compute_tokens(model, network_input(images, "cuda"), settings)
            launched = time.perf_counter()
            torch.cuda.synchronize()
            computed = time.perf_counter()
            select_features(tokens, frames, settings)
            selected = time.perf_counter()
    calls = Counter(event.name for event in profile.events())
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    ms = 1000 / batch
    print(f"  a batch of {batch}, ms an image: launched in {ms * (launched - began):.2f},", end=" ")
    print(f"computed in {ms * (computed - began):.2f},", end=" ")
    print(f"selected in {ms * (selected - computed):.2f}")
    print(
        f"  {calls['cudaLaunchKernel'] + calls['cuLaunchKernelEx']:,} launches, "
        f"{calls['cudaStreamSynchronize'] + calls['cudaEventSynchronize']} waits; the GPU idle "
        f"{1 - busy / (computed - began):.0%} of the time"
    )


def compare(model: ViTGaL, features: FeatureStore) -> None:
    """Prints the fraction of locations that a processor finds too, for eight photographs."""
    plain = build_model(model.architecture, code_dim=128, seed=0).eval()
    here = LocalDescriber(plain, LocalSettings(), MachineSettings(), "fp32")
    eight = tasks(8)
    with here.stream(eight, HIDDEN) as loaded:
        items, _ = here.local_items(loaded, [task.key for task in eight])
    fractions = [matching_fraction(expected, features[key]) for key, expected in items]
    print(f"  locations as on the processor in fp32: {np.mean(fractions):.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--architecture", default="xcit_small_12_p16_224")
    options = parser.parse_args()
    run = measure if torch.cuda.is_available() else count_on_a_processor
    run(options.architecture, options.batch, options.images)
