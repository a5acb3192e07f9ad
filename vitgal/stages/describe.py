"""The stage of notebook 04: global descriptors, rankings and scores."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.models.inference import weights_input
from vitgal.retrieval import faiss_index
from vitgal.settings import GlobalSettings, MachineSettings
from vitgal.stages.describers import ImageDescriber, open_describer
from vitgal.stages.images import (
    ImageTask,
    query_tasks,
    recorded_paths,
    refuse_failed_query,
    refuse_failures,
    report_failures,
)
from vitgal.stages.rankings import global_outputs, write_rankings

BLOCK = 256  # images between two checkpoints


def evaluate_global(
    run: Path,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    machine: MachineSettings,
    *,
    model: Path | str,
    folder: str = "global",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Ranks a benchmark's database for its queries and scores the ranking.

    On a Ray cluster one process a GPU describes, without GPUs one for every `threads` (None: 1)
    CPUs. The result is that of one machine with the same threads; with others sums differ in their
    last bits.

    Args:
        run: the run folder.
        model: a weight file, or "untrained:<architecture>" for seeded random weights.
        folder: the stage's folder below `<run>/<dataset>/`, "global" for later notebooks.
    Returns:
        The stage's folder with database.npy (N, D) and queries.npy (Q, D) float32, names.json,
        ranks.npy (K, Q) int32, similarities.npy (K, Q) float32, positions.npz, shortlist.txt,
        scores.json and failures.json. After a kill it continues at the last checkpoint.
    Raises:
        StageError: the folder holds other settings, or a query or too many images cannot be read.
        FileNotFoundError, ValueError: the weights are missing or invalid.
    """
    engines.check_engine(machine.engine, machine.ray_address)
    inputs = {"dataset": dataset.as_input, "weights": weights_input(model)}
    with runs.stage(
        run / dataset.name / folder,
        "global",
        parameters=settings.compared(),
        inputs=inputs,
        overwrite=overwrite,
    ) as stage:
        count = len(dataset.database)
        if stage.finished:
            report_failures(runs.read_json(stage.folder / "failures.json"), count)
            return stage.folder
        with open_describer(model, settings, machine) as describer:
            if settings.index is not None:
                faiss_index.check(settings.index, describer.model.embed_dim, count)
            queries = _describe_queries(describer, query_tasks(dataset, settings.crop_queries))
            path = stage.folder / "database.npy"
            rows = _describe_database(
                describer, dataset, path, settings.max_failed_share, progress=progress
            )
            recorded = describer.recorded()
        protocol = {
            "crop_queries": settings.crop_queries,
            "resize": settings.resize,
            "scales": settings.scales,
            "precision": describer.precision,
        }
        write_rankings(
            stage, dataset, settings, queries, path, failures=rows.failures, protocol=protocol
        )
        recorded |= {"images": count, "failed": len(rows.failures)}
        recorded |= recorded_paths(run, dataset, model)
        stage.finish(global_outputs(settings), **recorded)
        rows.forget()
        report_failures(rows.failures, count)
        return stage.folder


def _describe_queries(describer: ImageDescriber, tasks: Sequence[ImageTask]) -> np.ndarray:
    with tqdm(disable=True) as bar:
        ((rows, failures),) = describer.describe_blocks([tasks], bar)
    refuse_failed_query(failures)
    return rows


def _describe_database(
    describer: ImageDescriber,
    dataset: RetrievalDataset,
    path: Path,
    max_failed_share: float,
    *,
    progress: bool,
) -> store.RowFile:
    """Describes the database into `path`, block by block, from the last checkpoint on."""
    count = len(dataset.database)
    shape, precision = (count, describer.model.embed_dim), describer.precision
    rows = store.RowFile.open(path, shape, settings={"precision": precision})
    database = zip(dataset.database[rows.rows :], dataset.database_paths[rows.rows :], strict=True)
    tasks = [ImageTask(name, image) for name, image in database]
    blocks = [tasks[start : start + BLOCK] for start in range(0, len(tasks), BLOCK)]
    with (
        tqdm(
            total=count, initial=rows.rows, desc="describing", unit="image", disable=not progress
        ) as bar,
        contextlib.closing(describer.describe_blocks(blocks, bar)) as described,
    ):
        for block, failures in described:
            rows.append(block, failures)
            refuse_failures(rows.failures, count, max_failed_share)
    rows.finish()
    return rows
