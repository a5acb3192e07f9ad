"""Exports for COLMAP, hloc and kapture, read back; by pycolmap where it is installed."""

import sqlite3

import h5py
import numpy as np
import pytest

from vitgal.features import LocalFeatures
from vitgal.features.reconstruction import (
    VerifiedMatches,
    export_colmap,
    export_hloc_matches,
    export_kapture,
)

# Input frames are half the photographs' 40 x 60 pixels: (x, y) there is (2x, 2y) here, from the
# top-left corner.
POINTS = np.float32([[1, 2], [3.5, 4], [10, 12]])
MOVE = np.array([[1, 0, 8], [0, 1, 4], [0, 0, 1]], float)  # of pixel centres or corners alike
ENLARGE = np.diag([2.0, 2.0, 1.0])  # of pixel centres


def features(points: np.ndarray) -> LocalFeatures:
    ones = np.ones(len(points), np.float32)
    return LocalFeatures(
        keypoints=points,
        descriptors=np.eye(len(points), 4, dtype=np.float32),
        scores=ones,
        scales=ones,
        input_size=(20, 30),
        box=(0, 0, 60, 40),
        image_size=(40, 60),
    )


STORE = {
    "b/2.jpg": features(POINTS),
    "a 1.jpg": features(POINTS[:2]),
    "c.jpg": features(POINTS[:0]),
}
MATCHES = np.array([[2, 0], [0, 1]])  # of b/2.jpg with a 1.jpg
PAIRS = [VerifiedMatches("b/2.jpg", "a 1.jpg", MATCHES, np.array([True, False]), MOVE)]


def test_colmap(tmp_path):
    path = export_colmap(STORE, PAIRS, tmp_path / "database.db")
    with sqlite3.connect(path) as file:
        images = file.execute("SELECT image_id, name, camera_id FROM images").fetchall()
        assert images == [(1, "b/2.jpg", 1), (2, "a 1.jpg", 2), (3, "c.jpg", 3)]
        camera = file.execute("SELECT model, width, height, params FROM cameras").fetchone()
        assert camera[:3] == (2, 60, 40)
        assert np.frombuffer(camera[3]).tolist() == [72, 30, 20, 0]
        rows = file.execute("SELECT rows, cols, data FROM keypoints").fetchall()
        assert [row[:2] for row in rows] == [(3, 2), (2, 2), (0, 2)]
        assert np.frombuffer(rows[0][2], "f4").tolist() == [2, 4, 7, 8, 20, 24]
        ((key, data),) = file.execute("SELECT pair_id, data FROM matches").fetchall()
        assert key == 2147483647 + 2 and np.frombuffer(data, "u4").tolist() == [2, 0, 0, 1]
        ((data, model),) = file.execute("SELECT data, H FROM two_view_geometries").fetchall()
        assert np.frombuffer(data, "u4").tolist() == [2, 0]
        np.testing.assert_allclose(np.frombuffer(model).reshape(3, 3), MOVE)
    assert path.read_bytes() == export_colmap(STORE, PAIRS, tmp_path / "2.db").read_bytes()


def test_a_homography_of_colmap_is_between_corners_and_a_pair_is_sorted(tmp_path):
    """(0, 0), half a pixel left of and above a centre, goes to 2 * -0.5 + 0.5 = -0.5."""
    store = {"x": STORE["b/2.jpg"], "y": STORE["b/2.jpg"]}
    pair = VerifiedMatches("y", "x", MATCHES, np.array([True, True]), np.linalg.inv(ENLARGE))
    path = export_colmap(store, [pair], tmp_path / "database.db")
    with sqlite3.connect(path) as file:
        data, model = file.execute("SELECT data, H FROM two_view_geometries").fetchone()
    assert np.frombuffer(data, "u4").tolist() == [0, 2, 1, 0]
    moved = np.frombuffer(model).reshape(3, 3) @ [0, 0, 1]
    assert (moved / moved[2]).tolist() == [-0.5, -0.5, 1]


def test_colmap_opens_it(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    path = export_colmap(STORE, PAIRS, tmp_path / "database.db")
    database = pycolmap.Database.open(str(path))
    assert [image.name for image in database.read_all_images()] == list(STORE)
    assert database.read_keypoints(1)[:, :2].tolist() == (2 * POINTS).tolist()
    assert database.read_matches(1, 2).tolist() == MATCHES.tolist()
    assert database.read_two_view_geometry(1, 2).inlier_matches.tolist() == [[2, 0]]
    database.close()


def test_hloc(tmp_path):
    with h5py.File(export_hloc_matches(PAIRS, tmp_path / "matches.h5")) as file:
        group = file["b-2.jpg"]["a 1.jpg"]
        assert group["matches0"][:].tolist() == [-1, -1, 0]
        assert group["matching_scores0"][:].tolist() == [0, 0, 1]


def test_kapture(tmp_path):
    top = export_kapture(STORE, PAIRS, tmp_path / "kapture")
    records = (top / "sensors/records_camera.txt").read_text().splitlines()
    assert records[0] == "# kapture format: 1.1" and records[2] == "0, camera0, b/2.jpg"
    sensors = (top / "sensors/sensors.txt").read_text().splitlines()
    assert sensors[3] == "camera1, , camera, UNKNOWN_CAMERA, 60, 40"
    points = np.fromfile(top / "reconstruction/keypoints/vitgal/b/2.jpg.kpt", np.float32)
    assert points.tolist() == [2, 4, 7, 8, 20, 24]
    table = (top / "reconstruction/descriptors/vitgal/descriptors.txt").read_text()
    assert table.splitlines()[-1] == "vitgal, float32, 4, vitgal, L2"
    matches = top / "reconstruction/matches/vitgal/a 1.jpg.overlapping/b/2.jpg.matches"
    assert np.fromfile(matches).tolist() == [0, 2, 1]  # the names sorted


@pytest.mark.parametrize("name", ["../up.jpg", "/top.jpg", "a,b.jpg"])
def test_kapture_refuses_names(tmp_path, name):
    with pytest.raises(ValueError, match="folder|comma"):
        export_kapture({name: STORE["c.jpg"]}, [], tmp_path / "kapture")
    assert not (tmp_path / "kapture").exists()
