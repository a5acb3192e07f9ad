"""The stage of notebook 06: short lists are verified, in parallel over queries, and reranked."""

import contextlib
import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.scores import read_scores, scores_document
from vitgal.features.files import map_array, read_json
from vitgal.features.store import FeatureStore
from vitgal.retrieval import shortlists
from vitgal.retrieval.evidence import weigh
from vitgal.retrieval.matching import matching_device
from vitgal.retrieval.ranking import VARIANTS, Fusion, Ranking, Reranking, padded
from vitgal.retrieval.shortlists import PUBLISHED
from vitgal.retrieval.verification import inspect_shortlist
from vitgal.settings import MachineSettings, RerankingSettings

GLOBAL_NOTEBOOK = "04_global_evaluation"
LOCAL_NOTEBOOK = "05_local_extraction"
GLOBAL_FILES = ("names.json", "ranks.npy", "positions.npz", "shortlist.txt")
COUNTED = ("inliers", "features", "evidence")  # files of the counts, if pairs are weighed
PROBABILITIES = "probabilities.npy"  # that candidates show the landmark, of `judge_benchmark`
JOURNAL = "partial"  # folder of the counts of finished queries, until all are finished

# (name of a query, names of its C candidates) -> counts (..., C) int32
Counter = Callable[[str, list[str]], np.ndarray]


@dataclass(frozen=True, eq=False)
class CandidateLists:
    """A data set's global ranking and the images that are verified for each query."""

    ground_truth: GroundTruth
    database: list[str]  # N names, those of the ground truth first
    ranking: Ranking
    images: list[np.ndarray]  # per query (C,) int64 database indices, best first

    @property
    def candidates(self) -> np.ndarray:
        """(Q, C) int32 database indices, padded with -1."""
        return padded(self.images)

    def names(self, query: int) -> list[str]:
        """Returns the names of a query's candidates."""
        return [self.database[image] for image in self.images[query]]

    def open_features(self, folder: Path, remedy: str) -> FeatureStore:
        """Opens a store; StageError where it neither holds an image nor lists it as failed."""
        store = FeatureStore.open(folder.absolute())
        names = dict.fromkeys(self.ground_truth.queries)  # each once, in order
        for query in range(len(self.images)):
            names |= dict.fromkeys(self.names(query))
        unreadable = store.failures.keys() - self.ground_truth.queries
        missing = [name for name in names if name not in store and name not in unreadable]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise runs.StageError(
                f"{store.folder} has no local features of {', '.join(missing[:3])}{more} of the "
                f"short list: {remedy}"
            )
        return store


def rerank_shortlist(
    run: Path,
    ground_truth: GroundTruth,
    settings: RerankingSettings,
    machine: MachineSettings,
    *,
    overwrite: bool = False,
) -> Path:
    """Verifies every short list of a run and writes the reranked rankings.

    The candidates are sorted by their counts or, with the order "fused", by `fused_scores` of their
    similarities and evidence: their counts, 0 where the homography is implausible (`Evidence`). An
    interrupted run keeps its finished queries. An unreadable image has 0 inliers.

    Args:
        run: its stages global and local of the ground truth's data set are finished.
        settings: `top` is at most the short list's; `ties` affects the published ranking alone.
        machine: does not affect the result. All processes of a cluster must see the run folder.
    Returns:
        `<run>/<dataset>/rerank` with candidates.npy, inliers.npy, scores.json, and positions_*.npz
        and top_*.npy for easy, medium, hard and published. Unless count and order are those of the
        published code, features.npy and evidence.npy, (Q, C) int32 as inliers.npy, beside them.
    Raises:
        StageError: an earlier stage is missing or incomplete, or the folder has other settings.
        ValueError: features that do not fit, or an unknown device.
    """
    source = Path(run) / ground_truth.name
    engines.check_engine(machine.engine)
    if machine.engine == "local":  # a cluster's head need not have the devices of its nodes
        matching_device(machine.match_device)
    parameters = {"dataset": ground_truth.name} | settings.compared()
    fused = settings.order == "fused"
    if fused:  # a folder that another rule has sorted is made again
        parameters["fused"] = "excess over chance"
    files = (*GLOBAL_FILES, "similarities.npy") if fused else GLOBAL_FILES
    inputs = candidate_inputs(source, ground_truth, files)
    folder, counted = source / "rerank", COUNTED if weighs(settings) else COUNTED[:1]
    with runs.stage(
        folder, "rerank", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return folder
        lists = read_lists(source, ground_truth, settings.top)
        if not all((folder / f"{name}.npy").exists() for name in counted):
            store = lists.open_features(source / "local", f"run {LOCAL_NOTEBOOK} again")
            count = functools.partial(
                count_inliers, store, settings=settings, device=machine.match_device
            )
            rows = count_queries(lists, count, machine, folder / JOURNAL, "verifying short lists")
            runs.write_array(folder / "candidates.npy", lists.candidates)
            for index, name in enumerate(counted):
                counts = [np.atleast_2d(row)[index] for row in rows]
                runs.write_array(folder / f"{name}.npy", padded(counts))
        shutil.rmtree(folder / JOURNAL, ignore_errors=True)
        outputs = _write_rankings(stage, lists, settings)
        pairs = int((map_array(folder / "inliers.npy") >= 0).sum())
        recorded = {"engine": machine.engine, "workers": machine.workers, "pairs": pairs}
        outputs += ["candidates.npy", *(f"{name}.npy" for name in counted), "scores.json"]
        return stage.finish(outputs, recorded)


def weighs(settings: RerankingSettings) -> bool:
    """Returns whether more is counted of a pair than the published inliers."""
    return (settings.count, settings.order) != ("inliers", "inliers")


def candidate_inputs(
    folder: Path, ground_truth: GroundTruth, files: tuple[str, ...]
) -> dict[str, str]:
    """Returns the fingerprints of verification's inputs, by name.

    folder: `<run>/<dataset>`. files: those of its global stage. StageError names the notebook to
    run where an earlier stage is missing.
    """
    notebook = f"{GLOBAL_NOTEBOOK} with dataset {folder.name}"
    inputs = {name: runs.output_fingerprint(folder / "global", name, notebook) for name in files}
    local = runs.read_stage(folder / "local", f"{LOCAL_NOTEBOOK} with dataset {folder.name}")
    inputs["local features"] = runs.fingerprint(local["outputs"])
    return inputs | {"ground truth": ground_truth.fingerprint}


def read_lists(folder: Path, ground_truth: GroundTruth, top: int) -> CandidateLists:
    """Reads the candidates of a data set's `folder`; StageError where stages do not fit."""
    source = folder / "global"
    names = read_json(source / "names.json", {"queries": [str], "database": [str]})
    database, labelled = names["database"], len(ground_truth.database)
    expected = ground_truth.queries, ground_truth.database
    if (names["queries"], database[:labelled]) != expected:
        raise runs.StageError(
            f"{source / 'names.json'} lists other images than the ground truth "
            f"{ground_truth.name}: run {GLOBAL_NOTEBOOK} again"
        )
    ranking = Ranking.load(source)
    remedy = f"run {GLOBAL_NOTEBOOK} and {LOCAL_NOTEBOOK} with top={top}, or rerank fewer"
    try:
        images = shortlists.shortlist(ranking.order, ground_truth, top=top)
    except ValueError as error:
        raise runs.StageError(f"{source / 'ranks.npy'}: {error}; {remedy}") from error
    lists = CandidateLists(ground_truth, database, ranking, images)
    extracted = shortlists.read_shortlist(source / "shortlist.txt")
    for q, query in enumerate(ground_truth.queries):
        missing = set(lists.names(q)) - set(extracted.get(query, ()))
        if missing:
            raise runs.StageError(
                f"top={top} needs {min(missing)} for query {query}, which "
                f"{source / 'shortlist.txt'} lacks: {remedy}"
            )
    return lists


def count_queries(
    lists: CandidateLists, count: Counter, machine: MachineSettings, journal: Path, label: str
) -> list[np.ndarray]:
    """Returns per query the result of `count`, which must be picklable: int32 of shape (..., C).

    journal: folder of the finished queries, from which an interrupted run goes on. label: of the
    progress bar. The result does not depend on the machine's engine and workers.
    """
    counts: dict[int, np.ndarray] = {}
    for q, images in enumerate(lists.images):
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: it is counted again
            row = map_array(journal / f"{q}.npy")
            if row.dtype == np.int32 and row.shape[-1:] == images.shape:
                counts[q] = row
    queries = lists.ground_truth.queries
    tasks = [(q, queries[q], lists.names(q)) for q in range(len(queries)) if q not in counts]
    # Processes, not threads: pydegensac draws from one random state a process.
    processes = engines.parallel(
        machine.engine, machine.ray_address, workers=machine.workers, tasks=len(tasks)
    )
    bar = tqdm(total=len(queries), initial=len(counts), desc=label, unit="query")
    with processes as pool, bar:
        for q, row in pool(joblib.delayed(_count_query)(count, *task) for task in tasks):
            runs.write_array(journal / f"{q}.npy", row)
            counts[q] = row
            bar.update()
    return [counts[q] for q in range(len(queries))]


def _count_query(count: Counter, q: int, query: str, names: list[str]) -> tuple[int, np.ndarray]:
    return q, count(query, names)


def count_inliers(
    store: FeatureStore,
    query: str,
    names: list[str],
    *,
    settings: RerankingSettings,
    device: str | None = None,
) -> np.ndarray:
    """Counts the inliers of one query with each of its candidates.

    names: C database names; one without features in the store could not be read and counts 0.
    device: of `match`. Returns (C,) int32, or, where `weighs`, (3, C): inliers, features among them
    and evidence. A ValueError names the pair that cannot be matched.
    """
    rows = len(COUNTED) if weighs(settings) else 1
    counts = np.zeros((rows, len(names)), np.int32)
    readable = [index for index, name in enumerate(names) if name in store]
    candidates, compared = itertools.tee(store[names[index]] for index in readable)
    pairs = inspect_shortlist(store[query], compared, settings, device=device)
    for index in readable:
        try:
            pair, features = next(pairs), next(candidates)
        except ValueError as error:
            raise ValueError(
                f"query {query} and database image {names[index]}, features in {store.folder}: "
                f"{error}"
            ) from error
        counts[0, index] = pair.verification.count
        if rows > 1:
            evidence = weigh(store[query], features, pair)
            counts[1:, index] = evidence.features, evidence.believed(settings.count)
    return counts if rows > 1 else counts[0]


def candidate_similarities(
    folder: Path, lists: CandidateLists, queries: np.ndarray | None = None
) -> np.ndarray:
    """Reads the similarities of candidates to their queries from a global stage's `folder`.

    queries: (Q,) indices, where the lists are of some of the stage's queries alone. Returns (Q, C)
    float32 in the order of `lists.candidates`, padded with nan. Raises StageError where the file
    does not fit the ranking.
    """
    stored, order = map_array(folder / "similarities.npy"), lists.ranking.order
    stored = stored if queries is None else stored[:, queries]
    if stored.shape != order.shape or stored.dtype != np.float32:
        raise runs.StageError(
            f"{folder / 'similarities.npy'} does not fit ranks.npy: run {GLOBAL_NOTEBOOK} again"
        )
    table = np.full(lists.candidates.shape, np.nan, np.float32)
    for query, images in enumerate(lists.images):
        column = np.asarray(order[:, query])
        sorter = np.argsort(column)
        ranks = sorter[np.searchsorted(column, images, sorter=sorter)]
        table[query, : len(images)] = stored[ranks, query]
    return table


def _write_rankings(
    stage: runs.Stage, lists: CandidateLists, settings: RerankingSettings
) -> list[str]:
    """Writes the rankings of all variants and their scores; returns the rankings' files."""
    truth, outputs, positions = lists.ground_truth, [], {}
    fusion, counted = None, settings.count
    if settings.order == "fused":
        counted = "evidence"
        similarities = candidate_similarities(stage.folder.parent / "global", lists)
        fusion = Fusion(similarities, settings.fused_weight, settings.fused_cap)
    for variant in VARIANTS:
        reranking = Reranking(
            candidates=lists.candidates,
            inliers=map_array(stage.folder / f"{counted}.npy"),
            ground_truth=truth,
            protocol=variant,
            top=settings.top,
            ties=settings.ties if variant == PUBLISHED else "global",
            fusion=fusion,
        )
        ranking = lists.ranking.reranked(reranking)
        outputs += ranking.save(stage.folder, variant)
        positions[variant] = ranking.positions
    source = stage.folder.parent
    before = read_scores(source / "global")
    local = runs.read_stage(source / "local", LOCAL_NOTEBOOK)
    fingerprints = before.get("fingerprints", {})
    passed_on = {key: fingerprints.get(key) for key in ("dataset", "weights", "descriptors")}
    passed_on["weights of the local features"] = local["inputs"].get("weights")
    document = scores_document(
        evaluate({protocol: positions[protocol] for protocol in PROTOCOLS}, truth),
        protocol=before.get("protocol", {})
        | {
            "reranked": True,
            "short_list": "a protocol's first candidates, without the images it ignores",
            "short_list_published": "the plain first candidates, junk counted 0",
            "ties": "global rank",
            "ties_published": settings.ties,
        }
        | described_order(settings),
        parameters=stage.settings["parameters"],
        inputs=stage.settings["inputs"]
        | {name: value for name, value in passed_on.items() if value is not None},
        failed=before.get("failed_images", 0),
        ground_truth=truth,
        further={
            "earlier": {"global": before.get("parameters", {}), "local": local["parameters"]},
            "published": evaluate(positions[PUBLISHED], truth),
            "global": evaluate(lists.ranking.positions, truth),
        },
    )
    runs.write_json(stage.folder / "scores.json", document)
    return outputs


def described_order(settings: RerankingSettings) -> dict[str, str | float]:
    """Returns what candidates are sorted by, for scores.json; of the published order nothing."""
    if not weighs(settings):
        return {}
    described: dict[str, str | float] = {"count": settings.count, "order": settings.order}
    if settings.order == "fused":
        described |= {"fused_weight": settings.fused_weight, "fused_cap": settings.fused_cap}
    return described


def used_settings(folder: Path) -> RerankingSettings:
    """Reads the settings of a finished `<run>/<dataset>/rerank`."""
    manifest = runs.read_stage(folder, "notebook 06_rerank")
    return RerankingSettings.from_manifest(manifest["parameters"])


def inlier_counts(folder: Path, query: int) -> dict[int, int]:
    """Reads the inlier counts of one query: database index -> count.

    folder: `<run>/<dataset>/rerank`. query: its index.
    """
    runs.read_stage(folder, "notebook 06_rerank")
    return _by_image(folder, "inliers.npy", query)


def presence_probabilities(folder: Path, query: int) -> dict[int, float]:
    """Reads how probably a query's candidates show its landmark: database index -> probability.

    folder: `<run>/<dataset>/rerank`. query: its index. Empty before `judge_benchmark` is called.
    """
    return _by_image(folder, PROBABILITIES, query) if (folder / PROBABILITIES).exists() else {}


def _by_image(folder: Path, file: str, query: int) -> dict[int, Any]:
    """Reads one query's values that are not -1, by database index."""
    candidates, values = (map_array(folder / name)[query] for name in ("candidates.npy", file))
    known = values >= 0
    return dict(zip(candidates[known].tolist(), values[known].tolist(), strict=True))


def hard_candidates(folder: Path, ground_truth: GroundTruth, query: int) -> list[int]:
    """Returns the hard images of a query that were verified, most inliers first, ties by index."""
    counts = inlier_counts(folder, query)
    hard = [image for image in ground_truth.hard[query].tolist() if image in counts]
    return sorted(hard, key=lambda image: (-counts[image], image))
