"""The benchmark of RANSAC estimators: its counts are the stage's, its summaries those by hand."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.test_reranking import small_truth
from tests.stages.test_rerank import TOP, make_run, rerank_run
from vitgal import runs
from vitgal.data.revisited import load_ground_truth
from vitgal.settings import RerankingSettings

OPTIONS = dict(max_distance=0.5, threshold=16.0, iterations=200, confidence=1.0)
SETTINGS = RerankingSettings.build(OPTIONS)


@pytest.fixture(scope="module")
def ransac():
    path = Path(__file__).parents[2] / "benchmarks" / "ransac.py"
    spec = importlib.util.spec_from_file_location("ransac", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # the script sets it for its processes
        patch.setenv("OMP_NUM_THREADS", "1")
        spec.loader.exec_module(module)
    return module


def test_count_summary_by_hand(ransac):
    # Two seeds, one query, three pairs; the last is not chosen.
    counts = np.array([[[10, 20, 99]], [[14, 20, 0]]])
    result = ransac.count_summary(counts, np.array([[True, True, False]]))
    # Means of the seeds: 15 and 17. Deviations of the pairs: 2 * sqrt(2) and 0.
    assert result["mean"] == 16 and (result["min"], result["max"]) == (15, 17)
    assert result["sd"] == pytest.approx(math.sqrt(2))
    assert result["pair"] == pytest.approx(math.sqrt(2))
    nothing = ransac.count_summary(counts, np.zeros((1, 3), bool))
    assert all(math.isnan(value) for value in nothing.values())


def test_positives_and_negatives_follow_the_labels(ransac):
    # 0 to 3 are easy or hard, 4 and 5 junk, 6 to 9 without a label.
    candidates = np.array([[4, 6, 0, 7, 2, -1]])
    listed = ransac.Shortlists(small_truth(), [], None, candidates, None)
    assert listed.positive.tolist() == [[False, False, True, False, True, False]]
    assert listed.negative.tolist() == [[False, True, False, True, False, False]]


def test_counts_and_scores_are_the_stages(ransac, tmp_path):
    run = make_run(tmp_path, failures=("image07",))
    (folder,) = ransac.datasets(run, None)
    truth = load_ground_truth(run / "benchmark" / "gnd_random.pkl")
    listed = ransac.Shortlists.read(folder, truth, TOP)
    results = tmp_path / "results"
    for seeds in (range(1), range(2)):  # in parts; the second adds seed 1 alone
        ransac.measure(results, listed, ["degensac", "magsac"], seeds, SETTINGS, workers=1)
    weights = {"top": TOP, "fused_weight": 0.05, "fused_cap": 9}
    result = ransac.measured(results, listed, RerankingSettings.build(weights))
    for estimator in ("degensac", "magsac"):
        rerank_run(run, **OPTIONS | {"estimator": estimator, "overwrite": True})
        with np.load(results / f"{listed.key}-{estimator}-0.npz") as file:
            inliers, features, evidence = file["counts"]
        np.testing.assert_array_equal(inliers, np.load(folder / "rerank" / "inliers.npy"))
        np.testing.assert_array_equal(features, inliers)  # planted: each is matched once
        stored = runs.read_json(folder / "rerank" / "scores.json")
        actual = ransac.scores(listed, inliers, TOP)
        assert actual == {protocol: stored[protocol]["map"] for protocol in ("medium", "hard")}
        assert result[estimator]["inliers"]["map"]["hard"]["max"] >= actual["hard"]
        fused = {"estimator": estimator, "count": "features", "order": "fused", "overwrite": True}
        rerank_run(run, **OPTIONS | weights | fused)
        np.testing.assert_array_equal(evidence, np.load(folder / "rerank" / "evidence.npy"))
        stored = runs.read_json(folder / "rerank" / "scores.json")["hard"]["map"]
        bounds = [result[estimator]["fused"]["map"]["hard"][end] for end in ("min", "max")]
        assert bounds[0] <= stored <= bounds[1]
    assert result["magsac"]["seeds"] == 2 and "poselib" not in result


def test_runs_without_stages_or_ground_truth_are_refused(ransac, tmp_path):
    with pytest.raises(SystemExit, match="no data set with finished stages"):
        ransac.datasets(tmp_path, None)
    with pytest.raises(SystemExit, match="no gnd_random.pkl in .* with --data"):
        ransac.ground_truth(tmp_path / "random", [tmp_path])
