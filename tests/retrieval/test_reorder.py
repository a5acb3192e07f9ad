"""Steps that put the first images in another order, against plain loops and closed forms."""

import numpy as np
import pytest

from vitgal.retrieval.exact_search import search
from vitgal.retrieval.ranking import Positions
from vitgal.retrieval.refine import exact_neighbours, neighbour_graph
from vitgal.retrieval.reorder import ScoredRanking, diffusion, k_reciprocal, superglobal


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    """3 queries and 60 images around 5 centres."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((5, 6))
    images = centres[generator.integers(0, 5, 60)] + 0.6 * generator.standard_normal((60, 6))
    return unit(centres[:3] + 0.5 * generator.standard_normal((3, 6))), unit(images)


# The ranking


def scored(similarities: list[float], order: list[int], size: int) -> ScoredRanking:
    positions = Positions([np.arange(size)], [np.argsort(order)], size)
    column = np.array(order, np.int32)[:, None]
    return ScoredRanking(column, positions, np.array(similarities, np.float32)[:, None])


def test_a_ranking_is_reordered_with_its_exact_ranks():
    ranking = scored([0.9, 0.8, 0.7, 0.5, 0.25], [3, 0, 4, 1, 2], 5)
    # Scores of images 3, 0 and 4; a tie keeps the earlier one first.
    again = ranking.reordered(np.array([[0.1], [2.0], [0.1]]))
    assert again.order[:, 0].tolist() == [0, 3, 4, 1, 2]
    assert again.positions.ranks[0].tolist() == [0, 3, 4, 1, 2]
    # Behind them the similarities go on from the last score.
    np.testing.assert_allclose(again.similarities[:, 0], [2, 0.1, 0.1, 0.1, -0.15], atol=1e-6)
    assert ranking.order[:, 0].tolist() == [3, 0, 4, 1, 2]  # the old one is as it was
    short = again.cut(2)
    assert short.order.shape == (2, 1) and len(short.positions.ranks[0]) == 5


def test_unreadable_images_stay_last():
    ranking = scored([0.9, 0.8, -np.inf], [1, 2, 0], 3)
    again = ranking.reordered(np.array([[1.0], [2.0], [3.0]]))
    assert again.order[:, 0].tolist() == [2, 1, 0] and again.similarities[2, 0] == -np.inf
    again = ranking.reordered(np.array([[1.0], [2.0]]))
    assert again.similarities[2, 0] == -np.inf


def test_one_image_and_no_query():
    ranking = scored([0.5], [0], 1).reordered(np.array([[0.3]]))
    assert ranking.order.tolist() == [[0]]
    none = ScoredRanking(
        np.empty((4, 0), np.int32), Positions([], [], 4), np.empty((4, 0), np.float32)
    )
    assert none.reordered(np.empty((2, 0))).order.shape == (4, 0)


# k-reciprocal


def published_k_reciprocal(query, images, k1, k2, weight):
    """The published loops, on one query and its first images."""
    rows = np.concatenate([query[None], images]).astype(float)
    distances = np.maximum(2 - 2 * rows @ rows.T, 0)
    distances = (distances / distances.max(axis=0)).T
    ranks = np.argsort(distances, axis=1, kind="stable")

    def reciprocal(i, k):
        forward = ranks[i, : k + 1]
        return {j for j in forward if i in ranks[j, : k + 1]}

    encoding = np.zeros_like(distances)
    for i in range(len(rows)):
        base = reciprocal(i, k1)
        members = set(base)
        for candidate in base:
            half = reciprocal(candidate, round(k1 / 2))
            if len(half & base) > 2 / 3 * len(half):
                members |= half
        members = sorted(members)
        values = np.exp(-distances[i, members])
        encoding[i, members] = values / values.sum()
    encoding = np.array([encoding[ranks[i, :k2]].mean(axis=0) for i in range(len(rows))])
    final = []
    for i in range(1, len(rows)):
        common = np.minimum(encoding[0], encoding[i]).sum()
        final.append((1 - weight) * (1 - common / (2 - common)) + weight * distances[0, i])
    return 1 - np.array(final)


@pytest.mark.parametrize(("k1", "k2", "depth"), [(20, 6, 40), (4, 1, 15), (7, 3, 60), (20, 6, 5)])
def test_k_reciprocal_is_as_published(data, k1, k2, depth):
    queries, images = data
    _, order = search(queries, images, k=depth)
    scores = k_reciprocal(queries, images, order, k1=k1, k2=k2, weight=0.3)
    assert scores.shape == (depth, 3)
    for q in range(3):
        expected = published_k_reciprocal(queries[q], images[order[:, q]], k1, k2, 0.3)
        np.testing.assert_allclose(scores[:, q], expected, atol=1e-5)


def test_k_reciprocal_with_all_weight_on_the_distance_keeps_the_order(data):
    queries, images = data
    _, order = search(queries, images, k=30)
    scores = k_reciprocal(queries, images, order, k1=5, k2=2, weight=1.0)
    assert (np.diff(scores, axis=0) <= 1e-9).all()


def test_k_reciprocal_of_one_image():
    one = np.array([[1, 0]], np.float32)
    scores = k_reciprocal(one, one, np.array([[0]]), k1=20, k2=6, weight=0.3)
    assert scores == pytest.approx(np.ones((1, 1)))


# SuperGlobal


def test_superglobal_by_loops(data):
    queries, images = data
    _, order = search(queries, images, k=25)
    scores = superglobal(queries, images, order, neighbours=4, beta=0.15)
    for q, query in enumerate(queries.astype(float)):
        rows = images[order[:, q]].astype(float)
        refined = []
        for i, row in enumerate(rows):
            similarities = rows @ row
            others = [j for j in np.argsort(-similarities, kind="stable") if j != i][:4]
            total = row + sum(0.15 * similarities[j] * rows[j] for j in others)
            refined.append(total / (1 + 0.15 * similarities[others].sum()))
        refined = np.array(refined)
        first = refined @ query
        best = np.argsort(-first)[:5]
        expected = (first + refined @ refined[best].max(axis=0)) / 2
        np.testing.assert_allclose(scores[:, q], expected, atol=1e-6)


# Diffusion


def closed_form(images, similarities, order, k, seeds, gamma, alpha):
    """Dense: mutual neighbours, normalised weights, the inverse."""
    size = len(images)
    products = (images.astype(float) @ images.T.astype(float)).astype(np.float32)
    np.fill_diagonal(products, -2)
    near = np.argsort(-products, axis=1, kind="stable")[:, :k]
    linked = np.zeros((size, size), bool)
    np.put_along_axis(linked, near, True, axis=1)
    weights = np.where(linked & linked.T, np.maximum(products, 0).astype(float) ** gamma, 0)
    degrees = weights.sum(axis=1)
    scale = 1 / np.sqrt(np.where(degrees > 0, degrees, 1))
    entry = np.zeros(size)
    entry[order[:seeds]] = np.maximum(similarities[:seeds], 0).astype(float) ** gamma
    return np.linalg.solve(np.eye(size) - alpha * scale[:, None] * weights * scale, entry)


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_diffusion_over_the_whole_graph_is_the_closed_form(data, alpha):
    queries, images = data
    similarities, order = search(queries, images, k=60)
    graph = neighbour_graph(images, exact_neighbours(images), neighbours=8)
    scores = diffusion(similarities, order, graph, seeds=3, gamma=3, alpha=alpha)
    for q in range(3):
        solved = closed_form(images, similarities[:, q], order[:, q], 8, 3, 3, alpha)
        expected = np.maximum(solved, 0) / solved.max()
        np.testing.assert_allclose(scores[:, q], expected[order[:, q]], atol=1e-4)


def test_truncated_diffusion_links_the_first_images_alone(data):
    queries, images = data
    similarities, order = search(queries, images, k=20)
    graph = neighbour_graph(images, exact_neighbours(images), neighbours=8)
    scores = diffusion(similarities, order, graph, seeds=3, gamma=3, alpha=0.9)
    assert scores.shape == (20, 3) and scores.max(axis=0) == pytest.approx(1)
    for q in range(3):
        # The same graph with every link to another image cut.
        inside = np.isin(np.arange(60), order[:, q])
        cut = np.where(inside[graph[1]] & inside[:, None], graph[0], -np.inf)
        whole = search(queries[q : q + 1], images, k=60)
        expected = diffusion(*whole, (cut, graph[1]), seeds=3, gamma=3, alpha=0.9)
        np.testing.assert_allclose(scores[:, q], expected[:20, 0], atol=1e-4)


def test_diffusion_reaches_no_image_without_a_path():
    """Two pairs of images; the query enters at one, and reaches its partner alone."""
    images = unit(np.array([[1, 0.1, 0], [1, -0.1, 0], [0, 0.1, 1], [0, -0.1, 1]]))
    similarities, order = search(images[:1], images, k=4)
    graph = neighbour_graph(images, exact_neighbours(images), neighbours=1)
    scores = diffusion(similarities, order, graph, seeds=1, gamma=1, alpha=0.5)
    assert order[:2, 0].tolist() == [0, 1]
    # f = y + S f / 2 with S = [[0, 1], [1, 0]]: (4, 2) / 3, of which 1 and one half.
    assert scores[:, 0] == pytest.approx([1, 0.5, 0, 0], abs=1e-6)


def test_diffusion_without_any_link_or_similarity():
    images = np.array([[1, 0], [0, 0]], np.float32)  # one could not be read
    similarities, order = search(-images[:1], images, k=2)
    graph = neighbour_graph(images, exact_neighbours(images), neighbours=1)
    scores = diffusion(similarities, order, graph, seeds=2, gamma=3, alpha=0.99)
    assert scores.tolist() == [[0], [0]]
