"""Approximate search: a faiss index of global descriptors, built once, stored, memory-mapped.

The index only proposes images. What it proposes is ranked by the exact similarities of
`vitgal.search`, read from the memory-mapped descriptors, so that coarse codes cost images that are
never proposed but put none in the wrong order. Behind the list the ranking goes on with all other
images in exact order: so every labelled image has a rank and the scores are those of the list.
"""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.retrieval import exact_search, products
from vitgal.retrieval.ranking import Positions

INDEX = "index.faiss"
ABOUT = "index.json"
OUTPUTS = (INDEX, ABOUT)
ABOUT_FORMAT = 1
OVERSAMPLE = 4  # images that the index proposes for each one wanted
MOST_CELLS = 1 << 24
CELLS_SEARCHED = 16  # of so many cells one is looked into, unless the index's text says otherwise
TRAINING = 1 << 16  # descriptors that an index without cells learns its codes from
PER_CELL = 64  # descriptors that each cell of an inverted file is learnt from
ADDED = 1 << 16  # descriptors handed to faiss at once: 100 MB at 384 dimensions
DEPTHS = (1, 10, 100)  # at which recall is reported
EXAMPLES = "'IVF1024,Flat', 'IVF1024,PQ64; nprobe=32' or 'HNSW32'"


@dataclass(frozen=True, eq=False)
class Index:
    """A stored index and the descriptors (N, D) that it was made from."""

    faiss: Any
    database: np.ndarray


def check(text: str, width: int, images: int | None = None) -> None:
    """Raises ValueError where `text` is no index of so many descriptors of this width.

    text: a faiss factory string, and after a semicolon, if wanted, how to search it: "IVF1024,PQ64;
    nprobe=32". Without that one cell of 16 of an inverted file is looked into. images: None leaves
    out what depends on their number.

    To be called before descriptors are made: faiss itself finds some of this out after that, or
    ends the process.
    """
    factory, options = _split(text)
    most = MOST_CELLS if images is None else min(images, MOST_CELLS)
    cells = [int(number) for number in re.findall(r"IVF(\d+)", factory)]
    if any(not 1 <= number <= most for number in cells):
        _refuse(text, f"an inverted file of {most} images has 1 to {most} cells")
    if any(int(number) < 2 for number in re.findall(r"(?:HNSW|NSG)(\d+)", factory)):
        _refuse(text, "a graph links each image to 2 others at least")
    if "IDMap" in factory:
        _refuse(text, "images keep their own numbers here")
    for probed in re.findall(r"nprobe=([^,]*)", options):
        if not (probed.isdecimal() and int(probed) >= 1):
            _refuse(text, f"nprobe is {probed}, not a number of cells")
    codes = getattr(_inner(_empty(text, width)), "pq", None)
    if images is not None and codes is not None and codes.ksub > images:
        _refuse(text, f"its {codes.ksub} codes cannot be learnt from {images} images")


def _refuse(text: str, reason: str) -> None:
    raise ValueError(f"no index {text!r}: {reason}; for example {EXAMPLES}")


def build(
    folder: Path, database: np.ndarray, text: str, *, seed: int = 0, rows: int = ADDED
) -> Path:
    """Makes the index of a database, unless the folder holds that very index.

    Args:
        folder: gets index.faiss and, written last, index.json: what the index was made of and from.
        database: (N, D) floats, memory-mapped or not; read `rows` at a time. A row of zeros, an
            image that could not be read, is indexed as well, so that places stay indices.
        text: see `check`.  seed: of the sample that the index learns from, and of its k-means.
    Returns:
        The folder. The same arguments give the same bytes: graphs, whose shape depends on the order
        in which images come, are built on one thread.
    Raises:
        ValueError: text as in `check`; an empty database, one with a value that is not finite (its
            row is named), or of fewer images than the index has cells or codes.
        OSError: no space left; nothing is kept of the index then.
    """
    folder, about = Path(folder), _about(database, text, seed)
    check(text, database.shape[1], len(database))
    if (folder / INDEX).exists():
        with contextlib.suppress(runs.StageError):  # missing, or not whole
            size = (folder / INDEX).stat().st_size
            if runs.read_json(folder / ABOUT) == about | {"bytes": size}:
                return folder
    (folder / ABOUT).unlink(missing_ok=True)
    import faiss

    index = _empty(text, database.shape[1])
    _set_seeds(index, seed)
    with _Threads(1 if re.search("HNSW|NSG", text) else None):
        with _told(text, len(database)):
            index.train(_sample(database, index, seed))
            for first in range(0, len(database), rows):
                index.add(np.ascontiguousarray(database[first : first + rows], np.float32))
        with runs.atomic(folder / INDEX) as temporary, open(temporary, "wb") as handle:
            # Through Python's file a full disk comes as the OSError that it is.
            faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write))
    about["bytes"] = (folder / INDEX).stat().st_size
    runs.write_json(folder / ABOUT, about)
    return folder


def read(folder: Path, database: np.ndarray, text: str, *, seed: int = 0) -> Index:
    """Opens what `build` stored, memory-mapped.

    Raises StageError where there is no whole index, or one of other descriptors or settings.
    """
    import faiss

    folder, expected = Path(folder), _about(database, text, seed)
    found = runs.read_json(folder / ABOUT)
    size = (folder / INDEX).stat().st_size if (folder / INDEX).exists() else None
    other = [key for key in expected if expected[key] != found.get(key)]
    if other:
        raise runs.StageError(
            f"{folder / INDEX} was made of other {' and '.join(other)} than are asked for: build "
            "it again"
        )
    if size != found.get("bytes"):
        raise runs.StageError(f"{folder / INDEX} is missing or not whole: build it again")
    # Where this faiss has it, all parts are mapped; the other maps the cells of an inverted file.
    mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    index = faiss.read_index(str(folder / INDEX), mapped)
    _set_search(index, text)
    return Index(index, database)


def find(index: Index, queries: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Finds about the `k` most similar images of every query.

    Args:
        queries: (Q, D) floats.  k: matches wanted; at most N are returned.
    Returns:
        similarities (K, Q) float32 and ranks (K, Q) int32, best first, one column a query, as
        `search.search` gives them, but without the images that the index did not propose; and for
        how many queries it proposed fewer than K, so that they were searched exactly.
    Raises:
        ValueError: see `search.search`.
    """
    queries, database = products.checked(queries, index.database)
    if k < 1:
        raise ValueError(f"k is {k}; at least one match must be wanted")
    k = min(k, len(database))
    similarities = np.empty((k, len(queries)), np.float32)
    ranks = np.empty((k, len(queries)), np.int32)
    if not ranks.size:
        return similarities, ranks, 0
    wanted = min(OVERSAMPLE * k, len(database))
    graph = getattr(_inner(index.faiss), "hnsw", None)
    if graph is not None:  # a graph proposes hardly more images than it keeps on its way
        graph.efSearch = max(graph.efSearch, wanted)
    _, proposed = index.faiss.search(np.ascontiguousarray(queries, np.float32), wanted)
    lacking = []
    for q, images in enumerate(proposed):
        images = np.unique(images[images >= 0])
        if images.size < k:
            lacking.append(q)
        else:
            similarities[:, q], ranks[:, q] = exact_search.ranked(queries[q], database, images, k)
    if lacking:
        found = exact_search.search(queries[lacking], database, k=k)
        similarities[:, lacking], ranks[:, lacking] = found
    return similarities, ranks, len(lacking)


def recall(ranks: np.ndarray, exact: np.ndarray, depths: Sequence[int] = DEPTHS) -> dict[str, Any]:
    """The share of the exact first n images that are among the first n found, means over queries.

    ranks, exact: (K, Q) integers. Returns depth (as text) -> share in [0, 1], for depths up to K;
    None without queries.
    """
    shares: dict[str, Any] = {}
    for depth in depths:
        if depth > min(len(ranks), len(exact)):
            break
        columns = zip(ranks[:depth].T, exact[:depth].T, strict=True)
        found = [np.isin(right, ours).mean() for ours, right in columns]
        shares[str(depth)] = float(np.mean(found)) if found else None
    return shares


def positions_behind(
    exact: Positions,
    similarities: np.ndarray,
    ranks: np.ndarray,
    queries: np.ndarray,
    database: np.ndarray,
) -> Positions:
    """Where the labelled images stand if the ranking begins with a list and is exact behind it.

    Args:
        exact: of the exact ranking.
        similarities, ranks: (K, Q), the list that `find` gave for these queries and database.
    """
    places = []
    for q, (index, place) in enumerate(zip(exact.indices, exact.ranks, strict=True)):
        column, values = ranks[:, q].astype(np.int64), similarities[:, q]
        order = np.argsort(column)
        at = np.minimum(np.searchsorted(column, index, sorter=order), max(len(column) - 1, 0))
        listed = column[order[at]] == index if len(column) else np.zeros(index.size, bool)
        place = place.copy()
        place[listed] = order[at[listed]]
        missed = index[~listed]
        if missed.size:
            theirs = exact_search.similarities(queries[q], database, missed)
            ahead = (values > theirs[:, None]) | (
                (values == theirs[:, None]) & (column < missed[:, None])
            )
            place[~listed] += len(column) - ahead.sum(axis=1)
        places.append(place)
    return Positions(exact.indices, places, exact.database_size)


def _split(text: str) -> tuple[str, str]:
    factory, _, options = str(text).partition(";")
    return factory.strip(), ",".join(part.strip() for part in options.split(",") if part.strip())


class _told:
    """Turns what faiss raises into a sentence about the index that was asked for."""

    def __init__(self, text: str, images: int | None = None) -> None:
        self.text, self.images = text, images

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            reason = str(error).splitlines()[0].rpartition("failed: ")[2]
            reason = re.sub(r"^Error in .* at \S+: ", "", reason)
            of = "" if self.images is None else f" of {self.images} images"
            raise ValueError(
                f"no index {self.text!r}{of}: faiss says {reason!r}; for example {EXAMPLES}"
            ) from error


class _Threads:
    """Sets faiss's threads inside a `with`; None leaves them."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __enter__(self) -> None:
        import faiss

        self.before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(self.number or self.before)

    def __exit__(self, *_: object) -> None:
        import faiss

        faiss.omp_set_num_threads(self.before)


def _empty(text: str, width: int) -> Any:
    """An index without descriptors, its search options set."""
    import faiss

    factory, _ = _split(text)
    with _told(text):
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    _set_search(index, text)
    return index


def _set_search(index: Any, text: str) -> None:
    import faiss

    _, options = _split(text)
    cells = faiss.try_extract_index_ivf(index)
    if cells is not None:
        cells.nprobe = max(1, cells.nlist // CELLS_SEARCHED)
    if options:
        with _told(text):
            faiss.ParameterSpace().set_index_parameters(index, options)


def _inner(index: Any) -> Any:
    """The part that holds the codes or the graph, behind what transforms descriptors first."""
    import faiss

    cells = faiss.try_extract_index_ivf(index)
    inner = index if cells is None else faiss.downcast_index(cells)  # to the class with the codes
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return inner


def _set_seeds(index: Any, seed: int) -> None:
    inner = _inner(index)
    for owner in (inner, getattr(inner, "pq", None)):
        if hasattr(owner, "cp"):
            owner.cp.seed = seed + 1  # faiss takes 0 as it takes any other, but not below
    if hasattr(inner, "do_polysemous_training"):
        # A reordering of the codes for a kind of search that is not used here; it takes ten times
        # as long as learning them.
        inner.do_polysemous_training = False


def _sample(database: np.ndarray, index: Any, seed: int) -> np.ndarray:
    """The descriptors that the index learns from, drawn with the seed, in their order."""
    import faiss

    cells = faiss.try_extract_index_ivf(index)
    number = max(TRAINING, PER_CELL * cells.nlist if cells is not None else 0)
    if number >= len(database):
        return np.ascontiguousarray(database, np.float32)
    drawn = np.random.default_rng(seed).choice(len(database), number, replace=False)
    return np.ascontiguousarray(database[np.sort(drawn)], np.float32)


def _about(database: np.ndarray, text: str, seed: int) -> dict[str, Any]:
    """What an index depends on. ValueError where the database cannot be indexed."""
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
        "format": ABOUT_FORMAT,
        "factory": ", ".join([factory, *building]),
        "seed": seed,
        "descriptors": digest.hexdigest(),
        "shape": list(database.shape),
        "type": database.dtype.str,
    }
