"""Records of executed notebooks: an unchanged one is not executed again.

The record lies beside the executed copy, as .NN_name.json. It is written when the notebook is
finished and removed when it begins again. What it compares is read anew each time: contents, and
of the files that stages read and write their paths, sizes and times.
"""

import os
import platform
import re
import site
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitgal import runs
from vitgal.runs.environment import NUMERIC, THREADS
from vitgal.settings import Settings
from vitgal.settings.sections import is_path

MOST = 100_000  # files that are looked at; a notebook that may read more is executed
# What each notebook writes, by its number, as the beginnings of paths in the run folder. It may
# read what those before it write, and files that are not in this table.
WRITES = {
    "01": r"data/(?!benchmark/(gnd_|jpg/)val_retrieval)|split/",
    "02": "retrieval/",
    "03": "autoencoder/",
    "04": "refine_set/|DATASET/global[^/]*/",
    "05": "codes/|DATASET/local/",
    "06": r"DATASET/rerank/|val_retrieval/|data/benchmark/(gnd_|jpg/)val_retrieval",
    "07": "DATASET/matches/",
}
# Products that no notebook reads, and a cache of the instrument.
ASIDE = re.compile(r"(notebooks|own|report)(/|$)|[^/]+/(map|figures)(/|$)")
VARIABLES = re.compile(
    "(PYTHON|OMP|GOMP|KMP|MKL|BLIS|TORCH|PYTORCH|CUDA|NCCL|HF|TIMM|OPENCV|MPL|ACCELERATE|"
    "RAY|LC|LD)_|PYTHON|LANG|TZ$|HOME$"
)


def record_path(copy: Path) -> Path:
    """Returns the file of the record of an executed copy."""
    return copy.with_name(f".{copy.stem}.json")


def is_unchanged(copy: Path, facts: dict[str, str] | None) -> bool:
    """Returns whether a copy is whole and was executed with just these `fingerprints`."""
    if facts is None:
        return False
    try:
        return runs.read_json(record_path(copy)) == facts | {"copy": runs.fingerprint_file(copy)}
    except (runs.StageError, OSError):
        return False


def write_record(copy: Path, before: dict[str, str] | None, after: dict[str, str] | None) -> None:
    """Records a finished execution, unless what it depends on changed meanwhile.

    before, after: its `fingerprints`.
    """
    if before and after and after | {"written": before["written"]} == before:
        runs.write_json(record_path(copy), after | {"copy": runs.fingerprint_file(copy)})


def fingerprints(
    notebook: Path, values: dict[str, Any], settings: Settings, run: Path
) -> dict[str, str] | None:
    """Returns the fingerprints of all that a notebook's execution depends on, in hex, by name.

    None where that cannot be told, or where the notebook is to be executed in any case: it
    overwrites, verifies, saves figures, compares with another run, is one of several workers,
    loads a network by name, may read a missing file or more than MOST files, or is not in WRITES.

    Args:
        values: The parameters that are injected.
        settings: All that the notebook reads.
        run: The run folder.
    """
    flags = ("overwrite", "verify", "save_figures", "compared_run")
    number = notebook.name[:2]
    several = settings.machine.worker_count > 1
    if several or number not in WRITES or any(settings.values.get(name) for name in flags):
        return None
    try:
        read, written = _run_files(number, settings.values.get("dataset") or "", run)
        outside = [*_project_files(notebook), *_named_files(settings.values)]
        return {
            "notebook": runs.fingerprint_file(notebook),
            "parameters": runs.fingerprint(values),
            "software": _software(),
            "environment": _environment(),
            "read": _stamp([*outside, *read, *_recorded_files(read)]),
            "written": _stamp([*written, *_recorded_files(written)]),
        }
    except (OSError, runs.StageError):  # a file is missing or unreadable
        return None


def _project_files(notebook: Path) -> Iterator[str]:
    """Yields params, weights and sources, and the modules that a notebook can import."""
    folders = {runs.checkout(), runs.bundled_folder()}
    for part in [folder / part for folder in folders for part in runs.PARTS if part != "notebooks"]:
        yield from _files(part)
    yield from (path for path in _files(notebook.parent) if not path.endswith(".ipynb"))
    yield from map(str, runs.checkout().glob("*.py"))


def _recorded_files(files: Iterable[str]) -> Iterator[str]:
    """Yields the files that a run's manifests name; later stages read them without a setting."""
    for path in map(Path, files):
        if path.name == runs.MANIFEST:
            yield from _named_files(runs.read_record(path)["recorded"])


def _named_files(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields the files that settings name, and those in named folders."""
    for name, value in values.items():
        if not (is_path(name) and isinstance(value, str)) or value.startswith(runs.UNTRAINED):
            continue
        path = runs.resolve(runs.split_source(value)[1] or value)
        if path.is_dir():
            yield from _files(path)
        else:
            yield str(path)  # missing, as is "timm:NAME": `_stamp` raises


def _run_files(number: str, dataset: str, run: Path) -> tuple[list[str], list[str]]:
    """Returns the files of a run folder that a notebook may read, and those that it writes."""
    mine = {n: text.replace("DATASET", re.escape(dataset)) for n, text in WRITES.items()}
    earlier = [mine[n] for n in WRITES if n < number]
    later = [text.replace("DATASET", "[^/]+") for n, text in WRITES.items() if n > number]
    read, written = [], []
    for path in _files(run, ASIDE):
        name = os.path.relpath(path, run)
        if re.match(mine[number], name):
            written.append(path)
        elif _begins(name, earlier) or not _begins(name, later):
            read.append(path)
    return read, written


def _begins(name: str, patterns: list[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _files(folder: Path, aside: re.Pattern | None = None) -> Iterator[str]:
    """Yields all files below a folder but caches and what `aside` matches; follows links.

    Raises OSError for an unreadable folder and for more than MOST files.
    """

    def refuse(error: OSError) -> None:
        raise error

    count = 0
    walk = os.walk(folder, onerror=refuse, followlinks=True) if os.path.isdir(folder) else ()
    for top, folders, names in walk:
        above = "" if top == str(folder) else f"{os.path.relpath(top, folder)}/"
        kept = [name for name in folders if not name.startswith((".", "__pycache__"))]
        folders[:] = [name for name in kept if aside is None or not aside.match(above + name)]
        count += len(names)
        if count > MOST:
            raise OSError(f"{folder} holds more than {MOST:,} files")
        yield from (os.path.join(top, name) for name in names)


def _stamp(paths: Iterable[str]) -> str:
    """Returns a hash of files' paths, sizes and times; FileNotFoundError where one is missing."""
    listed = sorted(paths)
    return runs.images_stamp(listed, listed)


def _software() -> str:
    """Returns a hash of this package's files, of Python and of what is installed."""
    top = Path(__file__).resolve().parents[1]
    sources = {os.path.relpath(path, top): runs.fingerprint_file(path) for path in _files(top)}
    folders = filter(os.path.isdir, [*site.getsitepackages(), site.getusersitepackages()])
    installed = {name for folder in folders for name in os.listdir(folder) if "-info" in name}
    python = [sys.version, sys.executable, platform.machine()]
    return runs.fingerprint([sources, sorted(installed), python])


def _environment() -> str:
    """Returns a hash of the environment variables that may change what a notebook does."""
    names = [n for n in os.environ if n in (*NUMERIC, *THREADS) or VARIABLES.match(n)]
    return runs.fingerprint({name: os.environ[name] for name in names})
