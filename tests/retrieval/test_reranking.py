"""Matching against a KD-tree, verification on planted homographies, reranking by hand."""

import dataclasses
import inspect
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from vitgal import runs
from vitgal.data.revisited import GroundTruth, labelled, write_ground_truth
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.statistics import bootstrap_interval
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.retrieval import exact_ranks, exact_search, matching, shortlists, verification
from vitgal.retrieval.matching import match, match_shortlist
from vitgal.retrieval.pairs import inspect_pair, inspect_shortlist
from vitgal.retrieval.ranking import Positions
from vitgal.retrieval.reranking import Reranking, rerank
from vitgal.retrieval.verification import verify
from vitgal.stages import rerank as rerank_stage
from vitgal.stages.rerank import rerank_shortlist

ESTIMATORS = ["degensac", "magsac", "poselib"]


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def tree_matches(query: np.ndarray, gallery: np.ndarray, max_distance: float) -> np.ndarray:
    """The published way: a float64 KD-tree whose bound is strict."""
    _, found = cKDTree(gallery).query(query, distance_upper_bound=max_distance)
    matched = np.flatnonzero(found != len(gallery))
    return np.column_stack([matched, found[matched]])


def tree_distances(query: np.ndarray, gallery: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Distances of given pairs as the KD-tree computes them: one tree a gallery descriptor."""
    return np.array([cKDTree(gallery[[g]]).query(query[q])[0] for q, g in matches])


# match


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
    ours, theirs = match(query, gallery, math.inf), tree_matches(query, gallery, math.inf)
    np.testing.assert_array_equal(
        tree_distances(query, gallery, ours), tree_distances(query, gallery, theirs)
    )
    assert (ours[:, 1] <= theirs[:, 1]).all() and len(ours) == 30


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
    prepared = [matching._Descriptors.read(each, "one") for each in (query, gallery)]
    left = matching._sieved(*prepared, slice(0, 300), 0.82)
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


def test_match_shortlist_equals_match():
    rng = np.random.default_rng(5)
    query = unit(rng.standard_normal((40, 12)))
    galleries = [unit(rng.standard_normal((size, 12))) for size in (30, 1, 70)]
    galleries.insert(1, np.empty((0, 12), np.float32))
    together = match_shortlist(query, iter(galleries), 0.9)
    for found, gallery in zip(together, galleries, strict=True):
        np.testing.assert_array_equal(found, match(query, gallery, 0.9))
    assert match_shortlist(query, []) == []


def test_match_reads_half_precision_and_integers_exactly():
    half = np.array([[0.5, 0.25], [1, 0]], np.float16)
    assert match(half, half).tolist() == [[0, 0], [1, 1]]
    codes = np.array([[3, 200], [250, 9]], np.uint8)  # differences would wrap round in uint8
    assert match(codes, codes[::-1], 1.0).tolist() == [[0, 1], [1, 0]]


def test_match_without_descriptors():
    none, some = np.empty((0, 4), np.float32), np.ones((3, 4), np.float32)
    for query, gallery in ((none, some), (some, none), (none, none), (some, np.ones((0, 0)))):
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
with matching._float32_products():
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
def test_match_on_a_device_keeps_to_float32_whatever_the_program_allows(setting):
    """In a process of its own: torch forgets no setting. A GPU would take TF32, unless told."""
    torch = pytest.importorskip("torch", minversion="2.9", reason="one setting for all before")
    assert hasattr(torch.backends.cuda.matmul, "fp32_precision")
    subprocess.run([sys.executable, "-c", LESS_PRECISE, setting], check=True)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_match_names_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"matching cannot run on '{device}'.*None for NumPy"):
        match(np.ones((3, 4)), np.ones((2, 4)), 0.82, device=device)


def test_match_on_a_device_without_descriptors_and_in_blocks(monkeypatch):
    none, some = np.empty((0, 4), np.float32), np.eye(4, dtype=np.float32)
    assert (
        match(none, some, 0.82, device="cpu").shape
        == match(some, none, 0.82, device="cpu").shape
        == (0, 2)
    )
    monkeypatch.setattr("vitgal.retrieval.matching.BLOCK", 9)  # two query rows at a time
    assert match(some, some[::-1], 0.82, device="cpu").tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_match_refuses_values_that_are_no_descriptors(bad, side):
    pair = {"query": np.ones((3, 4), np.float32), "gallery": np.ones((3, 4), np.float32)}
    pair[side][1, 2] = bad
    with pytest.raises(ValueError, match=f"{side} descriptors hold nan, infinite or huge"):
        match(pair["query"], pair["gallery"])


def test_match_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="4 wide, gallery descriptors 5"):
        match(np.ones((3, 4)), np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        match(np.ones(4), np.ones((3, 4)))
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="max_distance"):
            match(np.ones((3, 4)), np.ones((3, 4)), bad)


# verify

PLANTED = np.array([[1.1, 0.1, 5], [-0.05, 0.9, 10], [1e-4, 2e-5, 1]])


def project(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    mapped = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]


def planted(inliers: int, outliers: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points under PLANTED, followed by points that are at least 60 px from where it puts them."""
    rng = np.random.default_rng(seed)
    query = rng.uniform(0, 512, (inliers + outliers, 2))
    gallery = project(query, PLANTED)
    angle = rng.uniform(0, 2 * np.pi, outliers)
    away = rng.uniform(60, 400, outliers)[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    gallery[inliers:] += away
    return query, gallery


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("confidence", [0.999, 1.0])
def test_verify_finds_the_planted_homography(estimator, confidence):
    query, gallery = planted(40, 40)
    found = verify(query, gallery, estimator, threshold=8.0, confidence=confidence)
    assert found.inliers.dtype == bool and found.inliers.shape == (80,)
    assert found.inliers[:40].all()
    # By chance an outlier may lie near the model that its own weight bends a little.
    assert 40 <= found.count <= 42 and found.count == found.inliers.sum()
    corners = np.array([[0, 0], [512, 0], [512, 512], [0, 512]], float)
    # The direction is query to gallery. One pixel: the noise-free points fix the model, robust
    # refinement may weigh in an outlier.
    np.testing.assert_allclose(
        project(corners, found.homography), project(corners, PLANTED), atol=1.0
    )
    assert found.homography[2, 2] == 1 and found.homography.dtype == np.float64


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verify_is_the_same_for_the_same_seed(estimator):
    # A handful of planted matches among many: another seed finds another small set.
    query, gallery = planted(5, 60, seed=1)
    options = {"estimator": estimator, "iterations": 50, "threshold": 4.0}
    by_seed = [verify(query, gallery, seed=s, **options).inliers.tolist() for s in range(12)]
    again = [verify(query, gallery, seed=s, **options).inliers.tolist() for s in range(12)]
    assert by_seed == again
    assert len({tuple(row) for row in by_seed}) > 1, "the seed reaches the sampler"


def test_verify_confidence_one_tries_every_iteration():
    # Few true matches: stopping at PoseLib's least number of iterations would miss them.
    query, gallery = planted(60, 240, seed=2)
    for estimator in ESTIMATORS:
        counts = [verify(query, gallery, estimator, 4.0, seed=seed).count for seed in range(4)]
        assert min(counts) >= 60, estimator


def displaced(scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact matches that pin a scaling down, then matches off by 10 to 40 px in the gallery."""
    rng = np.random.default_rng(0)
    exact, off = rng.uniform(0, 512, (4000, 2)), rng.uniform(100, 400, (121, 2))
    distances, angle = np.linspace(10, 40, 121), rng.uniform(0, 2 * np.pi, 121)
    shift = distances[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    return (
        np.vstack([exact, off]),
        np.vstack([exact, off]) * scale + np.vstack([np.zeros((4000, 2)), shift]),
        distances,
    )


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("estimator", ["magsac", "poselib"])
def test_verify_threshold_is_a_distance_in_the_gallery_image(estimator, scale):
    query, gallery, distances = displaced(scale)
    inliers = verify(query, gallery, estimator, threshold=16.0).inliers[4000:]
    # Half a pixel: the 121 displaced matches move the model by a fraction of a pixel.
    assert inliers[distances < 15.5].all() and not inliers[distances > 16.5].any()


def test_verify_threshold_of_degensac_is_a_sampson_distance():
    query, gallery, distances = displaced(1.0)
    inliers = verify(query, gallery, "degensac", threshold=16.0).inliers[4000:]
    # Squared Sampson distance at equal scale: distance^2 / 2, so 16 px admit 22.63 px.
    assert inliers[distances < 22.1].all() and not inliers[distances > 23.1].any()


@pytest.mark.parametrize("function", [match, verify, inspect_pair, rerank_shortlist])
def test_defaults_are_the_published(function):
    published = dict(estimator="degensac", threshold=16.0, iterations=2000, confidence=1.0, seed=0)
    published |= dict(max_distance=0.82, top=100, max_keypoints=None)  # 1000 are stored at most
    found = inspect.signature(function).parameters
    shared = published.keys() & found.keys()
    assert len(shared) >= 1
    assert {name: found[name].default for name in shared} == {n: published[n] for n in shared}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verify_needs_five_matches(estimator):
    query, gallery = planted(5, 0)
    assert verify(query, gallery, estimator).count == 5
    for count in (0, 1, 4):
        found = verify(query[:count], gallery[:count], estimator)
        assert found.count == 0 and found.homography is None and found.inliers.shape == (count,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verify_without_a_model_counts_nothing(estimator):
    query = np.random.default_rng(0).uniform(0, 512, (12, 2))
    for gallery in (np.full((12, 2), 7.0), np.column_stack([np.full(12, 8.0), query[:, 1]])):
        found = verify(query, gallery, estimator)
        assert found.count == 0 and found.homography is None and not found.inliers.any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"estimator": "ransac"}, "unknown estimator 'ransac'; known: degensac, magsac, poselib"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"confidence": 0.0}, "confidence is 0.0"),
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_verify_refuses_options_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        verify(*planted(8, 0), **wrong)


@pytest.mark.parametrize("estimator", sorted(verification.ESTIMATORS))
def test_all_matches_on_one_gallery_point_are_no_model(estimator):
    """A homography that maps the plane to a point or a line; poselib gives one in case 115."""
    rng = np.random.default_rng(0)
    for _ in range(160):
        number = int(rng.integers(5, 41))
        query = rng.integers(0, 32, (number, 2)) * 16.0 + 8
        gallery = np.tile(rng.integers(0, 32, (1, 2)) * 16.0 + 8, (number, 1))
        found = verify(query, gallery, estimator)
        assert found.homography is None or np.linalg.matrix_rank(found.homography) == 3


def test_verify_refuses_points_that_do_not_fit():
    query, gallery = planted(8, 0)
    with pytest.raises(ValueError, match="8 query points matched with 7"):
        verify(query, gallery[:7])
    with pytest.raises(ValueError, match=r"shape \(8, 3\)"):
        verify(np.ones((8, 3)), gallery)
    query[3, 0] = math.nan
    with pytest.raises(ValueError, match="nan or infinite"):
        verify(query, gallery)


# inspect_pair


def local_features(points: np.ndarray, descriptors: np.ndarray) -> LocalFeatures:
    scores = np.linspace(2, 1, len(points), dtype=np.float32)
    size, box = (512, 512), (0, 0, 512, 512)
    return LocalFeatures(
        points.astype(np.float32), descriptors, scores, np.ones_like(scores), size, box, size
    )


def image_pair(shared: int, alone: int, seed: int = 0) -> tuple[LocalFeatures, LocalFeatures]:
    """Two images with `shared` common features under PLANTED, the first ones of both."""
    rng = np.random.default_rng(seed)
    query, gallery = planted(shared, alone, seed)
    descriptors = unit(rng.standard_normal((shared + 2 * alone, 32)))
    ours, theirs = descriptors[: shared + alone], descriptors.copy()
    theirs = np.concatenate([theirs[:shared], theirs[shared + alone :]])
    return local_features(query, ours), local_features(gallery, theirs)


def test_inspect_pair_matches_then_verifies():
    query, database = image_pair(20, 30)
    found = inspect_pair(query, database, max_distance=0.5)
    assert found.matches.tolist() == [[i, i] for i in range(20)]
    assert found.verification.count == 20
    fewer = inspect_pair(query, database, max_distance=0.5, max_keypoints=7, estimator="magsac")
    assert fewer.matches.tolist() == [[i, i] for i in range(7)]
    nothing = inspect_pair(query.subset([]), database)
    assert nothing.matches.shape == (0, 2) and nothing.verification.count == 0


def test_inspect_shortlist_equals_pair_by_pair():
    query, first = image_pair(20, 30)
    candidates = [first, image_pair(8, 5, 1)[1], query.subset([]), query]
    together = [pair.verification.count for pair in inspect_shortlist(query, iter(candidates))]
    assert together == [inspect_pair(query, one).verification.count for one in candidates]
    assert together[2:] == [0, 50] and list(inspect_shortlist(query, [])) == []


# rerank


def small_truth() -> GroundTruth:
    """One query over ten images: 0, 1 easy; 2, 3 hard; 4, 5 junk; the rest negative."""
    lists = {"easy": [0, 1], "hard": [2, 3], "junk": [4, 5]}
    return GroundTruth(
        name="small",
        database=[f"image{i}" for i in range(10)],
        queries=["query0"],
        boxes=np.array([[0.0, 0, 10, 10]]),
        **{label: [np.array(indices)] for label, indices in lists.items()},
    )


#  rank           0  1  2  3  4  5  6  7  8  9
RANKING = np.array([[4, 6, 0, 7, 2, 5, 1, 8, 3, 9]]).T
#  inliers of     4  6  0  7  2  5  1  8
CANDIDATES = np.array([[4, 6, 0, 7, 2, 5, 1, 8]])
INLIERS = np.array([[50, 3, 9, 3, 20, 40, 30, 3]])


@pytest.mark.parametrize(
    "protocol, expected",
    [
        # Easy ignores 2, 3, 4, 5: the first four others are 6, 0, 7, 1 at ranks 1, 2, 3, 6 with 3,
        # 9, 3, 30 inliers; 6 and 7 tie and keep their order.
        ("easy", [4, 1, 0, 6, 2, 5, 7, 8, 3, 9]),
        # Medium ignores 4, 5: 6, 0, 7, 2 at ranks 1 to 4 with 3, 9, 3, 20.
        ("medium", [4, 2, 0, 6, 7, 5, 1, 8, 3, 9]),
        # Hard ignores 0, 1, 4, 5: 6, 7, 2, 8 at ranks 1, 3, 4, 7 with 3, 3, 20, 3.
        ("hard", [4, 2, 0, 6, 7, 5, 1, 8, 3, 9]),
        # Published: 4, 6, 0, 7 at ranks 0 to 3; 4 is junk and counts 0 in spite of its 50.
        ("published", [0, 6, 7, 4, 2, 5, 1, 8, 3, 9]),
    ],
)
def test_rerank_by_hand(protocol, expected):
    options = dict(candidates=CANDIDATES, ground_truth=small_truth(), protocol=protocol, top=4)
    reranked = rerank(RANKING, INLIERS, **options)
    assert reranked[:, 0].tolist() == expected
    before = Positions.from_ranks(RANKING, [np.arange(10)])
    after = before.reranked(RANKING, Reranking(inliers=INLIERS, **options))
    assert after.ranks[0].tolist() == np.argsort(expected).tolist()


def test_rerank_published_ties_are_numpys():
    rng = np.random.default_rng(0)
    ranking = rng.permutation(200)[:, None]
    truth = GroundTruth(
        "ties",
        [f"i{i}" for i in range(200)],
        ["q"],
        np.ones((1, 4)),
        *([np.array([], np.int64)] for _ in range(3)),
    )
    inliers = rng.integers(0, 3, (1, 150))
    options = dict(candidates=ranking[:150].T, ground_truth=truth, protocol="published", top=100)
    order = np.argsort(-inliers[0, :100].astype(float))
    theirs = rerank(ranking, inliers, ties="published", **options)
    assert theirs[:100, 0].tolist() == ranking[order, 0].tolist()
    ours = rerank(ranking, inliers, **options)[:100, 0]
    by_hand = sorted(range(100), key=lambda place: (-inliers[0, place], place))
    assert ours.tolist() == ranking[by_hand, 0].tolist()


def test_rerank_refuses_what_it_cannot_do():
    options = dict(candidates=CANDIDATES, ground_truth=small_truth(), top=4)
    with pytest.raises(ValueError, match="protocol 'expert'"):
        rerank(RANKING, INLIERS, protocol="expert", **options)
    with pytest.raises(ValueError, match="ties 'random'"):
        rerank(RANKING, INLIERS, protocol="easy", ties="random", **options)
    with pytest.raises(ValueError, match="database image 3 .* query query0, but was not verified"):
        rerank(RANKING, INLIERS, protocol="hard", **options | {"top": 5})


def random_benchmark(number: int, queries: int, seed: int) -> tuple[GroundTruth, np.ndarray]:
    """Random labels and a random whole ranking (N, Q)."""
    rng = np.random.default_rng(seed)
    lists = {"easy": [], "hard": [], "junk": []}
    for _ in range(queries):
        images = rng.permutation(number)
        cuts = np.cumsum(rng.integers(0, 9, 3))
        for label, part in zip(lists, np.split(images, cuts)[:3], strict=True):
            lists[label].append(np.sort(part))
    ranking = np.stack([rng.permutation(number) for _ in range(queries)], axis=1)
    return GroundTruth(
        name="random",
        database=[f"image{i:02d}" for i in range(number)],
        queries=[f"query{q}" for q in range(queries)],
        boxes=np.tile([0.0, 0, 512, 512], (queries, 1)),
        **lists,
    ), ranking


@pytest.mark.parametrize("protocol", ["easy", "medium", "hard", "published"])
def test_positions_after_reranking_equal_the_full_reranked_ranking(protocol):
    truth, ranking = random_benchmark(60, 12, seed=0)
    rng = np.random.default_rng(1)
    images = shortlists.shortlist(ranking, truth, top=15)
    width = max(map(len, images))
    candidates = np.stack(
        [np.pad(row, (0, width - len(row)), constant_values=-1) for row in images]
    )
    inliers = np.where(candidates < 0, -1, rng.integers(0, 6, candidates.shape))
    options = dict(candidates=candidates, ground_truth=truth, protocol=protocol, top=15)
    full = rerank(ranking, inliers, **options)
    np.testing.assert_array_equal(np.sort(full, axis=0), np.sort(ranking, axis=0))
    # Only the beginning of the ranking is given, as in a run.
    depth = shortlists.shortlist_depth(truth, 60, top=15)
    before = Positions.from_ranks(ranking, labelled(truth))
    after = before.reranked(ranking[:depth], Reranking(inliers=inliers, **options))
    expected = Positions.from_ranks(full, labelled(truth))
    for ours, theirs in zip(after.ranks, expected.ranks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    scores, by_full = evaluate(after, truth), evaluate(full, truth)
    for name in ("easy", "medium", "hard"):
        np.testing.assert_array_equal(scores[name]["ap"], by_full[name]["ap"])


# The stage

NUMBER, QUERIES, TOP = 24, 4, 5


def make_run(folder: Path, *, drop: tuple = (), failures: tuple = (), poison: tuple = ()) -> Path:
    """A run with global and local stages: image i shares 24 - 6 * (i % 5) features with each query.

    drop: keys left out of the store. failures: images recorded as unreadable. poison: keys whose
    keypoints are nan.
    """
    truth, _ = random_benchmark(NUMBER, QUERIES, seed=5)
    write_ground_truth(folder / "benchmark" / "gnd_random.pkl", truth)
    rng = np.random.default_rng(0)
    queries = unit(rng.standard_normal((QUERIES, 8)))
    database = unit(rng.standard_normal((NUMBER, 8)))
    _, ranks = exact_search.search(
        queries, database, k=shortlists.shortlist_depth(truth, NUMBER, top=TOP)
    )
    source = folder / "random" / "global"
    with runs.stage(source, "global", parameters={}, inputs={}) as stage:
        runs.write_json(
            source / "names.json", {"queries": truth.queries, "database": truth.database}
        )
        runs.write_array(source / "ranks.npy", ranks)
        exact_ranks.labelled_positions(queries, database, labelled(truth)).save(
            source / "positions.npz"
        )
        lists = shortlists.shortlist(ranks, truth, top=TOP)
        names = dict(queries=truth.queries, database=truth.database)
        shortlists.write_shortlist(source / "shortlist.txt", lists, **names)
        runs.write_json(
            source / "scores.json", {"protocol": {"queries": "cropped"}, "failed_images": 2}
        )
        stage.finish([path.name for path in source.glob("[!s]*.*")] + ["shortlist.txt"])
    items = {name: image_pair(24, 6)[0] for name in truth.queries}
    for number, name in enumerate(truth.database):
        rest = slice(6 * (number % 5), None) if number % 5 < 4 else []
        items[name] = image_pair(24, 6)[1].subset(rest)
    items = {key: value for key, value in items.items() if key not in drop + failures}
    local = folder / "random" / "local"
    with runs.stage(local, "local", parameters={}, inputs={}) as stage:
        failed = [{"name": name, "reason": "torn"} for name in failures]
        store.write_shard(
            *(local / "shard-00", sorted(items.items()), store.ShardFormat("float32")),
            failures=failed,
        )
        stage.finish(["shard-00/items.json"])
    shard = store.Shard.open(local / "shard-00")
    for key in poison:  # on disk: writing such features is refused
        keypoints = np.load(shard.folder / "keypoints.npy", mmap_mode="r+")
        start, stop = shard.arrays["offsets"][shard.names.index(key) :][:2]
        keypoints[start:stop] = np.nan
        keypoints.flush()
    return folder


def rerank_run(folder: Path, **options) -> Path:
    options = dict(top=TOP, workers=1, progress=False, max_distance=0.5) | options
    return rerank_shortlist(folder, dataset="random", data_folder=folder / "benchmark", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    rerank_run(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".npy", ".npz") or path.name == "scores.json"
    }


def recorded(scores: dict) -> dict:
    """`evaluate`'s dict as a scores.json holds it: with the interval of each mAP."""
    intervals = {p: bootstrap_interval(one["ap"]) for p, one in scores.items()}
    return runs.plain({p: one | {"interval": intervals[p]} for p, one in scores.items()})


def test_stage_files_hold_what_they_say(finished):
    folder = finished / "random" / "rerank"
    truth, _ = random_benchmark(NUMBER, QUERIES, seed=5)
    ranks = np.load(finished / "random" / "global" / "ranks.npy")
    candidates, inliers = np.load(folder / "candidates.npy"), np.load(folder / "inliers.npy")
    assert candidates.dtype == inliers.dtype == np.int32
    lists = shortlists.shortlist(ranks, truth, top=TOP)
    for q, images in enumerate(lists):
        assert candidates[q].tolist() == images.tolist() + [-1] * (
            candidates.shape[1] - len(images)
        )
        # Image i keeps 24 - 6 * (i % 5) of the 24 shared features: exact ones, so all are inliers.
        # Every fifth has no feature at all.
        expected = [24 - 6 * (image % 5) for image in images]
        assert inliers[q, : len(images)].tolist() == expected
        assert (inliers[q, len(images) :] == -1).all()
    scores = json.loads((folder / "scores.json").read_text())
    before = Positions.load(finished / "random" / "global" / "positions.npz")
    for variant in ("easy", "medium", "hard", "published"):
        options = dict(candidates=candidates, ground_truth=truth, protocol=variant, top=TOP)
        after = before.reranked(ranks, Reranking(inliers=inliers, **options))
        loaded = Positions.load(folder / f"positions_{variant}.npz")
        assert [p.tolist() for p in loaded.ranks] == [p.tolist() for p in after.ranks]
        top = np.load(folder / f"top_{variant}.npy")
        np.testing.assert_array_equal(top, rerank(ranks, inliers, **options))
        if variant == "published":
            assert scores["published"] == recorded(evaluate(after, truth))
        else:
            assert scores[variant] == recorded(evaluate(after, truth))[variant]
    assert scores["global"] == recorded(evaluate(before, truth))
    assert scores["queries"] == truth.queries and scores["protocol"]["reranked"] is True
    assert scores["fingerprints"]["ground truth"] == truth.fingerprint
    assert set(scores["earlier"]) == {"global", "local"}
    assert scores["parameters"]["estimator"] == "degensac" and scores["parameters"]["top"] == TOP
    assert scores["protocol"]["queries"] == "cropped" and scores["failed_images"] == 2
    assert str(finished) not in (folder / "scores.json").read_text()
    assert not (folder / "partial").exists()


def test_stage_is_the_same_with_several_workers_and_again(finished, tmp_path):
    ours = contents(finished / "random" / "rerank")
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    assert contents(rerank_run(copy, workers=2)) == ours
    before = (copy / "random" / "rerank" / "stage.json").read_bytes()
    assert contents(rerank_run(copy, workers=1)) == ours, "workers are no setting"
    rerank_run(copy, workers=1, match_device="cpu")  # nor is the device: finished, so reused
    assert (copy / "random" / "rerank" / "stage.json").read_bytes() == before, "it was reused"


def test_stage_is_the_same_with_matching_in_torch(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    rerank_run(copy, match_device="cpu")
    assert contents(copy / "random" / "rerank") == contents(finished / "random" / "rerank")
    shutil.rmtree(copy / "random" / "rerank")
    with pytest.raises(ValueError, match="matching cannot run on 'cuda:99'"):
        rerank_run(copy, match_device="cuda:99")
    assert not (copy / "random" / "rerank").exists()


def test_a_device_without_memory_matches_in_parts(monkeypatch):
    """As a GPU that has room for three query descriptors at a time, or for none."""
    room, real = 3, matching._closest_on
    asked = []

    def cramped(device, query, gallery, block, max_distance):
        asked.append(block.stop - block.start)
        if asked[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(device, query, gallery, block, max_distance)

    rng = np.random.default_rng(0)
    query, gallery = (unit(rng.standard_normal((n, 16))) for n in (25, 40))
    wanted = matching.match(query, gallery, 1.2)
    monkeypatch.setattr(matching, "_closest_on", cramped)
    np.testing.assert_array_equal(matching.match(query, gallery, 1.2, device="cpu"), wanted)
    assert len(wanted) > 10 and max(asked) == 25 and asked.count(3) > 5
    room = 0
    with pytest.raises(RuntimeError, match="no memory left to match one descriptor with 40.*work"):
        matching.match(query, gallery, 1.2, device="cpu")


def test_device_auto():
    found = matching.pick_device("auto")
    assert found == ("cuda" if torch.cuda.is_available() else None)
    assert matching.pick_device("cpu") == "cpu" and matching.pick_device(None) is None


def test_an_enormous_distance_is_no_limit():
    rng = np.random.default_rng(0)
    query, gallery = rng.standard_normal((30, 4)), rng.standard_normal((200, 4))
    wanted = matching.match(query, gallery, math.inf)
    for distance in (1e30, 1e155, 1e308):
        np.testing.assert_array_equal(matching.match(query, gallery, distance), wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ties": "gobal"}, "unknown ties 'gobal'; known: global, published"),
        ({"max_distance": -1.0}, "max_distance is -1.0"),
        ({"max_distance": math.nan}, "max_distance is nan"),
        ({"max_keypoints": -1}, "max_keypoints is -1"),
        ({"top": 0}, "top is 0"),
    ],
)
def test_stage_refuses_options_before_it_begins(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        rerank_run(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_stage_refuses_other_settings(finished):
    with pytest.raises(runs.StageError, match=r"parameters.max_distance: 0.5 there, 0.6 now"):
        rerank_run(finished, max_distance=0.6)


def test_stage_needs_the_stages_before_it(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    (copy / "random" / "local" / "stage.json").unlink()
    with pytest.raises(runs.StageError, match="run 05_local_extraction first"):
        rerank_run(copy)
    (copy / "random" / "global" / "stage.json").unlink()
    with pytest.raises(runs.StageError, match="run 04_global_evaluation first"):
        rerank_run(copy)
    assert not (copy / "random" / "rerank").exists()


def test_stage_names_an_image_without_features(tmp_path):
    truth, _ = random_benchmark(NUMBER, QUERIES, seed=5)
    listed = make_run(tmp_path / "whole") / "random" / "global" / "shortlist.txt"
    name = shortlists.read_shortlist(listed)["query0"][0]
    folder = make_run(tmp_path / "holed", drop=(name,))
    with pytest.raises(runs.StageError, match=f"no local features of {name} .*05_local_extraction"):
        rerank_run(folder)
    assert not (folder / "random" / "rerank" / "stage.json").exists()
    folder = make_run(tmp_path / "no query", drop=("query2",))
    with pytest.raises(runs.StageError, match="no local features of query2 "):
        rerank_run(folder)
    # One that extraction recorded as unreadable counts 0.
    counts = np.load(rerank_run(make_run(tmp_path / "torn", failures=(name,))) / "inliers.npy")
    index = truth.database.index(name)
    candidates = np.load(tmp_path / "torn" / "random" / "rerank" / "candidates.npy")
    assert (candidates == index).any() and (counts[candidates == index] == 0).all()


def test_stage_refuses_a_longer_short_list(tmp_path):
    folder = make_run(tmp_path / "run")
    with pytest.raises(runs.StageError, match=r"ranks.npy: .*run 04_global_evaluation .*top=9"):
        rerank_run(folder, top=9)
    # A ranking that is long enough, but a short list that stops earlier.
    listed = folder / "random" / "global" / "shortlist.txt"
    lines = listed.read_text().splitlines(keepends=True)
    query, image = lines[-1].split()
    listed.write_text("".join(lines[:-1]))
    with pytest.raises(runs.StageError, match=f"top={TOP} needs {image} for query {query}"):
        rerank_run(folder, overwrite=True)
    candidates = np.load(rerank_run(folder, top=2, overwrite=True) / "candidates.npy")
    assert candidates.shape[0] == QUERIES and image not in {
        f"image{index:02d}" for index in candidates[int(query[5:])]
    }


def test_stage_names_the_pair_that_cannot_be_matched(tmp_path):
    listed = make_run(tmp_path / "whole") / "random" / "global" / "shortlist.txt"
    name = next(n for n in shortlists.read_shortlist(listed)["query1"] if int(n[5:]) % 5 < 3)
    folder = make_run(tmp_path / "bad", poison=(name,))
    with pytest.raises(ValueError, match=f"database image {name}, .*nan or infinite coordinates"):
        rerank_run(folder)


def test_images_with_few_features_and_queries_without_candidates(tmp_path):
    query, image = image_pair(24, 6)
    items = [("query", query), ("none", image.subset([])), ("four", image.subset(slice(4)))]
    store.write_shard(tmp_path / "shard-00", items + [("five", image.subset(slice(5)))])
    opened = store.FeatureStore.open(tmp_path)
    q, counts = rerank_stage._verify_query(opened, 3, "query", ["none", "four", "five"], {})
    assert q == 3
    assert counts.tolist() == [0, 0, 5]  # four matches are fewer than verification needs
    _, counts = rerank_stage._verify_query(opened, 3, "query", [], {})
    assert counts.shape == (0,)
    _, counts = rerank_stage._verify_query(opened, 3, "none", ["query", "four"], {})
    assert counts.tolist() == [0, 0]


def test_stage_refuses_another_ground_truth(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    truth, _ = random_benchmark(NUMBER, QUERIES, seed=5)
    other = GroundTruth(**vars(truth) | {"queries": ["a", "b", "c", "d"]})
    write_ground_truth(copy / "benchmark" / "gnd_random.pkl", other)
    with pytest.raises(runs.StageError, match="other images than the ground truth random"):
        rerank_run(copy)


def killed_after(folder: Path, writes: int) -> None:
    """Ends this process without any clean-up once so many queries are in the journal."""
    replace, done = os.replace, []

    def dying(source, target):
        replace(source, target)
        done.extend([target] if Path(target).parent.name == "partial" else [])
        if len(done) == writes:
            os._exit(9)

    os.replace = dying
    rerank_run(folder)


def test_stage_killed_in_the_middle_keeps_the_queries_that_are_done(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    child = multiprocessing.get_context("fork").Process(target=killed_after, args=(copy, 2))
    child.start()
    child.join()
    assert child.exitcode == 9
    journal = copy / "random" / "rerank" / "partial"
    done = sorted(journal.glob("[0-9]*.npy"))
    assert [path.name for path in done] == ["0.npy", "1.npy"]
    assert not (journal.parent / "stage.json").exists()
    # A mark in the journal shows that the second run reads it instead of counting again.
    counts = np.load(done[1])
    np.save(done[1], counts + 1000)
    marked = np.load(rerank_run(copy) / "inliers.npy")
    whole = np.load(finished / "random" / "rerank" / "inliers.npy")
    assert marked[1, : len(counts)].tolist() == (counts + 1000).tolist()
    np.testing.assert_array_equal(np.delete(marked, 1, axis=0), np.delete(whole, 1, axis=0))
    assert not journal.exists()


def test_stage_refuses_a_store_made_otherwise_since(finished, tmp_path):
    """The features of another model or other options have another manifest."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    local = copy / "random" / "local"
    items = [("image00", image_pair(24, 6)[0])]
    with runs.stage(local, "local", parameters={}, inputs={}, overwrite=True) as stage:
        store.write_shard(local / "shard-00", items)
        stage.finish(["shard-00/items.json"])
    with pytest.raises(runs.StageError, match="inputs.local features"):
        rerank_run(copy)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_features_of_another_width_are_refused_with_their_images(tmp_path, device):
    query, image = image_pair(24, 6)
    narrow = dataclasses.replace(image, descriptors=image.descriptors[:, :5])
    store.write_shard(tmp_path / "q" / "shard-00", [("query", query)])
    store.write_shard(tmp_path / "d" / "shard-00", [("narrow", narrow)])

    class Both(dict):  # one store holds one width: as two that were merged by hand would look
        folder = tmp_path

        def query(self, name):
            return self[name]

    opened = Both(store.FeatureStore.open(tmp_path / "q").items())
    opened |= store.FeatureStore.open(tmp_path / "d").items()
    width = query.descriptors.shape[1]
    message = f"query query and database image narrow.*{width} wide, gallery descriptors 5"
    with pytest.raises(ValueError, match=message):
        rerank_stage._verify_query(Both(opened), 0, "query", ["narrow"], {"device": device})


def short_of_disk(folder: Path, writes: int) -> None:
    """Reranks on a disk that is full once so many queries are in the journal; exits with 3 then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write, done = runs.write_array, []

    def filling(path, array):
        if len(done) == writes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        done.append(write(path, array))
        return done[-1]

    runs.write_array = filling
    try:
        rerank_run(folder, workers=1)
    except OSError as error:
        os._exit(3 if "no space left to write 2.npy; make room" in str(error) else 4)


def test_stage_on_a_full_disk_keeps_the_queries_that_are_done(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    folder = copy / "random" / "rerank"
    shutil.rmtree(folder)
    child = multiprocessing.get_context("fork").Process(target=short_of_disk, args=(copy, 2))
    child.start()
    child.join()
    assert child.exitcode == 3
    assert sorted(path.name for path in (folder / "partial").iterdir()) == ["0.npy", "1.npy"]
    assert not (folder / "stage.json").exists() and not (folder / "inliers.npy").exists()
    rerank_run(copy)
    assert contents(folder) == contents(finished / "random" / "rerank")
