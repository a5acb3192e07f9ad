"""Connects to Ray: to a cluster, or to a local instance that is started for the run.

Ray is the optional dependency `scale`; importing this package does not import it.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from vitgal.runs import UserError

ENGINES = ("local", "ray")
MAX_OBJECT_STORE = 2 << 30  # bytes of shared memory for a local instance
# In order: no statistics, no uv environments, no warning about GPUs hidden from tasks without any,
# no log lines about the stored arguments of actors.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


class ClusterError(UserError, RuntimeError):
    """Ray is missing, cannot be reached, or lost too many processes; the message has a remedy."""


def check_engine(engine: str, address: str | None = None) -> None:
    """Raises ValueError for an unknown engine or an address without engine: ray.

    Raises ClusterError where Ray is needed and not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    if engine == "local" and address is not None:
        raise ValueError(f"ray_address {address!r} needs engine: ray, not local")
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

    Args:
        address: HOST:PORT of a cluster's head, "auto" for a cluster on this machine, or None for a
            local instance, which is started and ended here.

    Raises:
        ClusterError: The cluster does not answer.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    local = address is None
    if not local:
        _check_reachable(address)
    try:
        with _silent_stderr(), _deferred_interrupt():
            ray.init(
                address="local" if local else address,
                include_dashboard=False if local else None,
                object_store_memory=_object_store_size() if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except Exception as error:  # Ray documents no types: ConnectionError, RuntimeError, ...
        target = "a local Ray instance" if local else f"the Ray cluster at {address}"
        raise ClusterError(f"{target} cannot be used: {last_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def last_line(error: BaseException) -> str:
    """Returns the last line of an error's message that is not empty, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


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


def _object_store_size() -> int:
    """Returns half of the free shared memory in bytes: 100 MiB to MAX_OBJECT_STORE."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else "."
    return max(100 << 20, min(MAX_OBJECT_STORE, shutil.disk_usage(folder).free // 2))
