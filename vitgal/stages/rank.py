"""The ranking side of the global stage: search, refinement, scores, and their files."""

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.data.revisited import GroundTruth, RetrievalDataset, labelled
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.scores import scores_document
from vitgal.features.files import map_array
from vitgal.retrieval import exact_ranks, exact_search, faiss_index, refine, reorder, shortlists
from vitgal.retrieval.exact_search import Database, WhitenedRows
from vitgal.retrieval.refine import Hits, NeighbourSearch, RefinementError, WhiteningMap
from vitgal.retrieval.reorder import ScoredRanking
from vitgal.settings import GlobalSettings
from vitgal.settings.refinement import (
    Augmentation,
    Diffusion,
    Expansion,
    KReciprocal,
    LearnedWhitening,
    Reordering,
    Step,
    SuperGlobal,
    Whitening,
    read_chain,
)
from vitgal.stages.whitening import Learnt, learnt_step

PLAIN = "plain"  # the ranking before refinement: top_plain.npy, positions_plain.npz
MOST_EXACT = 200_000  # images whose neighbours are searched exactly: N² x D products
GLOBAL_OUTPUTS = (  # the files of every global stage
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
GRAPH = ("graph_similarities.npy", "graph_images.npy")
WHITENING, NORMS, REFINED = "whitening.npz", "whitened_norms.npy", "refined_{}.npy"
OPTIONAL_OUTPUTS = (
    *(f"similarities_{PLAIN}.npy", f"top_{PLAIN}.npy", f"positions_{PLAIN}.npz"),
    *(WHITENING, NORMS, REFINED.format("database"), REFINED.format("queries"), *GRAPH),
    *faiss_index.OUTPUTS,
)


def check_refinement(settings: GlobalSettings, width: int, images: int) -> None:
    """Refuses a chain or an index that does not fit descriptors of this width and number.

    Call it before computing descriptors. Raises RefinementError, or as `faiss_index.check`.
    """
    for step in settings.steps:
        if isinstance(step, (Whitening, LearnedWhitening)):
            if (step.dimensions or 0) > width:
                raise RefinementError(
                    f"{step.NAME} keeps {step.dimensions} dimensions, but the descriptors have "
                    f"{width}: set dimensions to {width} at most"
                )
            width = step.dimensions or width
        every_image = isinstance(step, (Augmentation, Diffusion))  # none is its own neighbour
        wanted = max(getattr(step, name, 0) for name in ("neighbours", "seeds", "k1", "k2"))
        refine.check_neighbours(step.NAME, wanted, images - every_image)
        exact = settings.index is None and every_image
        if exact and images > MOST_EXACT:
            raise RefinementError(
                f"{step.NAME} searches the neighbours of every image, and exact search does so for "
                f"{MOST_EXACT:,} images at most, not {images:,}: set index, such as "
                '"IVF4096,Flat; nprobe=16", or leave the step out'
            )
    if settings.index is not None:
        faiss_index.check(settings.index, width, images)


def write_rankings(
    stage: runs.Stage,
    dataset: RetrievalDataset,
    settings: GlobalSettings,
    queries: np.ndarray,
    protocol: Mapping[str, Any],
    failures: Sequence[Mapping[str, str]] = (),
    learnt: Learnt | None = None,
) -> list[str]:
    """Writes the files of a global stage that holds database.npy, and returns the names of all.

    queries: (Q, D) float32. With an index its ranking is scored, with a refinement the refined one;
    the plain and the exact one are scored beside it. learnt: the whitening of the refinement.
    """
    folder, truth = stage.folder, dataset.ground_truth
    database = map_array(folder / "database.npy")
    depth = shortlists.shortlist_depth(truth, len(database), top=settings.top)
    depth = max(settings.display, depth)
    ranking, further = _ranked(folder, settings, queries, database, truth, depth, learnt)
    runs.write_array(folder / "queries.npy", queries)
    runs.write_json(folder / "names.json", {"queries": truth.queries, "database": dataset.database})
    runs.write_array(folder / "similarities.npy", ranking.similarities)
    ranking.save(folder)
    listed = shortlists.shortlist(ranking.order, truth, top=settings.top)
    shortlists.write_shortlist(
        folder / "shortlist.txt", listed, queries=truth.queries, database=dataset.database
    )
    runs.write_json(folder / "failures.json", failures)
    facts = {
        "dataset": dataset.name,
        "reranked": False,
        "distractors": len(database) - len(truth.database),
    }
    document = scores_document(
        evaluate(ranking.positions, truth),
        protocol=protocol | facts,
        parameters=stage.settings["parameters"],
        inputs=stage.settings["inputs"],
        failed=len(failures),
        ground_truth=truth,
        further=further,
    )
    runs.write_json(folder / "scores.json", document)
    written = [name for name in OPTIONAL_OUTPUTS if (folder / name).exists()]
    return [*GLOBAL_OUTPUTS, *written]


def _ranked(
    folder: Path,
    settings: GlobalSettings,
    queries: np.ndarray,
    database: np.ndarray,
    truth: GroundTruth,
    depth: int,
    learnt: Learnt | None = None,
) -> tuple[ScoredRanking, dict[str, Any]]:
    """Ranks a database (N, D) for queries (Q, D) by the settings: the first `depth`.

    Writes the plain ranking, the index and what the refinement needs to the folder. Returns with
    the ranking the scores and facts that scores.json has beside its own.
    """
    further: dict[str, Any] = {}
    searched = max([depth, *(s.depth for s in settings.steps if isinstance(s, Reordering))])
    ranking = exact_ranking(queries, database, truth, searched)
    if settings.steps:
        plain = ranking.cut(depth)
        runs.write_array(folder / f"similarities_{PLAIN}.npy", plain.similarities)
        plain.save(folder, PLAIN)
        further["plain"] = evaluate(ranking.positions, truth)
        queries, database, facts = _refined_descriptors(folder, settings, queries, database, learnt)
        further |= facts
        if any(not isinstance(step, Reordering) for step in settings.steps):
            ranking = exact_ranking(queries, database, truth, searched)
    if settings.index is not None:
        further["exact"] = evaluate(ranking.positions, truth)
        ranking, further["recall"] = _from_index(folder, settings.index, queries, database, ranking)
    graph = functools.partial(_graph, folder, settings, database)
    return reordered(settings.steps, queries, database, ranking, graph).cut(depth), further


def try_refinement(
    folder: Path, dataset: RetrievalDataset, chain: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Scores a finished global stage's descriptors under another refinement; writes nothing.

    For the choice of a chain on a validation set: no photograph is described again. chain: steps as
    in `refine`; a whitening must be the stage's own, which is stored with it. Returns the result of
    `evaluate`. Raises SettingsError for a chain that makes no sense, RefinementError for another
    whitening and a step that does not fit the number of images.
    """
    settings, folder = GlobalSettings(refine=tuple(chain)), Path(folder)
    learnt = _stored_whitening(folder, settings)
    queries = np.asarray(map_array(folder / "queries.npy"))
    database = map_array(folder / "database.npy")
    check_refinement(settings, database.shape[1], len(database))
    truth = dataset.ground_truth
    with tempfile.TemporaryDirectory() as scratch:
        for name in (WHITENING, NORMS) if learnt is not None else ():
            if (folder / name).exists():
                shutil.copy(folder / name, scratch)
        ranking, _ = _ranked(Path(scratch), settings, queries, database, truth, 1, learnt)
    return evaluate(ranking.positions, truth)


def _stored_whitening(folder: Path, settings: GlobalSettings) -> Learnt | None:
    """The whitening that a chain begins with, as a finished stage has it; None for none."""
    if (step := learnt_step(settings)) is None:
        return None
    own = runs.read_stage(folder, "04_global_evaluation")["parameters"].get("refine", ())
    if step not in read_chain(own):
        raise RefinementError(
            f"{step.NAME} is learnt from other images, and the stage alone does that: give the "
            "stage this step in refine, then try the others"
        )
    facts = runs.read_json(folder / "scores.json")["whitening"]
    whitening = WhiteningMap.load(folder / WHITENING)
    return Learnt(whitening, facts["learnt from"], facts["images"])


def exact_ranking(
    queries: np.ndarray, database: Database, truth: GroundTruth, depth: int
) -> ScoredRanking:
    """Ranks a database (N, D) for queries (Q, D): the first `depth`, and every labelled image."""
    similarities, ranks = exact_search.search(queries, database, k=depth)
    positions = exact_ranks.labelled_positions(queries, database, labelled(truth))
    return ScoredRanking(ranks, positions, similarities)


def _from_index(
    folder: Path, text: str, queries: np.ndarray, database: Database, exact: ScoredRanking
) -> tuple[ScoredRanking, dict[str, Any]]:
    """The ranking that begins with what an index finds, and the index's recall."""
    index = faiss_index.build(folder, database, text)
    similarities, ranks, unanswered = faiss_index.find(index, queries, k=len(exact.order))
    positions = faiss_index.positions_behind(
        exact.positions, similarities, ranks, queries, database
    )
    recall = faiss_index.recall(ranks, exact.order) | {"searched exactly": unanswered}
    return ScoredRanking(ranks, positions, similarities), recall


def _refined_descriptors(
    folder: Path,
    settings: GlobalSettings,
    queries: np.ndarray,
    database: np.ndarray,
    learnt: Learnt | None,
) -> tuple[np.ndarray, Database, dict[str, Any]]:
    """Applies whitening, augmentation and expansion; returns queries, database and facts.

    What they make of the database is stored in the folder; files that an interrupted stage left are
    whole.
    """
    facts: dict[str, Any] = {}
    steps = [step for step in settings.steps if not isinstance(step, Reordering)]
    for step in steps:
        if isinstance(step, Expansion):
            queries = refine.expand_queries(
                queries, database, neighbours=step.neighbours, alpha=step.alpha
            )
        elif isinstance(step, Augmentation):
            target = folder / REFINED.format("database")
            if not target.exists():
                find = _neighbour_search(folder, settings, database)
                blocks = refine.augmented_blocks(
                    database, find, neighbours=step.neighbours, alpha=step.alpha
                )
                write_rows(target, database.shape, blocks)
            database = map_array(target)
        else:
            facts["whitening"] = learnt.facts
            queries = learnt.whitening.apply(queries)
            database = _whitened(folder, database, learnt.whitening)
    if steps:
        runs.write_array(folder / REFINED.format("queries"), queries)
    return queries, database, facts


def _whitened(folder: Path, database: np.ndarray, whitening: WhiteningMap) -> WhitenedRows:
    """Whitens a stage's database; the folder's norms are used if they are of this whitening."""
    norms, whole = folder / NORMS, folder / WHITENING  # the latter is written last
    kept = whole.exists() and WhiteningMap.load(whole).fingerprint == whitening.fingerprint
    if not (kept and norms.exists()):
        runs.write_array(norms, refine.whitened_norms(database, whitening))
        whitening.save(whole)
    return WhitenedRows(database, whitening, map_array(norms))


def write_rows(path: Path, shape: tuple[int, int], blocks: Iterable[np.ndarray]) -> None:
    """Writes blocks of float32 rows as one `.npy` of this shape, atomically."""
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    with runs.atomic(path) as temporary, open(temporary, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        for block in blocks:
            handle.write(np.ascontiguousarray(block, "<f4").data)


def _neighbour_search(
    folder: Path, settings: GlobalSettings, database: Database
) -> NeighbourSearch:
    """Exact search up to MOST_EXACT images, the setting's index beyond."""
    if len(database) <= MOST_EXACT:
        return refine.exact_neighbours(database)
    temporary = folder / "neighbours"
    index = faiss_index.build(temporary, database, settings.index)
    shutil.rmtree(temporary)  # it stays mapped

    def find(queries: np.ndarray, k: int) -> Hits:
        """Searches the index for queries (Q, D), and ranks what it proposes exactly."""
        similarities, images, _ = faiss_index.find(index, queries, k=k)
        return similarities.T, images.T

    return find


def reordered(
    steps: Sequence[Step],
    queries: np.ndarray,
    database: Database,
    ranking: ScoredRanking,
    graph: Callable[[Diffusion], Hits],
) -> ScoredRanking:
    """Applies those steps of a chain that put the first images in another order.

    queries, database: (Q, D) and (N, D) float32 of length 1.  ranking: theirs.  graph: returns the
    database's graph of nearest neighbours for a diffusion, see `refine.neighbour_graph`.
    """
    for step in steps:
        if not isinstance(step, Reordering):
            continue
        order = ranking.order[: step.depth]
        if isinstance(step, SuperGlobal):
            scores = reorder.superglobal(
                queries, database, order, neighbours=step.neighbours, beta=step.beta
            )
        elif isinstance(step, KReciprocal):
            scores = reorder.k_reciprocal(
                queries, database, order, k1=step.k1, k2=step.k2, weight=step.weight
            )
        else:
            scores = reorder.diffusion(
                ranking.similarities[: step.depth],
                order,
                graph(step),
                seeds=step.seeds,
                gamma=step.gamma,
                alpha=step.alpha,
            )
        ranking = ranking.reordered(scores)
    return ranking


def _graph(folder: Path, settings: GlobalSettings, database: Database, step: Diffusion) -> Hits:
    """The stored graph of the database; made where an interrupted stage has none."""
    files = [folder / name for name in GRAPH]
    if not all(file.exists() for file in files):
        find = _neighbour_search(folder, settings, database)
        graph = refine.neighbour_graph(database, find, neighbours=step.neighbours)
        for file, array in zip(files, graph, strict=True):
            runs.write_array(file, array)
    return map_array(files[0]), map_array(files[1])
