"""Reranking one short list: the published way beside ours, on one core, in one run.

    python benchmarks/rerank.py [--pairs 100] [--features 1000] [--estimator magsac]
        [--queries 8]

Synthetic images of 1000 features of 128 dimensions: in a few candidates half of the features are
noisy copies of the query's under a homography, in most of them few are, as in a real short list.
The published way is rebuilt from its description: a KD-tree in float64, matches collected in Python
lists, pydegensac with confidence 1.0 and 2000 iterations.
"""

import argparse
import functools
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"  # one core; NumPy reads it when it is imported

import joblib
import numpy as np
import pydegensac
from scipy.spatial import cKDTree

from vitgal import engines
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.matching import Descriptors, match_prepared
from vitgal.retrieval.verification import ESTIMATORS, inspect_shortlist
from vitgal.settings import RerankingSettings, VerificationSettings

WIDTH = 128
MAX_DISTANCE = 0.82
FRACTIONS = (0.5, 0.2, 0.05, 0.05, 0.05)  # of the features that a candidate shares with the query
PLANTED = np.array([[1.1, 0.1, 5], [-0.05, 0.9, 10], [1e-4, 2e-5, 1]])


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def features(points: np.ndarray, descriptors: np.ndarray) -> LocalFeatures:
    unset = np.full(len(points), np.nan, np.float32)
    return LocalFeatures(
        points.astype(np.float32),
        descriptors,
        unset,
        unset,
        (512, 512),
        (0, 0, 512, 512),
        (512,) * 2,
    )


def make_pairs(pairs: int, count: int, seed: int) -> tuple[LocalFeatures, list[LocalFeatures]]:
    """A query and its candidates."""
    rng = np.random.default_rng(seed)
    query = features(rng.uniform(0, 512, (count, 2)), unit(rng.standard_normal((count, WIDTH))))
    candidates = []
    for number in range(pairs):
        points = rng.uniform(0, 512, (count, 2))
        descriptors = unit(rng.standard_normal((count, WIDTH)))
        shared = rng.permutation(count)[: int(count * FRACTIONS[number % len(FRACTIONS)])]
        mapped = np.column_stack([query.keypoints[shared], np.ones(len(shared))]) @ PLANTED.T
        indices = rng.permutation(count)[: len(shared)]
        points[indices] = mapped[:, :2] / mapped[:, 2:] + rng.normal(0, 4, (len(shared), 2))
        # Noise of a length between 0.3 and 1: some shared features are lost to the bound.
        noise = unit(rng.standard_normal((len(shared), WIDTH))) * rng.uniform(
            0.3, 1, (len(shared), 1)
        )
        descriptors[indices] = unit(query.descriptors[shared] + noise)
        candidates.append(features(points, descriptors))
    return query, candidates


def published_count(query: LocalFeatures, candidate: LocalFeatures) -> int:
    """The inliers of one pair, the published way."""
    size = len(candidate)
    tree = cKDTree(candidate.descriptors)
    _, nearest = tree.query(query.descriptors, distance_upper_bound=MAX_DISTANCE)
    left = np.array([query.keypoints[i] for i in range(len(query)) if nearest[i] != size])
    right = np.array(
        [candidate.keypoints[nearest[i]] for i in range(len(query)) if nearest[i] != size]
    )
    if len(left) < 5:
        return 0
    _, mask = pydegensac.findHomography(left, right, 16.0, 1.0, 2000, seed=0)
    return int(np.sum(mask))


def reranked(
    query: LocalFeatures, candidates: list[LocalFeatures], estimator: str, confidence: float
) -> list[int]:
    """The inliers of each pair, our way."""
    verification = VerificationSettings(estimator=estimator, confidence=confidence)
    settings = RerankingSettings(verification=verification)
    pairs = inspect_shortlist(query, candidates, settings)
    return [pair.verification.count for pair in pairs]


def matched(query: LocalFeatures, candidates: list[LocalFeatures]) -> list[np.ndarray]:
    """The matches (M, 2) of each pair; the query is prepared once."""
    prepared = Descriptors.read(query.descriptors, "query")
    galleries = [Descriptors.read(candidate.descriptors, "gallery") for candidate in candidates]
    return [match_prepared(prepared, gallery, MAX_DISTANCE) for gallery in galleries]


def measure(ways: dict, repeats: int) -> dict[str, tuple[float, list]]:
    """Each way's shortest processor time in seconds and its result; the ways take turns."""
    best = {}
    for _ in range(repeats):
        for name, work in ways.items():
            began = time.process_time()
            result = work()
            spent = time.process_time() - began
            best[name] = (min(spent, best.get(name, (spent, None))[0]), result)
    return best


def one_query(seed: int, pairs: int, count: int) -> tuple[list[int], float]:
    """The counts of a query of its own, made here as a worker would read it, and CPU seconds."""
    began = time.process_time()
    query, candidates = make_pairs(pairs, count, seed)
    counts = reranked(query, candidates, "degensac", 1.0)
    return counts, time.process_time() - began


def over_processes(pairs: int, count: int, queries: int, repeats: int) -> None:
    """Prints how much sooner two processes are done than one, at equal counts."""
    seconds, results = {}, {}
    for workers in (1, 2) * repeats:
        place = dict(engine="local", address=None, workers=workers, tasks=queries)
        with engines.parallel(**place) as pool:
            list(pool(joblib.delayed(one_query)(q, 1, 10) for q in range(workers)))  # imports
            began = time.perf_counter()
            tasks = (joblib.delayed(one_query)(q, pairs, count) for q in range(queries))
            finished = sorted(pool(tasks))
            elapsed = time.perf_counter() - began
        results[workers] = [counts for counts, _ in finished]
        best = seconds.get(workers, (np.inf, np.inf))
        seconds[workers] = min(best, (elapsed, sum(cpu for _, cpu in finished)))
    (one, cpu_1), (two, cpu_2) = seconds[1], seconds[2]
    print(
        f"{queries} queries of {pairs} candidates, degensac: one process {one:.2f} s "
        f"({cpu_1:.2f} s of CPU), two {two:.2f} s ({cpu_2:.2f} s of CPU): "
        f"{one / two:.2f} times sooner; counts {'equal' if results[1] == results[2] else 'DIFFER'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--estimator", choices=ESTIMATORS, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--queries", type=int, default=0, help="so many over two processes too")
    arguments = parser.parse_args()
    size, pairs = arguments.features, arguments.pairs
    query, candidates = make_pairs(pairs, size, arguments.seed)
    ways = {
        "published": lambda: [published_count(query, candidate) for candidate in candidates],
        "matching": lambda: matched(query, candidates),
    }
    for estimator in arguments.estimator or ESTIMATORS:
        for confidence in (1.0, 0.9999):
            name = f"{estimator}, confidence {confidence}"
            ways[name] = functools.partial(reranked, query, candidates, estimator, confidence)
    results = measure(ways, arguments.repeats)
    published, expected = results.pop("published")
    alone, matches = results.pop("matching")
    print(f"{pairs} pairs, {size} x {size} x {WIDTH}, one core; matches a pair:", end=" ")
    print(*(f"{np.quantile(list(map(len, matches)), q):.0f}" for q in (0, 0.5, 1)))
    print(f"{'published':>27} {1000 * published / pairs:7.2f} ms a pair")
    print(f"{'matching':>27} {1000 * alone / pairs:7.2f} ms a pair (ours, without verification)")
    for name, (seconds, counts) in results.items():
        equal = sum(a == b for a, b in zip(counts, expected, strict=True))
        print(
            f"{name:>27} {1000 * seconds / pairs:7.2f} ms a pair, "
            f"{published / seconds:4.1f} x faster, {equal} of {pairs} counts as published"
        )
    if arguments.queries:
        over_processes(pairs, size, arguments.queries, arguments.repeats)


if __name__ == "__main__":
    main()
