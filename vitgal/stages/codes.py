"""The codes of a timm network's tokens: fitted to images of no benchmark, kept in the run.

`<run>/codes` is a stage: its codes belong to one network, one block and one choice of images.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import photographs, splits
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.codes import CodeError, Codes, Moments, check_code_dim
from vitgal.models.inference import weights_input
from vitgal.models.timm_networks import TimmSource
from vitgal.settings import LocalSettings, MachineSettings
from vitgal.stages.images import ImageTask, refuse_failures
from vitgal.stages.local_describer import LocalDescriber, open_local

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
    progress: bool = True,
) -> Path | None:
    """Fits the codes for a data set's local features, see `fit_codes`, or finds them in the run.

    Returns None where none are needed: for a ViTGaL, and for features that are no tokens. Raises as
    `code_tasks`, `refuse_benchmark` and `fit_codes`.
    """
    if not settings.own_tokens or TimmSource.parse(model) is None:
        return None
    tasks = code_tasks(run, settings, image_folder)
    refuse_benchmark(tasks, dataset)
    return fit_codes(
        run, tasks, settings, machine, model=model, overwrite=overwrite, progress=progress
    )


def refuse_benchmark(tasks: Sequence[ImageTask], dataset: RetrievalDataset) -> None:
    """Raises CodeError where an image to fit is one of a benchmark's, as a file or by content."""
    labelled = len(dataset.ground_truth.database)
    benchmark_files = {*dataset.query_paths, *dataset.database_paths[:labelled]}
    benchmark_files = {Path(path).resolve() for path in benchmark_files}
    sizes = {path.stat().st_size for path in benchmark_files}
    same_size = [task for task in tasks if task.path.stat().st_size in sizes]
    contents: set[str] = set()
    if same_size:
        wanted = {task.path.stat().st_size for task in same_size}
        contents = {runs.fingerprint_file(p) for p in benchmark_files if p.stat().st_size in wanted}
    for task in same_size:
        if task.path.resolve() in benchmark_files or runs.fingerprint_file(task.path) in contents:
            raise CodeError(
                f"{task.path} is an image of {dataset.name}: codes must not be fitted to the "
                "images that they are tested on; set code_images to another folder"
            )


def fit_codes(
    run: Path,
    tasks: Sequence[ImageTask],
    settings: LocalSettings,
    machine: MachineSettings,
    *,
    model: Path | str,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Fits the codes of a timm network's tokens: `<run>/codes/codes.npz`; returns the file.

    The tokens are those that would become features. Processes that fit the same codes wait for one
    another, and one of them computes.

    Args:
        tasks: the images, see `code_tasks`.
        model: "timm:NAME" or "timm:NAME@FILE".
    Raises:
        StageError: the folder holds other codes, or too many images cannot be read.
        CodeError, NetworkError, FileNotFoundError: `code_dim`, the block or the weights do not fit.
    """
    parameters = settings.compared() | {"block": settings.block, "code_dim": settings.code_dim}
    unused = ("crop_queries", "dtype", "shard_size")
    files = runs.images_input([task.key for task in tasks], [task.path for task in tasks])
    with (
        runs.waiting(run / "codes"),
        runs.stage(
            run / "codes",
            "codes",
            parameters={name: parameters[name] for name in parameters if name not in unused},
            inputs={"images": files, "weights": weights_input(model)},
            overwrite=overwrite,
        ) as stage,
    ):
        if stage.finished:
            _report(stage.folder)
            return stage.folder / FILE
        with open_local(model, settings, machine) as describer:
            network = describer.model
            code_dim = settings.code_dim
            if code_dim == LocalSettings.code_dim:  # the default fits every network
                code_dim = min(code_dim, network.code_dim)
            check_code_dim(code_dim, network.code_dim)
            moments, failures = _moments(describer, tasks, progress=progress)
            moments.codes(code_dim).save(stage.folder / FILE)
            facts = {
                "block": network.block,
                "images": len(tasks),
                "failed": failures,
                "features": moments.count,
                "code_dim": code_dim,
            }
            stage.finish([FILE], describer.recorded() | facts)
        _report(stage.folder)
        return stage.folder / FILE


def _moments(
    describer: LocalDescriber, tasks: Sequence[ImageTask], *, progress: bool
) -> tuple[Moments, int]:
    """Returns the moments of the images' features, and the number of images that failed."""
    moments, failures = Moments(describer.code_dim), []
    bar = tqdm(total=len(tasks), desc="fitting codes", unit="image", disable=not progress)
    with bar, describer.stream(tasks, bar) as images:
        for start in range(0, len(tasks), BLOCK):
            keys = [task.key for task in tasks[start : start + BLOCK]]
            block = itertools.islice(images, len(keys))
            items, failed = describer.local_items(block, keys, {})
            failures += failed
            refuse_failures(failures, len(tasks), describer.settings.max_failed_share)
            for _, features in items:
                moments.add(features.descriptors)
    return moments, len(failures)


def _report(folder: Path) -> None:
    """Prints what codes were fitted to; a reused stage prints the same."""
    facts = runs.read_record(folder / runs.MANIFEST)["recorded"]
    print(
        f"codes of {facts['code_dim']} values: fitted to {facts['features']:,} tokens of "
        f"{facts['block']} in {facts['images'] - facts['failed']:,} images"
    )


def read_codes(run: Path, fingerprint: str) -> Codes:
    """Reads the codes of a run; StageError where they are others than those of `fingerprint`."""
    current = runs.output_fingerprint(run / "codes", FILE, "05_local_extraction")
    if current != fingerprint:
        raise runs.StageError(
            f"{run / 'codes'} holds other codes than the local features were made with: run "
            "05_local_extraction with overwrite, or use another run_dir"
        )
    return Codes.load(run / "codes" / FILE)
