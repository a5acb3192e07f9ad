"""Devices of torch by name, and NumPy's threads; torch is imported only when a device is used."""

import functools
from contextlib import AbstractContextManager

from threadpoolctl import ThreadpoolController


def find_gpu() -> str | None:
    """Returns "cuda" where torch finds a GPU, else None."""
    import torch

    return "cuda" if torch.cuda.is_available() else None


def check_device(device: str) -> None:
    """Raises ValueError where torch finds no such device."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"torch has no device {device!r} ({reason}): set device or match_device to another one "
            "or to null"
        ) from error


def one_blas_thread() -> AbstractContextManager:
    """Limits NumPy's products to one thread each, for all threads of the process."""
    return _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> ThreadpoolController:
    """The process's libraries, looked up once: that takes longer than to match some pairs."""
    import numpy as np  # noqa: F401, its BLAS is to be among them

    return ThreadpoolController()
