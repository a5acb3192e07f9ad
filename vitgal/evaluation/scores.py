"""Tables and documents of scores."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth
from vitgal.evaluation.statistics import BOOTSTRAP, bootstrap_interval


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
