"""Scores of a ranking under the Revisited protocol, their uncertainty and their records.

AP and mP@k are those of Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, as the code
published with the benchmark computes them; every number equals its to 1e-12.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import approximate, runs, search
from vitgal.revisited import (
    PROTOCOLS,
    GroundTruth,
    RetrievalDataset,
    ignored,
    labelled,
    positives,
)
from vitgal.search import Positions

Ranking = np.ndarray | Positions

GLOBAL_OUTPUTS = (  # the files of a global stage
    "database.npy",
    "queries.npy",
    "names.json",
    "ranks.npy",
    "similarities.npy",
    "positions.npz",
    "shortlist.txt",
    "scores.json",
    "failures.json",
)
# How uncertainty is computed wherever nothing else is said; recorded in every scores.json
BOOTSTRAP = {"level": 0.95, "samples": 10_000, "seed": 0}
EXACT = 16  # up to this many queries that differ, all sign flips are tried
SIGNIFICANT = 0.05  # p-values below it are called a difference
DRAWS = 1 << 18  # queries or signs drawn at once: they stay in the processor's cache


def evaluate(
    ranking: Ranking | Mapping[str, Ranking],
    ground_truth: GroundTruth,
    kappas: Sequence[int] = (1, 5, 10),
    *,
    truncated: bool = False,
    number: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores a ranking under the Easy, Medium and Hard protocols.

    Args:
        ranking: (N, Q) integers, zero-based database indices, best first, one column a query; or
            Positions of every labelled image; or a dict protocol -> either, which is then scored
            under its own protocol alone.
        kappas: the k of mP@k.
        truncated: accept a ranking that misses labelled images; a positive that it misses counts
            as never found, and the protocol's dict then holds "truncated": True.
        number: the size of the database, where an array is shorter (top K of a database with
            distractors). Without it an index must be below the larger of K and the ground truth's
            database.
    Returns:
        protocol -> {"map": float in [0, 1], "mp_at": {k: float in [0, 1]}, "ap": (Q,) float64}.
        A query without positives has nan and counts in no mean; without any other query (no query
        at all included) the means are nan.
    Raises:
        ValueError: an index is repeated or out of range, a labelled image is missing, shapes do
            not fit the ground truth, or a protocol or k makes no sense.
    """
    if not all(isinstance(k, (int, np.integer)) and k >= 1 for k in kappas):
        raise ValueError(f"kappas are whole numbers from 1 on, not {kappas}")
    if isinstance(ranking, Mapping):
        unknown = set(ranking) - set(PROTOCOLS)
        if unknown or not ranking:
            raise ValueError(f"rankings by protocol are for {PROTOCOLS}, not {sorted(ranking)}")
        places = {p: _positions(r, ground_truth, truncated, number) for p, r in ranking.items()}
    else:
        places = dict.fromkeys(PROTOCOLS, _positions(ranking, ground_truth, truncated, number))
    return {p: _scores(places[p], ground_truth, p, kappas) for p in PROTOCOLS if p in places}


def _positions(
    ranking: Ranking, ground_truth: GroundTruth, truncated: bool, number: int | None
) -> Positions:
    wanted = labelled(ground_truth)
    if not isinstance(ranking, Positions):
        ranking = np.asarray(ranking)
        least = max(len(ranking) if ranking.ndim else 0, len(ground_truth.database))
        return Positions.from_ranks(
            ranking, wanted, number=least if number is None else number, truncated=truncated
        )
    if len(ranking.indices) != len(wanted) or ranking.number < len(ground_truth.database):
        raise ValueError(
            f"positions of {len(ranking.indices)} queries among {ranking.number} images do not "
            f"belong to {ground_truth.name}: {len(wanted)} queries, "
            f"{len(ground_truth.database)} images"
        )
    for q, (have, want) in enumerate(zip(ranking.indices, wanted, strict=True)):
        missing = np.setdiff1d(want, have)
        if missing.size and not truncated:
            raise ValueError(
                f"the positions of query {q} miss the labelled image {missing[0]}; make them from "
                "revisited.labelled, or set truncated=True to count it as never found"
            )
    return ranking


def _scores(
    places: Positions, ground_truth: GroundTruth, protocol: str, kappas: Sequence[int]
) -> dict[str, Any]:
    correct, skipped = positives(ground_truth, protocol), ignored(ground_truth, protocol)
    ap = np.full(len(correct), np.nan)
    precisions = np.full((len(correct), len(kappas)), np.nan)
    for q, wanted in enumerate(correct):
        if not wanted.size:
            continue
        index, place = places.indices[q], places.positions[q]
        found = np.sort(place[np.isin(index, wanted)])
        # Ignored images are taken out of the ranking: what follows moves up.
        found -= np.searchsorted(np.sort(place[np.isin(index, skipped[q])]), found)
        ap[q] = average_precision(found, wanted.size)
        precisions[q] = [precision_at(found, k) for k in kappas]
    scored = ~np.isnan(ap)
    means = precisions[scored].mean(axis=0) if scored.any() else np.full(len(kappas), np.nan)
    result = {
        "map": float(ap[scored].mean()) if scored.any() else float("nan"),
        "mp_at": {int(k): float(mean) for k, mean in zip(kappas, means, strict=True)},
        "ap": ap,
    }
    known = sum(index.size for index in places.indices)
    if known < sum(index.size for index in labelled(ground_truth)):
        result["truncated"] = True
    return result


def average_precision(ranks: np.ndarray, count: int) -> float:
    """The area under the precision-recall curve by the trapezoid rule, as the benchmark defines it.

    ranks: (F,) rising zero-based ranks of the positives found.  count: all positives, at least 1.
    Each positive adds the mean of the precisions just before and at its rank; before rank 0 the
    precision is 1, so that one positive found second scores 0.25. None found: 0.
    """
    found = np.arange(ranks.size)
    before = np.divide(found, ranks, out=np.ones(ranks.size), where=ranks > 0)
    at = (found + 1) / (ranks + 1)
    return float((before + at).sum() / (2 * count))


def precision_at(ranks: np.ndarray, k: int) -> float:
    """The share of positives among the first `k`, or up to the last positive where that is nearer.

    ranks: (F,) zero-based ranks of the positives found; none: 0. The shorter list is the published
    rule: a query with two positives, ranked first and second, has precision 1 at every k >= 2.
    """
    if not ranks.size:  # NOTE the published code fails here (the maximum of nothing)
        return 0.0
    length = min(int(ranks.max()) + 1, k)
    return np.count_nonzero(ranks < length) / length


# Uncertainty


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


# Tables and records


def intervals(
    scores: Mapping[str, Mapping[str, Any]], *, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % bootstrap intervals of the mAP of several systems: label -> protocol -> (low, high).

    scores: label -> `evaluate`'s dict or the content of a scores.json.
    """
    return {
        label: {p: _interval(one[p], seed) for p in PROTOCOLS if p in one}
        for label, one in scores.items()
    }


def _interval(scores: Mapping[str, Any], seed: int = 0) -> tuple[float, float]:
    """The interval of one protocol's mAP; null, from a file, is nan."""
    ap = np.array(scores["ap"], np.float64)
    return bootstrap_interval(ap, **(BOOTSTRAP | {"seed": seed}))


def hardest(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The hardest protocol under which any query counts: "hard", "medium" or "easy".

    scores: `evaluate`'s dict or the content of a scores.json. Raises ValueError where none counts.
    """
    for protocol in reversed(PROTOCOLS):
        value = scores.get(protocol, {}).get("map")
        if value is not None and not np.isnan(value):
            return protocol
    raise ValueError("no query has a positive image under any protocol")


def score_table(scores: Mapping[str, Mapping[str, Any]], *, digits: int = 1) -> pd.DataFrame:
    """Sets scores out in percent: a row a protocol, and the queries that count.

    Columns: mAP, the ends `low` and `high` of its 95 % bootstrap interval over queries, mP@k.
    scores: `evaluate`'s dict or the content of a scores.json; or a dict label -> such a dict, which
    gives rows (label, protocol). Undefined scores are nan.
    """
    if any(protocol in scores for protocol in PROTOCOLS):
        rows = {p.capitalize(): _row(scores[p]) for p in PROTOCOLS if p in scores}
    else:
        rows = {
            (label, p.capitalize()): _row(one[p])
            for label, one in scores.items()
            for p in PROTOCOLS
            if p in one
        }
    if not rows:
        raise ValueError(f"no scores of {', '.join(PROTOCOLS)} among {list(scores)}")
    table = pd.DataFrame.from_dict(rows, orient="index")
    if isinstance(next(iter(rows)), tuple):
        table.index = pd.MultiIndex.from_tuples(rows, names=["ranking", "protocol"])
    else:
        table.index.name = "protocol"
    return table.round(digits)


def _row(scores: Mapping[str, Any]) -> dict[str, float]:
    def percent(value: float | None) -> float:
        return float("nan") if value is None else 100 * value

    precisions = {f"mP@{k}": percent(value) for k, value in scores["mp_at"].items()}
    counted = sum(value is not None and not np.isnan(value) for value in scores["ap"])
    low, high = (100 * bound for bound in _interval(scores))
    scored = {"mAP": percent(scores["map"]), "low": low, "high": high}
    return scored | precisions | {"queries": counted}


def scores_document(
    result: Mapping[str, Mapping[str, Any]],
    *,
    protocol: Mapping[str, Any],
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
    failed: int = 0,
    ground_truth: GroundTruth | None = None,
    **further: Any,
) -> dict[str, Any]:
    """The content of a `scores.json`: the scores and everything they depend on, in plain values.

    Args:
        result: `evaluate`'s dict; its protocols are the document's first keys, each with the 95 %
            `interval` of its mAP beside it.
        protocol: how the scores came about (queries cropped, ties, short list, ...).
        parameters: the stage's parameters, its seeds among them.
        inputs: what each input is called -> its fingerprint; the key `fingerprints`.
        failed: database images that could not be read and rank last.
        ground_truth: what was scored against: its fingerprint, and the queries' names, in whose
            order every `ap` stands.
        further: more keys, such as published=another result, which gets its intervals as well.
    Raises:
        ValueError: a further key repeats one of these, or a value is a path, which would make equal
            runs differ between machines.
    """
    document = {
        **_with_intervals(result),
        "protocol": protocol,
        "parameters": parameters,
        "fingerprints": dict(inputs),
        "failed_images": failed,
        "versions": runs.versions(),
        "bootstrap": BOOTSTRAP,
    }
    if ground_truth is not None:
        document["fingerprints"]["ground truth"] = ground_truth.fingerprint
        document["queries"] = ground_truth.queries
    repeated = sorted(set(document) & set(further))
    if repeated:
        raise ValueError(f"a scores document has {repeated[0]!r} already")
    document |= {key: _with_intervals(value) for key, value in further.items()}
    for key in ("protocol", "parameters", "fingerprints", *further):
        _refuse_paths(document[key], key)
    return runs.plain(document)


def _with_intervals(value: Any) -> Any:
    """`evaluate`'s dict with each mAP's interval; anything else as it is."""
    if not isinstance(value, Mapping) or not set(value) & set(PROTOCOLS):
        return value
    return {
        key: {"map": one["map"], "interval": _interval(one, BOOTSTRAP["seed"])} | dict(one)
        for key, one in value.items()
    }


def _refuse_paths(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_paths(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_paths(item, where)
    elif isinstance(value, os.PathLike) or (isinstance(value, str) and os.path.isabs(value)):
        raise ValueError(f"{where} is the path {value}: record a name or a fingerprint instead")


# A global stage's files


def write_rankings(
    stage: runs.Stage,
    data: RetrievalDataset,
    queries: np.ndarray,
    database_file: Path,
    *,
    failures: Sequence[Mapping[str, str]],
    protocol: Mapping[str, Any],
) -> None:
    """Writes everything that follows from global descriptors: rankings, short lists, scores.

    Args:
        stage: its parameters name `top`, the short list's length, and `display`, the ranks kept;
            `index`, where there is one, as `approximate.check` has it, makes the ranking begin with
            what that index finds. The scores are then those of that ranking, and the exact ones
            stand beside it as `exact`, the list's recall as `recall`.
        queries: (Q, D) floats.  database_file: `.npy` (N, D), in the order of `data`.
        failures: database images that could not be read, {"name": ..., "reason": ...}.
        protocol: how the descriptors came about; data set and distractors are added.
    Raises:
        ValueError: see `search.search`.
    """
    folder, truth, settings = stage.folder, data.ground_truth, stage.settings["parameters"]
    top, names = settings["top"], {"queries": truth.queries, "database": data.database}
    database = np.load(database_file, mmap_mode="r", allow_pickle=False)
    depth = max(settings["display"], search.shortlist_depth(truth, len(database), top=top))
    similarities, ranks = search.search(queries, database, k=depth)
    positions = search.labelled_positions(queries, database, labelled(truth))
    scores: dict[str, Any] = {}
    if "index" in settings:
        scores["exact"], exact = evaluate(positions, truth), ranks
        index = _index(folder, database, settings["index"])
        similarities, ranks, unanswered = approximate.find(index, queries, k=depth)
        found = similarities, ranks
        positions = approximate.positions_behind(positions, *found, queries, database)
        scores["recall"] = approximate.recall(ranks, exact) | {"searched exactly": unanswered}
    runs.write_array(folder / "queries.npy", queries)
    runs.write_json(folder / "names.json", names)
    runs.write_array(folder / "ranks.npy", ranks)
    runs.write_array(folder / "similarities.npy", similarities)
    positions.save(folder / "positions.npz")
    search.write_shortlist(
        folder / "shortlist.txt", search.shortlist(ranks, truth, top=top), **names
    )
    runs.write_json(folder / "failures.json", failures)
    further = {"dataset": data.name, "reranked": False}
    further |= {"distractors": len(database) - len(truth.database)}
    document = scores_document(
        evaluate(positions, truth),
        protocol=dict(protocol) | further,
        parameters=settings,
        inputs=stage.settings["inputs"],
        failed=len(failures),
        ground_truth=truth,
        **scores,
    )
    runs.write_json(folder / "scores.json", document)


def _index(folder: Path, database: np.ndarray, text: str) -> approximate.Index:
    approximate.build(folder, database, text)
    return approximate.read(folder, database, text)


def global_outputs(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The files of a global stage with these parameters."""
    return GLOBAL_OUTPUTS + (approximate.OUTPUTS if "index" in parameters else ())
