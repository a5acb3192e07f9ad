"""RANSAC estimators side by side on finished runs: inliers, time, mAP, and their spread over seeds.

    python benchmarks/ransac.py RUN [RUN ...] [--data FOLDER] [--max-distance 0.95] [--workers 2]
        [--matching mutual] [--weight 2] [--cap 60]

RUN is a run's folder; every data set in it with finished stages global and local is measured, the
validation set left out (or those that --dataset names). Ground truths are looked for in the run's
own data/benchmark, then in each --data folder.

Each pair of a query and a candidate is matched once and verified by every estimator with every
seed. Positives are a query's easy and hard images, negatives the candidates without a label. The
spread of a pair is the standard deviation of its inliers over the seeds. Times are processor time.
mAP is that of one short list a protocol, as `vitgal.reranking` does it, in three tables: by the
inliers; by the features among the inliers, each counted once (with one-way matches many of the
query's features may share one, and a homography that collapses the query onto a few of them has
many inliers); and fused, as `vitgal.retrieval.fused_scores`, where the evidence is the features of
a homography that is not doubted (`vitgal.retrieval.Evidence`), else 0.

--results FOLDER keeps the counts: with --estimator or --seeds FIRST STOP a call measures a part,
what is there already is not measured again, and the tables show all seeds that are there.
"""

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from vitgal.retrieval.evidence import weigh
from vitgal.retrieval.matching import Descriptors, match_prepared
from vitgal.retrieval.ranking import NOT_VERIFIED, Fusion, Ranking, Reranking
from vitgal.retrieval.verification import ESTIMATORS, PairInspection, verify_matches
from vitgal.settings import MatchingSettings, RerankingSettings, VerificationSettings
from vitgal.settings.sections import MATCHINGS
from vitgal.stages.rerank import CandidateLists, candidate_similarities

SHOWN = ("medium", "hard")
STAGES = ("global", "local")
COUNTED = ("inliers", "features", "evidence")
WAYS = ("inliers", "features", "fused")  # of ordering, by these


@dataclass(frozen=True, eq=False)
class Shortlists:
    """The global ranking of a data set, its candidates and their local features."""

    truth: GroundTruth
    database: list[str]
    ranking: Ranking
    candidates: np.ndarray  # (Q, C) database indices, padded with -1
    store: FeatureStore
    key: str = ""  # of the results: the data set and the content of its stages
    similarities: np.ndarray | None = None  # (Q, C) of the candidates, padded with nan

    @classmethod
    def read(cls, folder: Path, truth: GroundTruth, top: int) -> "Shortlists":
        names = runs.read_json(folder / "global" / "names.json")
        database = names["database"]
        if (names["queries"], database[: len(truth.database)]) != (truth.queries, truth.database):
            raise SystemExit(f"{folder} was not made for the ground truth {truth.name}")
        ranking = Ranking.load(folder / "global")
        images = shortlists.shortlist(ranking.order, truth, top=top)
        lists = CandidateLists(truth, database, ranking, images)
        similarities = candidate_similarities(folder / "global", lists)
        store = FeatureStore.open((folder / "local").absolute())
        outputs = [runs.read_stage(folder / stage, "the notebooks")["outputs"] for stage in STAGES]
        key = f"{truth.name}-{runs.fingerprint(outputs)[:8]}"
        return cls(truth, database, ranking, lists.candidates, store, key, similarities)

    @property
    def positive(self) -> np.ndarray:
        """(Q, C) bool: candidates that show the query's landmark."""
        rows = zip(self.candidates, positives(self.truth, "medium"), strict=True)
        return np.array([np.isin(row, images) for row, images in rows])

    @property
    def negative(self) -> np.ndarray:
        """(Q, C) bool: candidates without a label."""
        rows = zip(self.candidates, labelled(self.truth), strict=True)
        return np.array([~np.isin(row, images) for row, images in rows]) & (self.candidates >= 0)


# Measuring


def count(
    lists: Shortlists,
    estimators: Sequence[str],
    seeds: Sequence[int],
    settings: RerankingSettings,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts (3, E, S, Q, C) int32, padded with -1, and processor seconds (1 + E,).

    The counts are those of COUNTED. The first of the seconds are those of matching, the others
    those of an estimator with all seeds. settings: all but estimator and seed. An image that could
    not be read counts 0.
    """
    work = functools.partial(count_query, lists.store, estimators, seeds, settings)
    tasks = [
        joblib.delayed(work)(query, [lists.database[image] for image in row[row >= 0]])
        for query, row in zip(lists.truth.queries, lists.candidates, strict=True)
    ]
    shape = len(COUNTED), len(estimators), len(seeds), *lists.candidates.shape
    counts, seconds = np.full(shape, NOT_VERIFIED, np.int32), np.zeros(1 + len(estimators))
    # Processes, not threads: pydegensac draws from one random state a process.
    results = joblib.Parallel(n_jobs=workers, return_as="generator")(tasks)
    label = f"{lists.truth.name}: {', '.join(estimators)}"
    for q, (row, elapsed) in enumerate(tqdm(results, label, total=len(tasks), unit="query")):
        counts[..., q, : row.shape[-1]] = row
        seconds += elapsed
    return counts, seconds


def count_query(
    store: FeatureStore,
    estimators: Sequence[str],
    seeds: Sequence[int],
    settings: RerankingSettings,
    query: str,
    names: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """One query's counts (3, E, S, candidates) and processor seconds (1 + E,)."""
    counts = np.zeros((len(COUNTED), len(estimators), len(seeds), len(names)), np.int32)
    readable = [index for index, name in enumerate(names) if name in store]
    query_features, candidates = store[query], [store[names[index]] for index in readable]
    times = [time.process_time()]
    prepared = Descriptors.read(query_features.descriptors, "query")
    galleries = [Descriptors.read(features.descriptors, "gallery") for features in candidates]
    limit, way = settings.matching.max_distance, settings.matching
    matches = [match_prepared(prepared, gallery, limit, None, way) for gallery in galleries]
    times.append(time.process_time())
    for e, estimator in enumerate(estimators):
        for index, features, pairs in zip(readable, candidates, matches, strict=True):
            points = query_features.keypoints[pairs[:, 0]], features.keypoints[pairs[:, 1]]
            for row, seed in enumerate(seeds):
                verification = replace(settings.verification, estimator=estimator, seed=seed)
                result = verify_matches(*points, verification)
                found = weigh(query_features, features, PairInspection(pairs, result))
                counts[:, e, row, index] = found.inliers, found.features, found.believed("features")
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


def scores(
    lists: Shortlists, counts: np.ndarray, top: int, fusion: Fusion | None = None
) -> dict[str, float]:
    """mAP of each shown protocol after reranking by counts (Q, C), or by these and similarities."""
    positions = {}
    for protocol in SHOWN:
        reranking = Reranking(lists.candidates, counts, lists.truth, protocol, top, fusion=fusion)
        positions[protocol] = lists.ranking.reranked(reranking).positions
    results = evaluate(positions, lists.truth)
    return {protocol: results[protocol]["map"] for protocol in results}


def measure(
    folder: Path,
    lists: Shortlists,
    estimators: Sequence[str],
    seeds: Sequence[int],
    settings: RerankingSettings,
    workers: int,
) -> None:
    """Writes `<key>-<estimator>-<seed>.npz` for every seed that the folder lacks."""
    name = lists.key
    missing = [
        seed
        for seed in seeds
        if not all((folder / f"{name}-{one}-{seed}.npz").exists() for one in estimators)
    ]
    if not missing:
        return
    counts, seconds = count(lists, estimators, missing, settings, workers)
    for e, estimator in enumerate(estimators):
        for s, seed in enumerate(missing):
            spent = np.array([seconds[0], seconds[1 + e] / len(missing)])
            path = folder / f"{name}-{estimator}-{seed}.npz"
            runs.write_arrays(path, {"counts": counts[:, e, s], "seconds": spent})


def measured(folder: Path, lists: Shortlists, settings: RerankingSettings) -> dict[str, dict]:
    """Each estimator's figures over all seeds that are in the folder; two at least."""
    fusion = Fusion(lists.similarities, settings.fused_weight, settings.fused_cap)
    pairs = int((lists.candidates >= 0).sum())
    found = {}
    for estimator in ESTIMATORS:
        paths = sorted(folder.glob(f"{lists.key}-{estimator}-*.npz"))
        if len(paths) < 2:
            continue
        files = [np.load(path, allow_pickle=False) for path in paths]
        spent = 1e3 * np.mean([file["seconds"] for file in files], axis=0) / pairs
        found[estimator] = {"pairs": pairs, "seeds": len(paths)}
        found[estimator] |= {"matching": spent[0], "verifying": spent[1]}
        for way, counts in zip(WAYS, np.stack([f["counts"] for f in files], 1), strict=True):
            fused = fusion if way == "fused" else None
            found[estimator][way] = figures(lists, counts, settings.top, fused)
    return found


def figures(
    lists: Shortlists, counts: np.ndarray, top: int, fusion: Fusion | None
) -> dict[str, dict]:
    """What one estimator's counts (S, Q, C) of one kind give."""
    maps = [scores(lists, of_seed, top, fusion) for of_seed in counts]
    return {
        "positive": count_summary(counts, lists.positive),
        "negative": count_summary(counts, lists.negative),
        "map": {protocol: summary([one[protocol] for one in maps]) for protocol in SHOWN},
    }


# Tables


def show(lists: Shortlists, found: dict[str, dict]) -> None:
    """One data set's estimators in a table for each way of counting; mAP in percent."""
    before = evaluate(lists.ranking.positions, lists.truth)
    before = ", ".join(f"{protocol} {100 * before[protocol]['map']:.1f}" for protocol in SHOWN)
    print(f"\n{lists.truth.name}: global mAP {before}")
    for estimator, row in found.items():
        print(f"{estimator}: {row['pairs']} pairs, {row['seeds']} seeds", end="; ")
        print(f"{row['matching']:.2f} ms a pair for matching")
    for way in WAYS:
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
    parser.add_argument("--top", type=int, default=RerankingSettings.top)
    parser.add_argument("--max-distance", type=float, default=MatchingSettings.max_distance)
    parser.add_argument("--matching", choices=MATCHINGS, default=MatchingSettings.method)
    parser.add_argument("--ratio", type=float, default=MatchingSettings.ratio)
    parser.add_argument("--weight", type=float, default=RerankingSettings.fused_weight)
    parser.add_argument("--cap", type=int, default=RerankingSettings.fused_cap)
    parser.add_argument("--threshold", type=float, default=VerificationSettings.threshold)
    parser.add_argument("--iterations", type=int, default=VerificationSettings.iterations)
    parser.add_argument("--confidence", type=float, default=VerificationSettings.confidence)
    parser.add_argument("--workers", type=int, default=joblib.cpu_count())
    parser.add_argument("--results", type=Path, metavar="FOLDER")
    return parser.parse_args()


def datasets(run: Path, wanted: Sequence[str] | None) -> list[Path]:
    """The folders of a run's data sets whose stages global and local are finished."""
    folders = [path.parents[1] for path in sorted(run.glob("*/local/stage.json"))]
    folders = [path for path in folders if (path / "global" / "stage.json").exists()]
    folders = [path for path in folders if path.name in (wanted or {path.name} - {tuning.DATASET})]
    if not folders:
        raise SystemExit(f"{run} has no data set with finished stages global and local")
    return folders


def ground_truth(folder: Path, data: Sequence[Path]) -> GroundTruth:
    name = f"gnd_{folder.name}.pkl"
    parents = [folder.parent / "data" / "benchmark", *data]
    for parent in parents:
        if (parent / name).exists():
            return load_ground_truth(parent / name)
    raise SystemExit(f"no {name} in {', '.join(map(str, parents))}: name its folder with --data")


def main() -> None:
    arguments = read_arguments()
    verification = VerificationSettings(
        threshold=arguments.threshold,
        iterations=arguments.iterations,
        confidence=arguments.confidence,
    )
    settings = RerankingSettings(
        top=arguments.top,
        matching=MatchingSettings(
            arguments.max_distance, method=arguments.matching, ratio=arguments.ratio
        ),
        verification=verification,
        fused_weight=arguments.weight,
        fused_cap=arguments.cap,
    )
    names = ("max_distance", "matching", "ratio", "threshold", "iterations", "confidence", "top")
    recorded = {name: getattr(arguments, name) for name in names}
    shown = recorded | {"weight": arguments.weight, "cap": arguments.cap}
    print(", ".join(f"{name} {value}" for name, value in shown.items()))
    with tempfile.TemporaryDirectory() as temporary:
        results = arguments.results or Path(temporary)
        if not (results / "settings.json").exists():
            runs.write_json(results / "settings.json", recorded)
        if (kept := runs.read_json(results / "settings.json")) != recorded:
            raise SystemExit(f"{results} holds results of {kept}: name another folder")
        for folder in [path for run in arguments.runs for path in datasets(run, arguments.dataset)]:
            lists = Shortlists.read(folder, ground_truth(folder, arguments.data), arguments.top)
            estimators = arguments.estimator or list(ESTIMATORS)
            seeds = range(*arguments.seeds)
            measure(results, lists, estimators, seeds, settings, arguments.workers)
            if figures_by_estimator := measured(results, lists, settings):
                show(lists, figures_by_estimator)
            else:
                print(f"{lists.truth.name}: a spread needs two seeds at least")


if __name__ == "__main__":
    main()
