"""Saved states of a run."""

import io
import json
import math
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from vitgal import runs
from vitgal.models import weights
from vitgal.models.network import ViTGaL
from vitgal.training.errors import TrainingError
from vitgal.training.processes import is_worker_error

STATES = ("last", "previous")


@dataclass
class Progress:
    """The progress of a run.

    pending: for each rank, the scalars of the steps since the last row of the log. skipped: steps
    without an update, their loss not being finite: step, images.
    """

    epoch: int = 0
    step: int = 0  # finished steps of this epoch
    rows: list[dict] = field(default_factory=list)  # the log so far
    unreadable: list[str] = field(default_factory=list)  # names of images, sorted
    best: float = -math.inf  # the highest validation score so far
    pending: list[list[dict[str, float]]] = field(default_factory=list)
    images: int = 0  # of a step; 0 in states that lack it
    changes: list[dict] = field(default_factory=list)  # as `Fit.changes` returns them
    skipped: list[dict] = field(default_factory=list)


def read_rows(log: Path) -> pd.DataFrame:
    """Reads a running training's log.jsonl; a last line that is not whole is left out."""
    text = log.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    return pd.read_json(io.StringIO(whole), lines=True) if whole else pd.DataFrame()


class Checkpoints:
    """The last two states of a run, its log and its best model, in the stage's folder.

    Args:
        owner: fingerprint of the stage's settings; a state of another owner is refused.
        parts: name -> part with a state; None for one that this run lacks.
    """

    def __init__(self, folder: Path, owner: str, parts: Mapping[str, Any]):
        self.folder, self.owner, self.parts = folder, owner, parts
        self.last, self.previous = (folder / "state" / f"{name}.pt" for name in STATES)

    def load(self) -> Progress | None:
        """Loads the last state into the parts; returns its progress, None where there is no state.

        A damaged state is replaced by the one before, with a warning. Raises TrainingError for the
        state of another run, and where no state can be read.
        """
        state = self._read()
        if state is None:
            return None
        if state.get("owner") != self.owner:
            raise TrainingError(
                f"{self.last} was made by a run with other settings or data; take the folder "
                "state/ away, or set overwrite: true to start anew"
            )
        for name, part in self.parts.items():
            if part is not None and state[name]:  # a scaler's is empty after another precision
                part.load_state_dict(state[name])
        return Progress(**state["progress"])

    def _read(self) -> dict[str, Any] | None:
        damaged = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                damaged.append(f"{path} cannot be read ({str(error).splitlines()[0][:100]})")
                continue
            for message in damaged:
                warnings.warn(f"{message}; continuing from {path.name}", stacklevel=3)
            return state
        if damaged:
            raise TrainingError("; ".join(damaged) + "; take state/ away to start anew")
        return None

    def save(self, progress: Progress) -> None:
        """Writes log and state atomically; the state before becomes `previous.pt`.

        Raises TrainingError where the disk is full; all states are then as they were.
        """
        state = {"owner": self.owner}
        for name, part in self.parts.items():
            state[name] = {} if part is None else part.state_dict()
        state["progress"] = dict(vars(progress))
        try:
            # The log is written first: it may be ahead of the state, and a resumed run rewrites it.
            lines = [json.dumps(runs.plain(row)) + "\n" for row in progress.rows]
            runs.write_text(self.folder / "log.jsonl", "".join(lines))
            with runs.atomic(self.last) as temporary:
                with open(temporary, "wb") as handle:  # so that errors are the file's, not torch's
                    torch.save(state, handle)
                if self.last.exists():
                    with runs.atomic(self.previous) as link:
                        os.link(self.last, link)
        except (OSError, RuntimeError) as error:
            if is_worker_error(error):
                raise
            whole = self.last.exists()
            before = "the one before it is whole" if whole else "there is none before it"
            raise TrainingError(
                f"the state cannot be written to {self.last} ({error}); {before}: make room on the "
                "disk and run the same again"
            ) from error

    def save_best(self, model: ViTGaL) -> None:
        """Writes the best model so far as state/best.safetensors."""
        weights.save_model(model, self.last.with_name("best.safetensors"))
