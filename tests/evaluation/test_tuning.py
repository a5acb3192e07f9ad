"""Tuning on a validation set of two landmarks whose inliers are planned feature by feature."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.revisited import GroundTruth
from vitgal.evaluation import protocol, tuning
from vitgal.evaluation.tuning import TuningError
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.retrieval import shortlists, verification
from vitgal.retrieval.evidence import weigh
from vitgal.retrieval.ranking import Fusion, Positions, Reranking
from vitgal.settings import (
    GlobalSettings,
    MachineSettings,
    MatchingSettings,
    RerankingSettings,
    SettingsError,
    TuningSettings,
    VerificationSettings,
    reader,
)
from vitgal.settings.reader import Values, settings_of
from vitgal.stages import benchmark, describe, presence, rerank, tuning as stages_tuning
from vitgal.viz import tuning as viz_tuning

IMAGES = {"qa": 0, "a1": 0, "a2": 0, "qb": 1, "b1": 1, "b2": 1}  # name -> landmark
GRID = dict(max_distances=(0.7,), thresholds=(16.0, 32.0), tops=(1, 3))
GRID |= dict.fromkeys(("matchings", "estimators", "counts", "orders"), ())  # the current alone
CURRENT = {"max_distance": 1.0, "threshold": 16.0, "top": 2}


def features(distance: float, seed: int = 0) -> LocalFeatures:
    """24 features at the same points in every image, so far from the query's descriptors."""
    codes = np.eye(24, 32, dtype=np.float32)
    angle = np.arccos(1 - distance**2 / 2)
    codes = np.cos(angle) * codes
    codes[:, 31] = np.sin(angle)
    return LocalFeatures(
        keypoints=np.random.default_rng(0).uniform(0, 300, (24, 2)).astype(np.float32),
        descriptors=codes.astype(np.float32),
        scores=np.linspace(2, 1, 24, dtype=np.float32),
        scales=np.ones(24, np.float32),
        input_size=(320, 320),
        box=(0, 0, 320, 320),
        image_size=(320, 320),
    )


def make_split(run: Path, lines: list[str]) -> None:
    with runs.stage(run / "split", "split", parameters={}, inputs={}, overwrite=True) as stage:
        text = "\n".join(["path,label,role", *lines, ""])
        runs.write_text(run / "split" / "val_retrieval.csv", text)
        stage.finish(["val_retrieval.csv"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a split, whose images are 30 x 20 pixels, inside the run as the demo's are."""
    run, lines = tmp_path / "run", []
    for name, label in IMAGES.items():
        path = run / "data" / "train" / name[0] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
        role = "query" if name[0] == "q" else "database"
        lines.append(f"{name[0]}/{name}.jpg,{label},{role}")
    make_split(run, lines)
    return run


@pytest.fixture
def described(run: Path, tmp_path: Path) -> Path:
    """Rankings b1 a1 a2 b2 for qa and a1 b1 b2 a2 for qb; features near to their own landmark's."""
    folder = benchmark.validation_benchmark(run, run / "data" / "train")
    names = [f"val_retrieval/{name}" for name in ("qa", "qb", "a1", "a2", "b1", "b2")]
    rows = np.array([[0.3, 0.2, 0.9, 0.1], [0.9, 0.1, 0.3, 0.2], *np.eye(4)], np.float32)
    np.save(tmp_path / "x.npy", rows)
    (tmp_path / "x.txt").write_text("\n".join(names))
    dataset = revisited.open_dataset("val_retrieval", folder)
    describe.evaluate_descriptors(run, dataset, GlobalSettings(), descriptors=tmp_path / "x.npy")
    local = run / "val_retrieval" / "local"
    with runs.stage(local, "local", parameters={}, inputs={}) as stage:
        # To qa: a1, a2 at 0.5; to qb, whose features are turned by 90 degrees: b1, b2 at 0.5.
        items = {"qa": features(0), "qb": turned(features(0))}
        items |= {name: features(0.5) for name in ("a1", "a2")}
        items |= {name: turned(features(0.5)) for name in ("b1", "b2")}
        keys = sorted((f"val_retrieval/{name}", item) for name, item in items.items())
        store.write_shard(local / "shard-00", keys, store.ShardFormat("float32"))
        stage.finish(["shard-00/items.json"])
    return run


def turned(one: LocalFeatures) -> LocalFeatures:
    """The same points; descriptors at a distance of 0.9 from those of the other landmark."""
    angle = np.arccos(1 - 0.9**2 / 2)
    codes = one.descriptors.copy()
    codes[:, 24:30] = np.sin(angle) / np.sqrt(6)
    codes[:, :24] *= np.cos(angle)
    codes[:, 31] *= np.cos(angle)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    return LocalFeatures(**{**vars(one), "descriptors": codes})


def tune(run: Path, *, workers=1, seed=0, overwrite=False, **changed) -> Path:
    return stages_tuning.tune(
        run,
        revisited.load_ground_truth(run / "data" / "benchmark" / "gnd_val_retrieval.pkl"),
        TuningSettings(**(GRID | changed)),
        RerankingSettings(
            top=CURRENT["top"],
            matching=MatchingSettings(CURRENT["max_distance"]),
            verification=VerificationSettings(threshold=CURRENT["threshold"], seed=seed),
        ),
        MachineSettings(workers=workers),
        overwrite=overwrite,
    )


def test_validation_set_becomes_a_benchmark(run):
    folder = benchmark.validation_benchmark(run, run / "data" / "train")
    data = revisited.open_dataset("val_retrieval", folder)
    truth = data.ground_truth
    assert truth.queries == ["val_retrieval/qa", "val_retrieval/qb"]
    assert [name[-2:] for name in truth.database] == ["a1", "a2", "b1", "b2"]
    assert [images.tolist() for images in truth.easy] == [[0, 1], [2, 3]]
    assert truth.boxes.tolist() == [[0, 0, 30, 20]] * 2
    # Links within the run stay right where the run is moved to.
    assert not os.path.isabs(os.readlink(data.query_paths[0]))
    before = (folder / "gnd_val_retrieval.pkl").stat().st_mtime_ns
    assert benchmark.validation_benchmark(run, run / "data" / "train") == folder
    assert (folder / "gnd_val_retrieval.pkl").stat().st_mtime_ns == before
    moved = run.rename(run.with_name("moved")) / "data" / "benchmark"
    assert revisited.open_dataset("val_retrieval", moved).database == data.database


def test_validation_set_follows_a_new_split_and_outer_images(run, tmp_path):
    folder = benchmark.validation_benchmark(run, run / "data" / "train")
    outer = shutil.copytree(run / "data" / "train", tmp_path / "gldv2")
    make_split(run, ["q/qa.jpg,0,query", "a/a1.jpg,0,database"])
    benchmark.validation_benchmark(run, outer)
    data = revisited.open_dataset("val_retrieval", folder)
    assert len(data.database) == 1
    assert os.readlink(data.database_paths[0]) == str(outer / "a" / "a1.jpg")


def test_validation_set_is_not_written_through_a_link(run, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "qa.jpg").write_text("keep me")
    (run / "data" / "benchmark" / "jpg").mkdir(parents=True)
    planted = run / "data" / "benchmark" / "jpg" / "val_retrieval"
    planted.symlink_to(tmp_path / "victim", target_is_directory=True)
    with pytest.raises(ValueError, match="val_retrieval is a link"):
        benchmark.validation_benchmark(run, run / "data" / "train")
    assert (tmp_path / "victim" / "qa.jpg").read_text() == "keep me"


def test_validation_set_that_is_not_there(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="qa.jpg is not there: check image_folder"):
        benchmark.validation_benchmark(run, tmp_path)
    make_split(run, [])
    with pytest.raises(TuningError, match="no validation queries: run 01_data_split"):
        benchmark.validation_benchmark(run, run / "data" / "train")
    with pytest.raises(runs.StageError, match="run notebook 01_data_split first"):
        benchmark.validation_benchmark(tmp_path / "nowhere", run / "data" / "train")


def test_tuning_by_hand(described):
    result = tuning.Tuning.read(tune(described))
    assert result.grid == {
        "max_distance": [0.7, 1.0],
        "threshold": [16.0, 32.0],
        "top": [1, 2, 3],
    }
    # Both queries: wrong, right, right, wrong. (1/2 + 1/2 + 2/3) / 4 before. Within 0.7 only right
    # images match: the first two ranks reranked give right, wrong, right, the first three all.
    # Within 1.0 all match as well and count alike: nothing moves.
    assert result.before.tolist() == pytest.approx([5 / 12] * 2, abs=1e-12)
    for threshold in (0, 1):
        np.testing.assert_allclose(result.ap[0, threshold, :, 0], [5 / 12, 19 / 24, 1], atol=1e-12)
        np.testing.assert_allclose(result.ap[1, threshold, :, 1], [5 / 12] * 3, atol=1e-12)
    # Of the two thresholds, which are equal, the first.
    assert result.values(result.chosen) == {"max_distance": 0.7, "threshold": 16.0, "top": 3}
    assert result.values(result.current) == CURRENT
    np.testing.assert_allclose(result.curve("max_distance")[:, 0], [1, 5 / 12], atol=1e-12)
    # Either landmark's query would choose the same for the other.
    assert result.groups.tolist() == [0, 1]
    np.testing.assert_allclose(result.held_out, [1, 1], atol=1e-12)
    assert (result.test.won, result.test.p_value) == (2, 0.5)
    assert "no test can tell the current setting and choosing apart (+58.3" in result.advice()


def test_a_choice_is_judged_by_landmarks_that_did_not_make_it():
    # Two points of the grid, three queries of two landmarks. All together choose the second point
    # (1.7 against 1.3). Landmark 0 alone would choose the second, landmark 1 the first.
    ap = np.array([[0.2, 0.2, 0.9], [0.8, 0.8, 0.1]]).reshape(2, 1, 1, 3)
    grid = {"max_distance": [0.7, 0.9], "threshold": [16.0], "top": [5]}
    groups, before = np.array([0, 0, 1]), np.zeros(3)
    result = tuning.Tuning(grid, ap, (1, 0, 0), (0, 0, 0), before, groups)
    assert result.held_out.tolist() == [0.2, 0.2, 0.1]
    assert result.test.difference == pytest.approx(-0.8 / 3)
    alone = tuning.Tuning(grid, ap, (1, 0, 0), (0, 0, 0), before, np.zeros(3, int))
    assert np.isnan(alone.held_out).all()
    assert "no query counts" in alone.advice()


def test_figure_shows_what_was_found(described):
    curve, thresholds = viz_tuning.tuning_figure(tuning.Tuning.read(tune(described)))
    drawn = {line.get_label(): line for line in curve.lines}
    assert drawn["reranked"].get_xdata().tolist() == [1, 2, 3]
    assert drawn["reranked"].get_ydata().tolist() == pytest.approx([500 / 12, 1900 / 24, 100])
    # Both landmarks have a line of their own, here the same one.
    assert sum(line.get_linewidth() < 1 and len(line.get_xdata()) > 2 for line in curve.lines) == 2
    assert curve.get_xscale() == "log"
    assert (drawn["chosen"].get_xdata()[0], drawn["current"].get_xdata()[0]) == (3, 2)
    assert drawn["not reranked: 41.7"].get_ydata()[0] == pytest.approx(500 / 12)
    # Rows: distances 0.7 and 1.0; columns: thresholds. Three candidates, as chosen.
    assert [text.get_text() for text in thresholds.texts] == ["100.0", "100.0", "41.7", "41.7"]
    assert thresholds.get_title("left") == "mAP (%); white: as not reranked, 41.7"
    below = curve.figure.get_supxlabel()
    assert below == tuning.HARMLESS
    plt.close("all")


def test_chosen_values_are_parameters_of_notebook_06(described):
    folder = tune(described)
    values = reader.read_yaml(folder / "tuned.json")
    assert values == {"max_distance": 0.7, "threshold": 16.0, "top": 3}
    advice = tuning.Tuning.read(folder).advice("params/x.yaml")
    wanted = "vitgal run params/x.yaml --only 06 -p max_distance 0.7 -p threshold 16.0 -p top 3"
    assert f"{wanted} -p overwrite true" in advice
    assert values.keys() <= RerankingSettings.flat().keys()


def test_counts_equal_those_of_a_pair_at_every_point():
    rng = np.random.default_rng(1)
    single, other = features(0), features(0.6)
    codes = single.descriptors + rng.normal(0, 0.2, (24, 32)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    points = other.keypoints + rng.normal(0, 6, (24, 2)).astype(np.float32)
    other = LocalFeatures(**{**vars(other), "descriptors": codes, "keypoints": points})
    grid = {"max_distance": [0.3, 0.9, 1.0, 1.1], "threshold": [2.0, 8.0, 30.0]}
    current = RerankingSettings(matching=MatchingSettings(max_keypoints=20))
    counts = stages_tuning.pair_counts(single, other, grid, current)
    wanted = [
        [
            verification.inspect_pair(
                single,
                other,
                RerankingSettings(
                    matching=MatchingSettings(d, max_keypoints=20),
                    verification=VerificationSettings(threshold=t),
                ),
            ).verification.count
            for t in grid["threshold"]
        ]
        for d in grid["max_distance"]
    ]
    assert counts.tolist() == wanted
    assert len(np.unique(counts)) > 3, "the grid makes a difference"
    none = single.subset(slice(0))
    assert stages_tuning.pair_counts(none, other, grid, current).tolist() == [[0] * 3] * 4


def test_counts_equal_those_of_a_pair_for_every_other_setting():
    rng = np.random.default_rng(2)
    single, other = features(0), features(0.6)
    codes = single.descriptors + rng.normal(0, 0.2, (24, 32)).astype(np.float32)
    codes[12:20] = codes[11]  # so that matches share a feature
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    points = other.keypoints + rng.normal(0, 6, (24, 2)).astype(np.float32)
    other = LocalFeatures(**{**vars(other), "descriptors": codes, "keypoints": points})
    grid = {
        "matching": ["one_way", "mutual", "ratio"],
        "estimator": ["degensac", "magsac", "poselib"],
        "max_distance": [0.9, 1.1],
        "threshold": [8.0, 30.0],
        "count": ["inliers", "features"],
        "order": ["inliers", "fused"],
        "fused_cap": [3, 5],
        "top": [2],
    }
    counts = stages_tuning.pair_counts(single, other, grid, RerankingSettings())
    assert counts.shape == (3, 3, 2, 2, 2, 2)
    names = [*grid][:6]
    for at in np.ndindex(counts.shape):
        values = {name: grid[name][index] for name, index in zip(names, at, strict=True)}
        settings = RerankingSettings.build(values)
        pair = verification.inspect_pair(single, other, settings)
        evidence = weigh(single, other, pair)
        if values["order"] == "fused":
            wanted = evidence.believed(values["count"])
        elif values["count"] == "features":
            wanted = evidence.features
        else:
            wanted = pair.verification.count
        assert counts[at] == wanted, values
    assert len(np.unique(counts)) > 4, "the grid makes a difference"


def test_ap_of_a_query_equals_reranking_and_evaluating_each_point():
    rng = np.random.default_rng(0)
    grid = {
        "max_distance": [0.8, 0.9],
        "threshold": [16.0],
        "order": ["inliers", "fused"],
        "fused_weight": [0.5, 8.0],
        "fused_cap": [20, 40],
        "top": [1, 4, 9, 12],
    }
    truth = GroundTruth(
        name="x",
        database=[str(image) for image in range(30)],
        queries=["q"],
        boxes=np.array([[0.0, 0, 1, 1]]),
        easy=[np.array([2, 7, 19])],
        hard=[np.array([11, 28])],
        junk=[np.array([3, 5])],
    )
    order = rng.permutation(30)[:, None]
    positions = Positions.from_ranks(order, revisited.labelled(truth))
    images = shortlists.candidates(order, truth, "medium", top=12)[0]
    counts = rng.integers(0, 50, (2, 1, 2, 12)).astype(np.int32)
    similarities = np.sort(rng.uniform(0.4, 0.6, 12))[::-1].astype(np.float32)
    correct = revisited.positives(truth, "medium")[0]
    later = np.setdiff1d(correct, images)
    assert 0 < len(later) < 5, "positives before and behind"
    ap = tuning.query_ap(
        counts,
        similarities,
        np.isin(images, correct),
        positions.rank(0, later, ignored=truth.junk[0]),
        grid,
        RerankingSettings(),
    )
    assert ap.shape == (2, 1, 2, 2, 2, 4)
    for at in np.ndindex(ap.shape):
        d, t, o, w, k, c = at
        fusion = Fusion(similarities[None], grid["fused_weight"][w], grid["fused_cap"][k])
        reranking = Reranking(
            images[None],
            counts[None, d, t, o],
            truth,
            "medium",
            top=grid["top"][c],
            fusion=fusion if o else None,
        )
        after = protocol.evaluate({"medium": positions.reranked(order, reranking)}, truth)
        assert ap[at] == pytest.approx(after["medium"]["ap"][0], abs=1e-12), at
    assert len(np.unique(ap.round(9))) > 8
    none = np.zeros(12, bool), np.zeros(0, int)
    empty = tuning.query_ap(counts, similarities, *none, grid, RerankingSettings())
    assert empty.shape == ap.shape and np.isnan(empty).all()


def test_grid_holds_what_is_varied_and_the_current_values_first():
    settings = TuningSettings(
        max_distances=(0.9, 0.7), thresholds=(), tops=(5,), weights=(), caps=(99, 7)
    )
    assert tuning.make_grid(settings, RerankingSettings()) == {
        "matching": ["one_way", "mutual"],
        "max_distance": [0.7, 0.82, 0.9],
        "threshold": [16.0],
        "count": ["inliers", "features"],
        "order": ["inliers", "fused"],
        "fused_cap": sorted([7, RerankingSettings.fused_cap, 99]),
        "top": [5, 100],
    }
    plain = dataclasses.replace(settings, orders=(), matchings=("one_way",), counts=())
    assert list(tuning.make_grid(plain, RerankingSettings())) == list(tuning.ALWAYS)
    for name, value in (("tune_matchings", "both"), ("tune_orders", "best"), ("tune_counts", "")):
        with pytest.raises(SettingsError, match=f"unknown {name}"):
            TuningSettings.build({name: ["inliers", value]})


def test_stage_tries_every_setting_and_records_what_it_does_not_vary(described):
    more = dict(matchings=("mutual",), counts=("features",), orders=("fused",), weights=(0.04,))
    more |= dict(estimators=("poselib",), caps=(30,))
    folder = tune(described, max_distances=(), thresholds=(), **more)
    result = tuning.Tuning.read(folder)
    assert list(result.grid) == list(tuning.NAMES)
    assert result.ap.shape == (2, 2, 1, 1, 2, 2, 2, 2, 3, 2)
    assert np.load(folder / "inliers.npy").shape == (2, 2, 2, 1, 1, 2, 2, 3)
    # Within 1.0 all images match in all features: the order is that of similarities throughout.
    np.testing.assert_allclose(result.ap, 5 / 12, atol=1e-12)
    assert result.values(result.chosen) == result.values((0,) * 9)  # of equal points the first
    assert "fused_weight" not in runs.read_json(folder / "tuned.json")
    parameters = runs.read_json(folder / "stage.json")["parameters"]
    assert parameters["current"]["fused_weight"] == RerankingSettings.fused_weight
    assert (parameters["iterations"], parameters["max_keypoints"]) == (2000, None)
    assert not {"estimator", "threshold", "method", "count", "top"} & parameters.keys()
    parameters = stages_tuning._parameters(
        {"max_distance": [1.0], "threshold": [16.0], "order": ["inliers", "fused"], "top": [2]},
        TuningSettings(),
        RerankingSettings(count="features", fused_weight=0.5),
    )
    assert (parameters["fused_weight"], parameters["count"]) == (0.5, "features")


def test_harm_is_told_where_there_is_any():
    # Three queries of two landmarks; without reranking 0.5. Points: top 5 and 10.
    ap = np.array([[0.9, 0.8, 0.4], [0.3, 0.2, 0.7]]).reshape(1, 1, 2, 3)
    grid = {"max_distance": [0.9], "threshold": [16.0], "top": [5, 10]}
    before, groups = np.full(3, 0.5), np.array([0, 0, 1])
    result = tuning.Tuning(grid, ap, (0, 0, 0), (0, 0, 1), before, groups)
    assert result.harm() == (
        "Reranking with the current values lowers mAP from 50.0 to 40.0. "
        "With the chosen values and a top of 10, reranking lowers mAP by 10.0 at most. "
        "The chosen values lose on 1 of 2 landmarks, by 10.0 points at most."
    )
    assert result.harm() in result.advice()
    nothing = dataclasses.replace(result, before=np.full(3, np.nan))
    assert nothing.harm() == "No query counts."


def test_fewer_queries_are_drawn_by_seed(described):
    draws = [
        runs.read_json(tune(described, max_queries=1, seed=seed, overwrite=True) / "tuning.json")
        for seed in (0, 0, 6)
    ]
    queries = [draw["queries"] for draw in draws]
    assert all(len(single) == 1 for single in queries)
    assert queries[0] == queries[1]
    assert len({single[0] for single in queries}) == 2


def test_queries_are_drawn_evenly_over_landmarks():
    easy = [np.array([index // 5 * 2, index // 5 * 2 + 1]) for index in range(15)]  # five of each
    nothing = [np.zeros(0, int)] * 15
    names = [f"q{index}" for index in range(15)]
    truth = GroundTruth("x", [*"abcdef"], names, np.ones((15, 4)), easy, nothing, nothing)
    draws = [
        stages_tuning._draw_queries(
            truth, 7, RerankingSettings(verification=VerificationSettings(seed=seed))
        )
        for seed in range(4)
    ]
    for queries in draws:
        assert sorted(np.bincount(queries // 5)) == [2, 2, 3]
        assert (np.diff(queries) > 0).all()
    assert len({queries.tobytes() for queries in draws}) == 4
    every = [stages_tuning._draw_queries(truth, n, RerankingSettings()) for n in (15, 20, None)]
    assert all(queries.tolist() == [*range(15)] for queries in every)


def test_interrupted_tuning_keeps_the_queries_that_are_done(described):
    whole = {path.name: path.read_bytes() for path in tune(described).glob("*.npy")}
    folder = described / "val_retrieval" / "tuning"
    counts = np.load(folder / "inliers.npy")
    os.rename(folder / "stage.json", folder / "started.json")
    for path in folder.glob("*.npy"):
        path.unlink()
    # A count that no verification gives shows that the journal is what is used.
    counts[0, 0, 0, 0] = 77
    runs.write_array(folder / "partial" / "0.npy", counts[0])
    tune(described, workers=2)
    assert np.load(folder / "inliers.npy")[0, 0, 0, 0] == 77
    again = np.load(folder / "inliers.npy")[1]
    assert (again == counts[1]).all() and not (folder / "partial").exists()
    tune(described, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == whole


@pytest.mark.parametrize("order", ["fused", "inliers"])
def test_what_tuning_verified_says_whether_a_landmark_is_there(described, order):
    """Within 0.7 the images of a query's landmark match in 24 features, the others in none."""
    truth = revisited.load_ground_truth(described / "data/benchmark/gnd_val_retrieval.pkl")
    settings = RerankingSettings.build({"max_distance": 0.7, "order": order, "top": 4})
    grid, machine = TuningSettings(**(GRID | {"tops": ()})), MachineSettings(workers=1)
    with pytest.raises(runs.StageError, match="run notebook 06_rerank with tune first"):
        presence.judge_benchmark(described, truth, truth, settings)
    stages_tuning.tune(described, truth, grid, settings, machine)
    # The same images as a benchmark, then one whose database lacks the queries' landmarks.
    shutil.copytree(described / "val_retrieval", described / "other")
    other = dataclasses.replace(truth, name="other")
    rerank.rerank_shortlist(described, other, settings, machine)
    folder = described / "other" / "rerank"
    assert rerank.presence_probabilities(folder, 0) == {}
    known, judged = presence.judge_benchmark(described, truth, other, settings)
    assert judged.loc["val_retrieval"].tolist() == [8, 4, 100, 100, 2, 2, 2]
    assert judged.loc["other"].tolist() == judged.loc["val_retrieval"].tolist()
    assert 0 < known.threshold < 1 and known.precision == known.recall == 1
    of_query = rerank.presence_probabilities(folder, 1)
    assert {image for image, shows in of_query.items() if shows >= known.threshold} == {2, 3}
    assert of_query.keys() == {0, 1, 2, 3}
    none = [np.array([], np.int64)] * 2
    junk = dataclasses.replace(other, easy=none, hard=none, junk=[[0, 1], [2, 3]])
    _, judged = presence.judge_benchmark(described, truth, junk, settings)
    assert judged.loc["other"].tolist() == [4, 0, 0, 0, 2, 0, 0]
    assert rerank.presence_probabilities(folder, 1).keys() == {0, 1}  # the others are junk


def test_tuning_refuses_invalid_grids(described):
    with pytest.raises(ValueError, match="tune_tops"):
        tune(described, tops=(0,))
    path = described / "val_retrieval" / "local" / "shard-00" / "items.json"
    shutil.rmtree(path.parent)
    keys = [("val_retrieval/a1", features(0.5))]
    store.write_shard(path.parent, keys, store.ShardFormat("float32"))
    message = r"no local features of val_retrieval/qa, .*shorter than top=3: try fewer candidates"
    with pytest.raises(runs.StageError, match=message):
        tune(described)
    shutil.rmtree(described / "val_retrieval" / "local")
    with pytest.raises(runs.StageError, match="05_local_extraction with dataset val_retrieval"):
        tune(described)


def test_prepare_refuses_a_ranking_that_another_system_made(described):
    # Its own ranking here is one, which stands for any.
    with pytest.raises(TuningError, match="descriptors made elsewhere"):
        benchmark.prepare_validation(
            described,
            MachineSettings(),
            like="val_retrieval",
            image_folder=described,
            model=Path("x.safetensors"),
        )


def test_reasons_why_a_run_cannot_be_tuned(described, tmp_path):
    def reason(run: Path, **values: str) -> str | None:
        values = {"run_dir": str(run), "dataset": "val_retrieval"} | values
        return benchmark.untunable(settings_of(Values.of(values, "a test")))

    assert "made elsewhere" in reason(described)  # the ranking of this run is
    assert reason(described, dataset="not ranked yet") is None
    assert "made elsewhere" in reason(tmp_path, descriptors="x.npy")
    assert reason(tmp_path / "empty").startswith("empty has no split")
    missing = reason(described, dataset="not ranked yet", image_folder=str(tmp_path / "none"))
    assert missing.endswith("none: set image_folder")
    table = described / "split" / "val_retrieval.csv"
    table.write_text(table.read_text().replace(",query", ",database"))
    assert "no validation queries" in reason(described, dataset="not ranked yet")


def test_nothing_in_the_result_names_the_machine(described):
    folder = tune(described)
    text = (folder / "tuning.json").read_text() + (folder / "tuned.json").read_text()
    assert str(described) not in text
    assert set(json.loads(text[: text.index("}\n{") + 1])) >= {"grid", "chosen", "current"}
