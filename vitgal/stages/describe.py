"""The stage of notebook 04: global descriptors, our own or another system's; rankings, scores."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.features.files import map_array, read_json
from vitgal.models.sources import sized, weights_input
from vitgal.retrieval.refine import RefinementError
from vitgal.settings import GlobalSettings, MachineSettings
from vitgal.stages import whitening
from vitgal.stages.images import (
    ImageTask,
    query_tasks,
    recorded_paths,
    refuse_failed_query,
    refuse_failures,
    report_failures,
)
from vitgal.stages.rank import check_refinement, write_rankings

if TYPE_CHECKING:
    from vitgal.stages.local_describer import LocalDescriber

BLOCK = 256  # images between two checkpoints
# Settings that a ranking by another system's descriptors depends on.
DESCRIPTOR_SETTINGS = ("crop_queries", "top", "display", "index", "refine", "refine_images")


def evaluate_global(
    run: Path,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    machine: MachineSettings,
    *,
    model: Path | str,
    folder: str = "global",
    refine_set: whitening.RefineSet | None = None,
    overwrite: bool = False,
) -> Path:
    """Ranks a benchmark's database for its queries and scores the ranking.

    After a kill it continues at the last checkpoint. A Ray cluster runs one process a GPU, or
    without GPUs one for every `threads` CPUs. Another number of threads changes the last bits.

    Args:
        model: a weight file, "timm:NAME", "timm:NAME@FILE", or "untrained:<architecture>" for
            seeded random weights.
        folder: the stage's folder below `<run>/<dataset>/`; later notebooks read "global".
        refine_set: photographs that a whitening of `settings.refine` is learnt from.
    Returns:
        The stage's folder with database.npy (N, D) and queries.npy (Q, D) float32, names.json,
        ranks.npy (K, Q) int32, similarities.npy (K, Q) float32, positions.npz, shortlist.txt,
        scores.json and failures.json. With a refinement these are the refined ranking's;
        top_plain.npy, similarities_plain.npy and positions_plain.npz are the plain one's, whose
        scores stand in scores.json under "plain".
    Raises:
        StageError: the folder holds other settings, or a query or too many images cannot be read.
        RefinementError: a refinement that does not fit the descriptors or its images.
        FileNotFoundError, ValueError: the weights are missing or invalid.
    """
    engines.check_engine(machine.engine)
    settings = sized(settings, model)
    learnt_from = _checked_set(settings, dataset, refine_set, "photographs")
    inputs = {"dataset": dataset.as_input, "weights": weights_input(model)}
    if learnt_from is not None:
        inputs["refine set"] = learnt_from.as_input
    with runs.stage(
        run / dataset.name / folder,
        "global",
        parameters=settings.compared(),
        inputs=inputs,
        overwrite=overwrite,
    ) as stage:
        if not stage.finished:
            from vitgal.stages.ray_describer import open_describer  # imports torch

            with open_describer(model, settings, machine) as describer:
                _describe(stage, run, dataset, settings, describer, model, learnt_from)
        failures = read_json(stage.folder / "failures.json", store.FAILURES)
        report_failures(failures, len(dataset.database))
        return stage.folder


def _describe(
    stage: runs.Stage,
    run: Path,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    describer: "LocalDescriber",
    model: Path | str,
    learnt_from: whitening.RefineSet | None,
) -> None:
    """Describes all images of a benchmark, writes the rankings and finishes the stage."""
    count = len(dataset.database)
    check_refinement(settings, describer.model.embed_dim, count)
    learnt = None
    if learnt_from is not None:  # first: it may refuse
        weights = stage.settings["inputs"]["weights"]
        rows = _describe_set(run, settings, describer, learnt_from, weights)
        learnt = whitening.learn_whitening(settings, rows, learnt_from)
    with tqdm(disable=True) as bar:
        tasks = query_tasks(dataset, settings.crop_queries)
        ((queries, failures),) = describer.describe_blocks([tasks], bar)
    refuse_failed_query(failures)
    file = stage.folder / "database.npy"
    rows = _describe_images(describer, dataset.database, dataset.database_paths, file)
    protocol = {
        "crop_queries": settings.crop_queries,
        "resize": settings.resize,
        "scales": settings.scales,
        "precision": describer.precision,
    } | training_changes(model)
    outputs = write_rankings(stage, dataset, settings, queries, protocol, rows.failures, learnt)
    paths = recorded_paths(run, dataset, model, learnt_from and learnt_from.file)
    counts = {"images": count, "failed": len(rows.failures)}
    network = describer.model
    if getattr(network, "on_timm", False):  # for the diagram
        names = ("architecture", "patch", "class_token")
        counts |= {name: getattr(network, name) for name in names}
    stage.finish(outputs, describer.recorded() | paths | counts)
    rows.forget()


def training_changes(model: Path | str) -> dict[str, list[str]]:
    """Returns `training_changes`: changed settings and skipped steps of the model's training.

    They are read from the trainings' changes.json; empty for a model without any.
    """
    folder, lines = Path(model).parent, []
    trained = folder.name if Path(model).name == "model.safetensors" else ""
    trainings = {"retrieval": ["retrieval"], "autoencoder": ["retrieval", "autoencoder"]}
    for stage in trainings.get(trained, ()):
        if not (file := folder.with_name(stage) / "changes.json").exists():
            continue
        record = runs.read_json(file)
        for change in record["changes"]:
            line = f"step {change['step']}: {change['setting']} {change['from']} -> {change['to']}"
            lines.append(f"{stage}, {line}")
        lines += [f"{stage}, step {skip['step']}: skipped" for skip in record["skipped_batches"]]
    return {"training_changes": lines} if lines else {}


def _checked_set(
    settings: GlobalSettings,
    dataset: RetrievalDataset,
    images: whitening.RefineSet | None,
    kind: str,
) -> whitening.RefineSet | None:
    """The images that a whitening is learnt from; None where no step needs them.

    kind: "photographs" or "descriptors". Raises RefinementError for none, those of the other kind,
    and images of the benchmark.
    """
    if whitening.learnt_step(settings) is None:
        return None
    if images is None or (images.source == "descriptors") != (kind == "descriptors"):
        raise RefinementError(
            f"a whitening of these descriptors is learnt from other {kind}: set refine_set to "
            + ("a file of the same network's" if kind == "descriptors" else "a folder of them")
        )
    images.refuse_benchmark(dataset)
    return images


def _describe_set(
    run: Path,
    settings: GlobalSettings,
    describer: "LocalDescriber",
    images: whitening.RefineSet,
    weights: str,
) -> np.ndarray:
    """Describes the images that a whitening is learnt from, once for all data sets of a run.

    weights: the fingerprint of the describer's. Returns (F, D) float32.
    """
    compared = settings.compared()
    parameters = {name: compared[name] for name in compared if name not in DESCRIPTOR_SETTINGS}
    inputs = {"images": images.as_input, "weights": weights}
    key = runs.fingerprint([parameters, runs.input_fingerprints(inputs)])[:12]
    folder = run / "refine_set" / key
    with runs.stage(folder, "refine set", parameters=parameters, inputs=inputs) as stage:
        if not stage.finished:
            file = folder / "descriptors.npy"
            rows = _describe_images(describer, images.names, images.paths, file)
            runs.write_json(folder / "failures.json", rows.failures)
            stage.finish(["descriptors.npy", "failures.json"], {"images": len(images.names)})
            rows.forget()
    return map_array(folder / "descriptors.npy")


def _describe_images(
    describer: "LocalDescriber", names: Sequence[str], paths: Sequence[Path], file: Path
) -> store.RowFile:
    """Describes images into a file, block by block, from the last checkpoint on."""
    count, precision = len(names), {"precision": describer.precision}
    rows = store.RowFile.open(file, (count, describer.model.embed_dim), settings=precision)
    start = rows.rows
    tasks = [ImageTask(*image) for image in zip(names[start:], paths[start:], strict=True)]
    blocks = [tasks[first : first + BLOCK] for first in range(0, len(tasks), BLOCK)]
    bar = tqdm(total=count, initial=start, desc="describing", unit="image")
    with bar, contextlib.closing(describer.describe_blocks(blocks, bar)) as described:
        for block, failures in described:
            rows.append(block, failures)
            refuse_failures(rows.failures, count, describer.settings.max_failed_share)
    rows.finish()
    return rows


def evaluate_descriptors(
    run: Path,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    *,
    descriptors: Path,
    refine_set: whitening.RefineSet | None = None,
    overwrite: bool = False,
) -> Path:
    """Ranks a benchmark by another system's descriptors and scores the ranking; needs no network.

    The stage `<run>/<dataset>/global` has the files of `evaluate_global`, so that local features,
    reranking and comparison follow as usual. Returns its folder.

    Args:
        settings: only `crop_queries` (whether the other system cropped the queries, recorded with
            the scores), `top`, `display`, `index` and `refine` are used.
        descriptors: see `read_descriptors`.
        refine_set: descriptors of other images by the same system, for a whitening.
    Raises:
        RefinementError: as `evaluate_global`.
        StageError: the folder holds other settings or descriptors.
        FileNotFoundError, DescriptorError: see `read_descriptors`.
    """
    queries, count = dataset.ground_truth.queries, len(dataset.database)
    source = whitening.StoredDescriptors(Path(descriptors), [*queries, *dataset.database])
    compared = settings.compared()
    learnt_from = _checked_set(settings, dataset, refine_set, "descriptors")
    inputs = {"dataset": dataset.as_input, "descriptors": source.as_input}
    if learnt_from is not None:
        inputs["refine set"] = learnt_from.as_input
    with runs.stage(
        run / dataset.name / "global",
        "global",
        parameters={name: compared[name] for name in DESCRIPTOR_SETTINGS if name in compared},
        inputs=inputs,
        overwrite=overwrite,
    ) as stage:
        if stage.finished:
            return stage.folder
        check_refinement(settings, source.rows.shape[1], count)
        learnt = None
        if learnt_from is not None:
            rows = learnt_from.rows()
            whitening.refuse_same_rows(rows, source.rows)
            learnt = whitening.learn_whitening(settings, rows, learnt_from)
            learnt.whitening.apply(source.rows[:1])  # refuses another width
        first, rest = np.split(source.rows, [len(queries)])
        runs.write_array(stage.folder / "database.npy", rest)
        protocol = {"crop_queries": settings.crop_queries, "descriptors": "made elsewhere"}
        outputs = write_rankings(stage, dataset, settings, first, protocol, learnt=learnt)
        recorded = recorded_paths(run, dataset, refine_set=learnt_from and learnt_from.file)
        return stage.finish(outputs, {"images": count} | recorded)
