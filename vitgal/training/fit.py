"""The arguments of one training, and the settings that a resumed one may change."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from vitgal.runs import plain
from vitgal.settings import MachineSettings, Recipe
from vitgal.training.samples import SplitData, read_data

STEP = ("num_processes", "batch_size", "accumulate")  # their product: the images of a step
# Parameters that manifests omit, and their values then.
ABSENT = {"accumulate": 1, "skip_images": [], "skip_bad_batches": 0, "sync_batchnorm": True}


@dataclass(frozen=True)
class Fit:
    """The arguments of one training."""

    build: Callable[[int], nn.Module]  # makes the network for a number of classes
    settings: Recipe
    machine: MachineSettings
    folder: Path  # the stage's, where the model, the log and the states go
    split: Path
    image_folder: Path
    owner: str = ""  # fingerprint of the stage's settings; a state of another owner is refused
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the stage
    begun: Mapping[str, Any] = field(default_factory=dict)  # with which the run was begun
    watch: Callable[[pd.DataFrame], None] | None = None
    progress: bool = True

    def read_data(self) -> SplitData:
        """Reads the split's tables; raises as `samples.read_data` does."""
        return read_data(self.split, self.image_folder, self.settings)

    def changes(self, recorded: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Returns the settings that changed: step, setting, from, to.

        recorded: the changes so far.
        """
        before, now = ABSENT | plain(dict(self.begun)), ABSENT | plain(dict(self.parameters))
        before |= {change["setting"]: change["to"] for change in recorded}
        return [
            {"step": step, "setting": name, "from": before.get(name), "to": value}
            for name, value in sorted(now.items())
            if before.get(name) != value and name not in ("environment", "sync_batchnorm")
        ]


def continued(
    begun: Mapping[str, Any], parameters: Mapping[str, Any], named: tuple[str, ...]
) -> dict[str, Any]:
    """Returns parameters with the begun run's values wherever a resumed one may differ.

    These are the `named` ones, and processes, batch size and accumulation where a step has the same
    images. Other differences are kept, so that the stage refuses them.
    """
    recipes = [ABSENT | dict(part) for part in (begun, parameters)]
    before, now = (math.prod(part.get(name, 1) for name in STEP) for part in recipes)
    names = {*named, *(STEP if before == now else ())}
    if 1 in (part.get("num_processes") for part in recipes):
        names.add("sync_batchnorm")  # means nothing on one process
    kept = {name: value for name, value in parameters.items() if name not in names}
    return kept | {name: begun[name] for name in names if name in begun}
