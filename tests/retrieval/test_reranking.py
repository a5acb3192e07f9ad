"""Reranking by hand, and its equality with the whole reranked ranking."""

import numpy as np
import pytest

from tests.retrieval_cases import random_benchmark
from vitgal.data.revisited import GroundTruth, labelled
from vitgal.evaluation.protocol import evaluate
from vitgal.retrieval import shortlists
from vitgal.retrieval.ranking import Fusion, Positions, Ranking, Reranking, fused_scores, rerank


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


#  similarity of    4    6    0    7    2    5    1    8
SIMILARITIES = np.array([[0.9, 0.8, 0.7, 0.7, 0.6, 0.5, 0.4, 0.3]])


#  evidence of   4   6   0  7   2   5  1  8
EVIDENCE = np.array([[50, 3, 30, 3, 11, 40, 3, 3]])


@pytest.mark.parametrize(
    "protocol, expected",
    [
        # Easy: 6, 0, 7, 1. The half 7, 1 has deviation 0.15, and median and quartile 3; so 0,
        # capped at 25, scores 0.7 + 0.2 x 0.15 x 22 / 4 = 0.865.
        ("easy", [4, 0, 6, 7, 2, 5, 1, 8, 3, 9]),
        # Medium: 6, 0, 7, 2. The half 7, 2 has deviation 0.05, and 3, 11 the median 7 and the
        # quartile 9; so 0 scores 0.7 + 0.2 x 0.05 x 16 / 4 = 0.74, less than 6.
        ("medium", [4, 6, 0, 7, 2, 5, 1, 8, 3, 9]),
        # Published: 4, 6, 0, 7, where the similarities of 0 and 7 do not deviate at all.
        ("published", [4, 6, 0, 7, 2, 5, 1, 8, 3, 9]),
    ],
)
def test_fused_order_by_hand(protocol, expected):
    fusion = Fusion(SIMILARITIES, weight=0.2, cap=25)
    options = dict(candidates=CANDIDATES, ground_truth=small_truth(), protocol=protocol, top=4)
    assert rerank(RANKING, EVIDENCE, **options, fusion=fusion)[:, 0].tolist() == expected
    before = Ranking(RANKING, Positions.from_ranks(RANKING, [np.arange(10)]))
    after = before.reranked(Reranking(inliers=EVIDENCE, **options, fusion=fusion))
    assert after.order[:, 0].tolist() == expected
    assert after.positions.ranks[0].tolist() == np.argsort(expected).tolist()


def test_fused_order_without_weight_is_the_global_one_and_with_all_weight_that_of_the_counts():
    options = dict(candidates=CANDIDATES, ground_truth=small_truth(), protocol="medium", top=4)
    ignored = rerank(RANKING, EVIDENCE, **options, fusion=Fusion(SIMILARITIES, weight=0.0))
    np.testing.assert_array_equal(ignored, RANKING)
    # 0 and 2 exceed the quartile of 3 and 11; below it counts make no difference.
    alone = rerank(RANKING, EVIDENCE, **options, fusion=Fusion(SIMILARITIES, 1e6, 1000))
    assert alone[:, 0].tolist() == [4, 0, 2, 6, 7, 5, 1, 8, 3, 9]


def test_an_image_that_could_not_be_read_stays_last_in_the_fused_order():
    options = dict(candidates=CANDIDATES, ground_truth=small_truth(), protocol="medium", top=4)
    similarities = np.where(CANDIDATES == 0, -np.inf, SIMILARITIES)
    after = rerank(RANKING, EVIDENCE, **options, fusion=Fusion(similarities, 1.0, 60))
    # Of 6, 0, 7, 2 with evidence 3, 30, 3, 11, 0 could not be read.
    assert after[:, 0].tolist() == [4, 6, 7, 2, 0, 5, 1, 8, 3, 9]


def test_fused_scores_by_hand():
    # The half 0.3, 0.1 deviates by 0.1; its 20, 0 have median 10 and quartile 15, its 3, 3 both 3.
    similarities = np.array([0.3, 0.9, 0.1, 0.8], np.float32)
    evidence = np.array([[20, 50, 0, 9], [3, 5, 3, 11]])
    scores = fused_scores(similarities, evidence, 0.5, 40)
    wanted = [
        [0.3 + 0.05 * 1, 0.9 + 0.05 * 5, 0.1, 0.8],
        [0.3, 0.9 + 0.05 * 0.5, 0.1, 0.8 + 0.05 * 2],
    ]
    np.testing.assert_allclose(scores, wanted, rtol=1e-6)
    assert scores.dtype == np.float64
    for size in (0, 1):  # of one image nothing is known that is chance
        np.testing.assert_array_equal(fused_scores([0.5] * size, [60] * size), [0.5] * size)
    assert np.isneginf(fused_scores([-np.inf] * 2, [60, 0])).all()


def test_fused_scores_fall_with_neither_part():
    behind = np.array([0.2, 0.1, 0.0]), np.array([4, 6, 8])
    similarities, counts = np.linspace(0.3, 1, 9), np.arange(0, 90, 7)
    scores = np.array([
        [fused_scores([s, 1.0, 1.0, *behind[0]], [n, 9, 9, *behind[1]], 3.0, 60)[0] for n in counts]
        for s in similarities
    ])  # fmt: skip
    assert (np.diff(scores, axis=0) > 0).all() and (np.diff(scores, axis=1) >= 0).all()
    assert scores[0, 0] == 0.3 and scores[0, -1] == scores[0, -2] > 1, "capped"


def test_fused_order_refuses_similarities_that_do_not_fit():
    options = dict(candidates=CANDIDATES, ground_truth=small_truth(), protocol="medium", top=4)
    with pytest.raises(ValueError, match=r"similarities of shape \(1, 7\) for candidates \(1, 8\)"):
        rerank(RANKING, INLIERS, **options, fusion=Fusion(SIMILARITIES[:, 1:]))
    with pytest.raises(ValueError, match="a similarity of query query0 is not a number"):
        rerank(RANKING, INLIERS, **options, fusion=Fusion(SIMILARITIES * np.nan))


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
    reference = rerank(ranking, inliers, ties="published", **options)
    assert reference[:100, 0].tolist() == ranking[order, 0].tolist()
    actual = rerank(ranking, inliers, **options)[:100, 0]
    by_hand = sorted(range(100), key=lambda place: (-inliers[0, place], place))
    assert actual.tolist() == ranking[by_hand, 0].tolist()


def test_rerank_refuses_invalid_arguments():
    options = dict(candidates=CANDIDATES, ground_truth=small_truth(), top=4)
    with pytest.raises(ValueError, match="protocol 'expert'"):
        rerank(RANKING, INLIERS, protocol="expert", **options)
    with pytest.raises(ValueError, match="ties 'random'"):
        rerank(RANKING, INLIERS, protocol="easy", ties="random", **options)
    with pytest.raises(ValueError, match="database image 3 .* query query0, but was not verified"):
        rerank(RANKING, INLIERS, protocol="hard", **options | {"top": 5})


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
    for actual, reference in zip(after.ranks, expected.ranks, strict=True):
        np.testing.assert_array_equal(actual, reference)
    scores, by_full = evaluate(after, truth), evaluate(full, truth)
    for name in ("easy", "medium", "hard"):
        np.testing.assert_array_equal(scores[name]["ap"], by_full[name]["ap"])
