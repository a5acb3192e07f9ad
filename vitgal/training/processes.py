"""Processes of a training: signals, data workers, and agreement among ranks."""

import contextlib
import datetime
import gc
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import torch
from accelerate import Accelerator, utils
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitgal import runs
from vitgal.settings import MachineSettings
from vitgal.training.errors import TrainingError

SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2  # batches that each data worker holds ready, torch's default
GRACE_SECONDS = 30  # from a signal to the end of a data worker, so that the step can finish
LOADER_SHARE = 0.8  # of the time-out: a worker that waits for the disk is named first


def process_options(machine: MachineSettings, network: nn.Module) -> list[utils.KwargsHandler]:
    """Returns accelerate's options: the time-out, and whether parameters can be unused.

    Networks of timm have such: those of the pooling before the classifier, which our head replaces.
    """
    options: list[utils.KwargsHandler] = [utils.InitProcessGroupKwargs(timeout=timeout(machine))]
    if network.model.on_timm:
        options.append(utils.DistributedDataParallelKwargs(find_unused_parameters=True))
    return options


def timeout(machine: MachineSettings) -> datetime.timedelta:
    """Returns how long the processes of a run wait for each other."""
    return datetime.timedelta(minutes=machine.timeout_minutes)


def ending_signals() -> list[signal.Signals]:
    """Returns SIGTERM, and SIGHUP of a lost terminal unless `nohup` has the process ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


class Termination:
    """Notes the ending signals while it is entered; the run finishes its step and saves its state.

    `requested` is the name of the last one.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Termination":
        if _is_main_thread():  # Python handles signals in the main thread only
            self._previous = {
                number: signal.signal(number, self._note) for number in ending_signals()
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.requested = signal.Signals(number).name


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Keeps what this process has allocated out of the collections of the processes it forks.

    To collect a process group or a store of torch is to wait for its threads, which a fork lacks:
    the child would hang or abort.
    """
    forked = gc.get_freeze_count() > 0  # frozen by the launcher, and not to be collected here
    gc.freeze()
    try:
        yield
    finally:
        if not forked:
            gc.unfreeze()


def read_batches(
    dataset: Dataset, batches: Iterable[Sequence], machine: MachineSettings, *, pin_memory: bool
) -> Iterator[Any]:
    """Yields the batches of a dataset, read by data workers.

    The workers are killed where they are not needed to the end: when one is lost, and when the
    caller stops. batches: the keys of each batch.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=machine.data_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        timeout=60 * LOADER_SHARE * machine.timeout_minutes if machine.data_workers else 0,
    )
    others = set(multiprocessing.active_children())
    with frozen_garbage():
        iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    try:
        yield from iterator
    except BaseException:
        _kill(workers)
        raise


def check_shared_memory(machine: MachineSettings, batch_bytes: int, processes: int) -> None:
    """Raises TrainingError where /dev/shm cannot hold the batches of the data workers.

    batch_bytes: of one batch. processes: training processes of this machine.
    """
    waiting = machine.data_workers * PREFETCHED + 1 if machine.data_workers else 0
    needed, disk = waiting * batch_bytes, os.statvfs(SHARED_MEMORY)
    free, total = disk.f_bavail * disk.f_frsize, needed * processes
    if total > free:
        raise TrainingError(
            f"the data workers need {needed / 1e9:.2f} GB of shared memory a process, "
            f"{total / 1e9:.2f} GB in all, and {SHARED_MEMORY} has {free / 1e9:.2f} GB left: start "
            f"the container with --shm-size {math.ceil(total / 1e9) + 1}g, or lower data_workers"
        )


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
    # A cluster sends SIGTERM to every process of a job, a lost terminal SIGHUP. The worker lets the
    # current step finish, and still ends where it alone received the signal.
    for number in ending_signals():
        signal.signal(number, lambda *_: signal.alarm(GRACE_SECONDS))


# Agreement among ranks


def begin_agreement(accelerator: Accelerator, flags: Tensor) -> Callable[[], list[bool]]:
    """Reduces flags (F,) float32, 0 or 1; returns a function that gives those set on any rank.

    On a GPU the result is copied during the backward pass.
    """
    if accelerator.num_processes > 1:
        flags = accelerator.reduce(flags, "sum")
    if flags.device.type != "cuda":
        return lambda: [bool(flag) for flag in flags]
    answer = torch.empty(len(flags), pin_memory=True).copy_(flags, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[bool]:
        """Waits for the copy from the GPU."""
        copied.synchronize()
        return [bool(flag) for flag in answer]

    return wait


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether the flag is set on any rank; all ranks must call this."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum"))


def broadcast_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Copies rank 0's BatchNorm statistics, which are saved, to every rank."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            buffer.copy_(utils.broadcast(buffer))
