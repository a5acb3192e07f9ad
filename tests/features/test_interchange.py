"""Features for hloc, and to and from the folders of the published code."""

import h5py
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.features.examples import ITEMS, damaged, damaged_json, features, fuzz, restored
from vitgal.features import interchange, store
from vitgal.features.files import FileError


def test_hloc(folder, tmp_path):
    path = interchange.export_hloc(store.FeatureStore.open(folder), tmp_path / "features.h5")
    with h5py.File(path) as file:
        group, wanted = file["b.jpg"], ITEMS["b"]
        # The crop of 480 x 360 was seen at 576 x 432: 5 / 6 of a photograph's pixel each.
        expected = wanted.keypoints * (5 / 6) + (10, 20) - 0.5
        np.testing.assert_allclose(group["keypoints"], expected, rtol=1e-6)
        assert group["keypoints"].attrs["uncertainty"] == pytest.approx(5 / 6)
        np.testing.assert_array_equal(group["image_size"], [501, 400])
        assert group["descriptors"].shape == (10, 5)
        # rounded to half precision twice
        np.testing.assert_allclose(group["descriptors"][:].T, wanted.descriptors, atol=1e-3)
        assert len(file["q/b.jpg"]["scores"]) == 3
        assert file["ähre/1.jpg"]["keypoints"].shape == (0, 2)


def test_a_name_keeps_its_suffix(tmp_path):
    items = {"00/1234.jpg": features(1), "x.PNG": features(1), "st.peter": features(1)}
    with h5py.File(interchange.export_hloc(items, tmp_path / "features.h5")) as file:
        assert list(file) == ["00", "st.peter.jpg", "x.PNG"] and list(file["00"]) == ["1234.jpg"]


def test_published_names():
    assert interchange.published_name("../data/jpg/a.jpg") == "data__jpg__a.jpg.npy"
    assert interchange.published_path("data__jpg__a.jpg.npy") == "../data/jpg/a.jpg"


def test_published_files(folder, tmp_path):
    paths = {
        "b": "../data/jpg/b.jpg",
        "q/b": "/data/q/b.jpg",  # these three the published code reads wrongly
        "ähre/1": "./x.jpg",
        "c": "../data/jpg/c__2.jpg",
    }
    opened = store.FeatureStore.open(folder)
    out = interchange.export_published(opened, tmp_path / "published", paths)
    locations = np.load(out / "Locations/data__jpg__b.jpg.npy")
    assert locations.dtype == np.int64
    np.testing.assert_array_equal(locations, ITEMS["b"].keypoints[:, ::-1])
    assert np.load(out / "Descriptions/data__jpg__b.jpg.npy").dtype == np.float32
    back = dict(interchange.import_published(out))
    assert set(back) == set(paths.values())
    for key, path in paths.items():
        np.testing.assert_array_equal(back[path].keypoints, opened[key].keypoints)
        np.testing.assert_array_equal(back[path].descriptors, opened[key].descriptors)
        assert back[path].box == opened[key].box
        assert np.isnan(back[path].scores).all()


def test_files_from_the_published_code(folder, tmp_path):
    out = interchange.export_published(
        store.FeatureStore.open(folder), tmp_path / "p", {key: f"../{key}.jpg" for key in ITEMS}
    )
    (out / "index.json").unlink()
    back = dict(interchange.import_published(out))
    assert sorted(back) == sorted(f"../{key}.jpg" for key in ITEMS)
    with pytest.raises(ValueError, match="extract them again"):
        back["../b.jpg"].original_keypoints()
    (out / "Descriptions/b.jpg.npy").unlink()
    with pytest.raises(FileNotFoundError, match="b.jpg.npy"):
        dict(interchange.import_published(out))


def test_names_that_the_published_code_cannot_undo(folder, tmp_path):
    """Files without an index, as the published code leaves them, and the list of images."""
    paths = {"b": "/data/jpg/b.jpg", "q/b": "./q/b.jpg", "ähre/1": "../a__b/1.jpg"}
    paths["c"] = "../../data/jpg/c.jpg"
    opened = store.FeatureStore.open(folder)
    out = interchange.export_published(opened, tmp_path / "p", paths)
    (out / "index.json").unlink()
    assert not set(paths.values()) & {path for path, _ in interchange.import_published(out)}
    back = dict(interchange.import_published(out, ["../other.jpg", *paths.values()]))
    assert set(back) == set(paths.values())
    for key, path in paths.items():
        np.testing.assert_array_equal(back[path].descriptors, opened[key].descriptors)
    with pytest.raises(ValueError, match=r"\.\./a__b\.jpg and \.\./a/b\.jpg would both"):
        next(interchange.import_published(out, ["../a__b.jpg", "../a/b.jpg"]))


def test_published_errors(folder, tmp_path):
    opened = store.FeatureStore.open(folder)
    with pytest.raises(ValueError, match="no path is given for 'q/b'"):
        interchange.export_published(opened, tmp_path / "p", {"b": "b.jpg"})
    clash = {"b": "../a/b.jpg", "q/b": "../a__b.jpg", "ähre/1": "1", "c": "2"}
    with pytest.raises(ValueError, match="a__b.jpg.npy"):
        interchange.export_published(opened, tmp_path / "p", clash)
    with pytest.raises(FileNotFoundError, match="Locations"):
        next(interchange.import_published(tmp_path))


@pytest.mark.parametrize("shape", [(3,), (3, 3), (3, 2, 1), ()])
def test_an_array_of_another_shape_is_named_with_its_file(published, shape):
    for part in ("Locations", "Descriptions"):
        path = published / part / "b.jpg.npy"
        right = np.load(path)
        np.save(path, np.zeros(shape))
        with pytest.raises(FileError, match=f"{part if len(shape) != 2 else ''}.*/b.jpg.npy"):
            list(interchange.import_published(published))
        np.save(path, right)


@pytest.fixture
def published(tmp_path):
    """Published files of two images, and their index."""
    items = {"a": features(3), "b": features(2, 1)}
    return interchange.export_published(items, tmp_path / "p", {"a": "../a.jpg", "b": "../b.jpg"})


def read_or_refused(folder) -> None:
    try:
        for path, result in interchange.import_published(folder):
            assert isinstance(path, str) and result.descriptors.dtype == np.float32
    except (ValueError, FileNotFoundError) as error:
        assert isinstance(error, (FileError, FileNotFoundError)) and str(folder) in str(error)


@fuzz
@given(data=st.data(), name=st.sampled_from(["Locations", "Descriptions"]))
def test_a_damaged_published_file(published, data, name):
    path = published / name / "a.jpg.npy"
    with restored(path) as content:
        path.write_bytes(data.draw(damaged(content)))
        read_or_refused(published)


@fuzz
@given(data=st.data())
def test_a_damaged_index_of_published_files(published, data):
    path = published / "index.json"
    with restored(path) as content:
        path.write_text(data.draw(damaged_json(content.decode())))
        read_or_refused(published)
