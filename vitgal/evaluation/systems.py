"""Sets the systems of one or several runs side by side on one benchmark.

A system is a stage with a scores.json: a run's global and its reranked ranking are two. The
published results of other systems (published.csv) stand in columns of their own: they were measured
elsewhere, and no test compares them.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS
from vitgal.evaluation.comparison import check_comparable, distinct_names, find_results
from vitgal.evaluation.landmarks import Landmarks
from vitgal.evaluation.scores import Scores, mean_and_interval, read_scores, resampled
from vitgal.evaluation.statistics import BOOTSTRAP, SIGNIFICANT, holm, paired_test
from vitgal.evaluation.tuning import DATASET as VALIDATION
from vitgal.features.files import map_array
from vitgal.features.store import FeatureStore

PUBLISHED = Path(__file__).with_name("published.csv")
COSTS = ("dimension", "local dimension", "ms an image", "ms a query", "bytes an image")
STAGES = {"rerank": "reranked"}  # a stage's folder -> its name in a table, where they differ


class TableError(runs.UserError, ValueError):
    """Results that cannot stand in one table."""


@dataclass(frozen=True, eq=False)
class SystemTable:
    """Systems on one benchmark, `dataset` with the number of distractors if there are any.

    Attributes:
        landmarks: of the queries, which intervals and tests resample.
        systems: one row per system, indexed by its number from 1. Columns: `system`, `network`,
            `size` (pixels of the network input), `dimension`, `local dimension`; for each protocol
            the mAP in percent ("medium"), its interval ("medium low", "medium high"), "medium
            mP@10" and the numbers of the systems that it significantly exceeds ("medium better
            than", a tuple); `ms an image` to describe it, `ms a query` to rerank, `bytes an image`
            of all descriptors, `device`; with published results their mAP ("published medium") and
            `source`. nan or "" where a value is unknown.
        tests: one row per protocol and pair of systems: protocol, first, second (numbers),
            difference, low, high (percent), p, and p Holm, corrected over the protocol's pairs.
    """

    dataset: str
    queries: int
    landmarks: Landmarks
    systems: pd.DataFrame
    tests: pd.DataFrame

    @property
    def measured(self) -> pd.DataFrame:
        """The rows that are not published results."""
        return self.systems[self.systems["source"] == ""]


def system_table(
    paths: Iterable[str | Path],
    *,
    dataset: str | None = None,
    published: bool = False,
    seed: int = BOOTSTRAP["seed"],
) -> SystemTable:
    """Sets the results of runs side by side and tests each pair of systems.

    paths: as for `find_results`. dataset: its name; None: the only one that all have in common,
    val_retrieval aside. published: adds the published results on this benchmark. seed: of the
    bootstrap and the permutations.

    Raises TableError for no path, one named twice, no dataset or several in common, other numbers
    of distractors, or no published results; else as `find_results` and `check_comparable`.
    """
    in_order = _find_systems([*paths], dataset)
    folders, scores = ({name: pair[i] for name, pair in in_order.items()} for i in range(2))
    names, (first, *others) = [*scores], [*scores.values()]
    for name, other in zip(names[1:], others, strict=True):
        check_comparable(first, other, (names[0], name))
        if _distractors(first) != _distractors(other):
            raise TableError(
                f"{names[0]} is ranked among {_distractors(first):,} distractors and {name} among "
                f"{_distractors(other):,}: name runs with the same"
            )
    landmarks = resampled(*scores.values())
    tests = _tests([*scores.values()], landmarks, seed)
    rows = [_row(name, folders[name], single, landmarks, seed) for name, single in scores.items()]
    for protocol in PROTOCOLS:
        for number, row in enumerate(rows, start=1):
            row[f"{protocol} better than"] = _worse(tests, protocol, number)
    name, distractors = _dataset(first, folders[names[0]]), _distractors(first)
    if published:
        rows += _published_rows(name, distractors)
    systems = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="#"))
    systems["source"] = systems["source"].fillna("") if published else ""
    title = f"{name} + {distractors:,} distractors" if distractors else name
    return SystemTable(title, len(landmarks.groups), landmarks, systems, tests)


def _find_systems(
    paths: Sequence[str | Path], dataset: str | None
) -> dict[str, tuple[Path, Scores]]:
    """Returns the name of each system with its folder and scores, in the order of the paths."""
    if not paths:
        raise TableError("no run is named: a table needs one or more")
    of_each: list[dict[str, dict[Path, Scores]]] = []  # of each path: data set -> its stages
    for path in paths:
        of_each.append({})
        for stage in find_results(path).values():
            scores = read_scores(stage)
            of_each[-1].setdefault(_dataset(scores, stage), {})[stage] = scores
    stages = [stage for results in of_each for own in results.values() for stage in own]
    if twice := next((stage for stage in stages if stages.count(stage) > 1), None):
        raise TableError(f"{twice} is named twice: name each run or stage once")
    if dataset is None:
        dataset = _common_dataset(paths, of_each)
    systems: dict[Path, Scores] = {}
    for path, results in zip(paths, of_each, strict=True):
        if dataset not in results:
            raise TableError(f"{path} has no result on {dataset}, but on {', '.join(results)}")
        systems |= results[dataset]
    folders = [*dict.fromkeys(stage.parent.parent for stage in systems)]  # runs, each once
    labels = dict(zip(folders, distinct_names(folders), strict=True))
    return {
        f"{labels[stage.parent.parent]} {STAGES.get(stage.name, stage.name)}": (stage, scores)
        for stage, scores in systems.items()
    }


def _common_dataset(paths: Sequence[str | Path], of_each: Sequence[dict[str, Any]]) -> str:
    """Returns the one data set that is in the results of each path, val_retrieval aside."""
    common = [name for name in of_each[0] if all(name in results for results in of_each)]
    if len(common) > 1 and VALIDATION in common:
        common.remove(VALIDATION)
    if not common:
        each = [f"{path}: {', '.join(own)}" for path, own in zip(paths, of_each, strict=True)]
        raise TableError(
            f"the runs have no data set in common ({'; '.join(each)}): results on different data "
            "sets cannot stand in one table"
        )
    if len(common) > 1:
        raise TableError(f"the runs have results on {', '.join(common)}: name one with --dataset")
    return common[0]


def _row(
    name: str, folder: Path, scores: Scores, landmarks: Landmarks, seed: int
) -> dict[str, Any]:
    """Returns a system's row without the tests, as `SystemTable.systems` describes it."""
    earlier = scores.get("earlier", {})
    settings = [earlier.get("global", scores.get("parameters", {})), earlier.get("local", {})]
    sizes = [str(values["size"]) for values in settings if values.get("size") is not None]
    if scores.get("protocol", {}).get("crop_queries") is False:
        name += ", queries not cropped"
    row: dict[str, Any] = {"system": name, "size": " / local ".join(sizes)}
    for protocol in PROTOCOLS:
        result = scores.get(protocol, {"ap": [np.nan], "mp_at": {}})
        clusters = landmarks.clusters if protocol in scores else None
        values = [100 * value for value in mean_and_interval(result["ap"], clusters, seed)]
        row |= zip((protocol, f"{protocol} low", f"{protocol} high"), values, strict=True)
        precision = result["mp_at"].get("10")
        row[f"{protocol} mP@10"] = np.nan if precision is None else 100 * precision
    return row | _costs(folder) | {"source": ""}


def _costs(folder: Path) -> dict[str, Any]:
    """Returns network, dimension, times, bytes and device, from the stages of a system."""
    source = folder if folder.name != "rerank" else folder.with_name("global")
    row = {"network": "", "device": ""}
    row |= dict.fromkeys(COSTS, np.nan)
    if not (source / runs.MANIFEST).exists():  # another system's scores.json alone
        return row
    manifest = runs.read_stage(source, "04_global_evaluation")
    facts, descriptors = manifest["recorded"], map_array(source / "database.npy")
    queries = len(map_array(source / "queries.npy"))
    row["network"], row["device"] = _network(source, manifest), facts.get("device", "")
    row["dimension"] = descriptors.shape[1]
    row["bytes an image"] = descriptors.itemsize * descriptors.shape[1]
    if "descriptors" not in manifest["inputs"]:
        row["ms an image"] = 1000 * facts["seconds"] / (len(descriptors) + queries)
    return row if folder == source else row | _reranking_costs(folder, row, queries)


def _reranking_costs(folder: Path, row: dict[str, Any], queries: int) -> dict[str, Any]:
    """Returns a global system's costs with those of local features and verification added."""
    manifest = runs.read_stage(folder.with_name("local"), "05_local_extraction")
    facts, store = manifest["recorded"], FeatureStore.open(folder.with_name("local"))
    network = _network(store.folder, manifest)
    files = sum(file.stat().st_size for file in store.folder.rglob("*.npy"))
    seconds = runs.read_stage(folder, "06_rerank")["recorded"]["seconds"]
    return {
        "network": row["network"] + ("" if network == row["network"] else f" / local {network}"),
        "local dimension": store.code_dim,
        "bytes an image": row["bytes an image"] + files / max(1, len(store)),
        "ms an image": row["ms an image"] + 1000 * facts["seconds"] / max(1, facts["images"]),
        "ms a query": 1000 * seconds / queries,
    }


def _network(stage: Path, manifest: dict[str, Any]) -> str:
    """Returns the name of what described the images of a stage, as far as it is recorded."""
    if {"descriptors", "local features"} & manifest["inputs"].keys():
        return "made elsewhere"
    if method := manifest["parameters"].get("local"):  # "sift" or "xfeat"
        return method
    if weights := manifest["recorded"].get("weights"):
        return weights.partition("@")[0] if weights.startswith(runs.TIMM) else Path(weights).name
    training = stage.parent.parent / "retrieval" / runs.MANIFEST  # of the run's own model
    facts = runs.read_record(training)["parameters"] if training.exists() else {}
    return f"ViTGaL, {facts['architecture']}" if "architecture" in facts else "ViTGaL"


def _tests(scores: Sequence[Scores], landmarks: Landmarks, seed: int) -> pd.DataFrame:
    """Tests each pair of systems under each protocol, see `SystemTable.tests`."""
    columns = ["protocol", "first", "second", "difference", "low", "high", "p", "p Holm"]
    rows = []
    for protocol in PROTOCOLS:
        ap = {
            number: np.array(single[protocol]["ap"], np.float64)
            for number, single in enumerate(scores, start=1)
            if protocol in single
        }
        pairs = [*itertools.combinations(ap, 2)]
        clusters = landmarks.clusters
        tests = [paired_test(ap[one], ap[two], clusters, seed=seed) for one, two in pairs]
        corrected = holm([test.p_value for test in tests])
        for pair, test, p_value in zip(pairs, tests, corrected, strict=True):
            points = (100 * value for value in (test.difference, test.low, test.high))
            rows.append([protocol, *pair, *points, test.p_value, p_value])
    return pd.DataFrame(rows, columns=columns)


def _worse(tests: pd.DataFrame, protocol: str, number: int) -> tuple[int, ...]:
    """Returns the numbers of the systems that a system significantly exceeds."""
    rows = tests[(tests["protocol"] == protocol) & (tests["p Holm"] < SIGNIFICANT)]
    won = rows[(rows["second"] == number) & (rows["difference"] > 0)]["first"]
    lost = rows[(rows["first"] == number) & (rows["difference"] < 0)]["second"]
    return tuple(sorted([*won, *lost]))


@functools.cache
def published_results() -> pd.DataFrame:
    """Reads the published mAP of other systems, in percent; nan where it is not published."""
    return pd.read_csv(PUBLISHED)


def _published_rows(dataset: str, distractors: int) -> list[dict[str, Any]]:
    results = published_results()
    on_dataset = results["dataset"].eq(dataset) & results["distractors"].eq(distractors)
    if not on_dataset.any():
        known = ", ".join(results["dataset"].unique())
        raise TableError(
            f"no published results are known on {dataset} with {distractors:,} distractors, only "
            f"on {known} with 0 or {results['distractors'].max():,}"
        )
    return [
        {"system": row["system"], "network": "", "size": "", "device": "", "source": row["source"]}
        | {f"published {protocol}": row[protocol] for protocol in PROTOCOLS}
        | {f"{protocol} better than": () for protocol in PROTOCOLS}
        for row in results[on_dataset].to_dict("records")
    ]


def _dataset(scores: Scores, folder: Path) -> str:
    return scores.get("protocol", {}).get("dataset") or folder.parent.name


def _distractors(scores: Scores) -> int:
    return scores.get("protocol", {}).get("distractors", 0)
