"""Own photographs at size: a folder of many is looked through, searched and described; with memory.

    python benchmarks/own_folder.py [--photographs 10000] [--described 100] [--queries 10]

The folder holds different files with the bundled photographs, 160 pixels large. Descriptions are
made for one of each and linked to the others, since describing all of them takes an hour; the rate
of describing is measured on `--described` further ones, with the memory before and after.
"""

import argparse
import functools
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitgal import runs
from vitgal.data.images import read_image
from vitgal.data.photographs import file_digest
from vitgal.settings import Values, settings_of
from vitgal.stages import own
from vitgal.stages.model_choice import own_models
from vitgal.viz.report import THUMBNAIL, jpeg


def timed(label: str, work: Callable[[], Any]) -> Any:
    """Runs and prints the seconds, of which processor time, and the most memory so far."""
    start, busy = time.perf_counter(), time.process_time()
    result = work()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    spent = time.perf_counter() - start, time.process_time() - busy
    print(
        f"{label:<40}{spent[0]:8.2f} s {spent[1]:8.2f} s of processor {memory:7.0f} MB", flush=True
    )
    return result


def write_copies(data: list[bytes], target: Path, first: int, count: int) -> list[Path]:
    """Writes files of equal pictures and different content."""
    files = []
    for number in range(first, first + count):
        file = target / f"{number % 100:02}" / f"{number:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        # A comment behind the first mark.
        picture = data[number % len(data)]
        comment = b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big")
        file.write_bytes(picture[:2] + comment + picture[2:])
        files.append(file)
    return files


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=int, default=10_000)
    parser.add_argument("--described", type=int, default=100)
    parser.add_argument("--queries", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    """Makes the folder and prints the table."""
    options = read_options()
    with tempfile.TemporaryDirectory() as top:
        measure(options, Path(top))


def measure(options: argparse.Namespace, top: Path) -> None:
    """Prints a line a step."""
    folder, run = top / "photographs", top / "run"
    run.mkdir()
    models = own_models(run, None)
    print(models.reason)
    whole = models.complete(settings_of(Values.of({"threads": 1}, "this benchmark")))
    describer = models.describer(run, whole)
    bundled = sorted(runs.resolve("third_party/landmarks").glob("*/*.jpg"))
    data = [jpeg(read_image(path), THUMBNAIL) for path in bundled]
    files = write_copies(data, folder, 0, options.photographs)
    first = [describer.describe(file).file for file in files[: len(data)]]
    for number, file in enumerate(files[len(data) :], len(data)):
        digest = file_digest(file)
        linked = describer.folder / digest[:2] / f"{digest}.npz"
        linked.parent.mkdir(exist_ok=True)
        os.link(first[number % len(first)], linked)

    def describe() -> own.Photographs:
        """Looks through the folder."""
        photographs = own.describe_folder(folder, describer)
        print(f"{photographs.extracted} described of {len(photographs.names)}: ", end="")
        return photographs

    time.sleep(3)  # a file that was written just now is read again at the next search
    timed("first look, files read", describe)
    photographs = timed("nothing has changed", describe)
    for step, file in enumerate(files[:30]):
        (file.unlink, lambda file=file: file.rename(folder / file.name))[step % 2]()
    photographs = timed("15 renamed, 15 deleted", describe)
    for path in bundled[: options.queries]:
        arguments = photographs, str(path), None, whole.reranking
        timed("search", functools.partial(own.search_folder, *arguments))
    write_copies(data, folder, options.photographs, options.described)
    timed(f"{options.described} added", describe)


if __name__ == "__main__":
    main()
