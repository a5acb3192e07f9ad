"""Bootstrap intervals and paired tests over queries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The defaults, which every scores.json records
BOOTSTRAP = {"level": 0.95, "samples": 10_000, "seed": 0}
EXACT = 16  # with at most this many differing queries all sign flips are tried
SIGNIFICANT = 0.05  # systems differ where the p-value is below
DRAWS = 1 << 18  # numbers drawn at once: they fit into the processor's cache


def bootstrap_interval(
    ap: np.ndarray,
    *,
    samples: int = BOOTSTRAP["samples"],
    seed: int = BOOTSTRAP["seed"],
    level: float = BOOTSTRAP["level"],
) -> tuple[float, float]:
    """Computes a percentile bootstrap interval of the mean AP over queries.

    Queries are drawn with replacement. Queries of one landmark are not
    independent: with few landmarks the true uncertainty is larger.

    Args:
        ap: (Q,) floats, nan for queries that do not count. For two systems it is the difference of
            their APs, so that queries are drawn in pairs.
        level: confidence level in (0, 1).
    Returns:
        (low, high); (nan, nan) if no query counts.
    Raises:
        ValueError: `samples` or `level` is out of range.
    """
    values = np.asarray(ap, np.float64)
    values = values[~np.isnan(values)]
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"{samples} samples at level {level}: at least 1, level in (0, 1)")
    if not values.size:
        return float("nan"), float("nan")
    # scipy.stats.bootstrap draws the same samples but rounds the percentiles differently: the
    # intervals in every scores.json would change in their last digits.
    generator = np.random.default_rng(seed)
    means, step = np.empty(samples), max(1, DRAWS // values.size)
    for start in range(0, samples, step):
        size = (min(step, samples - start), values.size)
        drawn = generator.integers(0, values.size, size, np.int32)
        means[start : start + step] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """The difference of two systems' mAP over the same queries.

    Attributes:
        difference: the mean AP of the second system minus that of the first, in [-1, 1].
        low, high: its paired bootstrap interval.
        p_value: the probability of a difference as large if each query's sign were random.
        exact: whether all combinations of signs were tried, not a sample of them.
        queries: the number of queries that count.
        won, lost: the number of queries that the second system improves and worsens.
    """

    difference: float
    low: float
    high: float
    p_value: float
    exact: bool
    queries: int
    won: int
    lost: int

    @property
    def differ(self) -> bool:
        """Whether the p-value is below SIGNIFICANT."""
        return self.p_value < SIGNIFICANT


def paired_test(
    first: np.ndarray,
    second: np.ndarray,
    *,
    samples: int = BOOTSTRAP["samples"],
    seed: int = BOOTSTRAP["seed"],
    level: float = BOOTSTRAP["level"],
) -> PairedTest:
    """Compares two systems by a paired bootstrap interval and a sign-flip permutation test.

    Source: Smucker, Allan, Carterette, "A comparison of statistical significance tests for
    information retrieval evaluation", CIKM 2007.

    Args:
        first, second: (Q,) AP of the same queries, nan for a query that counts in neither system.
        samples: of the bootstrap; and of sign flips, where more than EXACT queries differ.
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
    change = (second - first)[~np.isnan(first)]
    low, high = bootstrap_interval(change, samples=samples, seed=seed, level=level)
    p_value, exact = _sign_flips(change, samples, seed)
    return PairedTest(
        difference=float(change.mean()) if change.size else float("nan"),
        low=low,
        high=high,
        p_value=p_value,
        exact=exact,
        queries=change.size,
        won=int((change > 0).sum()),
        lost=int((change < 0).sum()),
    )


def _sign_flips(change: np.ndarray, samples: int, seed: int) -> tuple[float, bool]:
    """The two-sided p-value of a mean of 0, and whether all combinations of signs were tried.

    scipy.stats.permutation_test draws other signs, so that printed p-values would change, and takes
    a hundred times as long where it tries all.
    """
    if not change.size:
        return float("nan"), True
    change = change[change != 0]  # a flip of 0 changes nothing
    # The tolerance: sums that equal the observed one but for rounding must count.
    threshold = abs(change.sum()) - 1e-9 * np.abs(change).sum()
    if change.size <= EXACT:
        sums = np.zeros(1)
        for value in change:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= threshold)), True
    generator = np.random.default_rng([seed, 1])
    extreme, left, step = 0, samples, max(1, DRAWS // change.size)
    while left > 0:
        signs = generator.integers(0, 2, (min(step, left), change.size), np.int8)
        sums = 2 * (signs @ change) - change.sum()
        extreme += int((np.abs(sums) >= threshold).sum())
        left -= step
    # The observed signs are one of the combinations: no p-value is 0.
    return (extreme + 1) / (samples + 1), False


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Corrects the p-values of several tests so that they may be judged together.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6, 1979. It holds whatever the tests' dependence.

    Args:
        p_values: (T,) in [0, 1]; nan for a test that cannot be made, which does not count.
    Returns:
        (T,) float64, at least as large and at most 1.
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
    queries = f"{test.queries} {'query' if test.queries == 1 else 'queries'}"
    if not test.won and not test.lost:
        return f"{first} and {second} do not differ (every query has the same AP, {queries})."
    p_value = "< 0.001" if test.p_value < 0.001 else f"= {test.p_value:.3f}"
    numbers = (
        f"{100 * test.difference:+.1f} points, 95 % interval {100 * test.low:+.1f} to "
        f"{100 * test.high:+.1f}, p {p_value}, {queries}"
    )
    if not test.differ:
        return f"{first} and {second} do not differ by more than chance explains ({numbers})."
    better, worse = (second, first) if test.difference > 0 else (first, second)
    return f"{better} is better than {worse} ({numbers})."
