"""Bootstrap intervals and paired tests over queries."""

from dataclasses import dataclass

import numpy as np

# How uncertainty is computed wherever nothing else is said; recorded in every scores.json
BOOTSTRAP = {"level": 0.95, "samples": 10_000, "seed": 0}
EXACT = 16  # up to this many queries that differ, all sign flips are tried
SIGNIFICANT = 0.05  # p-values below it are called a difference
DRAWS = 1 << 18  # queries or signs drawn at once: they stay in the processor's cache


def bootstrap_interval(
    ap: np.ndarray, *, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """A percentile bootstrap interval of the mean AP over queries drawn with replacement.

    ap: (Q,) with nan for queries that do not count. For two systems give the difference of their
    APs (`paired_test` does): queries are then drawn in pairs. Without a query (nan, nan), with one
    that value twice. Raises ValueError for a level or a number of samples out of range.

    Queries of one landmark resemble each other, which no interval over queries knows: with few
    landmarks the truth is wider.
    """
    values = np.asarray(ap, np.float64)
    values = values[~np.isnan(values)]
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"{samples} samples at level {level}: at least 1, and between 0 and 1")
    if not values.size:
        return float("nan"), float("nan")
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
    """What the queries that two systems share say about the difference of their mAP.

    difference: mean of second - first, in [-1, 1]; low, high: its paired bootstrap interval.
    p_value: how often a difference as large arises where each query's sign is tossed; exact: all
    tosses were tried, not a sample. queries: those that count; won, lost: for the second system.
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
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Compares two systems query by query: paired bootstrap interval and sign-flip permutation.

    Args:
        first, second: (Q,) AP of the same queries in the same order, nan where a query does not
            count; it must not count in either.
        samples: bootstrap samples, and sign flips where more than EXACT queries differ.
    Returns:
        PairedTest; without a query all numbers are nan, without any difference the p-value is 1.
    Raises:
        ValueError: lengths differ, or a query counts in one system alone.

    Source: Smucker, Allan, Carterette, "A comparison of statistical significance tests for
    information retrieval evaluation", CIKM 2007.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"APs of shapes {first.shape} and {second.shape}: not the same queries")
    odd = np.flatnonzero(np.isnan(first) != np.isnan(second))
    if odd.size:
        raise ValueError(f"query {odd[0]} counts in one of the systems alone: other ground truths")
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
    """The two-sided p-value of a mean of 0, and whether every flip was tried."""
    if not change.size:
        return float("nan"), True
    change = change[change != 0]  # flipped or not they are the same
    # Sums in another order differ in their last bits; what equals the observed one must count.
    bar = abs(change.sum()) - 1e-9 * np.abs(change).sum()
    if change.size <= EXACT:
        sums = np.zeros(1)
        for value in change:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= bar)), True
    generator = np.random.default_rng([seed, 1])
    extreme, left, step = 0, samples, max(1, DRAWS // change.size)
    while left > 0:
        signs = generator.integers(0, 2, (min(step, left), change.size), np.int8)
        sums = 2 * (signs @ change) - change.sum()
        extreme += int((np.abs(sums) >= bar).sum())
        left -= step
    # The observed signs are one of the flips: no p-value is 0.
    return (extreme + 1) / (samples + 1), False


def verdict(test: PairedTest, first: str, second: str) -> str:
    """One sentence that says whether two systems differ; names as a reader knows them."""
    if not test.queries:
        return f"{first} and {second} cannot be compared: no query counts."
    if not test.won and not test.lost:
        same = f"every query has the same AP, {_queries(test.queries)}"
        return f"{first} and {second} do not differ ({same})."
    points = f"{100 * test.difference:+.1f} points, 95 % interval {100 * test.low:+.1f} to "
    points += f"{100 * test.high:+.1f}, p {_p_value(test.p_value)}, {_queries(test.queries)}"
    if not test.differ:
        return f"{first} and {second} do not differ by more than chance explains ({points})."
    better = (second, first) if test.difference > 0 else (first, second)
    return f"{better[0]} is better than {better[1]} ({points})."


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _queries(number: int) -> str:
    return f"{number} {'query' if number == 1 else 'queries'}"
