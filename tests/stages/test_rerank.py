"""The reranking stage: its files, its resumption and its refusals."""

import dataclasses
import io
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from statistics import pstdev, quantiles

import numpy as np
import pytest

from tests.retrieval_cases import image_pair, random_benchmark, unit
from vitgal import runs
from vitgal.data.revisited import GroundTruth, labelled, load_ground_truth, write_ground_truth
from vitgal.evaluation.landmarks import find_landmarks
from vitgal.evaluation.protocol import evaluate
from vitgal.evaluation.statistics import bootstrap_interval
from vitgal.features import store
from vitgal.retrieval import exact_ranks, exact_search, shortlists
from vitgal.retrieval.ranking import Fusion, Positions, Reranking, rerank
from vitgal.settings import MachineSettings, RerankingSettings
from vitgal.stages.rerank import count_inliers, rerank_shortlist

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
    similarities, ranks = exact_search.search(
        queries, database, k=shortlists.shortlist_depth(truth, NUMBER, top=TOP)
    )
    source = folder / "random" / "global"
    with runs.stage(source, "global", parameters={}, inputs={}) as stage:
        runs.write_json(
            source / "names.json", {"queries": truth.queries, "database": truth.database}
        )
        runs.write_array(source / "ranks.npy", ranks)
        runs.write_array(source / "similarities.npy", similarities)
        exact_ranks.labelled_positions(queries, database, labelled(truth)).save(
            source / "positions.npz"
        )
        lists = shortlists.shortlist(ranks, truth, top=TOP)
        names = dict(queries=truth.queries, database=truth.database)
        shortlists.write_shortlist(source / "shortlist.txt", lists, **names)
        runs.write_json(
            source / "scores.json", {"protocol": {"queries": "cropped"}, "failed_images": 2}
        )
        listed = ["shortlist.txt", "similarities.npy"]
        stage.finish([path.name for path in source.glob("[!s]*.*")] + listed)
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


def rerank_run(folder: Path, *, workers=1, match_device=None, overwrite=False, **values) -> Path:
    settings = RerankingSettings.build({"top": TOP, "max_distance": 0.5} | values)
    truth = load_ground_truth(folder / "benchmark" / "gnd_random.pkl")
    machine = MachineSettings(workers=workers, match_device=match_device)
    return rerank_shortlist(folder, truth, settings, machine, overwrite=overwrite)


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


def recorded(scores: dict, truth: GroundTruth) -> dict:
    """`evaluate`'s dict as a scores.json holds it: with the interval of each mAP."""
    clusters = find_landmarks(truth).clusters
    intervals = {p: bootstrap_interval(single["ap"], clusters) for p, single in scores.items()}
    return runs.plain({p: single | {"interval": intervals[p]} for p, single in scores.items()})


@pytest.mark.parametrize("workers", [1, 2])
def test_fused_order_sorts_by_similarity_and_evidence(tmp_path, workers):
    folder = rerank_run(
        make_run(tmp_path), workers=workers, order="fused", count="features",
        matching="mutual_ratio", fused_weight=0.5, fused_cap=15, confidence=0.99,
    )  # fmt: skip
    source = folder.parent / "global"
    ranks, similarities = (np.load(source / f"{n}.npy") for n in ("ranks", "similarities"))
    candidates, features = (np.load(folder / f"{n}.npy") for n in ("candidates", "features"))
    np.testing.assert_array_equal(features, np.load(folder / "inliers.npy"))  # none is shared
    np.testing.assert_array_equal(features, np.load(folder / "evidence.npy"))
    truth = load_ground_truth(tmp_path / "benchmark" / "gnd_random.pkl")
    for q, query in enumerate(truth.queries):
        ignored = np.concatenate([truth.easy[q], truth.junk[q]])
        column = ranks[:, q].tolist()
        first = [image for image in column if image not in ignored][:TOP]
        known = dict(zip(column, similarities[:, q].tolist(), strict=True))
        # As in make_run: image i shares 24 - 6 * (i % 5) features with a query, every fifth none.
        counts = {image: min(24 - 6 * (image % 5), 15) for image in first}
        half = sorted(first, key=lambda image: -known[image])[TOP // 2 :]
        chance, spread = [counts[image] for image in half], pstdev(known[image] for image in half)
        _, middle, quartile = quantiles(chance, method="inclusive")
        scores = {
            image: known[image]
            + 0.5 * spread * max(counts[image] - quartile, 0) / max(quartile - middle, 4)
            for image in first
        }
        wanted = iter(sorted(first, key=lambda image: -scores[image]))
        expected = [next(wanted) if image in first else image for image in column]
        assert np.load(folder / "top_hard.npy")[:, q].tolist() == expected, query
    for variant in ("easy", "medium", "hard", "published"):
        table = np.full(candidates.shape, np.nan)
        for q, row in enumerate(candidates):
            known = dict(zip(ranks[:, q].tolist(), similarities[:, q], strict=True))
            table[q, row >= 0] = [known[image] for image in row[row >= 0].tolist()]
        options = dict(candidates=candidates, ground_truth=truth, protocol=variant, top=TOP)
        top = rerank(ranks, features, **options, fusion=Fusion(table, 0.5, 15))
        np.testing.assert_array_equal(np.load(folder / f"top_{variant}.npy"), top)
    scores = json.loads((folder / "scores.json").read_text())
    order = {"count": "features", "order": "fused", "fused_weight": 0.5, "fused_cap": 15}
    assert order.items() <= scores["protocol"].items()
    assert "similarities.npy" in scores["fingerprints"]
    outputs = json.loads((folder / "stage.json").read_text())["outputs"]
    assert {"inliers.npy", "features.npy", "evidence.npy"} <= outputs.keys()


def test_fused_order_records_its_default_weights(tmp_path):
    folder = rerank_run(make_run(tmp_path), order="fused")
    manifest = json.loads((folder / "stage.json").read_text())
    assert manifest["parameters"]["order"] == "fused"
    assert "fused_weight" not in manifest["parameters"]  # a later setting at its default
    protocol = json.loads((folder / "scores.json").read_text())["protocol"]
    assert (protocol["fused_weight"], protocol["fused_cap"]) == (2.0, 60)


def test_published_order_writes_and_records_what_it_did(finished):
    folder = finished / "random" / "rerank"
    assert not {"features.npy", "evidence.npy"} & {path.name for path in folder.iterdir()}
    manifest = json.loads((folder / "stage.json").read_text())
    assert "similarities.npy" not in manifest["inputs"]
    later = {"method", "ratio", "count", "order", "fused_weight", "fused_cap"}
    assert not later & manifest["parameters"].keys()
    assert not later & json.loads((folder / "scores.json").read_text())["protocol"].keys()


def test_fused_order_refuses_similarities_of_another_ranking(tmp_path):
    run = make_run(tmp_path)
    path = run / "random" / "global" / "similarities.npy"
    np.save(path, np.load(path)[1:])
    with pytest.raises(runs.StageError, match="similarities.npy does not fit ranks.npy: run 04"):
        rerank_run(run, order="fused")
    assert rerank_run(run, overwrite=True).name == "rerank"  # the published order needs none


def test_stage_files_have_the_documented_content(finished):
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
            assert scores["published"] == recorded(evaluate(after, truth), truth)
        else:
            assert scores[variant] == recorded(evaluate(after, truth), truth)[variant]
    assert scores["global"] == recorded(evaluate(before, truth), truth)
    assert scores["queries"] == truth.queries and scores["protocol"]["reranked"] is True
    assert scores["fingerprints"]["ground truth"] == truth.fingerprint
    assert set(scores["earlier"]) == {"global", "local"}
    assert scores["parameters"]["estimator"] == "degensac" and scores["parameters"]["top"] == TOP
    assert scores["protocol"]["queries"] == "cropped" and scores["failed_images"] == 2
    assert str(finished) not in (folder / "scores.json").read_text()
    assert not (folder / "partial").exists()


def test_stage_is_the_same_with_several_workers_and_again(finished, tmp_path):
    actual = contents(finished / "random" / "rerank")
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    assert contents(rerank_run(copy, workers=2)) == actual
    before = (copy / "random" / "rerank" / "stage.json").read_bytes()
    assert contents(rerank_run(copy, workers=1)) == actual, "workers are no setting"
    rerank_run(copy, workers=1, match_device="cpu")  # nor is the device: finished, so reused
    assert (copy / "random" / "rerank" / "stage.json").read_bytes() == before, "it was reused"


def test_stage_is_the_same_with_matching_in_torch(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    rerank_run(copy, match_device="cpu")
    assert contents(copy / "random" / "rerank") == contents(finished / "random" / "rerank")
    shutil.rmtree(copy / "random" / "rerank")
    with pytest.raises(ValueError, match="no device 'cuda:99'"):
        rerank_run(copy, match_device="cuda:99")
    assert not (copy / "random" / "rerank").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ties": "gobal"},
        {"max_distance": -1.0},
        {"max_distance": math.nan},
        {"match_keypoints": -1},
        {"top": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RerankingSettings.build(wrong)


def test_stage_refuses_other_settings(finished):
    with pytest.raises(runs.StageError, match=r"parameters.max_distance: 0.5 there, 0.6 now"):
        rerank_run(finished, max_distance=0.6)


def test_stage_needs_the_stages_before_it(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "random" / "rerank")
    (copy / "random" / "local" / "stage.json").unlink()
    with pytest.raises(runs.StageError, match="run 05_local_extraction"):
        rerank_run(copy)
    (copy / "random" / "global" / "stage.json").unlink()
    with pytest.raises(runs.StageError, match="run 04_global_evaluation"):
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
    settings = RerankingSettings()
    counts = count_inliers(opened, "query", ["none", "four", "five"], settings=settings)
    assert counts.tolist() == [0, 0, 5]  # four matches are fewer than verification needs
    counts = count_inliers(opened, "query", [], settings=settings)
    assert counts.shape == (0,)
    counts = count_inliers(opened, "none", ["query", "four"], settings=settings)
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

    opened = Both(store.FeatureStore.open(tmp_path / "q").items())
    opened |= store.FeatureStore.open(tmp_path / "d").items()
    width = query.descriptors.shape[1]
    message = f"query query and database image narrow.*{width} wide, gallery descriptors 5"
    with pytest.raises(ValueError, match=message):
        count_inliers(
            Both(opened), "query", ["narrow"], settings=RerankingSettings(), device=device
        )


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
    sys.stderr = io.StringIO()  # the bar's: pytest keeps it in a file
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
