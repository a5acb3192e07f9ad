"""Refinement of global rankings: what each step gains, and its time and memory at a million images.

First the steps on ROxford5k with real AlexNet descriptors (a folder with `gnd_roxford5k.pkl` and
`roxford5k_alexnet_fc7_pca128.npz`: X (4993, 128), Q (70, 128)). There are no descriptors of other
images by that network, so **the whitenings here are learnt from the database itself, without
labels** (transductive); the stage of notebook 04 refuses that, and learns from the training split.
Parameters that a row does not name are the defaults: the papers' own or the field's usual ones.

Then whitening and alpha expansion of a million synthetic descriptors beside one plain search, each
in a process of its own: processor time, and memory that is no mapped file. The first time the norms
of all whitened descriptors are computed and stored; later they are read.

    python benchmarks/refine.py [--revisited FOLDER] [--images 1004993] [--scratch FOLDER]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from search import make_data  # the script beside this one

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth, load_ground_truth
from vitgal.evaluation.protocol import evaluate
from vitgal.features.files import map_array
from vitgal.retrieval import refine
from vitgal.retrieval.exact_search import WhitenedRows, search
from vitgal.retrieval.reorder import ScoredRanking
from vitgal.settings import read_chain
from vitgal.settings.refinement import Augmentation, Diffusion, Expansion, Whitening
from vitgal.stages.rank import exact_ranking, reordered

REVISITED = Path(__file__).resolve().parents[2] / "shared" / "data" / "revisited"
CHAINS = (
    [],
    ["whitening power=0.25"],
    ["whitening"],
    ["expansion alpha=0"],
    ["expansion"],
    ["augmentation"],
    ["superglobal"],
    ["k_reciprocal depth=200"],
    ["k_reciprocal"],
    ["whitening power=0.25", "augmentation", "expansion"],
    ["whitening power=0.25", "diffusion"],
    ["whitening", "diffusion"],
    ["whitening power=0.25", "k_reciprocal"],
    ["whitening power=0.25", "diffusion", "k_reciprocal"],
)
TOP = 1000
# Whether the norms are stored already, and the dimensions that a whitening keeps.
SIDES = {
    "plain search": None,
    "whitening and expansion, the first time": (False, None),
    "later": (True, None),
    "whitened to 128, the first time": (False, 128),
    "whitened to 128, later": (True, 128),
}


def refined(
    queries: np.ndarray, database: np.ndarray, truth: GroundTruth, chain: list[str]
) -> ScoredRanking:
    """Applies a chain to descriptors; a whitening is learnt from the database."""
    depth, steps = len(database), read_chain(chain)
    for step in steps:
        if isinstance(step, Whitening):
            whitening = refine.pca_whitening(database, power=step.power)
            queries, database = whitening.apply(queries), whitening.apply(database)
        elif isinstance(step, Augmentation):
            find = refine.exact_neighbours(database)
            blocks = refine.augmented_blocks(
                database, find, neighbours=step.neighbours, alpha=step.alpha
            )
            database = np.concatenate(list(blocks))
        elif isinstance(step, Expansion):
            queries = refine.expand_queries(
                queries, database, neighbours=step.neighbours, alpha=step.alpha
            )
    ranking = exact_ranking(queries, database, truth, depth)

    def graph(step: Diffusion) -> refine.Hits:
        """Returns the database's graph by exact search."""
        find = refine.exact_neighbours(database)
        return refine.neighbour_graph(database, find, neighbours=step.neighbours)

    return reordered(steps, queries, database, ranking, graph)


def print_revisited(folder: Path) -> None:
    """Prints mAP and processor time of every chain on ROxford5k."""
    truth = load_ground_truth(folder / "gnd_roxford5k.pkl")
    arrays = np.load(folder / "roxford5k_alexnet_fc7_pca128.npz")
    print("| ROxford5k, AlexNet, 128 dimensions | Easy | Medium | Hard | processor s |")
    print("|---|---|---|---|---|")
    for chain in CHAINS:
        began = time.process_time()
        ranking = refined(arrays["Q"], arrays["X"], truth, chain)
        seconds = time.process_time() - began
        scores = evaluate(ranking.positions, truth)
        values = " | ".join(f"{100 * scores[name]['map']:.2f}" for name in PROTOCOLS)
        print(f"| {', '.join(chain) or 'plain'} | {values} | {seconds:.1f} |", flush=True)


def anonymous_mib() -> float:
    """This process's memory that is no mapped file, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def run_side(folder: Path, side: str) -> dict:
    """Runs one side and reports seconds, processor seconds and the MiB added at the peak."""
    queries, database = np.load(folder / "queries.npy"), map_array(folder / "database.npy")
    if SIDES[side] is not None:
        stored, dimensions = SIDES[side]
        sample = database[:: max(1, len(database) // 20_000)]
        whitening = refine.pca_whitening(sample, power=0.25, dimensions=dimensions)
        file = folder / f"norms_{dimensions}.npy"
    database.max()  # every page is there before the clock starts
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        """Keeps the peak of the memory, 50 times a second."""
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, busy, marks = time.perf_counter(), time.process_time(), []
    if SIDES[side] is not None:
        if not stored:
            runs.write_array(file, refine.whitened_norms(database, whitening))
        queries = whitening.apply(queries)
        database = WhitenedRows(database, whitening, map_array(file))
        marks.append(time.process_time() - busy)
        queries = refine.expand_queries(queries, database, neighbours=10, alpha=3)
        marks.append(time.process_time() - busy)
    search(queries, database, k=TOP)
    marks.append(time.process_time() - busy)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    parts = np.diff([0, *marks]).tolist()
    return {"seconds": seconds, "cpu": marks[-1], "mib": peak[0] - before, "parts": parts}


def print_million(folder: Path, repeats: int) -> None:
    """Prints time and memory of each side; the best of some runs in turns."""
    best: dict[str, dict] = {}
    for _ in range(repeats):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--scratch", str(folder)]
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(text)
            if side not in best or result["cpu"] < best[side]["cpu"]:
                best[side] = result
    plain = best["plain search"]["cpu"]
    print("\n| | processor s | times plain | of which | seconds | MiB added |")
    print("|---|---|---|---|---|---|")
    for side, result in best.items():
        parts = " + ".join(f"{part:.2f}" for part in result["parts"])
        print(
            f"| {side} | {result['cpu']:.2f} | {result['cpu'] / plain:.2f} | {parts} "
            f"| {result['seconds']:.2f} | {result['mib']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revisited", type=Path, default=REVISITED)
    parser.add_argument("--images", type=int, default=1_004_993, help="synthetic; 0: none")
    parser.add_argument("--queries", type=int, default=70)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the descriptors (3 GB)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(run_side(arguments.scratch, arguments.side)))
        return
    if arguments.revisited.is_dir():
        print_revisited(arguments.revisited)
    if arguments.images:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            sizes = {name: getattr(arguments, name) for name in ("images", "queries", "width")}
            make_data(Path(scratch), **sizes)
            print_million(Path(scratch), arguments.repeats)


if __name__ == "__main__":
    main()
