"""What a run itself made, for notebooks whose parameter is None."""

from pathlib import Path

from vitgal.runs.manifest import read_stage
from vitgal.runs.paths import SMALL_WEIGHTS, resolve


def data_folder(run: Path, given: str | None, part: str = "") -> Path:
    """The folder that a parameter names, or for None that part of the run's own demo data."""
    return resolve(given) if given is not None else run / "data" / part


def model_file(run: Path, given: str | None) -> Path:
    """The weights that a parameter names, or for None the run's complete model.

    A run in which nothing has been trained takes the small model that the checkout brings, and a
    printed line says so. What is made with it carries that file's fingerprint, so that a model
    which is trained in the run later is not mistaken for it. Raises StageError where the training
    was begun and is not finished.
    """
    if given is not None:
        return resolve(given)
    small = resolve(SMALL_WEIGHTS)
    trained = any((run / stage).exists() for stage in ("retrieval", "autoencoder"))
    if not trained and small.is_file():
        print(f"nothing has been trained in {run.name}: the model is the small {SMALL_WEIGHTS}")
        return small
    read_stage(run / "autoencoder", "notebook 03_train_autoencoder (or set weights)")
    return run / "autoencoder" / "model.safetensors"
