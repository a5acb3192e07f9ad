"""Codes by PCA with whitening, beside scikit-learn's."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from vitgal import runs
from vitgal.features import CodeError, Codes, Moments
from vitgal.features.files import FileError


def features(count=400, dimension=6, seed=0) -> np.ndarray:
    """Vectors of length 1 (count, dimension) float32 with directions of other variances."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dimension)) * np.linspace(3, 0.5, dimension) + 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def fitted(rows: np.ndarray, code_dim: int, parts: int = 1) -> Codes:
    moments = Moments(rows.shape[1])
    for part in np.array_split(rows, parts):
        moments.add(part)
    return moments.codes(code_dim)


def test_the_codes_are_those_of_scikit_learn():
    rows = features()
    codes = fitted(rows, 4, parts=7)
    mine = (rows - codes.mean) @ codes.projection
    theirs = PCA(4, whiten=True, svd_solver="full").fit_transform(rows.astype(np.float64))
    # scikit-learn divides by n - 1, and a direction's sign is arbitrary.
    theirs *= np.sqrt(len(rows) / (len(rows) - 1)) * np.sign((mine * theirs).sum(axis=0))
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    np.testing.assert_allclose(np.cov(mine.T, bias=True), np.eye(4), atol=1e-4)


def test_parts_do_not_matter_and_signs_are_fixed():
    rows = features()
    whole = fitted(rows, 3)
    np.testing.assert_allclose(fitted(rows, 3, parts=9).projection, whole.projection, atol=1e-4)
    largest = np.abs(whole.projection).argmax(axis=0)
    assert (whole.projection[largest, range(3)] > 0).all()
    moments = Moments(6)
    moments.add(np.zeros((0, 6)))
    assert moments.count == 0


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(CodeError, match=r"code_dim 7 is above 6, the dimension of the tokens"):
        fitted(features(), 7)
    few = r"29 features are too few for a PCA of 3 values.*or lower code_dim to 2"
    with pytest.raises(CodeError, match=few):
        fitted(features(29), 3)
    with pytest.raises(CodeError, match=r"0 features .* name a folder .* as code_images$"):
        fitted(features(0), 3)
    flat = np.zeros((100, 6), np.float32)
    flat[:, :2] = features(100, 2)
    with pytest.raises(CodeError, match="code_dim 3 is above 2, the number of directions"):
        fitted(flat, 3)
    with pytest.raises(CodeError, match="code_dim 1 is above 0"):
        fitted(np.tile(flat[:1], (100, 1)), 1)


def test_files(tmp_path):
    codes = fitted(features(), 4)
    codes.save(tmp_path / "codes.npz")
    read = Codes.load(tmp_path / "codes.npz")
    np.testing.assert_array_equal(read.projection, codes.projection)
    assert read.code_dim == 4 and read.mean.dtype == np.float32
    first = (tmp_path / "codes.npz").read_bytes()
    assert fitted(features(), 4).save(tmp_path / "again.npz").read_bytes() == first
    runs.write_arrays(
        tmp_path / "odd.npz", {"mean": codes.mean[:2], "projection": codes.projection}
    )
    runs.write_arrays(tmp_path / "wide.npz", {"mean": codes.mean * 1.0, "projection": np.eye(6)})
    (tmp_path / "torn.npz").write_bytes(first[:-40])
    for name in ("odd", "wide", "torn"):
        with pytest.raises(FileError, match=f"{name}.npz"):
            Codes.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        Codes.load(tmp_path / "none.npz")
