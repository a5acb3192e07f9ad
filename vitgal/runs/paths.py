"""Paths of the project, of runs, and of a run's data and model.

A checkout has its notebooks, params, weights and sources in its top folder, an installed wheel in
`vitgal/project/`: there data and runs lie where the user works.
"""

import os
from pathlib import Path

from vitgal.runs.errors import StageError
from vitgal.runs.manifest import read_stage

TIMM, UNTRAINED = "timm:", "untrained:"
NETWORKS = (TIMM, UNTRAINED)  # begin the names of networks, in place of a file's path
SMALL_WEIGHTS = "weights/vitgal_lite0.safetensors"  # made by params/lite0_head.yaml
PARTS = ("notebooks", "params", "weights", "third_party")  # that a wheel brings, see setup.py
FIRST_NOTEBOOK = "notebooks/01_data_split.ipynb"


def bundled_folder() -> Path:
    """Returns the folder of what comes with vitgal, see PARTS; StageError where it is lacking."""
    top = Path(__file__).resolve().parents[2]
    for folder in (top / "vitgal" / "project", top):
        if (folder / FIRST_NOTEBOOK).is_file():
            return folder
    raise StageError(
        f"{top} lacks vitgal's notebooks and params: install the wheel again, or the checkout with "
        "`pip install -e .`"
    )


def checkout() -> Path:
    """Returns the folder that relative paths count from: the checkout's top folder.

    With an installed wheel it is the nearest folder, from the current one upwards, where `vitgal
    notebooks` laid out the notebooks, else the current folder.
    """
    top = bundled_folder()
    if top.name != "project":
        return top
    here = Path.cwd()
    return next((path for path in (here, *here.parents) if (path / FIRST_NOTEBOOK).is_file()), here)


def resolve(path: str | os.PathLike) -> Path:
    """Returns an absolute path: a relative one counts from `checkout`; `~` is expanded.

    A file or folder that is missing there and that an installed wheel brings is the wheel's.
    """
    relative = Path(path).expanduser()
    resolved = checkout() / relative
    if relative.parts[:1] and relative.parts[0] in PARTS and not resolved.exists():
        packaged = bundled_folder() / relative
        return packaged if ".." not in relative.parts and packaged.exists() else resolved
    return resolved


def split_source(source: str) -> tuple[str, str]:
    """Splits a source of weights into the network that it names and its file, "" where none is.

    `timm:NAME@FILE` has both, `timm:NAME`, `untrained:NAME` and `pretrained` no file; any other
    text is a file.
    """
    if source.startswith(NETWORKS) or source == "pretrained":
        name, _, file = source.partition("@")
        return name, file
    return "", source


def resolve_source(source: str | os.PathLike, folder: Path | None = None) -> str | Path:
    """Returns a source with its file as an absolute path, from `folder`; None: as `resolve`."""
    name, file = split_source(str(source))
    if not file:
        return str(source)
    path = resolve(file) if folder is None else folder / Path(file).expanduser()
    return f"{name}@{path}" if name else path


def run_folder(run_dir: str | os.PathLike) -> Path:
    """Returns a run's folder; a relative one counts from $VITGAL_RUNS, or `runs/` without it.

    A relative $VITGAL_RUNS counts from the checkout: a notebook's kernel and the command line that
    starts it have different current folders. Links up to the run are resolved; links inside it are
    refused where a stage begins.
    """
    runs = resolve(os.environ.get("VITGAL_RUNS") or "runs")
    return (runs / Path(run_dir).expanduser()).resolve()


def data_folder(run: Path, folder: str | None, part: str = "") -> Path:
    """Returns the folder that a parameter names, or for None a part of the run's own demo data."""
    return resolve(folder) if folder is not None else run / "data" / part


def weights_path(source: str | os.PathLike) -> Path | None:
    """Returns the file of a source of weights; None for a network without one."""
    _, file = split_source(str(source))
    return Path(file) if file else None


def has_trained(run: Path) -> bool:
    """Whether a training has begun in a run, so that its model is the run's own."""
    return any((run / stage).exists() for stage in ("retrieval", "autoencoder"))


def model_file(run: Path, weights: str | None) -> Path | str:
    """Returns the model that a parameter names, or for None the run's complete model.

    A parameter is a weight file, "timm:NAME", "timm:NAME@FILE" or "untrained:<architecture>".

    A run without training uses the checkout's small model and prints a line about it. Stages that
    used it are refused once the run has a trained model.

    Raises:
        StageError: A training has begun and is not finished, or there is no small model.
    """
    if weights is not None:
        return resolve_source(weights)
    small = resolve(SMALL_WEIGHTS)
    if not has_trained(run) and small.is_file():
        print(f"nothing has been trained in {run.name}: the model is the small {SMALL_WEIGHTS}")
        return small
    read_stage(run / "autoencoder", "notebook 03_train_autoencoder (or set weights)")
    return run / "autoencoder" / "model.safetensors"
