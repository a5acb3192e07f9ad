"""Two results against each other: what was set differently, and whether the queries agree on it.

A result is a `scores.json`; what is compared are runs, a data set's folder in a run, or single
stages, so that a reranked ranking can also be held against the global one of its own run.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS
from vitgal.evaluation import statistics
from vitgal.evaluation.statistics import PairedTest

SCORES = "scores.json"
SETTINGS = ("protocol", "fingerprints", "failed_images", "bootstrap", "versions")
# Fingerprints of a run's own files: they follow from the settings
DERIVED = ("names.json", "ranks.npy", "positions.npz", "shortlist.txt", "local features")
DIGITS = 12  # of a fingerprint, enough to tell two apart
SHOWN = 40  # characters of a setting


class ResultError(runs.UserError, FileNotFoundError):
    """There is no result where one was named."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """One result against another.

    names: of the two, as a reader knows them. settings: a row a setting that differs, indexed by
    its name, columns = names. tests: protocol -> PairedTest, second against first. intervals:
    protocol -> for each of the two (mAP, low, high) in [0, 1]. changes: a row a query, indexed by
    its name, with columns (protocol, "first" | "second" | "change"): AP in [0, 1], nan where the
    query does not count.
    """

    names: tuple[str, str]
    settings: pd.DataFrame
    tests: dict[str, PairedTest]
    intervals: dict[str, list[tuple[float, float, float]]]
    changes: pd.DataFrame

    def sentence(self, protocol: str) -> str:
        """Whether the two differ under one protocol."""
        return statistics.verdict(self.tests[protocol], *self.names)

    def table(self, protocol: str) -> pd.DataFrame:
        """The queries of one protocol as `plots.ap_change` draws them: before, after, change."""
        names = {"first": "before", "second": "after"}
        return self.changes[protocol].rename(columns=names)


def find_results(path: str | Path) -> dict[str, Path]:
    """The results below a folder: "<dataset>/<stage>" -> the folder that holds its scores.json.

    path: a run, a data set's folder in it, or a stage; a name that is no folder here is looked for
    among the runs. Raises FileNotFoundError where there is no such folder or no result in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = runs.run_folder(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run {path}: neither here nor at {folder}")
    folder = folder.resolve()
    for pattern in (SCORES, f"*/{SCORES}", f"*/*/{SCORES}"):
        if found := sorted(folder.glob(pattern)):
            parents = [file.parent for file in found]
            return {f"{parent.parent.name}/{parent.name}": parent for parent in parents}
    raise FileNotFoundError(
        f"{path} holds no {SCORES}: run the notebooks 04_global_evaluation and 06_rerank first"
    )


def compare(first: str | Path, second: str | Path, *, seed: int = 0) -> dict[str, Comparison]:
    """Compares what two folders hold, label by label: the results that both have.

    first, second: see `find_results`. Two single stages, as `runs/a/demo/global` and
    `runs/a/demo/rerank`, are compared whatever they are called; of a run and a single stage, the
    run's result of the same label. seed: of the bootstrap and the permutations.

    Raises:
        FileNotFoundError: a folder or a result is not there, or no result is in both.
        ValueError: results of other data sets, other queries or other labels (`compare_results`).
    """
    found = find_results(first), find_results(second)
    if all(len(one) == 1 for one in found):
        (one, one_folder), (other, other_folder) = (next(iter(each.items())) for each in found)
        label = one if one == other else f"{one} and {other}"
        pairs = {label: (one_folder, other_folder)}
    else:
        labels = [label for label in found[0] if label in found[1]]
        pairs = {label: (found[0][label], found[1][label]) for label in labels}
    if not pairs:
        raise FileNotFoundError(
            f"{first} has {', '.join(found[0])} and {second} has {', '.join(found[1])}: no result "
            "of the same name to compare; name two stages' folders"
        )
    names = _names(first, second)
    return {label: compare_folders(*pair, names=names, seed=seed) for label, pair in pairs.items()}


def _names(first: str | Path, second: str | Path) -> tuple[str, str]:
    """The shortest ends of the two paths that tell them apart."""
    parts = [Path(path).absolute().parts for path in (first, second)]
    for length in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(each[-length:]) for each in parts)
        if names[0] != names[1]:
            return names
    return f"{parts[0][-1]} (first)", f"{parts[1][-1]} (second)"


def compare_folders(
    first: Path, second: Path, *, names: tuple[str, str], seed: int = 0
) -> Comparison:
    """Compares the results of two stages' folders; raises as `compare_results`, and ResultError."""
    for folder in map(Path, (first, second)):
        if not (folder / SCORES).exists():
            raise ResultError(f"{folder} holds no {SCORES}: name a run whose stage is finished")
    documents = [runs.read_json(Path(folder) / SCORES) for folder in (first, second)]
    return compare_results(*documents, names=names, seed=seed)


def compare_results(
    first: Mapping[str, Any], second: Mapping[str, Any], *, names: tuple[str, str], seed: int = 0
) -> Comparison:
    """Compares two results query by query, under every protocol that both have.

    first, second: contents of scores.json (or parts of one, as the `global` in a reranked one's:
    then their settings stay empty). Raises ValueError where data sets, queries or labels differ.
    """
    _check_comparable(first, second, names)
    both = [p for p in PROTOCOLS if p in first and p in second]
    if not both:
        raise ValueError(f"{names[0]} and {names[1]} share no protocol of {', '.join(PROTOCOLS)}")
    tests, intervals, columns = {}, {}, {}
    for protocol in both:
        ap = [np.array(one[protocol]["ap"], np.float64) for one in (first, second)]
        tests[protocol] = statistics.paired_test(*ap, seed=seed)
        intervals[protocol] = [_with_mean(one, seed) for one in ap]
        columns |= {(protocol, "first"): ap[0], (protocol, "second"): ap[1]}
        columns[protocol, "change"] = ap[1] - ap[0]
    queries = first.get("queries") or second.get("queries")
    index = pd.Index(queries or range(len(ap[0])), name="query")
    changes = pd.DataFrame(columns, index=index)
    return Comparison(names, setting_table(first, second, names), tests, intervals, changes)


def _with_mean(ap: np.ndarray, seed: int) -> tuple[float, float, float]:
    known = ap[~np.isnan(ap)]
    mean = float(known.mean()) if known.size else float("nan")
    return mean, *statistics.bootstrap_interval(ap, **(statistics.BOOTSTRAP | {"seed": seed}))


def _check_comparable(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]
) -> None:
    """Raises ValueError unless both scored the same queries against the same labels."""
    sets = [one.get("protocol", {}).get("dataset") for one in (first, second)]
    if None not in sets and sets[0] != sets[1]:
        raise ValueError(
            f"{names[0]} is a result on {sets[0]}, {names[1]} on {sets[1]}: other data sets cannot "
            "be compared"
        )
    queries = [one.get("queries") for one in (first, second)]
    if None not in queries and queries[0] != queries[1]:
        pairs = itertools.zip_longest(*queries)
        place, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"{names[0]} has {len(queries[0])} queries, {names[1]} {len(queries[1])}, and query "
            f"{place} is {one} there and {other} here: only the same queries can be compared"
        )
    labels = [one.get("fingerprints", {}).get("ground truth") for one in (first, second)]
    if None not in labels and labels[0] != labels[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} were scored against other labels or boxes of the same "
            "queries (the ground truths' fingerprints differ): score both against one"
        )


def setting_table(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]
) -> pd.DataFrame:
    """The settings that differ between two results, a row each; empty where none does.

    Fingerprints are shortened; – stands for a setting that one of them does not have.
    """
    flat = [_settings(one) for one in (first, second)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    rows = {
        key: [_shown(key, one.get(key, "–")) for one in flat]
        for key in keys
        if flat[0].get(key, "–") != flat[1].get(key, "–")
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(names))
    table.index.name = "setting"
    return table


def _settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a result depends on, by dotted name; parameters by the stage that they belong to."""
    found = {}
    if "parameters" in document:
        stage = "rerank" if "short_list" in document.get("protocol", {}) else "global"
        found = {**document.get("earlier", {}), stage: document["parameters"]}
    found |= {key: document[key] for key in SETTINGS if key in document}
    flat = {key: value for key, value in _flat(found).items() if not key.endswith(DERIVED)}
    # The protocol repeats parameters of the global stage; where they are equal, once is enough.
    repeated = [
        key
        for key, value in flat.items()
        if key.startswith("protocol.")
        and flat.get(f"global.{key.removeprefix('protocol.')}", _flat) == value
    ]
    return {key: value for key, value in flat.items() if key not in repeated}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(item, f"{name}.") if isinstance(item, Mapping) else {name: item}
    return flat


def _shown(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if key.startswith("fingerprints.") and len(text) == 64:
        return text[:DIGITS]
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def report(comparison: Comparison, label: str, *, shown: int = 5) -> str:
    """A comparison as a person reads it: settings, results, the queries that changed most.

    label: what is compared. shown: queries that gained most, and as many that lost most.
    """
    parts = [f"{label}: {comparison.names[0]} (first) against {comparison.names[1]} (second)"]
    if comparison.settings.empty:
        parts.append("no setting differs")
    else:
        parts.append("what was set differently\n" + _aligned(comparison.settings, str.ljust))
    if not any(test.won or test.lost for test in comparison.tests.values()):
        return "\n\n".join([*parts, "every query has the same AP in both"])
    parts.append("mAP in percent with its 95 % interval\n" + _aligned(_results(comparison)))
    parts.append(
        "\n".join(f"{p.capitalize():7} {comparison.sentence(p)}" for p in comparison.tests)
    )
    protocol = next((p for p in ("medium", "easy") if p in comparison.tests), None)
    protocol = protocol or next(iter(comparison.tests))
    if shown and (queries := _changed(comparison, protocol, shown)) is not None:
        parts.append(f"queries that changed most, {protocol.capitalize()} AP\n{queries}")
    return "\n\n".join(parts)


def _results(comparison: Comparison) -> pd.DataFrame:
    rows = {}
    for protocol, test in comparison.tests.items():
        cells = [_percent(*values) for values in comparison.intervals[protocol]]
        cells.append(f"{100 * test.difference:+.1f}")
        cells.append(f"{100 * test.low:+.1f} to {100 * test.high:+.1f}")
        p_value = f"{test.p_value:.4f}{'' if test.exact else ' ~'}"
        counts = f"{test.won}/{test.lost}/{test.queries - test.won - test.lost}"
        rows[protocol.capitalize()] = [*cells, p_value, counts]
    columns = [*comparison.names, "difference", "95 % interval", "p", "won/lost/same"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _percent(mean: float, low: float, high: float) -> str:
    return "–" if np.isnan(mean) else f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _changed(comparison: Comparison, protocol: str, shown: int) -> str | None:
    """The queries that lost and gained most, as text; None where none changed."""
    change = comparison.changes[protocol]["change"].dropna()
    change = change[change != 0].sort_values(kind="stable")
    chosen = (
        change.iloc[np.unique([*range(shown), *range(len(change) - shown, len(change))])]
        if (len(change) > 2 * shown)
        else change
    )
    if not len(chosen):
        return None
    rows = comparison.changes[protocol].loc[chosen.index]
    table = (100 * rows).map("{:.1f}".format)
    table["change"] = [f"{100 * value:+.1f}" for value in chosen]
    table.columns = [*comparison.names, "change"]
    return _aligned(table)


def _aligned(table: pd.DataFrame, adjust: Callable[[str, int], str] = str.rjust) -> str:
    """Rows and columns as text, every column as wide as its widest cell, two blanks between."""
    head = ["", *map(str, table.columns)]
    rows = [
        [str(name), *map(str, row)] for name, row in zip(table.index, table.values, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [adjust(cell, width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)
