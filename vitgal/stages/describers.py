"""The interface by which stages describe images, on this machine or on a Ray cluster."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from vitgal.models.network import ViTGaL
from vitgal.settings import MachineSettings
from vitgal.stages.images import Failure, ImageTask
from vitgal.stages.local_describer import StageSettings, open_local
from vitgal.stages.ray_describer import open_ray
from vitgal.stages.shards import ShardTask


class ImageDescriber(Protocol):
    """What LocalDescriber and RayDescriber have in common."""

    model: ViTGaL  # its dimensions may be read; on a cluster it computes nothing
    precision: str

    def describe_blocks(
        self, blocks: Sequence[Sequence[ImageTask]], bar: tqdm
    ) -> Iterator[tuple[np.ndarray, list[Failure]]]:
        """Yields the global descriptors (n, D) float32 of each block in order, and its failures.

        The row of a failed image is zero. The progress bar counts images.
        """

    def write_shards(self, shards: Sequence[ShardTask], bar: tqdm) -> Iterator[list[Failure]]:
        """Writes shards of local features and yields the failures of each."""

    def recorded(self) -> dict[str, Any]:
        """Lists what a stage's manifest records of the machine; no result depends on it."""


@contextlib.contextmanager
def open_describer(
    source: Path | str, settings: StageSettings, machine: MachineSettings
) -> Iterator[ImageDescriber]:
    """Opens what the setting `engine` names.

    Args:
        source: a weight file, or "untrained:<architecture>".
    """
    opened = open_ray if machine.engine == "ray" else open_local
    with opened(source, settings, machine) as describer:
        yield describer
