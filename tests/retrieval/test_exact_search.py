"""Exact search against full sorts."""

import numpy as np
import pytest

from tests.retrieval_cases import full_sort, normalised, tied
from vitgal.retrieval.exact_ranks import labelled_positions
from vitgal.retrieval.exact_search import NEAR_TIES, QUERIES, search


def test_search_by_hand():
    database = np.array([[1, 0], [0, 1], [0.5, 0.5], [0, 1], [-1, 0]], np.float32)
    queries = np.array([[1, 0], [0, 2]], np.float32)
    similarities, ranks = search(queries, database, k=3)
    # First query 1, 0, .5, 0, -1; second 0, 2, 1, 2, 0.
    assert ranks.tolist() == [[0, 1], [2, 3], [1, 2]]
    assert similarities.tolist() == [[1, 2], [0.5, 2], [0, 1]]
    assert ranks.dtype == np.int32 and similarities.dtype == np.float32


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
@pytest.mark.parametrize("k", [1, 10, 299, 300, 5000])
def test_search_equals_the_full_sort_with_ties(k, block):
    queries, database = tied(300, 6)
    expected = full_sort(database @ queries.T)[:k]
    similarities, ranks = search(queries, database, k=k, block=block)
    np.testing.assert_array_equal(ranks, expected)
    np.testing.assert_array_equal(
        similarities, np.take_along_axis(database @ queries.T, expected, axis=0)
    )


def test_search_in_falling_and_in_rising_order():
    # Rising: every image displaces the list's last; falling: none does after the first k.
    values = np.arange(1, 101, dtype=np.float32)[:, None]
    query = np.ones((1, 1), np.float32)
    for step in (1, 2**-16):
        ranks = search(query, values * np.float32(step), k=3, block=10)[1]
        assert ranks.ravel().tolist() == [99, 98, 97]
    assert search(query, values[::-1], k=3, block=10)[1].ravel().tolist() == [0, 1, 2]


def test_copies_of_an_image_tie_wherever_they_stand():
    # Copies at places that matrix products treat differently: inside, last, alone in a block.
    generator = np.random.default_rng(1)
    database = normalised(generator, 1001, 384)
    copies = [3, 500, 517, 999, 1000]
    database[copies] = database[3]
    for queries in (database[[3, 8]], database[[3]], normalised(generator, 70, 384)):
        similarities, ranks = search(queries, database, k=1001, block=125)
        where = np.argsort(ranks, axis=0)[copies]
        np.testing.assert_array_equal(np.diff(where, axis=0), 1)
        values = np.take_along_axis(similarities, where, axis=0)
        np.testing.assert_array_equal(values, values[:1].repeat(len(copies), axis=0))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 60])
def test_search_by_float32_products_first_equals_the_sort_of_exact_ones(kind, k):
    generator = np.random.default_rng(3)
    database = normalised(generator, 6001, 64).astype(kind)
    # Near ties that float32 cannot order, copies, and an image that could not be read.
    database[1000:1200] = database[17] + generator.normal(0, 1e-7, (200, 64)).astype(kind)
    database[[5, 6000]] = database[4000]
    database[40] = 0
    queries = np.concatenate([database[[17, 4000]], normalised(generator, 5, 64)])
    queries = queries.astype(np.float32)
    exact = (database.astype(np.float64) @ queries.T.astype(np.float64)).astype(np.float32)
    exact[40] = -np.inf
    expected = np.argsort(-exact, axis=0, kind="stable")[:k]
    for block in (64, 2048):
        similarities, ranks = search(queries, database, k=k, block=block)
        np.testing.assert_array_equal(ranks, expected)
        np.testing.assert_array_equal(similarities, np.take_along_axis(exact, expected, axis=0))


def test_search_where_more_images_nearly_tie_than_are_worth_keeping():
    database = np.ones((3 * NEAR_TIES, 2), np.float32)
    database[-1] = 2
    ranks = search(database[:2], database, k=3)[1]
    assert ranks.tolist() == [[3 * NEAR_TIES - 1] * 2, [0, 0], [1, 1]]


def test_search_where_float32_would_overflow():
    database = np.array([[1e25, 0], [0, 3e25]] * 50, np.float32)
    queries = np.array([[1e-25, 0], [0, 1e10]], np.float32)
    similarities, ranks = search(queries, database, k=2)
    assert ranks.tolist() == [[0, 1], [2, 3]]
    np.testing.assert_allclose(similarities, [[1, 3e35]] * 2, rtol=1e-6)


def test_image_that_could_not_be_read_ranks_last():
    database = np.array([[0, 0], [-1, 0], [0, 1], [0, 0], [1, 0]], np.float32)
    queries = np.array([[1, 0]], np.float32)
    similarities, ranks = search(queries, database, k=5)
    # The row of zeros has a larger product than image 1, and one as large as image 2's.
    assert ranks.ravel().tolist() == [4, 2, 1, 0, 3]
    assert similarities.ravel().tolist() == [1, 0, -1, -np.inf, -np.inf]
    for k in (1, 4):
        assert search(queries, database, k=k, block=2)[1].ravel().tolist() == [4, 2, 1, 0][:k]
    places = labelled_positions(queries, database, [np.arange(5)], block=2)
    assert places.ranks[0].tolist() == [3, 2, 1, 4, 0]


def test_more_queries_than_are_taken_together():
    """As GLDv2's 117,577 test queries: in shares, with the same result."""
    rng = np.random.default_rng(0)
    database = rng.standard_normal((40, 3)).astype(np.float32)
    queries = rng.standard_normal((2 * QUERIES + 5, 3)).astype(np.float32)
    similarities, ranks = search(queries, database, k=4)
    assert similarities.shape == ranks.shape == (4, len(queries))
    products = (queries.astype(float) @ database.T.astype(float)).astype(np.float32)
    np.testing.assert_array_equal(ranks, np.argsort(-products, axis=1, kind="stable")[:, :4].T)
    np.testing.assert_array_equal(similarities, np.take_along_axis(products.T, ranks, axis=0))
    nothing = search(queries, database[:0], k=4)
    assert nothing[0].shape == nothing[1].shape == (0, len(queries))


def test_values_below_float32_are_no_unreadable_image():
    """Rows of 1e-60 stand at 0, before what is negative; a row of zeros stands last."""
    database = np.full((64, 2), -1.0)
    database[5], database[9] = 1e-60, 0
    _, ranks = search(np.ones((1, 2), np.float32), database, k=1)
    assert ranks.tolist() == [[5]]
    _, ranks = search(np.ones((1, 2), np.float32), database, k=64)
    assert ranks[0, 0] == 5 and ranks[-1, 0] == 9


def test_descriptors_without_a_dimension_are_refused():
    with pytest.raises(ValueError, match="no dimension"):
        search(np.ones((2, 0), np.float32), np.ones((100, 0), np.float32), k=1)


def test_empty_database_and_no_queries():
    none, subset = np.empty((0, 4), np.float32), np.ones((3, 4), np.float32)
    assert [a.shape for a in search(subset, none, k=5)] == [(0, 3), (0, 3)]
    assert [a.shape for a in search(none, subset, k=2)] == [(2, 0), (2, 0)]
    assert labelled_positions(none, subset, []).indices == []
    empty = [np.empty(0, np.int64)] * 3
    assert [a.size for a in labelled_positions(subset, none, empty).ranks] == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_descriptors_that_are_not_finite_are_named(bad):
    queries, database = tied(50, 3)
    queries[1, 2] = bad
    with pytest.raises(ValueError, match="descriptor of query 1 is not finite"):
        search(queries, database, k=1)
    queries, database = tied(50, 3)
    database[37, 2] = bad
    queries[:, 2] = 1
    for block in (10, 4096):
        with pytest.raises(ValueError, match="database image 37 is not finite"):
            search(queries, database, k=1, block=block)
        with pytest.raises(ValueError, match="database image 37 is not finite"):
            labelled_positions(queries, database, [np.array([37])] * 3, block=block)


def test_arguments_that_do_not_fit_are_refused():
    queries, database = tied(10, 2)
    with pytest.raises(ValueError, match="queries have 4 dimensions and the database 5"):
        search(queries[:, :4], database, k=1)
    with pytest.raises(ValueError, match="k is 0"):
        search(queries, database, k=0)
    with pytest.raises(ValueError, match="block is 0"):
        search(queries, database, k=1, block=0)
    with pytest.raises(ValueError, match="queries must be a 2-D array of floats"):
        search(queries[0], database, k=1)
    with pytest.raises(ValueError, match="database must be a 2-D array of floats"):
        search(queries, database.astype(int), k=1)
