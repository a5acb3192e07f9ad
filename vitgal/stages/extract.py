"""The stage of notebook 05: local features of the short lists."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vitgal import engines, runs
from vitgal.data import revisited
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.models.inference import weights_fingerprint
from vitgal.models.local_features import require_codes
from vitgal.retrieval import shortlists
from vitgal.settings.sections import LocalSettings
from vitgal.stages.cluster import OnCluster, _engine, _shards_on_cluster
from vitgal.stages.images import Job, Runner, _refuse_failures, _report, query_jobs
from vitgal.stages.shards import Piece, _refuse_other_precision, _shard_outputs, _whole, shards_of

GLOBAL_NOTEBOOK = "04_global_evaluation"


def extract_shortlist(
    run: Path,
    *,
    dataset: str,
    data_folder: Path,
    model: Path | str,
    size: int = 512,
    scales: Sequence[float] = LocalSettings.scales,
    max_keypoints: int = 1000,
    nms_candidates: int = 1200,
    nms_overlap: float = 0.5,
    target_per_scale: float = 400,
    ladder: Sequence[float] = LocalSettings.ladder,
    interpolation: str = "size",
    crop_queries: bool = True,
    batch_size: int = 8,
    precision: str = "fp32",
    dtype: str = "float16",
    shard_size: int = 256,
    distractors: Path | None = None,
    distractor_list: Path | None = None,
    max_failed_share: float = 0.001,
    seed: int = 0,
    threads: int | None = None,
    workers: int = 4,
    device: str | None = None,
    worker: int = 0,
    worker_count: int = 1,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Extracts the local features that reranking needs: `<run>/<dataset>/local`, a FeatureStore.

    Exactly the queries (their crops) and the database images (whole) that the global stage's
    shortlist.txt names. Prints how much space they will take at most.

    Args:
        dtype: how descriptors are stored, see `store.encode`.
        shard_size: images a shard. A killed stage continues with the first shard that is missing;
            of a damaged one the images that are whole are kept.
        max_failed_share: share of images that may fail to decode; they are left out of the store.
        worker, worker_count: several processes, on one machine or on several that share the folder,
            may extract together: number `worker` writes shards worker, worker + worker_count, ….
            The result does not depend on it. The last to be done finishes the stage.
        size … interpolation: see `extract_local`.  All others: see `evaluate_global`.
    Returns:
        The stage's folder; `FeatureStore.open` reads it.
    Raises:
        StageError: the global stage is missing, the folder holds other settings, a query or too
            many images cannot be read, or this worker is done and others are not.
        FileNotFoundError, ValueError: as `evaluate_global`; a model without autoencoder.
    """
    engines.check_engine(engine, ray_address)
    data = revisited.open_dataset(
        dataset, data_folder, distractors=distractors, distractor_list=distractor_list
    )
    chosen = run / dataset / "global"
    listed = runs.output_fingerprint(chosen, "shortlist.txt", GLOBAL_NOTEBOOK)
    jobs = shortlist_jobs(data, chosen / "shortlist.txt", crop_queries)
    options = dict(scales=scales, max_keypoints=max_keypoints, nms_candidates=nms_candidates)
    options |= dict(nms_overlap=nms_overlap, target_per_scale=target_per_scale, ladder=ladder)
    options |= dict(interpolation=interpolation)
    parameters = options | dict(size=size, crop_queries=crop_queries, precision=precision)
    parameters |= dict(dtype=dtype, shard_size=shard_size)
    inputs = {"shortlist": listed, "images": _jobs_fingerprint(jobs)}
    inputs |= {"weights": weights_fingerprint(model, seed=seed)}
    how = dict(seed=seed, threads=threads, device=device, precision=precision)
    how |= dict(size=size, resize="area", batch_size=batch_size, workers=workers)
    shards = dict(dtype=dtype, shard_size=shard_size, options=options)
    shards |= dict(limit=max_failed_share, disable=not progress)
    slot = runs.WorkerSlot(worker, worker_count)
    opening = dict(parameters=parameters, inputs=inputs, overwrite=overwrite)
    with runs.stage(run / dataset / "local", "local", repair=True, slot=slot, **opening) as stage:
        if stage.finished and (opened := _opened(stage)) is not None:
            _announce(opened.code_dim, len(jobs), parameters)
            _report(opened.failures, len(jobs))
            return stage.folder
        with _engine(engine, ray_address, model, how) as runner:
            _announce(require_codes(runner.model), len(jobs), parameters)
            _write_shards(runner, jobs, stage.folder, slot=slot, **shards)
            made = _shard_format(runner, dtype)
            recorded = runner.recorded()
        _refuse_unfinished(stage.folder, jobs, shard_size, slot, made)
        index = store.write_index(stage.folder)  # first: with it the store is opened at once
        failed = store.FeatureStore.open(stage.folder).failures
        _refuse_failures(_listed(failed), len(jobs), max_failed_share)
        recorded |= dict(images=len(jobs), failed=len(failed))
        stage.finish(_shard_outputs(stage.folder) + index, **recorded)
        _report(failed, len(jobs))
        return stage.folder


def _opened(stage: runs.Stage) -> store.FeatureStore | None:
    """A finished stage's store; None, and the stage reopened, where a shard is torn or gone."""
    try:
        for shard in store.shard_folders(stage.folder):
            store.Shard.open(shard)
        return store.FeatureStore.open(stage.folder)
    except (store.StoreError, FileNotFoundError) as error:
        print(error)
        stage.reopen()
        return None


def _refuse_unfinished(
    folder: Path,
    jobs: Sequence[Job],
    shard_size: int,
    slot: runs.WorkerSlot,
    made: store.ShardFormat,
) -> None:
    """StageError where shards of other workers are missing or damaged; these are read whole."""
    keys = [job.key for job in jobs]
    wanted, mine = (shards_of(folder, keys, shard_size, some) for some in (runs.ALONE, slot))
    theirs = {where: names for where, names in wanted.items() if where not in mine}
    missing = [where.name for where in theirs if not where.exists()]
    if missing:
        raise runs.StageError(
            f"worker {slot.number} has written its shards of {folder}; {len(missing)} of "
            f"{len(wanted)} ({missing[0]}, ...) are for other workers: the last of them finishes "
            "the stage; if none is at work, run this again with worker_count=1"
        )
    for where in theirs:
        _refuse_other_precision(where, made.settings["precision"])
    damaged = [where.name for where, names in theirs.items() if not _whole(where, names, made)]
    if damaged:
        raise runs.StageError(
            f"worker {slot.number} has written its shards of {folder}; of the other workers' "
            f"{len(damaged)} ({damaged[0]}, ...) are damaged: run this again with worker_count=1"
        )


def _listed(failed: Mapping[str, str]) -> list[dict]:
    return [{"name": name, "reason": reason} for name, reason in failed.items()]


def shortlist_jobs(data: RetrievalDataset, path: Path, crop: bool) -> list[Job]:
    """All queries of a data set and the database images that a shortlist.txt names, by key."""
    paths = dict(zip(data.database, data.database_paths, strict=True))
    names = {name for found in shortlists.read_shortlist(path).values() for name in found}
    unknown = sorted(names - set(paths))
    if unknown:
        raise runs.StageError(
            f"{path} names {unknown[0]}, which {data.name} lacks: run {GLOBAL_NOTEBOOK} again"
        )
    queries = query_jobs(data, crop)
    return sorted(queries + [Job(name, paths[name]) for name in names], key=lambda job: job.key)


def _jobs_fingerprint(jobs: Sequence[Job]) -> str:
    images = runs.fingerprint_images([job.key for job in jobs], [job.path for job in jobs])
    return runs.fingerprint([images, [job.box for job in jobs]])


def _announce(code_dim: int, images: int, parameters: dict) -> None:
    """Prints the greatest size that the store can have; the same when the stage is reused."""
    most, dtype = parameters["max_keypoints"], parameters["dtype"]
    size = store.forecast(images, most, code_dim, dtype)
    shown = f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"
    print(
        f"local features of {images:,} images, {len(parameters['scales'])} scales, {dtype}: "
        f"at most {shown} ({most:,} features an image, descriptors of {code_dim} values)"
    )


def _write_shards(
    runner: "Runner | OnCluster",
    jobs: Sequence[Job],
    folder: Path,
    *,
    dtype: str,
    shard_size: int,
    options: dict,
    limit: float,
    slot: runs.WorkerSlot = runs.ALONE,
    disable: bool = True,
) -> None:
    """Writes those of a worker's shards that are missing or damaged."""
    by_key = {job.key: job for job in jobs}
    made = _shard_format(runner, dtype)
    if slot == runs.ALONE:
        store.clear_partial(folder)
    failures, missing = [], {}
    mine = shards_of(folder, [job.key for job in jobs], shard_size, slot)
    for where, keys in mine.items():
        _refuse_other_precision(where, runner.precision)
        if shard := store.whole_shard(where, keys, made):
            failures += shard.failures
        else:
            missing[where] = keys
    total, todo = (sum(map(len, parts.values())) for parts in (mine, missing))
    bar = dict(total=total, initial=total - todo, desc="extracting", disable=disable)
    pieces = [Piece(where, [by_key[key] for key in keys]) for where, keys in missing.items()]
    make = _shards_on_cluster if isinstance(runner, OnCluster) else _shards_here
    with contextlib.closing(make(runner, pieces, made, options, bar)) as written:
        for failed in written:
            failures += failed
            _refuse_failures(failures, len(jobs), limit)
    if slot == runs.ALONE:
        store.clear_partial(folder)


def _shard_format(runner: "Runner | OnCluster", dtype: str) -> store.ShardFormat:
    return store.ShardFormat(dtype, runner.model.code_dim, {"precision": runner.precision})


def _shards_here(
    runner: Runner, pieces: Sequence[Piece], made: store.ShardFormat, options: dict, bar: dict
) -> Iterator[list[dict]]:
    """Writes one shard after the other; yields the failures of each."""
    todo = [job for piece in pieces for job in piece.jobs]
    with runner.stream(todo, **bar) as results:
        for piece in pieces:
            kept = piece.salvaged(made)
            block = itertools.islice(results, len(piece.jobs))
            items, failed = runner.local_items(block, piece.keys, kept, **options)
            piece.refuse_failed_query(failed)
            store.write_shard(piece.where, items, made, failures=failed)
            yield failed
