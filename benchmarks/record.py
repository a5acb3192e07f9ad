"""Runs a benchmark and puts what it prints into benchmarks/README.md, word for word.

    python benchmarks/record.py rerank.py --queries 24
    python benchmarks/record.py --all        # `make bench`: the commands of SUITE, one by one

The block stands under "As printed", with its command, the day and the machine; the block of the
same command is replaced. A script that fails leaves the page as it is.
"""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "README.md"
HEADING = "## As printed"
# Needs no data but what comes along; under fifteen minutes on two quiet cores.
SUITE = (
    "extraction.py --images 3 --batch 8 --part local",
    "extraction.py --images 8 --batch 8 --part global",
    "training.py --architecture xcit_nano_12_p16_224 --size 112 --batch 48 --classes 1000"
    " --threads 1",
    "rerank.py --queries 24",
    "search.py",
    "store.py --images 96 --reads 300",
    "gpu.py --images 512",
)


def main(arguments: list[str], page: Path = PAGE, folder: Path = FOLDER) -> int:
    """Runs `arguments`, a script of `folder` and its options; returns its exit status."""
    if arguments == ["--all"]:
        return run_all(page, folder)
    names = sorted(path.name for path in folder.glob("*.py") if path.name != Path(__file__).name)
    if not arguments or arguments[0] not in names:
        print(f"{__doc__}\nscripts: {', '.join(names)}")
        return 2
    start = [sys.executable, str(folder / arguments[0]), *arguments[1:]]
    lines = []
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:  # progress bars go to stderr, past this
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if running.returncode == 0:
        command = f"python benchmarks/{shlex.join(arguments)}"
        page.write_text(placed(page.read_text(), command, machine(), "\n".join(lines).strip("\n")))
    return running.returncode


def run_all(page: Path, folder: Path, commands: Sequence[str] = SUITE) -> int:
    """Records each command; goes on where one fails. Returns 1 where any failed, else 0."""
    began, failed = time.monotonic(), []
    for command in commands:
        print(f"\n== {command}", flush=True)
        if main(shlex.split(command), page, folder):
            failed.append(command)
    print(f"\n{len(commands)} benchmarks in {(time.monotonic() - began) / 60:.1f} minutes")
    for command in failed:
        print(f"failed: {command}")
    return int(bool(failed))


def placed(page: str, command: str, where: str, printed: str) -> str:
    """The page with the command's block in the last section, which is begun where it lacks."""
    if f"\n{HEADING}\n" not in page:
        page = f"{page.rstrip()}\n\n{HEADING}\n"
    block = f"`{command}`, {where}:\n\n```\n{printed}\n```\n"
    old = re.compile(rf"^`{re.escape(command)}`, .*\n\n```\n(?:(?!```).*\n)*```\n", re.MULTILINE)
    if old.search(page):
        return old.sub(lambda _: block, page)
    return f"{page.rstrip()}\n\n{block}"


def machine() -> str:
    """Day, processor, cores and load, in words; nothing that tells whose machine it is."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    name = model[1].strip() if model else platform.machine()
    # Above the number of cores others worked too: times are upper bounds, ratios uncertain.
    cores, load = os.cpu_count(), os.getloadavg()[0]
    return f"{datetime.date.today()}, {cores} cores of {name}, load average {load:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
