"""Where the checkout, a run and its files are."""

import os
from pathlib import Path

from vitgal.runs.errors import StageError

SMALL_WEIGHTS = "weights/vitgal_nano.safetensors"  # in the checkout; made by small_weights.yaml


def checkout() -> Path:
    """The checkout's top folder, the one that holds `notebooks/` and `params/`."""
    top = Path(__file__).resolve().parents[2]
    if not (top / "notebooks").is_dir():
        raise StageError(
            f"{top} holds no notebooks/: vitgal's notebooks and params live in its checkout; "
            "install it there with `pip install -e .`"
        )
    return top


def resolve(path: str | os.PathLike) -> Path:
    """An absolute path as it is, a relative one below the checkout; `~` is expanded."""
    return checkout() / Path(path).expanduser()


def run_folder(run_dir: str | os.PathLike) -> Path:
    """A run's folder: absolute, else relative to $VITGAL_RUNS if that is set, else to `runs/`.

    A relative $VITGAL_RUNS counts from the checkout: a notebook's kernel starts in another folder
    than the command line that ran it.
    """
    return resolve(os.environ.get("VITGAL_RUNS") or "runs") / Path(run_dir).expanduser()
