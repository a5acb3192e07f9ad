"""Processes of a training: signals, data workers, and agreement among ranks."""

import datetime
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitgal import runs
from vitgal.settings import MachineSettings

GRACE_SECONDS = 30  # from SIGTERM to the end of a data worker, so that the step can finish


def timeout(machine: MachineSettings) -> datetime.timedelta:
    """Returns how long the processes of a run wait for each other."""
    return datetime.timedelta(minutes=machine.timeout_minutes)


class Termination:
    """Notes SIGTERM while it is entered; the run finishes its step and saves its state."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> "Termination":
        if _is_main_thread():  # Python gives signals to the main thread alone
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: object) -> None:
        self.requested = True


def read_batches(
    dataset: Dataset, batches: Iterable[Sequence], machine: MachineSettings, *, pin_memory: bool
) -> Iterator[Any]:
    """Yields the batches of a dataset, read by data workers; if one is lost, all are killed.

    batches: the keys of each batch.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=machine.data_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        timeout=60 * machine.timeout_minutes if machine.data_workers else 0,
    )
    others = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    try:
        yield from iterator
    except RuntimeError as error:
        if is_worker_error(error):
            _kill(workers)
        raise


def is_worker_error(error: Exception) -> bool:
    """Returns whether torch reports that a data worker has died or is silent."""
    return isinstance(error, RuntimeError) and "DataLoader" in str(error)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _kill(workers: Iterable[multiprocessing.Process]) -> None:
    """Kills data workers: one that waits for a disk does not react to SIGTERM."""
    # torch's handler of SIGCHLD would raise each death here, in place of the current error.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if _is_main_thread() else None
    try:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=GRACE_SECONDS)
    finally:
        if _is_main_thread():
            signal.signal(signal.SIGCHLD, handler)


def _start_worker(_number: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    # Otherwise a killed run could not be started again before its workers have ended.
    runs.disown_locks()
    # A cluster sends SIGTERM to every process of a job. The worker lets the current step finish,
    # and still ends where it alone received the signal.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


# Agreement among ranks


def begin_agreement(accelerator: Accelerator, flags: Tensor) -> Callable[[], list[bool]]:
    """Reduces flags (F,) float32, 0 or 1; the returned function tells which any rank has set.

    On a GPU the answer is copied during the backward pass.
    """
    if accelerator.num_processes > 1:
        flags = accelerator.reduce(flags, "sum")
    if flags.device.type != "cuda":
        return lambda: [bool(flag) for flag in flags]
    answer = torch.empty(len(flags), pin_memory=True).copy_(flags, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[bool]:
        copied.synchronize()
        return [bool(flag) for flag in answer]

    return wait


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether the flag is set on any rank; all ranks must call this."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum"))


def share_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Copies rank 0's BatchNorm statistics, which are saved, to every rank."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            buffer.copy_(broadcast(buffer))
