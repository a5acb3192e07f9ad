"""Is it there at all: own photographs with RootSIFT, a fit to known places, and its verdict."""

import shutil

import numpy as np
import pytest

from tests.stages.test_own import describe, folder as two_places, texture, write
from vitgal import runs
from vitgal.data.photographs import PhotographError
from vitgal.models.sources import baseline_network
from vitgal.retrieval.presence import Presence, PresenceError
from vitgal.settings import (
    GlobalSettings,
    LocalSettings,
    MachineSettings,
    RerankingSettings,
    SettingsError,
    Values,
    settings_of,
)
from vitgal.stages import model_choice, own, presence
from vitgal.stages.own import Describer

__all__ = ["two_places"]  # fixtures

RERANKING = RerankingSettings.build({
    "matching": "mutual_ratio", "match_ratio": 0.85, "order": "fused", "top": 20,
    "estimator": "magsac", "threshold": 6.0,
})  # fmt: skip


def sift_describer(xcit_file, run, **changed) -> Describer:
    local = LocalSettings(**{"local": "sift", "size": 96} | changed)
    return Describer(run, xcit_file, GlobalSettings(size=64), local, MachineSettings(threads=1))


@pytest.fixture(scope="module")
def described_once(xcit_file, tmp_path_factory):
    """Four places with two views of one texture each, and four of one view; their descriptions."""
    top = tmp_path_factory.mktemp("described")
    for seed in range(8):
        wide = texture(seed, (96, 144))
        write(top / f"places/{seed}/1.png", wide[:, :128])
        if seed < 4:
            write(top / f"places/{seed}/2.png", wide[:, 16:])
    assert describe(top / "places", sift_describer(xcit_file, top / "run")).extracted == 12
    return top


@pytest.fixture
def described(described_once, xcit_file, tmp_path) -> own.Photographs:
    """A copy of the places, described in the run `tmp_path / "run"`."""
    shutil.copytree(described_once, tmp_path, dirs_exist_ok=True)
    return describe(tmp_path / "places", sift_describer(xcit_file, tmp_path / "run"))


def test_own_photographs_with_sift(two_places, xcit_file, tmp_path):
    describer = sift_describer(xcit_file, tmp_path / "run", max_keypoints=200)
    photographs = describe(two_places, describer)
    assert photographs.features("a/1.png").code_dim == 128
    settings = runs.read_json(describer.folder / "settings.json")
    assert settings["options"] == {"local": "sift", "max_keypoints": 200}
    result = own.search_folder(photographs, "a/1.png", None, RERANKING)
    row = result.table.set_index("photograph").loc["a/2.png"]
    assert row["rank"] == 1 and row["evidence"] == row["inliers"] > 20
    # Moved by 16 of 128 pixels of the photograph, which are 12 of the 96 of the input.
    homography = result.pair("a/2.png")[1].verification.homography
    np.testing.assert_allclose(homography @ (60, 40, 1), (48, 40, 1), atol=0.5)
    assert "probability" not in result.table
    assert result.verdict().startswith("how probable it is that any of these shows it is unknown")
    assert describe(two_places, sift_describer(xcit_file, tmp_path / "run")).extracted == 3
    with pytest.raises(SettingsError, match="local_features is for benchmarks"):
        _ = sift_describer(xcit_file, tmp_path, local="tokens", local_features="x.h5").folder


def test_the_fused_order_of_own_photographs(described):
    """Worked out from the table's own columns: chance is the second half by similarity."""
    table = own.search_folder(described, "0/1.png", None, RERANKING).table
    half = table.sort_values("global_rank").iloc[len(table) // 2 :]
    median, quartile = half["evidence"].clip(upper=60).astype(float).quantile([0.5, 0.75])
    excess = (table["evidence"].clip(upper=60).astype(float) - quartile).clip(lower=0)
    excess /= max(quartile - median, 4)
    scores = table["similarity"] + 2 * half["similarity"].std(ddof=0) * excess
    assert (np.diff(scores) <= 1e-7).all() and len(table) == 11
    assert table["photograph"][0] == "0/2.png" and excess[0] > 5


def test_a_fit_to_known_places_tells_what_is_there(described, two_places, tmp_path):
    describer = described.describer
    assert presence.known_presence(describer, RERANKING) is None
    fitted = presence.fit_places(described, RERANKING)
    assert (fitted.pairs, fitted.positives) == (12 * 11, 8)
    assert fitted.precision == fitted.recall == 1  # textures without noise
    known = presence.known_presence(describer, RERANKING)
    assert known == fitted
    other = RerankingSettings.build({"matching": "mutual"})
    assert presence.known_presence(describer, other) is None  # fitted for other matching
    photographs = describe(two_places, describer)
    found = own.search_folder(photographs, "a/1.png", None, RERANKING, known)
    assert found.table["probability"][0] > known.threshold
    assert found.verdict().startswith("the best shows it with ")
    missing = own.search_folder(photographs, "b/1.JPG", None, RERANKING, known)
    assert missing.table["probability"].max() < known.threshold
    assert missing.verdict().startswith("nothing here shows it: the best has ")
    own.write_ranking(missing, tmp_path / "ranking.csv")
    assert (tmp_path / "verdict.txt").read_text() == missing.verdict() + "\n"
    header = (tmp_path / "ranking.csv").read_text().split("\n")[0]
    assert header.endswith("matches,inliers,evidence,probability")


def test_places_that_fix_nothing_are_refused(two_places, xcit_file, tmp_path):
    describer = sift_describer(xcit_file, tmp_path / "run")
    write(tmp_path / "one/a.png", texture(0))
    write(tmp_path / "one/b.png", texture(1))
    with pytest.raises(PresenceError, match="of which none show one place .* with two photographs"):
        presence.fit_places(describe(tmp_path / "one", describer), RERANKING)
    with pytest.raises(PhotographError, match="nothing but the query"):
        (tmp_path / "one/b.png").unlink()
        presence.fit_places(describe(tmp_path / "one", describer), RERANKING)


def test_places_that_are_one(described):
    every = [(str(seed), "0") for seed in range(1, 8)]
    with pytest.raises(PresenceError, match="of which all show one place"):
        presence.fit_places(described, RERANKING, every)


def test_a_damaged_fit_is_named(xcit_file, tmp_path):
    describer = sift_describer(xcit_file, tmp_path / "run")
    (describer.folder / "presence.json").write_text('{"x": {"bias": "high"}}')
    with pytest.raises(PresenceError, match="presence.json holds other entries .* delete it"):
        presence.known_presence(describer, RERANKING)


def test_the_shipped_models_are_whole():
    for entry in presence.shipped().values():
        model = Presence(**{name: entry[name] for name in presence.SCHEMA})
        assert 0 < model.threshold < 1 and model.similarity >= 0 and model.evidence >= 0
        assert entry["made"]


def test_what_is_not_set_suits_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(model_choice, "baseline_network", lambda: "timm:x@net.pth")
    nothing = settings_of(Values({}, {}))
    chosen = model_choice.own_models(tmp_path / "run")
    whole = chosen.complete(nothing)
    assert (whole.local.local, whole.reranking.order, whole.reranking.top) == ("sift", "fused", 50)
    assert whole.describing.size == 288
    typed = {"local": "xfeat", "top": 20, "threshold": 8.0, "global_size": 224}
    whole = chosen.complete(settings_of(Values.of(typed, "the command line")))
    assert (whole.local.local, whole.reranking.top) == ("xfeat", 20)
    assert (whole.reranking.verification.threshold, whole.describing.size) == (8.0, 224)
    other = model_choice.own_models(tmp_path / "run", "b.pth").complete(nothing)
    assert (other.describing.size, other.local.size, other.reranking.top) == (224, 320, 20)
    assert other.local.local == "tokens" and other.reranking.count == "features"


@pytest.mark.parametrize("package", [True, False])
def test_the_shipped_model_is_that_of_the_defaults(package, tmp_path, monkeypatch):
    if package and baseline_network() is None:
        pytest.skip("the extra baselines is not installed")
    if not package:  # the weights of 8 bits
        monkeypatch.setattr(model_choice, "baseline_network", lambda: None)
    chosen = model_choice.own_models(tmp_path / "run")
    whole = chosen.complete(settings_of(Values({}, {})))
    describer = Describer(
        tmp_path / "run",
        chosen.describing,
        whole.describing,
        whole.local,
        MachineSettings(device="cpu"),
        local_model=chosen.local,
    )
    known = presence.known_presence(describer, whole.reranking)
    assert known is not None, "fit it anew: see `made` in presence.json"
    low, high = known.probabilities(np.array([0.4, 0.9]), np.array([0, 60]))
    assert low < 0.05 and high > 0.95
