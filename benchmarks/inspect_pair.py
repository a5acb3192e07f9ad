"""The match inspector: how long it takes from a slider's move to its picture, on a finished run.

    python benchmarks/inspect_pair.py [--run demo] [--dataset demo] [--turns 40]

When a slider moves, the stored features of both images are read, some are hidden, the rest is
matched and verified, and the figure is drawn and encoded. These parts are timed apart, in processor
time, which other work on the machine disturbs least; a pass of the network over one photograph,
which a button starts, is timed beside.
"""

import argparse
import io
import time
from collections.abc import Callable

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from vitgal import runs, stages, viz
from vitgal.data import revisited
from vitgal.settings import RerankingSettings


def milliseconds(work: Callable[[], object], turns: int) -> np.ndarray:
    """Returns the processor time of each of so many calls, after one that is not counted."""
    work()
    times = []
    for _ in range(turns):
        began = time.process_time()
        work()
        times.append(1000 * (time.process_time() - began))
    return np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--max-distance", type=float, default=0.95)
    options = parser.parse_args()
    run = runs.run_folder(options.run)
    benchmark = revisited.open_dataset(options.dataset, run / "data" / "benchmark")
    settings = RerankingSettings.build({"max_distance": options.max_distance})
    inspector = stages.Inspector(run, benchmark)
    image = inspector.choose(0)

    def compare() -> stages.ComparedPair:
        return inspector.pair(0, image, settings)

    pair = compare()

    def draw() -> None:
        axes = viz.inspected_matches(inspector, 0, image, pair, viz.Layers())
        axes.figure.savefig(io.BytesIO(), format="png", pil_kwargs={"compress_level": 1})
        plt.close(axes.figure)

    def run_network() -> None:
        inspector.selections.clear()
        inspector.selection("query", 0)

    print(f"{len(pair.query)} x {len(pair.database)} features, {pair.sentence()}")
    parts = {
        "matching and verification": compare,
        "drawing": draw,
        "a pass of the network": run_network,
    }
    for name, work in parts.items():
        times = milliseconds(work, options.turns)
        print(f"{name:<26} median {np.median(times):6.0f} ms, at most {times.max():6.0f} ms")


if __name__ == "__main__":
    main()
