"""The benchmark and the model of a run, and its retrieval validation set as a benchmark.

They come from the settings or from the run's earlier stages. `val_retrieval` has the images
of val_retrieval.csv; every image of a query's landmark is easy.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.data import images, revisited, splits
from vitgal.data.revisited import RetrievalDataset
from vitgal.evaluation.tuning import DATASET as VALIDATION, TuningError
from vitgal.models.sources import weights_fingerprint
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings, RerankingSettings
from vitgal.settings.reader import Settings, Values
from vitgal.stages.describe import evaluate_global
from vitgal.stages.extract import extract_shortlist
from vitgal.stages.rerank import GLOBAL_NOTEBOOK, LOCAL_NOTEBOOK
from vitgal.stages.whitening import RefineSet, learnt_step, open_refine_set

# Matching and verification for features other than ViTGaL's tokens, as is usual for them.
# Lowe's test separates SIFT's descriptors; XFeat's authors match both ways, with an inner product
# above 0.82. Their keypoints lie within a pixel or two, not within a patch of 16.
DEMO_VALUES = {"matching": "mutual", "fused_weight": 3.0}  # of notebook 06's cell
SUITED: dict[str, dict[str, Any]] = {
    "sift": {
        "matching": "mutual_ratio",
        "match_ratio": 0.85,
        "max_distance": 1.0,
        "threshold": 6.0,
        "fused_weight": 2.0,
    },
    "xfeat": {"matching": "mutual", "max_distance": 0.6, "threshold": 6.0, "fused_weight": 1.0},
    "file": {
        "matching": "mutual_ratio",
        "match_ratio": 0.9,
        "max_distance": 1.0,
        "fused_weight": 2.0,
    },
    # Unrelated whitened codes are nearly orthogonal, at a distance of 1.41.
    "codes": {"max_distance": 1.0, "fused_weight": 2.0},
}


def suited(settings: Settings) -> Settings:
    """Returns the settings with matching and verification that suit the run's local features.

    Values that were set, as in the notebook's cell, stay. Only the cell's own `matching` and
    `fused_weight` are replaced, since they suit the demo's tokens; for tokens nothing changes.
    Raises StageError where stage local is not finished.
    """
    manifest = runs.read_stage(_stage_folder(settings, "local"), LOCAL_NOTEBOOK)
    method = manifest["parameters"].get("local", "tokens")
    if "local features" in manifest["inputs"]:
        method = "file"
    elif "codes" in manifest["inputs"]:  # of a timm network's tokens
        method = "codes"
    suiting = SUITED.get(method, {})
    values = settings.values
    of_demo = [name for name in DEMO_VALUES if values.get(name) == DEMO_VALUES[name]]
    given = settings.without(*(name for name in of_demo if name in suiting))
    whole = Values.of(suiting, f"what suits {method}") | given
    return Settings(whole.values, whole.sources)


def open_benchmark(settings: Settings) -> RetrievalDataset:
    """Opens the benchmark in `dataset_dir`, else the global stage's, else the run's own.

    `val_retrieval` is made from the run's split. Raises as `revisited.open_dataset` does.
    """
    run = runs.run_folder(settings.run.run_dir)
    distractors = _path(settings, "distractors")
    if settings.run.dataset == VALIDATION:
        folder = validation_benchmark(run, image_folder(settings))
    else:
        folder = runs.data_folder(run, _path(settings, "dataset_dir"), "benchmark")
    return revisited.open_dataset(
        settings.run.dataset,
        folder,
        distractors=distractors and runs.resolve(distractors),
        verify=settings.run.verify,
    )


def model_path(settings: Settings) -> Path:
    """The weights in the settings, else those of the global stage, else the run's model.

    Raises StageError where the run's training is unfinished.
    """
    return runs.model_file(runs.run_folder(settings.run.run_dir), _path(settings, "weights"))


def refine_set(settings: Settings) -> RefineSet | None:
    """The images that a whitening of `refine` is learnt from; None where no step is learnt.

    They are those of `refine_set`, else of the finished global stage, else the run's training
    images. Raises as `open_refine_set`.
    """
    if learnt_step(settings.describing) is None:
        return None
    run, file = runs.run_folder(settings.run.run_dir), _path(settings, "refine_set")
    folder = image_folder(settings) if file is None else None
    return open_refine_set(run, settings.describing, file and runs.resolve(file), folder)


def image_folder(settings: Settings) -> Path:
    """The folder of the training images: `image_folder`, else the run's own."""
    run = runs.run_folder(settings.run.run_dir)
    return runs.data_folder(run, settings.run.image_folder, "train")


def local_settings(settings: Settings) -> LocalSettings:
    """The settings of local features, with the queries cropped as the global stage did.

    Raises SettingsError where `crop_queries` was given another value, StageError where the global
    stage is not finished.
    """
    folder = _stage_folder(settings, "global")
    return settings.recorded(folder, LocalSettings, GLOBAL_NOTEBOOK, ["crop_queries"])


def reranking_settings(settings: Settings) -> RerankingSettings:
    """The settings of the finished reranking stage; raises as `local_settings` does."""
    return settings.recorded(_stage_folder(settings, "rerank"), RerankingSettings, "06_rerank")


def _path(settings: Settings, name: str) -> str | None:
    """A path as it was set, else as the global stage recorded it; None for the run's own."""
    path = getattr(settings.run, name)
    manifest = _stage_folder(settings, "global") / runs.MANIFEST
    if path is None and manifest.exists():
        path = runs.read_record(manifest)["recorded"].get(name)
    return path


def _stage_folder(settings: Settings, stage: str) -> Path:
    return runs.run_folder(settings.run.run_dir) / settings.run.dataset / stage


def untunable(settings: Settings) -> str | None:
    """Returns why reranking cannot be tuned in this run; None if it can."""
    run = runs.run_folder(settings.run.run_dir)
    manifest = _stage_folder(settings, "global") / runs.MANIFEST
    elsewhere = manifest.exists() and "descriptors" in runs.read_record(manifest)["inputs"]
    if settings.run.descriptors is not None or elsewhere:
        return "the descriptors were made elsewhere, and there are none of the validation set"
    local = _stage_folder(settings, "local") / runs.MANIFEST
    if local.exists() and "local features" in runs.read_record(local)["inputs"]:
        return "the local features are those of a file, and there are none of the validation set"
    if not (run / "split" / runs.MANIFEST).exists():
        return f"{runs.printable(run.name)} has no split (01_data_split), so no validation set"
    if splits.read_split(run / "split", VALIDATION)["role"].ne("query").all():
        return "the split has no validation queries: 01_data_split with val_queries above 0 has"
    if not (folder := image_folder(settings)).is_dir():
        return f"the images of the split are not in {runs.printable(folder)}: set image_folder"
    return None


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
    table = splits.read_split(run / "split", VALIDATION)
    if table["role"].ne("query").all():
        raise TuningError(
            f"the split in {run / 'split'} has no validation queries: run 01_data_split with "
            "val_queries above 0"
        )
    links = folder / "jpg" / VALIDATION  # its contents are replaced
    runs.refuse_links([folder.parent, folder, links.parent, links])
    names = [f"{VALIDATION}/{Path(path).stem}" for path in table["path"]]
    for name, path in zip(names, table["path"], strict=True):
        _link(folder / "jpg" / f"{name}.jpg", image_folder / path, run)
    table = table.assign(path=names)
    queries = table.loc[table["role"] == "query", "path"]
    sizes = [images.stored_size(folder / "jpg" / f"{name}.jpg") for name in queries]
    boxes = np.array([(0, 0, width, height) for height, width in sizes], np.float64)
    truth = splits.validation_ground_truth(table, boxes)
    target = folder / f"gnd_{VALIDATION}.pkl"
    if not target.exists() or revisited.load_ground_truth(target).fingerprint != truth.fingerprint:
        revisited.write_ground_truth(target, truth)
    return folder


def _link(link: Path, image: Path, run: Path) -> None:
    """Links to an image: relative within the run, so that a run can be moved, else absolute."""
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

    like: the name of that data set, whose stages global and local are finished. image_folder: as
    for `validation_benchmark`. Returns the validation set, its stages global and local finished in
    `<run>/val_retrieval`. Raises TuningError where the data set was ranked by another system's
    descriptors or by other weights, StageError where the validation set was described otherwise and
    `overwrite` is not set.
    """
    ranked = runs.read_stage(run / like / "global", GLOBAL_NOTEBOOK)
    extracted = runs.read_stage(run / like / "local", LOCAL_NOTEBOOK)
    if "descriptors" in ranked["inputs"]:
        raise TuningError(
            f"{like} was ranked by descriptors made elsewhere, and there are none of {VALIDATION}: "
            "set tune to False, or tune in a run of our own model"
        )
    if "local features" in extracted["inputs"]:
        raise TuningError(
            f"{like} has local features of a file, and there are none of {VALIDATION}: set tune to "
            "False, or tune in a run whose features are extracted here"
        )
    dataset = revisited.open_dataset(VALIDATION, validation_benchmark(run, image_folder))
    describing = GlobalSettings.from_manifest(ranked["parameters"])
    _refuse_other_weights(run / like / "global", ranked, model)
    images = None
    if learnt_step(describing) is not None:
        file = ranked["recorded"].get("refine_set")
        images = open_refine_set(run, describing, file and runs.resolve(file), image_folder)
    evaluate = functools.partial(
        evaluate_global, run, dataset, describing, machine, model=model, refine_set=images
    )
    _make(evaluate, overwrite)
    local = LocalSettings.from_manifest(extracted["parameters"])
    local = replace(local, code_images=extracted["recorded"].get("code_images"))
    if local.own_tokens:
        _refuse_other_weights(run / like / "local", extracted, model)
    extract = functools.partial(
        extract_shortlist, run, dataset, local, machine, model=model, image_folder=image_folder
    )
    _make(extract, overwrite)
    return dataset


def _refuse_other_weights(folder: Path, manifest: dict[str, Any], model: Path) -> None:
    if manifest["inputs"]["weights"] != weights_fingerprint(model):
        raise TuningError(f"{folder} was made with other weights than {model}")


def _make(stage: Callable[..., Path], overwrite: bool) -> None:
    """Calls a stage; one that was made otherwise is made again if it may be overwritten."""
    try:
        stage()
    except runs.StageError:
        if not overwrite:
            raise
        stage(overwrite=True)
