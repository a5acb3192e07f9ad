"""Scores worked out by hand, the benchmark's recorded values, intervals and records."""

import json
from pathlib import Path

import numpy as np
import pytest

from vitgal import runs
from vitgal.data.revisited import GroundTruth, labelled, load_ground_truth
from vitgal.evaluation import scores as evaluation_scores, statistics
from vitgal.evaluation.protocol import average_precision, evaluate, precision_at
from vitgal.evaluation.scores import score_table, scores_document
from vitgal.evaluation.statistics import bootstrap_interval, paired_test
from vitgal.retrieval.exact_ranks import labelled_positions
from vitgal.retrieval.exact_search import search
from vitgal.retrieval.ranking import Positions

SHARED = Path(__file__).resolve().parents[3] / "shared"
EXPECTED = Path(__file__).parents[1] / "parity" / "expected_map.json"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the official ground truth in ../shared"
)


def truth(*labels, number=6):
    """A ground truth from one (easy, hard, junk) a query."""
    lists = [[np.array(query[k], np.int64) for query in labels] for k in range(3)]
    names = [f"q{q}" for q in range(len(labels))]
    boxes = np.tile([0.0, 0, 1, 1], (len(labels), 1))
    return GroundTruth("small", [str(i) for i in range(number)], names, boxes, *lists)


# One query: easy 0, hard 2, junk 4. The ranking is 4 1 0 3 2 5.
ONE = truth(([0], [2], [4]))
RANKS = np.array([[4], [1], [0], [3], [2], [5]])


# Average precision and precision at k


@pytest.mark.parametrize(
    ("ranks", "count", "expected"),
    [
        ([0], 1, 1.0),
        ([1], 1, 0.25),  # precision 0 before and 1/2 at the second place
        ([0, 1, 2], 3, 1.0),
        ([1, 3], 2, 1 / 3),  # ((0 + 1/2) + (1/3 + 2/4)) / 2 / 2
        ([0], 2, 0.5),  # the other was never found
        ([], 4, 0.0),
    ],
)
def test_average_precision_by_hand(ranks, count, expected):
    # Sums of at most three fractions: rounding alone.
    assert average_precision(np.array(ranks, int), count) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("ranks", "k", "expected"),
    [
        ([0], 1, 1.0),
        ([0, 1], 10, 1.0),  # the last positive is second: the rest of the list is not asked for
        ([1], 1, 0.0),
        ([1], 5, 1 / 2),
        ([0, 7], 5, 1 / 5),
        ([4], 5, 1 / 5),
        ([], 5, 0.0),
    ],
)
def test_precision_by_hand(ranks, k, expected):
    assert precision_at(np.array(ranks, int), k) == expected


# Protocols


def test_scores_of_one_query_by_hand():
    scores = evaluate(RANKS, ONE)
    # Easy: 2 and 4 are taken out, leaving 1 0 3 5: image 0 is second.
    assert scores["easy"]["map"] == pytest.approx(0.25, abs=1e-15)
    assert scores["easy"]["mp_at"] == {1: 0, 5: 1 / 2, 10: 1 / 2}
    # Medium: 4 is taken out, leaving 1 0 3 2 5: second and fourth.
    assert scores["medium"]["map"] == pytest.approx(1 / 3, abs=1e-15)
    assert scores["medium"]["mp_at"] == {1: 0, 5: 2 / 4, 10: 2 / 4}
    # Hard: 0 and 4 are taken out, leaving 1 3 2 5: image 2 is third, (0/2 + 1/3) / 2.
    assert scores["hard"]["map"] == pytest.approx(1 / 6, abs=1e-15)
    assert scores["hard"]["mp_at"] == {1: 0, 5: 1 / 3, 10: 1 / 3}
    assert list(scores) == ["easy", "medium", "hard"]
    assert scores["hard"]["ap"].shape == (1,)
    assert "truncated" not in scores["hard"]


def test_query_without_positives_counts_in_no_mean():
    gt = truth(([0], [2], [4]), ([], [], [1]), ([], [1], []))
    scores = evaluate(np.tile(RANKS, 3), gt)
    np.testing.assert_array_equal(np.isnan(scores["easy"]["ap"]), [False, True, True])
    np.testing.assert_array_equal(np.isnan(scores["hard"]["ap"]), [False, True, False])
    assert scores["easy"]["map"] == pytest.approx(0.25, abs=1e-15)
    assert scores["easy"]["mp_at"][5] == 1 / 2
    # Third query: image 1 is second, 1/4; with the first one's 1/6 the mean is 5/24.
    assert scores["hard"]["map"] == pytest.approx(5 / 24, abs=1e-15)
    assert scores["hard"]["mp_at"][5] == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-15)


def test_no_query_counts_or_none_is_there():
    for gt in (truth(([], [], [1])), truth()):
        scores = evaluate(RANKS[:, : len(gt.queries)], gt)
        for protocol in scores.values():
            assert np.isnan(protocol["map"])
            assert np.isnan(list(protocol["mp_at"].values())).all()
            assert protocol["ap"].shape == (len(gt.queries),)


def test_other_kappas():
    assert evaluate(RANKS, ONE, kappas=(2,))["easy"]["mp_at"] == {2: 1 / 2}
    assert evaluate(RANKS, ONE, kappas=())["easy"]["mp_at"] == {}
    for kappas in ((0,), (-1,), (1.5,)):
        with pytest.raises(ValueError, match="kappas must be integers of at least 1"):
            evaluate(RANKS, ONE, kappas=kappas)


def test_a_ranking_for_each_protocol():
    best = np.array([[0], [2], [4], [1], [3], [5]])
    places = Positions.from_ranks(best, labelled(ONE))
    scores = evaluate({"hard": places, "medium": RANKS}, ONE)
    assert list(scores) == ["medium", "hard"]
    assert scores["hard"]["map"] == 1
    assert scores["medium"]["map"] == pytest.approx(1 / 3, abs=1e-15)
    for rankings in ({"published": RANKS}, {}):
        with pytest.raises(ValueError, match="rankings by protocol"):
            evaluate(rankings, ONE)


def test_negatives_may_be_shuffled_among_themselves():
    # 1, 3 and 5 are negative: which of them stands where changes nothing.
    first, second = evaluate(RANKS, ONE), evaluate(RANKS[[0, 5, 2, 1, 4, 3]], ONE)
    for protocol in first:
        assert first[protocol]["map"] == second[protocol]["map"]


# Truncated and wrong rankings


def test_truncated_ranking_is_refused_or_marked():
    with pytest.raises(ValueError, match="query 0 does not reach the labelled image 2"):
        evaluate(RANKS[:3], ONE)
    scores = evaluate(RANKS[:3], ONE, truncated=True)
    # Medium: image 0 second of two positives, ((0 + 1/2) / 2) / 2; hard: nothing found.
    assert scores["medium"]["map"] == pytest.approx(1 / 8, abs=1e-15)
    assert scores["hard"]["map"] == 0
    assert scores["hard"]["mp_at"] == {1: 0, 5: 0, 10: 0}
    assert all(scores[protocol]["truncated"] is True for protocol in scores)


def test_short_ranking_with_every_labelled_image_is_whole_enough():
    scores = evaluate(RANKS[:5], ONE)
    assert scores["hard"]["map"] == evaluate(RANKS, ONE)["hard"]["map"]
    assert "truncated" not in evaluate(RANKS[:5], ONE, truncated=True)["hard"]


def test_distractors_rank_as_negatives():
    ranks = np.array([[4], [7], [0], [6], [2], [5], [1], [3]])
    # As RANKS with 7 and 6 in the places of 1 and 3.
    assert evaluate(ranks, ONE)["medium"]["map"] == pytest.approx(1 / 3, abs=1e-15)
    top = ranks[:5]
    with pytest.raises(ValueError, match="index 7, outside .*size"):
        evaluate(top, ONE)
    assert evaluate(top, ONE, database_size=8)["medium"]["map"] == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([4, 1, 0, 3, 2, 1], "holds image 1 twice"),
        ([4, 1, 0, 3, 2, 6], "index 6, outside"),
        ([4, 1, 0, 3, 2, -1], "index -1, outside"),
    ],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_ranking_with_a_wrong_index_is_refused(column, message, truncated):
    with pytest.raises(ValueError, match=message):
        evaluate(np.array(column)[:, None], ONE, truncated=truncated)


def test_ranking_of_another_ground_truth_is_refused():
    for ranks in (RANKS.T, RANKS[:, 0], np.tile(RANKS, 2), RANKS.astype(float)):
        with pytest.raises(ValueError, match="one column a query"):
            evaluate(ranks, ONE)
    with pytest.raises(ValueError, match="do not belong to small"):
        evaluate(Positions([np.array([0])], [np.array([0])], 3), ONE)


def test_positions_that_miss_a_labelled_image_are_refused_or_marked():
    places = Positions([np.array([0, 4])], [np.array([2, 0])], 6)
    with pytest.raises(ValueError, match="miss the labelled image 2"):
        evaluate(places, ONE)
    scores = evaluate(places, ONE, truncated=True)
    assert scores["medium"]["map"] == pytest.approx(1 / 8, abs=1e-15)
    assert scores["medium"]["truncated"] is True


# The official numbers


@needs_shared
@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
@pytest.mark.parametrize("seed", [0, 1])
def test_recorded_official_scores(name, seed):
    gt = load_ground_truth(SHARED / "data" / "revisited" / f"gnd_{name}.pkl")
    # The recipe that the recorded values were made with.
    similarity = np.random.RandomState(seed).standard_normal((len(gt.database), len(gt.queries)))
    for q in range(len(gt.queries)):
        similarity[gt.easy[q], q] += 2.5
        similarity[gt.hard[q], q] += 1.2
        similarity[gt.junk[q], q] += 1.5
    ranks = np.argsort(-similarity, axis=0, kind="stable")
    scores = evaluate(ranks, gt)
    recorded = json.loads(EXPECTED.read_text())
    for protocol, result in scores.items():
        wanted = recorded[f"{name}/{seed}/{protocol}"]
        first = [np.nan if value is None else value for value in wanted["ap_first"]]
        # The bound that parity promises; the order of summation alone differs.
        np.testing.assert_allclose(result["map"], wanted["mAP"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            list(result["mp_at"].values()), wanted["mP@1,5,10"], rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(result["ap"][:5], first, rtol=0, atol=1e-12)
        assert np.count_nonzero(~np.isnan(result["ap"])) == wanted["n_queries"]


@needs_shared
def test_real_descriptors_reach_their_published_scores():
    gt = load_ground_truth(SHARED / "data" / "revisited" / "gnd_roxford5k.pkl")
    with np.load(SHARED / "data" / "revisited" / "roxford5k_alexnet_fc7_pca128.npz") as features:
        queries, database = features["Q"], features["X"]
    scores = evaluate(labelled_positions(queries, database, labelled(gt)), gt)
    rounded = {protocol: round(100 * scores[protocol]["map"], 2) for protocol in scores}
    assert rounded == {"easy": 28.89, "medium": 21.13, "hard": 4.60}
    by_ranks = evaluate(search(queries, database, k=len(database))[1], gt)
    for protocol in scores:
        np.testing.assert_array_equal(scores[protocol]["ap"], by_ranks[protocol]["ap"])


# Uncertainty


def test_interval_by_hand():
    # Two values 0 and 1: the mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0, 1)
    assert bootstrap_interval(np.array([0.0, 1.0, np.nan]), level=0.4) == (0.5, 0.5)
    for single in ([0.3, np.nan], [np.nan], []):  # one query tells nothing about another
        assert np.isnan(bootstrap_interval(np.array(single))).all()


def test_interval_over_landmarks_by_hand():
    # Landmark 7 has the AP 0, 0, 1, landmark 3 has 1: the mean is 1/3, 1 or (two of four) 1/2, with
    # probability 1/4, 1/4, 1/2; a landmark of nan alone is none.
    ap, clusters = np.array([0, 0, 1, 1, np.nan]), np.array([7, 7, 7, 3, 5])
    assert bootstrap_interval(ap, clusters) == (pytest.approx(1 / 3), 1)
    assert bootstrap_interval(ap, clusters, level=0.4) == (0.5, 0.5)
    assert np.isnan(bootstrap_interval(ap, np.zeros(5, int))).all()
    # Clusters of one query each are the plain interval.
    ap = np.random.default_rng(0).uniform(size=30)
    assert bootstrap_interval(ap, np.arange(30)) == bootstrap_interval(ap)
    # Ten equal queries a landmark tell as much as one.
    of_each = np.random.default_rng(1).uniform(size=7)
    wide = bootstrap_interval(np.repeat(of_each, 10), np.repeat(np.arange(7), 10))
    assert wide == pytest.approx(bootstrap_interval(of_each), abs=1e-12)
    with pytest.raises(ValueError, match=r"clusters of shape \(2,\) for values of shape \(30,\)"):
        bootstrap_interval(ap, np.zeros(2, int))


def test_interval_has_the_normal_width_and_follows_its_seed(monkeypatch):
    ap = np.random.default_rng(0).uniform(size=70)
    low, high = bootstrap_interval(ap)
    # Central limit: the interval is 2 x 1.96 standard errors wide, to a few percent at 70 queries.
    assert high - low == pytest.approx(2 * 1.96 * ap.std() / np.sqrt(70), rel=0.06)
    assert bootstrap_interval(ap) == (low, high)
    monkeypatch.setattr(statistics, "DRAWS", 7 * 70 + 1)  # seven samples at once
    # The same draws in smaller parts; sums of 70 float64 in one order.
    assert bootstrap_interval(ap) == pytest.approx((low, high), abs=1e-12)
    assert bootstrap_interval(ap, seed=1) != (low, high)
    assert bootstrap_interval(np.full(70, 0.5)) == pytest.approx((0.5, 0.5), abs=1e-12)
    with pytest.raises(ValueError, match="0 samples"):
        bootstrap_interval(ap, samples=0)
    with pytest.raises(ValueError, match="level 95"):
        bootstrap_interval(ap, level=95)


# Two systems


def paired(change, **options):
    """The test of systems whose APs differ by `change`."""
    change = np.array(change, np.float64)
    return paired_test(np.zeros(change.shape), change, **options)


@pytest.mark.parametrize(
    ("change", "p_value"),
    [
        ([1.0, 1.0, 1.0], 2 / 8),  # of the 8 sums only +3 and -3 are as far from 0
        ([0.3, 0.2, -0.1], 4 / 8),  # observed 0.4: +-0.6 and +-0.4 are, +-0.2 and 0 are not
        ([0.5, -0.5], 1.0),  # observed 0
        ([1.0, 0.0, 1.0], 2 / 4),  # a query that does not change says nothing
        ([0.0, 0.0], 1.0),
        ([0.1] * 16, 2 / 2**16),  # sums of 0.1 in any order: what equals the observed one counts
    ],
)
def test_sign_flips_of_few_queries_by_hand(change, p_value):
    result = paired(change)
    assert (result.p_value, result.exact) == (p_value, True)


def test_sign_flips_of_many_queries_are_a_seeded_sample(monkeypatch):
    # One of 2^20 sums is as extreme on either side: 10,000 draws find none but the observed one.
    far = paired([0.1] * 20)
    assert (far.p_value, far.exact) == (1 / 10_001, False)
    change = np.random.default_rng(0).normal(0.05, 0.2, 15)
    exact = paired(change)
    monkeypatch.setattr(statistics, "EXACT", 4)
    drawn = paired(change)
    assert exact.exact and not drawn.exact
    # Four standard deviations of a share of 10,000 draws.
    bound = 4 * np.sqrt(exact.p_value * (1 - exact.p_value) / 10_000)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=bound)
    assert paired(change) == drawn
    assert paired(change, seed=1) != drawn
    monkeypatch.setattr(statistics, "DRAWS", 30)  # two draws at once instead of all
    assert paired(change, samples=1001).p_value == pytest.approx(exact.p_value, abs=4 * bound)


def test_paired_test_by_hand():
    first, second = np.array([0.5, np.nan, 0.0, 0.25]), np.array([0.5, np.nan, 1.0, 0.0])
    result = paired_test(first, second)
    # Changes 0, 1, -1/4: mean 1/4. Flips of 1 and 1/4: observed 3/4 is below 5/4, so all 4 count.
    assert result.difference == 0.25
    assert (result.queries, result.won, result.lost, result.p_value) == (3, 1, 1, 1.0)
    # Three queries can reject no difference.
    assert np.isnan([result.low, result.high]).all()
    other = paired_test(second, first)
    assert (other.difference, other.won, other.lost) == (-0.25, 1, 1)


def test_paired_test_over_landmarks_by_hand():
    # Six landmarks of 2, 1, 1, 1, 1, 1 queries with the sums 6, 1, 2, 3, 4, 5, in percent.
    change = np.array([2, 4, 1, 2, 3, 4, 5]) / 100
    clusters = np.array([9, 9, 4, 5, 6, 7, 8])
    result = paired(change, clusters=clusters)
    assert (result.queries, result.landmarks, result.exact) == (7, 6, True)
    assert result.difference == pytest.approx(0.03)
    # Only the observed signs and their opposites reach 21: 2 of 64.
    assert result.p_value == 2 / 64
    # A difference is rejected if fewer than 5 % of 64, that is 2, signs reach the observed sum. The
    # last that is not has one more pair: the smallest and the greatest mean of some landmarks.
    assert (result.low, result.high) == pytest.approx((0.01, 0.05))
    # Queries taken singly: 2 of 128; 5 % are 6.4, so four pairs count, of the means below 2.5: 1
    # (1), 1.5 (1, 2 of either) and 2; above by symmetry.
    single = paired(change)
    assert (single.landmarks, single.p_value) == (None, 2 / 128)
    assert (single.low, single.high) == pytest.approx((0.015, 0.045))


@pytest.mark.parametrize("seed", range(40))
def test_interval_excludes_0_exactly_where_systems_differ(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(6, 60))
    change = generator.normal(0.1, 0.3, count)
    clusters = generator.integers(0, generator.integers(6, 25), count)
    result = paired(change, clusters=clusters)
    if np.isnan(result.low):
        assert result.landmarks < statistics.FEWEST and not result.differ
    else:
        assert result.low <= result.difference <= result.high
        assert (result.low > 0 or result.high < 0) == result.differ
    # Each end moved by itself is where the test of what is left changes its mind.
    if result.exact and not np.isnan(result.low):
        for end, sign in ((result.low, -1), (result.high, 1)):
            inside, outside = (
                paired(change - end - sign * step, clusters=clusters) for step in (-1e-6, 1e-6)
            )
            assert outside.differ and not inside.differ


def test_paired_test_of_no_query_and_of_other_queries():
    nothing = paired_test(np.array([np.nan]), np.array([np.nan]))
    assert nothing.queries == 0 and np.isnan([nothing.difference, nothing.p_value]).all()
    assert not nothing.differ
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\): not the same queries"):
        paired_test(np.zeros(2), np.zeros(1))
    with pytest.raises(ValueError, match="query 1 counts in one system only"):
        paired_test(np.zeros(2), np.array([0.0, np.nan]))


def test_paired_test_sees_a_small_difference_that_all_queries_share():
    # Single intervals overlap widely; paired, the difference is plain.
    ap = np.random.default_rng(0).uniform(size=50)
    result = paired_test(ap, ap + 0.02)
    assert result.differ and result.low == pytest.approx(0.02, abs=1e-9)
    assert result.landmarks is None
    assert bootstrap_interval(ap)[1] > bootstrap_interval(ap + 0.02)[0]


def test_verdict_in_one_sentence():
    flat = paired([0.125] * 6)  # p = 2 / 64
    assert statistics.verdict(flat, "A", "B") == (
        "B is better than A (+12.5 points, 95 % interval +12.5 to +12.5, p = 0.031, 6 queries)."
    )
    worse = statistics.verdict(paired([-0.1] * 6), "A", "B")
    assert worse.startswith("A is better than B (-10.0 points")
    unsure = statistics.verdict(paired([0.5] * 5 + [-0.5]), "A", "B")  # p = 14 / 64
    assert unsure.startswith("A and B do not differ by more than chance explains (+33.3 points")
    few = statistics.verdict(paired([0.5] * 5), "A", "B")  # p = 2 / 32 at least
    assert few == (
        "no test can tell A and B apart (+50.0 points, 5 queries): it takes at least 6 queries."
    )
    few = statistics.verdict(paired([0.5] * 7, clusters=np.zeros(7, int)), "A", "B")
    assert "(+50.0 points, 7 queries of 1 landmark): it takes at least 6 landmarks" in few
    same = statistics.verdict(paired([0.0]), "A", "B")
    assert same == "A and B do not differ (every query has the same AP, 1 query)."
    assert "no query counts" in statistics.verdict(paired([]), "A", "B")


# Tables and records


def test_table_in_percent():
    gt = truth(([0], [2], [4]), ([], [], [1]))
    table = score_table(evaluate(np.tile(RANKS, 2), gt))
    assert table.index.tolist() == ["Easy", "Medium", "Hard"]
    assert table.columns.tolist() == ["mAP", "low", "high", "mP@1", "mP@5", "mP@10", "queries"]
    # One query counts: there is no interval.
    medium = table.loc["Medium"]
    assert medium.drop(["low", "high"]).tolist() == [33.3, 0, 50, 50, 1]
    assert medium[["low", "high"]].isna().all()
    assert score_table(evaluate(RANKS, ONE), digits=2).loc["Hard", "mAP"] == 16.67


def test_table_of_several_rankings_and_of_records():
    first = evaluate(RANKS, ONE)
    record = scores_document(
        evaluate(RANKS[:, :0], truth()),
        protocol={},
        parameters={},
        inputs={},
        ground_truth=truth(),
    )
    table = score_table({"global": first, "none": json.loads(json.dumps(record))})
    assert table.index.tolist()[:2] == [("global", "Easy"), ("global", "Medium")]
    assert table.loc[("global", "Easy"), "mAP"] == 25
    assert np.isnan(table.loc[("none", "Hard"), "mAP"])
    assert table.loc[("none", "Hard"), "queries"] == 0
    with pytest.raises(ValueError, match="no scores of easy, medium, hard"):
        score_table({})


def test_hardest_protocol_under_which_a_query_counts():
    scores = evaluate(np.tile(RANKS, 2), truth(([0], [2], [4]), ([], [], [1])))
    assert evaluation_scores.hardest(scores) == "hard"
    scores = evaluate(RANKS, truth(([0], [], [4])))
    assert evaluation_scores.hardest(json.loads(json.dumps(runs.plain(scores)))) == "medium"
    with pytest.raises(ValueError, match="no query has a positive"):
        evaluation_scores.hardest(evaluate(RANKS, truth(([], [], [4]))))


def test_record_is_plain_and_complete(tmp_path):
    gt = truth(([0], [2], [4]), ([], [], [1]))
    scores = evaluate(np.tile(RANKS, 2), gt)
    record = scores_document(
        scores,
        protocol={"crop_queries": True},
        parameters={"size": 512, "scales": (1.0,)},
        inputs={"data": "ab12"},
        failed=1,
        ground_truth=gt,
        further={"published": scores},
    )
    again = runs.read_json(runs.write_json(tmp_path / "scores.json", record))
    assert again == record
    assert again["easy"] == {
        "map": 0.25,
        "interval": [None, None],
        "mp_at": {"1": 0, "5": 0.5, "10": 0.5},
        "ap": [0.25, None],
    }
    assert again["published"]["easy"] == again["easy"]
    assert again["parameters"] == {"size": 512, "scales": [1.0]}
    assert again["fingerprints"] == {"data": "ab12", "ground truth": gt.fingerprint}
    assert again["queries"] == gt.queries
    # The second query has but one labelled image, which the first lacks: each its own landmark.
    assert again["bootstrap"] == {"level": 0.95, "samples": 10_000, "seed": 0} | {
        "landmarks": [0, 1],
        "landmarks_from": "queries",
    }
    assert again["failed_images"] == 1
    assert set(again) == {"easy", "medium", "hard", "protocol", "parameters", "fingerprints"} | {
        "failed_images",
        "versions",
        "bootstrap",
        "queries",
        "published",
    }


def test_record_refuses_paths_and_repeated_keys(tmp_path):
    scores, rest = evaluate(RANKS, ONE), {"protocol": {}, "inputs": {}, "ground_truth": ONE}
    for value in (tmp_path, str(tmp_path), [str(tmp_path)], {"of": Path("x")}):
        with pytest.raises(ValueError, match=r"parameters\.model.* is the path"):
            scores_document(scores, parameters={"model": value}, **rest)
    with pytest.raises(ValueError, match="'hard' already"):
        scores_document(scores, parameters={}, further={"hard": scores}, **rest)
