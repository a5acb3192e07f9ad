"""The tuning stage: reranking's settings chosen on the retrieval validation set.

Each pair is matched once per method and verified once for each estimator, distance and threshold.
Orders and numbers of candidates are then tried without further verification. No test set is used.
"""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import engines, runs
from vitgal.data.revisited import GroundTruth, ignored, positives
from vitgal.evaluation import protocol
from vitgal.evaluation.landmarks import find_landmarks
from vitgal.evaluation.tuning import (
    COUNTED,
    DATASET,
    PROTOCOL,
    Grid,
    Tuning,
    TuningError,
    best_point,
    current_values,
    make_grid,
    point_values,
    query_ap,
)
from vitgal.features.files import map_array
from vitgal.features.local import LocalFeatures
from vitgal.features.store import FeatureStore
from vitgal.retrieval import matching, shortlists
from vitgal.retrieval.evidence import weigh
from vitgal.retrieval.ranking import NOT_VERIFIED, Ranking
from vitgal.retrieval.verification import PairInspection, verify_matches
from vitgal.settings import MachineSettings, RerankingSettings, TuningSettings
from vitgal.stages import rerank

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
) -> Path:
    """Counts inliers over a grid of settings on the validation set and chooses the best point.

    The best point has the highest Medium mAP; of equal ones the first in the order of the grid: the
    current name, the smallest number. An interrupted run keeps its finished queries, and the result
    does not depend on the machine.

    Args:
        run: its stages global and local of `val_retrieval` are finished (`prepare_validation`).
        ground_truth: of the validation set.
        settings: the grid; the values of `current` are added. `max_queries` are drawn with the seed
            of the verification, as evenly over landmarks as can be.
        current: compared with the best point; sets all that the grid does not vary.
    Returns:
        `<run>/val_retrieval/tuning` with inliers.npy (Q, ..., C) i32, the counts, one axis per
        setting of the grid that they depend on (COUNTED); ap.npy (..., Q) f64, one axis per setting
        of the grid; tuning.json (for `Tuning.read`) and tuned.json, the chosen values as flat
        parameters.
    Raises:
        StageError: a stage is missing or has other settings, or a candidate has no local features.
        TuningError: no query counts.
    """
    engines.check_engine(machine.engine)
    grid = make_grid(settings, current)
    parameters = _parameters(grid, settings, current)
    source = Path(run) / DATASET
    fused = "fused" in (*grid.get("order", ()), current.order)
    files = (*GLOBAL_FILES, "similarities.npy") if fused else GLOBAL_FILES
    inputs = rerank.candidate_inputs(source, ground_truth, files)
    with runs.stage(
        source / "tuning", "tuning", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return stage.folder
        queries = _draw_queries(ground_truth, settings.max_queries, current)
        depth = max(grid["top"])
        lists = _read_lists(source, ground_truth, queries, depth)
        remedy = f"it is shorter than top={depth}: try fewer candidates (tune_tops)"
        store = lists.open_features(source / "local", remedy)
        count = functools.partial(count_grid, store, grid=grid, settings=current)
        rows = rerank.count_queries(lists, count, machine, stage.folder / rerank.JOURNAL, "tuning")
        similarities = np.full(lists.candidates.shape, np.nan)
        if fused:
            similarities = rerank.candidate_similarities(source / "global", lists, queries)
        ap = _all_ap(lists, rows, similarities, grid, current)
        _write_choice(stage.folder, lists, rows, ap, grid, current)
        shutil.rmtree(stage.folder / rerank.JOURNAL, ignore_errors=True)
        recorded = {"engine": machine.engine, "workers": machine.workers, "queries": len(queries)}
        return stage.finish(OUTPUTS, recorded)


def _parameters(grid: Grid, settings: TuningSettings, current: RerankingSettings) -> dict[str, Any]:
    """The grid, the current point in it, and all settings that it does not vary."""
    values = current_values(current)
    # As they are compared where the grid has a ratio test and a fused order, if it has any.
    matched = any("ratio" in name for name in grid.get("matching", ()))
    fused = "fused" in grid.get("order", ())
    fixed = dataclasses.replace(
        current,
        order="fused" if fused else current.order,
        matching=dataclasses.replace(
            current.matching, method="ratio" if matched else current.matching.method
        ),
    ).compared()
    varied = {*grid, "ties", "method" if "matching" in grid else ""}
    return {
        "grid": grid,
        "current": {name: values[name] for name in grid},
        "max_queries": settings.max_queries,
        **{name: value for name, value in fixed.items() if name not in varied},
    }


def _draw_queries(truth: GroundTruth, wanted: int | None, current: RerankingSettings) -> np.ndarray:
    """Draws queries, rising: one of every landmark before a second of any."""
    count = len(truth.queries)
    if wanted is None or wanted >= count:
        return np.arange(count)
    order = np.random.default_rng([current.verification.seed, 3]).permutation(count)
    drawn = pd.Series(find_landmarks(truth).groups[order])
    turns = drawn.groupby(drawn).cumcount().to_numpy()
    return np.sort(order[np.argsort(turns, kind="stable")][:wanted])


def tuned_pairs(
    run: Path, ground_truth: GroundTruth
) -> tuple[rerank.CandidateLists, np.ndarray, np.ndarray]:
    """Reads the pairs of the validation set that tuning verified, at its current settings.

    ground_truth: of the validation set. Returns the candidates of Q queries, their similarities
    (Q, C) float32, padded with nan, and their evidence (Q, C) int32, padded with -1: the count that
    orders them, fused if that was tried. Raises StageError where the stage is missing.
    """
    source = Path(run) / DATASET
    runs.read_stage(source / "tuning", "notebook 06_rerank with tune")
    tuning = Tuning.read(source / "tuning")
    point = dict(zip(tuning.grid, tuning.current, strict=True))
    if "fused" in tuning.grid.get("order", ()):
        point["order"] = tuning.grid["order"].index("fused")
    queries = np.array([ground_truth.queries.index(name) for name in tuning.queries])
    lists = _read_lists(source, ground_truth, queries, max(tuning.grid["top"]))
    counts = map_array(source / "tuning" / "inliers.npy")
    evidence = counts[:, *(point[name] for name in COUNTED if name in point)]
    return lists, rerank.candidate_similarities(source / "global", lists, queries), evidence


def _read_lists(
    folder: Path, truth: GroundTruth, queries: np.ndarray, top: int
) -> rerank.CandidateLists:
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
    return rerank.CandidateLists(truth, truth.database, ranking, images)


def count_grid(
    store: FeatureStore, query: str, names: list[str], *, grid: Grid, settings: RerankingSettings
) -> np.ndarray:
    """Counts the evidence for one query's candidates at every point of the grid.

    names: C database names; one that is not in the store could not be read and counts 0. settings:
    all that the grid does not vary. Returns int32 of shape (..., C), the axes of `pair_counts`.
    """
    features = store[query]
    counts = np.zeros((*_counted_shape(grid), len(names)), np.int32)
    for index, name in enumerate(names):
        if name in store:
            counts[..., index] = pair_counts(features, store[name], grid, settings)
    return counts


def _counted_shape(grid: Grid) -> list[int]:
    return [len(grid[name]) for name in COUNTED if name in grid]


def pair_counts(
    query: LocalFeatures, database: LocalFeatures, grid: Grid, settings: RerankingSettings
) -> np.ndarray:
    """Counts the evidence for one pair at every point of the grid.

    Equal to `inspect_pair` and `weigh` at each point. Features are matched once per method, at the
    greatest distance; a smaller one keeps the nearer matches, and equal matches are verified once.

    settings: all that the grid does not vary. Returns int32 of shape (...), one axis per setting
    of the grid in COUNTED: the count that orders the candidates; for the order "fused" 0 where the
    homography is implausible.
    """
    kept = slice(settings.matching.max_keypoints)
    query, database = query.subset(kept), database.subset(kept)
    values = {name: grid.get(name, [value]) for name, value in current_values(settings).items()}
    prepared = [
        matching.Descriptors.read(features.descriptors, side)
        for features, side in ((query, "query"), (database, "gallery"))
    ]
    distances, furthest = values["max_distance"], max(values["max_distance"])
    counts = np.zeros([len(values[name]) for name in COUNTED], np.int32)
    computed: dict[bytes, np.ndarray] = {}  # by matches
    for m, method in enumerate(values["matching"]):
        method_settings = dataclasses.replace(settings.matching, method=method)
        matches = matching.match_prepared(*prepared, furthest, None, method_settings)
        squares = matching.match_squares(query.descriptors, database.descriptors, matches)
        for d, distance in enumerate(distances):
            nearer = matches[squares < distance * distance]
            if (key := nearer.tobytes()) not in computed:
                computed[key] = _verified_counts(query, database, nearer, values, settings)
            counts[m, :, d] = computed[key]
    return counts.reshape(_counted_shape(grid))


def _verified_counts(
    query: LocalFeatures,
    database: LocalFeatures,
    matches: np.ndarray,
    values: Grid,
    settings: RerankingSettings,
) -> np.ndarray:
    """Verifies matches (M, 2) with each estimator and threshold: (E, T, counts, orders) int32."""
    kinds, orders = values["count"], values["order"]
    tried = values["estimator"], values["threshold"]
    counts = np.zeros((*map(len, tried), len(kinds), len(orders)), np.int32)
    points = query.keypoints[matches[:, 0]], database.keypoints[matches[:, 1]]
    for e, estimator in enumerate(tried[0]):
        for t, threshold in enumerate(tried[1]):
            verification = verify_matches(
                *points,
                dataclasses.replace(
                    settings.verification, estimator=estimator, threshold=threshold
                ),
            )
            if kinds == orders == ["inliers"]:
                counts[e, t] = verification.count
                continue
            evidence = weigh(query, database, PairInspection(matches, verification))
            for k, kind in enumerate(kinds):
                for o, order in enumerate(orders):
                    fused = order == "fused"
                    counts[e, t, k, o] = evidence.believed(kind) if fused else evidence.count(kind)
    return counts


def _all_ap(
    lists: rerank.CandidateLists,
    rows: list[np.ndarray],
    similarities: np.ndarray,
    grid: Grid,
    current: RerankingSettings,
) -> np.ndarray:
    """The AP (..., Q) of every query at each point, from its counts (..., C)."""
    truth, positions = lists.ground_truth, lists.ranking.positions
    labels = positives(truth, PROTOCOL), ignored(truth, PROTOCOL)
    ap = np.empty((*map(len, grid.values()), len(rows)))
    for q, (row, images) in enumerate(zip(rows, lists.images, strict=True)):
        correct, left_out = (label[q] for label in labels)
        later = np.setdiff1d(correct, images)
        ap[..., q] = query_ap(
            row,
            similarities[q, : len(images)],
            np.isin(images, correct),
            positions.rank(q, later, ignored=left_out),
            grid,
            current,
        )
    return ap


def _write_choice(
    folder: Path,
    lists: rerank.CandidateLists,
    rows: list[np.ndarray],
    ap: np.ndarray,
    grid: Grid,
    current: RerankingSettings,
) -> None:
    """Writes the counts, (..., C) of each query; AP (..., Q) at each point; and the best point."""
    truth, ranking = lists.ground_truth, lists.ranking
    width = max(row.shape[-1] for row in rows)
    counts = np.full((len(rows), *rows[0].shape[:-1], width), NOT_VERIFIED, np.int32)
    for padded, row in zip(counts, rows, strict=True):
        padded[..., : row.shape[-1]] = row
    before = protocol.evaluate({PROTOCOL: ranking.positions}, truth)[PROTOCOL]["ap"]
    scored = ~np.isnan(before)
    if not scored.any():
        raise TuningError(f"no query of {DATASET} has an image of its landmark in the database")
    chosen, values = best_point(ap[..., scored]), current_values(current)
    record = {
        "grid": grid,
        "chosen": chosen,
        "current": [tried.index(values[name]) for name, tried in grid.items()],
        "groups": find_landmarks(truth).groups,
        "before": before,
        "queries": truth.queries,
    }
    runs.write_array(folder / "inliers.npy", counts)
    runs.write_array(folder / "ap.npy", ap)
    runs.write_json(folder / "tuning.json", record)
    runs.write_json(folder / "tuned.json", point_values(grid, chosen))
