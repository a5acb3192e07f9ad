"""Training's data at the real table's size beside the demo's: time and memory of every step.

    python benchmarks/full_size.py [--images 1580470] [--classes 81313] [--workers 8] [--keep TO]

A table of GLDv2-clean's size is generated; a few of the bundled photographs, at 800 x 600, stand as
hard links behind all its names. The small table has the demo's size. No step of a sample or of a
training step may grow with the table. Times are the processor's, memory is what a step adds to this
process at its peak.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # libraries read it when they are imported

import cv2
import torch
from split import make_table

from vitgal import runs
from vitgal.data import gldv2
from vitgal.models.heads import ArcFace
from vitgal.models.network import build_model
from vitgal.settings import MachineSettings, Recipe, SplitSettings
from vitgal.stages.split import make_split
from vitgal.training import checkpoints, networks, processes, samples

LINKS = 20_000  # names of one file; file systems allow a limited number
SMALL = (10_000, 500)  # images, classes
SAMPLES = 1000
ROWS = 8004  # of the log of 400,200 steps


@dataclass
class Measured:
    """Processor seconds and MB of each step at one size, by its name."""

    seconds: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)

    def run(
        self,
        name: str,
        work: Callable[[], object],
        times: int = 1,
        clock: Callable[[], float] = time.process_time,
    ) -> object:
        """Runs a step and returns its result. times: what its seconds are divided by."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, began = memory("VmRSS"), clock()
        result = work()
        self.seconds[name] = (clock() - began) / times
        self.megabytes[name] = (memory("VmHWM") - before) / 1024
        return result


def memory(name: str) -> int:
    """An entry of this process's status in KiB."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1])


def write_images(folder: Path, ids: list[str]) -> None:
    """Photographs of 800 x 600 under all ids."""
    originals = sorted((runs.checkout() / "third_party" / "landmarks").rglob("*.jpg"))
    for number, image in enumerate(ids):
        if number % LINKS == 0:
            source = folder / f"source{number // LINKS}.jpg"
            picture = cv2.imread(str(originals[number // LINKS % len(originals)]))
            source.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(source), cv2.resize(picture, (800, 600)))
        path = folder / gldv2.image_path(image)
        try:
            os.link(source, path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, path)


def measure(folder: Path, images: int, classes: int, workers: int) -> Measured:
    """Every step at one size."""
    found, table, photographs = Measured(), folder / "table.csv", folder / "images"
    if not table.exists():
        make_table(table, images=images, classes=classes)
        write_images(photographs, gldv2.read_landmark_table(table)["id"].tolist())
    split = SplitSettings(val_share=0.1)

    def stage() -> Path:
        return make_split(folder, split, train_table=table, image_folder=photographs)

    found.run("split: the stage of notebook 01", stage)
    found.run("split: finished, found again", stage)
    recipe = Recipe(image_size=512)
    data = found.run(
        "opening the training data",
        lambda: samples.read_data(folder / "split", photographs, recipe),
    )
    found.run("list of missing images", data.refuse_missing)
    given = {"batch_size": 64, "processes": 1, "rank": 0, "seed": 0}
    batches = samples.Batches(len(data.train), epoch=0, **given)
    found.run("order of an epoch", batches.order)
    found.run(
        "order of an epoch, balanced",
        samples.Batches(len(data.train), epoch=0, labels=data.train.labels, **given).order,
    )
    order = batches.order()[:SAMPLES].tolist()
    found.run("a sample", lambda: [data.train[0, index] for index in order[:200]], 200)
    found.run("a validation image", lambda: [data.validation[0, k] for k in range(200)], 200)
    machine = MachineSettings(data_workers=workers)
    count = min(SAMPLES, len(data.train) // 64 * 64) // 64
    keys = [batch for batch, _ in zip(batches, range(count), strict=False)]

    def load() -> None:
        for _ in processes.read_batches(data.train, keys, machine, pin_memory=False):
            pass

    found.run(f"an image, {workers} workers (clock)", load, 64 * count, time.perf_counter)
    return measure_writing(found, folder, data)


def measure_writing(found: Measured, folder: Path, data: samples.SplitData) -> Measured:
    """What a run writes: state with the classifier, log, manifest."""
    model = build_model("xcit_small_12_p16_224", seed=0)
    network = networks.RetrievalNetwork(model, ArcFace(model.embed_dim, data.classes))
    optimizer = networks.build_optimizer(network, Recipe())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    target = folder / "retrieval"
    state = checkpoints.Checkpoints(target, "", {"network": network, "optimizer": optimizer})
    row = {"epoch": 1, "step": 1, "lr": 1e-5, "loss": 1.0, "accuracy": 0.5, "hours_left": 1.0}
    progress = checkpoints.Progress(rows=[row] * ROWS)
    with runs.stage(target, "retrieval", parameters={}, inputs={}, overwrite=True) as stage:
        found.run(f"log of {ROWS} rows and state", lambda: state.save(progress))
        found.run("manifest", lambda: stage.finish(["log.jsonl", "state/last.pt"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_580_470)
    parser.add_argument("--classes", type=int, default=81_313)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder for the tables; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    sizes = [SMALL, (options.images, options.classes)]
    with tempfile.TemporaryDirectory() as temporary:
        top = options.keep or Path(temporary)
        found = []
        for images, classes in sizes:
            folder = top / str(images)
            folder.mkdir(parents=True, exist_ok=True)
            found.append(measure(folder, images, classes, options.workers))
    small, large = found
    titles = [f"{images:,} images" for images, _ in sizes]
    print(f"{'':36}{titles[0]:>24}{titles[1]:>24}")
    for name in small.seconds:
        cells = [
            f"{one.seconds[name] * 1e3:12.1f} ms{one.megabytes[name]:6.0f} MB" for one in found
        ]
        print(f"{name:36}{cells[0]:>24}{cells[1]:>24}")
    ratio = large.seconds["a sample"] / small.seconds["a sample"]
    print(f"a sample takes {ratio:.2f} times as long at {titles[1]}")


if __name__ == "__main__":
    main()
