"""Locks on folders, which the kernel releases when a process ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vitgal.runs.errors import StageError
from vitgal.runs.files import refuse_links

LOCK = ".lock"  # the names of all lock files begin with this
_OPEN: set[IO] = set()  # open lock files of this process, inherited by its forks


@dataclass(frozen=True)
class WorkerSlot:
    """The number of one worker, from 0, among the `count` workers that divide a stage's work."""

    number: int
    count: int

    def indices(self, total: int) -> range:
        """Returns the indices of this worker's items, every `count`-th of `total`."""
        return range(self.number, total, self.count)


ALONE = WorkerSlot(0, 1)


@contextlib.contextmanager
def locked(folder: Path, slot: WorkerSlot = ALONE) -> Iterator[None]:
    """Holds a folder's lock.

    The folder is created where it is missing. A single worker locks it exclusively; several share
    the lock, each under its own number.

    Raises:
        StageError: Another process holds the lock, the same worker runs already, a worker of a
            different `slot.count` runs, or the folder cannot be locked.
        PathError: The folder or something in it is a link, through which files elsewhere could be
            overwritten.
    """
    refuse_links([folder])
    busy = f"another process is working in {folder}; wait for it, or use another folder (run_dir)"
    with contextlib.ExitStack() as locks:
        _lock(folder / LOCK, locks, fcntl.LOCK_EX if slot == ALONE else fcntl.LOCK_SH, busy)
        if slot != ALONE:
            name = f"{LOCK}-of-{slot.count}"
            duplicate = f"worker {slot.number} of {slot.count} is working in {folder} already"
            _lock(folder / f"{name}-{slot.number}", locks, fcntl.LOCK_EX, duplicate)
            _lock(folder / name, locks, fcntl.LOCK_SH, None)
            _refuse_other_counts(folder, name, f"{busy} (not as one of {slot.count})")
        refuse_links(folder.iterdir())
        yield


@contextlib.contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the block; creates the folder, and raises as `locked`."""
    refuse_links([folder])
    with contextlib.ExitStack() as locks:
        _lock(folder / f"{LOCK}-wait", locks, fcntl.LOCK_EX, None)
        yield


def _refuse_other_counts(folder: Path, name: str, busy: str) -> None:
    """Raises StageError where a worker of another `slot.count` works in the folder."""
    with contextlib.ExitStack() as probing:
        # One worker probes at a time; otherwise workers would detect each other's probes.
        _lock(folder / f"{LOCK}-look", probing, fcntl.LOCK_EX, None)
        for other in sorted(folder.glob(f"{LOCK}-of-*[0-9]")):
            if other.name != name and "-" not in other.name.removeprefix(f"{LOCK}-of-"):
                _lock(other, probing, fcntl.LOCK_EX, busy)


def _lock(path: Path, locks: contextlib.ExitStack, kind: int, busy: str | None) -> None:
    """Locks a file until `locks` closes; waits for it where `busy` is None, the error's text."""
    refuse_links([path])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without truncation, and without waiting for the reader of a named pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = locks.enter_context(open(os.open(path, flags, 0o666), "rb"))
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
            f"{path.parent} cannot be locked ({error.strerror}): its file system must support "
            "flock (Lustre: mount it with the option flock), or set run_dir or the environment "
            "variable VITGAL_RUNS to a folder elsewhere"
        ) from error
    _OPEN.add(handle)
    locks.callback(_OPEN.discard, handle)


def disown_locks() -> None:
    """Closes inherited lock files in a forked process; its parent keeps the locks."""
    for handle in _OPEN:
        handle.close()
