"""Connections to Ray, a cluster or a local instance for the run, and pools of processes.

Ray is the optional dependency `scale`; importing this package does not import it.
"""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib

from vitgal.runs import UserError, printable

MAX_OBJECT_STORE = 2 << 30  # bytes of shared memory for a local instance
# In order: no statistics, no uv environments, no warning about GPUs hidden from tasks without any,
# no log lines about the stored arguments of actors.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
TOKEN = secrets.token_hex(32)  # of this process's local instances: Ray reads it once


class ClusterError(UserError, RuntimeError):
    """Ray is missing, cannot be reached, or lost too many processes; the message has a remedy."""


def check_engine(engine: str) -> None:
    """Raises ClusterError for "ray" where it is not installed."""
    if engine == "ray":
        import_ray()


def import_ray() -> Any:
    """Returns the module ray; ClusterError where it is not installed."""
    for name, value in ENVIRONMENT.items():
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
    """Connects this process to Ray; reuses an existing connection and leaves it open.

    address: HOST:PORT of a cluster's head, "auto" for a cluster on this machine; None: a local
    instance, started and ended here, which listens on the loopback only and keeps its files and
    its token where no other user can read. Raises ClusterError where the cluster does not answer.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as cleanup:
        if address:
            _check_reachable(address)
            connect = functools.partial(ray.init, address)
        else:
            connect = cleanup.enter_context(_private_instance(ray.init))
        cleanup.callback(ray.shutdown)
        try:
            with _silent_stderr(), _deferred_interrupt():
                connect(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray documents no types: ConnectionError, RuntimeError, ...
            target = f"the Ray cluster at {address}" if address else "a local Ray instance"
            raise ClusterError(f"{target} cannot be used: {last_line(error)}") from None
        yield


@contextlib.contextmanager
def _private_instance(connect: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yields `connect`, which is `ray.init`, for an instance that no other user can reach."""
    from ray._private import ray_constants

    variables = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    # Not in TMPDIR: Ray makes sockets there, whose paths have at most 107 characters.
    top = os.environ.get("RAY_TMPDIR", "/tmp")
    folder = Path(tempfile.mkdtemp(prefix="vitgal-ray-", dir=top))  # mode 700
    free = shutil.disk_usage("/dev/shm" if os.path.isdir("/dev/shm") else ".").free
    cluster, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(TOKEN)
        # Without RAY_AUTH_MODE a local Ray instance requires the token, and reads it from here.
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
        yield functools.partial(
            connect,
            "local",
            include_dashboard=False,
            object_store_memory=max(100 << 20, min(MAX_OBJECT_STORE, free // 2)),
            _node_ip_address="127.0.0.1",  # that of the network where a cluster is enabled
            _temp_dir=str(folder / "ray"),  # Ray gives it mode 777
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = cluster
        for name in variables:
            os.environ.pop(name, None)
        os.environ |= before
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def parallel(
    engine: str, address: str | None, *, workers: int | None, tasks: int
) -> Iterator[joblib.Parallel]:
    """Yields a joblib pool that returns results as they are done, in any order.

    workers: processes, at most one for each CPU of a cluster, and one for each of the tasks; None:
    one for each CPU. Raises ClusterError where the cluster failed.
    """
    if engine == "local":
        processes = min(workers or joblib.cpu_count(), max(1, tasks))
        yield joblib.Parallel(n_jobs=processes, backend="loky", return_as="generator_unordered")
        return
    with connected(address):
        ray = import_ray()
        from ray.util.joblib.ray_backend import RayBackend

        class UnorderedRayBackend(RayBackend):  # that of `ray.util.joblib` returns no generators
            supports_return_generator = True

        joblib.register_parallel_backend("ray", UnorderedRayBackend)
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        processes = min(workers or cpus, cpus, max(1, tasks))
        # A pool's processes reserve no CPUs: without SPREAD Ray would start all on one node.
        options = {"scheduling_strategy": "SPREAD"}
        try:
            with joblib.parallel_config(backend="ray", ray_remote_args=options):
                yield joblib.Parallel(n_jobs=processes, return_as="generator_unordered")
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"the Ray cluster failed: {last_line(error)}; finished work is kept, run the same "
                "command again to continue"
            ) from None


def last_line(error: BaseException) -> str:
    """Returns the last line of an error's message that is not empty, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1][:300]) if lines else type(error).__name__


def _check_reachable(address: str) -> None:
    """Raises ClusterError where no server listens; Ray would try for minutes, then exit."""
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
def _deferred_interrupt() -> Iterator[None]:
    """Delays KeyboardInterrupt to the end: an interrupted start of Ray leaves processes running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if interrupts:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discards the process's stderr, to which Ray's C++ code writes at its start."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
