"""Reads mutated files with every reader: `python -m tests.fuzz [--files N] [NAME ...]`.

Each reader works in a child process with 500 MB of memory more than it has, and five seconds a
file. Only the reader's own errors may come out. What fails is kept, and named in the end.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from tests.fuzz.mutate import mutated
from tests.fuzz.readers import READERS, Reader
from vitgal import runs

MEMORY = 500 << 20  # bytes
SECONDS = 5  # of one file


def fuzz(name: str, files: int, seed: int, kept: Path) -> int:
    """Reads so many mutated files in a child process; returns the number of faults."""
    print(f"{name}: ", end="", flush=True)
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "whole").mkdir()
        reader.write(folder / "whole")
        child = os.fork()
        if not child:
            try:
                os._exit(min(100, _read_files(reader, name, folder, files, seed, kept)))
            except BaseException:
                traceback.print_exc()
                os._exit(101)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0 or status > 100:
            target = kept / f"{name} ended with {status}"
            shutil.copytree(folder / "work", target, dirs_exist_ok=True)
            print(f"ended with {status}: {target}", flush=True)
    return abs(status)


def _read_files(reader: Reader, name: str, folder: Path, files: int, seed: int, kept: Path) -> int:
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)  # what libraries print about damage
    output = os.fdopen(os.dup(1), "w")
    os.dup2(null, 1)
    os.dup2(null, 2)
    whole, work = folder / "whole", folder / "work"
    shutil.copytree(whole, work)
    reader.read(work)  # what is whole is read, and the reader's modules are loaded
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    draw, faults = random.Random(f"{name} {seed}"), set()
    for _ in range(files):
        shutil.rmtree(work)
        shutil.copytree(whole, work)
        path = draw.choice(sorted(p for p in work.glob(reader.changed) if p.is_file()))
        path.write_bytes(mutated(path.read_bytes(), path.name, draw))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # SIGALRM ends the process
        try:
            reader.read(work)
        except (runs.UserError, *reader.errors):
            pass
        except Exception as error:
            location = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__} at {Path(location.filename).name}:{location.lineno}"
            if fault not in faults:
                faults.add(fault)
                target = kept / f"{name} {fault}"
                shutil.copytree(work, target, dirs_exist_ok=True)
                (target / "traceback").write_text(traceback.format_exc(), errors="replace")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    lines = [f"{files} files, {len(faults)} faults", *sorted(faults)]
    print("\n  ".join(lines), file=output, flush=True)
    return len(faults)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and fuzzes each reader; returns 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100, help="mutated files of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(READERS))
    options = parser.parse_args(arguments)
    names = options.names or list(READERS)
    kept = Path(tempfile.mkdtemp(prefix="vitgal-fuzz-"))
    faults = sum([fuzz(name, options.files, options.seed, kept) for name in names])
    if faults:
        print(f"what failed is kept in {kept}")
    else:
        shutil.rmtree(kept)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
