"""Local features of timm networks: their codes, fitted beside the benchmark; weights are random."""

import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from tests.mini_benchmark import contents, evaluate, extract, noise
from tests.timm_models import build_backbone
from vitgal import runs
from vitgal.data import read_image, revisited
from vitgal.data.images import resize
from vitgal.features import CodeError, Codes
from vitgal.features.store import FeatureStore
from vitgal.models import NetworkError, inference
from vitgal.models.descriptors import local_features
from vitgal.models.token_network import local_network
from vitgal.settings import LocalSettings
from vitgal.settings.reader import Values, settings_of
from vitgal.stages import codes as stage_codes
from vitgal.stages.benchmark import suited
from vitgal.stages.inspection import Inspector, matching_fraction

FOUR = {"code_dim": 4, "max_keypoints": 9}


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, str]:
    """Sources of two networks with random weights."""
    folder = tmp_path_factory.mktemp("networks")
    sources = {}
    for name in ("test_vit", "test_efficientnet"):
        torch.manual_seed(0)
        file = folder / f"{name}.safetensors"
        save_file(build_backbone(name).network.state_dict(), file)
        sources[name] = f"timm:{name}@{file}"
    return sources


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """A folder of photographs that the benchmark does not show."""
    folder = tmp_path_factory.mktemp("others")
    for seed in range(12):
        assert cv2.imwrite(str(folder / f"{seed}.jpg"), noise(96, 128, seed=100 + seed))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, finished, networks, others) -> Path:
    """A run of the global and the local stage with a network of timm."""
    run = tmp_path_factory.mktemp("made") / "run"
    evaluate(run, finished / "benchmark", networks["test_vit"])
    options = FOUR | {"code_images": str(others)}
    extract(run, finished / "benchmark", networks["test_vit"], **options)
    return run


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def test_the_store_has_coded_tokens(made, finished, networks):
    network = inference.open_model(networks["test_vit"])
    codes = Codes.load(made / "codes" / "codes.npz")
    assert codes.projection.shape == (64, 4)
    features = FeatureStore.open(made / "mini" / "local")["query1"]
    assert features.code_dim == 4 and features.box == (8, 4, 150, 76)
    settings = LocalSettings(size=64, scales=(0.7071, 1.0), max_keypoints=9)
    image = read_image(finished / "benchmark/jpg/query1.jpg")[4:76, 8:150]
    inputs = inference.network_input(resize(image, 64, "area")[None], "cpu")
    with inference.inference(network):
        expected = local_features(
            local_network(network, settings, codes), inputs, [(features.box, (96, 128))], settings
        )[0]
    np.testing.assert_array_equal(features.keypoints, expected.keypoints)
    # half precision, and a batch of another size
    np.testing.assert_allclose(features.descriptors, expected.descriptors, atol=5e-3)


def test_the_codes_are_whitened_over_the_images_they_were_fitted_to(copy, networks, others):
    """Over the same images the codes have mean 0, variance 1 and no correlation."""
    network = inference.open_model(networks["test_vit"])
    settings = LocalSettings(size=64, scales=(0.7071, 1.0), max_keypoints=9)
    codes = Codes.load(copy / "codes" / "codes.npz")
    tokens = []
    for path in sorted(others.iterdir()):
        pixels = inference.network_input(resize(read_image(path), 64, "area")[None], "cpu")
        with inference.inference(network):
            (found,) = local_features(
                local_network(network, settings), pixels, [((0, 0, 1, 1), (1, 1))], settings
            )
        tokens.append(found.descriptors)
    rows = (np.concatenate(tokens) - codes.mean) @ codes.projection
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(rows.T, bias=True), np.eye(4), atol=1e-2)
    manifest = runs.read_stage(copy / "codes", "")
    assert manifest["recorded"]["features"] == len(rows)
    assert manifest["recorded"]["block"] == "blocks.3"


def test_reused_and_twice_the_same_bytes(copy, finished, networks, others, tmp_path, capsys):
    options = FOUR | {"code_images": str(others)}
    before = contents(copy / "mini" / "local")
    extract(copy, finished / "benchmark", networks["test_vit"], **options)
    assert contents(copy / "mini" / "local") == before
    said = capsys.readouterr().out
    assert "codes of 4 values: fitted to" in said and "tokens of blocks.3 in 12 images" in said
    codes = (copy / "codes" / "codes.npz").read_bytes()
    extract(copy, finished / "benchmark", networks["test_vit"], **options, overwrite=True)
    assert (copy / "codes" / "codes.npz").read_bytes() == codes
    assert contents(copy / "mini" / "local") == before
    assert capsys.readouterr().out == said


def test_several_workers_fit_one_set_of_codes(copy, finished, networks, others):
    before = contents(copy / "mini" / "local")
    shutil.rmtree(copy / "mini" / "local")
    shutil.rmtree(copy / "codes")
    options = FOUR | {"code_images": str(others), "worker_count": 2}
    with pytest.raises(runs.StageError, match="are for other workers"):
        extract(copy, finished / "benchmark", networks["test_vit"], **options, worker=1)
    extract(copy, finished / "benchmark", networks["test_vit"], **options, worker=0)
    assert contents(copy / "mini" / "local") == before


def test_the_default_is_the_training_split(copy, finished, networks, others):
    shutil.rmtree(copy / "codes")
    with pytest.raises(runs.StageError, match=r"has no split: run 01_data_split .* code_images"):
        extract(copy, finished / "benchmark", networks["test_vit"], **FOUR)
    with runs.stage(copy / "split", "split", parameters={}, inputs={}) as stage:
        names = sorted(path.name for path in others.iterdir())
        table = pd.DataFrame({"path": names, "label": range(len(names))})
        table.to_csv(copy / "split" / "train.csv", index=False)
        stage.finish(["train.csv"])
    # The same images as before give the same codes, so that the local stage is reused.
    extract(copy, finished / "benchmark", networks["test_vit"], **FOUR, image_folder=others)


def test_images_of_the_benchmark_are_refused(copy, finished, networks, tmp_path):
    benchmark = finished / "benchmark"
    options = FOUR | {"code_images": str(benchmark / "jpg")}
    with pytest.raises(CodeError, match=r"image0.jpg is an image of mini: codes must not"):
        extract(copy, benchmark, networks["test_vit"], **options)
    (tmp_path / "renamed").mkdir()
    shutil.copy(benchmark / "jpg/query1.jpg", tmp_path / "renamed" / "holiday.jpg")
    options["code_images"] = str(tmp_path / "renamed")
    with pytest.raises(CodeError, match="holiday.jpg is an image of mini"):
        extract(copy, benchmark, networks["test_vit"], **options)


def test_what_does_not_fit_is_refused(copy, finished, networks, others, tmp_path):
    def refuses(error, text, network="test_vit", **options):
        options = FOUR | {"code_images": str(others)} | options
        with pytest.raises(error, match=text):
            extract(copy, finished / "benchmark", networks[network], **options)

    # Another network or block in the same run
    refuses(runs.StageError, "holds a codes stage with other settings", "test_efficientnet")
    refuses(runs.StageError, "holds a codes stage with other settings", block="blocks.1")
    shutil.rmtree(copy / "codes")
    # The codes are other ones now: the store of the first network is not filled up with them.
    refuses(runs.StageError, "holds a local stage with other settings", "test_efficientnet")
    shutil.rmtree(copy / "codes")
    refuses(CodeError, "code_dim 65 is above 64, the dimension of the tokens", code_dim=65)
    refuses(CodeError, "are too few for a PCA of 64 values", code_dim=64)
    refuses(NetworkError, "has no block 'blocks.7'; it has blocks.0", block="blocks.7")
    refuses(ValueError, "holds no photograph", code_images=str(tmp_path / "run" / "mini"))
    assert not (copy / "codes" / "codes.npz").exists()


def test_the_inspector_repeats_the_features(copy, finished, networks):
    dataset = revisited.open_dataset("mini", finished / "benchmark")
    inspector = Inspector(copy, dataset, weights=networks["test_vit"])
    selection = inspector.selection("query", 1)
    assert matching_fraction(selection.kept, inspector.stored("query", 1)) == 1
    assert selection.attention[1.0].shape[1:] == selection.scores[1.0].shape
    runs.write_arrays(
        copy / "codes" / "codes.npz", {"mean": np.zeros(1), "projection": np.zeros((1, 1))}
    )
    manifest = runs.read_json(copy / "codes" / runs.MANIFEST)
    manifest["outputs"]["codes.npz"]["sha256"] = "0" * 64
    runs.write_json(copy / "codes" / runs.MANIFEST, manifest)
    with pytest.raises(runs.StageError, match="holds other codes than the local features"):
        Inspector(copy, dataset, weights=networks["test_vit"]).selection("query", 0)


def test_processes_that_wait(tmp_path):
    order, begun = [], threading.Event()

    def second() -> None:
        begun.set()
        with runs.waiting(tmp_path / "codes"):
            order.append("second")

    with runs.waiting(tmp_path / "codes"):
        thread = threading.Thread(target=second)
        thread.start()
        assert begun.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_many_images_are_thinned_evenly(tmp_path, monkeypatch, others):
    monkeypatch.setattr(stage_codes, "MAX_IMAGES", 4)
    settings = LocalSettings(code_images=str(others))
    names = [task.key for task in stage_codes.code_tasks(tmp_path, settings, None)]
    everything = sorted(path.name for path in others.iterdir())
    assert names == [everything[index] for index in (0, 4, 7, 11)]


def test_the_distance_of_matches_suits_whitened_codes(made):
    given = settings_of(Values.of({"run_dir": str(made), "dataset": "mini"}, "here"))
    assert suited(given).reranking.matching.max_distance == 1.0
    values = {"run_dir": str(made), "dataset": "mini", "max_distance": 0.9}
    given = settings_of(Values.of(values, "here"))
    assert suited(given).reranking.matching.max_distance == 0.9
