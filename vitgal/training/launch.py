"""Runs one training in this process, in forked processes, or in a launcher's processes."""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import cv2
import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from tqdm import tqdm

from vitgal import runs
from vitgal.models import weights
from vitgal.settings import MachineSettings
from vitgal.training.checkpoints import read_rows
from vitgal.training.errors import Preempted, TrainingError, WorkerLost
from vitgal.training.fit import Fit
from vitgal.training.loop import Trainer
from vitgal.training.processes import ending_signals, frozen_garbage, timeout

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")  # accelerate prefers them
# Variables that accelerate reads: accumulation, precision, compiler, device, sharding.
ACCELERATE = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "USE_TORCH_XLA")
LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torch's
LEFT_OVER = (*LAUNCH, "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "NODE_RANK", "TORCHELASTIC_")
TRIES = 3  # restarts within an hour after a killed process
PEER_SECONDS = 30  # from another process's death to this one's: the launcher reports the first
WATCH_SECONDS = 5  # between two checks of the log of forked processes


def launched() -> bool:
    """Returns whether a launcher has started this process as one of several."""
    return _count("WORLD_SIZE") > 1


def _count(name: str) -> int:
    value = os.environ.get(name) or "1"
    if not value.isdecimal():
        raise TrainingError(f"{name} in the environment is {value!r}, not a number: unset it")
    return int(value)


@contextlib.contextmanager
def own_environment() -> Iterator[dict[str, str]]:
    """Removes accelerate's variables from the environment; yields the removed ones.

    Without a launcher, variables left by an earlier launch are removed too. Raises TrainingError
    for an incomplete launch, and for a launch by MPI.
    """
    missing = [name for name in LAUNCH if name not in os.environ] if launched() else []
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but {missing[0]} is not "
            "set: unset WORLD_SIZE to train here, or start all processes by accelerate launch"
        )
    sizes = [] if launched() else [name for name in MPI_SIZES if _count(name) > 1]
    if sizes:
        raise TrainingError(
            f"{sizes[0]} is {os.environ[sizes[0]]} in the environment, as if MPI had started "
            "several processes, which cannot train together: start them by accelerate launch, or "
            f"unset {sizes[0]} to train here"
        )
    foreign = MPI + ACCELERATE + (() if launched() else LEFT_OVER)
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(foreign)}
    try:
        yield hidden
    finally:
        os.environ.update(hidden)


def rank() -> int:
    """Returns this process's number among the launched ones; 0 where it is alone."""
    return PartialState().process_index if launched() else 0


def join(machine: MachineSettings) -> None:
    """Joins the launched processes; raises TrainingError where num_processes is another number."""
    world = int(os.environ["WORLD_SIZE"])
    if world != machine.num_processes:
        raise TrainingError(
            f"{world} processes were launched, but num_processes is {machine.num_processes}; "
            "batch_size is per process, so the two must be equal"
        )
    PartialState(cpu=torch.cuda.device_count() == 0, timeout=timeout(machine))


def run_fit(fit: Fit) -> None:
    """Trains here, or in `num_processes` forked processes that accelerate joins.

    Raises Preempted after SIGTERM or SIGHUP, and where a process or data worker was killed, up to
    TRIES times within an hour; TrainingError for anything else that stops the training.
    """
    try:
        _run_fit(fit)
    except WorkerLost as error:
        file = fit.folder / "state" / "killed.json"
        now, times = time.time(), runs.read_json(file) if file.exists() else []
        times = [past for past in times if 0 <= now - past < 3600]  # the clock may have jumped
        runs.write_json(file, [*times, now])
        if len(times) < TRIES:
            raise Preempted(f"{error}; the same command goes on from the last state") from error
        raise TrainingError(
            f"{error}; this was time {len(times) + 1} within an hour: find the cause first, most "
            "likely the memory (data_workers, batch_size)"
        ) from error


def _run_fit(fit: Fit) -> None:
    if launched():
        train(fit)
        AcceleratorState._reset_state()
        return
    if PartialState._shared_state:
        raise TrainingError(
            "accelerate was already started in this process; restart the kernel and run the "
            "training cell once"
        )
    if fit.machine.num_processes == 1:
        try:
            train(fit)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return
    _check_fork(fit.machine)
    environment = patch_environment(
        omp_num_threads=os.environ.get("OMP_NUM_THREADS", "1"),
        # Otherwise a run under nohup ends with its terminal.
        torchelastic_signals_to_handle=",".join(
            ["SIGINT", "SIGQUIT", *(ending.name for ending in ending_signals())]
        ),
    )
    with _watched_log(fit), _errors_of_children(), environment, frozen_garbage():
        notebook_launcher(
            _train_forked,
            (fit,),
            num_processes=fit.machine.num_processes,
            use_port=str(_free_port()),  # two runs on one machine need two ports
        )


def train(fit: Fit, *, forked: bool = False) -> None:
    """Trains as one process of the fit; rank 0 writes model.safetensors and failures.json."""
    # Threads do not survive a fork; OpenMP would wait for them forever.
    threads = 1 if forked else fit.machine.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    data = fit.read_data()
    trainer = Trainer(fit.build(data.classes), fit, data)
    torch.set_num_threads(threads)  # accelerate sets another number
    trainer.load_state()
    try:
        trainer.run(fit.watch, fit.progress)
    except RuntimeError as error:
        if trainer.termination.requested and _is_lost_peer(error):
            raise Preempted(
                "ended by a signal after another process had died: nothing more was saved; "
                "start the same again to continue from the last state"
            ) from error
        late = re.search("(?i)timed out|timeout", str(error)) is not None
        if late and not isinstance(error, TrainingError):
            raise TrainingError(
                f"another process was silent for {fit.machine.timeout_minutes:g} minutes "
                "(timeout_minutes): it hangs or cannot be reached; end it, then start the "
                f"same again to continue from the last state ({str(error).splitlines()[0][:200]})"
            ) from error
        raise
    if trainer.accelerator.is_main_process:
        weights.save_model(trainer.result.model, fit.folder / "model.safetensors")
        progress = trainer.progress
        runs.write_json(fit.folder / "failures.json", progress.unreadable)
        changes = {"changes": progress.changes, "skipped_batches": progress.skipped}
        runs.write_json(fit.folder / "changes.json", changes)
    if not launched() or forked:
        trainer.accelerator.end_training()


def _check_fork(machine: MachineSettings) -> None:
    # By default torch queries the CUDA driver for GPUs, after which no fork can use one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_initialized():
        raise TrainingError(
            "the GPU was already used in this process, and the processes of a launch are forked "
            "from it; restart the kernel and run the training cell before anything on the GPU"
        )
    if machine.threads not in (None, 1):
        raise TrainingError(
            f"threads is {machine.threads} with num_processes {machine.num_processes}, but forked "
            "processes compute on one thread each; set threads: null, or start the processes by "
            "accelerate launch -m vitgal.training"
        )


def _train_forked(fit: Fit) -> None:
    cv2.setNumThreads(0)
    # The notebook's may be held by one of its threads, and would be lost with a killed process.
    tqdm.set_lock(threading.RLock())
    try:
        train(replace(fit, watch=None), forked=True)
    except RuntimeError as error:
        if _is_lost_peer(error):
            _await_launcher()
        raise


def _is_lost_peer(error: RuntimeError) -> bool:
    messages = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return any(message in str(error) for message in messages)


def _await_launcher() -> None:
    """Waits until the launcher ends this process, after it has reported the lost one."""
    threading.Event().wait(PEER_SECONDS)


@contextlib.contextmanager
def _errors_of_children() -> Iterator[None]:
    """Raises the first failed process's own error in place of the launcher's report."""
    try:
        yield
    except SignalException as error:
        raise Preempted(
            f"ended by a signal ({error}); the processes have saved their state"
        ) from error
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        message = failure.message
        message = message["message"] if isinstance(message, dict) else message
        kinds = {"Preempted": Preempted, "WorkerLost": WorkerLost}
        kind = next((kinds[name] for name in kinds if name in message), TrainingError)
        if failure.exitcode < 0:
            message = f"it was killed ({failure.signal_name()}), perhaps for memory"
            kind = WorkerLost
        raise kind(f"process {number} of the launch failed: {message}") from error


@contextlib.contextmanager
def _watched_log(fit: Fit) -> Iterator[None]:
    """Passes the log that forked processes write to `fit.watch`."""
    if fit.watch is None:
        yield
        return
    log, done = fit.folder / "log.jsonl", threading.Event()

    def show(seen: int | None) -> int | None:
        """Passes the log if it has changed since `seen`, a time in ns; returns its time."""
        changed = log.stat().st_mtime_ns if log.exists() else None
        if changed != seen:
            fit.watch(read_rows(log))
        return changed

    def follow(seen: int | None) -> None:
        """Shows the log whenever it has changed, until training is over."""
        while not done.wait(WATCH_SECONDS):
            seen = show(seen)

    # A resumed run's log is not shown by the thread: a fork while it draws would leave locks
    # locked forever.
    begun = show(None)
    thread = threading.Thread(target=follow, args=(begun,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    show(None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
