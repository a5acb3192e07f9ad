"""Search and evaluation with a million distractors: others' ways beside ours, in one run.

The published way ranks the whole database for every query (one product, one argsort of N x Q) and
looks for the labelled images in each column. Ours counts the labelled images' ranks block by block.
Each side runs in a process of its own that first loads the descriptors; what its peak memory adds
to that is compared. A third process checks that our AP equals that of the full stable sort.

Then the search alone, for the first 1000 images of every query: one product with a full argsort;
faiss's flat index, held in memory; ours, from memory-mapped descriptors, whose pages count as
loaded. And an index of faiss as our own stage makes it, its recall against exact search.

    python benchmarks/search.py [--images 1004993] [--queries 70] [--width 384] [--index TEXT]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vitgal.data.revisited import GroundTruth, ignored, labelled, positives
from vitgal.evaluation.protocol import evaluate
from vitgal.retrieval import faiss_index
from vitgal.retrieval.exact_ranks import labelled_positions
from vitgal.retrieval.exact_search import search

LABELLED = 5_000  # images before the distractors, about as many as ROxford has
COUNTS = {
    "easy": 70,
    "hard": 90,
    "junk": 60,
}  # a query: between ROxford and RParis
NOISE = {"easy": 1.5, "hard": 3.0, "junk": 2.0}  # against a query's length of 1
CHUNK = 50_000
SIDES = ("published", "ours", "ours, with the top 1000", "check")
TOP = 1000
SEARCHES = ("product and full argsort", "faiss flat index, in memory", "ours, memory-mapped")
KILO = 1024  # ru_maxrss counts KiB on Linux


def make_data(folder: Path, *, images: int, queries: int, width: int, seed: int = 0) -> None:
    """Writes queries.npy and database.npy: random directions, labelled images near their query."""
    generator = np.random.default_rng(seed)
    query = _directions(generator, queries, width)
    np.save(folder / "queries.npy", query)
    database = np.lib.format.open_memmap(
        folder / "database.npy", mode="w+", dtype=np.float32, shape=(images, width)
    )
    for start in range(0, images, CHUNK):
        stop = min(start + CHUNK, images)
        database[start:stop] = _directions(generator, stop - start, width)
    truth = make_truth(images, queries)
    for label, noise in NOISE.items():
        for q, indices in enumerate(getattr(truth, label)):
            near = query[q] + noise * _directions(generator, indices.size, width)
            database[indices] = near / np.linalg.norm(near, axis=1, keepdims=True)
    database.flush()


def _directions(generator: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = generator.standard_normal((count, width), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_truth(images: int, queries: int, *, seed: int = 1) -> GroundTruth:
    """Draws each query's labelled images among the first ones."""
    generator = np.random.default_rng(seed)
    first = min(images, LABELLED)
    drawn = [generator.permutation(first)[: sum(COUNTS.values())] for _ in range(queries)]
    cuts = np.cumsum(list(COUNTS.values()))[:-1]
    parts = [[np.sort(part) for part in np.split(images, cuts)] for images in drawn]
    lists = {label: [part[i] for part in parts] for i, label in enumerate(COUNTS)}
    names = [str(index) for index in range(first)]
    boxes = np.tile([0.0, 0, 1, 1], (queries, 1))
    return GroundTruth("synthetic", names, [f"q{q}" for q in range(queries)], boxes, **lists)


# The sides


def run_published(query: np.ndarray, database: np.ndarray, truth: GroundTruth) -> dict:
    """Ranks everything, then looks for the labelled images; Medium and Hard, as published."""
    import torch

    similarity = torch.mm(torch.from_numpy(database), torch.from_numpy(query).T)
    ranks = torch.argsort(-similarity, dim=0).numpy()
    return {protocol: _published_ap(ranks, truth, protocol) for protocol in ("medium", "hard")}


def _published_ap(ranks: np.ndarray, truth: GroundTruth, protocol: str) -> list[float]:
    positions = np.arange(len(ranks))
    ap = []
    for q, (right, skip) in enumerate(
        zip(positives(truth, protocol), ignored(truth, protocol), strict=True)
    ):
        hits = positions[np.isin(ranks[:, q], right)]
        hits = hits - np.searchsorted(positions[np.isin(ranks[:, q], skip)], hits)
        area = 0.0
        for count, rank in enumerate(hits):
            before = count / rank if rank else 1.0
            area += (before + (count + 1) / (rank + 1)) / 2 / len(right)
        ap.append(area)
    return ap


def run_ours(query: np.ndarray, database: np.ndarray, truth: GroundTruth) -> dict:
    """Easy, Medium and Hard from exact positions."""
    scores = evaluate(labelled_positions(query, database, labelled(truth)), truth)
    return {protocol: scores[protocol]["ap"].tolist() for protocol in ("medium", "hard")}


def run_ours_with_top(query: np.ndarray, database: np.ndarray, truth: GroundTruth) -> dict:
    """The same and the ranking's first 1000, which short lists and galleries need."""
    search(query, database, k=1000)
    return run_ours(query, database, truth)


def run_check(query: np.ndarray, database: np.ndarray, truth: GroundTruth) -> dict:
    """The full stable sort of the similarities that `vitgal.search` documents; not timed."""
    ap: dict[str, list[float]] = {"medium": [], "hard": []}
    for q in range(len(query)):
        row = np.empty(len(database), np.float32)
        for start in range(0, len(database), CHUNK):
            rows = database[start : start + CHUNK].astype(np.float64)
            row[start : start + CHUNK] = rows @ query[q].astype(np.float64)
        ranks = np.argsort(-row, kind="stable")[:, None]
        lists = {label: [getattr(truth, label)[q]] for label in COUNTS}
        single = GroundTruth("one", truth.database, ["q"], truth.boxes[:1], **lists)
        for protocol, scores in evaluate(ranks, single).items():
            if protocol in ap:
                ap[protocol].append(float(scores["ap"][0]))
    return ap


RUNNERS = dict(zip(SIDES, (run_published, run_ours, run_ours_with_top, run_check), strict=True))


def run_side(folder: Path, side: str) -> dict:
    """Loads the descriptors, runs one side and reports seconds, added MiB and every AP."""
    if side == "published":
        import torch  # noqa: F401  loading the library is not measured
    query, database = np.load(folder / "queries.npy"), np.load(folder / "database.npy")
    truth = make_truth(len(database), len(query))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, busy = time.perf_counter(), time.process_time()
    ap = RUNNERS[side](query, database, truth)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded
    return {"seconds": seconds, "cpu": busy, "mib": added / KILO, "ap": ap}


# The search alone


def run_search(folder: Path, side: str) -> dict:
    """The first 1000 images of every query, one way: seconds, added MiB, and the images."""
    if side == SEARCHES[0]:
        import torch
    if side == SEARCHES[1]:
        import faiss
    query = np.load(folder / "queries.npy")
    mapped = side == SEARCHES[2]
    database = np.load(folder / "database.npy", mmap_mode="r" if mapped else None)
    work = {
        SEARCHES[0]: lambda: torch.argsort(
            -torch.mm(torch.from_numpy(database), torch.from_numpy(query).T), dim=0
        ).numpy()[:TOP],
        SEARCHES[1]: lambda: index.search(query, TOP)[1].T,
        SEARCHES[2]: lambda: search(query, database, k=TOP)[1],
    }[side]
    if side == SEARCHES[1]:
        index = faiss.IndexFlatIP(database.shape[1])
        index.add(database)
        del database
    if mapped:
        database.max()  # every page is there before the clock starts, as it is for the others
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, busy = [], []
    for _ in range(3):
        began, spent = time.perf_counter(), time.process_time()
        ranks = work()
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - spent)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded
    result = {"seconds": min(seconds), "cpu": min(busy), "mib": added / KILO}
    return result | {"top": np.ascontiguousarray(ranks.T).tolist()}


def run_index(folder: Path, text: str) -> dict:
    """Builds, stores and searches an index; its size and recall."""
    query = np.load(folder / "queries.npy")
    database = np.load(folder / "database.npy", mmap_mode="r")
    times = [time.perf_counter()]
    index = faiss_index.build(folder, database, text)
    times.append(time.perf_counter())
    _, ranks, unanswered = faiss_index.find(index, query, k=TOP)
    times.append(time.perf_counter())
    exact = search(query, database, k=TOP)[1]
    result = dict(zip(("build", "seconds"), np.diff(times).tolist(), strict=True))
    result |= {"recall": faiss_index.recall(ranks, exact, (1, 10, 100, TOP))}
    size = (folder / faiss_index.INDEX).stat().st_size
    return result | {"bytes": size, "unanswered": unanswered}


# The comparison


def in_child(*arguments: str) -> str:
    """Runs this file anew: a child's peak memory then starts from a small parent's."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measured(folder: str, side: str, repeats: int) -> dict:
    """The quickest of several runs: the one that other work on the machine disturbed least."""
    runs = [
        json.loads(in_child("--folder", folder, "--side", side))
        for _ in range(1 if side == "check" else repeats)
    ]
    return min(runs, key=lambda run: run["seconds"])


def compare(arguments: argparse.Namespace) -> None:
    sizes = [f"--{key}={getattr(arguments, key)}" for key in ("images", "queries", "width")]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        in_child("--folder", folder, "--side", "data", *sizes)
        results = {side: measured(folder, side, arguments.repeats) for side in SIDES}
        alone = {side: measured(folder, side, arguments.repeats) for side in SEARCHES}
        indexes = {text: measured(folder, f"index {text}", 1) for text in arguments.index}
    base = results["published"]
    print(f"{arguments.images:,} x {arguments.width} descriptors x {arguments.queries} queries;")
    print(f"{os.cpu_count()} {platform.machine()} cores, numpy {np.__version__}")
    print("seconds and MiB: what a side takes beyond loading the descriptors\n")
    print("| | seconds | faster | CPU seconds | added MiB | fraction | mAP Medium, Hard |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for side in SIDES[:-1]:
        row = results[side]
        means = ", ".join(f"{100 * np.mean(row['ap'][p]):.4f}" for p in ("medium", "hard"))
        print(
            f"| {side} | {row['seconds']:.2f} | {base['seconds'] / row['seconds']:.1f} x "
            f"| {row['cpu']:.2f} | {row['mib']:.0f} | {row['mib'] / base['mib']:.3f} | {means} |"
        )
    worst = largest_difference(results["ours"]["ap"], results["check"]["ap"])
    print(f"\nlargest difference of any AP from the full stable sort: {worst:.1e}")
    float32 = largest_difference(results["ours"]["ap"], base["ap"])
    print(f"from the published ranking (float32 products, ties as they fall): {float32:.1e}")
    print_searches(alone)
    for text, row in indexes.items():
        recall = ", ".join(f"{100 * mean:.1f} % of {n}" for n, mean in row["recall"].items())
        print(
            f"index {text}: built in {row['build']:.0f} s, {row['bytes'] / 1e6:.0f} MB, "
            f"searched in {row['seconds']:.2f} s, {row['unanswered']} queries searched exactly; "
            f"recall {recall}"
        )
    if worst > 1e-12:
        sys.exit("our AP differs from the full sort's")


def print_searches(alone: dict[str, dict]) -> None:
    ours = alone[SEARCHES[2]]
    print(
        f"\n| the first {TOP} alone | seconds | ours is faster | CPU seconds | added MiB | same |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for side, row in alone.items():
        pairs = zip(row["top"], ours["top"], strict=True)
        same = np.mean([np.isin(images, expected).mean() for images, expected in pairs])
        print(
            f"| {side} | {row['seconds']:.3f} | {row['seconds'] / ours['seconds']:.2f} x "
            f"| {row['cpu']:.2f} | {row['mib']:.0f} | {100 * same:.3f} % |"
        )


def largest_difference(left: dict, right: dict) -> float:
    return max(float(np.abs(np.subtract(left[key], right[key])).max()) for key in left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_004_993)
    parser.add_argument("--queries", type=int, default=70)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the best counts")
    parser.add_argument("--scratch", help="folder for the descriptors (1.5 GB at full size)")
    parser.add_argument("--index", action="append", default=[], help="also measure this index")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is None:
        compare(arguments)
    elif arguments.side == "data":
        sizes = {key: getattr(arguments, key) for key in ("images", "queries", "width")}
        make_data(arguments.folder, **sizes)
    elif arguments.side in SEARCHES:
        print(json.dumps(run_search(arguments.folder, arguments.side)))
    elif arguments.side.startswith("index "):
        print(json.dumps(run_index(arguments.folder, arguments.side.removeprefix("index "))))
    else:
        print(json.dumps(run_side(arguments.folder, arguments.side)))


if __name__ == "__main__":
    main()
