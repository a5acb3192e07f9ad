"""Exact search and faiss indexes from ten thousand to ten million descriptors, by size.

    python benchmarks/scale.py [--sizes 10000 100000 1000000 10000000] [--scratch FOLDER]

One synthetic database is written block by block (15.4 GB for ten million times 384); a smaller
size is its beginning. Its descriptors vary along 32 directions, with noise in all: an index cannot
learn cells and codes from noise alone, and real descriptors have a structure. Each size is measured
in a process of its own: the first 1000 images of every query from memory-mapped descriptors, the
exact ranks of 220 labelled images a query, and each index at the size given with it. Memory is
what the process holds besides pages of files (RssAnon, read every 5 ms), since the system can take
the pages of mapped descriptors back at any time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vitgal.retrieval import faiss_index
from vitgal.retrieval.exact_ranks import labelled_positions
from vitgal.retrieval.exact_search import search

SIZES = (10**4, 10**5, 10**6, 10**7)
INDEXES = ("IVF256,Flat:100000", "HNSW32:100000", "IVF1024,PQ48:1000000")
CHUNK = 1 << 16
DIRECTIONS, NOISE = 32, 0.5
TOP, LABELLED = 1000, 220


def write_database(folder: Path, images: int, width: int, queries: int, seed: int = 0) -> None:
    """Writes database.npy (images, width) and queries.npy (queries, width), float32 of length 1.

    Each query is a noisy copy of a descriptor of the database.
    """
    generator = np.random.default_rng(seed)
    basis = generator.standard_normal((DIRECTIONS, width), dtype=np.float32)
    basis /= np.sqrt(np.float32(DIRECTIONS))
    path = folder / "database.npy"
    database = np.lib.format.open_memmap(path, "w+", np.float32, shape=(images, width))
    for start in range(0, images, CHUNK):
        rows = generator.standard_normal((min(CHUNK, images - start), width), dtype=np.float32)
        rows *= NOISE
        rows += generator.standard_normal((len(rows), DIRECTIONS), dtype=np.float32) @ basis
        rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
        database[start : start + len(rows)] = rows
    near = database[np.arange(queries) * 97 % min(images, SIZES[0])]
    near = near + generator.standard_normal(near.shape, dtype=np.float32) / np.sqrt(width)
    np.save(folder / "queries.npy", near / np.linalg.norm(near, axis=1, keepdims=True))


def anonymous_memory() -> int:
    """Returns the bytes of memory that this process holds besides pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: Linux 4.5 or later is needed")


def measured(work: Callable[[], Any], repeats: int = 1) -> tuple[dict[str, float], Any]:
    """Returns seconds and processor seconds of the fastest run, the most MB added; the result."""
    before, most, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        runs = []
        for _ in range(repeats):
            began, busy = time.perf_counter(), time.process_time()
            result = work()
            runs.append((time.perf_counter() - began, time.process_time() - busy))
    finally:
        done.set()
        watcher.join()
    seconds, cpu = min(runs)
    return {"seconds": seconds, "cpu": cpu, "mb": most[0] / 1e6}, result


def measure(folder: Path, size: int, texts: list[str]) -> dict[str, Any]:
    """Measures one size: the first search, a second one, the labelled ranks, and the indexes."""
    queries = np.load(folder / "queries.npy")
    began = time.perf_counter()
    database = np.load(folder / "database.npy", mmap_mode="r")[:size]
    results: dict[str, Any] = {"open": time.perf_counter() - began}
    results["first"], _ = measured(lambda: search(queries, database, k=TOP))
    results["search"], (_, exact) = measured(lambda: search(queries, database, k=TOP), 2)
    generator = np.random.default_rng(1)
    labelled = [np.sort(generator.choice(size, LABELLED, replace=False)) for _ in queries]
    results["ranks"], _ = measured(lambda: labelled_positions(queries, database, labelled))
    results["indexes"] = {
        text: measure_index(folder, database, queries, exact, text) for text in texts
    }
    return results


def measure_index(
    folder: Path, database: np.ndarray, queries: np.ndarray, exact: np.ndarray, text: str
) -> dict[str, Any]:
    """Measures building and searching one index; exact: ranks (TOP, queries)."""
    index_folder = folder / f"{text}_{len(database)}"
    index_folder.mkdir()
    built, index = measured(lambda: faiss_index.build(index_folder, database, text))
    searched, (_, ranks, unanswered) = measured(lambda: faiss_index.find(index, queries, k=TOP), 2)
    recall = faiss_index.recall(ranks, exact, (1, 10, 100, TOP))
    size = (index_folder / faiss_index.INDEX).stat().st_size
    return {
        "built": built,
        "searched": searched,
        "recall": recall,
        "bytes": size,
        "unanswered": unanswered,
    }


def in_child(*arguments: str) -> str:
    """Runs this script in a process of its own and returns what it prints."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(arguments: argparse.Namespace) -> None:
    """Writes the database, measures every size, and prints both tables."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        options = [f"--{key}={getattr(arguments, key)}" for key in ("width", "queries")]
        began = time.perf_counter()
        in_child("--folder", folder, "--write", str(max(arguments.sizes)), *options)
        print(f"{os.cpu_count()} cores; written in {time.perf_counter() - began:.0f} s")
        print(f"{arguments.queries} queries x {arguments.width} numbers, first {TOP} of each\n")
        print("| images | GB | first time, s | again, s | CPU s | MB | ranks, s | MB |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        indexes = {}
        for size in sorted(arguments.sizes):
            pairs = [text.rpartition(":") for text in arguments.index]
            texts = [text for text, _, wanted in pairs if size == int(wanted)]
            results = json.loads(
                in_child("--folder", folder, "--size", str(size), "--index", *texts)
            )
            indexes[size] = results["indexes"]
            first, again, ranks = (results[step] for step in ("first", "search", "ranks"))
            print(
                f"| {size:,} | {size * arguments.width * 4 / 1e9:.2f} "
                f"| {first['seconds']:.3f} | {again['seconds']:.3f} | {again['cpu']:.3f} "
                f"| {max(first['mb'], again['mb']):.0f} "
                f"| {ranks['seconds']:.2f} | {ranks['mb']:.0f} |",
                flush=True,
            )
    print_indexes(indexes)


def print_indexes(indexes: dict[int, dict]) -> None:
    """Prints a table of all indexes; indexes: size -> text -> `measure_index`'s numbers."""
    print("\n| index | images | built, s | bytes an image | search, s | MB | recall |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for size, results in indexes.items():
        for text, result in results.items():
            recall = ", ".join(f"{100 * value:.1f} @{n}" for n, value in result["recall"].items())
            again = result["searched"]
            print(
                f"| {text} | {size:,} | {result['built']['seconds']:.1f} "
                f"| {result['bytes'] / size:.0f} "
                f"| {again['seconds']:.2f} | {again['mb']:.0f} | {recall}; "
                f"{result['unanswered']} searched exactly |"
            )


def main() -> None:
    """Reads the command line; without --folder compares, with it does one step in a child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=70)
    parser.add_argument("--index", nargs="*", default=INDEXES, help="factory string:size")
    parser.add_argument("--scratch", help="folder for the descriptors (15.4 GB at full size)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is None:
        compare(arguments)
    elif arguments.write:
        write_database(arguments.folder, arguments.write, arguments.width, arguments.queries)
    else:
        print(json.dumps(measure(arguments.folder, arguments.size, arguments.index)))


if __name__ == "__main__":
    main()
