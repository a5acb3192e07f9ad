"""Exact ranks of labelled images against full sorts."""

import tracemalloc

import numpy as np
import pytest

from tests.retrieval_cases import draw_labels, full_sort, normalised, tied
from vitgal.data.revisited import GroundTruth, labelled
from vitgal.evaluation.protocol import evaluate
from vitgal.retrieval.exact_ranks import _similarity_steps, count_ahead, labelled_positions
from vitgal.retrieval.exact_search import search
from vitgal.retrieval.ranking import Positions


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
    actual, reference = evaluate(places, gt), evaluate(order, gt)
    for protocol in actual:
        # The required bound; the positions are equal, so the scores are too.
        np.testing.assert_allclose(
            actual[protocol]["ap"], reference[protocol]["ap"], rtol=0, atol=1e-12
        )


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
        steps = _similarity_steps(database.T, values)
        counts = count_ahead(np.ones((1, 1)), database, parts, [np.array([1])], values, steps)
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
