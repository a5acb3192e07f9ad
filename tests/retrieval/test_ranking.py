"""Rankings: ranks with and without ignored images, files, refusals."""

import numpy as np
import pytest

from vitgal.retrieval.ranking import Positions


def test_positions_from_ranks_by_hand():
    ranks = np.array([[2, 0], [0, 1], [1, 2]])
    places = Positions.from_ranks(ranks, [np.array([1, 0]), np.array([2])])
    assert [a.tolist() for a in places.indices] == [[0, 1], [2]]
    assert [a.tolist() for a in places.ranks] == [[1, 2], [2]]
    assert places.database_size == 3


def test_truncated_ranks_leave_out_missing_images():
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
def test_invalid_rankings_are_refused(column, message):
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
