"""The stage of notebook 04: global descriptors, rankings and scores."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitgal import engines, runs
from vitgal.data import revisited
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.models.descriptors import _check_scales
from vitgal.models.inference import weights_fingerprint
from vitgal.retrieval import faiss_index
from vitgal.stages import rankings
from vitgal.stages.cluster import OnCluster, _cluster_rows, _engine
from vitgal.stages.images import (
    BLOCK,
    Job,
    Runner,
    _refuse_failed_query,
    _refuse_failures,
    _report,
    query_jobs,
)


def evaluate_global(
    run: Path,
    *,
    dataset: str,
    data_folder: Path,
    model: Path | str,
    folder: str = "global",
    size: int = 512,
    resize: str = "squash",
    scales: Sequence[float] = (1.0,),
    crop_queries: bool = True,
    batch_size: int = 16,
    precision: str = "fp32",
    top: int = 100,
    display: int = 1000,
    index: str | None = None,
    distractors: Path | None = None,
    distractor_list: Path | None = None,
    max_failed_share: float = 0.001,
    seed: int = 0,
    threads: int | None = None,
    workers: int = 4,
    device: str | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Ranks a benchmark's database for its queries and scores that: `<run>/<dataset>/global`.

    Args:
        run: the run folder (`runs.run_folder`).
        dataset, data_folder: the benchmark's name, and the folder of `jpg/` and `gnd_<name>.pkl`.
        model: a weight file, or "untrained:<architecture>" for random weights drawn with `seed`.
        folder: the stage's name below `<run>/<dataset>/`; another one keeps another model's result.
        crop_queries: describe the query's box alone, as the protocol demands; False describes the
            whole photograph (marked ^ in the paper).
        top: length of the short lists.  display: ranks kept for display, more if short lists need.
        index: None searches exactly; else a faiss index (`approximate.check`), kept in the stage,
            finds the beginning of every ranking. The scores are then those of that ranking; the
            exact ones and the index's recall stand beside them.
        distractors, distractor_list: see `revisited.open_dataset`.
        max_failed_share: share of database images that may fail to decode; they rank last.
        threads: torch's CPU threads.  workers: decoding threads.
        engine, ray_address: "local", or "ray": on a Ray cluster (see `engines.connected`). One
            process a GPU describes, without GPUs one for every `threads` (None: 1) CPUs. Where
            threads are the same the result is too; else sums differ in their last bits.
        size, resize, scales, batch_size, precision: see `extract_global`.
    Returns:
        The stage's folder, with database.npy (N, D) and queries.npy (Q, D) float32, names.json,
        ranks.npy (K, Q) int32, similarities.npy (K, Q) float32, positions.npz, shortlist.txt,
        scores.json and failures.json. Killed and run again it continues after the last 256 images.
    Raises:
        StageError: the folder holds other settings, a query or too many images cannot be read.
        FileNotFoundError, ValueError: data set or weights are missing or not what they should be.
    """
    _check_scales(scales)
    engines.check_engine(engine, ray_address)
    data = revisited.open_dataset(
        dataset, data_folder, distractors=distractors, distractor_list=distractor_list
    )
    parameters = dict(size=size, resize=resize, scales=scales, crop_queries=crop_queries)
    parameters |= dict(precision=precision, top=top, display=display)
    parameters |= {} if index is None else {"index": index}
    inputs = {"dataset": data.fingerprint, "weights": weights_fingerprint(model, seed=seed)}
    how = dict(seed=seed, threads=threads, device=device, precision=precision)
    how |= dict(size=size, resize=resize, batch_size=batch_size, workers=workers)
    with runs.stage(
        run / dataset / folder, "global", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            _report(runs.read_json(stage.folder / "failures.json"), len(data.database))
            return stage.folder
        with _engine(engine, ray_address, model, how) as runner:
            if index is not None:
                faiss_index.check(index, runner.model.embed_dim, len(data.database))
            jobs, path = query_jobs(data, crop_queries), stage.folder / "database.npy"
            limits = dict(share=max_failed_share, disable=not progress)
            if isinstance(runner, OnCluster):
                queries, rows = _cluster_rows(runner, jobs, data, path, scales, **limits)
            else:
                queries = _query_rows(runner, jobs, scales)
                rows = _database_rows(runner, data, path, scales, **limits)
            recorded = runner.recorded()
        protocol = {key: parameters[key] for key in ("crop_queries", "resize", "scales")}
        protocol |= {"precision": recorded["precision"]}
        rankings.write_rankings(
            stage, data, queries, rows.path, failures=rows.failures, protocol=protocol
        )
        recorded |= dict(images=len(data.database), failed=len(rows.failures))
        stage.finish(rankings.global_outputs(parameters), **recorded)
        rows.forget()
        _report(rows.failures, len(data.database))
        return stage.folder


def _query_rows(runner: Runner, jobs: Sequence[Job], scales: Sequence[float]) -> np.ndarray:
    with runner.stream(jobs, disable=True) as results:
        rows, failures = runner.global_rows(results, len(jobs), scales=scales)
    _refuse_failed_query(failures)
    return rows


def _database_rows(
    runner: Runner,
    data: RetrievalDataset,
    path: Path,
    scales: Sequence[float],
    *,
    share: float,
    disable: bool,
) -> store.RowFile:
    """Describes the database block by block into `path`, from where it stands on disk."""
    number = len(data.database)
    settings = {"precision": runner.precision}
    rows = store.RowFile.open(path, (number, runner.model.embed_dim), settings=settings)
    todo = zip(data.database[rows.rows :], data.database_paths[rows.rows :], strict=True)
    jobs = (Job(name, image) for name, image in todo)
    bar = dict(total=number, initial=rows.rows, desc="describing", disable=disable)
    with runner.stream(jobs, **bar) as results:
        while rows.rows < number:
            count = min(BLOCK, number - rows.rows)
            block = itertools.islice(results, count)
            rows.append(*runner.global_rows(block, count, scales=scales))
            _refuse_failures(rows.failures, number, share)
    rows.finish()
    return rows
