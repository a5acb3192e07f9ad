"""The stage of notebook 06: short lists are verified and reranked."""

import functools
import shutil
from pathlib import Path

import numpy as np

from vitgal import engines, runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.scores import scores_document
from vitgal.features.local import LocalFeatures
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval import shortlists
from vitgal.retrieval.matching import matching_device
from vitgal.retrieval.ranking import VARIANTS, Positions, Ranking, Reranking, padded
from vitgal.retrieval.shortlists import PUBLISHED
from vitgal.retrieval.verification import inspect_shortlist
from vitgal.settings import MachineSettings, RerankingSettings
from vitgal.stages.counting import (
    GLOBAL_NOTEBOOK,
    JOURNAL,
    LOCAL_NOTEBOOK,
    CandidateLists,
    candidate_inputs,
    count_queries,
)

GLOBAL_FILES = ("names.json", "ranks.npy", "positions.npz", "shortlist.txt")


def rerank_shortlist(
    run: Path,
    ground_truth: GroundTruth,
    settings: RerankingSettings,
    machine: MachineSettings,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Verifies every short list of a run and writes the rankings that follow.

    An interrupted run keeps its finished queries. An unreadable image has 0 inliers.

    Args:
        run: its stages global and local of the data set are finished.
        ground_truth: of the data set, whose name it has.
        settings: `top` is at most the short list's; `ties` affects the published ranking alone.
        machine: does not affect the result. All processes of a cluster must see the run folder.
    Returns:
        `<run>/<dataset>/rerank` with candidates.npy, inliers.npy, scores.json, and positions_*.npz
        and top_*.npy for easy, medium, hard and published.
    Raises:
        StageError: an earlier stage is missing or incomplete, or the folder has other settings.
        ValueError: features that do not fit, or an unknown device.
    """
    source = Path(run) / ground_truth.name
    engines.check_engine(machine.engine, machine.ray_address)
    if machine.engine == "local":  # a cluster's head need not have the devices of its nodes
        matching_device(machine.match_device)
    parameters = {"dataset": ground_truth.name} | settings.compared()
    inputs = candidate_inputs(source, ground_truth, GLOBAL_FILES)
    folder = source / "rerank"
    with runs.stage(
        folder, "rerank", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return folder
        lists = _read_lists(source, ground_truth, settings.top)
        if not (folder / "inliers.npy").exists():
            counts = count_queries(
                lists,
                _open_store(source / "local", lists),
                functools.partial(count_inliers, settings=settings, device=machine.match_device),
                machine,
                journal=folder / JOURNAL,
                label="verifying short lists",
                progress=progress,
            )
            runs.write_array(folder / "candidates.npy", lists.candidates)
            runs.write_array(folder / "inliers.npy", padded(counts))
        shutil.rmtree(folder / JOURNAL, ignore_errors=True)
        inliers = np.load(folder / "inliers.npy", allow_pickle=False)
        rankings = _write_rankings(folder, lists, inliers, settings)
        _write_scores(stage, lists)
        pairs = int((inliers >= 0).sum())
        recorded = {"engine": machine.engine, "workers": machine.workers, "pairs": pairs}
        outputs = [*rankings, "candidates.npy", "inliers.npy", "scores.json"]
        return stage.finish(outputs, recorded)


def _read_lists(folder: Path, ground_truth: GroundTruth, top: int) -> CandidateLists:
    """The candidates of every protocol; StageError where the global stage lacks one of them."""
    source = folder / "global"
    names = runs.read_json(source / "names.json")
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


def _open_store(folder: Path, lists: CandidateLists) -> FeatureStore:
    """The local features; StageError where a query or a candidate has no entry."""
    store = FeatureStore.open(folder.absolute())
    missing = lists.missing_features(store)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise runs.StageError(
            f"{store.folder} has no local features of {', '.join(missing[:3])}{more} of the short "
            f"list: run {LOCAL_NOTEBOOK} again"
        )
    return store


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
    device: of `match`. Returns (C,) int32. ValueError names the pair that cannot be matched.
    """
    counts = np.zeros(len(names), np.int32)
    readable = [index for index, name in enumerate(names) if name in store]
    features = (store[names[index]] for index in readable)
    pairs = inspect_shortlist(store[query], features, settings, device=device)
    for index in readable:
        try:
            counts[index] = next(pairs).verification.count
        except ValueError as error:
            raise ValueError(
                f"query {query} and database image {names[index]}, features in {store.folder}: "
                f"{error}"
            ) from error
    return counts


def _write_rankings(
    folder: Path, lists: CandidateLists, inliers: np.ndarray, settings: RerankingSettings
) -> list[str]:
    outputs = []
    for variant in VARIANTS:
        reranking = Reranking(
            candidates=lists.candidates,
            inliers=inliers,
            ground_truth=lists.ground_truth,
            protocol=variant,
            top=settings.top,
            ties=settings.ties if variant == PUBLISHED else "global",
        )
        outputs += lists.ranking.reranked(reranking).save(folder, variant)
    return outputs


def _write_scores(stage: runs.Stage, lists: CandidateLists) -> None:
    source, ground_truth = stage.folder.parent, lists.ground_truth
    before = runs.read_json(source / "global" / "scores.json")
    local = runs.read_stage(source / "local", LOCAL_NOTEBOOK)
    fingerprints = before.get("fingerprints", {})
    passed_on = {key: fingerprints.get(key) for key in ("dataset", "weights", "descriptors")}
    passed_on["weights of the local features"] = local["inputs"].get("weights")
    parameters = stage.settings["parameters"]
    positions = {
        variant: Positions.load(stage.folder / Ranking.files(variant)[1]) for variant in VARIANTS
    }
    document = scores_document(
        evaluate({protocol: positions[protocol] for protocol in PROTOCOLS}, ground_truth),
        protocol=before.get("protocol", {})
        | {
            "reranked": True,
            "short_list": "a protocol's first candidates, without the images it ignores",
            "short_list_published": "the plain first candidates, junk counted 0",
            "ties": "global rank",
            "ties_published": parameters["ties"],
        },
        parameters=parameters,
        inputs=stage.settings["inputs"]
        | {name: value for name, value in passed_on.items() if value is not None},
        failed=before.get("failed_images", 0),
        ground_truth=ground_truth,
        further={
            "earlier": {"global": before.get("parameters", {}), "local": local["parameters"]},
            "published": evaluate(positions[PUBLISHED], ground_truth),
            "global": evaluate(lists.ranking.positions, ground_truth),
        },
    )
    runs.write_json(stage.folder / "scores.json", document)


def inlier_counts(folder: Path, query: int) -> dict[int, int]:
    """Reads the inlier counts of one query: database index -> count.

    folder: `<run>/<dataset>/rerank`. query: its index.
    """
    runs.read_stage(folder, "notebook 06_rerank")
    candidates = np.load(folder / "candidates.npy", mmap_mode="r")[query]
    counts = np.load(folder / "inliers.npy", mmap_mode="r")[query]
    verified = candidates >= 0
    return dict(zip(candidates[verified].tolist(), counts[verified].tolist(), strict=True))


def hard_candidates(folder: Path, ground_truth: GroundTruth, query: int) -> list[int]:
    """Returns the hard images of a query that were verified, most inliers first, ties by index."""
    counts = inlier_counts(folder, query)
    hard = [image for image in ground_truth.hard[query].tolist() if image in counts]
    return sorted(hard, key=lambda image: (-counts[image], image))


def pair_features(
    features: FeatureStore, ground_truth: GroundTruth, query: int, image: int
) -> tuple[LocalFeatures, LocalFeatures]:
    """Returns the stored features of a query and of a database image, both given by index."""
    return features[ground_truth.queries[query]], features[ground_truth.database[image]]
