"""One fit in this process, in forked ones, or in those that a launcher started."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import pandas as pd
import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vitgal import runs
from vitgal.models import weights
from vitgal.training.loop import Preempted, Trainer, timeout
from vitgal.training.recipe import Recipe, TrainingError
from vitgal.training.samples import read_data

PEER_SECONDS = 30  # that a process which lost another one waits, for that one to be reported
WATCH_SECONDS = 5  # between two looks at the log that forked processes write


def _launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _rank() -> int:
    return PartialState().process_index if _launched() else 0


def _join(recipe: Recipe) -> None:
    """Joins the launched processes; TrainingError where they are not as many as the recipe says."""
    world = int(os.environ["WORLD_SIZE"])
    if world != recipe.num_processes:
        raise TrainingError(
            f"{world} processes were launched, the parameters say num_processes: "
            f"{recipe.num_processes}; batch_size counts for each of them, so make the two agree"
        )
    PartialState(cpu=torch.cuda.device_count() == 0, timeout=timeout(recipe))


def _launch(
    work: Callable, arguments: tuple, watch: Callable[[pd.DataFrame], None] | None, show: bool
) -> None:
    """Runs the fit here, or in `num_processes` forked processes that accelerate joins."""
    recipe, folder = arguments[1:3]
    if _launched():
        work(*arguments, watch, show)
        AcceleratorState._reset_state()
        return
    if PartialState._shared_state:
        raise TrainingError(
            "accelerate was already started in this process; restart the kernel and run the "
            "training cell once"
        )
    if recipe.num_processes == 1:
        try:
            work(*arguments, watch, show)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return
    _refuse_fork(recipe)
    threads = patch_environment(omp_num_threads=os.environ.get("OMP_NUM_THREADS", "1"))
    with _watching(folder, watch), _child_errors(), threads:
        notebook_launcher(
            _forked,
            (work, arguments, show),
            num_processes=recipe.num_processes,
            use_port=str(_free_port()),  # two runs on one machine must not meet
        )


def _refuse_fork(recipe: Recipe) -> None:
    """Raises TrainingError where forked processes could not compute."""
    # torch otherwise asks the CUDA driver whether there is a GPU, after which no fork can use one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_initialized():
        raise TrainingError(
            "the GPU was already used in this process, and the processes of a launch are forked "
            "from it; restart the kernel and run the training cell before anything on the GPU"
        )
    if recipe.threads not in (None, 1):
        raise TrainingError(
            f"threads: {recipe.threads} with num_processes: {recipe.num_processes}: processes that "
            "are forked compute on one thread each; set threads: null, or start the processes by "
            "accelerate launch -m vitgal.training"
        )


def _forked(work: Callable, arguments: tuple, show: bool) -> None:
    """One forked process's fit."""
    # Threads do not survive a fork, and OpenMP would wait for its own for ever.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        work(*arguments, None, show, forked=True)
    except RuntimeError as error:
        if _lost_peer(error):
            _await_launcher()
        raise


def _lost_peer(error: RuntimeError) -> bool:
    """Whether another process of the launch has gone: gloo's words for it, or NCCL's."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return any(words in str(error) for words in gone)


def _await_launcher() -> None:
    """Lets the launcher see the process that died, with the cause, before those that lost it.

    The launcher reports the first ended process that it finds and ends the others by SIGTERM.
    """
    threading.Event().wait(PEER_SECONDS)


@contextlib.contextmanager
def _child_errors() -> Iterator[None]:
    """The first failed process's own error, in place of the launcher's report."""
    try:
        yield
    except SignalException as error:
        raise Preempted(f"asked to end ({error}); the processes have saved their state") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        said = failure.message
        said = said["message"] if isinstance(said, dict) else said
        if failure.exitcode < 0:
            said = f"it was killed ({failure.signal_name()}), perhaps for memory"
        kind = Preempted if "Preempted" in said else TrainingError
        raise kind(f"process {rank} of the launch failed: {said}") from error


@contextlib.contextmanager
def _watching(folder: Path, watch: Callable[[pd.DataFrame], None] | None) -> Iterator[None]:
    """Hands the log to `watch` while forked processes write it: they have no notebook."""
    if watch is None:
        yield
        return
    log, done = folder / "log.jsonl", threading.Event()

    def written() -> int | None:
        return log.stat().st_mtime_ns if log.exists() else None

    # The log of a run that goes on is shown here and not by the thread: a fork in the middle of a
    # drawing would leave its locks locked for ever. Later it is the forked processes who write it.
    begun = written()
    if begun is not None:
        watch(pd.read_json(log, lines=True))

    def look() -> None:
        seen = begun
        while not done.wait(WATCH_SECONDS):
            if written() != seen:
                seen = written()
                watch(pd.read_json(log, lines=True))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    watch(pd.read_json(log, lines=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fit(
    build: Callable,
    recipe: Recipe,
    folder: Path,
    split: Path,
    image_folder: Path,
    owner: str,
    watch: Callable[[pd.DataFrame], None] | None,
    show: bool,
    forked: bool = False,
) -> None:
    """One process's fit: trains, and on rank 0 writes the model."""
    threads = 1 if forked else recipe.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    data = read_data(split, image_folder, recipe)
    trainer = Trainer(build(classes=data.classes), recipe, folder, data, owner)
    torch.set_num_threads(threads)  # accelerate has its own idea
    trainer.load_state()
    try:
        trainer.run(watch, show)
    except RuntimeError as error:
        if trainer.asked and _lost_peer(error):
            raise Preempted(
                "asked to end (SIGTERM) after another process had gone: nothing could be saved, "
                "the last saved state holds"
            ) from error
        raise
    if trainer.accelerator.is_main_process:
        weights.save_model(trainer.result.model, folder / "model.safetensors")
        runs.write_json(folder / "failures.json", trainer.progress.unreadable)
    if not _launched() or forked:
        trainer.accelerator.end_training()
