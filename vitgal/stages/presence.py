"""Models of presence for rankings of own photographs, and how they are fitted.

A model of presence belongs to the settings that similarities and evidence come from. The model for
the defaults of `vitgal own` is in presence.json beside this module; its entry `made` says how it
was made. For other settings one is fitted to a folder of known places, one sub-folder per place;
for a benchmark, to the run's val_retrieval.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.revisited import GroundTruth, labelled, positives
from vitgal.features.files import map_array, read_json
from vitgal.retrieval.presence import Presence, PresenceError, fit_presence
from vitgal.settings import RerankingSettings
from vitgal.stages import own
from vitgal.stages.own import Describer, Photographs
from vitgal.stages.rerank import (
    PROBABILITIES,
    CandidateLists,
    candidate_similarities,
    read_lists,
)
from vitgal.stages.tuning import tuned_pairs

SHIPPED = "presence.json"
FITTED = "presence.json"  # in the folder of the descriptions
SCHEMA = {
    **dict.fromkeys(("bias", "similarity", "evidence", "threshold", "precision", "recall"), float),
    **dict.fromkeys(("pairs", "positives"), int),
}
# Settings of reranking that change neither similarities nor evidence.
UNUSED = ("top", "ties", "order", "fused_weight", "fused_cap", "seed")


def presence_key(describer: Describer, settings: RerankingSettings) -> str:
    """Returns a hash of all that similarities and evidence of own photographs depend on."""
    matching = {k: v for k, v in settings.compared().items() if k not in UNUSED}
    return runs.fingerprint([describer.parameters, matching])[:16]


def known_presence(describer: Describer, settings: RerankingSettings) -> Presence | None:
    """Returns the model for these settings, fitted in the run or shipped; None where none is."""
    entry = (shipped() | _fitted(describer)).get(presence_key(describer, settings))
    return entry and Presence(**{name: entry[name] for name in SCHEMA})


def shipped() -> dict[str, Any]:
    """Returns the models that come along, by key, each with `made`: how."""
    return json.loads(resources.files("vitgal.stages").joinpath(SHIPPED).read_text("utf-8"))


def fit_places(
    photographs: Photographs, settings: RerankingSettings, same: Sequence[tuple[str, str]] = ()
) -> Presence:
    """Fits a model to a folder with one sub-folder per place, and keeps it in the run.

    Every photograph is searched for among the others; the pairs are those of the short lists. same:
    pairs of sub-folders that show one place. Raises PresenceError where no place has two
    photographs, or all photographs show one place.
    """
    alias = dict(same)
    folders = {name: Path(name).parts[0] for name in photographs.names}
    places = {name: alias.get(folder, folder) for name, folder in folders.items()}
    rows = []
    for name in photographs.names:
        result = own.search_folder(photographs, str(photographs.path(name)), None, settings)
        table = result.table[result.table["matches"].notna()]
        same_place = [places[other] == places[name] for other in table["photograph"]]
        rows.append(table[["similarity", "evidence"]].assign(same=same_place).to_numpy(np.float64))
    similarities, evidence, same_place = np.concatenate(rows).T
    try:
        presence = fit_presence(similarities, evidence, same_place > 0)
    except PresenceError as error:
        raise PresenceError(
            f"{photographs.folder}: {error}; name a folder with one sub-folder per place, some of "
            "them with two photographs"
        ) from None
    describer = photographs.describer
    fitted = _fitted(describer) | {presence_key(describer, settings): asdict(presence)}
    runs.write_json(describer.folder / FITTED, fitted)
    return presence


def judge_benchmark(
    run: Path, validation: GroundTruth, truth: GroundTruth, settings: RerankingSettings
) -> tuple[Presence, pd.DataFrame]:
    """Fits a model to val_retrieval and says what it finds among a reranked benchmark's candidates.

    The pairs of the fit are those that tuning verified at its current settings. Images that a
    ground truth calls junk are left out. The probabilities are kept beside the benchmark's counts.

    validation, truth: the ground truths of val_retrieval and of the benchmark. settings: those of
    the stages `val_retrieval/tuning` and `<benchmark>/rerank`, which are finished. Returns the
    model, and a row for either data set: its pairs and those of one landmark; precision and recall
    at the model's threshold in percent; its queries, those with a candidate at or above the
    threshold, and those of them whose most probable candidate shows the landmark. Raises StageError
    where a stage is missing, PresenceError where none or all pairs of val_retrieval show one
    landmark.
    """
    lists, similarities, evidence = tuned_pairs(run, validation)
    same, used = _answers(lists)
    presence = fit_presence(similarities[used], evidence[used], same[used])
    probabilities = _probabilities(presence, similarities, evidence, used)
    rows = {validation.name: _judged(presence, probabilities, same, used)}
    folder = Path(run) / truth.name
    runs.read_stage(folder / "rerank", "notebook 06_rerank")
    lists = read_lists(folder, truth, settings.top)
    counted = "evidence" if (folder / "rerank" / "evidence.npy").exists() else "inliers"
    evidence = map_array(folder / "rerank" / f"{counted}.npy")
    similarities = candidate_similarities(folder / "global", lists)
    same, used = _answers(lists)
    probabilities = _probabilities(presence, similarities, evidence, used)
    runs.write_array(folder / "rerank" / PROBABILITIES, probabilities)
    rows[truth.name] = _judged(presence, probabilities, same, used)
    return presence, pd.DataFrame.from_dict(rows, orient="index")


def _answers(lists: CandidateLists) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates (Q, C) show the query's landmark, and which are neither junk nor padding."""
    truth, candidates = lists.ground_truth, lists.candidates
    same, used = np.zeros(candidates.shape, bool), candidates >= 0
    rows = zip(candidates, positives(truth, "medium"), labelled(truth), strict=True)
    for q, (images, right, named) in enumerate(rows):
        same[q] = np.isin(images, right)
        used[q] &= same[q] | ~np.isin(images, named)
    return same, used


def _probabilities(
    presence: Presence, similarities: np.ndarray, evidence: np.ndarray, used: np.ndarray
) -> np.ndarray:
    """Returns (Q, C) float64, -1 for junk and padding; all arrays are (Q, C)."""
    probabilities = np.full(used.shape, -1.0)
    probabilities[used] = presence.probabilities(similarities[used], evidence[used])
    return probabilities


def _judged(
    presence: Presence, probabilities: np.ndarray, same: np.ndarray, used: np.ndarray
) -> dict[str, float]:
    """A row of `judge_benchmark`; all arrays are (Q, C)."""
    found, same = probabilities >= presence.threshold, same & used
    best = probabilities.argmax(axis=1)[:, None]
    right = np.take_along_axis(same & found, best, axis=1)
    return {
        "pairs": int(used.sum()),
        "right": int(same.sum()),
        "precision": 100 * (found & same).sum() / max(found.sum(), 1),
        "recall": 100 * (found & same).sum() / max(same.sum(), 1),
        "queries": len(same),
        "found": int(found.any(axis=1).sum()),
        "best is right": int(right.sum()),
    }


def _fitted(describer: Describer) -> dict[str, Any]:
    """The models that were fitted in the run, by key."""
    file = describer.folder / FITTED
    entries = read_json(file, dict) if file.exists() else {}
    if not all(runs.conforms(entry, SCHEMA) for entry in entries.values()):
        raise PresenceError(f"{file} holds other entries than expected: delete it")
    return entries
