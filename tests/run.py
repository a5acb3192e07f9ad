"""What `make check` and `make test` call: `python -m tests.run check|all`, from any folder.

check   ruff, the notebooks' metadata, the unit tests: about two minutes
all     the same, with the slow tests and the notebooks, strictly under nbval, in a fresh run
        folder; some slow tests reuse that finished run (environment variable VITGAL_FINISHED_RUN)

Several tests run at once, one a core up to four; tests/conftest.py groups them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(str(path.relative_to(TOP)) for path in TOP.glob("notebooks/0[1-8]_*.ipynb"))
# What a notebook may carry beside sources and outputs; everything else is noise in a diff.
STRIP = [
    "--keep-output",
    "--keep-count",
    "--keep-id",
    "--extra-keys",
    "metadata.papermill cell.metadata.papermill cell.metadata.execution",
]


def main(arguments: list[str]) -> int:
    """Runs the steps, all of them whatever fails; returns 0, or 1 where one failed."""
    if arguments not in (["check"], ["all"]):
        print(__doc__)
        return 2
    failed = [name for name, command in style().items() if not call(name, command)]
    everything = arguments == ["all"]
    passed = all_tests() if everything else call("pytest", [*PYTEST, "-m", "not slow", "tests"])
    if failed:
        print(f"failed before pytest: {', '.join(failed)}", flush=True)
    return int(bool(failed) or not passed)


def style() -> dict[str, list[str]]:
    """The steps before pytest, by name."""
    steps = {
        "ruff check": [sys.executable, "-m", "ruff", "check", "."],
        "ruff format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    }
    if NOTEBOOKS:
        steps["nbstripout"] = [sys.executable, "-m", "nbstripout", "--verify", *STRIP, *NOTEBOOKS]
    return steps


def all_tests() -> bool:
    """All tests as one pytest session in a fresh run folder, kept where something failed."""
    folder = Path(tempfile.mkdtemp(prefix="vitgal-test-"))
    fresh = {"VITGAL_RUNS": str(folder), "VITGAL_FINISHED_RUN": str(folder / "demo")}
    passed = call("pytest", [*PYTEST, "--nbval", "tests", *NOTEBOOKS], fresh)
    if passed:
        shutil.rmtree(folder)
    else:
        print(f"the run folder of these tests is kept: {folder}", flush=True)
    return passed


WORKERS = 4  # at most
OPTIONS = f"-rfEs --durations=20 -n logical --maxprocesses {WORKERS}"
PYTEST = [sys.executable, "-m", "pytest", *OPTIONS.split()]
# Threads that wait asleep, or two busy processes slow each other tenfold; and no more of them than
# there are cores for all workers.
THREADS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // WORKERS)),
}


def call(name: str, command: list[str], environment: dict[str, str] | None = None) -> bool:
    """Runs one step in the checkout's top folder; says so, and whether it passed."""
    print(f"--- {name}", flush=True)
    options = THREADS | os.environ | (environment or {})
    # NOTE: some machines set it for every program; each worker and each program that a test starts
    # would then compile all sources again.
    options.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, cwd=TOP, env=options).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
