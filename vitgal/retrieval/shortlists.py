"""Short lists: the candidates that reranking verifies, and their files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth, RetrievalDataset, ignored
from vitgal.features.files import FileError, map_array
from vitgal.settings import GlobalSettings

PUBLISHED = "published"  # the short list of the published code: the plain first ranks
NO_BOX = (-1, -1, -1, -1)  # marks a database image in the published list; it is never cropped

PublishedQuery = tuple[str, tuple[int, int, int, int], list[str]]  # path, box, candidates' paths


def shortlist_depth(
    ground_truth: GroundTruth, database_size: int, *, top: int = GlobalSettings.top
) -> int:
    """Returns how many ranks, N at most, a short list needs: `top` plus the most ignored images."""
    sizes = [images.size for name in PROTOCOLS for images in ignored(ground_truth, name)]
    return min(database_size, top + max(sizes, default=0))


def candidates(
    ranks: np.ndarray, ground_truth: GroundTruth, protocol: str, *, top: int = GlobalSettings.top
) -> list[np.ndarray]:
    """Lists the images that one protocol reranks.

    Args:
        ranks: (K, Q) integers, best first, K at least `shortlist_depth` (or the whole database).
        protocol: "easy", "medium" or "hard": the first `top` that the protocol does not ignore, as
            DELG does. "published": the first `top`, ignored or not.
    Returns:
        Per query (M,) int64 database indices, best first, M at most `top`.
    Raises:
        ValueError: the ranking is too short, or has another number of queries.
    """
    if protocol == PUBLISHED:
        left_out = [np.empty(0, np.int64)] * len(ground_truth.queries)
    else:
        left_out = ignored(ground_truth, protocol)
    if ranks.ndim != 2 or ranks.shape[1] != len(left_out):
        raise ValueError(
            f"a ranking of {len(left_out)} queries has that many columns, not {ranks.shape}"
        )
    # K ranks can be the whole ranking only if K is at least the labelled database's size.
    whole = len(ranks) >= len(ground_truth.database)
    lists = []
    for q, images in enumerate(left_out):
        column = ranks[: top + images.size, q].astype(np.int64)
        kept = column[~np.isin(column, images)][:top]
        if kept.size < top and not whole:
            raise ValueError(
                f"{len(ranks)} ranks leave {kept.size} of {top} candidates to query {q} "
                f"({protocol}); search with k=shortlist_depth(...)"
            )
        lists.append(kept)
    return lists


def shortlist(
    ranks: np.ndarray, ground_truth: GroundTruth, *, top: int = GlobalSettings.top
) -> list[np.ndarray]:
    """Lists the `candidates` of all protocols together, per query (M,) int64 in ranking order."""
    lists = [
        candidates(ranks, ground_truth, protocol, top=top) for protocol in (*PROTOCOLS, PUBLISHED)
    ]
    reach = ranks[: shortlist_depth(ground_truth, len(ranks), top=top)].astype(np.int64)
    return [
        column[np.isin(column, np.concatenate(parts))]
        for column, parts in zip(reach.T, zip(*lists, strict=True), strict=True)
    ]


def write_shortlist(
    path: str | os.PathLike,
    lists: Sequence[np.ndarray],
    *,
    queries: Sequence[str],
    database: Sequence[str],
) -> Path:
    """Writes `shortlist.txt`: query name, tab, database name, a line each, best first.

    lists: per query (M,) database indices. Names may contain spaces; an empty one or one with a tab
    or a line break raises ValueError.
    """
    lines = [
        f"{_checked_name(query)}\t{_checked_name(database[index])}\n"
        for query, indices in zip(queries, lists, strict=True)
        for index in indices
    ]
    return runs.write_text(Path(path), "".join(lines))


def read_shortlist(path: str | os.PathLike) -> dict[str, list[str]]:
    """Reads `shortlist.txt`: query name -> database names, both in the order of the file.

    ValueError names a line that is not two names separated by one tab, or a file not in UTF-8.
    """
    lists: dict[str, list[str]] = {}
    for number, line in _numbered_lines(path):
        names = line.split("\t")
        if len(names) != 2 or not all(names):
            raise ValueError(f"{path}, line {number}: not a query and an image around one tab")
        lists.setdefault(names[0], []).append(names[1])
    return lists


def write_rerank_paths(
    path: str | os.PathLike, dataset: RetrievalDataset, *, lists: Sequence[np.ndarray]
) -> Path:
    """Writes the published `rerank_path.txt`, from which the published code extracts features.

    A line is an image path and four integers, separated by spaces: each query with its box
    truncated to whole pixels, then its candidates with -1 -1 -1 -1. The published reader accepts no
    paths with spaces. lists: per query (M,) database indices (`candidates(..., "published")`).
    """
    lines = []
    boxes = dataset.ground_truth.boxes.astype(np.int64)
    for query, box, indices in zip(dataset.query_paths, boxes, lists, strict=True):
        lines.append((query, box))
        lines += [(dataset.database_paths[index], NO_BOX) for index in indices]
    text = "".join(f"{_checked_name(str(name))} {' '.join(map(str, box))}\n" for name, box in lines)
    return runs.write_text(Path(path), text)


def read_rerank_paths(path: str | os.PathLike) -> list[PublishedQuery]:
    """Reads a published `rerank_path.txt`: per query its path, its box and its candidates' paths.

    ValueError names a line that is something else, or a file that is not UTF-8.
    """
    queries: list[PublishedQuery] = []
    for number, line in _numbered_lines(path):
        name, *box = line.rsplit(" ", 4)
        try:
            box = tuple(int(value) for value in box)
        except ValueError:
            box = ()
        if len(box) != 4 or not name or (box == NO_BOX and not queries):
            raise ValueError(
                f"{path}, line {number}: not a path and a box (x0 y0 x1 y1; -1 -1 -1 -1 for a "
                "candidate, which follows its query)"
            )
        if box == NO_BOX:
            queries[-1][2].append(name)
        else:
            queries.append((name, box, []))
    return queries


def write_global_rank(path: str | os.PathLike, ranks: np.ndarray) -> Path:
    """Writes the published `global_rank.npy`, a whole ranking: (N, Q) int64, 8 bytes x N x Q."""
    return runs.write_array(Path(path), np.ascontiguousarray(ranks, dtype=np.int64))


def read_global_rank(path: str | os.PathLike) -> np.ndarray:
    """Opens a published `global_rank.npy`, memory-mapped: (N, Q) integers, best first.

    Its indices are those of the program that wrote it: with distractors, the order of the published
    code depends on the file system. Raises ValueError for a file that holds something else.
    """
    ranks = map_array(path)
    if ranks.ndim != 2 or ranks.dtype.kind not in "iu":
        raise FileError(f"{path} holds no ranking, a 2-D array of integers with a column a query")
    return ranks


def _numbered_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(runs.read_lines(path), start=1) if line]


def _checked_name(name: str) -> str:
    # Zeros and byte order marks tell readers which encoding a file has.
    if not name or any(character in name for character in "\t\n\r\0\ufeff"):
        raise ValueError(
            f"the name {runs.short(name)} is empty or holds a tab, line break, zero or byte order "
            "mark: rename the image"
        )
    return name
