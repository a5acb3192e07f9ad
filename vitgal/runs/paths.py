"""Where the checkout, a run and its files are."""

import os
from pathlib import Path

from vitgal.runs.errors import StageError
from vitgal.runs.manifest import read_stage

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


def data_folder(run: Path, folder: str | None, part: str = "") -> Path:
    """Returns the folder that a parameter names, or for None a part of the run's own demo data."""
    return resolve(folder) if folder is not None else run / "data" / part


def model_file(run: Path, weights: str | None) -> Path:
    """Returns the weight file that a parameter names, or for None the run's complete model.

    A run without any training takes the small model of the checkout and prints a line about it. Its
    fingerprint keeps the results apart from those of a model that is trained later.

    Raises:
        StageError: A training has begun and is not finished, or there is no small model.
    """
    if weights is not None:
        return resolve(weights)
    small = resolve(SMALL_WEIGHTS)
    trained = any((run / stage).exists() for stage in ("retrieval", "autoencoder"))
    if not trained and small.is_file():
        print(f"nothing has been trained in {run.name}: the model is the small {SMALL_WEIGHTS}")
        return small
    read_stage(run / "autoencoder", "notebook 03_train_autoencoder (or set weights)")
    return run / "autoencoder" / "model.safetensors"
