"""What inference on a processor could use instead: int8 layers, a compiled network, larger batches.

    python benchmarks/alternatives.py --part int8|compile|batch [--rounds 100]

XCiT-S12 with seeded random weights, one thread, beside the prepared network that inference uses.
Both sides take turns; the least processor time counts. int8: PyTorch's dynamic quantisation of the
network's linear layers, 1024 tokens. compile: torch.compile with frozen weights, one image of 512 x
512, and the processor time to compile it. batch: images of 512 x 512, eight at once or one by one.
"""

import argparse
import functools
import os
import time
import warnings
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import nn

from vitgal.models.inference import inference
from vitgal.models.network import build_model
from vitgal.models.prepared import PackedLinear, prepare

TOKENS, SIDE, BATCH = 1024, 512, 8
LAYERS = ((384, 1152), (384, 1536), (1536, 384))  # of a block
ENGINES = ("onednn", "x86")


def least(ways: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Each way's least processor milliseconds; the ways take turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            began = time.process_time()
            work()
            best[name] = min(best[name], 1000 * (time.process_time() - began))
    return best


def beside(title: str, spent: dict[str, float]) -> None:
    """Prints times and, from the second on, their multiples of the first."""
    first = next(iter(spent.values()))
    parts = [f"{name} {ms:.2f} ms ({ms / first:.2f})" for name, ms in spent.items()]
    print(f"{title}: {', '.join(parts)}", flush=True)


def quantised(layer: nn.Linear, engine: str) -> Callable:
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will be removed
        return quantize_dynamic(nn.Sequential(layer), {nn.Linear})


def int8(rounds: int) -> None:
    for width, out in LAYERS:
        layer, tokens = nn.Linear(width, out), torch.randn(1, TOKENS, width)
        ways = {"bf16": functools.partial(PackedLinear(layer, torch.bfloat16), tokens)}
        for engine in ENGINES:
            if engine in torch.backends.quantized.supported_engines:
                ways[f"int8 {engine}"] = functools.partial(quantised(layer, engine), tokens)
        beside(f"linear layer {width} to {out}", least(ways, rounds))


def compiled(rounds: int) -> None:
    torch._inductor.config.freezing = True
    torch._inductor.config.force_disable_caches = True
    model = build_model("xcit_small_12_p16_224", code_dim=128, seed=0).eval()
    image, prepared = torch.randn(1, 3, SIDE, SIDE), prepare(model, "bf16")
    with inference(model, "bf16"):
        network = torch.compile(model.global_features, dynamic=False)
        began = sum(os.times()[:4])
        network(image)
        seconds = sum(os.times()[:4]) - began
        ways = {
            "prepared": lambda: prepared.global_features(image),
            "compiled": lambda: network(image),
        }
        spent = least(ways, rounds)
    beside("one image, bf16", spent)
    gain = spent["prepared"] - spent["compiled"]
    after = f"made up for after {1000 * seconds / gain:,.0f} images" if gain > 0 else "for nothing"
    print(f"compiling one shape takes {seconds:.0f} s of processor time, {after}")


def batch(rounds: int) -> None:
    model = build_model("xcit_small_12_p16_224", code_dim=128, seed=0)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    for precision in ("fp32", "bf16"):
        network = prepare(model, precision)
        ways = {
            f"in batches of {size}": lambda n=network, s=size: list(
                map(n.global_features, images.split(s))
            )
            for size in (1, BATCH)
        }
        with inference(network, precision):
            beside(f"{BATCH} images, {precision}", least(ways, rounds))


PARTS = {"int8": int8, "compile": compiled, "batch": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        PARTS[options.part](options.rounds)


if __name__ == "__main__":
    main()
