"""Short lists: what reranking looks at, and their files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS, GroundTruth, RetrievalDataset, ignored

PUBLISHED = "published"  # the short list of the published code: the plain top
NO_BOX = (-1, -1, -1, -1)  # how the published list marks a database image, which is never cropped


def shortlist_depth(ground_truth: GroundTruth, number: int, *, top: int = 100) -> int:
    """How many ranks a short list of `top` needs: `top` and as many as any query ignores.

    number: N, the size of the database, which is never exceeded.
    """
    most = max((a.size for p in PROTOCOLS for a in ignored(ground_truth, p)), default=0)
    return min(number, top + most)


def candidates(
    ranks: np.ndarray, ground_truth: GroundTruth, protocol: str, *, top: int = 100
) -> list[np.ndarray]:
    """Lists what one protocol reranks: per query int64 indices, best first, `top` at most.

    Args:
        ranks: (K, Q) integers, best first, K at least `shortlist_depth` (or the whole database).
        protocol: "easy", "medium" or "hard": the first `top` that the protocol does not ignore, as
            DELG does; or "published": the first `top` as they come.
    Raises:
        ValueError: the ranking is too short, or has another number of queries.
    """
    if protocol == PUBLISHED:
        skipped = [np.empty(0, np.int64)] * len(ground_truth.queries)
    else:
        skipped = ignored(ground_truth, protocol)
    if ranks.ndim != 2 or ranks.shape[1] != len(skipped):
        raise ValueError(
            f"a ranking of {len(skipped)} queries has that many columns, not {ranks.shape}"
        )
    # K ranks may be all there are only where K is at least the labelled database's size.
    whole = len(ranks) >= len(ground_truth.database)
    found = []
    for q, skip in enumerate(skipped):
        column = ranks[: top + skip.size, q].astype(np.int64)
        kept = column[~np.isin(column, skip)][:top]
        if kept.size < top and not whole:
            raise ValueError(
                f"{len(ranks)} ranks leave {kept.size} of {top} candidates to query {q} "
                f"({protocol}); search with k=shortlist_depth(...)"
            )
        found.append(kept)
    return found


def shortlist(ranks: np.ndarray, ground_truth: GroundTruth, *, top: int = 100) -> list[np.ndarray]:
    """Lists the images that any reranking needs: the union of all protocols' and the published one.

    Args and raises as `candidates`. Returns per query int64 database indices in ranking order.
    """
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

    The separator is a tab because names may contain spaces; a name with a tab or a line break is a
    ValueError. lists: per query database indices (`shortlist`).
    """
    lines = [
        f"{_whole(query)}\t{_whole(database[index])}\n"
        for query, indices in zip(queries, lists, strict=True)
        for index in indices
    ]
    return runs.write_text(Path(path), "".join(lines))


def read_shortlist(path: str | os.PathLike) -> dict[str, list[str]]:
    """Reads `shortlist.txt`: query name -> database names, both in the file's order.

    A query without candidates has no line and no entry. ValueError names a line that is not two
    names separated by a tab.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), start=1):
        names = line.split("\t")
        if len(names) != 2 or not all(names):
            raise ValueError(f"{path}, line {number}: not a query and an image around one tab")
        found.setdefault(names[0], []).append(names[1])
    return found


def write_rerank_paths(
    path: str | os.PathLike, dataset: RetrievalDataset, *, lists: Sequence[np.ndarray]
) -> Path:
    """Writes the published `rerank_path.txt`, from which the published code extracts features.

    A line is an image path and four integers, separated by spaces: each query with its box
    truncated to whole pixels, then its candidates with -1 -1 -1 -1. The published reader cannot
    take paths with spaces; ours can.

    lists: per query database indices, best first (the published one: `candidates(...,
    "published")`).
    """
    lines = []
    boxes = dataset.ground_truth.boxes.astype(np.int64)
    for query, box, indices in zip(dataset.query_paths, boxes, lists, strict=True):
        lines.append((query, box))
        lines += [(dataset.database_paths[index], NO_BOX) for index in indices]
    return runs.write_text(
        Path(path),
        "".join(f"{_whole(str(name))} {' '.join(map(str, box))}\n" for name, box in lines),
    )


def read_rerank_paths(
    path: str | os.PathLike,
) -> list[tuple[str, tuple[int, int, int, int], list[str]]]:
    """Reads a published `rerank_path.txt`: per query its path, its box and its candidates' paths.

    Raises ValueError naming a line that is not a path and four integers, or a candidate that
    stands before the first query.
    """
    found: list[tuple[str, tuple[int, int, int, int], list[str]]] = []
    for number, line in enumerate(_lines(path), start=1):
        name, *box = line.rsplit(" ", 4)
        try:
            box = tuple(int(value) for value in box)
        except ValueError:
            box = ()
        if len(box) != 4 or (box == NO_BOX and not found):
            raise ValueError(
                f"{path}, line {number}: not a path and a box (x0 y0 x1 y1; -1 -1 -1 -1 for a "
                "candidate, which follows its query)"
            )
        if box == NO_BOX:
            found[-1][2].append(name)
        else:
            found.append((name, box, []))
    return found


def write_global_rank(path: str | os.PathLike, ranks: np.ndarray) -> Path:
    """Writes the published `global_rank.npy`: (N, Q) int64, best first, one column a query.

    The published code needs the whole ranking (`search` with k=N): 8 bytes x N x Q.
    """
    return runs.write_array(Path(path), np.ascontiguousarray(ranks, dtype=np.int64))


def read_global_rank(path: str | os.PathLike) -> np.ndarray:
    """Opens a published `global_rank.npy`, memory-mapped: (N, Q) integers, best first.

    Its indices mean what they meant to the program that wrote it: with distractors, the published
    code's order depends on the file system. Raises ValueError for another kind of array.
    """
    try:
        ranks = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy array ({error})") from error
    if getattr(ranks, "ndim", None) != 2 or ranks.dtype.kind not in "iu":
        raise ValueError(f"{path} is no ranking: a 2-D integer array, one column a query, is")
    return ranks


def _lines(path: str | os.PathLike) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def _whole(name: str) -> str:
    if not name or any(character in name for character in "\t\n\r"):
        raise ValueError(
            f"the name {name!r} is empty or holds a tab or line break: rename the image"
        )
    return name
