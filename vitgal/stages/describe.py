"""The stage of notebook 04: global descriptors, our own or another system's; rankings, scores."""

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import RetrievalDataset, labelled
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.scores import scores_document
from vitgal.features import store
from vitgal.features.descriptors import read_descriptors
from vitgal.features.files import map_array, read_json
from vitgal.models.inference import weights_input
from vitgal.retrieval import exact_ranks, exact_search, faiss_index, shortlists
from vitgal.retrieval.ranking import Ranking
from vitgal.settings import GlobalSettings, MachineSettings
from vitgal.stages.images import (
    ImageTask,
    query_tasks,
    recorded_paths,
    refuse_failed_query,
    refuse_failures,
    report_failures,
)
from vitgal.stages.local_describer import LocalDescriber
from vitgal.stages.ray_describer import open_describer

BLOCK = 256  # images between two checkpoints
DESCRIPTOR_SETTINGS = ("crop_queries", "top", "display", "index")  # that descriptors depend on
GLOBAL_OUTPUTS = (  # the files of a global stage
    "database.npy",
    "queries.npy",
    "names.json",
    "ranks.npy",
    "similarities.npy",
    "positions.npz",
    "shortlist.txt",
    "scores.json",
    "failures.json",
)


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

    After a kill it continues at the last checkpoint. A Ray cluster runs one process a GPU, or
    without GPUs one for every `threads` CPUs. Another number of threads changes the last bits.

    Args:
        model: a weight file, or "untrained:<architecture>" for seeded random weights.
        folder: the stage's folder below `<run>/<dataset>/`; later notebooks read "global".
    Returns:
        The stage's folder with database.npy (N, D) and queries.npy (Q, D) float32, names.json,
        ranks.npy (K, Q) int32, similarities.npy (K, Q) float32, positions.npz, shortlist.txt,
        scores.json and failures.json.
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
            report_failures(read_json(stage.folder / "failures.json", store.FAILURES), count)
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
        protocol |= training_changes(model)
        outputs = _write_rankings(stage, dataset, settings, queries, protocol, rows.failures)
        stage.finish(outputs, recorded | {"images": count, "failed": len(rows.failures)})
        rows.forget()
        report_failures(rows.failures, count)
        return stage.folder


def training_changes(model: Path | str) -> dict[str, list[str]]:
    """Returns `training_changes`: changed settings and skipped steps of the model's training.

    They are read from the trainings' changes.json; empty for a model without any.
    """
    lines = []
    for stage in ("retrieval", "autoencoder") if Path(model).name == "model.safetensors" else ():
        file = Path(model).parent.with_name(stage) / "changes.json"
        if Path(model).parent.name in ("retrieval", "autoencoder") and file.exists():
            changes = runs.read_json(file)
            lines += [
                f"{stage}, step {change['step']}: {change['setting']} {change['from']} -> "
                f"{change['to']}"
                for change in changes["changes"]
            ]
            lines += [
                f"{stage}, step {skip['step']}: skipped" for skip in changes["skipped_batches"]
            ]
        if stage == Path(model).parent.name:
            break
    return {"training_changes": lines} if lines else {}


def _describe_queries(describer: LocalDescriber, tasks: Sequence[ImageTask]) -> np.ndarray:
    with tqdm(disable=True) as bar:
        ((rows, failures),) = describer.describe_blocks([tasks], bar)
    refuse_failed_query(failures)
    return rows


def _describe_database(
    describer: LocalDescriber,
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


def evaluate_descriptors(
    run: Path,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    *,
    descriptors: Path,
    overwrite: bool = False,
) -> Path:
    """Ranks a benchmark by another system's descriptors and scores the ranking; needs no network.

    The stage `<run>/<dataset>/global` has the files of `evaluate_global`, so that local features,
    reranking and comparison follow as usual. Returns its folder.

    Args:
        settings: only `crop_queries` (whether the other system cropped the queries, recorded with
            the scores), `top`, `display` and `index` are used.
        descriptors: see `read_descriptors`.
    Raises:
        StageError: the folder holds other settings or descriptors.
        FileNotFoundError, DescriptorError: see `read_descriptors`.
    """
    descriptors = Path(descriptors)
    queries, count = dataset.ground_truth.queries, len(dataset.database)
    files = [path for path in (descriptors, descriptors.with_suffix(".txt")) if path.is_file()]
    stamp = runs.images_input([path.name for path in files], files).stamp

    @functools.cache
    def rows() -> np.ndarray:
        """Reads the descriptors, (N, D) float32: first the queries, then the database."""
        return read_descriptors(descriptors, [*queries, *dataset.database])

    compared = settings.compared()
    with runs.stage(
        run / dataset.name / "global",
        "global",
        parameters={name: compared[name] for name in DESCRIPTOR_SETTINGS if name in compared},
        inputs={
            "dataset": dataset.as_input,
            "descriptors": runs.Input(stamp, lambda: hashlib.sha256(rows().data).hexdigest()),
        },
        overwrite=overwrite,
    ) as stage:
        if stage.finished:
            return stage.folder
        if settings.index is not None:
            faiss_index.check(settings.index, rows().shape[1], count)
        runs.write_array(stage.folder / "database.npy", rows()[len(queries) :])
        protocol = {"crop_queries": settings.crop_queries, "descriptors": "made elsewhere"}
        outputs = _write_rankings(stage, dataset, settings, rows()[: len(queries)], protocol)
        return stage.finish(outputs, {"images": count} | recorded_paths(run, dataset))


def _write_rankings(
    stage: runs.Stage,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    queries: np.ndarray,
    protocol: Mapping[str, Any],
    failures: Sequence[Mapping[str, str]] = (),
) -> tuple[str, ...]:
    """Writes all files of the stage but database.npy; with an index its ranking is scored."""
    folder, truth = stage.folder, dataset.ground_truth
    database = map_array(folder / "database.npy")
    depth = shortlists.shortlist_depth(truth, len(database), top=settings.top)
    depth = max(settings.display, depth)
    similarities, ranks = exact_search.search(queries, database, k=depth)
    positions = exact_ranks.labelled_positions(queries, database, labelled(truth))
    further: dict[str, Any] = {}
    if settings.index is not None:
        further["exact"], exact_order = evaluate(positions, truth), ranks
        faiss_index.build(folder, database, settings.index)
        index = faiss_index.read(folder, database, settings.index)
        similarities, ranks, unanswered = faiss_index.find(index, queries, k=depth)
        positions = faiss_index.positions_behind(positions, similarities, ranks, queries, database)
        recall = faiss_index.recall(ranks, exact_order)
        further["recall"] = recall | {"searched exactly": unanswered}
    runs.write_array(folder / "queries.npy", queries)
    names = {"queries": truth.queries, "database": dataset.database}
    runs.write_json(folder / "names.json", names)
    runs.write_array(folder / "similarities.npy", similarities)
    Ranking(ranks, positions).save(folder)
    listed = shortlists.shortlist(ranks, truth, top=settings.top)
    shortlists.write_shortlist(
        folder / "shortlist.txt", listed, queries=truth.queries, database=dataset.database
    )
    runs.write_json(folder / "failures.json", failures)
    document = scores_document(
        evaluate(positions, truth),
        protocol={
            **protocol,
            "dataset": dataset.name,
            "reranked": False,
            "distractors": len(database) - len(truth.database),
        },
        parameters=stage.settings["parameters"],
        inputs=stage.settings["inputs"],
        failed=len(failures),
        ground_truth=truth,
        further=further,
    )
    runs.write_json(folder / "scores.json", document)
    return GLOBAL_OUTPUTS + (() if settings.index is None else faiss_index.OUTPUTS)
