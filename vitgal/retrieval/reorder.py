"""Refinement of rankings: the first images of each query are reordered.

All others keep their order, so every labelled image keeps an exact rank. Each step returns a
score for each of the first M images of each query; `reorder` sorts by them. An image that could not
be read has the similarity -inf and stays last.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from vitgal.retrieval.exact_search import Database, Hits
from vitgal.retrieval.ranking import Ranking

ITERATIONS = 20  # of conjugate gradients, and their tolerance, as published
TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class ScoredRanking(Ranking):
    """A ranking with the scores of its first images.

    similarities: (K, Q) float32, falling; -inf for an image that could not be read.
    """

    similarities: np.ndarray

    def cut(self, depth: int) -> "ScoredRanking":
        """Returns the ranking with the first `depth` images alone; all ranks stay known."""
        order, scores = (np.ascontiguousarray(a[:depth]) for a in (self.order, self.similarities))
        return ScoredRanking(order, self.positions, scores)

    def reordered(self, scores: np.ndarray) -> "ScoredRanking":
        """Sorts the first images by falling scores; of equal ones the earlier stays first.

        scores: (M, Q) floats of the first M images. The similarities become the scores; those
        behind are shifted to go on from the last of them, so that they still fall.
        """
        depth, queries = scores.shape
        order, values = self.order.copy(), self.similarities.copy()
        scores = np.where(np.isneginf(self.similarities[:depth]), -np.inf, scores)
        ranks = [of_query.copy() for of_query in self.positions.ranks]
        for q in range(queries):
            sorter = np.argsort(-scores[:, q], kind="stable")
            order[:depth, q] = order[sorter, q]
            values[:depth, q] = scores[sorter, q]
            if 0 < depth < len(values):
                last, behind = values[depth - 1, q], values[depth, q]
                values[depth:, q] += last - behind if np.isfinite([last, behind]).all() else 0
            new_ranks = np.argsort(sorter)  # of the image that was at each rank
            moved = ranks[q] < depth
            ranks[q][moved] = new_ranks[ranks[q][moved]]
        return ScoredRanking(order, replace(self.positions, ranks=ranks), values)


def superglobal(
    queries: np.ndarray, database: Database, order: np.ndarray, *, neighbours: int, beta: float
) -> np.ndarray:
    """Scores the first images by refined descriptors of them and of the query.

    Shao et al., "Global features are all you need for image retrieval and reranking", ICCV 2023.
    An image is refined to the mean of itself, with weight 1, and of its `neighbours` nearest among
    the first images, with weight `beta` x similarity. The query is refined to the element-wise
    maximum of the `neighbours` + 1 refined images that are most similar to it. The score is the
    mean of a refined image's similarities to the query and to the refined query.

    queries: (Q, D). database: (N, D). order: (M, Q) integers, the first images. Returns (M, Q)
    float64. One query takes 8 bytes x M x (M + 2 D).
    """
    scores = np.empty(order.shape)
    for q, query in enumerate(queries.astype(np.float64)):
        rows = database[order[:, q]].astype(np.float64)
        products = rows @ rows.T
        np.fill_diagonal(products, np.inf)  # an image is its own first neighbour
        nearest = np.argsort(-products, axis=1, kind="stable")[:, : neighbours + 1]
        weights = beta * np.take_along_axis(products, nearest, axis=1)
        weights[:, 0] = 1
        near = scipy.sparse.csr_matrix(
            (weights.ravel(), nearest.ravel(), np.arange(0, nearest.size + 1, nearest.shape[1])),
            (len(rows), len(rows)),
        )
        refined = (near @ rows) / weights.sum(axis=1, keepdims=True)
        before = refined @ query
        best = np.argsort(-before, kind="stable")[: neighbours + 1]
        scores[:, q] = (before + refined @ refined[best].max(axis=0)) / 2
    return scores


def k_reciprocal(
    queries: np.ndarray, database: Database, order: np.ndarray, *, k1: int, k2: int, weight: float
) -> np.ndarray:
    """Scores the first images by the neighbours that they share with the query.

    Zhong et al., "Re-ranking person re-identification with k-reciprocal encoding", CVPR 2017. The
    neighbourhood of an image consists of its mutual `k1` nearest neighbours and of their own
    neighbourhoods of half the size where these overlap it by more than two thirds. Members are
    weighted by exp(-distance), and the weights averaged over the `k2` nearest images. The distance
    of two images is the Jaccard distance of their neighbourhoods, mixed with the original distance
    by `weight`.

    NOTE neighbours are searched among the query and its first M images, not in the whole database:
    memory and time do not depend on N.

    Arguments as for `superglobal`. Returns (M, Q) float64, 1 - distance. One query takes about 80
    bytes x M².
    """
    scores = np.empty(order.shape)
    for q, query in enumerate(queries):
        rows = np.concatenate([query[None], database[order[:, q]]]).astype(np.float64)
        distances = np.maximum(2 - 2 * (rows @ rows.T), 0)
        distances /= np.maximum(distances.max(axis=1, keepdims=True), np.finfo(float).tiny)
        nearest = np.argsort(distances, axis=1, kind="stable")
        places = np.argsort(nearest, axis=1)
        large, small = ((places <= k) & (places.T <= k) for k in (k1, int(np.around(k1 / 2))))
        shared = large.astype(np.float32) @ small.T.astype(np.float32)
        joined = large & (shared > 2 / 3 * small.sum(axis=1))
        members = large | (joined.astype(np.float32) @ small.astype(np.float32) > 0)
        encoding = np.where(members, np.exp(-distances), 0)
        encoding /= encoding.sum(axis=1, keepdims=True)
        if k2 > 1:
            encoding = np.mean([encoding[column] for column in nearest[:, :k2].T], axis=0)
        common = np.minimum(encoding[0], encoding).sum(axis=1)
        jaccard = 1 - common / (2 - common)
        scores[:, q] = 1 - ((1 - weight) * jaccard + weight * distances[0])[1:]
    return scores


def diffusion(
    similarities: np.ndarray,
    order: np.ndarray,
    graph: Hits,
    *,
    seeds: int,
    gamma: float,
    alpha: float,
) -> np.ndarray:
    """Scores the first images by diffusion over a graph of the database.

    Iscen et al., "Efficient diffusion on region manifolds: recovering small objects with compact
    CNN representations", CVPR 2017. Mutual neighbours are the edges of a graph, with the weight
    similarity^gamma normalised by both degrees. Similarity enters at the query's first `seeds`
    images and spreads, the share `alpha` in each step, until nothing changes: a sparse linear
    system, solved by conjugate gradients. Only edges among the first M images count (truncation in
    the paper); with M = N it is the whole graph.

    Args:
        similarities, order: (M, Q), the query's similarities to its first images, and these.
        graph: similarities (N, k) and images (N, k) of `neighbour_graph`, memory-mapped or not.
    Returns:
        (M, Q) float64, 1 for the best image of each query, 0 for images that nothing reaches. One
        query takes about 60 bytes x M x k, and 4 bytes x N.
    """
    depth, size = len(order), len(graph[0])
    scores = np.zeros(order.shape)
    matrix = None
    for q in range(order.shape[1]):
        images = np.sort(order[:, q])
        if matrix is None or depth < size:
            matrix = _diffusion_matrix(images, graph, gamma, alpha)
        entry = np.zeros(depth)
        first = np.searchsorted(images, order[:seeds, q])
        entry[first] = np.maximum(similarities[:seeds, q], 0).astype(np.float64) ** gamma
        spread, _ = scipy.sparse.linalg.cg(matrix, entry, rtol=TOLERANCE, maxiter=ITERATIONS)
        spread = np.maximum(spread, 0)
        scores[:, q] = spread[np.searchsorted(images, order[:, q])] / max(spread.max(), 1e-300)
    return scores


def _diffusion_matrix(
    images: np.ndarray, graph: Hits, gamma: float, alpha: float
) -> scipy.sparse.csr_matrix:
    """I - alpha S for some images (M,), rising; S holds the normalised weights of mutual links."""
    places = np.full(len(graph[0]), -1, np.int32)
    places[images] = np.arange(len(images), dtype=np.int32)
    similarities, columns = graph[0][images], places[graph[1][images]]
    linked = (columns >= 0) & (similarities > 0)
    rows = np.repeat(np.arange(len(images)), linked.sum(axis=1))
    weights = similarities[linked].astype(np.float64) ** gamma
    shape = (len(images), len(images))
    one_way = scipy.sparse.csr_matrix((weights, (rows, columns[linked])), shape)
    mutual = one_way.minimum(one_way.T)
    degrees = np.asarray(mutual.sum(axis=1)).ravel()
    scale = scipy.sparse.diags(np.where(degrees > 0, degrees, 1) ** -0.5)
    identity = scipy.sparse.identity(len(images), format="csr")
    return (identity - alpha * (scale @ mutual @ scale)).tocsr()
