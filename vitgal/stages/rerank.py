"""The stage of notebook 06: short lists are verified and ranked anew."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth, load_ground_truth
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.scores import scores_document
from vitgal.features.local import LocalFeatures
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval import shortlists
from vitgal.retrieval.matching import check_device, pick_device
from vitgal.retrieval.pairs import inspect_shortlist
from vitgal.retrieval.ranking import Positions, Ranking
from vitgal.retrieval.reranking import VARIANTS, Reranking, padded
from vitgal.retrieval.shortlists import PUBLISHED
from vitgal.retrieval.verification import _check_options
from vitgal.settings.sections import TIES

JOURNAL = "partial"  # counts of the queries that are done, until all are
GLOBAL_NOTEBOOK = "04_global_evaluation"
LOCAL_NOTEBOOK = "05_local_extraction"


def rerank_shortlist(
    run: Path,
    *,
    dataset: str,
    data_folder: str | os.PathLike,
    top: int = 100,
    max_distance: float = 0.82,
    estimator: str = "degensac",
    threshold: float = 16.0,
    iterations: int = 2000,
    confidence: float = 1.0,
    seed: int = 0,
    max_keypoints: int | None = None,
    ties: str = "global",
    match_device: str | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Verifies every short list of a run and writes the rankings that follow.

    Args:
        run: the run's folder; `<dataset>/global` and `<dataset>/local` are finished in it.
        data_folder: holds `gnd_<dataset>.pkl`.
        top: candidates a protocol; at most what the short list was made for.
        max_distance, estimator, threshold, iterations, confidence, seed: of `match` and `verify`.
        max_keypoints: features an image, best first (None: all that were extracted).
        ties: order of equal counts in the published ranking; the others keep the global order.
        match_device: of torch, where matching runs; None: NumPy; "auto": on a GPU where a process
            finds one. The result does not depend on it.
        workers: processes (None: one a core). The result does not depend on it.
        engine, ray_address: "local", or "ray": the processes are those of a Ray cluster (see
            `engines.connected`), which all see the run folder. Nor does it depend on that.
    Returns:
        `<dataset>/rerank` with candidates.npy, inliers.npy, and for easy, medium, hard and
        published positions_*.npz and top_*.npy, and scores.json.
    Raises:
        runs.StageError: an earlier stage is missing, was made for a shorter short list or lacks an
            image's features (it is named), or the folder holds other settings.
        ValueError: features or options that do not fit.

    Interrupted, it keeps the queries that are done. An image that could not be read counts 0.
    """
    run = Path(run)
    engines.check_engine(engine, ray_address)
    options = dict(estimator=estimator, threshold=threshold, iterations=iterations)
    options |= dict(confidence=confidence, seed=seed)
    _check_options(**options)
    _check_lists(top, ties, max_distance, max_keypoints)
    options |= dict(max_distance=max_distance, max_keypoints=max_keypoints)
    parameters = {"dataset": dataset, "top": top, "ties": ties} | options
    options["device"] = match_device
    if engine == "local":  # a cluster's head need not have what its nodes have
        check_device(match_device)
    ground_truth = load_ground_truth(Path(data_folder) / f"gnd_{dataset}.pkl")
    inputs = _inputs(run / dataset, ground_truth)
    folder = run / dataset / "rerank"
    with runs.stage(
        folder, "rerank", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return folder
        listed = _Shortlist.read(run / dataset, ground_truth, top)
        place = dict(engine=engine, address=ray_address, workers=workers)
        inliers = _verified(folder, listed, run / dataset / "local", options, place, progress)
        outputs = _write_rankings(folder, listed, inliers, top, ties)
        _write_scores(folder, listed, run / dataset / "global", parameters, inputs)
        outputs += ["candidates.npy", "inliers.npy", "scores.json"]
        pairs = int((inliers >= 0).sum())
        return stage.finish(outputs, engine=engine, workers=workers, pairs=pairs)


def _check_lists(top: int, ties: str, max_distance: float, max_keypoints: int | None) -> None:
    """ValueError for what would be found out only once pairs are verified."""
    if top < 1:
        raise ValueError(f"top is {top}; a short list has one candidate at least")
    if ties not in TIES:
        raise ValueError(f"unknown ties {ties!r}; known: {', '.join(TIES)}")
    if not max_distance >= 0:
        raise ValueError(f"max_distance is {max_distance}, not a distance")
    if max_keypoints is not None and max_keypoints < 1:
        raise ValueError(f"max_keypoints is {max_keypoints}; None takes all, else at least 1")


def _inputs(folder: Path, ground_truth: GroundTruth) -> dict[str, str]:
    """Fingerprints of what the stage reads; StageError where a stage before it is missing."""
    inputs = {
        name: runs.output_fingerprint(folder / "global", name, GLOBAL_NOTEBOOK)
        for name in ("names.json", "ranks.npy", "positions.npz", "shortlist.txt")
    }
    local = runs.read_stage(folder / "local", LOCAL_NOTEBOOK)["outputs"]
    return inputs | {
        "local features": runs.fingerprint(local),
        "ground truth": ground_truth.fingerprint,
    }


@dataclass(frozen=True, eq=False)
class _Shortlist:
    """A data set's global ranking and the images to verify for each query."""

    ground_truth: GroundTruth
    database: list[str]  # N names
    ranks: np.ndarray  # (K, Q)
    positions: Positions
    images: list[np.ndarray]  # per query database indices, in global order

    @classmethod
    def read(cls, folder: Path, ground_truth: GroundTruth, top: int) -> "_Shortlist":
        source = folder / "global"
        names = runs.read_json(source / "names.json")
        known = len(ground_truth.database)
        theirs = names["queries"], names["database"][:known]
        if theirs != (ground_truth.queries, ground_truth.database):
            raise runs.StageError(
                f"{source / 'names.json'} lists other images than the ground truth "
                f"{ground_truth.name}: run {GLOBAL_NOTEBOOK} again"
            )
        ranks = np.load(source / "ranks.npy", allow_pickle=False)
        try:
            images = shortlists.shortlist(ranks, ground_truth, top=top)
        except ValueError as error:
            raise runs.StageError(
                f"{source / 'ranks.npy'}: {error}; run {GLOBAL_NOTEBOOK} and {LOCAL_NOTEBOOK} with "
                f"top={top}, or rerank fewer"
            ) from error
        listed = shortlists.read_shortlist(source / "shortlist.txt")
        for query, row in zip(ground_truth.queries, images, strict=True):
            there = set(listed.get(query, ()))
            missing = [names["database"][i] for i in row if names["database"][i] not in there]
            if missing:
                raise runs.StageError(
                    f"top={top} needs {missing[0]} for query {query}, which "
                    f"{source / 'shortlist.txt'} lacks: run {GLOBAL_NOTEBOOK} and "
                    f"{LOCAL_NOTEBOOK} with top={top}, or rerank fewer"
                )
        positions = Positions.load(source / "positions.npz")
        return cls(ground_truth, names["database"], ranks, positions, images)

    @property
    def candidates(self) -> np.ndarray:
        """(Q, C) int32 database indices, padded with -1."""
        return padded(self.images)


def _verified(
    folder: Path,
    listed: _Shortlist,
    local: Path,
    options: dict,
    place: dict,
    progress: bool,
) -> np.ndarray:
    """The inlier counts (Q, C) int32, padded with -1; written together with their candidates."""
    if not (folder / "inliers.npy").exists():
        store = FeatureStore.open(local.absolute())
        _check_store(store, listed)
        rows = _journalled(folder / JOURNAL, listed)
        _verify_queries(folder / JOURNAL, rows, listed, store, options, place, progress)
        runs.write_array(folder / "candidates.npy", listed.candidates)
        runs.write_array(folder / "inliers.npy", padded([rows[q] for q in sorted(rows)]))
    shutil.rmtree(folder / JOURNAL, ignore_errors=True)
    return np.load(folder / "inliers.npy", allow_pickle=False)


def _check_store(store: FeatureStore, listed: _Shortlist) -> None:
    """Raises StageError where a query or a candidate has no entry in the store."""
    unreadable = store.failures
    wanted = {query: query for query in listed.ground_truth.queries}
    wanted |= {
        listed.database[image]: listed.database[image]
        for images in listed.images
        for image in images
        if listed.database[image] not in unreadable
    }
    missing = [name for key, name in wanted.items() if key not in store]
    if missing:
        raise runs.StageError(
            f"{store.folder} has no local features of {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} of the short list: run "
            f"{LOCAL_NOTEBOOK} again"
        )


def _journalled(journal: Path, listed: _Shortlist) -> dict[int, np.ndarray]:
    """The counts of the queries that an interrupted run finished."""
    rows = {int(path.stem): np.load(path, allow_pickle=False) for path in journal.glob("*.npy")}
    return {q: row for q, row in rows.items() if row.shape == listed.images[q].shape}


def _verify_queries(
    journal: Path,
    rows: dict[int, np.ndarray],
    listed: _Shortlist,
    store: FeatureStore,
    options: dict,
    place: dict,
    progress: bool,
) -> None:
    """Verifies the queries that `rows` lacks and adds them to it and to the journal."""
    tasks = [
        (q, listed.ground_truth.queries[q], [listed.database[image] for image in images])
        for q, images in enumerate(listed.images)
        if q not in rows
    ]
    bar = dict(total=len(listed.images), initial=len(rows), desc="verifying short lists")
    # Processes, not threads: pydegensac draws from one random state a process.
    with engines.parallel(**place, tasks=len(tasks)) as pool:
        results = pool(joblib.delayed(_verify_query)(store, *task, options) for task in tasks)
        for q, counts in tqdm(results, **bar, unit="query", disable=not progress):
            runs.write_array(journal / f"{q}.npy", counts)
            rows[q] = counts


def _verify_query(
    store: FeatureStore, q: int, query: str, names: list[str], options: dict
) -> tuple[int, np.ndarray]:
    """One query's inlier counts; candidates that could not be read count 0."""
    counts = np.zeros(len(names), np.int32)
    options = options | {"device": pick_device(options.get("device"))}
    readable = [place for place, name in enumerate(names) if name in store]
    features = (store[names[place]] for place in readable)
    pairs = inspect_shortlist(store[query], features, **options)
    for place in readable:
        try:
            counts[place] = next(pairs).verification.count
        except ValueError as error:
            raise ValueError(
                f"query {query} and database image {names[place]}, features in {store.folder}: "
                f"{error}"
            ) from error
    return q, counts


def _write_rankings(
    folder: Path, listed: _Shortlist, inliers: np.ndarray, top: int, ties: str
) -> list[str]:
    outputs = []
    for variant in VARIANTS:
        reranking = Reranking(
            candidates=listed.candidates,
            inliers=inliers,
            ground_truth=listed.ground_truth,
            protocol=variant,
            top=top,
            ties=ties if variant == PUBLISHED else "global",
        )
        outputs += Ranking(listed.ranks, listed.positions).reranked(reranking).save(folder, variant)
    return outputs


def _write_scores(
    folder: Path, listed: _Shortlist, source: Path, parameters: dict, inputs: dict[str, str]
) -> None:
    earlier = runs.read_json(source / "scores.json")
    local = runs.read_stage(source.parent / "local", LOCAL_NOTEBOOK)
    known = earlier.get("fingerprints", {})
    passed_on = {key: known.get(key) for key in ("dataset", "weights", "descriptors")}
    passed_on["weights of the local features"] = local["inputs"].get("weights")
    places = {v: Positions.load(folder / f"positions_{v}.npz") for v in VARIANTS}
    ground_truth = listed.ground_truth
    document = scores_document(
        evaluate({protocol: places[protocol] for protocol in PROTOCOLS}, ground_truth),
        protocol=earlier.get("protocol", {})
        | {
            "reranked": True,
            "short_list": "a protocol's first candidates, without the images it ignores",
            "short_list_published": "the plain first candidates, junk counted 0",
            "ties": "global rank",
            "ties_published": parameters["ties"],
        },
        parameters=parameters,
        inputs=inputs | {name: value for name, value in passed_on.items() if value is not None},
        failed=earlier.get("failed_images", 0),
        ground_truth=ground_truth,
        earlier={"global": earlier.get("parameters", {}), "local": local["parameters"]},
        published=evaluate(places[PUBLISHED], ground_truth),
        **{"global": evaluate(listed.positions, ground_truth)},
    )
    runs.write_json(folder / "scores.json", document)


def inlier_counts(folder: Path, query: int) -> dict[int, int]:
    """The inlier counts of one query: database index -> count. folder: `<dataset>/rerank`."""
    runs.read_stage(folder, "notebook 06_rerank")
    candidates = np.load(folder / "candidates.npy", mmap_mode="r")[query]
    counts = np.load(folder / "inliers.npy", mmap_mode="r")[query]
    known = candidates >= 0
    return dict(zip(candidates[known].tolist(), counts[known].tolist(), strict=True))


def hard_candidates(folder: Path, ground_truth: GroundTruth, query: int) -> list[int]:
    """The hard images of a query that were verified, most inliers first, ties by index."""
    counts = inlier_counts(folder, query)
    hard = [image for image in ground_truth.hard[query].tolist() if image in counts]
    return sorted(hard, key=lambda image: (-counts[image], image))


def pair_features(
    features: FeatureStore, ground_truth: GroundTruth, query: int, image: int
) -> tuple[LocalFeatures, LocalFeatures]:
    """The stored features of a query and of a database image, both given by index."""
    return features[ground_truth.queries[query]], features[ground_truth.database[image]]
