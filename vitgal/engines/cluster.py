"""`engine: ray`: the same stages on a Ray cluster, or on a local instance that is started for them.

Extraction is a Ray Data pipeline (read, describe, write), one row of which is a piece of work: the
images that the local engine describes together, so that both engines put the same images into the
same batches. Reranking is joblib's pool with Ray's processes. Ray is the extra `scale`; nothing
here imports it before it is asked for.
"""

import contextlib
import io
import logging
import os
import pickle
import shutil
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import joblib

from vitgal import runs

ENGINES = ("local", "ray")
# How often in a row a pipeline may break. A machine that dies breaks it once; an image that crashes
# every process that reads it would do so for ever.
RETRIES = 5
TASK_RETRIES = 1  # of a task within a pipeline that goes on
IN_FLIGHT = 2  # pieces an actor has at once: the next one travels while it describes
STORE = 2 << 30  # bytes that a local instance may use for pieces on their way, at most
# What Ray would do unasked: send statistics, take over uv's environments, hide GPUs from tasks that
# ask for none with a warning, and log that an actor's arguments are stored.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


class ClusterError(runs.UserError, RuntimeError):
    """Ray is missing, cannot be reached, or lost more processes than it may; says what to do."""


def check_engine(engine: str, address: str | None = None) -> None:
    """Raises ValueError for an unknown engine, or an address that the engine has no use for.

    ClusterError where Ray is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    if engine == "local" and address is not None:
        raise ValueError(f"ray_address {address!r} needs engine: ray, not local")
    if engine == "ray":
        _ray()


def _ray() -> Any:
    """The module ray, without what it would do unasked."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ClusterError(
            f'engine: ray needs Ray ({error}): pip install -e ".[scale]" in the checkout, or use '
            "engine: local"
        ) from None
    return ray


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Within it Ray is there: the cluster at `address`, or a local instance that ends with it.

    address: HOST:PORT of a cluster's head, "auto" for one on this machine, None: a local instance.
    A connection that the process has already is used and left as it is.

    Raises ClusterError where the cluster does not answer.
    """
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
    if address is None:
        options |= dict(address="local", include_dashboard=False, object_store_memory=_store())
    else:
        _refuse_unreachable(address)
        options |= dict(address=address)
    try:
        with _hushed(), _interrupt_waits():
            ray.init(**options)
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except Exception as error:  # Ray raises what it likes here: ConnectionError, RuntimeError, ...
        where = "a local Ray instance" if address is None else f"the Ray cluster at {address}"
        raise ClusterError(f"{where} cannot be used: {_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """ClusterError where nothing listens: Ray would try for minutes, then end the process."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal() or "/" in host:
        raise ClusterError(
            f"ray_address {address!r} is not HOST:PORT of the cluster's head, as "
            '`ray start --head` names it, nor "auto"'
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"nothing answers at ray_address {address} ({error}): start the cluster's head there "
            f"with `ray start --head --port={port}`"
        ) from None


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C is heard at the end: a Ray that is half there has processes that nobody would end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if heard:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what Ray's C++ side writes to stderr, past Python, while it starts."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _store() -> int:
    """Bytes of shared memory for a local instance: half of what is free, STORE at most."""
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else "."
    return max(100 << 20, min(STORE, shutil.disk_usage(shared).free // 2))


def _line(error: BaseException) -> str:
    """What an error says, in one line: the last one that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@dataclass(frozen=True)
class Share:
    """What one describing actor takes, and how many actors and tasks there are at once.

    gpus is 0 or 1; cpus as many as an actor has threads.
    """

    actors: int
    cpus: int
    gpus: int
    tasks: int

    @classmethod
    def among(
        cls,
        nodes: Sequence[Mapping[str, float]],
        *,
        threads: int | None,
        workers: int,
        device: str | None = None,
    ) -> "Share":
        """One actor a GPU where there is any, else one for every `threads` (None: 1) CPUs.

        nodes: each machine's resources (`resources`). workers: threads of a task that reads.
        device: "cuda" or "cpu": GPUs are needed, or left alone. Raises ClusterError where there is
        nothing of the kind.
        """
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        if not (gpus if device == "cuda" else gpus or any(cpus)):
            wanted = "GPUs" if device == "cuda" else "GPUs or CPUs"
            raise ClusterError(f"the Ray cluster has no {wanted} (any more)")
        each = 1 if gpus else min(threads or 1, max(cpus))
        actors = gpus or sum(count // each for count in cpus)
        return cls(actors, each, min(gpus, 1), max(1, sum(cpus) // max(1, workers)))


def resources() -> list[dict[str, float]]:
    """What each machine of the cluster has: "CPU", "GPU" and more, by name."""
    return [node["Resources"] for node in _ray().nodes() if node["Alive"]]


@dataclass(frozen=True, eq=False)
class _Parcel:
    """A piece of work on its way through the pipeline, or the error that it met.

    An error travels as a value: raised on a worker it would come back inside Ray's own.
    """

    number: int
    value: Any
    error: Exception | None = None
    said: str = ""

    def through(self, step: Callable[[Any], Any]) -> "_Parcel":
        if self.error is not None:
            return self
        said, value, failed = io.StringIO(self.said), None, None
        said.seek(0, io.SEEK_END)
        try:
            with contextlib.redirect_stdout(said):
                value = step(self.value)
        except Exception as error:
            failed = _portable(error)
        return _Parcel(self.number, value, failed, said.getvalue())


def _portable(error: Exception) -> Exception:
    """An error that can be sent, with a note on where it was met."""
    met = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is copied
        error = RuntimeError(f"{type(error).__name__}: {error}")
    node = _ray().util.get_node_ip_address()
    if isinstance(error, FileNotFoundError):
        error.add_note(
            f"(on the node {node}: images, weights and the run folder must lie where every node "
            "finds them under the same path)"
        )
    elif not isinstance(error, runs.UserError):
        error.add_note(f"(on the node {node})\n{met}")
    return error


def _step(row: dict, step: Callable[[Any], Any]) -> dict:
    return {"parcel": row["parcel"].through(step)}


class _Actor:
    """A process that makes its step once, at its first row, and keeps it."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]):
        self._make = make
        self._step: Callable[[Any], Any] | None = None

    def __call__(self, row: dict) -> dict:
        return {"parcel": row["parcel"].through(self._made)}

    def _made(self, value: Any) -> Any:
        self._step = self._step or self._make()
        return self._step(value)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Pieces of work go through read, describe and write; what comes out is yielded.

    read, write: run as tasks, wherever there is room. They take no CPU from Ray's account: they
    wait for disks most of the time, and must never wait for the actors that wait for them.
    describe: called once in every actor, gives the step that is called with what `read` gave.
    share: called before every start, since a cluster changes. name: says of a piece which it is.
    ordered: results come in the order of the pieces, not as they are done. Pieces and results can
    be pickled.
    """

    read: Callable[[Any], Any]
    describe: Callable[[], Callable[[Any], Any]]
    write: Callable[[Any], Any] | None
    share: Callable[[], Share]
    name: Callable[[Any], str] = str
    ordered: bool = False

    def run(self, pieces: Sequence[Any]) -> Iterator[Any]:
        """Yields every piece's result; no pieces, no results.

        A process or a machine that dies takes with it what it had not handed on: the pipeline is
        started again with the pieces that are left, on the machines that are left.

        Raises:
            The first error that a step raised, as it raised it; what steps print is printed here.
            ClusterError: Ray broke RETRIES times in a row, or more often.
        """
        left, broken, done = dict(enumerate(pieces)), 0, 0
        while left:
            share = self.share()
            try:
                with contextlib.closing(self._results(left, share)) as results:
                    for number, value in results:
                        del left[number]
                        done += 1
                        yield value
            except _ray().exceptions.RayError as error:
                # More than were on their way: not the same piece again and again.
                broken = 1 if done > 4 * IN_FLIGHT * share.actors else broken + 1
                done = 0
                if broken > RETRIES:
                    first = self.name(left[min(left)])  # pieces are begun in order
                    raise ClusterError(
                        f"the Ray cluster broke {broken} times in a row, at {first} or soon after: "
                        f"{_line(error)}; what is done is kept, run the same command again to go on"
                    ) from None
                print(f"a Ray process or machine was lost ({type(error).__name__}): going on")

    def _results(self, left: dict[int, Any], share: Share) -> Iterator[tuple[int, Any]]:
        data = self._dataset([_Parcel(*piece) for piece in left.items()], share)
        for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
            for parcel in batch["parcel"]:
                print(parcel.said, end="")
                if parcel.error is not None:
                    raise parcel.error
                yield parcel.number, parcel.value

    def _dataset(self, parcels: list[_Parcel], share: Share) -> Any:
        data = _ray().data
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        actors = data.ActorPoolStrategy(
            size=min(share.actors, len(parcels)), max_tasks_in_flight_per_actor=IN_FLIGHT
        )
        # An actor is not restarted: the pieces that it had would wait for it, for ever where its
        # machine is gone and the others have no room for one more.
        pool = dict(compute=actors, num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0)
        tasks = dict(compute=data.TaskPoolStrategy(size=share.tasks), num_cpus=0)
        tasks |= dict(max_retries=TASK_RETRIES)
        with warnings.catch_warnings(), _settings(data.DataContext.get_current(), self.ordered):
            # Retries have no other place until Ray 2.64.
            warnings.simplefilter("ignore", DeprecationWarning)
            rows = [{"parcel": parcel} for parcel in parcels]
            flow = data.from_items(rows, override_num_blocks=len(rows))
            flow = flow.map(_step, fn_kwargs={"step": self.read}, **tasks)
            flow = flow.map(_Actor, fn_constructor_args=(self.describe,), **pool)
            if self.write is not None:
                flow = flow.map(_step, fn_kwargs={"step": self.write}, **tasks)
            return flow


@contextlib.contextmanager
def _settings(context: Any, ordered: bool) -> Iterator[None]:
    """Ray Data's settings for the data sets that are made within; afterwards they are as before."""
    wanted = {"enable_progress_bars": False, "enable_fallback_to_arrow_object_ext_type": True}
    before = {name: getattr(context, name) for name in wanted}
    order = context.execution_options.preserve_order
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = ordered
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = order


def ask(question: Callable[[], Any], share: Share) -> Any:
    """What a function returns where an actor of this share would run."""
    task = _ray().remote(num_cpus=share.cpus, num_gpus=share.gpus)(question)
    return _ray().get(task.remote())


@contextlib.contextmanager
def parallel(
    engine: str, address: str | None, *, workers: int | None, tasks: int
) -> Iterator[joblib.Parallel]:
    """A joblib pool of processes that gives results as they are done, here or on a Ray cluster.

    workers: processes (None: one a CPU; a cluster has no more of them than CPUs). tasks: how many
    there will be. Raises ClusterError where the cluster fails.
    """
    how = dict(return_as="generator_unordered")
    if engine == "local":
        number = min(workers or joblib.cpu_count(), max(1, tasks))
        yield joblib.Parallel(n_jobs=number, backend="loky", **how)
        return
    with connected(address):
        ray = _ray()
        _register()
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        number = min(workers or cpus, cpus, max(1, tasks))
        spread = dict(scheduling_strategy="SPREAD")  # Ray counts no CPU for a pool's processes
        try:
            with joblib.parallel_config(backend="ray", ray_remote_args=spread):
                yield joblib.Parallel(n_jobs=number, **how)
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"the Ray cluster failed: {_line(error)}; what is done is kept, run the same "
                "command again to go on"
            ) from None


def _register() -> None:
    """Tells joblib of Ray's backend; `ray.util.joblib` refuses to hand over results one by one."""
    from ray.util.joblib.ray_backend import RayBackend

    class Unordered(RayBackend):
        supports_return_generator = True

    joblib.register_parallel_backend("ray", Unordered)
