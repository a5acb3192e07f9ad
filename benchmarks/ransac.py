"""RANSAC estimators side by side on finished runs: inliers, time, mAP, and their spread over seeds.

    python benchmarks/ransac.py RUN [RUN ...] [--data FOLDER] [--max-distance 0.95] [--workers 2]

RUN is a run's folder; every data set in it with finished stages global and local is measured, the
validation set left out (or those that --dataset names). Ground truths are looked for in the run's
own data/benchmark, then in each --data folder.

Each pair of a query and a candidate is matched once and verified by every estimator with every
seed. Positives are a query's easy and hard images, negatives the candidates without a label. The
spread of a pair is the standard deviation of its inliers over the seeds. Times are processor time.
mAP is that of one short list a protocol, as `vitgal.reranking` does it, by the inliers; and, in a
second table, by the candidate's features among the inliers, each counted once: matches are one way,
so that many of the query's features may share one, and a homography that collapses the query onto a
few of them has many inliers.

--results FOLDER keeps the counts: with --estimator or --seeds FIRST STOP a call measures a part,
what is there already is not measured again, and the tables show all seeds that are there.
"""

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a core a process; NumPy reads it when it is imported

import joblib
import numpy as np
from tqdm import tqdm

from vitgal import runs
from vitgal.data.revisited import GroundTruth, labelled, load_ground_truth, positives
from vitgal.evaluation import tuning
from vitgal.evaluation.protocol import evaluate
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval import shortlists
from vitgal.retrieval.matching import Descriptors, match_prepared
from vitgal.retrieval.ranking import Positions
from vitgal.retrieval.reranking import NOT_VERIFIED, Reranking
from vitgal.retrieval.verification import ESTIMATORS, verify

SHOWN = ("medium", "hard")
STAGES = ("global", "local")
COUNTED = ("inliers", "features")


@dataclass(frozen=True, eq=False)
class Shortlists:
    """The global ranking of a data set, its candidates and their local features."""

    truth: GroundTruth
    database: list[str]
    ranks: np.ndarray  # (K, Q)
    positions: Positions
    candidates: np.ndarray  # (Q, C), padded with -1
    store: FeatureStore
    key: str = ""  # of the results: the data set, and what was made of it

    @classmethod
    def read(cls, folder: Path, truth: GroundTruth, top: int) -> "Shortlists":
        names = runs.read_json(folder / "global" / "names.json")
        database = names["database"]
        if (names["queries"], database[: len(truth.database)]) != (truth.queries, truth.database):
            raise SystemExit(f"{folder} was not made for the ground truth {truth.name}")
        ranks = np.load(folder / "global" / "ranks.npy", allow_pickle=False)
        lists = shortlists.shortlist(ranks, truth, top=top)
        candidates = np.full((len(lists), max(map(len, lists))), NOT_VERIFIED, np.int32)
        for row, images in zip(candidates, lists, strict=True):
            row[: len(images)] = images
        positions = Positions.load(folder / "global" / "positions.npz")
        store = FeatureStore.open((folder / "local").absolute())
        made = [runs.read_stage(folder / one, "the notebooks")["outputs"] for one in STAGES]
        key = f"{truth.name}-{runs.fingerprint(made)[:8]}"
        return cls(truth, database, ranks, positions, candidates, store, key)

    @property
    def positive(self) -> np.ndarray:
        """(Q, C) bool: candidates that show the query's landmark."""
        images = positives(self.truth, "medium")
        return np.array(
            [np.isin(row, some) for row, some in zip(self.candidates, images, strict=True)]
        )

    @property
    def negative(self) -> np.ndarray:
        """(Q, C) bool: candidates without a label."""
        rows = zip(self.candidates, labelled(self.truth), strict=True)
        return np.array([~np.isin(row, some) for row, some in rows]) & (self.candidates >= 0)


# Measuring


def count(
    listed: Shortlists, estimators: Sequence[str], seeds: Sequence[int], options: dict, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts (2, E, S, Q, C) int32, padded with -1, and processor seconds (1 + E,).

    The two are those of COUNTED: inliers, and the candidate's features among them. The first
    of the seconds are matching's, the others an estimator's with all seeds. options: max_distance
    and those of `verify`. An image that could not be read counts 0.
    """
    work = functools.partial(count_query, listed.store, estimators, seeds, options)
    tasks = [
        joblib.delayed(work)(query, [listed.database[image] for image in row[row >= 0]])
        for query, row in zip(listed.truth.queries, listed.candidates, strict=True)
    ]
    shape = len(COUNTED), len(estimators), len(seeds), *listed.candidates.shape
    counts, seconds = np.full(shape, NOT_VERIFIED, np.int32), np.zeros(1 + len(estimators))
    # Processes, not threads: pydegensac draws from one random state a process.
    found = joblib.Parallel(n_jobs=workers, return_as="generator")(tasks)
    label = f"{listed.truth.name}: {', '.join(estimators)}"
    for q, (ours, spent) in enumerate(tqdm(found, label, total=len(tasks), unit="query")):
        counts[..., q, : ours.shape[-1]] = ours
        seconds += spent
    return counts, seconds


def count_query(
    store: FeatureStore,
    estimators: Sequence[str],
    seeds: Sequence[int],
    options: dict,
    query: str,
    names: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """One query's counts (2, E, S, candidates) and processor seconds (1 + E,)."""
    options = dict(options)
    max_distance = options.pop("max_distance")
    counts = np.zeros((len(COUNTED), len(estimators), len(seeds), len(names)), np.int32)
    readable = [place for place, name in enumerate(names) if name in store]
    ours, theirs = store[query], [store[names[place]] for place in readable]
    times = [time.process_time()]
    prepared = Descriptors.read(ours.descriptors, "query")
    galleries = [Descriptors.read(features.descriptors, "gallery") for features in theirs]
    matches = [match_prepared(prepared, gallery, max_distance) for gallery in galleries]
    times.append(time.process_time())
    for e, estimator in enumerate(estimators):
        for place, features, pairs in zip(readable, theirs, matches, strict=True):
            ends = ours.keypoints[pairs[:, 0]], features.keypoints[pairs[:, 1]]
            for row, seed in enumerate(seeds):
                found = verify(*ends, estimator=estimator, seed=seed, **options)
                once = np.unique(pairs[found.inliers, 1]).size
                counts[:, e, row, place] = found.count, once
        times.append(time.process_time())
    return counts, np.diff(times)


# Summing up


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (of a sample), least and greatest of two values or more."""
    values = np.asarray(values, np.float64)
    spread = {"sd": values.std(ddof=1), "min": values.min(), "max": values.max()}
    return {"mean": values.mean(), **spread}


def count_summary(counts: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """What the counts (S, Q, C) of the chosen pairs (Q, C) say, over S seeds.

    The summary of the means of each seed, and `pair`, the mean of the pairs' own standard
    deviations. Without any chosen pair all nan.
    """
    if not chosen.any():
        return dict.fromkeys(("mean", "sd", "min", "max", "pair"), np.nan)
    picked = counts[:, chosen]
    return summary(picked.mean(axis=1)) | {"pair": picked.std(axis=0, ddof=1).mean()}


def scores(listed: Shortlists, counts: np.ndarray, top: int) -> dict[str, float]:
    """mAP of each shown protocol after reranking by counts (Q, C)."""
    positions = {}
    for protocol in SHOWN:
        reranking = Reranking(listed.candidates, counts, listed.truth, protocol, top)
        positions[protocol] = listed.positions.reranked(listed.ranks, reranking)
    return {p: one["map"] for p, one in evaluate(positions, listed.truth).items()}


def measure(
    folder: Path,
    listed: Shortlists,
    estimators: Sequence[str],
    seeds: Sequence[int],
    options: dict,
    workers: int,
) -> None:
    """Writes `<key>-<estimator>-<seed>.npz` for every seed that the folder lacks."""
    name = listed.key
    missing = [
        seed
        for seed in seeds
        if not all((folder / f"{name}-{one}-{seed}.npz").exists() for one in estimators)
    ]
    if not missing:
        return
    counts, seconds = count(listed, estimators, missing, options, workers)
    for e, estimator in enumerate(estimators):
        for s, seed in enumerate(missing):
            spent = np.array([seconds[0], seconds[1 + e] / len(missing)])
            path = folder / f"{name}-{estimator}-{seed}.npz"
            runs.write_arrays(path, counts=counts[:, e, s], seconds=spent)


def measured(folder: Path, listed: Shortlists, top: int) -> dict[str, dict]:
    """Each estimator's figures over all seeds that are in the folder; two at least."""
    pairs = int((listed.candidates >= 0).sum())
    found = {}
    for estimator in ESTIMATORS:
        paths = sorted(folder.glob(f"{listed.key}-{estimator}-*.npz"))
        if len(paths) < 2:
            continue
        files = [np.load(path, allow_pickle=False) for path in paths]
        spent = 1e3 * np.mean([file["seconds"] for file in files], axis=0) / pairs
        found[estimator] = {"pairs": pairs, "seeds": len(paths)}
        found[estimator] |= {"matching": spent[0], "verifying": spent[1]}
        for way, counts in zip(COUNTED, np.stack([f["counts"] for f in files], 1), strict=True):
            found[estimator][way] = figures(listed, counts, top)
    return found


def figures(listed: Shortlists, counts: np.ndarray, top: int) -> dict[str, dict]:
    """What one estimator's counts (S, Q, C) of one kind give."""
    maps = [scores(listed, of_seed, top) for of_seed in counts]
    return {
        "positive": count_summary(counts, listed.positive),
        "negative": count_summary(counts, listed.negative),
        "map": {protocol: summary([one[protocol] for one in maps]) for protocol in SHOWN},
    }


# Tables


def show(listed: Shortlists, found: dict[str, dict]) -> None:
    """One data set's estimators in a table for each way of counting; mAP in percent."""
    before = evaluate(listed.positions, listed.truth)
    before = ", ".join(f"{protocol} {100 * before[protocol]['map']:.1f}" for protocol in SHOWN)
    print(f"\n{listed.truth.name}: global mAP {before}")
    for estimator, row in found.items():
        print(f"{estimator}: {row['pairs']} pairs, {row['seeds']} seeds", end="; ")
        print(f"{row['matching']:.2f} ms a pair for matching")
    for way in COUNTED:
        heads = [way, "positives", "negatives", "spread of a pair, positives / negatives"]
        heads += ["ms a pair", *(f"mAP {protocol}" for protocol in SHOWN)]
        print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        for estimator, row in found.items():
            print("| " + " | ".join([estimator, *cells(row, way)]) + " |")


def cells(row: dict, way: str) -> list[str]:
    sides = row[way]["positive"], row[way]["negative"]
    texts = [f"{side['mean']:.2f} ± {side['sd']:.2f}" for side in sides]
    texts.append(" / ".join(f"{side['pair']:.1f}" for side in sides))
    texts.append(f"{row['verifying']:.2f}")
    for one in row[way]["map"].values():
        mean, sd, least, most = (100 * one[key] for key in ("mean", "sd", "min", "max"))
        texts.append(f"{mean:.1f} ± {sd:.1f} ({least:.1f} to {most:.1f})")
    return texts


# The command


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--dataset", action="append", help="only these data sets")
    parser.add_argument("--data", action="append", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--estimator", choices=ESTIMATORS, action="append")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 10), metavar=("FIRST", "STOP"))
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--max-distance", type=float, default=0.82)
    parser.add_argument("--threshold", type=float, default=16.0)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--confidence", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=joblib.cpu_count())
    parser.add_argument("--results", type=Path, metavar="FOLDER")
    return parser.parse_args()


def datasets(run: Path, wanted: Sequence[str] | None) -> list[Path]:
    """The folders of a run's data sets whose stages global and local are there."""
    found = [path.parents[1] for path in sorted(run.glob("*/local/stage.json"))]
    found = [path for path in found if (path / "global" / "stage.json").exists()]
    found = [path for path in found if path.name in (wanted or {path.name} - {tuning.DATASET})]
    if not found:
        raise SystemExit(f"{run} has no data set with finished stages global and local")
    return found


def ground_truth(folder: Path, data: Sequence[Path]) -> GroundTruth:
    name = f"gnd_{folder.name}.pkl"
    places = [folder.parent / "data" / "benchmark", *data]
    for place in places:
        if (place / name).exists():
            return load_ground_truth(place / name)
    raise SystemExit(f"no {name} in {', '.join(map(str, places))}: name its folder with --data")


def main() -> None:
    arguments = read_arguments()
    names = ("max_distance", "threshold", "iterations", "confidence")
    options = {name: getattr(arguments, name) for name in names}
    settings = options | {"top": arguments.top}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    with tempfile.TemporaryDirectory() as temporary:
        results = arguments.results or Path(temporary)
        if not (results / "settings.json").exists():
            runs.write_json(results / "settings.json", settings)
        if (kept := runs.read_json(results / "settings.json")) != settings:
            raise SystemExit(f"{results} holds results of {kept}: name another folder")
        for folder in [path for run in arguments.runs for path in datasets(run, arguments.dataset)]:
            listed = Shortlists.read(folder, ground_truth(folder, arguments.data), arguments.top)
            estimators = arguments.estimator or list(ESTIMATORS)
            place = options, arguments.workers
            measure(results, listed, estimators, range(*arguments.seeds), *place)
            if found := measured(results, listed, arguments.top):
                show(listed, found)
            else:
                print(f"{listed.truth.name}: a spread needs two seeds at least")


if __name__ == "__main__":
    main()
