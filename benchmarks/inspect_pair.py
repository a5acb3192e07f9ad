"""The match inspector: how long a turn of a knob takes, on a finished run.

    python benchmarks/inspect_pair.py [--run demo] [--dataset demo] [--turns 40]

A turn is what happens when a slider moves: the stored features of both images are read, some are
hidden, the rest is matched and verified, and the figure is drawn and encoded. Its parts are timed
apart, in processor time, which other work on the machine disturbs least; a pass of the network over
one photograph, which a button starts, is timed beside.
"""

import argparse
import io
import time
from collections.abc import Callable

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from vitgal import runs
from vitgal.data import revisited
from vitgal.stages import inspection
from vitgal.viz import matching


def spent(work: Callable[[], object], turns: int) -> np.ndarray:
    """Milliseconds of processor time of each of so many calls, after one that is not counted."""
    work()
    found = []
    for _ in range(turns):
        began = time.process_time()
        work()
        found.append(1000 * (time.process_time() - began))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--max-distance", type=float, default=0.95)
    options = parser.parse_args()
    run = runs.run_folder(options.run)
    benchmark = revisited.open_dataset(options.dataset, run / "data" / "benchmark")
    inspector = inspection.Inspector(run, benchmark)
    image = inspector.choose(0)
    sides = (("query", 0), ("database", image))

    def compare() -> inspection.Pair:
        return inspector.pair(0, image, max_distance=options.max_distance)

    pair = compare()
    found = pair.found.verification

    def draw() -> None:
        axes = matching.inspection(
            *(inspector.image(*side) for side in sides),
            *(pair.query, pair.database, pair.found.matches, found.inliers),
            homography=found.homography,
        )
        axes.figure.savefig(io.BytesIO(), format="png", pil_kwargs={"compress_level": 1})
        plt.close(axes.figure)

    def look() -> None:
        inspector.looks.clear()
        inspector.look("query", 0)

    print(f"{len(pair.query)} x {len(pair.database)} features, {pair.sentence()}")
    ways = {"matching and verification": compare, "drawing": draw, "a pass of the network": look}
    for name, work in ways.items():
        times = spent(work, options.turns)
        print(f"{name:<26} median {np.median(times):6.0f} ms, at most {times.max():6.0f} ms")


if __name__ == "__main__":
    main()
