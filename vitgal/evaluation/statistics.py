"""Bootstrap intervals and paired tests over queries, or over the landmarks that they show.

Queries of one landmark resemble each other. Resampled as if they were independent, they make an
interval too narrow; so whole landmarks are resampled, each with all its queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The defaults, which every scores.json records
BOOTSTRAP = {"level": 0.95, "samples": 10_000, "seed": 0}
EXACT = 16  # with at most this many clusters all sign flips are tried
SIGNIFICANT = 0.05  # systems differ where the p-value is below
FEWEST = 6  # clusters whose sign flips can give a p-value below SIGNIFICANT: 2 / 2^6
DRAWS = 1 << 18  # numbers drawn at once: they fit into the processor's cache


def bootstrap_interval(
    ap: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    samples: int = BOOTSTRAP["samples"],
    seed: int = BOOTSTRAP["seed"],
    level: float = BOOTSTRAP["level"],
) -> tuple[float, float]:
    """Computes a percentile bootstrap interval of the mean AP.

    Clusters are drawn with replacement, as many as there are; the mean is over all their queries.

    Args:
        ap: (Q,) floats, nan for queries that do not count.
        clusters: (Q,) integers, equal for queries of one landmark; None: each query is its own.
        level: confidence level in (0, 1).
    Returns:
        (low, high); (nan, nan) if no query counts, or if all belong to one cluster, which tells
        nothing about another.
    Raises:
        ValueError: `samples` or `level` is out of range, or `clusters` is of another shape.
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"{samples} samples at level {level}: at least 1, level in (0, 1)")
    sums, sizes = _cluster_sums(np.asarray(ap, np.float64), clusters)
    if sums.size < 2:
        return float("nan"), float("nan")
    # scipy.stats.bootstrap draws no clusters, and rounds the percentiles differently.
    generator = np.random.default_rng(seed)
    means, step = np.empty(samples), max(1, DRAWS // sums.size)
    equal = (sizes == sizes[0]).all()  # then every draw has as many queries
    for start in range(0, samples, step):
        size = (min(step, samples - start), sums.size)
        drawn = generator.integers(0, sums.size, size, np.int32)
        counts = sizes.sum() if equal else sizes[drawn].sum(axis=1)
        means[start : start + step] = sums[drawn].sum(axis=1) / counts
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _cluster_sums(values: np.ndarray, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns sum and number (G,) of the values that are not nan in each cluster that has any."""
    counting = ~np.isnan(values)
    if clusters is None:
        return values[counting], np.ones(counting.sum())
    clusters = np.asarray(clusters)
    if clusters.shape != values.shape:
        raise ValueError(f"clusters of shape {clusters.shape} for values of shape {values.shape}")
    _, index, sizes = np.unique(clusters[counting], return_inverse=True, return_counts=True)
    return np.bincount(index, values[counting], len(sizes)), sizes.astype(np.float64)


@dataclass(frozen=True)
class PairedTest:
    """The difference of two systems' mAP over the same queries.

    Interval and p-value are one test: the interval excludes 0 exactly where the p-value is below
    SIGNIFICANT.

    Attributes:
        difference: the mean AP of the second system minus that of the first, in [-1, 1].
        low, high: the differences that the test does not reject; nan with fewer than FEWEST
            clusters, which cannot reject any.
        p_value: the probability of a difference as large if each cluster's sign were random.
        exact: whether all combinations of signs were tried, not a sample of them.
        queries, landmarks: how many count; landmarks None: every query is its own cluster.
        won, lost: the number of queries that the second system improves and worsens.
    """

    difference: float
    low: float
    high: float
    p_value: float
    exact: bool
    queries: int
    landmarks: int | None
    won: int
    lost: int

    @property
    def differ(self) -> bool:
        """Whether the p-value is below SIGNIFICANT."""
        return self.p_value < SIGNIFICANT


def paired_test(
    first: np.ndarray,
    second: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    samples: int = BOOTSTRAP["samples"],
    seed: int = BOOTSTRAP["seed"],
) -> PairedTest:
    """Compares two systems by a sign-flip permutation test and the interval that inverts it.

    If the systems were interchangeable, the difference of each cluster could as well have the other
    sign. Sources: Smucker, Allan, Carterette, "A comparison of statistical significance tests for
    information retrieval evaluation", CIKM 2007; the interval: Hartigan, "Using subsample values as
    typical values", JASA 1969.

    Args:
        first, second: (Q,) AP of the same queries, nan for a query that counts in neither system.
        clusters: (Q,) integers, equal for queries of one landmark; None: each query is its own.
        samples: sign flips that are drawn, where there are more than EXACT clusters.
    Returns:
        The test; all numbers are nan if no query counts, the p-value is 1 if none differs.
    Raises:
        ValueError: the shapes differ, or a query counts in one system only.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"APs of shapes {first.shape} and {second.shape}: not the same queries")
    odd = np.flatnonzero(np.isnan(first) != np.isnan(second))
    if odd.size:
        raise ValueError(f"query {odd[0]} counts in one system only: the ground truths differ")
    change = second - first
    sums, sizes = _cluster_sums(change, clusters)
    low, high = _flipped_means(sums, sizes, samples, seed)
    p_value, interval = _typical_values(low, high)
    counting = change[~np.isnan(change)]
    return PairedTest(
        difference=float(counting.mean()) if counting.size else float("nan"),
        low=interval[0],
        high=interval[1],
        p_value=p_value,
        exact=sums.size <= EXACT,
        queries=counting.size,
        landmarks=None if clusters is None else sums.size,
        won=int((counting > 0).sum()),
        lost=int((counting < 0).sum()),
    )


def _flipped_means(
    sums: np.ndarray, sizes: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each way to flip signs, the means of the flipped and of the other clusters, by size.

    For the difference d, flipping the clusters F gives a sum at least as far from 0 as the observed
    one exactly where d lies between the mean of F and that of the others. Returns (F,) lower and
    upper ends, -inf and inf for the observed signs; of two opposite ways one is enough.
    """
    if not sums.size:
        return np.empty(0), np.empty(0)
    if sums.size <= EXACT:
        flipped, counts = np.zeros(1), np.zeros(1)
        for value, size in zip(sums[1:], sizes[1:], strict=True):
            flipped = np.concatenate([flipped, flipped + value])
            counts = np.concatenate([counts, counts + size])
    else:
        # The observed signs are one of the combinations: no p-value is 0.
        flipped, counts = np.zeros(samples + 1), np.zeros(samples + 1)
        generator, step = np.random.default_rng([seed, 1]), max(1, DRAWS // sums.size)
        for start in range(0, samples, step):
            size = min(step, samples - start)
            drawn = generator.integers(0, 2, (size, sums.size), np.int8)
            flipped[start : start + size] = drawn @ sums
            counts[start : start + size] = drawn @ sizes
    inner = (counts > 0) & (counts < sizes.sum())
    ends = np.full((2, len(flipped)), np.inf) * [[-1], [1]]
    means = flipped[inner] / counts[inner]
    others = (sums.sum() - flipped[inner]) / (sizes.sum() - counts[inner])
    ends[:, inner] = np.sort([means, others], axis=0)
    # Means that are 0 but for rounding count as 0.
    ends[np.abs(ends) < 1e-9 * np.abs(sums).sum() / sizes.sum()] = 0
    return ends[0], ends[1]


def _typical_values(low: np.ndarray, high: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The p-value of a difference of 0, and the ends of the differences not rejected.

    low, high: (F,), a difference counts a flip where it lies between.
    """
    if not low.size:
        return float("nan"), (float("nan"), float("nan"))
    p_value = float(np.mean((low <= 0) & (high >= 0)))
    needed = int(np.ceil(SIGNIFICANT * low.size))  # flips that a difference must count
    ends = float(np.sort(low)[needed - 1]), float(np.sort(high)[low.size - needed])
    return p_value, ends if np.isfinite(ends).all() else (float("nan"), float("nan"))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Corrects the p-values of several tests so that they may be judged together.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6, 1979. It holds whatever the tests' dependence.

    p_values: (T,) in [0, 1]; nan for a test that cannot be made, which does not count. Returns (T,)
    float64, at least as large and at most 1.
    """
    values = np.asarray(p_values, np.float64)
    corrected = np.full(values.shape, np.nan)
    count = int(np.sum(~np.isnan(values)))
    order = np.argsort(values, kind="stable")[:count]  # nan come last
    rising = np.maximum.accumulate(values[order] * np.arange(count, 0, -1))
    corrected[order] = np.minimum(rising, 1)
    return corrected


def verdict(test: PairedTest, first: str, second: str) -> str:
    """Returns a sentence on whether two systems differ; `first` and `second` are their names."""
    if not test.queries:
        return f"{first} and {second} cannot be compared: no query counts."
    counted = f"{test.queries} {'query' if test.queries == 1 else 'queries'}"
    if test.landmarks is not None:
        counted += f" of {test.landmarks} {'landmark' if test.landmarks == 1 else 'landmarks'}"
    if not test.won and not test.lost:
        return f"{first} and {second} do not differ (every query has the same AP, {counted})."
    difference = f"{100 * test.difference:+.1f} points"
    if np.isnan(test.low):
        kind = "queries" if test.landmarks is None else "landmarks"
        return (
            f"no test can tell {first} and {second} apart ({difference}, {counted}): it takes at "
            f"least {FEWEST} {kind}."
        )
    p_value = "< 0.001" if test.p_value < 0.001 else f"= {test.p_value:.3f}"
    numbers = (
        f"{difference}, 95 % interval {100 * test.low:+.1f} to {100 * test.high:+.1f}, "
        f"p {p_value}, {counted}"
    )
    if not test.differ:
        return f"{first} and {second} do not differ by more than chance explains ({numbers})."
    better, worse = (second, first) if test.difference > 0 else (first, second)
    return f"{better} is better than {worse} ({numbers})."
