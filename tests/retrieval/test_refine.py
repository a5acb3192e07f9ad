"""Whitening, expansion and augmentation against other libraries, brute force and hand work."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from vitgal.features.files import FileError
from vitgal.retrieval.exact_ranks import labelled_positions
from vitgal.retrieval.exact_search import WhitenedRows, search
from vitgal.retrieval.refine import (
    RefinementError,
    WhiteningMap,
    augmented_blocks,
    exact_neighbours,
    expand_queries,
    learned_whitening,
    matching_pairs,
    neighbour_graph,
    pca_whitening,
    whitened_norms,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def rows() -> np.ndarray:
    generator = np.random.default_rng(0)
    return unit(generator.standard_normal((300, 8)) * np.arange(1, 9) + 3)


# Whitening


def test_full_whitening_is_that_of_scikit_learn(rows):
    expected = unit(PCA(5, whiten=True).fit(rows).transform(rows))
    mapped = pca_whitening(rows, dimensions=5, power=0.5).apply(rows)
    assert mapped.shape == (300, 5) and mapped.dtype == np.float32
    np.testing.assert_allclose(mapped @ mapped.T, expected @ expected.T, atol=1e-4)


def test_no_power_is_a_rotation_and_shrinkage_evens_variances(rows):
    centred = unit(rows - rows.mean(axis=0))
    turned = pca_whitening(rows, power=0).apply(rows)
    np.testing.assert_allclose(turned @ turned.T, centred @ centred.T, atol=1e-5)
    # With all weight on the mean every variance is the same, whatever the power.
    even = pca_whitening(rows, power=0.5, shrinkage=1.0).apply(rows)
    np.testing.assert_allclose(even @ even.T, centred @ centred.T, atol=1e-5)


def test_two_dimensions_by_hand():
    # Variances 4 and 1 (times 2 / 3) along the axes; power 0.5 makes (2, 1) the diagonal.
    rows = np.array([[2, 0], [-2, 0], [0, 1], [0, -1]], np.float32)
    mapped = pca_whitening(rows, power=0.5).apply(np.array([[2, 1], [2, 0]], np.float32))
    assert mapped[0] @ mapped[1] == pytest.approx(np.sqrt(0.5), abs=1e-6)
    # At power 0.25 the axes are divided by the root of 2 and by 1.
    mapped = pca_whitening(rows, power=0.25).apply(np.array([[2, 1], [2, 0]], np.float32))
    assert mapped[0] @ mapped[1] == pytest.approx(np.sqrt(2 / 3), abs=1e-6)


def test_learned_whitening_makes_pairs_white():
    generator = np.random.default_rng(1)
    centres = np.repeat(generator.standard_normal((200, 6)) * [5, 4, 3, 2, 1, 0.5], 2, axis=0)
    rows = (centres + generator.standard_normal((400, 6)) @ np.diag(np.arange(1, 7))).astype("f4")
    pairs = matching_pairs(np.repeat(np.arange(200), 2))
    assert pairs.shape == (200, 2) and (pairs[:, 1] - pairs[:, 0] == 1).all()
    whitening = learned_whitening(rows, pairs)
    projected = rows.astype(float) @ whitening.projection
    within = projected[pairs[:, 0]] - projected[pairs[:, 1]]
    scatter = within.T @ within
    np.testing.assert_allclose(scatter / scatter[0, 0], np.eye(6), atol=1e-4)
    covariance = np.cov(projected.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4 * covariance[0, 0]
    assert (np.diff(np.diag(covariance)) < 0).all()  # strongest first
    few = learned_whitening(rows, pairs, dimensions=2)
    np.testing.assert_allclose(few.projection, whitening.projection[:, :2], rtol=1e-6)


def test_a_dimension_without_variance_is_left_out(rows):
    """As of a network that ends in a LayerNorm: all values of a descriptor add up to 0."""
    flat = (rows - rows.mean(axis=1, keepdims=True)).astype(np.float32)
    pairs = matching_pairs(np.arange(300) // 2)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype(np.float32)
    basis = np.linalg.svd(flat)[2][:7].T.astype(np.float32)  # the same in seven dimensions
    for learn in (
        lambda rows: pca_whitening(rows, power=0.5),
        lambda rows: learned_whitening(rows, pairs),
    ):
        mapped = learn(flat).apply(flat)
        assert mapped.shape == (300, 7)
        for same in (flat @ basis, flat @ turn):
            other = learn(same).apply(same)
            np.testing.assert_allclose(other @ other.T, mapped @ mapped.T, atol=1e-3)
    assert pca_whitening(flat, power=0).apply(flat).shape == (300, 8)


def test_matching_pairs():
    assert matching_pairs(np.array([5, 7, 5, 9, 5])).tolist() == [[0, 2], [2, 4], [4, 0]]
    assert matching_pairs(np.array([1, 2])).shape == (0, 2)
    assert matching_pairs(np.array([], np.int64)).shape == (0, 2)


def test_unreadable_images_stay_zero_and_are_not_learnt_from(rows):
    holed = np.concatenate([rows, np.zeros((2, 8), np.float32)])
    whitening, expected = (pca_whitening(part, power=0.5) for part in (holed, rows))
    np.testing.assert_array_equal(whitening.projection, expected.projection)
    assert not whitening.apply(holed)[-2:].any()
    assert whitening.apply(rows[:0]).shape == (0, 8)


@pytest.mark.parametrize("dimensions", [None, 6, 3])  # a triangle, one with rows of zeros, none
def test_norms_are_those_of_the_mapped_rows(rows, dimensions, monkeypatch):
    monkeypatch.setattr("vitgal.retrieval.refine.BLOCK", 128)
    whitening = pca_whitening(rows, power=0.5, dimensions=dimensions)
    expected = np.linalg.norm((rows.astype(float) - whitening.mean) @ whitening.projection, axis=1)
    for kind, tolerance in (("f4", 1e-6), ("f8", 1e-6), ("f2", 1e-2)):
        norms = whitened_norms(rows.astype(kind), whitening)
        assert norms.dtype == np.float32
        np.testing.assert_allclose(norms, expected, rtol=tolerance)
    holed = rows.copy()
    holed[[7, 299]] = 0
    holed[8, 0] = 0  # a zero, not all of them
    assert np.flatnonzero(whitened_norms(holed, whitening) == 0).tolist() == [7, 299]
    assert whitened_norms(rows[:0], whitening).shape == (0,)
    holed[200, 3] = np.nan
    with pytest.raises(ValueError, match="database image 200 is not finite"):
        whitened_norms(holed, whitening)


@pytest.mark.parametrize("k", [5, 290])  # by float32 estimates, and without
def test_search_in_whitened_rows_is_that_in_a_whitened_database(rows, k):
    rows = np.concatenate([rows, np.zeros((2, 8), np.float32)])
    whitening = pca_whitening(rows[:300], power=0.5)
    whole, queries = whitening.apply(rows), whitening.apply(rows[:20] + np.float32(0.1))
    lazy = WhitenedRows(rows, whitening, whitened_norms(rows, whitening))
    assert (lazy.shape, len(lazy), lazy.ndim, lazy.dtype) == ((302, 8), 302, 2, np.float32)
    chosen = np.array([3, 301, 7])
    np.testing.assert_allclose(lazy[chosen], whole[chosen], atol=1e-6)
    similarities, images = search(queries, lazy, k=k)
    expected, order = search(queries, whole, k=k)
    np.testing.assert_array_equal(images, order)
    np.testing.assert_allclose(similarities, expected, atol=1e-6)
    last, order = search(queries, lazy, k=302)
    assert (np.sort(order[-2:], axis=0) == [[300], [301]]).all() and np.isneginf(last[-2:]).all()
    labelled = [np.array([0, 50 + q, 301]) for q in range(20)]
    for found, of_query, ranking in zip(
        labelled_positions(queries, lazy, labelled).ranks, labelled, order.T, strict=True
    ):
        assert found.tolist() == [ranking.tolist().index(image) for image in of_query]
    expanded, wanted = (expand_queries(queries, d, neighbours=4, alpha=3) for d in (lazy, whole))
    np.testing.assert_allclose(expanded, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="queries have 4 dimensions and the database 8"):
        search(queries[:, :4], lazy, k=k)


def test_a_stored_whitening(rows, tmp_path):
    whitening = pca_whitening(rows, power=0.5)
    again = WhiteningMap.load(whitening.save(tmp_path / "w.npz"))
    assert again.fingerprint == whitening.fingerprint
    np.testing.assert_array_equal(again.apply(rows), whitening.apply(rows))
    (tmp_path / "w.npz").write_bytes(b"PK")
    with pytest.raises(FileError, match=r"w\.npz"):
        WhiteningMap.load(tmp_path / "w.npz")


def test_whitening_refuses(rows):
    with pytest.raises(RefinementError, match="8 dimensions needs more images than that .* not 8"):
        pca_whitening(rows[:8], power=0.5)
    flat = np.pad(rows[:, :3], ((0, 0), (0, 5)))
    with pytest.raises(RefinementError, match="vary in 3 of 8 dimensions: leave dimensions out"):
        pca_whitening(flat, power=0.5, dimensions=4)
    with pytest.raises(RefinementError, match="vary in 0 of 8 dimensions"):
        pca_whitening(np.ones((20, 8)), power=0.5)
    with pytest.raises(RefinementError, match="vary in 8 of 8 dimensions"):
        pca_whitening(rows, power=0.5, dimensions=9)
    with pytest.raises(RefinementError, match="learnt from descriptors of 8 dimensions, these hav"):
        pca_whitening(rows, power=0.5).apply(rows[:, :4])
    with pytest.raises(RefinementError, match="as many pairs of images of one landmark, not 4"):
        learned_whitening(rows, np.tile([[0, 1]], (4, 1)))
    with pytest.raises(RefinementError, match="do not differ in every dimension"):
        learned_whitening(rows, np.tile([[0, 0]], (9, 1)))
    with pytest.raises(RefinementError, match="not finite"):
        pca_whitening(np.where(np.arange(8) == 2, np.nan, rows), power=0.5)


# Expansion and augmentation


def test_expansion_by_hand():
    """Similarities 0.8 and 0.6 at alpha 1, cubes of them at 3, equal weights at 0."""
    query = np.array([[1, 0, 0]], np.float32)
    database = np.array([[0.8, 0.6, 0], [0.6, 0, 0.8], [-1, 0, 0]], np.float32)
    for alpha in (0, 1, 3):
        one, two = 0.8**alpha, 0.6**alpha
        expected = np.array([1 + 0.8 * one + 0.6 * two, 0.6 * one, 0.8 * two])
        expanded = expand_queries(query, database, neighbours=2, alpha=alpha)
        np.testing.assert_allclose(expanded[0], expected / np.linalg.norm(expected), atol=1e-6)
    # An image on the other side counts as the average alone, and an unreadable one never.
    third = expand_queries(query, database, neighbours=3, alpha=1)
    np.testing.assert_array_equal(third, expand_queries(query, database, neighbours=2, alpha=1))
    database[2] = 0
    for alpha in (0, 1):
        all_three = expand_queries(query, database, neighbours=3, alpha=alpha)
        two_alone = expand_queries(query, database, neighbours=2, alpha=alpha)
        np.testing.assert_array_equal(all_three, two_alone)


def brute_augmentation(rows: np.ndarray, k: int, alpha: float) -> np.ndarray:
    result = []
    for index, row in enumerate(rows.astype(float)):
        similarities = rows.astype(float) @ row
        others = [i for i in np.argsort(-similarities, kind="stable") if i != index][:k]
        total = row + sum(max(similarities[i], 0) ** alpha * rows[i] for i in others)
        result.append(total / np.linalg.norm(total))
    return np.array(result)


def test_augmentation_is_brute_force(rows, monkeypatch):
    monkeypatch.setattr("vitgal.retrieval.refine.GROUP", 70)
    find = exact_neighbours(rows)
    blocks = list(augmented_blocks(rows, find, neighbours=4, alpha=2))
    assert [len(block) for block in blocks] == [70, 70, 70, 70, 20]
    np.testing.assert_allclose(np.concatenate(blocks), brute_augmentation(rows, 4, 2), atol=1e-6)


def test_neighbours_of_copies_and_unreadable_images():
    """Five copies of one image, another one, and one that could not be read."""
    rows = np.array([[1, 0]] * 5 + [[0, 1], [0, 0]], np.float32)
    similarities, images = neighbour_graph(rows, exact_neighbours(rows), neighbours=3)
    assert similarities.dtype == np.float32 and images.dtype == np.int32
    assert images[0].tolist() == [1, 2, 3] and images[1].tolist() == [0, 2, 3]
    assert images[4].tolist() == [0, 1, 2]  # not among its own first four
    assert similarities[0].tolist() == [1, 1, 1] and images[5].tolist() == [0, 1, 2]
    assert np.isneginf(similarities[6]).all()
    augmented = np.concatenate(
        list(augmented_blocks(rows, exact_neighbours(rows), neighbours=6, alpha=1))
    )
    np.testing.assert_array_equal(augmented, rows)  # no weight to what is at right angles


def test_more_neighbours_than_images_are_refused(rows):
    one = rows[:1]
    assert expand_queries(one, one, neighbours=1, alpha=3) == pytest.approx(one)
    with pytest.raises(RefinementError, match="expansion wants 2 images, but there are 1"):
        expand_queries(one, one, neighbours=2, alpha=3)
    with pytest.raises(RefinementError, match="wants 1 images, but there are 0"):
        neighbour_graph(one, exact_neighbours(one), neighbours=1)
    with pytest.raises(ValueError, match="different models"):
        expand_queries(rows, rows[:, :4], neighbours=2, alpha=3)


def test_twice_the_same_bytes(rows):
    for _ in range(2):
        find = exact_neighbours(rows)
        first, second = (
            np.concatenate(list(augmented_blocks(rows, find, neighbours=9, alpha=3)))
            for _ in range(2)
        )
        assert first.tobytes() == second.tobytes()
