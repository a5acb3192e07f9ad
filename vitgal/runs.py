"""Run folders: where a run's files live, how a stage begins, ends, is reused or refused.

A stage is one folder. While it is worked on it holds `started.json`; when all its files are whole,
`stage.json` is written last. Both carry what the result depends on (stage format, parameters,
fingerprints of the inputs), so that neither a finished nor an interrupted stage is ever continued
under other settings.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

STAGE_FORMAT = 1
MANIFEST = "stage.json"
SMALL_WEIGHTS = "weights/vitgal_nano.safetensors"  # in the checkout; made by small_weights.yaml
STARTED = "started.json"
SETTINGS = ("format", "stage", "parameters", "inputs")  # what a result depends on
LOCK = ".lock"  # the names of all locks begin so
ALONE = (0, 1)  # worker 0 of 1
_HELD: set[IO] = set()  # open lock files of this process, and of the one it was forked from
CHUNK = 1 << 20  # bytes read at once when hashing
TEMPORARY = ".tmp-"
# Above this size a reused file is checked by its length alone: hashing 200 GB of features would
# take longer than the stages that read them, and the feature store checks its own items.
HASH_LIMIT = 1 << 30
VERSIONED = (
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "opencv-python-headless",
    "faiss-cpu",
    "pydegensac",
    "poselib",
)


class Told(Exception):
    """A mistake that a person can put right: its message says all, so a notebook shows it alone.

    To be inherited before a built-in exception. IPython prints what `_render_traceback_` gives in
    place of the traceback; the cell fails as ever, and so does a headless run.
    """

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class StageError(Told, RuntimeError):
    """A stage cannot begin, continue or be read; the message says what differs and what to do."""


def checkout() -> Path:
    """The checkout's top folder, the one that holds `notebooks/` and `params/`."""
    top = Path(__file__).resolve().parent.parent
    if not (top / "notebooks").is_dir():
        raise StageError(
            f"{top} holds no notebooks/: vitgal's notebooks and params live in its checkout; "
            "install it there with `pip install -e .`"
        )
    return top


def resolve(path: str | os.PathLike) -> Path:
    """An absolute path as it is, a relative one below the checkout; `~` is expanded."""
    return checkout() / Path(path).expanduser()


def run_folder(run_dir: str | os.PathLike) -> Path:
    """A run's folder: absolute, else relative to $VITGAL_RUNS if that is set, else to `runs/`.

    A relative $VITGAL_RUNS counts from the checkout: a notebook's kernel starts in another folder
    than the command line that ran it.
    """
    return resolve(os.environ.get("VITGAL_RUNS") or "runs") / Path(run_dir).expanduser()


# Writing: a temporary name in the same folder, flushed to disk, then renamed


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it on success, removes it on any failure.

    A reader of `path` sees the old content or the new, never a part; a full disk leaves the old and
    raises OSError with a message that says what to do.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: on several machines that share the folder it may be the same.
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if not disk_full(error):
            raise
        raise OSError(
            error.errno or errno.ENOSPC,
            f"no space left to write {path.name}; make room and run the same command again, what "
            "is whole there is kept",
            str(path.parent),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_full(error: OSError) -> bool:
    """Whether a write failed for want of space: on the disk, in a quota, or a limit on files."""
    # NumPy gives no error number, only "4096 requested and 1024 written".
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or " requested and " in str(
        error
    )


def write_text(path: Path, text: str) -> Path:
    """Writes `text` (UTF-8) atomically and returns the path."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: Path, value: Any) -> Path:
    """Writes `value` as JSON atomically; arrays become lists, nan and infinities null."""
    return write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> Path:
    """Writes one `.npy` atomically and returns the path."""
    with atomic(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, array, allow_pickle=False)
    return Path(path)


def write_arrays(path: Path, **arrays: np.ndarray) -> Path:
    """Writes one `.npz` atomically (same arrays, same bytes) and returns the path."""
    with atomic(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **arrays)
    return Path(path)


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises StageError naming it where it is missing or torn."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StageError(
            f"{path} is not whole JSON ({error}); set overwrite: true to make it again"
        ) from None


def plain(value: Any) -> Any:
    """`value` in JSON's own types: arrays and tuples as lists, nan and infinities as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


# Fingerprints: content, never paths


def fingerprint_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """The sha256 of plain values (names, numbers, nested lists and dicts), in hex."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_images(names: Iterable[str], paths: Iterable[Path]) -> str:
    """A fingerprint of an image list: each name with its file's size, first and last 4 KiB.

    Reading a million photographs whole would take an hour; a replaced or truncated one changes its
    size or its ends. Raises FileNotFoundError naming the first missing file.
    """
    digest = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            head = handle.read(4096)
            handle.seek(max(0, size - 4096))
            digest.update(f"{name}\0{size}\0".encode() + head + handle.read(4096))
    return digest.hexdigest()


# Stages


@dataclass
class Stage:
    """One stage's folder while it is open; `finished` says that there is nothing left to do."""

    folder: Path
    name: str
    finished: bool
    settings: dict
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
    inputs: dict[str, str],
    overwrite: bool = False,
    repair: bool = False,
    share: tuple[int, int] = ALONE,
) -> Iterator[Stage]:
    """Opens a stage folder for one process and says whether its work is already done.

    Args:
        parameters: everything that affects the result, in plain values.
        inputs: what each input is called -> its fingerprint (content, never a path).
        overwrite: throw away what the folder holds and start anew.
        repair: a finished stage whose outputs have changed is opened as an interrupted one; else it
            is refused.
        share: (worker, workers): as which of how many processes that work in the folder at once
            this one comes. Each keeps to its own files; all must say the same number.
    Raises:
        StageError: the folder cannot be written, another process works in it, or it holds a
            finished or interrupted stage with other settings; the message names the difference.
        ValueError: a folder that is shared cannot be overwritten.
    """
    if overwrite and share != ALONE:
        raise ValueError(
            "overwrite would throw away what the other workers write: delete the folder first"
        )
    folder = Path(folder)
    settings = plain(
        {"format": STAGE_FORMAT, "stage": name, "parameters": parameters, "inputs": inputs}
    )
    with locked(folder, share):
        if overwrite:
            _clear(folder)
        elif share != ALONE or not _just_begun(folder):
            _refuse_other(folder, settings)
        opened = Stage(folder, name, (folder / MANIFEST).exists(), settings)
        if opened.finished:
            try:
                _check_outputs(folder)
            except StageError:
                if not repair:
                    raise
                opened.reopen()
        if not opened.finished:
            if share == ALONE:  # what looks left behind may be another worker's, half-written
                _sweep(folder)
            write_json(folder / STARTED, settings)
        yield opened


@contextlib.contextmanager
def locked(folder: Path, share: tuple[int, int] = ALONE) -> Iterator[None]:
    """Holds the folder's lock; the kernel releases it whatever happens to the process.

    share: (worker, workers). One worker has the folder for itself. Several hold the lock together;
    a worker that is there twice, or of another number of workers, is refused.
    """
    worker, workers = share
    if not 0 <= worker < workers:
        raise ValueError(f"worker is {worker}: {workers} workers have the numbers from 0 on")
    busy = f"another process is working in {folder}; wait for it, or use another run_dir"
    with contextlib.ExitStack() as held:
        _lock(folder / LOCK, held, fcntl.LOCK_EX if share == ALONE else fcntl.LOCK_SH, busy)
        if share != ALONE:
            name = f"{LOCK}-of-{workers}"
            twice = f"worker {worker} of {workers} is working in {folder} already"
            _lock(folder / f"{name}-{worker}", held, fcntl.LOCK_EX, twice)
            # Others hold this one for themselves only while they look whether anybody does.
            _lock(folder / name, held, fcntl.LOCK_SH, None)
            with contextlib.ExitStack() as looking:  # one at a time, or they would see each other
                _lock(folder / f"{LOCK}-look", looking, fcntl.LOCK_EX, None)
                for other in sorted(folder.glob(f"{LOCK}-of-*[0-9]")):
                    if other.name != name and "-" not in other.name.removeprefix(f"{LOCK}-of-"):
                        _lock(other, looking, fcntl.LOCK_EX, f"{busy} (not as one of {workers})")
        yield


def _lock(path: Path, held: contextlib.ExitStack, kind: int, busy: str | None) -> None:
    """Takes a lock until `held` closes; StageError with `busy` where it is taken, None: waits."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = held.enter_context(open(path, "w"))
    except OSError as error:
        raise StageError(
            f"cannot write to the run folder {path.parent} ({error.strerror}); give it write "
            "permission, or set run_dir or the environment variable VITGAL_RUNS to another folder"
        ) from error
    try:
        fcntl.flock(handle, kind | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError:
        raise StageError(busy) from None
    except OSError as error:
        raise StageError(
            f"{path.parent} cannot be locked ({error.strerror}): its file system must know flock "
            "(Lustre: mount it with the option flock), or set run_dir or the environment variable "
            "VITGAL_RUNS to a folder elsewhere"
        ) from error
    _HELD.add(handle)
    held.callback(_HELD.discard, handle)


def disown_locks() -> None:
    """For a forked helper process: a lock must not outlive the process that took it."""
    for handle in _HELD:
        handle.close()


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


def versions() -> dict[str, str]:
    """The installed versions of the libraries that results depend on."""
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """The checkout's commit, with `+` where tracked files are changed; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return head.stdout.strip() + ("+" if dirty.stdout else "") if head.returncode == 0 else None


# What notebooks find where their parameter is None: what the run itself made


def data_folder(run: Path, given: str | None, part: str = "") -> Path:
    """The folder that a parameter names, or for None that part of the run's own demo data."""
    return resolve(given) if given is not None else run / "data" / part


def model_file(run: Path, given: str | None) -> Path:
    """The weights that a parameter names, or for None the run's complete model.

    A run in which nothing has been trained takes the small model that the checkout brings, and a
    printed line says so. What is made with it carries that file's fingerprint, so that a model
    which is trained in the run later is not mistaken for it. Raises StageError where the training
    was begun and is not finished.
    """
    if given is not None:
        return resolve(given)
    small = resolve(SMALL_WEIGHTS)
    trained = any((run / stage).exists() for stage in ("retrieval", "autoencoder"))
    if not trained and small.is_file():
        print(f"nothing has been trained in {run.name}: the model is the small {SMALL_WEIGHTS}")
        return small
    read_stage(run / "autoencoder", "notebook 03_train_autoencoder (or set weights)")
    return run / "autoencoder" / "model.safetensors"
