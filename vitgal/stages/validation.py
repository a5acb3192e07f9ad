"""The retrieval validation set as the benchmark `val_retrieval`.

Its images are those of val_retrieval.csv; every image of a query's landmark is easy.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitgal import runs
from vitgal.data import revisited, splits
from vitgal.data.revisited import RetrievalDataset
from vitgal.evaluation.tuning import DATASET, TuningError
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings
from vitgal.stages.counting import GLOBAL_NOTEBOOK, LOCAL_NOTEBOOK


def validation_benchmark(run: Path, image_folder: Path) -> Path:
    """Makes a benchmark of the run's retrieval validation set, beside the run's own data.

    Writes `<run>/data/benchmark/gnd_val_retrieval.pkl` and, below `jpg/val_retrieval/`, links to
    the images; existing ones stay. The query's box is its whole photograph.

    image_folder: the folder that the paths of val_retrieval.csv start from. Returns the benchmark's
    folder. Raises TuningError where the split has no validation queries, FileNotFoundError where it
    or an image is missing.
    """
    folder, image_folder = run / "data" / "benchmark", Path(image_folder)
    runs.read_stage(run / "split", "notebook 01_data_split")
    table = splits.read_split(run / "split", DATASET)
    names = [f"{DATASET}/{Path(path).stem}" for path in table["path"]]
    if not len(table) or table["role"].ne("query").all():
        raise TuningError(
            f"the split in {run / 'split'} has no validation queries: run 01_data_split with "
            "val_queries above 0"
        )
    for name, path in zip(names, table["path"], strict=True):
        _link(folder / "jpg" / f"{name}.jpg", image_folder / path, run)
    table = table.assign(path=names)
    queries = table.loc[table["role"] == "query", "path"]
    boxes = _whole_images([folder / "jpg" / f"{name}.jpg" for name in queries])
    truth = splits.validation_ground_truth(table, boxes)
    target = folder / f"gnd_{DATASET}.pkl"
    if not target.exists() or revisited.load_ground_truth(target).fingerprint != truth.fingerprint:
        revisited.write_ground_truth(target, truth)
    return folder


def _link(link: Path, image: Path, run: Path) -> None:
    """A link to an image: relative within the run, so that a run can be moved, else absolute."""
    if not image.is_file():
        raise FileNotFoundError(f"the validation image {image} is not there: check image_folder")
    image = image.resolve()
    inside = image.is_relative_to(run.resolve())
    target = os.path.relpath(image, link.parent.resolve()) if inside else str(image)
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _whole_images(paths: Sequence[Path]) -> np.ndarray:
    """The box of each whole photograph, (Q, 4) float64; reads the headers alone."""
    boxes = []
    for path in paths:
        with Image.open(path) as image:
            boxes.append((0.0, 0.0, *map(float, image.size)))
    return np.array(boxes)


def prepare_validation(
    run: Path,
    machine: MachineSettings,
    *,
    like: str,
    image_folder: Path,
    model: Path,
    overwrite: bool = False,
) -> RetrievalDataset:
    """Describes the validation set exactly as another data set of the run was described.

    Args:
        like: the name of that data set; the settings are those of its finished global and local
            stages.
        image_folder: as for `validation_benchmark`.
        model: the file of the weights.
        overwrite: describe the validation set again where it was described otherwise.
    Returns:
        The validation set, its stages global and local finished in `<run>/val_retrieval`.
    Raises:
        TuningError: the data set was ranked by another system's descriptors or by other weights.
        StageError: the validation set was described otherwise, and `overwrite` is not set.
    """
    manifests = {
        "global": runs.read_stage(run / like / "global", GLOBAL_NOTEBOOK),
        "local": runs.read_stage(run / like / "local", LOCAL_NOTEBOOK),
    }
    if "descriptors" in manifests["global"]["inputs"]:
        raise TuningError(
            f"{like} was ranked by descriptors made elsewhere, and there are none of {DATASET}: "
            "set tune to False, or tune in a run of our own model"
        )
    dataset = revisited.open_dataset(DATASET, validation_benchmark(run, image_folder))
    from vitgal.models import inference  # imports torch
    from vitgal.stages import describe, extract

    stages = {
        "global": (describe.evaluate_global, GlobalSettings),
        "local": (extract.extract_shortlist, LocalSettings),
    }
    for name, (describe_dataset, section) in stages.items():
        if manifests[name]["inputs"]["weights"] != inference.weights_fingerprint(model):
            raise TuningError(f"{run / like / name} was made with other weights than {model}")
        settings = section.from_manifest(manifests[name]["parameters"])
        try:
            describe_dataset(run, dataset, settings, machine, model=model)
        except runs.StageError:
            if not overwrite:
                raise
            describe_dataset(run, dataset, settings, machine, model=model, overwrite=True)
    return dataset
