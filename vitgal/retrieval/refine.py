"""Refinement of global descriptors: whitening, query expansion, database augmentation.

Each function maps descriptors of length 1 to descriptors of length 1, so that `search` and
`labelled_positions` rank by them exactly. A row of zeros stands for an image that could not be
read; it stays zero and does not affect other rows.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from scipy.linalg.blas import strmm

from vitgal import runs
from vitgal.features.codes import LinearMap
from vitgal.retrieval import exact_search
from vitgal.retrieval.exact_search import BLOCK, Database, Hits, block_slices

GROUP = 1024  # descriptors whose neighbours are searched together: 84 MB a thread

# (queries (B, D), k) -> similarities (B, k) float32 and database indices (B, k)
NeighbourSearch = Callable[[np.ndarray, int], Hits]


class RefinementError(runs.UserError, ValueError):
    """A refinement that the descriptors at hand do not allow; the message has the remedy."""


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) of length 1, in place and in their own type; zeros stay zeros."""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    rows *= (1 / np.where(lengths > 0, lengths, 1))[:, None]
    return rows


# Whitening


class WhiteningMap(LinearMap):
    """An affine map of descriptors, followed by normalisation."""

    NAME = "whitening"

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Returns (N, D') float32 of length 1 for rows (N, D); an empty array for none.

        Raises RefinementError for rows of another width.
        """
        if rows.shape[1] != len(self.mean):
            raise RefinementError(
                f"the whitening was learnt from descriptors of {len(self.mean)} dimensions, these "
                f"have {rows.shape[1]}: learn it from descriptors of the same network"
            )
        rows = np.asarray(rows)
        mapped = rows.astype(np.float32, copy=False) @ self.projection
        mapped -= self.mean @ self.projection
        mapped[~rows.any(axis=1)] = 0
        return _normalised(mapped)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the map's values, in hex."""
        return hashlib.sha256(self.mean.tobytes() + self.projection.tobytes()).hexdigest()


def pca_whitening(
    rows: np.ndarray, *, dimensions: int | None = None, power: float, shrinkage: float = 0.0
) -> WhiteningMap:
    """Learns PCA whitening from descriptors without labels.

    Jégou and Chum, "Negative evidences and co-occurrences in image retrieval: the benefit of PCA
    and whitening", ECCV 2012. Each component is divided by its variance to the `power`: 0.5 gives
    all of them variance 1, less keeps more of the strong ones' weight. `shrinkage` replaces a
    variance v by (1 - shrinkage) v + shrinkage x mean, as Ledoit and Wolf do.

    Args:
        rows: (F, D) floats, none of them of the benchmark; rows of zeros are left out.
        dimensions: strongest components that are kept; None: all that vary. A network that ends
            in a LayerNorm gives one component without variance.
    Raises:
        RefinementError: not more images than dimensions, more components than dimensions or than
            vary, or images that are all the same.
    """
    mean, covariance = _moments(rows)
    variances, components = _components(covariance)
    variances = (1 - shrinkage) * variances + shrinkage * variances.mean()
    width = _varying(variances, dimensions) if power > 0 else dimensions
    return _as_map(mean, components[:, :width] * variances[:width] ** -power)


def learned_whitening(
    rows: np.ndarray, pairs: np.ndarray, *, dimensions: int | None = None
) -> WhiteningMap:
    """Learns whitening from pairs of images that show the same landmark.

    Mikolajczyk and Matas, "Improving descriptors for fast tree matching by optimal linear
    projection", ICCV 2007, as Radenovic et al. apply it to image descriptors (ECCV 2016): the
    differences within pairs become white, then the components in which images differ most are kept.

    rows, dimensions: as for `pca_whitening`. pairs: (M, 2) integers, rows that match
    (`matching_pairs`). Raises RefinementError also for fewer pairs than dimensions, or pairs that
    do not differ in a dimension in which images vary.
    """
    mean, covariance = _moments(rows)
    variances, components = _components(covariance)
    basis = components[:, : _varying(variances, None)]
    width = _varying(variances, dimensions)
    if len(pairs) < len(mean):
        raise RefinementError(
            f"a learned whitening of {len(mean)} dimensions needs as many pairs of images of one "
            f"landmark, not {len(pairs)}: learn it from more images, or use whitening"
        )
    within = np.zeros((basis.shape[1], basis.shape[1]))
    for part in block_slices(len(pairs), BLOCK):
        first, second = (np.asarray(rows[pairs[part, side]], np.float64) for side in (0, 1))
        differences = (first - second) @ basis
        within += differences.T @ differences
    try:
        whiten = np.linalg.inv(np.linalg.cholesky(within / len(pairs)))
    except np.linalg.LinAlgError:
        raise RefinementError(
            "images of one landmark do not differ in every dimension, so no whitening can be "
            "learnt from pairs of them: learn it from other images, or use whitening"
        ) from None
    _, turned = _components(whiten @ (basis.T @ covariance @ basis) @ whiten.T)
    return _as_map(mean, basis @ whiten.T @ turned[:, :width])


def matching_pairs(labels: np.ndarray) -> np.ndarray:
    """Returns pairs (M, 2) int64: each image with the next one of its label, the last with the
    first; a label of two images gives one pair, of one none. labels: (F,) integers."""
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(np.asarray(labels)[order])) + 1
    pairs = [np.empty((0, 2), np.int64)]
    for group in np.split(order, cuts):
        partners = np.roll(group, -1) if len(group) > 2 else group[1:]
        pairs.append(np.stack([group[: len(partners)], partners], axis=1))
    return np.concatenate(pairs)


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) float64 of the rows that are not zero."""
    if getattr(rows, "ndim", None) != 2 or rows.dtype.kind != "f":
        raise ValueError("a whitening is learnt from a 2-D array of floats, one descriptor a row")
    kept = np.flatnonzero(np.any(rows, axis=1))
    if len(kept) <= rows.shape[1]:
        raise RefinementError(
            f"a whitening of {rows.shape[1]} dimensions needs more images than that to learn from, "
            f"not {len(kept)}: give it more (refine_set, refine_images)"
        )
    parts = [kept[part] for part in block_slices(len(kept), BLOCK)]
    mean = sum(rows[part].sum(axis=0, dtype=np.float64) for part in parts) / len(kept)
    covariance = np.zeros((len(mean), len(mean)))
    for part in parts:
        centred = rows[part].astype(np.float64) - mean
        covariance += centred.T @ centred
    if not np.isfinite(covariance).all():
        raise RefinementError("a descriptor that a whitening is learnt from is not finite")
    return mean, covariance / (len(kept) - 1)


def _components(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Falling variances (D,) and their components (D, D), a column each."""
    variances, components = np.linalg.eigh(covariance)
    return variances[::-1], components[:, ::-1]


def _varying(variances: np.ndarray, dimensions: int | None) -> int:
    """The number of components to keep: all that vary, or the wanted ones, which must vary."""
    varying = int((variances > 1e-10 * max(variances[0], 1e-30)).sum())
    if varying < (dimensions or 1):
        raise RefinementError(
            f"the whitening's images vary in {varying} of {len(variances)} dimensions: leave "
            "dimensions out, set a shrinkage, or learn it from other images"
        )
    return dimensions or varying


def _as_map(mean: np.ndarray, projection: np.ndarray) -> WhiteningMap:
    # One factor for all: float32 holds it, and the length is normalised anyway.
    projection = projection / np.abs(projection).max()
    return WhiteningMap(mean.astype(np.float32), projection.astype(np.float32))


def whitened_norms(database: np.ndarray, whitening: WhiteningMap) -> np.ndarray:
    """Returns the norms (N,) float32 of whitened descriptors before they are normalised.

    A row of zeros has the norm 0. With P = projection, x @ P is as long as x @ R.T, where R is the
    triangle of a QR decomposition of P.T: half of the multiplications. Takes 4 bytes x N, and in up
    to four threads 4 bytes x D x `BLOCK` each.

    database: (N, D) floats, memory-mapped or not. Raises ValueError naming an image whose
    descriptor is not finite.
    """
    width, kept = whitening.projection.shape
    triangle = np.zeros((width, width), np.float32, order="F")
    triangle[: min(width, kept)] = np.linalg.qr(whitening.projection.T, mode="r")
    norms = np.empty(len(database), np.float32)

    def fill(parts: list[slice]) -> None:
        buffer = np.empty((BLOCK, width), np.float32)
        for part in parts:
            stored = database[part]
            rows = np.subtract(stored, whitening.mean, out=buffer[: len(stored)], casting="unsafe")
            if 2 * kept > width:
                rows = strmm(1, triangle, rows.T, overwrite_b=1).T
            else:
                rows = rows @ whitening.projection
            norms[part] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
            zeros = np.flatnonzero(stored[:, 0] == 0)
            norms[part][zeros[~stored[zeros].any(axis=1)]] = 0

    exact_search.in_threads(fill, block_slices(len(database), BLOCK))
    bad = np.flatnonzero(~np.isfinite(norms))
    if bad.size:
        raise ValueError(f"the descriptor of database image {bad[0]} is not finite")
    return norms


# Neighbours


def expand_queries(
    queries: np.ndarray, database: Database, *, neighbours: int, alpha: float
) -> np.ndarray:
    """Adds to each query its first images, weighted by their similarity to the power `alpha`.

    Alpha query expansion: Radenovic et al., "Fine-tuning CNN image retrieval with no human
    annotation", TPAMI 2019. `alpha` 0 is average query expansion: Chum et al., "Total recall",
    ICCV 2007. A similarity below 0 counts 0. Memory, arguments and errors as `search`;
    RefinementError for more neighbours than images. Returns (Q, D) float32 of length 1.
    """
    check_neighbours("expansion", neighbours, len(database))
    exact_search.check_descriptors(queries, database)
    similarities, images = exact_search.search(queries, database, k=neighbours)
    return _weighted_sums(queries, database, (similarities.T, images.T), alpha)


def augmented_blocks(
    database: Database, find: NeighbourSearch, *, neighbours: int, alpha: float
) -> Iterator[np.ndarray]:
    """Yields a database (N, D) in blocks, each image with its neighbours added to it.

    Database augmentation: Turcot and Lowe, ICCV workshop 2009; Arandjelovic and Zisserman, "Three
    things everyone should know to improve object retrieval", CVPR 2012; with weights by Gordo et
    al., IJCV 2017. Neighbours are those of the database as it was, whatever the blocks, and are
    added as in `expand_queries`.

    find: `exact_neighbours(database)` or another search. Raises as `expand_queries`.
    """
    for part, hits in neighbour_blocks(database, find, neighbours=neighbours):
        yield _weighted_sums(database[part], database, hits, alpha)


def _weighted_sums(rows: np.ndarray, database: Database, hits: Hits, alpha: float) -> np.ndarray:
    """Rows (B, D) and their weighted hits (B, k), summed in float64; float32 of length 1."""
    similarities, images = hits
    readable = np.isfinite(similarities)
    positive = np.maximum(np.where(readable, similarities, 0), 0).astype(np.float64)
    weights = np.where(readable, positive**alpha, 0)
    sums = np.asarray(rows, np.float64)
    for weight, column in zip(weights.T, images.T, strict=True):
        sums = sums + weight[:, None] * database[column]
    sums[~np.any(rows, axis=1)] = 0
    return _normalised(sums).astype(np.float32)


def check_neighbours(step: str, neighbours: int, images: int) -> None:
    """Raises RefinementError where a step wants more neighbours than there are images."""
    if neighbours > images:
        raise RefinementError(
            f"{step} wants {neighbours} images, but there are {images}: set a smaller number"
        )


def exact_neighbours(database: Database) -> NeighbourSearch:
    """Returns exact search in a database (N, D) as a `NeighbourSearch`; N² x D products in all."""

    def find(queries: np.ndarray, k: int) -> Hits:
        """Searches the whole database for queries (Q, D)."""
        similarities, images = exact_search.search(queries, database, k=k)
        return similarities.T, images.T

    return find


def neighbour_blocks(
    database: Database, find: NeighbourSearch, *, neighbours: int
) -> Iterator[tuple[slice, Hits]]:
    """Yields, block by block, the nearest other images of each database image.

    Yields the rows of a block, and similarities (B, k) float32 and images (B, k) int32, best first,
    of equal ones the lower index. An image that could not be read is no neighbour, and has none:
    its similarity is -inf. Memory is that of one search of 1024 queries. Raises RefinementError for
    more neighbours than other images, ValueError as `search`.
    """
    check_neighbours("a graph or augmentation", neighbours, len(database) - 1)
    for part in block_slices(len(database), GROUP):
        rows = np.ascontiguousarray(database[part])
        similarities, images = find(rows, neighbours + 1)
        own = images == np.arange(part.start, part.stop)[:, None]
        own[~own.any(axis=1), -1] = True  # so many copies that it is not among them itself
        kept = [array[~own].reshape(len(rows), neighbours) for array in (similarities, images)]
        kept[0][~rows.any(axis=1)] = -np.inf
        yield part, (kept[0], kept[1].astype(np.int32, copy=False))


def neighbour_graph(database: Database, find: NeighbourSearch, *, neighbours: int) -> Hits:
    """Returns `neighbour_blocks` of all N images together, 8 bytes x N x k."""
    similarities = np.empty((len(database), neighbours), np.float32)
    images = np.empty((len(database), neighbours), np.int32)
    for part, hits in neighbour_blocks(database, find, neighbours=neighbours):
        similarities[part], images[part] = hits
    return similarities, images
