"""Tables and documents of scores."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth
from vitgal.evaluation.landmarks import SOURCES, Landmarks, find_landmarks, landmarks_by_names
from vitgal.evaluation.statistics import BOOTSTRAP, bootstrap_interval
from vitgal.features.files import INT32, FileError, read_json

if TYPE_CHECKING:  # a finished run's scores are printed without it
    import pandas as pd

Scores = Mapping[str, Any]  # the result of `evaluate`, or the content of a scores.json
SCORES = "scores.json"
NUMBER = float | int | None
PARTS = {name: {"map": NUMBER, "mp_at": dict, "ap": [NUMBER]} for name in PROTOCOLS}
PARTS |= dict.fromkeys(("protocol", "parameters", "fingerprints", "earlier", "bootstrap"), dict)
PARTS |= {"queries": [str]}


def read_scores(folder: Path) -> Scores:
    """Reads the scores.json in a folder; FileError where it is missing, damaged or none."""
    path = Path(folder) / SCORES
    scores = read_json(path, dict)
    fits = all(runs.conforms(scores[name], part) for name, part in PARTS.items() if name in scores)
    fits = fits and runs.conforms(scores.get("bootstrap", {}).get("landmarks", []), [INT32])
    for result in [scores[name] for name in PROTOCOLS if fits and name in scores]:
        interval = result.get("interval", [None, None])
        numbers = [result["map"], *result["ap"], *result["mp_at"].values()]
        fits &= runs.conforms(interval, [NUMBER] * 2) and runs.conforms(numbers, [NUMBER])
        fits = fits and all(value is None or 0 <= value <= 1 for value in (*numbers, *interval))
    if not fits:
        raise FileError(f"{path} holds no scores: make the stage again")
    return scores


def intervals(systems: Mapping[str, Scores]) -> dict[str, dict[str, tuple[float, float]]]:
    """Computes 95 % bootstrap intervals of mAP: label -> protocol -> (low, high) in [0, 1].

    The landmarks are those that a system records, else those of another system with as many
    queries.
    """
    ends = {}
    for label, scores in systems.items():
        clusters = resampled(scores, *systems.values()).clusters
        present = [p for p in PROTOCOLS if p in scores]
        ends[label] = {p: mean_and_interval(scores[p]["ap"], clusters)[1:] for p in present}
    return ends


def resampled(*systems: Scores) -> Landmarks:
    """Returns the landmarks that intervals of some results of the same queries resample.

    They are those that the first of the results records. Without a record the names of the queries
    decide; without these each query has a landmark of its own. ValueError without scores.
    """
    counts = [len(scores[p]["ap"]) for scores in systems for p in PROTOCOLS if p in scores]
    if not counts:
        raise ValueError(f"no scores of {', '.join(PROTOCOLS)}")
    for scores in systems:
        record = scores.get("bootstrap", {})
        groups, source = record.get("landmarks", ()), record.get("landmarks_from")
        if len(groups) == counts[0] and source in SOURCES:
            return Landmarks(np.array(groups, np.int64), source)
    for scores in systems:
        if len(queries := scores.get("queries", ())) == counts[0]:
            return landmarks_by_names(queries)
    return Landmarks(np.arange(counts[0]), "queries")


def mean_and_interval(
    ap: np.ndarray, clusters: np.ndarray | None = None, seed: int = BOOTSTRAP["seed"]
) -> tuple[float, float, float]:
    """Returns the mean of AP (Q,), nan or None where none counts, and its interval's ends."""
    ap = np.array(ap, np.float64)
    mean = float(np.mean(ap[~np.isnan(ap)])) if not np.isnan(ap).all() else float("nan")
    return mean, *bootstrap_interval(ap, clusters, seed=seed)


def hardest(scores: Scores) -> str:
    """Returns the hardest protocol in which any query counts; ValueError if none does."""
    for protocol in reversed(PROTOCOLS):
        value = scores.get(protocol, {}).get("map")
        if value is not None and not np.isnan(value):
            return protocol
    raise ValueError("no query has a positive image under any protocol")


def score_table(scores: Scores | Mapping[str, Scores], *, digits: int = 1) -> "pd.DataFrame":
    """Arranges the scores of one system, or label -> scores of several, as a table in percent.

    A row a protocol, or a row (label, protocol). Columns: mAP, the ends `low` and `high` of its
    95 % interval over landmarks (see `intervals`), mP@k, and the number of queries that count.
    Undefined scores are nan.
    """
    import pandas as pd

    single = any(protocol in scores for protocol in PROTOCOLS)
    systems = {"": scores} if single else scores
    rows = {
        (label, protocol.capitalize()): _row(systems[label][protocol], *interval)
        for label, ends in intervals(systems).items()
        for protocol, interval in ends.items()
    }
    if not rows:
        raise ValueError(f"no scores of {', '.join(PROTOCOLS)} among {list(scores)}")
    index = pd.MultiIndex.from_tuples(rows, names=["ranking", "protocol"])
    table = pd.DataFrame(list(rows.values()), index=index).round(digits)
    return table.droplevel("ranking") if single else table


def _row(scores: Mapping[str, Any], low: float, high: float) -> dict[str, float]:
    row = {"mAP": scores["map"], "low": low, "high": high}
    row |= {f"mP@{k}": value for k, value in scores["mp_at"].items()}
    # None is the score of no query.
    row = {name: np.nan if value is None else 100 * value for name, value in row.items()}
    return row | {"queries": np.count_nonzero(~np.isnan(np.array(scores["ap"], np.float64)))}


def scores_document(
    result: Mapping[str, Mapping[str, Any]],
    *,
    protocol: Mapping[str, Any],
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
    ground_truth: GroundTruth,
    failed: int = 0,
    further: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the content of a scores.json: the scores and all that they depend on.

    Args:
        result: of `evaluate`; each protocol gets the 95 % `interval` of its mAP.
        protocol: how the ranking was made (queries cropped, ties, short list, ...).
        inputs: name -> fingerprint of each input.
        ground_truth: gives the queries' names and landmarks.
        failed: the number of database images that could not be read and rank last.
        further: more keys, such as "published": another result, which gets its intervals as well.

    Raises ValueError where a further key repeats another, or a value is a path, which would make
    equal runs differ between machines.
    """
    landmarks = find_landmarks(ground_truth)
    document = {
        **_with_intervals(result, landmarks.clusters),
        "protocol": protocol,
        "parameters": parameters,
        "fingerprints": {**inputs, "ground truth": ground_truth.fingerprint},
        "failed_images": failed,
        "versions": runs.versions(),
        "bootstrap": BOOTSTRAP | landmarks.recorded,
        "queries": ground_truth.queries,
    }
    further = further or {}
    if repeated := sorted(set(document) & set(further)):
        raise ValueError(f"a scores document has {repeated[0]!r} already")
    document |= {key: _with_intervals(value, landmarks.clusters) for key, value in further.items()}
    for key in ("protocol", "parameters", "fingerprints", *further):
        _refuse_paths(document[key], key)
    return runs.plain(document)


def _with_intervals(value: Any, clusters: np.ndarray | None) -> Any:
    """Adds the interval of each mAP to a result of `evaluate`; returns anything else as it is."""
    if not isinstance(value, Mapping) or not set(value) & set(PROTOCOLS):
        return value
    return {
        protocol: {"map": scores["map"], "interval": mean_and_interval(scores["ap"], clusters)[1:]}
        | dict(scores)
        for protocol, scores in value.items()
    }


def _refuse_paths(value: Any, key: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_paths(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_paths(item, key)
    elif isinstance(value, os.PathLike) or (isinstance(value, str) and os.path.isabs(value)):
        raise ValueError(f"{key} is the path {value}: record a name or a fingerprint instead")
