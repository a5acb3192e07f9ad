"""Tuning beside the plain way: every point of the grid on its own. `python benchmarks/tuning.py`

Processor time of one pair of 1000 x 1000 features of 128 numbers over a grid of 7 x 5 thresholds;
of the AP of one query with 100 candidates at every order, weight and number of candidates; and of
the bootstrap of 1000 queries.
"""

import time

import numpy as np

from vitgal.data.revisited import GroundTruth
from vitgal.evaluation import protocol, statistics
from vitgal.evaluation.tuning import query_ap
from vitgal.features.local import LocalFeatures
from vitgal.retrieval import verification
from vitgal.retrieval.ranking import Fusion, Positions, Reranking
from vitgal.settings import MatchingSettings, RerankingSettings, VerificationSettings
from vitgal.stages import tuning

GRID = {
    "max_distance": [0.7, 0.75, 0.8, 0.82, 0.85, 0.9, 0.95],
    "threshold": [4.0, 8.0, 16.0, 24.0, 32.0],
}
PAIRS = 3
CANDIDATES = 100
ORDERS = {
    "matching": ["one_way", "mutual"],
    "max_distance": [0.82],
    "threshold": [16.0],
    "order": ["inliers", "fused"],
    "fused_weight": [0.5, 1.0, 2.0, 3.0, 4.0],
    "fused_cap": [15, 30, 60],
    "top": [10, 25, 50, 75, 100],
}


def features(rng: np.random.Generator, count: int = 1000) -> LocalFeatures:
    codes = rng.standard_normal((count, 128)).astype(np.float32)
    return LocalFeatures(
        keypoints=rng.uniform(0, 512, (count, 2)).astype(np.float32),
        descriptors=codes / np.linalg.norm(codes, axis=1, keepdims=True),
        scores=np.linspace(2, 1, count, dtype=np.float32),
        scales=np.ones(count, np.float32),
        input_size=(512, 512),
        box=(0, 0, 512, 512),
        image_size=(512, 512),
    )


def other_view(rng: np.random.Generator, one: LocalFeatures) -> LocalFeatures:
    """A tenth of the features again, moved a little, at distances of 0.6 to 1; the rest anew."""
    other, kept = features(rng), len(one) // 10
    spread = rng.uniform(0.6, 1.0, (kept, 1)) / np.sqrt(128)
    codes = one.descriptors[:kept] + spread * rng.standard_normal((kept, 128))
    other.descriptors[:kept] = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    other.keypoints[:kept] = 0.9 * one.keypoints[:kept] + 20 + rng.normal(0, 4, (kept, 2))
    return other


def at(distance: float, threshold: float) -> RerankingSettings:
    return RerankingSettings(
        matching=MatchingSettings(max_distance=distance),
        verification=VerificationSettings(threshold=threshold),
    )


def plain(one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
    return np.array(
        [
            [
                verification.inspect_pair(one, other, at(distance, threshold)).verification.count
                for threshold in GRID["threshold"]
            ]
            for distance in GRID["max_distance"]
        ]
    )


def timed(work) -> tuple[float, object]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def orders(rng: np.random.Generator) -> None:
    """Compares `query_ap` with reranking and evaluating each point."""
    images, count = np.arange(CANDIDATES)[None], rng.integers(0, 60, (2, 1, 1, 2, CANDIDATES))
    similarities = np.sort(rng.uniform(size=CANDIDATES))[::-1]
    labels = [[np.arange(0, CANDIDATES, 7)], [np.empty(0, int)], [np.empty(0, int)]]
    names = [str(image) for image in range(CANDIDATES)]
    truth = GroundTruth("x", names, ["q"], np.array([[0.0, 0, 1, 1]]), *labels)
    positions, current = Positions.from_ranks(images.T, labels[0]), RerankingSettings()
    relevant = np.isin(images[0], labels[0][0])
    none = np.empty(0, int)

    def point(index: tuple[int, ...]) -> float:
        m, d, t, o, w, c, k = index
        fusion = Fusion(similarities[None], ORDERS["fused_weight"][w], ORDERS["fused_cap"][c])
        ordered = {"top": ORDERS["top"][k], "fusion": fusion if o else None}
        reranking = Reranking(images, count[None, m, d, t, o], truth, "medium", **ordered)
        reranked = {"medium": positions.reranked(images.T, reranking)}
        return protocol.evaluate(reranked, truth)["medium"]["ap"][0]

    sizes = [len(values) for values in ORDERS.values()]
    slow, wanted = timed(lambda: np.reshape([point(at) for at in np.ndindex(*sizes)], sizes))
    fast, ap = timed(lambda: query_ap(count, similarities, relevant, none, ORDERS, current))
    print(
        f"a query, {ap.size} points: plain {1e3 * slow:.0f} ms, ours {1e3 * fast:.2f} ms,", end=" "
    )
    print(f"{slow / fast:.0f} times; greatest difference {np.abs(ap - wanted).max():.0e}")


def resampled(ap: np.ndarray, samples: int = 10_000) -> np.ndarray:
    """The bootstrap as it is usually written, a draw at a time."""
    rng = np.random.default_rng(0)
    means = [rng.choice(ap, len(ap)).mean() for _ in range(samples)]
    return np.quantile(means, [0.025, 0.975])


def main() -> None:
    rng = np.random.default_rng(0)
    ones = [features(rng) for _ in range(PAIRS)]
    pairs = [(one, other_view(rng, one)) for one in ones]
    slow, wanted = timed(lambda: [plain(*pair) for pair in pairs])
    fast, counts = timed(
        lambda: [tuning.pair_counts(*pair, GRID, RerankingSettings()) for pair in pairs]
    )
    equal = all((a == b).all() for a, b in zip(wanted, counts, strict=True))
    print(
        f"a pair, 35 points: plain {1e3 * slow / PAIRS:.0f} ms, ours {1e3 * fast / PAIRS:.0f} ms,"
    )
    print(f"{slow / fast:.1f} times faster; counts equal: {equal}")
    orders(rng)
    ap = rng.uniform(size=1000)
    slow, wanted = timed(lambda: resampled(ap))
    fast, interval = timed(lambda: statistics.bootstrap_interval(ap))
    print(f"bootstrap: a draw at a time {slow:.2f} s, ours {fast:.2f} s, {slow / fast:.1f} times")
    print(f"intervals {np.round(wanted, 4)} and {np.round(interval, 4)}")


if __name__ == "__main__":
    main()
