"""Thresholds of reranking chosen on the retrieval validation set, never on a test set.

The set is what 01_data_split wrote to val_retrieval.csv: images of landmarks that no classifier
was trained on. Here it becomes a benchmark like any other, `val_retrieval`, every image of a
query's landmark an easy one; then inliers are counted for a grid of thresholds, and mAP follows
for each of them and for each number of candidates.
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from vitgal import engines, runs
from vitgal.data import revisited, splits
from vitgal.data.revisited import GroundTruth
from vitgal.evaluation import protocol
from vitgal.evaluation.tuning import DATASET, PROTOCOL, TuningError, _best, _grid
from vitgal.features.local import LocalFeatures
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval import matching, reranking, shortlists, verification
from vitgal.retrieval.ranking import Positions
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings
from vitgal.stages import rerank

JOURNAL = "partial"  # counts of the queries that are done, until all are
OUTPUTS = ("inliers.npy", "ap.npy", "tuned.json", "tuning.json")


def validation_benchmark(run: Path, image_folder: Path) -> Path:
    """Lays the run's retrieval validation set out as a benchmark beside the run's own data.

    Writes `<run>/data/benchmark/gnd_val_retrieval.pkl` and, below `jpg/val_retrieval/`, links to
    the images; what is there already stays. The query's box is its whole photograph.

    image_folder: what holds the paths of val_retrieval.csv. Returns the benchmark's folder.
    Raises TuningError where the split has no validation queries, FileNotFoundError where it or an
    image is missing.
    """
    folder, image_folder = run / "data" / "benchmark", Path(image_folder)
    runs.read_stage(run / "split", "notebook 01_data_split")
    table = splits.read_split(run / "split", DATASET)
    names = [f"{DATASET}/{Path(path).stem}" for path in table["path"]]
    if not len(table) or table["role"].ne("query").all():
        raise TuningError(
            f"the split in {run / 'split'} has no validation queries: run 01_data_split with "
            "val_queries above 0"
        )
    for name, path in zip(names, table["path"], strict=True):
        _link(folder / "jpg" / f"{name}.jpg", image_folder / path, run)
    table = table.assign(path=names)
    queries = table.loc[table["role"] == "query", "path"]
    boxes = _whole_images([folder / "jpg" / f"{name}.jpg" for name in queries])
    truth = splits.validation_ground_truth(table, boxes)
    target = folder / f"gnd_{DATASET}.pkl"
    if not target.exists() or _differs(target, truth):
        revisited.write_ground_truth(target, truth)
    return folder


def _link(link: Path, image: Path, run: Path) -> None:
    """A link to an image: relative within the run, so that a run can be moved, else absolute."""
    if not image.is_file():
        raise FileNotFoundError(f"the validation image {image} is not there: check image_folder")
    image = image.resolve()
    inside = image.is_relative_to(run.resolve())
    target = os.path.relpath(image, link.parent.resolve()) if inside else str(image)
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _whole_images(paths: Sequence[Path]) -> np.ndarray:
    """The box of each whole photograph, (Q, 4) float64; reads the headers alone."""
    boxes = []
    for path in paths:
        with Image.open(path) as image:
            boxes.append((0.0, 0.0, *map(float, image.size)))
    return np.array(boxes)


def _differs(path: Path, truth: GroundTruth) -> bool:
    return revisited.load_ground_truth(path).fingerprint != truth.fingerprint


def prepare(
    run: Path,
    *,
    like: str,
    image_folder: Path,
    model: Path,
    threads: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Describes the validation set exactly as another data set of the run was described.

    like: that data set; sizes, scales and all else are read off its finished global and local
    stages. image_folder: see `validation_benchmark`. model: the weights. threads: torch's. engine,
    ray_address: see `extraction.evaluate_global`. Returns `<run>/val_retrieval`. Finished stages
    return at once; one that was described otherwise is made anew with `overwrite`, else refused
    (StageError). Raises TuningError where that data set was ranked by another system's descriptors
    or by other weights.
    """
    stages = {
        "global": runs.read_stage(run / like / "global", rerank.GLOBAL_NOTEBOOK),
        "local": runs.read_stage(run / like / "local", rerank.LOCAL_NOTEBOOK),
    }
    if "descriptors" in stages["global"]["inputs"]:
        raise TuningError(
            f"{like} was ranked by descriptors made elsewhere, and there are none of {DATASET}: "
            "set tune to False, or tune in a run of our own model"
        )
    data_folder = validation_benchmark(run, image_folder)
    from vitgal.models import inference
    from vitgal.stages import describe, extract  # brings torch along

    dataset = revisited.open_dataset(DATASET, data_folder)
    machine = MachineSettings(threads=threads, engine=engine, ray_address=ray_address)
    for name, make, section in (
        ("global", describe.evaluate_global, GlobalSettings),
        ("local", extract.extract_shortlist, LocalSettings),
    ):
        if stages[name]["inputs"]["weights"] != inference.weights_fingerprint(model):
            raise TuningError(f"{run / like / name} was made with other weights than {model}")
        settings = section(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in stages[name]["parameters"].items()
            }
        )
        try:
            make(run, dataset, settings, machine, model=model)
        except runs.StageError:
            if not overwrite:
                raise
            make(run, dataset, settings, machine, model=model, overwrite=True)
    return run / DATASET


def tune(
    run: Path,
    *,
    data_folder: Path,
    max_distances: Sequence[float],
    thresholds: Sequence[float],
    tops: Sequence[int],
    current: Mapping[str, float],
    estimator: str = "degensac",
    iterations: int = 2000,
    confidence: float = 1.0,
    seed: int = 0,
    max_keypoints: int | None = None,
    max_queries: int | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Counts inliers over a grid of thresholds on the validation set and chooses the best point.

    Only `val_retrieval` is ever looked at: its stages global and local are finished in the run
    (`prepare`). The best point has the highest Medium mAP; of equal ones the first, that is the
    smallest max_distance, then threshold, then number of candidates.

    Args:
        data_folder: holds `gnd_val_retrieval.pkl` (`validation_benchmark`).
        max_distances, thresholds, tops: the grid; the values of `current` are added.
        current: the max_distance, threshold and top that the best is compared with.
        max_queries: use this many, drawn with `seed` (None: all).
        estimator … max_keypoints: of `reranking.verify`.
        workers: processes (None: one a core). The result does not depend on it.
        engine, ray_address: see `reranking.rerank_shortlist`.
    Returns:
        `<run>/val_retrieval/tuning` with inliers.npy (Q, D, T, C) i32, ap.npy (D, T, C', Q) f64,
        tuning.json (for `Tuning.read`) and tuned.json, the chosen values as flat parameters.
        Interrupted, it keeps the queries that are done.
    Raises:
        StageError: a stage is missing or holds other settings.  TuningError: an empty grid, or a
        value that makes no sense.
    """
    engines.check_engine(engine, ray_address)
    grid = _grid(max_distances, thresholds, tops, current)
    truth = revisited.load_ground_truth(Path(data_folder) / f"gnd_{DATASET}.pkl")
    folder = run / DATASET
    options = dict(estimator=estimator, iterations=iterations, confidence=confidence, seed=seed)
    parameters = {"grid": grid, "current": dict(current), "max_keypoints": max_keypoints}
    parameters |= {"max_queries": max_queries, **options}
    inputs = _inputs(folder, truth)
    with runs.stage(
        folder / "tuning", "tuning", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return stage.folder
        listed = _Listed.read(folder, truth, max(grid["top"]), max_queries, seed)
        store = FeatureStore.open((folder / "local").absolute())
        _check_store(store, listed, max(grid["top"]))
        options |= {"max_keypoints": max_keypoints}
        place = dict(engine=engine, address=ray_address, workers=workers)
        counts = _counted(stage.folder, listed, store, grid, options, place, progress)
        _choose(stage.folder, listed, counts, grid, current)
        shutil.rmtree(stage.folder / JOURNAL, ignore_errors=True)
        return stage.finish(OUTPUTS, engine=engine, workers=workers, queries=len(listed.images))


def _inputs(folder: Path, truth: GroundTruth) -> dict[str, str]:
    local = runs.read_stage(folder / "local", f"05_local_extraction with dataset {DATASET}")
    names = ("ranks.npy", "positions.npz", "shortlist.txt")
    made_by = f"04_global_evaluation with dataset {DATASET}"
    inputs = {name: runs.output_fingerprint(folder / "global", name, made_by) for name in names}
    inputs["local features"] = runs.fingerprint(local["outputs"])
    return inputs | {"ground truth": truth.fingerprint}


@dataclass(frozen=True, eq=False)
class _Listed:
    """The queries that are used, their rankings, and their candidates."""

    truth: GroundTruth
    ranks: np.ndarray  # (K, Q)
    positions: Positions
    images: list[np.ndarray]  # per query database indices, best first

    @classmethod
    def read(
        cls, folder: Path, truth: GroundTruth, top: int, number: int | None, seed: int
    ) -> "_Listed":
        count = len(truth.queries)
        chosen = np.arange(count)
        if number is not None and number < count:
            chosen = np.sort(np.random.default_rng([seed, 3]).choice(count, number, replace=False))
        ranks = np.load(folder / "global" / "ranks.npy", allow_pickle=False)[:, chosen]
        places = Positions.load(folder / "global" / "positions.npz")
        pick = {
            name: [getattr(truth, name)[q] for q in chosen]
            for name in ("queries", "easy", "hard", "junk")
        }
        truth = dataclasses.replace(truth, boxes=truth.boxes[chosen], **pick)
        return cls(
            truth,
            ranks,
            places.select(chosen),
            shortlists.candidates(ranks, truth, PROTOCOL, top=top),
        )


def _check_store(store: FeatureStore, listed: _Listed, top: int) -> None:
    """Raises TuningError where a candidate was never extracted."""
    names = {listed.truth.database[image] for images in listed.images for image in images}
    missing = sorted(names - set(store.names) - store.failures.keys())
    if missing:
        raise TuningError(
            f"top={top} needs {missing[0]}, of which {store.folder} has no local features: its "
            "short list was shorter; try fewer candidates (tune_tops)"
        )


def _counted(
    folder: Path,
    listed: _Listed,
    store: FeatureStore,
    grid: Mapping[str, list],
    options: dict,
    place: dict,
    progress: bool,
) -> np.ndarray:
    """Inlier counts (Q, D, T, C) int32, -1 padded; queries already in the journal are kept."""
    names, queries = listed.truth.database, listed.truth.queries
    done = {int(path.stem): np.load(path) for path in (folder / JOURNAL).glob("*.npy")}
    tasks = [
        (q, queries[q], [names[image] for image in images])
        for q, images in enumerate(listed.images)
        if q not in done
    ]
    bar = dict(total=len(queries), initial=len(done), desc="tuning", unit="query")
    count = joblib.delayed(_count_query)
    with engines.parallel(**place, tasks=len(tasks)) as pool:
        found = pool(count(store, *task, dict(grid), options) for task in tasks)
        for q, counts in tqdm(found, **bar, disable=not progress):
            runs.write_array(folder / JOURNAL / f"{q}.npy", counts)
            done[q] = counts
    width = max((len(images) for images in listed.images), default=0)
    sizes = len(grid["max_distance"]), len(grid["threshold"]), width
    table = np.full((len(queries), *sizes), reranking.NOT_VERIFIED, np.int32)
    for q, counts in done.items():
        table[q, :, :, : counts.shape[2]] = counts
    return table


def _count_query(
    store: FeatureStore, q: int, query: str, names: list[str], grid: dict, options: dict
) -> tuple[int, np.ndarray]:
    """One query's inlier counts (D, T, candidates); an image that could not be read counts 0."""
    ours = store[query]
    counts = np.zeros((len(grid["max_distance"]), len(grid["threshold"]), len(names)), np.int32)
    for place, name in enumerate(names):
        if name in store:
            counts[:, :, place] = pair_counts(ours, store[name], grid, **options)
    return q, counts


def pair_counts(
    query: LocalFeatures,
    database: LocalFeatures,
    grid: Mapping[str, Sequence[float]],
    *,
    max_keypoints: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Inliers (D, T) int32 of one pair at every max_distance and threshold of the grid.

    Equal to `reranking.inspect_pair` at each point: matched once, at the greatest distance; at a
    smaller one the matches are those of them that lie nearer. options: `reranking.verify`'s.
    """
    query, database = (one.subset(slice(max_keypoints)) for one in (query, database))
    distances = grid["max_distance"]
    pairs = matching.match(query.descriptors, database.descriptors, max(distances))
    squares = matching.match_squares(query.descriptors, database.descriptors, pairs)
    counts = np.zeros((len(distances), len(grid["threshold"])), np.int32)
    known: dict[int, np.ndarray] = {}  # the matches nest: as many are the same ones
    for row, distance in zip(counts, distances, strict=True):
        kept = pairs[squares < distance * distance]
        if len(kept) not in known:
            points = query.keypoints[kept[:, 0]], database.keypoints[kept[:, 1]]
            known[len(kept)] = np.array(
                [
                    verification.verify(*points, threshold=threshold, **options).count
                    for threshold in grid["threshold"]
                ]
            )
        row[:] = known[len(kept)]
    return counts


def _choose(
    folder: Path,
    listed: _Listed,
    counts: np.ndarray,
    grid: Mapping[str, list],
    current: Mapping[str, float],
) -> None:
    """Writes the counts, the AP that follow, and the best point."""
    sizes = [len(values) for values in grid.values()]
    ap = np.empty((*sizes, len(listed.images)))
    width = max((len(images) for images in listed.images), default=0)
    candidates = np.full((len(listed.images), width), -1, np.int32)
    for row, images in zip(candidates, listed.images, strict=True):
        row[: len(images)] = images
    for d, t, c in itertools.product(*map(range, sizes)):
        verified = reranking.Reranking(
            candidates, counts[:, d, t], listed.truth, PROTOCOL, top=grid["top"][c]
        )
        places = listed.positions.reranked(listed.ranks, verified)
        ap[d, t, c] = protocol.evaluate({PROTOCOL: places}, listed.truth)[PROTOCOL]["ap"]
    before = protocol.evaluate({PROTOCOL: listed.positions}, listed.truth)[PROTOCOL]["ap"]
    scored = ~np.isnan(before)
    if not scored.any():
        raise TuningError(f"no query of {DATASET} has an image of its landmark in the database")
    chosen = _best(ap[..., scored])
    landmarks_of = [images.tobytes() for images in listed.truth.easy]
    groups = [landmarks_of.index(one) for one in landmarks_of]
    here = [grid[name].index(current[name]) for name in grid]
    record = {"grid": grid, "chosen": chosen, "current": here, "groups": groups}
    tuned = {name: grid[name][at] for name, at in zip(grid, chosen, strict=True)}
    runs.write_array(folder / "inliers.npy", counts)
    runs.write_array(folder / "ap.npy", ap)
    runs.write_json(
        folder / "tuning.json", record | {"before": before, "queries": listed.truth.queries}
    )
    runs.write_json(folder / "tuned.json", tuned)
