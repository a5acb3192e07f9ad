"""Short lists by hand, and the published files."""

from pathlib import Path

import numpy as np
import pytest

from tests.retrieval_cases import tied
from vitgal.data.revisited import GroundTruth, RetrievalDataset
from vitgal.retrieval.exact_search import search
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


def small_truth(easy, hard, junk, *, number=8):
    arrays = [[np.array(lists, np.int64)] for lists in (easy, hard, junk)]
    names = [f"im {i}" for i in range(number)]  # with a space, as names may have
    return GroundTruth("small", names, ["the query"], np.array([[1.5, 2, 9, 8.7]]), *arrays)


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
        with pytest.raises(ValueError, match=rf"{name}\.npy (is not|holds no)"):
            read_global_rank(tmp_path / f"{name}.npy")
