"""A model as the hub keeps it: weights, configuration and a card of its run's scores."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from vitgal import ViTGaL, build_model
from vitgal.models.hub import HubError

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return build_model("xcit_nano_12_p16_224", code_dim=8, seed=3)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, model_card_kwargs={"licence": "cc-by-4.0"})
    return folder


def write_scores(folder, sha256, value, interval):
    folder.mkdir(parents=True)
    part = {"map": value, "mp_at": {"1": value}, "ap": [value], "interval": interval}
    scores = {"easy": {**part, "map": None, "ap": [None]}, "medium": part, "hard": part}
    text = json.dumps({**scores, "fingerprints": {"weights": sha256}})
    (folder / "scores.json").write_text(text)


def test_a_saved_model_is_loaded_and_saved_again_in_the_same_bytes(model, saved, tmp_path):
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "config.json"] + [
        "model.safetensors"
    ]
    again = ViTGaL.from_pretrained(saved)
    assert not again.training and again.code_dim == 8
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    again.save_pretrained(tmp_path, model_card_kwargs={"licence": "cc-by-4.0"})
    for path in saved.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    card = (saved / "README.md").read_text()
    assert "\nlicense: cc-by-4.0\n---\n" in card and "## Scores" not in card
    # A card that its author has changed stays.
    (tmp_path / "README.md").write_text("mine")
    again.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_shows_exactly_the_scores_that_these_weights_got(model, saved, tmp_path):
    own = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    write_scores(tmp_path / "a|b" / "global", own, 0.5, [0.25, 0.875])
    write_scores(tmp_path / "a|b" / "rerank", own, 1.0, [None, None])
    write_scores(tmp_path / "other" / "global", "0" * 64, 0.125, [None, None])
    write_scores(tmp_path / "a|b" / "global-untrained", own, 0.125, [None, None])
    card = str(model.generate_model_card(run=tmp_path))
    assert [line for line in card.splitlines() if line.startswith("| a")] == [
        "| a_b | global | medium | 50.0 | 25.0 to 87.5 |",
        "| a_b | global | hard | 50.0 | 25.0 to 87.5 |",
        "| a_b | reranked | medium | 100.0 | – |",
        "| a_b | reranked | hard | 100.0 | – |",
    ]
    assert "12.5" not in card and "license:" not in card and "Of the weights: none stated" in card


def test_a_card_without_scores_of_these_weights_is_refused(model, tmp_path):
    with pytest.raises(HubError, match="has no scores: run notebook 04_global_evaluation"):
        model.generate_model_card(run=tmp_path)
    write_scores(tmp_path / "a" / "global", "0" * 64, 0.5, [None, None])
    with pytest.raises(HubError, match="has scores of other weights only"):
        model.generate_model_card(run=tmp_path)
    with pytest.raises(HubError, match="licence 'MIT\\\\n---' is no short name such as mit"):
        model.generate_model_card(licence="MIT\n---")


def test_a_name_that_is_no_model_is_refused_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(HubError, match="^'a b' is neither a folder here nor a name on the hub"):
        ViTGaL.from_pretrained("a b")
    with pytest.raises(HubError, match="^me/none is no folder here and the hub does not give"):
        ViTGaL.from_pretrained("me/none", local_files_only=True, cache_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        ViTGaL.from_pretrained(tmp_path / "empty")


def test_torch_hub_gives_the_small_model():
    model = torch.hub.load(str(TOP), "vitgal_lite0", source="local")
    assert model.architecture == "timm:tf_efficientnet_lite0" and not model.training
    file = str(TOP / "weights" / "vitgal_lite0.safetensors")
    same = torch.hub.load(str(TOP), "vitgal_model", file, source="local")
    assert torch.equal(same.autoencoder.cls_token, model.autoencoder.cls_token)
