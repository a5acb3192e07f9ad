"""Global descriptors of another system: both layouts, and what is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.features.examples import NAMES, ROWS, damaged, fuzz, restored, save_hloc, save_npy
from vitgal.features.descriptors import DescriptorError, read_descriptors

UNIT = np.array([[0.6, 0.8], [0, 1], [1, 0], [-1, 0]], np.float32)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], []])
def test_both_layouts_give_unit_rows_in_the_requested_order(tmp_path, order):
    wanted = [NAMES[position] for position in order]
    for path in (save_npy(tmp_path / "x.npy"), save_hloc(tmp_path / "x.h5")):
        if not order and path.suffix == ".h5":
            continue  # no row: no width to know
        rows = read_descriptors(path, wanted)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, UNIT[order], atol=1e-7)  # one rounding of float32


def test_names_with_folder_and_suffix_and_half_precision(tmp_path):
    names = [f"jpg/{name}.JPG" for name in NAMES]
    path = save_npy(tmp_path / "x.npy", ROWS.astype(np.float16), names)
    np.testing.assert_allclose(read_descriptors(path, NAMES), UNIT, atol=1e-7)
    # A dot in a name is no suffix.
    path = save_npy(tmp_path / "y.npy", ROWS[:1], ["st.peter"])
    assert read_descriptors(path, ["st.peter"]).shape == (1, 2)


@pytest.mark.parametrize("save", [save_npy, save_hloc])
def test_missing_parts_are_named(tmp_path, save):
    path = save(tmp_path / ("x.npy" if save is save_npy else "x.hdf5"))
    with pytest.raises(DescriptorError, match="no descriptor of 2 of 3 images: d, e; describe"):
        read_descriptors(path, ["a", "d", "e"])


def broken(folder: Path, damage: str) -> Path:
    """One broken file of each kind."""
    path = folder / "x.npy"
    if damage == "text":
        save_npy(path)
        path.write_text("not numbers")
    elif damage == "pickled":
        np.save(path, np.array([{}], object), allow_pickle=True)
        path.with_suffix(".txt").write_text("a\n")
    elif damage == "fewer names":
        save_npy(path, names=NAMES[:2])
    elif damage == "twice":
        save_npy(path, names=["a", "jpg/a.jpg", "b", "q"])
    elif damage == "zero":
        save_npy(path, ROWS * [[1], [0], [1], [1]])
    elif damage == "nan":
        save_npy(path, ROWS * [[1], [1], [np.nan], [1]])
    elif damage == "integers":
        save_npy(path, ROWS.astype(int))
    elif damage == "suffix":
        path = path.rename(folder / "x.npz") if path.exists() else folder / "x.npz"
        path.write_bytes(b"")
    elif damage == "hdf5":
        path = folder / "x.h5"
        path.write_text("not HDF5")
    else:
        path = folder / "x.h5"
        with h5py.File(path, "w") as file:
            for name, row in zip(NAMES, ([1.0], [1.0], [1.0], [1.0, 2.0]), strict=True):
                file.create_group(name).create_dataset("global_descriptor", data=row)
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("text", "not a whole .npy"),
        ("pickled", "not a whole .npy"),
        ("fewer names", r"shape \(4, 2\), .*2 names"),
        ("twice", "names the image a twice"),
        ("zero", r"descriptor of a is zero or not finite \(1 such\)"),
        ("nan", r"descriptor of b is zero or not finite \(1 such\)"),
        ("integers", "no floats"),
        ("suffix", "descriptors come as .npy, .h5, .hdf5"),
        ("hdf5", "not a whole HDF5 file"),
        ("widths", r"different lengths \[1, 2\]"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, damage, message):
    with pytest.raises(DescriptorError, match=message):
        read_descriptors(broken(tmp_path, damage), NAMES)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no descriptors"):
        read_descriptors(tmp_path / "x.npy", NAMES)
    np.save(tmp_path / "x.npy", ROWS)
    with pytest.raises(FileNotFoundError, match="needs the names of its rows"):
        read_descriptors(tmp_path / "x.npy", NAMES)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with both layouts."""
    save_npy(tmp_path / "x.npy")
    save_hloc(tmp_path / "x.h5")
    return tmp_path


@fuzz
@given(data=st.data(), name=st.sampled_from(["x.npy", "x.txt", "x.h5"]))
def test_a_damaged_file_is_a_descriptor_error(saved, data, name):
    read = saved / ("x.h5" if name == "x.h5" else "x.npy")
    with restored(saved / name) as content:
        (saved / name).write_bytes(data.draw(damaged(content)))
        try:
            rows = read_descriptors(read, NAMES)
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
        except DescriptorError as error:
            assert str(saved) in str(error)
