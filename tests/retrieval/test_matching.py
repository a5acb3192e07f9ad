"""Matching against a KD-tree and a brute-force float64 search."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from tests.retrieval_cases import unit
from vitgal.retrieval import matching
from vitgal.retrieval.matching import match


def tree_matches(query: np.ndarray, gallery: np.ndarray, max_distance: float) -> np.ndarray:
    """The published way: a float64 KD-tree whose bound is strict."""
    _, result = cKDTree(gallery).query(query, distance_upper_bound=max_distance)
    matched = np.flatnonzero(result != len(gallery))
    return np.column_stack([matched, result[matched]])


def tree_distances(query: np.ndarray, gallery: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Distances of given pairs as the KD-tree computes them: one tree a gallery descriptor."""
    return np.array([cKDTree(gallery[[g]]).query(query[q])[0] for q, g in matches])


def test_match_by_hand():
    query = np.array([[1, 0], [0, 1], [0, -1]], np.float32)
    gallery = np.array([[0, 0.5], [0.5, 0], [0.75, 0]], np.float32)
    # Nearest: query 0 -> gallery 2 at 0.25; query 1 -> gallery 0 at 0.5; query 2 -> gallery 1 and 2
    # at sqrt(1.25), sqrt(1.5625) and gallery 0 at 1.5: gallery 1, too far.
    assert match(query, gallery, 0.82).tolist() == [[0, 2], [1, 0]]
    assert match(query, gallery, math.inf).tolist() == [[0, 2], [1, 0], [2, 1]]
    assert match(query, gallery, 0.82).dtype == np.int64


def test_match_bound_is_strict():
    query, gallery = np.zeros((1, 3), np.float32), np.array([[0, 0.5, 0]], np.float32)
    assert len(match(query, gallery, 0.5)) == 0
    assert len(match(query, gallery, np.nextafter(0.5, 1))) == 1
    assert len(match(gallery, gallery, 0.0)) == 0


def test_match_is_one_way_and_many_to_one():
    query = np.array([[0.0], [0.1], [0.2]], np.float32)
    gallery = np.array([[0.05], [9.0]], np.float32)
    assert match(query, gallery).tolist() == [[0, 0], [1, 0], [2, 0]]
    assert match(gallery, query, math.inf).tolist() == [[0, 0], [1, 2]]


def test_match_ties_go_to_the_lowest_index():
    gallery = np.repeat(unit(np.random.default_rng(0).standard_normal((5, 16))), 3, axis=0)
    shuffled = np.random.default_rng(1).permutation(15)
    lowest = [int(np.flatnonzero(shuffled // 3 == group)[0]) for group in range(5)]
    assert match(gallery[::3], gallery[shuffled])[:, 1].tolist() == lowest


@pytest.mark.parametrize("count, size, width", [(300, 400, 128), (40, 1, 7), (1, 60, 3), (9, 9, 1)])
@pytest.mark.parametrize("max_distance", [0.5, 0.82, 0.95, math.inf])
def test_match_equals_the_kd_tree(count, size, width, max_distance):
    rng = np.random.default_rng(count + width)
    gallery = unit(rng.standard_normal((size, width)))
    near = gallery[rng.integers(size, size=count)]
    # From copies to strangers, so that some matches lie on either side of each bound.
    query = near + (rng.random((count, 1)) * rng.standard_normal((count, width))).astype("f4") / 4
    matches = match(query, gallery, max_distance)
    if width > 1:  # in one dimension all are +-1: nothing but ties
        np.testing.assert_array_equal(matches, tree_matches(query, gallery, max_distance))
    assert matches[:, 0].tolist() == tree_matches(query, gallery, max_distance)[:, 0].tolist()


def test_match_equals_the_kd_tree_where_distances_tie_but_for_rounding():
    # All coordinates of a query are equal and all gallery descriptors are permutations of one:
    # every distance is the same number, summed in another order. float32 sees nothing but noise.
    rng = np.random.default_rng(0)
    values = rng.standard_normal(130).astype(np.float32)
    gallery = np.stack([rng.permutation(values) for _ in range(200)])
    query = np.repeat(rng.standard_normal((30, 1)).astype(np.float32), 130, axis=1)
    actual, reference = match(query, gallery, math.inf), tree_matches(query, gallery, math.inf)
    np.testing.assert_array_equal(
        tree_distances(query, gallery, actual), tree_distances(query, gallery, reference)
    )
    assert (actual[:, 1] <= reference[:, 1]).all() and len(actual) == 30


def test_match_near_ties_that_float32_cannot_tell_apart():
    # Gallery descriptors a few 1e-9 apart around the nearest: products in float32 are all equal.
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 64))
    gallery = np.concatenate([base + 1e-9 * rng.standard_normal((50, 64)) for _ in range(8)])
    query = base + 0.01 * rng.standard_normal((50, 64))
    np.testing.assert_array_equal(match(query, gallery), tree_matches(query, gallery, 0.82))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e6])
def test_match_at_any_scale(scale):
    rng = np.random.default_rng(3)
    query, gallery = scale * rng.standard_normal((2, 80, 20))
    bound = scale * 4.5
    assert 0 < len(match(query, gallery, bound)) < 80
    np.testing.assert_array_equal(match(query, gallery, bound), tree_matches(query, gallery, bound))


@pytest.mark.parametrize("kind", ["strangers", "one long first value", "lengths", "all alike"])
def test_match_with_the_shorter_product_first(kind):
    """Where it rules out nearly all pairs, and where it rules out too few."""
    rng = np.random.default_rng(6)
    gallery = rng.standard_normal((500, 128)).astype(np.float32)
    if kind == "one long first value":
        gallery[:, 0] *= 30
    if kind == "lengths":
        gallery *= rng.uniform(0.1, 1, (500, 1)).astype(np.float32)
    if kind == "all alike":
        gallery[:, :120] = gallery[0, :120]
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True) if kind != "lengths" else 11
    near = gallery[rng.integers(500, size=300)]
    query = near + (rng.random((300, 1)) * rng.standard_normal((300, 128))).astype("f4") / 6
    prepared = [matching.Descriptors.read(item, "one") for item in (query, gallery)]
    left = matching.NearestSearch(*prepared, 0.82).sieved(slice(0, 300))
    assert (left is None) == (kind != "strangers")
    matches = match(query, gallery)
    assert 50 < len(matches) <= 300
    np.testing.assert_array_equal(matches, tree_matches(query, gallery, 0.82))
    if left is not None:
        assert set(map(tuple, matches)) <= set(zip(*map(np.ndarray.tolist, left), strict=True))


def test_match_in_blocks_equals_match_at_once(monkeypatch):
    rng = np.random.default_rng(4)
    query, gallery = unit(rng.standard_normal((50, 8))), unit(rng.standard_normal((30, 8)))
    whole = match(query, gallery)
    monkeypatch.setattr("vitgal.retrieval.matching.BLOCK", 70)  # two query rows at a time
    monkeypatch.setattr("vitgal.retrieval.matching.PAIRS", 7)
    np.testing.assert_array_equal(match(query, gallery), whole)


def test_match_reads_half_precision_and_integers_exactly():
    half = np.array([[0.5, 0.25], [1, 0]], np.float16)
    assert match(half, half).tolist() == [[0, 0], [1, 1]]
    codes = np.array([[3, 200], [250, 9]], np.uint8)  # differences would wrap round in uint8
    assert match(codes, codes[::-1], 1.0).tolist() == [[0, 1], [1, 0]]


def test_match_without_descriptors():
    none, subset = np.empty((0, 4), np.float32), np.ones((3, 4), np.float32)
    for query, gallery in ((none, subset), (subset, none), (none, none), (subset, np.ones((0, 0)))):
        assert match(query, gallery).shape == (0, 2)


@pytest.mark.parametrize("max_distance", [0.5, 0.82, math.inf])
@pytest.mark.parametrize("kind", ["random", "copies", "near ties", "long", "one number wide"])
def test_match_on_a_device_equals_numpy_and_the_kd_tree(kind, max_distance):
    """On the processor, the only device here; a GPU sums in another order, which slack allows."""
    rng = np.random.default_rng(8)
    gallery = unit(rng.standard_normal((300, 1 if kind == "one number wide" else 64)))
    if kind == "copies":  # each descriptor stands three times
        gallery = gallery[rng.integers(100, size=300)]
    if kind == "near ties":  # that float32 products cannot tell apart
        gallery = np.tile(gallery[:60].astype(np.float64), (5, 1))
        gallery += 1e-9 * rng.standard_normal(gallery.shape)
    if kind == "long":  # lengths of descriptors that nobody normalised
        gallery *= rng.uniform(0.5, 2, (300, 1)).astype(np.float32)
    query = gallery[rng.integers(300, size=200)] + 0.0
    query[::2] += rng.random((100, 1)) * rng.standard_normal((100, gallery.shape[1])) / 6
    matches = match(query, gallery, max_distance)
    np.testing.assert_array_equal(match(query, gallery, max_distance, device="cpu"), matches)
    assert 100 <= len(matches) <= 200
    if kind not in ("copies", "one number wide"):  # the tree takes any of equal ones
        np.testing.assert_array_equal(matches, tree_matches(query, gallery, max_distance))


def reference_matches(query, gallery, max_distance, method, ratio) -> list[list[int]]:
    """Every distance in float64, one pair at a time; of equal ones the lowest index."""
    squares = [[float(((u - v) ** 2).sum()) for v in gallery] for u in query]
    found = []
    for i, row in enumerate(squares):
        j = row.index(min(row))
        others = row[:j] + row[j + 1 :]
        column = [other[j] for other in squares]
        near = row[j] < max_distance**2
        mutual = column.index(min(column)) == i
        distinct = not others or row[j] < ratio**2 * min(others)
        if near and (mutual or "mutual" not in method) and (distinct or "ratio" not in method):
            found.append([i, j])
    return found


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("method", ["one_way", "mutual", "ratio", "mutual_ratio"])
@pytest.mark.parametrize("kind", ["strangers", "crowded", "copies", "near ties", "one"])
def test_every_method_equals_a_float64_search(kind, method, device, monkeypatch):
    """Distances of integers and near ties are exact in any order of summing."""
    rng = np.random.default_rng(11)
    gallery = rng.integers(-9, 10, (70, 8)).astype(np.float64)
    if kind == "crowded":
        gallery[35:] = gallery[:35] + rng.integers(0, 2, (35, 8))
    if kind == "copies":
        gallery = gallery[rng.integers(20, size=70)]
    if kind == "near ties":  # float32 cannot tell these apart
        gallery = np.tile(gallery[:14], (5, 1)) + 2.0**-30 * rng.integers(0, 4, (70, 1))
    if kind == "one":
        gallery = gallery[:1]
    query = gallery[rng.integers(len(gallery), size=60)] + rng.integers(-2, 3, (60, 8))
    monkeypatch.setattr("vitgal.retrieval.matching.BLOCK", 1000)  # several blocks
    for max_distance in (3.0, 6.0, math.inf):
        options = {"method": method, "ratio": 0.75}
        wanted = reference_matches(query, gallery, max_distance, *options.values())
        found = match(query, gallery, max_distance, **options, device=device)
        assert found.tolist() == wanted and found.dtype == np.int64


@pytest.mark.parametrize("method", ["ratio", "mutual_ratio"])
def test_ratios_that_float32_cannot_tell_from_the_limit(method):
    """The second nearest lies at 1 / ratio of the nearest, times 1 - 1e-9 or 1 + 1e-9 in turns."""
    rng = np.random.default_rng(5)
    query = unit(rng.standard_normal((100, 64))).astype(np.float64)
    near, far = (unit(rng.standard_normal((100, 64))).astype(np.float64) for _ in range(2))
    sizes = [np.linalg.norm(side, axis=1, keepdims=True) for side in (near, far)]
    factor = 1 + 1e-9 * np.tile([[-1], [1]], (50, 1))
    gallery = np.concatenate([
        query + 0.2 * near / sizes[0],
        query + 0.2 / 0.8 * factor * far / sizes[1],
    ])  # fmt: skip
    wanted = [[i, i] for i in range(1, 100, 2)]
    assert match(query, gallery, math.inf, method=method, ratio=0.8).tolist() == wanted


def test_methods_by_hand():
    query = np.array([[0.0], [0.1], [3.0]], np.float32)
    gallery = np.array([[0.04], [2.0], [4.5]], np.float32)
    # Nearest: 0 -> 0 at 0.04, 1 -> 0 at 0.06, 2 -> 1 at 1, whose second is 2 at 1.5.
    assert match(query, gallery, 9.0).tolist() == [[0, 0], [1, 0], [2, 1]]
    assert match(query, gallery, 9.0, method="mutual").tolist() == [[0, 0], [2, 1]]
    assert match(query, gallery, 9.0, method="ratio", ratio=0.6).tolist() == [[0, 0], [1, 0]]
    assert match(query, gallery, 9.0, method="ratio", ratio=0.7).tolist() == [
        [0, 0],
        [1, 0],
        [2, 1],
    ]
    assert match(query, gallery, 9.0, method="mutual_ratio", ratio=0.6).tolist() == [[0, 0]]
    # The second nearest counts beyond the limit as well: 1.5 / 1 is above 1.2.
    assert match(query, gallery, 1.2, method="ratio", ratio=0.7)[-1].tolist() == [2, 1]


def test_methods_without_neighbours_and_with_equal_ones():
    one, two = np.ones((1, 3)), np.ones((2, 3))
    for method in ("mutual", "ratio", "mutual_ratio"):
        assert match(one, one + 1, 0.5, method=method).shape == (0, 2)
        assert match(np.empty((0, 3)), one, 0.5, method=method).shape == (0, 2)
        assert match(one, one, 0.5, method=method).tolist() == [[0, 0]]
    assert match(two, two, method="mutual").tolist() == [[0, 0]]  # of equal ones the lowest
    assert match(one, two, method="ratio", ratio=1.0).shape == (0, 2)  # none is the nearer


@pytest.mark.parametrize("width", [128, 64, 7])
def test_mutual_matches_are_the_same_from_either_side(width):
    rng = np.random.default_rng(width)
    gallery = unit(rng.standard_normal((400, width)))
    query = gallery[rng.integers(400, size=300)] + rng.normal(0, 0.05, (300, width)).astype("f4")
    there = match(query, gallery, 0.9, method="mutual")
    back = match(gallery, query, 0.9, method="mutual")
    assert sorted(map(tuple, back[:, ::-1])) == list(map(tuple, there)) and len(there) > 100
    one_way = match(query, gallery, 0.9)
    assert len(there) < len(one_way) and set(map(tuple, there)) <= set(map(tuple, one_way))
    _, nearest = cKDTree(query).query(gallery)  # the published way, from the other side
    wanted = [[i, j] for i, j in one_way.tolist() if nearest[j] == i]
    assert there.tolist() == wanted


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"method": "both"},
            "unknown matching 'both'; known: one_way, mutual, ratio, mutual_ratio",
        ),
        ({"ratio": 0.0}, "match_ratio is 0.0; it must be above 0"),
        ({"ratio": 1.5}, "match_ratio is 1.5; it must be .*at most 1"),
    ],
)
def test_match_refuses_an_unknown_method_and_a_ratio_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        match(np.ones((3, 4)), np.ones((2, 4)), **wrong)


LESS_PRECISE = """
import sys
import numpy as np, torch
from scipy.spatial import cKDTree
from vitgal.retrieval import matching

torch.set_float32_matmul_precision("medium")
backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
if sys.argv[1] == "each backend":  # torch then raises where it is asked for the one setting
    backends[1].fp32_precision = "ieee"
before = [backend.fp32_precision for backend in backends]
with matching.float32_products():
    assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
rng = np.random.default_rng(9)
base = rng.standard_normal((1, 128))
query, gallery = base + 1e-3 * rng.standard_normal((2, 300, 128))
found = matching.match(query, gallery, np.inf, device="cpu")
assert (found[:, 1] == cKDTree(gallery).query(query)[1]).all()
assert [backend.fp32_precision for backend in backends] == before != ["ieee", "ieee"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["one setting", "each backend"])
def test_match_on_a_device_uses_float32(setting):
    """In a process of its own: torch forgets no setting. A GPU would take TF32, unless told."""
    torch = pytest.importorskip("torch", minversion="2.9", reason="one setting for all before")
    assert hasattr(torch.backends.cuda.matmul, "fp32_precision")
    subprocess.run([sys.executable, "-c", LESS_PRECISE, setting], check=True)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_match_names_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"no device '{device}'.*match_device"):
        match(np.ones((3, 4)), np.ones((2, 4)), 0.82, device=device)


def test_match_on_a_device_without_descriptors_and_in_blocks(monkeypatch):
    none, subset = np.empty((0, 4), np.float32), np.eye(4, dtype=np.float32)
    assert (
        match(none, subset, 0.82, device="cpu").shape
        == match(subset, none, 0.82, device="cpu").shape
        == (0, 2)
    )
    monkeypatch.setattr("vitgal.retrieval.matching.BLOCK", 9)  # two query rows at a time
    assert match(subset, subset[::-1], 0.82, device="cpu").tolist() == [
        [0, 3],
        [1, 2],
        [2, 1],
        [3, 0],
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_match_refuses_values_that_are_no_descriptors(bad, side):
    pair = {"query": np.ones((3, 4), np.float32), "gallery": np.ones((3, 4), np.float32)}
    pair[side][1, 2] = bad
    with pytest.raises(ValueError, match=f"{side} descriptors hold nan, infinite or huge"):
        match(pair["query"], pair["gallery"])


def test_match_refuses_invalid_descriptors():
    with pytest.raises(ValueError, match="4 wide, gallery descriptors 5"):
        match(np.ones((3, 4)), np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        match(np.ones(4), np.ones((3, 4)))
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="max_distance"):
            match(np.ones((3, 4)), np.ones((3, 4)), bad)


def test_a_device_without_memory_matches_in_parts(monkeypatch):
    """As a GPU that has room for three query descriptors at a time, or for none."""
    space, real = 3, matching.NearestSearch.closest_by_torch
    asked = []

    def cramped(search, block):
        asked.append(block.stop - block.start)
        if asked[-1] > space:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(search, block)

    rng = np.random.default_rng(0)
    query, gallery = (unit(rng.standard_normal((n, 16))) for n in (25, 40))
    wanted = matching.match(query, gallery, 1.2)
    monkeypatch.setattr(matching.NearestSearch, "closest_by_torch", cramped)
    np.testing.assert_array_equal(matching.match(query, gallery, 1.2, device="cpu"), wanted)
    assert len(wanted) > 10 and max(asked) == 25 and asked.count(3) > 5
    space = 0
    with pytest.raises(RuntimeError, match="no memory left to match one descriptor with 40.*work"):
        matching.match(query, gallery, 1.2, device="cpu")


def test_device_auto():
    result = matching.matching_device("auto")
    assert result == ("cuda" if torch.cuda.is_available() else None)
    assert matching.matching_device("cpu") == "cpu" and matching.matching_device(None) is None


def test_an_enormous_distance_is_no_limit():
    rng = np.random.default_rng(0)
    query, gallery = rng.standard_normal((30, 4)), rng.standard_normal((200, 4))
    wanted = matching.match(query, gallery, math.inf)
    for distance in (1e30, 1e155, 1e308):
        np.testing.assert_array_equal(matching.match(query, gallery, distance), wanted)
