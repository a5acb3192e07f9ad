"""Stages in a child process that is killed at a chosen call."""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.mini_benchmark import TOP
from vitgal.models import descriptors
from vitgal.stages import local_describer

CALLS = {
    "load": (local_describer, "load_image"),
    "network": (descriptors, "select_features"),
    "describe": (descriptors, "global_descriptors"),
    "write": (np, "save"),
    "replace": (os, "replace"),
}


def fork_server(monkeypatch: pytest.MonkeyPatch) -> multiprocessing.context.ForkServerContext:
    """A server that has imported torch and computed nothing: its children start at once."""
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stages.killing"])
    return context


def kill(stage: Callable, arguments: tuple[Path, ...], call: str, number: int, monkeypatch) -> None:
    """Runs a stage that kills itself at the `number`-th call of one of CALLS."""
    target = (stage, arguments, call, number)
    child = fork_server(monkeypatch).Process(target=_kill_at, args=target)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, "the kill point was not reached"


def _kill_at(stage: Callable, arguments: tuple[Path, ...], call: str, number: int) -> None:
    owner, name = CALLS[call]
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*values, **options):
        if next(calls) == number:
            if call == "write":  # half of the file is there
                values[0].write(b"\x93NUMPY half")
                values[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*values, **options)

    setattr(owner, name, dying)
    stage(*arguments)
