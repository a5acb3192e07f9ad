"""Devices of torch by name; torch is imported only when a device is used."""


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
