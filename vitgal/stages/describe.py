"""The stage of notebook 04: global descriptors, our own or another system's; rankings, scores."""

import contextlib
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.features.descriptors import read_descriptors
from vitgal.features.files import map_array, read_json
from vitgal.models.describers import sized
from vitgal.models.inference import weights_input
from vitgal.retrieval import faiss_index
from vitgal.retrieval.refine import RefinementError
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
from vitgal.stages.rank import RANKING_OUTPUTS, check_refinement, write_rankings
from vitgal.stages.ray_describer import open_describer
from vitgal.stages.whitening import (
    RefineSet,
    learn_whitening,
    needs_refine_set,
    refuse_same_rows,
)

BLOCK = 256  # images between two checkpoints
# Settings that a ranking by another system's descriptors depends on.
DESCRIPTOR_SETTINGS = ("crop_queries", "top", "display", "index", "refine", "refine_images")
GLOBAL_OUTPUTS = (*RANKING_OUTPUTS, "failures.json")  # the files of a global stage


def evaluate_global(
    run: Path,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    machine: MachineSettings,
    *,
    model: Path | str,
    folder: str = "global",
    refine_set: RefineSet | None = None,
    overwrite: bool = False,
    progress: bool = True,
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
    engines.check_engine(machine.engine, machine.ray_address)
    settings = sized(settings, model)
    learnt_from = _checked_set(settings, dataset, refine_set, "photographs")
    inputs = {"dataset": dataset.as_input, "weights": weights_input(model)}
    with runs.stage(
        run / dataset.name / folder,
        "global",
        parameters=settings.compared(),
        inputs=inputs | _set_input(learnt_from),
        overwrite=overwrite,
    ) as stage:
        count = len(dataset.database)
        if stage.finished:
            report_failures(read_json(stage.folder / "failures.json", store.FAILURES), count)
            return stage.folder
        with open_describer(model, settings, machine) as describer:
            _check_width(settings, describer.model.embed_dim, count)
            learnt = None
            if learnt_from is not None:  # first: it may refuse
                rows = _describe_set(run, describer, learnt_from, settings, inputs["weights"])
                learnt = learn_whitening(settings, rows, learnt_from)
            queries = _describe_queries(describer, query_tasks(dataset, settings.crop_queries))
            file = stage.folder / "database.npy"
            images = dataset.database, dataset.database_paths
            rows = _describe_images(describer, *images, file, settings, progress=progress)
            source = learnt_from and learnt_from.file
            recorded = describer.recorded() | recorded_paths(run, dataset, model, source)
        protocol = {"crop_queries": settings.crop_queries, "resize": settings.resize}
        protocol |= {"scales": settings.scales, "precision": describer.precision}
        protocol |= training_changes(model)
        outputs = write_rankings(
            stage, dataset, settings, queries, protocol, failures=rows.failures, learnt=learnt
        )
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


def _checked_set(
    settings: GlobalSettings, dataset: RetrievalDataset, images: RefineSet | None, kind: str
) -> RefineSet | None:
    """The images that a whitening is learnt from; None where no step needs them.

    kind: "photographs" or "descriptors". Raises RefinementError for none, those of the other kind,
    and images of the benchmark.
    """
    if not needs_refine_set(settings):
        return None
    if images is None or (images.source == "descriptors") != (kind == "descriptors"):
        raise RefinementError(
            f"a whitening of these descriptors is learnt from other {kind}: set refine_set to "
            + ("a file of the same network's" if kind == "descriptors" else "a folder of them")
        )
    images.refuse_benchmark(dataset)
    return images


def _set_input(images: RefineSet | None) -> dict[str, runs.Input]:
    return {} if images is None else {"refine set": images.as_input}


def _check_width(settings: GlobalSettings, width: int, images: int) -> None:
    """Refuses a refinement or an index that descriptors of this width and number do not allow."""
    width = check_refinement(settings, width, images)
    if settings.index is not None:
        faiss_index.check(settings.index, width, images)


def _describe_set(
    run: Path,
    describer: LocalDescriber,
    images: RefineSet,
    settings: GlobalSettings,
    weights: str | runs.Input,
) -> np.ndarray:
    """Describes the images that a whitening is learnt from, once for all data sets of a run."""
    compared = settings.compared()
    parameters = {name: compared[name] for name in compared if name not in DESCRIPTOR_SETTINGS}
    inputs = {"images": images.as_input, "weights": weights}
    key = runs.fingerprint([parameters, runs.input_fingerprints(inputs)])[:12]
    folder = run / "refine_set" / key
    with runs.stage(folder, "refine set", parameters=parameters, inputs=inputs) as stage:
        if not stage.finished:
            file = folder / "descriptors.npy"
            rows = _describe_images(
                describer, images.names, images.paths, file, settings, progress=False
            )
            runs.write_json(folder / "failures.json", rows.failures)
            stage.finish(["descriptors.npy", "failures.json"], {"images": len(images.names)})
            rows.forget()
    return map_array(folder / "descriptors.npy")


def _describe_images(
    describer: LocalDescriber,
    names: Sequence[str],
    paths: Sequence[Path],
    file: Path,
    settings: GlobalSettings,
    *,
    progress: bool,
) -> store.RowFile:
    """Describes images into a file, block by block, from the last checkpoint on."""
    count, precision = len(names), {"precision": describer.precision}
    rows = store.RowFile.open(file, (count, describer.model.embed_dim), settings=precision)
    start = rows.rows
    images = zip(names[start:], paths[start:], strict=True)
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
    refine_set: RefineSet | None = None,
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
    descriptors = Path(descriptors)
    queries, count = dataset.ground_truth.queries, len(dataset.database)
    files = [path for path in (descriptors, descriptors.with_suffix(".txt")) if path.is_file()]
    stamp = runs.images_input([path.name for path in files], files).stamp

    @functools.cache
    def rows() -> np.ndarray:
        """Reads the descriptors, (N, D) float32: first the queries, then the database."""
        return read_descriptors(descriptors, [*queries, *dataset.database])

    compared = settings.compared()
    learnt_from = _checked_set(settings, dataset, refine_set, "descriptors")
    with runs.stage(
        run / dataset.name / "global",
        "global",
        parameters={name: compared[name] for name in DESCRIPTOR_SETTINGS if name in compared},
        inputs={
            "dataset": dataset.as_input,
            "descriptors": runs.Input(stamp, lambda: hashlib.sha256(rows().data).hexdigest()),
        }
        | _set_input(learnt_from),
        overwrite=overwrite,
    ) as stage:
        if stage.finished:
            return stage.folder
        _check_width(settings, rows().shape[1], count)
        learnt = None
        if learnt_from is not None:
            refuse_same_rows(learnt_from.rows(), rows())
            learnt = learn_whitening(settings, learnt_from.rows(), learnt_from)
            learnt.whitening.apply(rows()[:1])  # refuses another width
        runs.write_array(stage.folder / "database.npy", rows()[len(queries) :])
        protocol = {"crop_queries": settings.crop_queries, "descriptors": "made elsewhere"}
        outputs = write_rankings(
            stage, dataset, settings, rows()[: len(queries)], protocol, learnt=learnt
        )
        recorded = recorded_paths(run, dataset, refine_set=learnt_from and learnt_from.file)
        return stage.finish(outputs, {"images": count} | recorded)
