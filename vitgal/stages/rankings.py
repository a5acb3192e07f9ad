"""What the global stage writes: rankings, positions, short list and scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.data.revisited import RetrievalDataset, labelled
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.scores import scores_document
from vitgal.retrieval import exact_ranks, exact_search, faiss_index, shortlists

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
    depth = max(settings["display"], shortlists.shortlist_depth(truth, len(database), top=top))
    similarities, ranks = exact_search.search(queries, database, k=depth)
    positions = exact_ranks.labelled_positions(queries, database, labelled(truth))
    scores: dict[str, Any] = {}
    if "index" in settings:
        scores["exact"], exact = evaluate(positions, truth), ranks
        index = _index(folder, database, settings["index"])
        similarities, ranks, unanswered = faiss_index.find(index, queries, k=depth)
        found = similarities, ranks
        positions = faiss_index.positions_behind(positions, *found, queries, database)
        scores["recall"] = faiss_index.recall(ranks, exact) | {"searched exactly": unanswered}
    runs.write_array(folder / "queries.npy", queries)
    runs.write_json(folder / "names.json", names)
    runs.write_array(folder / "ranks.npy", ranks)
    runs.write_array(folder / "similarities.npy", similarities)
    positions.save(folder / "positions.npz")
    shortlists.write_shortlist(
        folder / "shortlist.txt", shortlists.shortlist(ranks, truth, top=top), **names
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


def _index(folder: Path, database: np.ndarray, text: str) -> faiss_index.Index:
    faiss_index.build(folder, database, text)
    return faiss_index.read(folder, database, text)


def global_outputs(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The files of a global stage with these parameters."""
    return GLOBAL_OUTPUTS + (faiss_index.OUTPUTS if "index" in parameters else ())
