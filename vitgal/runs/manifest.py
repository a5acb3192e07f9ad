"""Run folders: where a run's files live, how a stage begins, ends, is reused or refused.

A stage is one folder. While it is worked on it holds `started.json`; when all its files are whole,
`stage.json` is written last. Both carry what the result depends on (stage format, parameters,
fingerprints of the inputs), so that neither a finished nor an interrupted stage is ever continued
under other settings.
"""

import contextlib
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitgal.runs.environment import commit, versions
from vitgal.runs.errors import StageError
from vitgal.runs.files import TEMPORARY, plain, read_json, write_json
from vitgal.runs.fingerprints import fingerprint, fingerprint_file
from vitgal.runs.inputs import Input, input_fingerprints, input_stamps
from vitgal.runs.locks import ALONE, LOCK, WorkerSlot, locked

STAGE_FORMAT = 1
MANIFEST = "stage.json"
STARTED = "started.json"
SETTINGS = ("format", "stage", "parameters", "inputs")  # what a result depends on
# Above this size a reused file is checked by its length alone: hashing 200 GB of features would
# take longer than the stages that read them, and the feature store checks its own items.
HASH_LIMIT = 1 << 30


@dataclass
class Stage:
    """One stage's folder while it is open; `finished` says that there is nothing left to do."""

    folder: Path
    name: str
    finished: bool
    settings: dict
    stamps: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def finish(self, outputs: Iterable[str | Path], **recorded: Any) -> Path:
        """Writes `stage.json` last: from here on the stage is whole.

        `outputs` are files relative to the folder; each is hashed. `recorded` (counts, device,
        workers, ...) is kept beside and never compared. Returns the folder.
        """
        sums = {}
        for output in sorted(str(name) for name in outputs):
            path = self.folder / output
            size = path.stat().st_size
            sums[output] = {"bytes": size}
            if size <= HASH_LIMIT:
                sums[output]["sha256"] = fingerprint_file(path)
        manifest = self.settings | {
            "outputs": sums,
            "recorded": {
                "seconds": round(time.monotonic() - self.began, 1),
                "versions": versions(),
                "python": platform.python_version(),
                "machine": platform.machine(),
                "commit": commit(),
                "stamps": self.stamps,
                **recorded,
            },
        }
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / STARTED).unlink(missing_ok=True)
        self.finished = True
        return self.folder

    def reopen(self) -> None:
        """Makes a finished stage an interrupted one, so that what is missing is made again."""
        with contextlib.suppress(FileNotFoundError):  # another worker was first
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
    """Opens a stage folder for one process and says whether its work is already done.

    Args:
        parameters: everything that affects the result, in plain values.
        inputs: By name, fingerprints of the content, never paths. An `Input` is read only where
            its files have changed since the stage was finished.
        overwrite: throw away what the folder holds and start anew.
        repair: a finished stage whose outputs have changed is opened as an interrupted one; else it
            is refused.
        slot: this process among those that work in the folder at once. Each writes only its own
            files, and all must have the same `slot.count`.
    Raises:
        StageError: the folder cannot be written, another process works in it, or it holds a
            finished or interrupted stage with other settings; the message names the difference.
        ValueError: a folder that is shared cannot be overwritten.
    """
    if overwrite and slot != ALONE:
        raise ValueError(
            "overwrite would throw away what the other workers write: delete the folder first"
        )
    folder = Path(folder)
    # Stamps come before fingerprints: a file that changes in between must differ from its stamp.
    stamps = input_stamps(inputs)
    with locked(folder, slot):
        if overwrite:
            _clear(folder)
        inputs = input_fingerprints(inputs, _unchanged_inputs(folder, stamps))
        settings = plain(
            {"format": STAGE_FORMAT, "stage": name, "parameters": parameters, "inputs": inputs}
        )
        if overwrite:
            pass
        elif slot != ALONE or not _just_begun(folder):
            _refuse_other(folder, settings)
        opened = Stage(folder, name, (folder / MANIFEST).exists(), settings, stamps)
        if opened.finished:
            try:
                _check_outputs(folder)
            except StageError:
                if not repair:
                    raise
                opened.reopen()
        if not opened.finished:
            if slot == ALONE:  # what looks left behind may be another worker's, half-written
                _sweep(folder)
            write_json(folder / STARTED, settings)
        yield opened


def read_stage(folder: Path, made_by: str) -> dict:
    """A finished stage's manifest; StageError names the notebook to run where there is none."""
    if not (Path(folder) / MANIFEST).exists():
        state = "was interrupted" if (Path(folder) / STARTED).exists() else "has not been run"
        raise StageError(f"the stage in {folder} {state}: run {made_by} first")
    return read_json(Path(folder) / MANIFEST)


def output_fingerprint(folder: Path, output: str, made_by: str) -> str:
    """The sha256 of one output of a finished stage, as its manifest records it.

    An output above HASH_LIMIT is known by what it was made from: its length and the stage's own
    settings, which carry the fingerprints of the inputs.
    """
    manifest = read_stage(folder, made_by)
    if output not in manifest["outputs"]:
        raise StageError(f"the stage in {folder} has no {output}: run {made_by} again")
    recorded = manifest["outputs"][output]
    if "sha256" in recorded:
        return recorded["sha256"]
    return fingerprint([output, recorded["bytes"], *(manifest[key] for key in SETTINGS)])


def differences(found: dict, wanted: dict) -> list[str]:
    """What differs between two stages' settings, a line each, leaf by leaf."""
    lines = []
    for key in sorted(set(found) | set(wanted)):
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            lines += [f"{key}.{line}" for line in differences(was, now)]
        elif not _same(was, now):
            lines.append(f"{key}: {_shown(was)} there, {_shown(now)} now")
    return lines


def _same(was: Any, now: Any) -> bool:
    """Whether two plain values are equal, where 1 and 1.0 are the same and 1 and True are not."""
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_same, was, now))
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() == now.keys() and all(_same(was[key], now[key]) for key in was)
    return was == now and isinstance(was, bool) == isinstance(now, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _settings_on_disk(folder: Path) -> dict | None:
    for name in (MANIFEST, STARTED, MANIFEST):  # another worker may turn one into the other
        try:
            found = read_json(folder / name)
        except StageError:
            if (folder / name).exists():
                raise
        else:
            return {key: found.get(key) for key in SETTINGS}
    return None


def _unchanged_inputs(folder: Path, stamps: dict[str, str]) -> dict[str, str]:
    """Returns a finished stage's fingerprints of the inputs whose stamps are still the same."""
    try:
        manifest = read_json(folder / MANIFEST)
    except StageError:  # missing; `_refuse_other` reports a torn one
        return {}
    recorded = manifest["recorded"].get("stamps", {})
    return {
        name: manifest["inputs"][name]
        for name, stamp in stamps.items()
        if recorded.get(name) == stamp
    }


def _just_begun(folder: Path) -> bool:
    """Whether a stage began here and stopped before it made anything: with wrong weights, say."""
    return [path.name for path in _foreign(folder)] == [STARTED]


def _refuse_other(folder: Path, wanted: dict) -> None:
    """Raises StageError unless the folder is empty or holds a stage with the same settings."""
    found = _settings_on_disk(folder)
    if found is None:
        if files := _foreign(folder):
            raise StageError(
                f"{folder} holds files ({files[0].name}, ...) but neither {MANIFEST} nor "
                f"{STARTED}, so nobody knows with which settings they were made; move them away "
                "or use another run_dir"
            )
        return
    lines = differences(found, wanted)
    if lines:
        raise StageError(
            f"{folder} holds a {wanted['stage']} stage with other settings:\n  "
            + "\n  ".join(lines)
            + "\nuse another run_dir, or set overwrite: true to throw the old result away"
        )


def _check_outputs(folder: Path) -> None:
    manifest = read_json(folder / MANIFEST)
    for output, recorded in manifest["outputs"].items():
        path = folder / output
        whole = path.is_file() and path.stat().st_size == recorded["bytes"]
        if whole and "sha256" in recorded:
            whole = fingerprint_file(path) == recorded["sha256"]
        if not whole:
            raise StageError(
                f"{path} is missing or not as the stage left it; set overwrite: true to make the "
                "stage again"
            )
    now = versions()
    changed = [
        f"{name} {version} then, {now[name]} now"
        for name, version in manifest["recorded"]["versions"].items()
        if name in now and now[name] != version
    ]
    if changed:
        warnings.warn(f"{folder.name} was made with {'; '.join(changed)}", stacklevel=4)


def _clear(folder: Path) -> None:
    """Empties a stage folder; a folder with files that no stage wrote is left alone."""
    ours = (folder / MANIFEST).exists() or (folder / STARTED).exists()
    if not ours and _foreign(folder):
        raise StageError(
            f"{folder} holds files but no stage: overwrite will not delete them; use another "
            "run_dir or move them away"
        )
    # Unfinished first: a kill half-way must leave neither a manifest above missing files nor files
    # that no stage owns.
    if (folder / MANIFEST).exists():
        os.replace(folder / MANIFEST, folder / STARTED)
    contents = [
        path for path in folder.iterdir() if not path.name.startswith(LOCK) and path.name != STARTED
    ]
    for path in contents:
        _remove(path)
    (folder / STARTED).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Removes temporary files and folders that a killed process left behind."""
    for path in sorted(folder.rglob(f"{TEMPORARY}*")):
        if path.exists() or path.is_symlink():  # not gone with the folder that held it
            _remove(path)


def _foreign(folder: Path) -> list[Path]:
    """What a folder holds besides the lock and what a killed process left half-written."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((LOCK, TEMPORARY)))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
