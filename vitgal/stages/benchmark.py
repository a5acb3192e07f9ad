"""The benchmark and the model of a run, from its settings or its earlier stages."""

from pathlib import Path
from typing import Any

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.revisited import RetrievalDataset
from vitgal.evaluation.tuning import DATASET as VALIDATION
from vitgal.settings.reader import Settings
from vitgal.settings.sections import LocalSettings, RerankingSettings
from vitgal.stages.validation import validation_benchmark

GLOBAL_NOTEBOOK = "04_global_evaluation"


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
        settings.run.dataset, folder, distractors=distractors and runs.resolve(distractors)
    )


def model_path(settings: Settings) -> Path:
    """The weights in the settings, else those of the global stage, else the run's model.

    Raises StageError where the run's training is unfinished.
    """
    return runs.model_file(runs.run_folder(settings.run.run_dir), _path(settings, "weights"))


def image_folder(settings: Settings) -> Path:
    """The folder of the training images: `image_folder`, else the run's own."""
    return runs.data_folder(
        runs.run_folder(settings.run.run_dir), settings.run.image_folder, "train"
    )


def local_settings(settings: Settings) -> LocalSettings:
    """The settings of local features, with the queries cropped as the global stage did.

    Raises SettingsError where `crop_queries` was given another value, StageError where the global
    stage is not finished.
    """
    folder = _stage_folder(settings, "global")
    return settings.recorded(folder, LocalSettings, GLOBAL_NOTEBOOK, ["crop_queries"])


def reranking_settings(settings: Settings) -> RerankingSettings:
    """The settings of the finished reranking stage.

    Raises SettingsError where one was given another value, StageError where the stage is not
    finished.
    """
    return settings.recorded(_stage_folder(settings, "rerank"), RerankingSettings, "06_rerank")


def _path(settings: Settings, name: str) -> str | None:
    """A path as it was set, else as the global stage recorded it; None for the run's own."""
    path = getattr(settings.run, name)
    return path if path is not None else _recorded(settings).get(name)


def _recorded(settings: Settings) -> dict[str, Any]:
    folder = _stage_folder(settings, "global")
    if not (folder / runs.MANIFEST).exists():
        return {}
    return runs.read_json(folder / runs.MANIFEST)["recorded"]


def _stage_folder(settings: Settings, stage: str) -> Path:
    return runs.run_folder(settings.run.run_dir) / settings.run.dataset / stage
