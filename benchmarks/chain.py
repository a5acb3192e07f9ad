"""A finished chain of notebooks: executed again, and recognised as unchanged, in one run.

`vitgal run` is started as a user starts it, in processes of its own; processor seconds of it and
of all kernels, so that other work on the machine counts little.

    python benchmarks/chain.py [params/demo.yaml] [--output runs/demo] [--turns 3]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time


def measured(command: list[str]) -> tuple[float, float]:
    """Returns a command's processor and elapsed seconds, with those of its children."""
    began, before = time.monotonic(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("params", nargs="?", default="params/demo.yaml")
    parser.add_argument("--output", metavar="runs/demo", help="a finished run; default: the file's")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    command = [sys.executable, "-m", "vitgal", "run", options.params]
    command += ["--output", options.output] if options.output else []
    executed = measured([*command, "--again"])
    turns = [measured(command) for _ in range(options.turns)]
    unchanged = [statistics.median(values) for values in zip(*turns, strict=True)]
    for name, (processor, elapsed) in (("executed", executed), ("unchanged", unchanged)):
        print(f"{name:10}{processor:8.1f} s of processor time, {elapsed:6.1f} s elapsed")


if __name__ == "__main__":
    main()
