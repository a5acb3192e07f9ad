"""The codes of a timm network's tokens: fitted to images of no benchmark, kept in the run.

`<run>/codes` is a stage: its codes belong to one network, one block and one choice of images.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import photographs, splits
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.codes import CodeError, Codes, Moments, check_code_dim
from vitgal.models.sources import TimmSource, weights_input
from vitgal.settings import LocalSettings, MachineSettings
from vitgal.stages.images import ImageTask, benchmark_images, refuse_failures

if TYPE_CHECKING:
    from vitgal.stages.local_describer import LocalDescriber

FILE = "codes.npz"
MAX_IMAGES = 1000  # that a fit reads, spread evenly over the sorted list
BLOCK = 64  # images whose tokens are held at once


def code_tasks(run: Path, settings: LocalSettings, image_folder: Path | None) -> list[ImageTask]:
    """Lists the images that codes are fitted to, by path, at most MAX_IMAGES of them.

    They are those of the folder `code_images`, else of the run's training split.

    image_folder: where the paths of train.csv start; None: the run's own training images. Raises
    StageError where there is no split, PhotographError for a folder without photographs.
    """
    if settings.code_images is not None:
        folder = runs.resolve(settings.code_images)
        names = photographs.list_photographs(folder).names
    else:
        folder = image_folder or runs.data_folder(run, None, "train")
        if not (run / "split" / runs.MANIFEST).exists():
            raise runs.StageError(
                "the codes of a timm network's tokens are fitted to the run's training images, and "
                f"{run} has no split: run 01_data_split first, or set code_images to a folder of "
                "photographs that the benchmark does not show"
            )
        names = sorted(splits.read_split(run / "split", "train")["path"])
    chosen = np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_IMAGES)).round())
    return [ImageTask(names[index], folder / names[index]) for index in chosen.astype(int)]


def dataset_codes(
    run: Path,
    dataset: RetrievalDataset,
    settings: LocalSettings,
    machine: MachineSettings,
    *,
    model: Path | str,
    image_folder: Path | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Fits the codes for a data set's local features: `<run>/codes/codes.npz`; returns the file.

    The tokens that are fitted to are those that would become features. Processes that fit the same
    codes wait for one another, and one of them computes. Returns None where no codes are needed:
    for a ViTGaL, and for features that are no tokens.

    image_folder: see `code_tasks`, whose errors are raised too. Raises StageError where the folder
    holds other codes or too many images cannot be read; CodeError, NetworkError, FileNotFoundError
    where an image is the benchmark's, or `code_dim`, the block or the weights do not fit.
    """
    if not settings.own_tokens or TimmSource.parse(model) is None:
        return None
    tasks = code_tasks(run, settings, image_folder)
    paths = [task.path for task in tasks]
    if shared := benchmark_images(paths, dataset):
        raise CodeError(
            f"{shared[0]} is an image of {dataset.name}: codes must not be fitted to the "
            "images that they are tested on; set code_images to another folder"
        )
    parameters = settings.compared() | {"block": settings.block, "code_dim": settings.code_dim}
    unused = ("crop_queries", "dtype", "shard_size")
    with (
        runs.waiting(run / "codes"),
        runs.stage(
            run / "codes",
            "codes",
            parameters={name: parameters[name] for name in parameters if name not in unused},
            inputs={
                "images": runs.images_input([task.key for task in tasks], paths),
                "weights": weights_input(model),
            },
            overwrite=overwrite,
        ) as stage,
    ):
        if not stage.finished:
            _fit(stage, tasks, settings, machine, model)
        facts = runs.read_record(stage.folder / runs.MANIFEST)["recorded"]
        print(
            f"codes of {facts['code_dim']} values: fitted to {facts['features']:,} tokens of "
            f"{facts['block']} in {facts['images'] - facts['failed']:,} images"
        )
        return stage.folder / FILE


def _fit(
    stage: runs.Stage,
    tasks: Sequence[ImageTask],
    settings: LocalSettings,
    machine: MachineSettings,
    model: Path | str,
) -> None:
    """Fits the codes to the images and finishes the stage."""
    from vitgal.stages.local_describer import open_local  # imports torch

    with open_local(model, settings, machine) as describer:
        network = describer.model
        code_dim = settings.code_dim
        if code_dim == LocalSettings.code_dim:  # the default fits every network
            code_dim = min(code_dim, network.code_dim)
        check_code_dim(code_dim, network.code_dim)
        moments, failures = _moments(describer, tasks)
        moments.codes(code_dim).save(stage.folder / FILE)
        facts = {
            "block": network.block,
            "images": len(tasks),
            "failed": failures,
            "features": moments.count,
            "code_dim": code_dim,
        }
        stage.finish([FILE], describer.recorded() | facts)


def _moments(describer: "LocalDescriber", tasks: Sequence[ImageTask]) -> tuple[Moments, int]:
    """Returns the moments of the images' features, and the number of images that failed."""
    moments, failures = Moments(describer.code_dim), []
    bar = tqdm(total=len(tasks), desc="fitting codes", unit="image")
    with bar, describer.stream(tasks, bar) as images:
        for start in range(0, len(tasks), BLOCK):
            keys = [task.key for task in tasks[start : start + BLOCK]]
            block = itertools.islice(images, len(keys))
            items, failed = describer.local_items(block, keys)
            failures += failed
            refuse_failures(failures, len(tasks), describer.settings.max_failed_share)
            for _, features in items:
                moments.add(features.descriptors)
    return moments, len(failures)


def read_codes(run: Path, fingerprint: str) -> Codes:
    """Reads the codes of a run; StageError where they are others than those of `fingerprint`."""
    if runs.output_fingerprint(run / "codes", FILE, "05_local_extraction") != fingerprint:
        raise runs.StageError(
            f"{run / 'codes'} holds other codes than the local features were made with: run "
            "05_local_extraction with overwrite, or use another run_dir"
        )
    return Codes.load(run / "codes" / FILE)
