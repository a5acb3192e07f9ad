"""Properties that hold for any input: search, ranks, reranking, matching, files of short lists."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.retrieval_cases import random_benchmark
from vitgal.data.revisited import GroundTruth, RetrievalDataset, ignored, labelled
from vitgal.retrieval import shortlists
from vitgal.retrieval.exact_ranks import labelled_positions
from vitgal.retrieval.exact_search import search
from vitgal.retrieval.matching import match
from vitgal.retrieval.ranking import Positions, Ranking, Reranking, padded, rerank
from vitgal.retrieval.shortlists import (
    read_rerank_paths,
    read_shortlist,
    write_rerank_paths,
    write_shortlist,
)

# Values of which products repeat, so that similarities tie, beside values that nearly tie.
FEW_VALUES = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0000001])
# All sums of products of such values are exact in float64, in whatever order they are added up.
ANY_VALUES = st.integers(-(2**12), 2**12).map(lambda number: number / 64)
BLOCKS = st.sampled_from([1, 3, 2048])


@st.composite
def descriptor_pairs(draw, *, most: int = 40, dtype: type = np.float32):
    """Two sets of descriptors of one width; the second repeats some of its rows."""
    width = draw(st.integers(1, 6))
    values = draw(st.sampled_from([FEW_VALUES, ANY_VALUES]))
    left, right = (
        draw(arrays.arrays(dtype, (draw(st.integers(0, size)), width), elements=values))
        for size in (5, most)
    )
    if len(right):
        repeated = draw(st.lists(st.integers(0, len(right) - 1), max_size=5))
        right = np.concatenate([right, right[repeated]])
    return left, right


def stable_sort(queries: np.ndarray, database: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and ranks (N, Q) of the whole database by one stable argsort."""
    products = (database.astype(np.float64) @ queries.T.astype(np.float64)).astype(np.float32)
    products[~database.any(axis=1)] = -np.inf
    order = np.argsort(-products, axis=0, kind="stable")
    return np.take_along_axis(products, order, axis=0), order


@given(descriptor_pairs(), st.integers(1, 60), BLOCKS)
def test_search_equals_a_stable_argsort(pair, k, block):
    queries, database = pair
    expected, order = stable_sort(queries, database)
    similarities, ranks = search(queries, database, k=k, block=block)
    np.testing.assert_array_equal(ranks, order[:k])
    np.testing.assert_array_equal(similarities, expected[:k])


@given(descriptor_pairs(), st.randoms(use_true_random=False), BLOCKS)
def test_exact_ranks_equal_reading_off_the_argsort(pair, random, block):
    queries, database = pair
    images = range(len(database))
    labels = [np.array(random.sample(images, min(7, len(images))), np.int64) for _ in queries]
    positions = labelled_positions(queries, database, labels, block=block)
    if len(database):
        expected = Positions.from_ranks(stable_sort(queries, database)[1], labels)
        for counted, by_sort in zip(positions.ranks, expected.ranks, strict=True):
            np.testing.assert_array_equal(counted, by_sort)


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(["global", "published"]))
def test_reranked_positions_equal_reading_off_the_reranked_order(seed, top, ties):
    truth, order = random_benchmark(30, 3, seed)
    candidates = padded(shortlists.shortlist(order, truth, top=top))
    counts = np.random.default_rng(seed).integers(0, 4, candidates.shape)
    counts[candidates < 0] = -1
    ranking = Ranking(order, Positions.from_ranks(order, labelled(truth)))
    for protocol in ("easy", "medium", "hard", "published"):
        reranked = ranking.reranked(Reranking(candidates, counts, truth, protocol, top, ties))
        full = rerank(
            order,
            counts,
            candidates=candidates,
            ground_truth=truth,
            protocol=protocol,
            top=top,
            ties=ties,
        )
        np.testing.assert_array_equal(reranked.order, full)
        np.testing.assert_array_equal(np.sort(full, axis=0), np.sort(order, axis=0))
        expected = Positions.from_ranks(full, labelled(truth))
        for moved, by_order in zip(reranked.positions.ranks, expected.ranks, strict=True):
            np.testing.assert_array_equal(moved, by_order)


@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from(["easy", "medium", "hard"]))
def test_ranks_without_ignored_images_are_those_of_the_shortened_order(seed, length, protocol):
    truth, order = random_benchmark(30, 2, seed)
    ranking = Ranking(order[:length], Positions.from_ranks(order, labelled(truth)))
    for query in range(2):
        left_out = ignored(truth, protocol)[query]
        shortened = order[~np.isin(order[:, query], left_out), query].tolist()
        existing = np.union1d(order[:length, query], labelled(truth)[query])
        ranks = ranking.rank(query, np.arange(30), left_out)
        plain = ranking.rank(query, np.arange(30))
        for image in range(30):
            if image not in existing:
                assert ranks[image] == plain[image] == -1
                continue
            assert plain[image] == order[:, query].tolist().index(image)
            if image in shortened:
                assert ranks[image] == shortened.index(image)


def brute_force(query: np.ndarray, gallery: np.ndarray, max_distance: float) -> list[list[int]]:
    """Every distance in float64; strictly nearer, of equal ones the lowest index."""
    matches = []
    for index, descriptor in enumerate(query.astype(np.float64)):
        squares = ((gallery.astype(np.float64) - descriptor) ** 2).cumsum(axis=1)[:, -1]
        if squares.size and squares.min() < max_distance * max_distance:
            matches.append([index, int(np.argmin(squares))])
    return matches


# Multiples of 1/8 below 2: every square and sum is exact, in whatever order it is added up.
EIGHTHS = st.integers(-16, 16).map(lambda number: number / 8)


@given(
    st.data(),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.125, 0.5, 1.0, 2.0, math.inf]),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_match_equals_brute_force(data, width, max_distance, dtype):
    query, gallery = (
        data.draw(arrays.arrays(dtype, (data.draw(st.integers(0, size)), width), elements=EIGHTHS))
        for size in (6, 40)
    )
    gallery = np.concatenate([gallery, query[::2], gallery[:3]])  # equal ones, and ties
    assert match(query, gallery, max_distance).tolist() == brute_force(query, gallery, max_distance)


@pytest.fixture(scope="module")
def list_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lists")


NAMES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\t\n\r\0\ufeff"), min_size=1
)
UNIQUE_NAMES = st.lists(NAMES, min_size=1, max_size=6, unique=True)


@given(UNIQUE_NAMES, UNIQUE_NAMES, st.data())
def test_short_list_is_read_as_it_was_written(list_folder, queries, database, data):
    path = list_folder / "shortlist.txt"
    indices = st.lists(st.integers(0, len(database) - 1), max_size=5)
    lists = [data.draw(indices) for _ in queries]
    rows = [np.array(row, np.int64) for row in lists]
    write_shortlist(path, rows, queries=queries, database=database)
    expected = {
        query: [database[index] for index in row]
        for query, row in zip(queries, lists, strict=True)
        if row
    }
    assert read_shortlist(path) == expected


@given(UNIQUE_NAMES, UNIQUE_NAMES, st.data())
def test_published_list_is_read_as_it_was_written(list_folder, queries, database, data):
    path = list_folder / "rerank_path.txt"
    boxes = data.draw(arrays.arrays(np.float64, (len(queries), 4), elements=st.floats(0, 1e4)))
    empty = [np.empty(0, np.int64) for _ in queries]
    truth = GroundTruth("names", database, queries, boxes, empty, empty, empty)
    dataset = RetrievalDataset("names", truth, database, database, queries)
    indices = st.lists(st.integers(0, len(database) - 1), max_size=5)
    lists = [np.array(data.draw(indices), np.int64) for _ in queries]
    write_rerank_paths(path, dataset, lists=lists)
    assert read_rerank_paths(path) == [
        (query, tuple(box.astype(int).tolist()), [database[index] for index in row])
        for query, box, row in zip(queries, boxes, lists, strict=True)
    ]


WORDS = st.sampled_from(["a", "b c", "-1", "12", "3.5", "", "\t"])
LINES = st.one_of(
    st.text(max_size=20),
    st.lists(WORDS, max_size=8).map(" ".join),
    st.lists(WORDS, max_size=4).map("\t".join),
)
TEXTS = st.lists(LINES, max_size=5).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))


@pytest.mark.parametrize("read", [read_shortlist, read_rerank_paths])
@given(st.one_of(st.binary(max_size=60), TEXTS))
def test_readers_of_lists_raise_nothing_but_a_value_error(list_folder, read, content):
    path = list_folder / "list.txt"
    path.write_bytes(content)
    try:
        lists = read(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert len(lists) <= content.count(b"\n") + content.count(b"\r") + 1
