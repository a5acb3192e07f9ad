"""Search, ranks and short lists against full sorts and hand-made rankings."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from vitgal.data.revisited import GroundTruth, RetrievalDataset, labelled
from vitgal.evaluation.protocol import evaluate
from vitgal.retrieval.exact_ranks import _count_ahead, _steps, labelled_positions
from vitgal.retrieval.exact_search import NEAR_TIES, QUERIES, search
from vitgal.retrieval.ranking import Positions
from vitgal.retrieval.shortlists import (
    candidates,
    read_global_rank,
    read_rerank_paths,
    read_shortlist,
    shortlist,
    shortlist_depth,
    write_global_rank,
    write_rerank_paths,
    write_shortlist,
)


def tied(number, queries, *, seed=0):
    """Small whole numbers: every product is exact and most similarities repeat many times."""
    generator = np.random.default_rng(seed)
    database = generator.integers(-1, 2, (number, 5)).astype(np.float32)
    database[:, 0] = 1  # no row of zeros
    return generator.integers(-1, 2, (queries, 5)).astype(np.float32), database


def full_sort(similarities):
    """(N, Q): best first, ties by lower index; written without numpy's stable sort."""
    columns = [
        sorted(range(len(column)), key=lambda i, column=column: (-column[i], i))
        for column in similarities.T.tolist()
    ]
    return np.array(columns, dtype=np.int64).reshape(similarities.shape[::-1]).T


def normalised(generator, *shape):
    rows = generator.standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def draw_labels(generator, number, queries, count):
    return [np.sort(generator.choice(number, count, replace=False)) for _ in range(queries)]


def small_truth(easy, hard, junk, *, number=8):
    arrays = [[np.array(lists, np.int64)] for lists in (easy, hard, junk)]
    names = [f"im {i}" for i in range(number)]  # with a space, as names may have
    return GroundTruth("small", names, ["the query"], np.array([[1.5, 2, 9, 8.7]]), *arrays)


# Search


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
    none, some = np.empty((0, 4), np.float32), np.ones((3, 4), np.float32)
    assert [a.shape for a in search(some, none, k=5)] == [(0, 3), (0, 3)]
    assert [a.shape for a in search(none, some, k=2)] == [(2, 0), (2, 0)]
    assert labelled_positions(none, some, []).indices == []
    empty = [np.empty(0, np.int64)] * 3
    assert [a.size for a in labelled_positions(some, none, empty).ranks] == [0, 0, 0]


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


# Exact ranks


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_positions_equal_the_full_sort_with_ties(block):
    queries, database = tied(300, 6)
    wanted = [np.arange(300), np.array([], np.int64), np.array([299]), np.array([0])]
    wanted += [np.array([5, 6, 7, 120]), np.array([250, 3, 17])]
    order = full_sort(database @ queries.T)
    places = labelled_positions(queries, database, wanted, block=block)
    for q, index in enumerate(wanted):
        expected = [order[:, q].tolist().index(i) for i in sorted(index)]
        assert places.indices[q].tolist() == sorted(index)
        assert places.ranks[q].tolist() == expected
    assert places.database_size == 300


def test_positions_and_scores_equal_the_full_sort_at_10000(tmp_path):
    # 10,000 images of which 5,000 are labelled ones and copies of others, from a mapped file.
    generator = np.random.default_rng(2)
    database = normalised(generator, 10_000, 48)
    database[9_000:] = database[:1_000]
    queries = normalised(generator, 70, 48)
    np.save(tmp_path / "database.npy", database)
    labels = draw_labels(generator, 5_000, 70, 400)
    parts = [[index[k::3] for index in labels] for k in range(3)]
    names = [str(i) for i in range(5_000)]
    gt = GroundTruth("x", names, [str(q) for q in range(70)], np.zeros((70, 4)), *parts)

    # One product over all, rounded as documented; the sort is numpy's own.
    full = (database.astype(np.float64) @ queries.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-full, axis=0, kind="stable")
    mapped = np.load(tmp_path / "database.npy", mmap_mode="r")
    places = labelled_positions(queries, mapped, labelled(gt))
    expected = Positions.from_ranks(order, labelled(gt))
    for q in range(70):
        np.testing.assert_array_equal(places.ranks[q], expected.ranks[q])
    for k in (3, 100, 10_000):
        np.testing.assert_array_equal(search(queries, mapped, k=k, block=500)[1], order[:k])
    ours, theirs = evaluate(places, gt), evaluate(order, gt)
    for protocol in ours:
        # The required bound; the positions are equal, so the scores are too.
        np.testing.assert_allclose(ours[protocol]["ap"], theirs[protocol]["ap"], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["positions", "search"])
def test_memory_does_not_grow_with_the_database(tmp_path, kind):
    def peak(number):
        path = tmp_path / f"{number}.npy"
        np.save(path, normalised(np.random.default_rng(0), number, 16))
        mapped = np.load(path, mmap_mode="r")
        tracemalloc.start()
        if kind == "positions":
            labelled_positions(mapped[:8].copy(), mapped, [np.arange(0, 4000, 4)] * 8)
        else:
            search(mapped[:8].copy(), mapped, k=50)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    # The documented bound and 0.3 MB for the rest; all similarities in float32 would be 25.6 MB.
    bound = 4 * (90 * 8 + 8 * 16) * 4096 + 300_000
    assert peak(800_000) < bound < 4 * 8 * 800_000 / 1.5


def test_count_holds_where_a_product_comes_out_otherwise_the_second_time():
    # Image 1 was 0.69 at first; its product is now a bit larger.
    larger = np.nextafter(np.float32(0.69), np.float32(1))
    database = np.array([[0.5], [larger], [0.3], [0.8]], np.float32)
    values = [np.array([0.69], np.float32)]
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 2), slice(2, 4)]):
        steps = _steps(database.T, values)
        counts = _count_ahead(np.ones((1, 1)), database, parts, [np.array([1])], values, steps)
        assert counts[0].tolist() == [1]  # it loses to image 3, not to itself


@pytest.mark.parametrize("shape", ["far outliers", "all equal", "tiny", "huge", "no query"])
def test_positions_of_unusual_similarities(shape):
    generator = np.random.default_rng(3)
    database = generator.standard_normal((500, 1)).astype(np.float32)
    if shape == "far outliers":  # the first block says nothing about the range of the rest
        database[:50] *= 1e-4
        database[450:] *= 1e6
    scale = {"all equal": 0, "tiny": 1e-30, "huge": 1e30}.get(shape, 1)
    database = (database * np.float32(scale) + np.float32(shape == "all equal")).astype(np.float32)
    query = np.full((2, 1), shape != "no query", np.float32)
    order = full_sort(database @ query.T)[:, 0].tolist()
    places = labelled_positions(query, database, [np.arange(500), np.array([0, 499])], block=50)
    assert places.ranks[0].tolist() == [order.index(i) for i in range(500)]
    assert places.ranks[1].tolist() == [order.index(0), order.index(499)]


def test_labelled_images_outside_or_repeated_are_refused():
    queries, database = tied(10, 1)
    for index in ([10], [-1], [3, 3]):
        with pytest.raises(ValueError, match="query 0: a labelled image is repeated or outside"):
            labelled_positions(queries, database, [np.array(index)])
    with pytest.raises(ValueError, match="1 queries, but 2 lists"):
        labelled_positions(queries, database, [np.array([1])] * 2)


def test_positions_from_ranks_by_hand():
    ranks = np.array([[2, 0], [0, 1], [1, 2]])
    places = Positions.from_ranks(ranks, [np.array([1, 0]), np.array([2])])
    assert [a.tolist() for a in places.indices] == [[0, 1], [2]]
    assert [a.tolist() for a in places.ranks] == [[1, 2], [2]]
    assert places.database_size == 3


def test_truncated_ranks_leave_out_what_they_miss():
    ranks = np.array([[7], [2]], np.int32)
    with pytest.raises(ValueError, match="does not reach the labelled image 5"):
        Positions.from_ranks(ranks, [np.array([2, 5])], database_size=8)
    places = Positions.from_ranks(ranks, [np.array([2, 5])], database_size=8, truncated=True)
    assert (places.indices[0].tolist(), places.ranks[0].tolist()) == ([2], [1])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0, 1, 1], "holds image 1 twice"),
        ([0, 1, 3], "index 3, outside"),
        ([0, 1, -1], "index -1, outside"),
    ],
)
def test_rankings_that_are_none_are_refused(column, message):
    with pytest.raises(ValueError, match=f"ranking of query 0 .*{message}"):
        Positions.from_ranks(np.array(column)[:, None], [np.array([0])])


def test_rankings_of_another_shape_or_kind_are_refused():
    for ranks in (np.zeros((3, 2), int), np.zeros(3, int), np.zeros((3, 1))):
        with pytest.raises(ValueError, match="integer array"):
            Positions.from_ranks(ranks, [np.array([0])])


def test_positions_round_trip(tmp_path):
    for lists in ([[0, 3], [], [2]], [[]], []):
        arrays = [np.array(values, np.int64) for values in lists]
        places = Positions(arrays, [array[::-1] + 1 for array in arrays], 9)
        again = Positions.load(places.save(tmp_path / "positions.npz"))
        assert [a.tolist() for a in again.indices] == lists
        assert [a.tolist() for a in again.ranks] == [a.tolist() for a in places.ranks]
        assert again.database_size == 9


def test_other_files_are_not_taken_for_positions(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "text.npz").write_text("positions")
    for name in ("other", "torn", "text"):
        with pytest.raises(ValueError, match=rf"{name}\.npz does not hold positions"):
            Positions.load(tmp_path / f"{name}.npz")


def test_impossible_positions_are_refused():
    def make(index, place):
        return Positions([np.array(index)], [np.array(place)], 5)

    for index, place in (([0, 1], [2, 2]), ([1, 0], [2, 3]), ([0, 5], [1, 2]), ([0], [5])):
        with pytest.raises(ValueError, match="query 0"):
            make(index, place)
    with pytest.raises(ValueError, match="2 images, but 1 ranks"):
        make([0, 1], [2])


# Short lists


def test_candidates_by_hand():
    gt = small_truth(easy=[4], hard=[6], junk=[1])
    ranks = np.array([[1], [4], [0], [6], [2], [3], [5], [7]])
    # Easy ignores 6 and 1, Medium 1, Hard 4 and 1; the published list ignores nothing.
    expected = {"easy": [4, 0], "medium": [4, 0], "hard": [0, 6], "published": [1, 4]}
    for protocol, images in expected.items():
        assert candidates(ranks, gt, protocol, top=2)[0].tolist() == images
    assert shortlist(ranks, gt, top=2)[0].tolist() == [1, 4, 0, 6]
    # What is ignored stands behind the first two: they are the candidates of every protocol.
    far = np.array([[0], [2], [3], [5], [7], [1], [4], [6]])
    for protocol in expected:
        assert candidates(far, gt, protocol, top=2)[0].tolist() == [0, 2]


def test_short_list_needs_the_top_and_all_that_a_query_ignores():
    gt = small_truth(easy=[4, 5], hard=[6], junk=[1])
    # Hard ignores three images, Easy two, Medium one.
    assert shortlist_depth(gt, 100, top=2) == 5
    assert shortlist_depth(gt, 4, top=2) == 4
    ranks = np.array([[1], [4], [5], [0], [6], [2], [3], [7]])
    assert shortlist(ranks[:5], gt, top=2)[0].tolist() == [1, 4, 5, 0, 6]
    np.testing.assert_array_equal(shortlist(ranks[:5], gt, top=2), shortlist(ranks, gt, top=2))
    with pytest.raises(ValueError, match=r"4 ranks leave 1 of 2 candidates to query 0 \(hard\)"):
        shortlist(ranks[:4], gt, top=2)


def test_short_list_of_a_small_database_is_all_of_it():
    gt = small_truth(easy=[0], hard=[], junk=[1], number=3)
    ranks = np.array([[1], [2], [0]])
    assert shortlist(ranks, gt, top=100)[0].tolist() == [1, 2, 0]
    assert candidates(ranks, gt, "medium", top=100)[0].tolist() == [2, 0]


def test_candidates_of_another_shape_or_protocol_are_refused():
    gt = small_truth(easy=[0], hard=[], junk=[], number=3)
    with pytest.raises(ValueError, match="ranking of 1 queries"):
        candidates(np.zeros((3, 2), int), gt, "easy")
    with pytest.raises(ValueError, match="unknown protocol 'all'"):
        candidates(np.zeros((3, 1), int), gt, "all")


# Files


def test_short_list_file_round_trip(tmp_path):
    path = write_shortlist(
        tmp_path / "shortlist.txt",
        [np.array([2, 0]), np.array([], int), np.array([1])],
        queries=["q 1", "q2", "q3"],
        database=["a b", "c", "d"],
    )
    assert path.read_text() == "q 1\td\nq 1\ta b\nq3\tc\n"
    assert read_shortlist(path) == {"q 1": ["d", "a b"], "q3": ["c"]}


def test_short_list_refuses_names_and_lines_it_could_not_read_back(tmp_path):
    for name in ("a\tb", "a\nb", ""):
        with pytest.raises(ValueError, match="rename the image"):
            write_shortlist(tmp_path / "s.txt", [np.array([0])], queries=["q"], database=[name])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s.txt").write_text("q\ta\nq b\n")
    with pytest.raises(ValueError, match="line 2"):
        read_shortlist(tmp_path / "s.txt")


def make_dataset():
    gt = small_truth(easy=[], hard=[], junk=[], number=3)
    paths = [Path("../sets/jpg") / f"{name}.jpg" for name in gt.database]
    return RetrievalDataset("small", gt, gt.database, paths, [Path("../sets/jpg/the query.jpg")])


def test_published_rerank_paths_round_trip(tmp_path):
    path = write_rerank_paths(
        tmp_path / "rerank_path.txt", make_dataset(), lists=[np.array([2, 0])]
    )
    # Boxes lose their fractions, as published; an image in the database has none.
    assert path.read_text().splitlines() == [
        "../sets/jpg/the query.jpg 1 2 9 8",
        "../sets/jpg/im 2.jpg -1 -1 -1 -1",
        "../sets/jpg/im 0.jpg -1 -1 -1 -1",
    ]
    assert read_rerank_paths(path) == [
        (
            "../sets/jpg/the query.jpg",
            (1, 2, 9, 8),
            ["../sets/jpg/im 2.jpg", "../sets/jpg/im 0.jpg"],
        )
    ]


def test_published_rerank_paths_of_several_queries(tmp_path):
    text = "q1.jpg 0 0 5 5\na.jpg -1 -1 -1 -1\nq2.jpg 1 1 6 6\nq3.jpg 2 2 7 7\na.jpg -1 -1 -1 -1\n"
    (tmp_path / "rerank_path.txt").write_text(text)
    assert read_rerank_paths(tmp_path / "rerank_path.txt") == [
        ("q1.jpg", (0, 0, 5, 5), ["a.jpg"]),
        ("q2.jpg", (1, 1, 6, 6), []),
        ("q3.jpg", (2, 2, 7, 7), ["a.jpg"]),
    ]


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg 1 2 3", "a.jpg 1 2 3 x", "a.jpg -1 -1 -1 -1"])
def test_other_lines_are_no_rerank_paths(tmp_path, line):
    (tmp_path / "rerank_path.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read_rerank_paths(tmp_path / "rerank_path.txt")


def test_published_global_rank_round_trip(tmp_path):
    queries, database = tied(40, 3)
    ranks = search(queries, database, k=40)[1]
    path = write_global_rank(tmp_path / "global_rank.npy", ranks)
    stored = np.load(path)
    assert (stored.dtype, stored.shape, stored.flags.c_contiguous) == (np.int64, (40, 3), True)
    np.testing.assert_array_equal(read_global_rank(path), ranks)


def test_other_arrays_are_no_global_rank(tmp_path):
    np.save(tmp_path / "floats.npy", np.zeros((3, 2)))
    np.save(tmp_path / "flat.npy", np.zeros(3, int))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    for name in ("floats", "flat", "torn"):
        with pytest.raises(ValueError, match=rf"{name}\.npy is no"):
            read_global_rank(tmp_path / f"{name}.npy")
