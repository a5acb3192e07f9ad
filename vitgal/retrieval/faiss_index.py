"""Approximate search with a faiss index of global descriptors, stored and memory-mapped.

The index only proposes images. Exact similarities rank them, so coarse codes may miss images but
put none in the wrong order. All other images follow in exact order, so every labelled image has a
rank.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from threadpoolctl import threadpool_limits

from vitgal import runs
from vitgal.retrieval.exact_search import check_descriptors, rank_images, search, similarities
from vitgal.retrieval.ranking import Positions

INDEX = "index.faiss"
RECORD = "index.json"
OUTPUTS = (INDEX, RECORD)
RECORD_FORMAT = 1
OVERSAMPLE = 4  # images that the index proposes for each one wanted
MOST_CELLS = 1 << 24
CELLS_PER_PROBE = 16  # cells of an inverted file for each one searched, unless nprobe is given
TRAINING = 1 << 16  # descriptors that an index without cells learns its codes from
PER_CELL = 64  # descriptors that each cell of an inverted file is learnt from
ADDED = 1 << 16  # descriptors given to faiss at once: 100 MB at 384 dimensions
DEPTHS = (1, 10, 100)  # at which recall is reported
EXAMPLES = "'IVF1024,Flat', 'IVF1024,PQ64; nprobe=32' or 'HNSW32'"


@dataclass(frozen=True, eq=False)
class Index:
    """A stored index, mapped into memory, and the descriptors (N, D) that it was made from."""

    faiss: Any
    database: np.ndarray


def check(text: str, width: int, images: int | None = None) -> None:
    """Raises ValueError where `text` describes no index of descriptors of this width and number.

    Call it before computing descriptors: faiss detects some faults late or ends the process.

    text: a faiss factory string and, after an optional semicolon, search parameters:
    "IVF1024,PQ64; nprobe=32". Without nprobe one cell of 16 of an inverted file is searched.
    """
    factory, options = _split(text)
    most = MOST_CELLS if images is None else min(images, MOST_CELLS)
    if any(not 1 <= int(cells) <= most for cells in re.findall(r"IVF(\d+)", factory)):
        _refuse(text, f"an inverted file of {most} images has 1 to {most} cells")
    if any(int(links) < 2 for links in re.findall(r"(?:HNSW|NSG)(\d+)", factory)):
        _refuse(text, "a graph links each image to 2 others at least")
    if "IDMap" in factory:
        _refuse(text, "images keep their own numbers here")
    for probed in re.findall(r"nprobe=([^,]*)", options):
        if not (probed.isdecimal() and int(probed) >= 1):
            _refuse(text, f"nprobe is {probed}, not a number of cells")
    codes = getattr(_inner_index(new_index(text, width)), "pq", None)
    if images is not None and codes is not None and codes.ksub > images:
        _refuse(text, f"its {codes.ksub} codes cannot be learnt from {images} images")


def _refuse(text: str, reason: str) -> NoReturn:
    raise ValueError(f"no index {text!r}: {reason}; for example {EXAMPLES}")


def build(folder: Path, database: np.ndarray, text: str, *, seed: int = 0) -> Index:
    """Builds the index of a database, stores it and maps it.

    The same arguments give the same bytes. Graphs depend on the order in which images are added and
    are therefore built on one thread.

    Args:
        folder: gets index.faiss, and index.json with everything the index depends on.
        database: (N, D) floats, memory-mapped or not; read in blocks. Rows of zeros (unreadable
            images) are indexed too, so that indices stay equal.
        text: as for `check`.
        seed: of the sample that the index learns from, and of its k-means.
    Raises:
        ValueError: text as in `check`; an empty database, one with a value that is not finite (its
            row is named), or of fewer images than the index has cells or codes.
        OSError: no space left; nothing is kept of the index then.
    """
    folder, record = Path(folder), _record(database, text, seed)
    check(text, database.shape[1], len(database))
    import faiss

    index = new_index(text, database.shape[1])
    set_seeds(index, seed)
    with threadpool_limits(1 if re.search("HNSW|NSG", text) else None, "openmp"):
        with _explained_errors(text, len(database)):
            index.train(_training_sample(database, index, seed))
            for first in range(0, len(database), ADDED):
                index.add(np.ascontiguousarray(database[first : first + ADDED], np.float32))
        with runs.atomic(folder / INDEX) as temporary, open(temporary, "wb") as handle:
            # Written through Python's file, so that a full disk raises OSError.
            faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write))
    record["bytes"] = (folder / INDEX).stat().st_size
    runs.write_json(folder / RECORD, record)
    # A file of somebody else could state any type and size: only one just written is mapped. Newer
    # faiss maps all parts of an index, older ones the cells of an inverted file.
    mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    del index  # its memory
    index = faiss.read_index(str(folder / INDEX), mapped)
    _set_search_parameters(index, text)
    return Index(index, database)


def find(index: Index, queries: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Finds about the `k` most similar images of every query (Q, D); raises as `search`.

    Returns similarities (K, Q) float32 and ranks (K, Q) int32 as `search`, of proposed images only,
    and the number of queries with fewer than K proposals, which are searched exactly.
    """
    database = index.database
    check_descriptors(queries, database)
    if k < 1:
        raise ValueError(f"k is {k}; at least one image must be wanted")
    k = min(k, len(database))
    values = np.empty((k, len(queries)), np.float32)
    ranks = np.empty((k, len(queries)), np.int32)
    if not ranks.size:
        return values, ranks, 0
    wanted = min(OVERSAMPLE * k, len(database))
    graph = getattr(_inner_index(index.faiss), "hnsw", None)
    if graph is not None:  # a graph proposes hardly more images than it visits
        graph.efSearch = max(graph.efSearch, wanted)
    _, proposed = index.faiss.search(np.ascontiguousarray(queries, np.float32), wanted)
    unanswered = []
    for q, images in enumerate(proposed):
        images = np.unique(images[(images >= 0) & (images < len(database))])
        if images.size < k:
            unanswered.append(q)
        else:
            values[:, q], ranks[:, q] = rank_images(queries[q], database, images, k)
    if unanswered:
        values[:, unanswered], ranks[:, unanswered] = search(queries[unanswered], database, k=k)
    return values, ranks, len(unanswered)


def recall(
    ranks: np.ndarray, exact: np.ndarray, depths: Sequence[int] = DEPTHS
) -> dict[str, float | None]:
    """Computes the fraction of the exact first n images (K, Q) that are among the first n found.

    Returns the mean over queries by depth n (as text), for depths up to K; None without queries.
    """
    fractions: dict[str, float | None] = {}
    for depth in depths:
        if depth > min(len(ranks), len(exact)):
            break
        columns = zip(ranks[:depth].T, exact[:depth].T, strict=True)
        hits = [np.isin(expected, column).mean() for column, expected in columns]
        fractions[str(depth)] = float(np.mean(hits)) if hits else None
    return fractions


def positions_behind(
    exact: Positions,
    values: np.ndarray,
    ranks: np.ndarray,
    queries: np.ndarray,
    database: np.ndarray,
) -> Positions:
    """Computes the labelled images' ranks in a ranking that begins with a list of `find`.

    exact: positions in the exact ranking, which continues behind the list.  values, ranks: (K, Q),
    the list.  queries, database: (Q, D) and (N, D), as given to `find`.
    """
    positions = []
    for q, (index, exact_ranks) in enumerate(zip(exact.indices, exact.ranks, strict=True)):
        column, similarity = ranks[:, q].astype(np.int64), values[:, q]
        order = np.argsort(column)
        listed = np.isin(index, column)
        new_ranks = exact_ranks.copy()
        new_ranks[listed] = order[np.searchsorted(column, index[listed], sorter=order)]
        missed = index[~listed]
        if missed.size:
            own = similarities(queries[q], database, missed)[:, None]
            ahead = (similarity > own) | ((similarity == own) & (column < missed[:, None]))
            new_ranks[~listed] += len(column) - ahead.sum(axis=1)
        positions.append(new_ranks)
    return Positions(exact.indices, positions, exact.database_size)


def _split(text: str) -> tuple[str, str]:
    factory, _, options = str(text).partition(";")
    return factory.strip(), ",".join(part.strip() for part in options.split(",") if part.strip())


@contextlib.contextmanager
def _explained_errors(text: str, images: int | None = None) -> Iterator[None]:
    """Turns a RuntimeError of faiss into a ValueError about the requested index."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("failed: ")[2]
        reason = re.sub(r"^Error in .* at \S+: ", "", reason)
        size = "" if images is None else f" of {images} images"
        raise ValueError(
            f"no index {text!r}{size}: faiss reports {reason!r}; for example {EXAMPLES}"
        ) from error


def new_index(text: str, width: int) -> Any:
    """Returns a faiss index without descriptors, its search parameters set. text: as `check`."""
    import faiss

    factory, _ = _split(text)
    with _explained_errors(text):
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    _set_search_parameters(index, text)
    return index


def _set_search_parameters(index: Any, text: str) -> None:
    import faiss

    _, options = _split(text)
    cells = faiss.try_extract_index_ivf(index)
    if cells is not None:
        cells.nprobe = max(1, cells.nlist // CELLS_PER_PROBE)
    if options:
        with _explained_errors(text):
            faiss.ParameterSpace().set_index_parameters(index, options)


def _inner_index(index: Any) -> Any:
    """Returns the part that holds the codes or the graph, without transforms of the descriptors."""
    import faiss

    cells = faiss.try_extract_index_ivf(index)
    inner = index if cells is None else faiss.downcast_index(cells)  # to the class with the codes
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return inner


def set_seeds(index: Any, seed: int) -> None:
    """Seeds the k-means of a faiss index."""
    inner = _inner_index(index)
    for owner in (inner, getattr(inner, "pq", None)):
        if hasattr(owner, "cp"):
            owner.cp.seed = seed + 1  # faiss takes no seed below 0
    if hasattr(inner, "do_polysemous_training"):
        # Serves a kind of search that is not used here, and takes ten times as long as learning the
        # codes.
        inner.do_polysemous_training = False


def _training_sample(database: np.ndarray, index: Any, seed: int) -> np.ndarray:
    """The descriptors that the index learns from, drawn with the seed, in database order."""
    import faiss

    cells = faiss.try_extract_index_ivf(index)
    number = max(TRAINING, PER_CELL * cells.nlist if cells is not None else 0)
    if number >= len(database):
        return np.ascontiguousarray(database, np.float32)
    drawn = np.random.default_rng(seed).choice(len(database), number, replace=False)
    return np.ascontiguousarray(database[np.sort(drawn)], np.float32)


def _record(database: np.ndarray, text: str, seed: int) -> dict[str, Any]:
    """Everything an index depends on; ValueError where the database cannot be indexed."""
    if getattr(database, "ndim", None) != 2 or database.dtype.kind != "f":
        raise ValueError("the database must be a 2-D array of floats, one descriptor a row")
    if not len(database):
        raise ValueError("an empty database has no index: leave index out")
    digest = hashlib.sha256()
    for first in range(0, len(database), ADDED):
        block = np.ascontiguousarray(database[first : first + ADDED])
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if bad.size:
            raise ValueError(f"the descriptor of database image {first + bad[0]} is not finite")
        digest.update(block.data)
    factory, options = _split(text)
    building = [option for option in options.split(",") if option.startswith("efConstruction")]
    return {
        "format": RECORD_FORMAT,
        "factory": ", ".join([factory, *building]),
        "seed": seed,
        "descriptors": digest.hexdigest(),
        "shape": list(database.shape),
        "type": database.dtype.str,
    }
