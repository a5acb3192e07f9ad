"""Places: the rule by which pairs connect, worked out by hand."""

import itertools

import numpy as np
import pytest

from vitgal.retrieval.places import group_places

TRIANGLES = [(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5)]


def groups(pairs, probabilities=None, threshold=0.5) -> list[set[int]]:
    probabilities = np.full(len(pairs), 0.9) if probabilities is None else probabilities
    return [set(place.members.tolist()) for place in group_places(pairs, probabilities, threshold)]


def test_one_wrong_pair_merges_no_two_places():
    for wrong in itertools.product(range(3), range(3, 6)):
        pairs = [*TRIANGLES, wrong]
        assert groups(pairs, [0.6] * 6 + [1.0]) == [{0, 1, 2}, {3, 4, 5}]
    assert groups([*TRIANGLES, (0, 3), (1, 4)]) == [{0, 1, 2, 3, 4, 5}]  # two do


def test_one_wrong_pair_merges_no_two_pairs():
    """The wrong one is the strongest, the weakest or between: nothing has four photographs."""
    for wrong in (0.55, 0.75, 0.95):
        found = groups([(0, 1), (2, 3), (1, 2)], [0.7, 0.8, wrong])
        assert max(map(len, found)) == 2


def test_what_is_alone_joins_by_its_strongest_link():
    pairs = [*TRIANGLES, (6, 0), (6, 3), (7, 6), (8, 9)]
    # 6 closes no circle: each of its links is a bridge; 7 is linked to no place, only to 6
    assert groups(pairs) == [{0, 1, 2, 6}, {3, 4, 5}, {8, 9}]
    assert groups(pairs, [0.8] * 7 + [0.9] * 3) == [{3, 4, 5, 6}, {0, 1, 2}, {8, 9}]
    assert groups([*TRIANGLES, (6, 0)]) == [{0, 1, 2, 6}, {3, 4, 5}]
    assert groups([*TRIANGLES, (0, 6), (6, 7)], [0.6] * 6 + [0.7, 0.9]) == [
        *({0, 1, 2}, {3, 4, 5}, {6, 7}),
    ]


def test_the_threshold_and_the_best():
    pairs, probabilities = [(0, 1), (1, 2), (0, 2), (2, 3)], [0.9, 0.8, 0.7, 0.5]
    (place,) = group_places(pairs, probabilities, 0.5)
    assert place.members.tolist() == [2, 1, 0, 3]  # 0.8 + 0.7 + 0.5, 0.9 + 0.8, 0.9 + 0.7, 0.5
    np.testing.assert_allclose(place.support, [2.0, 1.7, 1.6, 0.5])
    assert place.links.tolist() == [3, 2, 2, 1]
    assert groups(pairs, probabilities, 0.51) == [{0, 1, 2}]
    assert groups(pairs, probabilities, 0.95) == []
    order = [3, 1, 0, 2]
    mirrored = group_places([pairs[i][::-1] for i in order], [probabilities[i] for i in order], 0.5)
    assert mirrored[0].members.tolist() == [2, 1, 0, 3]


def test_no_pair_and_wrong_input():
    assert group_places(np.zeros((0, 2), int), []) == []
    assert groups([(3, 3)]) == []  # a photograph and itself
    with pytest.raises(ValueError, match="1 pairs and 2 probabilities"):
        group_places([(0, 1)], [0.5, 0.6])
