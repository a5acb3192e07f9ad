"""Training's data at the real table's size beside the demo's: time and memory of every step.

    python benchmarks/full_size.py [--images 1580470] [--classes 81313] [--distractors 1000000]
        [--workers 8] [--keep TO]

A table of GLDv2-clean's size is generated; a few of the bundled photographs, at 800 x 600, stand as
hard links behind all its names, and behind those of a benchmark's distractors. The small table has
the demo's size. The time of a sample or of a training step must not grow with the table. Times are
processor time of this process and of its ended child processes, or wall-clock time where a row says
so. Memory is what a step adds to this process at its peak.
"""

import argparse
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # libraries read it when they are imported

import cv2
import numpy as np
import pandas as pd
import torch
from split import make_table

from vitgal import runs
from vitgal.data import gldv2, revisited
from vitgal.models.heads import ArcFace
from vitgal.models.network import build_model
from vitgal.settings import MachineSettings, Recipe, SplitSettings
from vitgal.stages.split import make_split
from vitgal.training import checkpoints, networks, processes, samples

LINKS = 20_000  # names of one file; file systems allow a limited number
SMALL = (10_000, 500)  # images, classes
SAMPLES = 1000
LONG = 5000  # samples over which the workers' memory is followed
BENCHMARK = (4993, 70)  # database and queries
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
        clock: Callable[[], float] | None = None,
    ) -> object:
        """Runs a step and returns its result. times: what its seconds are divided by."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        clock = clock or processor_time
        before, began = memory("VmRSS"), clock()
        result = work()
        self.seconds[name] = (clock() - began) / times
        self.megabytes[name] = (memory("VmHWM") - before) / 1024
        return result


def processor_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def memory(name: str) -> int:
    """An entry of this process's status in KiB."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1])


def link_images(folder: Path, names: list[str]) -> None:
    """Photographs of 800 x 600 under all names."""
    originals = sorted((runs.checkout() / "third_party" / "landmarks").rglob("*.jpg"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        if number % LINKS == 0:
            source = folder / f"source{number // LINKS}.jpg"
            picture = cv2.imread(str(originals[number // LINKS % len(originals)]))
            cv2.imwrite(str(source), cv2.resize(picture, (800, 600)))
        path = folder / name
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
        ids = gldv2.read_landmark_table(table)["id"]
        link_images(photographs, ids.map(gldv2.image_path).tolist())
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
    for index in order[:20]:  # what is built at the first call
        data.train[0, index]
    found.run("a sample", lambda: [data.train[0, index] for index in order[:200]], 200)
    found.run("a validation image", lambda: [data.validation[0, k] for k in range(200)], 200)
    measure_workers(found, data, workers)
    measure_writing(found, folder, data)
    return measure_sigterm(found, folder, photographs)


def measure_workers(found: Measured, data: samples.SplitData, workers: int) -> None:
    """An image by data workers, and what each of them alone holds early and late."""
    machine = MachineSettings(data_workers=workers)
    batches = samples.Batches(len(data.train), 64, 1, 0, seed=0, epoch=0)

    def load() -> None:
        keys = [*itertools.islice(batches, SAMPLES // 64)]
        for _ in processes.read_batches(data.train, keys, machine, pin_memory=False):
            pass

    number = SAMPLES // 64 * 64
    found.run(f"an image, {workers} workers", load, number)
    found.run(f"an image, {workers} workers (clock)", load, number, time.perf_counter)
    small = samples.TrainingImages(
        data.train.folder,
        pd.DataFrame({"path": data.train.names, "label": data.train.labels}),
        Recipe(image_size=64),
        "fast",
    )
    keys = [*itertools.islice(batches, LONG // 64)]
    private = []
    for _ in processes.read_batches(small, keys, machine, pin_memory=False):
        private.append(max(map(private_memory, multiprocessing.active_children())))
    found.megabytes[f"a worker's own, after {LONG // 5} images"] = private[LONG // 5 // 64]
    found.megabytes[f"a worker's own, after {LONG} images"] = private[-1]


def private_memory(process: multiprocessing.Process) -> float:
    """What a process shares with no other, in MB."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure_sigterm(found: Measured, folder: Path, photographs: Path) -> Measured:
    """From SIGTERM to the end of a training of two processes with two data workers each."""
    values = {"image_folder": photographs, "num_processes": 2, "data_workers": 2, "threads": 1}
    values |= {"batch_size": 2, "image_size": 32, "epochs": 9, "precision": "fp32"}
    pairs = [word for name, value in values.items() for word in ("-p", name, str(value))]
    run = folder / "told"
    run.mkdir(exist_ok=True)
    if not (run / "split").exists():
        (run / "split").symlink_to(folder / "split")
    command = [sys.executable, "-m", "vitgal.training", "params/tiny.yaml", "--only", "02"]
    command += ["--output", str(run), "-p", "overwrite", "true", *pairs]
    options = {"cwd": runs.checkout(), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options) as child:
        said = b""
        while b"| 3/" not in said:  # the bar after the third step
            more = os.read(child.stderr.fileno(), 4096)
            if not more:
                raise RuntimeError(f"training ended early: {said.decode()[-2000:]}")
            said = said[-2000:] + more
        began = time.perf_counter()
        child.send_signal(signal.SIGTERM)
        child.communicate()
        found.seconds["SIGTERM to exit, 2 processes (clock)"] = time.perf_counter() - began
    if child.returncode != 75:
        raise RuntimeError(f"training ended with {child.returncode}")
    return found


def measure_benchmark(found: Measured, folder: Path, distractors: int) -> None:
    """A finished stage on a benchmark with distractors: opening its images, and the answer."""
    if not (folder / "revisitop1m" / "revisitop1m.txt").exists():
        write_benchmark(folder, distractors)

    def stage() -> bool:
        dataset = revisited.open_dataset(
            "roxford", folder / "roxford", distractors=folder / "revisitop1m"
        )
        # The content is not hashed: a first run does that once.
        images = runs.Input(dataset.as_input.stamp, lambda: "content")
        inputs = {"dataset": images}
        with runs.stage(folder / "global", "global", parameters={}, inputs=inputs) as opened:
            finished = opened.finished
            if not finished:
                opened.finish([])
        return finished

    stage()
    total = f"finished stage, {sum(BENCHMARK) - BENCHMARK[1] + distractors:,} images"
    for name, clock in ((total, {}), (f"{total} (clock)", {"clock": time.perf_counter})):
        if not found.run(name, stage, **clock):
            raise RuntimeError("the stage was not found to be finished")


def write_benchmark(folder: Path, distractors: int) -> None:
    """A benchmark of ROxford's size, and distractors, behind hard links to few photographs."""
    database, queries = (
        [f"{kind}_{n}" for n in range(count)]
        for kind, count in zip(("image", "query"), BENCHMARK, strict=True)
    )
    names = [f"{n % 256:02x}/{n // 256 % 16:02x}/{n:024x}.jpg" for n in range(distractors)]
    link_images(folder / "roxford" / "jpg", [f"{name}.jpg" for name in database + queries])
    link_images(folder / "revisitop1m" / "jpg", names)
    lists = [[np.arange(3 * q + part, 3 * q + part + 1) for q in range(len(queries))]
             for part in range(3)]  # fmt: skip
    boxes = np.tile([10.0, 10.0, 200.0, 200.0], (len(queries), 1))
    truth = revisited.GroundTruth("roxford", database, queries, boxes, *lists)
    revisited.write_ground_truth(folder / "roxford" / "gnd_roxford.pkl", truth)
    runs.write_text(folder / "revisitop1m" / "revisitop1m.txt", "\n".join(names))


def measure_writing(found: Measured, folder: Path, data: samples.SplitData) -> None:
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
    progress, clock = checkpoints.Progress(rows=[row] * ROWS), time.perf_counter
    with runs.stage(target, "retrieval", parameters={}, inputs={}, overwrite=True) as stage:
        found.run(f"log of {ROWS} rows and state", lambda: state.save(progress))
        found.run(f"log of {ROWS} rows and state (clock)", lambda: state.save(progress), 1, clock)
        found.run("manifest", lambda: stage.finish(["log.jsonl", "state/last.pt"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_580_470)
    parser.add_argument("--classes", type=int, default=81_313)
    parser.add_argument("--distractors", type=int, default=1_000_000)
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
        benchmark = Measured()
        measure_benchmark(benchmark, top / "distractors", options.distractors)
    report(sizes, *found)
    for name, seconds in benchmark.seconds.items():
        print(f"{name:40}{seconds:9.2f} s{benchmark.megabytes[name]:6.0f} MB")


def report(sizes: list[tuple[int, int]], small: Measured, large: Measured) -> None:
    """Prints the steps at both sizes, and what is asked of them."""
    titles = [f"{images:,} images" for images, _ in sizes]
    print(f"{'':44}{titles[0]:>24}{titles[1]:>24}")
    for name in {**small.seconds, **small.megabytes}:
        cells = [
            (f"{one.seconds[name] * 1e3:12.1f} ms" if name in one.seconds else "")
            + (f"{one.megabytes[name]:6.0f} MB" if name in one.megabytes else 9 * " ")
            for one in (small, large)
        ]
        print(f"{name:44}{cells[0]:>24}{cells[1]:>24}")
    ratio = large.seconds["a sample"] / small.seconds["a sample"]
    print(f"a sample takes {ratio:.2f} times as long at {titles[1]}")
    state = large.seconds[f"log of {ROWS} rows and state (clock)"]
    between = 60 * MachineSettings().checkpoint_minutes
    print(f"state: {100 * state / between:.1f} % of the {between:.0f} s between two")


if __name__ == "__main__":
    main()
