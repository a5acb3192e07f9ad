"""The global stage for descriptors that another system made."""

import hashlib
from pathlib import Path

from vitgal import runs
from vitgal.data import revisited
from vitgal.features.descriptors import read_descriptors
from vitgal.retrieval import faiss_index
from vitgal.stages import rankings


def evaluate_descriptors(
    run: Path,
    *,
    dataset: str,
    data_folder: Path,
    descriptors: Path,
    folder: str = "global",
    top: int = 100,
    display: int = 1000,
    index: str | None = None,
    crop_queries: bool = True,
    distractors: Path | None = None,
    distractor_list: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Ranks and scores a benchmark by another system's descriptors: `<run>/<dataset>/global`.

    The stage has the files and the meaning of `extraction.evaluate_global`'s, so that local
    features, reranking and comparison follow as ever; no network is needed.

    Args:
        descriptors: see `read_descriptors`.
        crop_queries: whether the queries were described cropped; only their maker knows, and it
            stands in the scores' protocol.
        folder, top, display, index, distractors, distractor_list: as `extraction.evaluate_global`.
    Returns:
        The stage's folder.
    Raises:
        StageError: the folder holds a ranking made otherwise.
        FileNotFoundError, DescriptorError: see `read_descriptors`; the data set is not there.
    """
    data = revisited.open_dataset(
        dataset, data_folder, distractors=distractors, distractor_list=distractor_list
    )
    queries = data.ground_truth.queries
    rows = read_descriptors(descriptors, [*queries, *data.database])
    parameters = {"crop_queries": crop_queries, "top": top, "display": display}
    if index is not None:
        faiss_index.check(index, rows.shape[1], len(data.database))
        parameters["index"] = index
    inputs = {"dataset": data.fingerprint, "descriptors": hashlib.sha256(rows.data).hexdigest()}
    with runs.stage(
        run / dataset / folder, "global", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return stage.folder
        database = runs.write_array(stage.folder / "database.npy", rows[len(queries) :])
        protocol = {"crop_queries": crop_queries, "descriptors": "made elsewhere"}
        rankings.write_rankings(
            stage, data, rows[: len(queries)], database, failures=[], protocol=protocol
        )
        return stage.finish(rankings.global_outputs(parameters), images=len(data.database))
