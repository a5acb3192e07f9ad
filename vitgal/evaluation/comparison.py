"""Compares two results: their settings, and AP query by query.

A result is a scores.json. Runs, datasets of a run and single stages can be compared, for example a
reranked ranking with the global one of the same run.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS
from vitgal.evaluation.landmarks import Landmarks
from vitgal.evaluation.scores import SCORES, Scores, mean_and_interval, read_scores, resampled
from vitgal.evaluation.statistics import BOOTSTRAP, PairedTest, paired_test, verdict

SETTINGS = ("protocol", "fingerprints", "failed_images", "bootstrap", "versions")
# Fingerprints that are not compared: these files follow from the settings.
DERIVED = ("names.json", "ranks.npy", "positions.npz", "shortlist.txt", "local features")
DERIVED += ("bootstrap.landmarks",)  # follows from the ground truth
ABSENT = "–"
FINGERPRINT_DIGITS = 12  # enough to distinguish two
SETTING_WIDTH = 40  # characters


class ResultError(runs.UserError, FileNotFoundError):
    """A folder holds no result."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The comparison of two results, by protocol.

    Attributes:
        settings: a row for each setting that differs, indexed by its name, with `names` as columns.
        landmarks: of the queries, which tests and intervals resample.
        tests, plain: second against first, over landmarks and over single queries.
        intervals: (mAP, low, high) in [0, 1] of each of the two.
        changes: a row a query, indexed by its name, with the columns (protocol, "first" | "second"
            | "change"): AP in [0, 1], nan for a query that does not count.
    """

    names: tuple[str, str]
    settings: pd.DataFrame
    landmarks: Landmarks
    tests: dict[str, PairedTest]
    intervals: dict[str, list[tuple[float, float, float]]]
    plain: dict[str, PairedTest]
    changes: pd.DataFrame

    def sentence(self, protocol: str, *, plain: bool = False) -> str:
        """States whether the two differ under one protocol; plain: over single queries."""
        return verdict((self.plain if plain else self.tests)[protocol], *self.names)

    def table(self, protocol: str) -> pd.DataFrame:
        """Returns one protocol's queries with the columns before, after and change."""
        return self.changes[protocol].rename(columns={"first": "before", "second": "after"})


def find_results(path: str | Path) -> dict[str, Path]:
    """Finds the results in a run, dataset's or stage's folder: "<dataset>/<stage>" -> its folder.

    A path that does not exist is taken as the name of a run. Raises FileNotFoundError where there
    is no such folder, or no result in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = runs.run_folder(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run {path}: neither here nor at {folder}")
    folder = folder.resolve()
    for pattern in (SCORES, f"*/{SCORES}", f"*/*/{SCORES}"):
        if files := sorted(folder.glob(pattern)):
            stages = [file.parent for file in files]
            return {f"{stage.parent.name}/{stage.name}": stage for stage in stages}
    raise FileNotFoundError(
        f"{path} holds no {SCORES}: run the notebooks 04_global_evaluation and 06_rerank first"
    )


def compare(
    first: str | Path, second: str | Path, *, seed: int = BOOTSTRAP["seed"]
) -> dict[str, Comparison]:
    """Compares the results that two folders have in common, by label.

    Two single stages, such as `runs/a/demo/global` and `runs/a/demo/rerank`, are compared even
    if their labels differ. first, second: see `find_results`. seed: of the bootstrap and the
    permutations. Raises FileNotFoundError where there is no folder, no result or no common label,
    and as `compare_folders`.
    """
    results = find_results(first), find_results(second)
    if all(len(result) == 1 for result in results):
        labels, folders = zip(*(next(iter(result.items())) for result in results), strict=True)
        pairs = {" and ".join(dict.fromkeys(labels)): folders}
    else:
        common = [label for label in results[0] if label in results[1]]
        pairs = {label: (results[0][label], results[1][label]) for label in common}
    if not pairs:
        raise FileNotFoundError(
            f"{first} has {', '.join(results[0])} and {second} has {', '.join(results[1])}: no "
            "result of the same name to compare; name two stages' folders"
        )
    names = tuple(distinct_names([first, second]))
    return {label: compare_folders(*pair, names=names, seed=seed) for label, pair in pairs.items()}


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """Returns the shortest ends of paths that all differ; equal paths are numbered."""
    parts = [Path(path).absolute().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, start=1)]


def compare_folders(
    first: Path, second: Path, *, names: tuple[str, str], seed: int = BOOTSTRAP["seed"]
) -> Comparison:
    """Compares two stages' results; ResultError where one has none, else as `compare_results`."""
    for folder in map(Path, (first, second)):
        if not (folder / SCORES).exists():
            raise ResultError(f"{folder} holds no {SCORES}: name a run whose stage is finished")
    return compare_results(read_scores(first), read_scores(second), names=names, seed=seed)


def compare_results(
    first: Scores, second: Scores, *, names: tuple[str, str], seed: int = BOOTSTRAP["seed"]
) -> Comparison:
    """Compares two results query by query, under each protocol that they have in common.

    first, second: contents of a scores.json, or parts of one (`global` in a reranked one's), which
    have no settings. Raises ValueError where the datasets, queries or labels differ.
    """
    check_comparable(first, second, names)
    protocols = [p for p in PROTOCOLS if p in first and p in second]
    if not protocols:
        raise ValueError(f"{names[0]} and {names[1]} share no protocol of {', '.join(PROTOCOLS)}")
    landmarks = resampled(first, second)
    tests, intervals, plain, columns = {}, {}, {}, {}
    for protocol in protocols:
        before, after = (np.array(x[protocol]["ap"], np.float64) for x in (first, second))
        clusters = landmarks.clusters
        plain[protocol] = paired_test(before, after, seed=seed)
        tests[protocol] = paired_test(before, after, clusters, seed=seed)
        intervals[protocol] = [mean_and_interval(ap, clusters, seed) for ap in (before, after)]
        columns |= {(protocol, "first"): before, (protocol, "second"): after}
        columns[protocol, "change"] = after - before
    queries = first.get("queries") or second.get("queries") or range(len(before))
    changes = pd.DataFrame(columns, index=pd.Index(queries, name="query"))
    settings = setting_table(first, second, names)
    return Comparison(names, settings, landmarks, tests, intervals, plain, changes)


def check_comparable(first: Scores, second: Scores, names: tuple[str, str]) -> None:
    """Raises ValueError unless both results score the same queries against the same labels."""
    datasets = [scores.get("protocol", {}).get("dataset") for scores in (first, second)]
    if None not in datasets and datasets[0] != datasets[1]:
        raise ValueError(
            f"{names[0]} is a result on {datasets[0]}, {names[1]} on {datasets[1]}: results "
            "on different data sets cannot be compared"
        )
    queries = [scores.get("queries") for scores in (first, second)]
    if None not in queries and queries[0] != queries[1]:
        pairs = enumerate(itertools.zip_longest(*queries))
        index, (query, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"{names[0]} has {len(queries[0])} queries, {names[1]} {len(queries[1])}, and query "
            f"{index} is {query} there and {other} here: only the same queries can be compared"
        )
    labels = [scores.get("fingerprints", {}).get("ground truth") for scores in (first, second)]
    if None not in labels and labels[0] != labels[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} were scored against different labels or boxes (the "
            "ground truths' fingerprints differ): score both against the same ground truth"
        )


def setting_table(first: Scores, second: Scores, names: tuple[str, str]) -> pd.DataFrame:
    """Lists the settings that differ, a row each; – marks one that a result does not have."""
    settings = [settings_of(scores) for scores in (first, second)]
    rows = {}
    for key in dict.fromkeys([*settings[0], *settings[1]]):
        before, after = (values.get(key, ABSENT) for values in settings)
        if before != after:
            rows[key] = [_shortened(key, before), _shortened(key, after)]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(names))
    table.index.name = "setting"
    return table


def settings_of(scores: Scores) -> dict[str, Any]:
    """Returns a result's settings by dotted name; parameters under their stage's name."""
    nested: dict[str, Any] = {}
    if "parameters" in scores:
        stage = "rerank" if "short_list" in scores.get("protocol", {}) else "global"
        nested = {**scores.get("earlier", {}), stage: scores["parameters"]}
    nested |= {key: scores[key] for key in SETTINGS if key in scores}
    flat = {key: value for key, value in _flat(nested).items() if not key.endswith(DERIVED)}
    for key in [key for key in flat if key.startswith("protocol.")]:
        # It may only repeat a parameter of the global stage.
        if flat.get(f"global.{key.removeprefix('protocol.')}", ABSENT) == flat[key]:
            del flat[key]
    return flat


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _shortened(key: str, value: Any) -> str:
    text = str(value)
    if key.startswith("fingerprints.") and len(text) == 64:
        return text[:FINGERPRINT_DIGITS]
    return text if len(text) <= SETTING_WIDTH else f"{text[: SETTING_WIDTH - 1]}…"


def report(comparison: Comparison, label: str, *, listed: int = 5, plain: bool = False) -> str:
    """Writes a comparison as text: settings, results, and the queries that changed most.

    listed: how many that gained, and that lost. plain: adds the tests over single queries.
    """
    names, tests = comparison.names, comparison.tests
    parts = [f"{label}: {names[0]} (first) against {names[1]} (second)"]
    if comparison.settings.empty:
        parts.append("no setting differs")
    else:
        parts.append("what was set differently\n" + aligned(comparison.settings, str.ljust))
    if not any(test.won or test.lost for test in tests.values()):
        return "\n\n".join([*parts, "every query has the same AP in both"])
    parts.append("mAP in percent with its 95 % interval\n" + aligned(_results(comparison)))
    parts.append("\n".join(f"{p.capitalize():7} {comparison.sentence(p)}" for p in tests))
    parts.append(str(comparison.landmarks))
    if plain:
        sentences = (f"{p.capitalize():7} {comparison.sentence(p, plain=True)}" for p in tests)
        parts.append("\n".join(["as if queries of one landmark were independent", *sentences]))
    protocol = next(p for p in ("medium", "easy", "hard") if p in tests)
    queries = _changed(comparison, protocol, listed)
    if len(queries):
        title = f"queries that changed most, {protocol.capitalize()} AP"
        parts.append(f"{title}\n{aligned(queries)}")
    return "\n\n".join(parts)


def _results(comparison: Comparison) -> pd.DataFrame:
    rows = {}
    for protocol, test in comparison.tests.items():
        rows[protocol.capitalize()] = [
            *(interval_text(*values) for values in 100 * np.array(comparison.intervals[protocol])),
            f"{100 * test.difference:+.1f}",
            ends_text(100 * test.low, 100 * test.high),
            f"{test.p_value:.4f}{'' if test.exact else ' ~'}",
            f"{test.won}/{test.lost}/{test.queries - test.won - test.lost}",
        ]
    columns = [*comparison.names, "difference", "95 % interval", "p", "won/lost/same"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def interval_text(mean: float, low: float, high: float) -> str:
    """Writes a mean and its interval, in percent; nan where there is none."""
    if np.isnan(mean):
        return ABSENT
    return f"{mean:.1f} ({ABSENT if np.isnan(low) else f'{low:.1f} to {high:.1f}'})"


def ends_text(low: float, high: float) -> str:
    """Writes the ends of a difference's interval, in points; nan where there is none."""
    return ABSENT if np.isnan(low) else f"{low:+.1f} to {high:+.1f}"


def _changed(comparison: Comparison, protocol: str, listed: int) -> pd.DataFrame:
    """Returns the queries that lost and gained most, AP in percent as text."""
    table = comparison.changes[protocol].dropna(subset="change")
    table = table[table["change"] != 0].sort_values("change", kind="stable")
    if len(table) > 2 * listed:
        table = pd.concat([table.iloc[:listed], table.iloc[len(table) - listed :]])
    text = (100 * table).map("{:.1f}".format)
    text["change"] = [f"{100 * value:+.1f}" for value in table["change"]]
    return text.set_axis([*comparison.names, "change"], axis=1)


def aligned(table: pd.DataFrame, adjust: Callable[[str, int], str] = str.rjust) -> str:
    """Writes a table of texts in columns of one width; the first is the index, without a title."""
    rows = [["", *map(str, table.columns)]]
    rows += [
        [str(name), *map(str, row)] for name, row in zip(table.index, table.values, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        cells = [adjust(cell, width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"  {'  '.join([name.ljust(widths[0]), *cells])}".rstrip())
    return "\n".join(lines)
