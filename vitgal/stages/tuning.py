"""The tuning stage: reranking's thresholds chosen on the retrieval validation set.

Inliers are counted for a grid of thresholds, and mAP is computed for each of them and each number
of candidates. No test set is used.
"""

import dataclasses
import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import engines, runs
from vitgal.data.revisited import GroundTruth
from vitgal.evaluation import protocol
from vitgal.evaluation.tuning import (
    DATASET,
    PROTOCOL,
    Grid,
    TuningError,
    best_point,
    current_point,
    make_grid,
)
from vitgal.features.local import LocalFeatures
from vitgal.features.store import FeatureStore
from vitgal.retrieval import matching, shortlists
from vitgal.retrieval.ranking import NOT_VERIFIED, Ranking, Reranking
from vitgal.retrieval.verification import verify_matches
from vitgal.settings import MachineSettings, RerankingSettings, TuningSettings
from vitgal.stages.rerank import JOURNAL, CandidateLists, candidate_inputs, count_queries

GLOBAL_FILES = ("ranks.npy", "positions.npz", "shortlist.txt")
OUTPUTS = ("inliers.npy", "ap.npy", "tuned.json", "tuning.json")


def tune(
    run: Path,
    ground_truth: GroundTruth,
    settings: TuningSettings,
    current: RerankingSettings,
    machine: MachineSettings,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Counts inliers over a grid of thresholds on the validation set and chooses the best point.

    The best point has the highest Medium mAP; of equal ones the first, that is the smallest
    max_distance, then threshold, then number of candidates. An interrupted run keeps its finished
    queries, and the result does not depend on the machine.

    Args:
        run: its stages global and local of `val_retrieval` are finished (`prepare_validation`).
        ground_truth: of the validation set.
        settings: the grid; the values of `current` are added. `max_queries` are drawn with the seed
            of the verification.
        current: compared with the best point; sets all that the grid does not vary.
    Returns:
        `<run>/val_retrieval/tuning` with inliers.npy (Q, D, T, C) i32, ap.npy (D, T, C', Q) f64,
        tuning.json (for `Tuning.read`) and tuned.json, the chosen values as flat parameters.
    Raises:
        StageError: a stage is missing or has other settings, or a candidate has no local features.
        TuningError: no query counts.
    """
    engines.check_engine(machine.engine, machine.ray_address)
    grid = make_grid(settings, current)
    parameters = _parameters(grid, settings, current)
    source = Path(run) / DATASET
    inputs = candidate_inputs(source, ground_truth, GLOBAL_FILES)
    with runs.stage(
        source / "tuning", "tuning", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return stage.folder
        queries = _draw_queries(len(ground_truth.queries), settings.max_queries, current)
        lists = _read_lists(source, ground_truth, queries, max(grid["top"]))
        remedy = f"it is shorter than top={max(grid['top'])}: try fewer candidates (tune_tops)"
        store = lists.open_features(source / "local", remedy)
        count = functools.partial(count_grid, store, grid=grid, settings=current)
        label = "tuning" if progress else None
        rows = count_queries(lists, count, machine, stage.folder / JOURNAL, label)
        _write_choice(stage.folder, lists, rows, grid, current)
        shutil.rmtree(stage.folder / JOURNAL, ignore_errors=True)
        recorded = {"engine": machine.engine, "workers": machine.workers, "queries": len(queries)}
        return stage.finish(OUTPUTS, recorded)


def _parameters(grid: Grid, settings: TuningSettings, current: RerankingSettings) -> dict[str, Any]:
    verification = current.verification.compared()
    del verification["threshold"]  # a value of the grid
    return {
        "grid": grid,
        "current": current_point(current),
        "max_keypoints": current.matching.max_keypoints,
        "max_queries": settings.max_queries,
        **verification,
    }


def _draw_queries(count: int, wanted: int | None, current: RerankingSettings) -> np.ndarray:
    if wanted is None or wanted >= count:
        return np.arange(count)
    generator = np.random.default_rng([current.verification.seed, 3])
    return np.sort(generator.choice(count, wanted, replace=False))


def _read_lists(folder: Path, truth: GroundTruth, queries: np.ndarray, top: int) -> CandidateLists:
    truth = dataclasses.replace(
        truth,
        queries=[truth.queries[q] for q in queries],
        boxes=truth.boxes[queries],
        easy=[truth.easy[q] for q in queries],
        hard=[truth.hard[q] for q in queries],
        junk=[truth.junk[q] for q in queries],
    )
    ranking = Ranking.load(folder / "global").select(queries)
    images = shortlists.candidates(ranking.order, truth, PROTOCOL, top=top)
    return CandidateLists(truth, truth.database, ranking, images)


def count_grid(
    store: FeatureStore, query: str, names: list[str], *, grid: Grid, settings: RerankingSettings
) -> np.ndarray:
    """Counts one query's inliers at every max_distance and threshold of the grid.

    names: C database names; one that is not in the store could not be read and counts 0. settings:
    all that the grid does not vary. Returns (D, T, C) int32.
    """
    features = store[query]
    sizes = len(grid["max_distance"]), len(grid["threshold"]), len(names)
    counts = np.zeros(sizes, np.int32)
    for index, name in enumerate(names):
        if name in store:
            counts[:, :, index] = pair_counts(features, store[name], grid, settings)
    return counts


def pair_counts(
    query: LocalFeatures, database: LocalFeatures, grid: Grid, settings: RerankingSettings
) -> np.ndarray:
    """Counts the inliers of one pair at every max_distance and threshold of the grid.

    Equal to `inspect_pair` at each point. Features are matched once, at the greatest distance; a
    smaller one keeps the nearer matches. settings: all that the grid does not vary.
    Returns (D, T) int32.
    """
    kept = slice(settings.matching.max_keypoints)
    query, database = query.subset(kept), database.subset(kept)
    distances = grid["max_distance"]
    verifications = [
        dataclasses.replace(settings.verification, threshold=threshold)
        for threshold in grid["threshold"]
    ]
    matches = matching.match(query.descriptors, database.descriptors, max(distances))
    squares = matching.match_squares(query.descriptors, database.descriptors, matches)
    counts = np.zeros((len(distances), len(verifications)), np.int32)
    computed: dict[int, np.ndarray] = {}  # by number of matches, which are nested
    for row, distance in zip(counts, distances, strict=True):
        nearer = matches[squares < distance * distance]
        if len(nearer) not in computed:
            points = query.keypoints[nearer[:, 0]], database.keypoints[nearer[:, 1]]
            computed[len(nearer)] = np.array(
                [verify_matches(*points, verification).count for verification in verifications]
            )
        row[:] = computed[len(nearer)]
    return counts


def _write_choice(
    folder: Path,
    lists: CandidateLists,
    rows: list[np.ndarray],
    grid: Grid,
    current: RerankingSettings,
) -> None:
    """Writes the counts, from (D, T, C) of each query; AP at each point; and the best point."""
    truth, ranking = lists.ground_truth, lists.ranking
    width = max(row.shape[-1] for row in rows)
    counts = np.full((len(rows), *rows[0].shape[:2], width), NOT_VERIFIED, np.int32)
    for padded, row in zip(counts, rows, strict=True):
        padded[..., : row.shape[-1]] = row
    sizes = [len(values) for values in grid.values()]
    ap = np.empty((*sizes, len(truth.queries)))
    for d, t, c in itertools.product(*map(range, sizes)):
        reranking = Reranking(
            lists.candidates, counts[:, d, t], truth, PROTOCOL, top=grid["top"][c]
        )
        positions = ranking.positions.reranked(ranking.order, reranking)
        ap[d, t, c] = protocol.evaluate({PROTOCOL: positions}, truth)[PROTOCOL]["ap"]
    before = protocol.evaluate({PROTOCOL: ranking.positions}, truth)[PROTOCOL]["ap"]
    scored = ~np.isnan(before)
    if not scored.any():
        raise TuningError(f"no query of {DATASET} has an image of its landmark in the database")
    chosen = best_point(ap[..., scored])
    landmarks = [images.tobytes() for images in truth.easy]
    record = {
        "grid": grid,
        "chosen": chosen,
        "current": [grid[name].index(value) for name, value in current_point(current).items()],
        "groups": [landmarks.index(landmark) for landmark in landmarks],
        "before": before,
        "queries": truth.queries,
    }
    tuned = {name: grid[name][index] for name, index in zip(grid, chosen, strict=True)}
    runs.write_array(folder / "inliers.npy", counts)
    runs.write_array(folder / "ap.npy", ap)
    runs.write_json(folder / "tuning.json", record)
    runs.write_json(folder / "tuned.json", tuned)
