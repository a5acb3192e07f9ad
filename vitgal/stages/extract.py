"""The stage of notebook 05: local features of queries and short lists, written shard by shard."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.features.codes import Codes
from vitgal.features.feature_file import FeatureFile
from vitgal.models.sources import weights_input
from vitgal.retrieval import shortlists
from vitgal.settings import LocalSettings, MachineSettings
from vitgal.stages.codes import dataset_codes
from vitgal.stages.file_describer import FileDescriber
from vitgal.stages.images import (
    ImageTask,
    ShardTask,
    query_tasks,
    recorded_paths,
    refuse_failures,
    report_failures,
    shard_tasks,
)

if TYPE_CHECKING:
    from vitgal.stages.local_describer import LocalDescriber

GLOBAL_NOTEBOOK = "04_global_evaluation"
# Files of a shard that are hashed when the stage ends and when it is reused. The large arrays
# are checked by length on opening, and byte for byte by the checksums in checksums.npy.
SHARD_OUTPUTS = ("items.json", "failures.json", "offsets.npy", "checksums.npy")


def extract_shortlist(
    run: Path,
    dataset: RetrievalDataset,
    settings: LocalSettings,
    machine: MachineSettings,
    *,
    model: Path | str,
    image_folder: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Extracts the local features that reranking needs: `<run>/<dataset>/local`, a FeatureStore.

    It holds the queries (cropped) and the images (whole) of the global stage's shortlist.txt
    without those that cannot be decoded. Of several processes each `machine.worker` writes its part
    of the shards; the last finishes the stage. A second run writes missing and damaged shards.

    Args:
        model: a weight file with autoencoder, "untrained:<architecture>", or a network of timm,
            whose tokens' codes are fitted first, see `dataset_codes`. Only tokens need a model.
        image_folder: of the run's training images, see `code_tasks`.
    Raises:
        DescriptorError, CodeError: a file of local features, or codes, that cannot be used.
        StageError: the global stage is missing, the folder holds other settings, a query or too
            many images cannot be read, or other workers are not done.
        FileNotFoundError, ValueError: the weights are missing, invalid or without autoencoder.
    """
    engines.check_engine(machine.engine)
    slot = runs.WorkerSlot(machine.worker, machine.worker_count)
    source = run / dataset.name / "global"
    shortlist = runs.output_fingerprint(source, "shortlist.txt", GLOBAL_NOTEBOOK)
    images = shortlist_tasks(dataset, source / "shortlist.txt", settings.crop_queries)
    codes = dataset_codes(
        run,
        dataset,
        settings,
        machine,
        model=model,
        image_folder=image_folder,
        overwrite=overwrite and slot == runs.ALONE,
    )
    inputs = {"shortlist": shortlist, "images": _images_input(images, verify=dataset.verify)}
    with runs.stage(
        run / dataset.name / "local",
        "local",
        parameters=_parameters(settings, codes),
        inputs=inputs | _method_inputs(settings, model, codes),
        overwrite=overwrite,
        repair=True,
        slot=slot,
    ) as stage:
        if stage.finished and _report_finished(stage, len(images), settings):
            return stage.folder
        with _open_describer(model, settings, machine, images, codes) as describer:
            _announce(describer.code_dim, len(images), settings)
            shards = _shards(stage.folder, images, settings, describer)
            write_shards(describer, shards, slot, settings.max_failed_share)
            recorded = describer.recorded()
            recorded |= recorded_paths(run, dataset, model if settings.own_tokens else None)
        recorded |= {"code_images": settings.code_images} if codes else {}
        return _finish(stage, shards, slot, settings.max_failed_share, recorded)


def _finish(
    stage: runs.Stage,
    shards: Sequence[ShardTask],
    slot: runs.WorkerSlot,
    max_failed_share: float,
    recorded: dict[str, Any],
) -> Path:
    """Writes the store's index and the manifest; returns the stage's folder.

    Raises StageError where other workers are not done, or too many images failed.
    """
    _refuse_unfinished(stage.folder, shards, slot)
    count = sum(len(shard.images) for shard in shards)
    index = store.write_index(stage.folder)  # first: the store opens faster with it
    failures = store.FeatureStore.open(stage.folder).failures
    listed = [{"name": name, "reason": reason} for name, reason in failures.items()]
    refuse_failures(listed, count, max_failed_share)
    outputs = [f"{shard.folder.name}/{name}" for shard in shards for name in SHARD_OUTPUTS]
    stage.finish(outputs + index, recorded | {"images": count, "failed": len(failures)})
    report_failures(failures, count)
    return stage.folder


def _parameters(settings: LocalSettings, codes: Path | None) -> dict[str, Any]:
    """The parameters of the stage; `code_dim` is a model's own without fitted codes."""
    parameters = settings.compared()
    if codes is None:
        parameters.pop("code_dim", None)
    return parameters


def _shards(
    folder: Path,
    images: Sequence[ImageTask],
    settings: LocalSettings,
    describer: "LocalDescriber | FileDescriber",
) -> list[ShardTask]:
    precision = {"precision": describer.precision}
    shard_format = store.ShardFormat(settings.dtype, describer.code_dim, precision)
    return shard_tasks(folder, images, settings.shard_size, shard_format)


def _images_input(images: Sequence[ImageTask], *, verify: bool) -> runs.Input:
    """The input that stands for the photographs and their boxes."""
    boxes = [task.box for task in images]
    names, paths = [task.key for task in images], [task.path for task in images]
    files = runs.images_input(names, paths, verify=verify)
    return runs.combined_input([files], lambda part: [part, boxes])


def _method_inputs(
    settings: LocalSettings, model: Path | str, codes: Path | None
) -> dict[str, str | runs.Input]:
    """The inputs of the stage that depend on the method, by name."""
    if settings.local_features is not None:
        path = runs.resolve(settings.local_features)
        if not path.is_file():
            raise FileNotFoundError(f"there are no local features {path}: hloc's .h5")
        return {"local features": runs.file_input(path)}
    if not settings.own_tokens:
        from vitgal.models.local_extractors import extractor_inputs  # imports torch

        return extractor_inputs(settings)
    inputs = {"weights": weights_input(model)}
    return inputs if codes is None else inputs | {"codes": runs.fingerprint_file(codes)}


def _open_describer(
    model: Path | str,
    settings: LocalSettings,
    machine: MachineSettings,
    images: Sequence[ImageTask],
    codes: Path | None,
) -> "contextlib.AbstractContextManager[LocalDescriber | FileDescriber]":
    if settings.local_features is None:
        from vitgal.stages.ray_describer import open_describer  # imports torch

        return open_describer(model, settings, machine, codes and Codes.load(codes))
    path = runs.resolve(settings.local_features)
    file = FeatureFile.open(path, [task.key for task in images])
    print(f"{path.name}: positions are pixels of the photographs, and threshold counts these")
    return contextlib.nullcontext(FileDescriber(file, settings))


def shortlist_tasks(dataset: RetrievalDataset, path: Path, crop: bool) -> list[ImageTask]:
    """Lists all queries, cropped or not, and the images that a shortlist.txt names, by key.

    Raises StageError for an image that the dataset lacks.
    """
    names = {name for names in shortlists.read_shortlist(path).values() for name in names}
    positions = {name: at for at, name in enumerate(dataset.database) if name in names}
    if unknown := sorted(names - set(positions)):
        raise runs.StageError(
            f"{path} names {unknown[0]}, which {dataset.name} lacks: run {GLOBAL_NOTEBOOK} again"
        )
    database = [ImageTask(name, dataset.database_paths[at]) for name, at in positions.items()]
    return sorted(query_tasks(dataset, crop) + database, key=lambda task: task.key)


def write_shards(
    describer: "LocalDescriber | FileDescriber",
    shards: Sequence[ShardTask],
    slot: runs.WorkerSlot,
    max_failed_share: float,
) -> None:
    """Writes those of a worker's shards that are missing or damaged, out of all workers' shards.

    Raises StageError where a query or too many images cannot be read, or a shard on disk was
    written in another precision.
    """
    store_folder = shards[0].folder.parent
    if slot == runs.ALONE:
        store.clear_partial(store_folder)
    own = [shards[index] for index in slot.indices(len(shards))]
    missing, failures = [], []
    for shard in own:
        shard.refuse_other_precision()
        if written := shard.written():
            failures += written.failures
        else:
            if shard.folder.exists():
                print(f"{runs.printable(shard.folder)} is damaged: it is made again")
            missing.append(shard)
    count, total, left = (
        sum(len(shard.images) for shard in part) for part in (shards, own, missing)
    )
    bar = tqdm(total=total, initial=total - left, desc="extracting", unit="image")
    with bar, contextlib.closing(describer.write_shards(missing, bar)) as results:
        for failed in results:
            failures += failed
            refuse_failures(failures, count, max_failed_share)
    if slot == runs.ALONE:
        store.clear_partial(store_folder)


def _report_finished(stage: runs.Stage, count: int, settings: LocalSettings) -> bool:
    """Prints a finished stage's report; reopens the stage if a shard is damaged or missing."""
    try:
        for shard in store.shard_folders(stage.folder):
            store.Shard.open(shard)
        features = store.FeatureStore.open(stage.folder)
    except (store.StoreError, FileNotFoundError) as error:
        print(runs.printable(error))
        stage.reopen()
        return False
    _announce(features.code_dim, count, settings)
    report_failures(features.failures, count)
    return True


def _refuse_unfinished(folder: Path, shards: Sequence[ShardTask], slot: runs.WorkerSlot) -> None:
    own = set(slot.indices(len(shards)))
    others = [shard for index, shard in enumerate(shards) if index not in own]
    done = f"worker {slot.number} has written its shards of {folder}"
    if missing := [shard.folder.name for shard in others if not shard.folder.exists()]:
        raise runs.StageError(
            f"{done}; {len(missing)} of {len(shards)} ({missing[0]}, ...) are for other workers: "
            "the last of them finishes the stage; if no other worker runs, run this again with "
            "worker_count=1"
        )
    for shard in others:
        shard.refuse_other_precision()
    if damaged := [shard.folder.name for shard in others if shard.written() is None]:
        raise runs.StageError(
            f"{done}; of the other workers' {len(damaged)} ({damaged[0]}, ...) are damaged: run "
            "this again with worker_count=1"
        )


def _announce(code_dim: int, count: int, settings: LocalSettings) -> None:
    """Prints the largest size that the store can have; a reused stage prints the same."""
    size = store.forecast(count, settings.max_keypoints, code_dim, settings.dtype)
    readable = f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"
    method = f"{len(settings.scales)} scales" if settings.own_tokens else settings.method
    print(
        f"local features of {count:,} images, {method}, {settings.dtype}: "
        f"at most {readable} ({settings.max_keypoints:,} features an image, descriptors of "
        f"{code_dim} values)"
    )
