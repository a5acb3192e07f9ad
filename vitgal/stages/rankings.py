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
from vitgal.retrieval.ranking import Ranking
from vitgal.settings import GlobalSettings

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
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    queries: np.ndarray,
    database_file: Path,
    protocol: Mapping[str, Any],
    failures: Sequence[Mapping[str, str]] = (),
) -> None:
    """Writes rankings, short lists and scores of global descriptors.

    With an index, the ranking begins with what the index returns. The scores are then those of that
    ranking; the exact scores are stored as `exact`, the recall of the index as `recall`.

    Args:
        queries: (Q, D) floats.
        database_file: a `.npy` (N, D), in the order of `dataset.database`.
        protocol: how the descriptors were made; dataset and distractors are added.
        failures: database images that could not be read, {"name": ..., "reason": ...}.
    """
    folder, truth = stage.folder, dataset.ground_truth
    database = np.load(database_file, mmap_mode="r", allow_pickle=False)
    shortlist_depth = shortlists.shortlist_depth(truth, len(database), top=settings.top)
    depth = max(settings.display, shortlist_depth)
    similarities, ranks = exact_search.search(queries, database, k=depth)
    positions = exact_ranks.labelled_positions(queries, database, labelled(truth))
    further: dict[str, Any] = {}
    if settings.index is not None:
        further["exact"], exact_order = evaluate(positions, truth), ranks
        faiss_index.build(folder, database, settings.index)
        index = faiss_index.read(folder, database, settings.index)
        similarities, ranks, unanswered = faiss_index.find(index, queries, k=depth)
        positions = faiss_index.positions_behind(positions, similarities, ranks, queries, database)
        recall = faiss_index.recall(ranks, exact_order)
        further["recall"] = recall | {"searched exactly": unanswered}
    runs.write_array(folder / "queries.npy", queries)
    names = {"queries": truth.queries, "database": dataset.database}
    runs.write_json(folder / "names.json", names)
    runs.write_array(folder / "similarities.npy", similarities)
    Ranking(ranks, positions).save(folder)
    listed = shortlists.shortlist(ranks, truth, top=settings.top)
    shortlists.write_shortlist(
        folder / "shortlist.txt", listed, queries=truth.queries, database=dataset.database
    )
    runs.write_json(folder / "failures.json", failures)
    document = scores_document(
        evaluate(positions, truth),
        protocol={
            **protocol,
            "dataset": dataset.name,
            "reranked": False,
            "distractors": len(database) - len(truth.database),
        },
        parameters=stage.settings["parameters"],
        inputs=stage.settings["inputs"],
        failed=len(failures),
        ground_truth=truth,
        further=further,
    )
    runs.write_json(folder / "scores.json", document)


def global_outputs(settings: GlobalSettings) -> tuple[str, ...]:
    """Lists the files of a global stage with these settings."""
    return GLOBAL_OUTPUTS + (() if settings.index is None else faiss_index.OUTPUTS)
