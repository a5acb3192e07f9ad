"""The training split in full size: the published row by row loop beside ours, in one run.

A table of GLDv2-clean's size is generated. Each side runs in a process of its own: it reads the
table, splits it, and writes the two published text files. What is compared is the split itself
(labels, paths, which image validates), then everything together, in processor seconds (both use one
core, and other work on the machine then counts little); memory is the process's peak. Ours
also does what the published way leaves out, timed apart: checking the table's ids, and a whole
stage with its CSV files, fingerprints and the check that all 1,580,470 images exist.

    python benchmarks/split.py [--images 1580470] [--classes 81313] [--stage]
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
import pandas as pd

from vitgal.data.gldv2 import CLEAN, image_path, read_landmark_table
from vitgal.data.splits import split_landmarks, write_split_txt
from vitgal.settings.sections import SplitSettings
from vitgal.stages.split import make_split

SIDES = ("published", "ours")
VAL_SHARE = 0.2
MEBI = 1024  # ru_maxrss counts KiB on Linux


def make_table(path: Path, *, images: int, classes: int, seed: int = 0) -> None:
    """Writes `id,landmark_id`: random hexadecimal ids, class sizes with a long tail, at least 2."""
    generator = np.random.default_rng(seed)
    weight = generator.pareto(1.2, classes) + 0.05
    sizes = 2 + np.floor(weight / weight.sum() * (images - 2 * classes)).astype(np.int64)
    sizes[: images - sizes.sum()] += 1  # what rounding down left over; fewer than `classes`
    # A bijection of 64-bit numbers: ids look random and none is drawn twice.
    numbers = np.arange(1, images + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    landmarks = np.repeat(np.sort(generator.choice(200_000, classes, replace=False)), sizes)
    with open(path, "w", encoding="utf-8") as handle:
        handle.write("id,landmark_id\n")
        rows = zip(numbers.tolist(), landmarks.tolist(), strict=True)
        handle.writelines(f"{number:016x},{landmark}\n" for number, landmark in rows)


def run_published(table: Path, out: Path) -> dict:
    """One pass over the rows in order of class, a random number drawn for each."""
    began = time.process_time()
    frame = pd.read_csv(table)
    labels, images = frame["landmark_id"].values, frame["id"].values
    read = time.process_time()
    parts = {"train": [], "val": []}
    current, number = -1, -1
    for row in np.argsort(labels):
        image, label = images[row], labels[row]
        path = "train/" + image[0] + "/" + image[1] + "/" + image[2] + "/" + image + ".jpg"
        first = label > current
        if first:
            current, number = label, number + 1
        part = "train" if first or np.random.uniform() >= VAL_SHARE else "val"
        parts[part].append([path, number])
    split = time.process_time()
    for name, rows in parts.items():
        with open(out / f"{name}.txt", "w") as handle:
            for path, label in rows:
                handle.write(path + " " + str(label) + "\n")
    return _times(began, read, split) | {name: len(rows) for name, rows in parts.items()}


def run_ours(table: Path, out: Path) -> dict:
    """The same with vitgal.data, which also checks every id of the table."""
    began = time.process_time()
    frame = read_landmark_table(table)
    read = time.process_time()
    divided = split_landmarks(frame, val_share=VAL_SHARE)
    split = time.process_time()
    counts = {name: len(getattr(divided, name)) for name in ("train", "val")}
    for name in counts:
        write_split_txt(out / f"{name}.txt", getattr(divided, name))
    return _times(began, read, split) | counts


def run_stage(table: Path, out: Path) -> dict:
    """The whole stage, every image's existence checked; the images are empty files."""
    frame = read_landmark_table(table)
    for image in frame["id"]:
        path = out / "images" / image_path(image)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        os.close(os.open(path, os.O_CREAT))
    settings = SplitSettings(
        val_share=VAL_SHARE,
        expected_images=len(frame),
        expected_classes=int(frame["landmark_id"].nunique()),
    )
    began = time.process_time()
    make_split(out, settings, train_table=table, image_folder=out / "images")
    return {"total": time.process_time() - began}


def _times(began: float, read: float, split: float) -> dict[str, float]:
    ended = time.process_time()
    return {
        "read": read - began,
        "split": split - read,
        "write": ended - split,
        "total": ended - began,
    }


def measure(side: str, table: Path) -> dict:
    """Runs one side in a fresh process; its processor seconds and `peak` in MiB."""
    command = [sys.executable, __file__, "--side", side, "--table", str(table)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_side(side: str, table: Path) -> None:
    """What the fresh process does: prints the result as one line of JSON."""
    work = {"published": run_published, "ours": run_ours, "stage": run_stage}[side]
    with tempfile.TemporaryDirectory() as folder:
        result = work(table, Path(folder))
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBI
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=CLEAN[0])
    parser.add_argument("--classes", type=int, default=CLEAN[1])
    parser.add_argument("--stage", action="store_true", help="also time the stage (many files)")
    parser.add_argument("--side", choices=(*SIDES, "stage"), help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.table)
        return
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "train.csv"
        make_table(table, images=arguments.images, classes=arguments.classes)
        results = {side: measure(side, table) for side in SIDES}
        if arguments.stage:
            results["stage"] = measure("stage", table)
    print(f"{arguments.images:,} images of {arguments.classes:,} classes, {platform.machine()}")
    for side, result in results.items():
        print(f"{side:10}", "  ".join(f"{key} {value:,.2f}" for key, value in result.items()))
    for step in ("split", "total"):
        ratio = results["published"][step] / results["ours"][step]
        print(f"{step}: published / ours = {ratio:.1f}")


if __name__ == "__main__":
    main()
