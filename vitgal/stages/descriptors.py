"""The global stage for descriptors of another system."""

import functools
import hashlib
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.descriptors import read_descriptors
from vitgal.retrieval import faiss_index
from vitgal.settings import GlobalSettings
from vitgal.stages.images import recorded_paths
from vitgal.stages.rankings import global_outputs, write_rankings

PARAMETERS = ("crop_queries", "top", "display", "index")  # the settings that matter here


def evaluate_descriptors(
    run: Path,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    *,
    descriptors: Path,
    overwrite: bool = False,
) -> Path:
    """Ranks a benchmark by another system's descriptors and scores the ranking.

    The stage `<run>/<dataset>/global` has the files of `evaluate_global`, so that local features,
    reranking and comparison follow as usual. No network is needed.

    Args:
        settings: `crop_queries` states whether the other system cropped the queries; it is recorded
            in the scores' protocol. `top`, `display` and `index` as in `evaluate_global`; all else
            is ignored.
        descriptors: see `read_descriptors`.
    Returns:
        The stage's folder.
    Raises:
        StageError: the folder holds other settings or descriptors.
        FileNotFoundError, DescriptorError: see `read_descriptors`.
    """
    descriptors = Path(descriptors)
    queries, count = dataset.ground_truth.queries, len(dataset.database)
    files = [path for path in (descriptors, descriptors.with_suffix(".txt")) if path.is_file()]
    stamp = runs.images_input([path.name for path in files], files).stamp

    @functools.cache
    def rows() -> np.ndarray:
        """Reads the descriptors, (N, D) float32: first the queries, then the database."""
        return read_descriptors(descriptors, [*queries, *dataset.database])

    compared = settings.compared()
    with runs.stage(
        run / dataset.name / "global",
        "global",
        parameters={name: compared[name] for name in PARAMETERS if name in compared},
        inputs={
            "dataset": dataset.as_input,
            "descriptors": runs.Input(stamp, lambda: hashlib.sha256(rows().data).hexdigest()),
        },
        overwrite=overwrite,
    ) as stage:
        if stage.finished:
            return stage.folder
        if settings.index is not None:
            faiss_index.check(settings.index, rows().shape[1], count)
        protocol = {"crop_queries": settings.crop_queries, "descriptors": "made elsewhere"}
        database_file = runs.write_array(stage.folder / "database.npy", rows()[len(queries) :])
        write_rankings(stage, dataset, settings, rows()[: len(queries)], database_file, protocol)
        recorded = {"images": count} | recorded_paths(run, dataset)
        return stage.finish(global_outputs(settings), recorded)
