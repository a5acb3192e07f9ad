"""Local features of another system: hloc's HDF5 there and back, and what is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.features.examples import features
from vitgal.features.feature_file import FeatureFile
from vitgal.features.foreign import DescriptorError
from vitgal.features.interchange import export_hloc

SIZE = (60, 80)  # (h, w)


def write(path: Path, count: int = 4, width: int = 3, **changed) -> Path:
    """A file of one image `a`; `changed` replaces datasets, None leaves one out."""
    rng = np.random.default_rng(0)
    parts = {
        "keypoints": rng.random((count, 2), np.float32) * (79, 59),
        "descriptors": rng.random((width, count), np.float32) + 1,
        "scores": np.arange(count, dtype=np.float32),
        "image_size": np.array([80, 60]),
    } | changed
    with h5py.File(path, "a") as file:
        for name, values in parts.items():
            if values is not None:
                file[f"a.jpg/{name}"] = np.asarray(values, getattr(values, "dtype", np.float32))
    return path


def test_there_and_back(tmp_path):
    items = {"b": features(5, 1), "q/b": features(3, 2), "c": features(0)}
    path = export_hloc(items, tmp_path / "x.h5")
    file = FeatureFile.open(path, list(items))
    assert file.code_dim == 10
    for name, expected in items.items():
        whole = file.read(name, expected.image_size)
        np.testing.assert_allclose(
            whole.original_keypoints(), expected.original_keypoints(), atol=1e-4
        )
        np.testing.assert_allclose(whole.descriptors, expected.descriptors, atol=1e-3)
        np.testing.assert_array_equal(whole.scores, expected.scores)
        assert whole.input_size == whole.image_size == expected.image_size


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_the_best_are_kept_in_falling_order(tmp_path, dtype):
    points = np.array([[0, 0], [10, 20], [79, 59], [-0.5, 59.5]], dtype)
    path = write(tmp_path / "x.h5", keypoints=points, descriptors=np.eye(3, 4, dtype=dtype) + 1)
    found = FeatureFile.open(path, ["a"]).read("a", SIZE, max_keypoints=3)
    np.testing.assert_array_equal(found.scores, [3, 2, 1])
    # (0, 0) is a pixel's centre in the file, the corner in ours
    np.testing.assert_array_equal(found.keypoints, [[0, 60], [79.5, 59.5], [10.5, 20.5]])
    np.testing.assert_allclose(found.descriptors[2], np.array([1, 2, 1]) / 6**0.5, atol=1e-6)


def test_a_box_keeps_what_lies_in_it(tmp_path):
    points = np.array([[9, 20], [9.5, 20], [49.5, 39.5], [50, 30]], np.float32)
    file = FeatureFile.open(write(tmp_path / "x.h5", keypoints=points, scores=None), ["a"])
    found = file.read("a", SIZE, box=(10, 10, 50.7, 40))
    np.testing.assert_array_equal(found.keypoints, [[0, 10.5], [40, 30]])
    assert (found.box, found.input_size) == ((10, 10, 50, 40), (30, 40))
    assert np.isnan(found.scores).all()
    assert file.read("a", SIZE, max_keypoints=3).keypoints[0].tolist() == [9.5, 20.5]  # the first


def test_few_and_many_features(tmp_path):
    few = FeatureFile.open(write(tmp_path / "few.h5", 3), ["a"])
    assert len(few.read("a", SIZE, max_keypoints=1000)) == few.count("a") == 3
    many = FeatureFile.open(write(tmp_path / "many.h5", 200_000, 4), ["a"])
    found = many.read("a", SIZE, max_keypoints=1000)
    np.testing.assert_array_equal(found.scores, np.arange(199_999, 198_999, -1))
    none = FeatureFile.open(write(tmp_path / "none.h5", 0), ["a"])
    assert none.read("a", SIZE).descriptors.shape == (0, 3)


def test_descriptors_of_differing_widths(tmp_path):
    path = write(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        file["b/keypoints"], file["b/descriptors"] = np.ones((2, 2), "f4"), np.ones((5, 2), "f4")
    file = FeatureFile.open(path, ["a", "b"])
    with pytest.raises(DescriptorError, match="b has descriptors of 5 values, a of 3: extract all"):
        file.read("b", SIZE)


@pytest.mark.parametrize(
    ("changed", "size", "message"),
    [
        ({"keypoints": None}, SIZE, "image a has no keypoints: a local feature needs both"),
        ({"descriptors": None}, SIZE, "image a has no descriptors: a local feature needs both"),
        ({}, (120, 160), "extracted from 80 x 60 pixels, and the photograph has 160 x 120: key"),
        (
            {"keypoints": [[1, 1], [81.5, 3], [2, -4], [3, 3]], "image_size": None},
            SIZE,
            r"2 keypoints outside the photograph of 80 x 60 pixels, the first at \(81.5, 3\)",
        ),
        ({"keypoints": np.ones((3, 2), "f4")}, SIZE, "3 keypoints, descriptors of shape .3, 4."),
        ({"scores": np.ones(3, "f4")}, SIZE, "and scores of shape .3,.: they must be"),
        ({"keypoints": np.ones((4, 3), "f4")}, SIZE, "must be floats .N, 2. and .values, N."),
        ({"descriptors": np.ones((3, 4), "u1")}, SIZE, "descriptors uint8 .3, 4.: they must be"),
        ({"keypoints": [[np.nan, 1]] * 4}, SIZE, "zero throughout or not finite: extract it"),
        ({"descriptors": np.zeros((3, 4), "f4")}, SIZE, "zero throughout or not finite"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changed, size, message):
    path = write(tmp_path / "x.h5", **changed)
    with pytest.raises(DescriptorError, match=message) as refused:
        FeatureFile.open(path, ["a"]).read("a", size)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_names_that_do_not_fit(tmp_path):
    path = write(tmp_path / "x.h5")
    message = "no local features of 1 of 2 images: x; .*names 'a.jpg'"
    with pytest.raises(DescriptorError, match=message):
        FeatureFile.open(path, ["a", "x"])
    with pytest.raises(DescriptorError, match="rename its images: 'a.jpg' to 'q/a'"):
        FeatureFile.open(path, ["q/a"])
    with pytest.raises(FileNotFoundError, match="no local features .*y.h5"):
        FeatureFile.open(tmp_path / "y.h5", ["a"])


@pytest.mark.parametrize("how", ["virtual", "elsewhere", "text"])
def test_only_the_file_itself_is_read(tmp_path, how):
    path = write(tmp_path / "x.h5", keypoints=None)
    if how == "text":
        path.write_text("not HDF5")
    else:
        write(tmp_path / "other.h5")
        with h5py.File(path, "r+") as file:
            if how == "elsewhere":
                file["a.jpg/keypoints"] = h5py.ExternalLink("other.h5", "a.jpg/keypoints")
            else:
                layout = h5py.VirtualLayout((4, 2), "f4")
                layout[:] = h5py.VirtualSource("other.h5", "a.jpg/keypoints", shape=(4, 2))
                file["a.jpg"].create_virtual_dataset("keypoints", layout)
    with pytest.raises(DescriptorError, match="x.h5"):
        FeatureFile.open(path, ["a"]).read("a", SIZE)
