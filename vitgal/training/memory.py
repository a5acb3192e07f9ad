"""Checks whether a batch fits into a GPU's memory, by measuring two small batches."""

from collections.abc import Callable

import torch
from torch import nn

from vitgal.training.errors import TrainingError

RESERVE = 0.06  # fraction of the memory that is left for fragments


def check_batch_size(size: int, measure: Callable[[int], int], available: int) -> None:
    """Raises TrainingError naming a batch size that fits, where `size` images do not.

    measure: returns the bytes at the peak of a step with a number of images, in which they are
    linear. available: bytes that a step may take.
    """
    low, high = measure(2), measure(4)
    bytes_per_image = max((high - low) / 2, 1)
    largest = max(int((available - low) // bytes_per_image) + 2, 0)
    if size > largest:
        raise TrainingError(
            f"a batch of {size} images needs more memory than the {available / 2**30:.1f} GiB "
            f"there are; about {largest} would fit: set batch_size {largest} or lower, and "
            "accumulate for the same number of images in a step (dry_run: false skips this)"
        )


def measure_batch(
    device: torch.device, network: nn.Module, step: Callable[[int], None], size: int
) -> None:
    """Raises TrainingError as `check_batch_size`, measuring steps of few images on a GPU."""

    def peak(count: int) -> int:
        """Returns the bytes at the peak of a step."""
        torch.cuda.reset_peak_memory_stats(device)
        step(count)
        return torch.cuda.max_memory_allocated(device)

    check_batch_size(size, peak, _available_memory(device, network))


def _available_memory(device: torch.device, network: nn.Module) -> int:
    """Returns the bytes of a GPU that a step may take, without those for AdamW's moments."""
    free, _ = torch.cuda.mem_get_info(device)
    moments = 2 * sum(
        value.numel() * value.element_size()
        for value in network.parameters()
        if value.requires_grad
    )
    return int((1 - RESERVE) * (free + torch.cuda.memory_reserved(device))) - moments
