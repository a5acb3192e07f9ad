"""Stage folders: begin, resume, finish or reuse a stage, never with other settings."""

import contextlib
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgal.runs import manifest
from vitgal.runs.environment import THREADS, commit, numeric_environment, versions
from vitgal.runs.errors import StageError, printable
from vitgal.runs.files import TEMPORARY, plain, read_json, refuse_links, write_json
from vitgal.runs.inputs import Input, input_fingerprints, input_stamps
from vitgal.runs.locks import ALONE, LOCK, WorkerSlot, locked
from vitgal.runs.manifest import MANIFEST, SETTINGS, STAGE_FORMAT, STARTED

STAMPS = ".stamps.json"  # of inputs that were copied or touched after the stage was finished


@dataclass
class Stage:
    """A stage's folder while it is open; its settings are what the result depends on."""

    folder: Path
    name: str
    finished: bool
    settings: dict
    stamps: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def finish(
        self, outputs: Iterable[str | Path], recorded: Mapping[str, Any] | None = None
    ) -> Path:
        """Writes the manifest of outputs (below the folder) and of facts that are not compared."""
        facts = {
            "seconds": round(time.monotonic() - self.began, 1),
            "versions": versions(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "commit": commit(),
            "thread_variables": {name: os.environ[name] for name in THREADS if name in os.environ},
            "stamps": self.stamps,
        }
        entries = {
            name: manifest.describe_output(self.folder / name) for name in sorted(map(str, outputs))
        }
        record = {"outputs": entries, "recorded": facts | dict(recorded or {})}
        write_json(self.folder / MANIFEST, self.settings | record)
        (self.folder / STARTED).unlink(missing_ok=True)
        self.finished = True
        return self.folder

    def reopen(self) -> None:
        """Turns a finished stage into an interrupted one, to make missing outputs again."""
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            os.replace(self.folder / MANIFEST, self.folder / STARTED)
        self.finished = False


@contextlib.contextmanager
def stage(
    folder: Path,
    name: str,
    *,
    parameters: dict,
    inputs: Mapping[str, str | Input],
    overwrite: bool = False,
    repair: bool = False,
    slot: WorkerSlot = ALONE,
) -> Iterator[Stage]:
    """Opens and locks a stage's folder; yields the stage, which may be finished already.

    Args:
        parameters: Everything else that the result depends on; `numeric_environment` is added.
        inputs: By name, fingerprints of the content, never paths. An `Input` is read only where
            its files have changed since the stage was finished, or where it is to be verified.
        overwrite: Deletes the folder's contents and starts anew.
        repair: Reopens a finished stage whose outputs have changed, instead of refusing it.
        slot: This process among those that work in the folder, each on its own files.

    Raises:
        StageError: The folder cannot be locked, see `locked`, or holds a stage with other
            settings; the message names the differences.
        PathError: The folder is a link, or holds one.
        FileNotFoundError: A file of an input is missing.
        ValueError: Several workers would overwrite the folder.
    """
    if overwrite and slot != ALONE:
        raise ValueError(
            "overwrite would delete what the other workers write: delete the folder first"
        )
    folder = Path(folder)
    refuse_links([folder.parent])
    # Stamps come before fingerprints: a file that changes in between must differ from its stamp.
    stamps = input_stamps(inputs)
    with locked(folder, slot):
        if overwrite:
            _clear(folder)
        trusted = {key: stamp for key, stamp in stamps.items() if not inputs[key].verify}
        fingerprints = input_fingerprints(inputs, _unchanged_inputs(folder, trusted))
        compared = (STAGE_FORMAT, name, parameters | numeric_environment(), fingerprints)
        settings = plain(dict(zip(SETTINGS, compared, strict=True)))
        # A stage that stopped before its first output has nothing that depends on its settings.
        if slot != ALONE or [path.name for path in _contents(folder)] != [STARTED]:
            _refuse_other_settings(folder, settings)
        opened = Stage(folder, name, (folder / MANIFEST).exists(), settings, stamps)
        if opened.finished:
            try:
                _check_finished(folder, stamps if slot == ALONE else None)
            except StageError:
                if not repair:
                    raise
                opened.reopen()
        if not opened.finished:
            refuse_links(folder.rglob("*"))
            if slot == ALONE:  # else a temporary file may be another worker's
                for path in sorted(folder.rglob(f"{TEMPORARY}*")):  # left by a killed process
                    _remove(path)
            write_json(folder / STARTED, settings)
        yield opened


def _unchanged_inputs(folder: Path, stamps: dict[str, str]) -> dict[str, str]:
    """Returns a finished stage's fingerprints of the inputs whose stamps are still the same."""
    try:
        record = manifest.read_record(folder / MANIFEST)
    except StageError:  # missing; `_refuse_other_settings` reports a damaged one
        return {}
    recorded, fingerprints = _recorded_stamps(folder, record), record["inputs"]
    same = (name for name, stamp in stamps.items() if recorded.get(name) == stamp)
    return {name: fingerprints[name] for name in same if name in fingerprints}


def _refuse_other_settings(folder: Path, wanted: dict) -> None:
    recorded = manifest.read_settings(folder)
    if recorded is None:
        if files := _contents(folder):
            raise StageError(
                f"{folder} holds files ({files[0].name}, ...) but neither {MANIFEST} nor "
                f"{STARTED}, so their settings are unknown; move them away or use another run_dir"
            )
        return
    if lines := manifest.differences(recorded, wanted):
        raise StageError(
            f"{folder} holds a {wanted['stage']} stage with other settings:\n  "
            + "\n  ".join(lines)
            + "\nuse another run_dir, or set overwrite: true to delete the old result"
        )


def _check_finished(folder: Path, stamps: dict[str, str] | None) -> None:
    """Raises StageError for a changed output; warns of changed libraries; records the stamps."""
    record = manifest.read_record(folder / MANIFEST)
    for output, recorded in record["outputs"].items():
        manifest.check_output(folder, output, recorded)
    now = versions()
    changed = [
        f"{name} {printable(version)} then, {now[name]} now"
        for name, version in record["recorded"].get("versions", {}).items()
        if name in now and now[name] != version
    ]
    if changed:
        warnings.warn(f"{folder.name} was made with {'; '.join(changed)}", stacklevel=4)
    if stamps is not None and stamps != _recorded_stamps(folder, record):
        write_json(folder / STAMPS, stamps)


def _recorded_stamps(folder: Path, record: dict) -> dict[str, str]:
    """Returns the stamps with which the inputs last had the manifest's fingerprints."""
    if (folder / STAMPS).exists():
        with contextlib.suppress(StageError):
            stamps = read_json(folder / STAMPS)
            return stamps if isinstance(stamps, dict) else {}
    return record["recorded"].get("stamps", {})


def _clear(folder: Path) -> None:
    """Empties a stage's folder; StageError for files that no stage wrote."""
    has_stage = (folder / MANIFEST).exists() or (folder / STARTED).exists()
    if not has_stage and _contents(folder):
        raise StageError(
            f"{folder} holds files but no stage: overwrite will not delete them; use another "
            "run_dir or move them away"
        )
    # STARTED is removed last: a killed process must leave neither a manifest without its files nor
    # files without a stage.
    if (folder / MANIFEST).exists():
        os.replace(folder / MANIFEST, folder / STARTED)
    for path in list(folder.iterdir()):
        if not path.name.startswith(LOCK) and path.name != STARTED:
            _remove(path)
    (folder / STARTED).unlink(missing_ok=True)


def _contents(folder: Path) -> list[Path]:
    """Returns a folder's contents without locks and temporary files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((LOCK, TEMPORARY)))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
