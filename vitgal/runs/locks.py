"""Locks on stage folders; the kernel releases them after a kill."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vitgal.runs.errors import StageError

LOCK = ".lock"  # the names of all locks begin so
ALONE = (0, 1)  # worker 0 of 1
_HELD: set[IO] = set()  # open lock files of this process, and of the one it was forked from


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
