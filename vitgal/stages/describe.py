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
from vitgal.stages.images import (
    ImageTask,
    query_tasks,
    recorded_paths,
    refuse_failed_query,
    refuse_failures,
    report_failures,
)
from vitgal.stages.rankings import global_outputs, write_rankings
from vitgal.stages.ray_describer import ImageDescriber, open_describer

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

    A Ray cluster runs one process a GPU, or without GPUs one for every `threads` CPUs. Another
    number of threads changes the last bits of the result.

    Args:
        run: the run folder.
        model: a weight file, or "untrained:<architecture>" for seeded random weights.
        folder: the stage's folder below `<run>/<dataset>/`; later notebooks read "global".
    Returns:
        The stage's folder with database.npy (N, D) and queries.npy (Q, D) float32, names.json,
        ranks.npy (K, Q) int32, similarities.npy (K, Q) float32, positions.npz, shortlist.txt,
        scores.json and failures.json. After a kill it continues at the last checkpoint.
    Raises:
        StageError: the folder holds other settings, or a query or too many images cannot be read.
        FileNotFoundError, ValueError: the weights are missing or invalid.
    """
    engines.check_engine(machine.engine, machine.ray_address)
    with runs.stage(
        run / dataset.name / folder,
        "global",
        parameters=settings.compared(),
        inputs={"dataset": dataset.as_input, "weights": weights_input(model)},
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
            file = stage.folder / "database.npy"
            rows = _describe_database(describer, dataset, file, settings, progress=progress)
            recorded = describer.recorded() | recorded_paths(run, dataset, model)
        protocol = {"crop_queries": settings.crop_queries, "resize": settings.resize}
        protocol |= {"scales": settings.scales, "precision": describer.precision}
        write_rankings(stage, dataset, settings, queries, file, protocol, rows.failures)
        recorded |= {"images": count, "failed": len(rows.failures)}
        stage.finish(global_outputs(settings), recorded)
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
    file: Path,
    settings: GlobalSettings,
    *,
    progress: bool,
) -> store.RowFile:
    """Describes the database into a file, block by block, from the last checkpoint on."""
    count, precision = len(dataset.database), {"precision": describer.precision}
    rows = store.RowFile.open(file, (count, describer.model.embed_dim), settings=precision)
    start = rows.rows
    images = zip(dataset.database[start:], dataset.database_paths[start:], strict=True)
    tasks = [ImageTask(name, path) for name, path in images]
    blocks = [tasks[first : first + BLOCK] for first in range(0, len(tasks), BLOCK)]
    bar = tqdm(total=count, initial=start, desc="describing", unit="image", disable=not progress)
    with bar, contextlib.closing(describer.describe_blocks(blocks, bar)) as described:
        for block, failures in described:
            rows.append(block, failures)
            refuse_failures(rows.failures, count, settings.max_failed_share)
    rows.finish()
    return rows
