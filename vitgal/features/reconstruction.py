"""Features and verified matches as other programs read them: hloc, COLMAP, kapture.

Keypoints are pixels of the photographs as stored. COLMAP and kapture have (0, 0) at the top-left
corner, hloc at the centre of the top-left pixel.
"""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.features.local import LocalFeatures

PAIR = 2**31 - 1  # COLMAP numbers a pair by this times the first image's number, plus the second's
SIMPLE_RADIAL, FOCAL = 2, 1.2  # COLMAP's default camera, and focal length in longer sides
PLANAR_OR_PANORAMIC = 6
# Source: COLMAP, database.cc; newer versions add the tables that they have in addition.
SCHEMA = """
CREATE TABLE cameras (camera_id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
  model INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, params BLOB,
  prior_focal_length INTEGER NOT NULL);
CREATE TABLE images (image_id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
  name TEXT NOT NULL UNIQUE, camera_id INTEGER NOT NULL,
  CONSTRAINT image_id_check CHECK(image_id >= 0 and image_id < 2147483647),
  FOREIGN KEY(camera_id) REFERENCES cameras(camera_id));
CREATE UNIQUE INDEX index_name ON images(name);
CREATE TABLE keypoints (image_id INTEGER PRIMARY KEY NOT NULL, rows INTEGER NOT NULL,
  cols INTEGER NOT NULL, data BLOB,
  FOREIGN KEY(image_id) REFERENCES images(image_id) ON DELETE CASCADE);
CREATE TABLE descriptors (image_id INTEGER PRIMARY KEY NOT NULL, rows INTEGER NOT NULL,
  cols INTEGER NOT NULL, data BLOB,
  FOREIGN KEY(image_id) REFERENCES images(image_id) ON DELETE CASCADE);
CREATE TABLE matches (pair_id INTEGER PRIMARY KEY NOT NULL, rows INTEGER NOT NULL,
  cols INTEGER NOT NULL, data BLOB);
CREATE TABLE two_view_geometries (pair_id INTEGER PRIMARY KEY NOT NULL, rows INTEGER NOT NULL,
  cols INTEGER NOT NULL, data BLOB, config INTEGER NOT NULL, F BLOB, E BLOB, H BLOB, qvec BLOB,
  tvec BLOB);
"""


@dataclass(frozen=True, eq=False)
class VerifiedMatches:
    """The matches of two images.

    first, second: names. matches: (M, 2) int64, rows of their keypoints. inliers: (M,) bool.
    homography: (3, 3) float64 from stored pixels of the first to those of the second.
    """

    first: str
    second: str
    matches: np.ndarray
    inliers: np.ndarray
    homography: np.ndarray


def export_hloc_matches(pairs: Iterable[VerifiedMatches], path: Path) -> Path:
    """Writes the inliers as hloc's HDF5 of matches and returns its path.

    A group a pair, `/` in names written `-`: `matches0` (N,) int16, for each keypoint of the first
    image that of the second or -1, and `matching_scores0` (N,) float16, 1 for a match. N ends with
    the last matched keypoint. Source: hloc, match_features.
    """
    import h5py

    with runs.atomic(path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        for pair in pairs:
            first, second = pair.matches[pair.inliers].T
            partners = np.full(int(first.max(initial=-1)) + 1, -1, np.int16)
            partners[first] = second
            group = file.create_group(
                "/".join(n.replace("/", "-") for n in (pair.first, pair.second))
            )
            group["matches0"] = partners
            group["matching_scores0"] = (partners >= 0).astype(np.float16)
    return Path(path)


def export_colmap(
    store: Mapping[str, LocalFeatures], pairs: Iterable[VerifiedMatches], path: Path
) -> Path:
    """Writes a COLMAP database of keypoints, matches and verified matches, and returns its path.

    Each image has a camera of its own, SIMPLE_RADIAL, its focal length a guess. There are no
    descriptors: COLMAP's are SIFT's. Matches are all, those verified the homography's inliers.
    """
    numbers = {name: number for number, name in enumerate(store, start=1)}
    with runs.atomic(path) as temporary, contextlib.closing(sqlite3.connect(temporary)) as file:
        file.executescript(SCHEMA)
        for name, number in numbers.items():
            features = store[name]
            height, width = features.image_size
            lens = np.array([FOCAL * max(height, width), width / 2, height / 2, 0], np.float64)
            camera = (number, SIMPLE_RADIAL, width, height, lens.tobytes(), 0)
            file.execute("INSERT INTO cameras VALUES (?, ?, ?, ?, ?, ?)", camera)
            file.execute("INSERT INTO images VALUES (?, ?, ?)", (number, name, number))
            points = _corner_keypoints(features)
            file.execute("INSERT INTO keypoints VALUES (?, ?, ?, ?)", (number, *_blob(points)))
        for pair in pairs:
            matches, homography = pair.matches, pair.homography
            first, second = numbers[pair.first], numbers[pair.second]
            if first > second:
                first, second, matches = second, first, matches[:, ::-1]
                homography = np.linalg.inv(homography)
            key, matches = PAIR * first + second, np.ascontiguousarray(matches, np.uint32)
            file.execute("INSERT INTO matches VALUES (?, ?, ?, ?)", (key, *_blob(matches)))
            shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
            homography = shift @ homography @ np.linalg.inv(shift)
            model = np.ascontiguousarray(homography, np.float64).tobytes()
            row = (key, *_blob(matches[pair.inliers]), PLANAR_OR_PANORAMIC)
            row += (None, None, model, None, None)
            file.execute(f"INSERT INTO two_view_geometries VALUES ({', '.join('?' * 10)})", row)
        file.commit()
    return Path(path)


def export_kapture(
    store: Mapping[str, LocalFeatures], pairs: Iterable[VerifiedMatches], folder: Path
) -> Path:
    """Writes kapture's folders `sensors` and `reconstruction` (format 1.1); returns the folder.

    Keypoints and descriptors float32, verified matches float64 with score 1, all of type `vitgal`.
    The photographs belong in `sensors/records_data`. Raises ValueError for a name that leaves the
    folder or holds a comma, at which kapture cuts.
    """
    names = list(store)
    runs.refuse_outside("the folder of photographs", names)
    comma = next((name for name in names if "," in name), None)
    if comma is not None:
        raise ValueError(f"{comma!r} has a comma in it, and kapture ends a name there: rename it")
    top = Path(folder) / "reconstruction"
    runs.refuse_links([Path(folder), top])
    shutil.rmtree(top, ignore_errors=True)
    sensors, records, width = [], [], 0
    for number, name in enumerate(names):
        features = store[name]
        height, across = features.image_size
        sensors.append(f"camera{number}, , camera, UNKNOWN_CAMERA, {across}, {height}\n")
        records.append(f"{number}, camera{number}, {name}\n")
        width = features.descriptors.shape[1]
        parts = (("keypoints", "kpt", _corner_keypoints(features)),
                 ("descriptors", "desc", features.descriptors.astype(np.float32)))  # fmt: skip
        for part, ending, array in parts:
            _write_bytes(top / part / "vitgal" / f"{name}.{ending}", array)
    for pair in pairs:
        matches, (first, second) = pair.matches[pair.inliers], (pair.first, pair.second)
        if first > second:
            first, second, matches = second, first, matches[:, ::-1]
        rows = np.column_stack([matches, np.ones(len(matches))])
        _write_bytes(top / "matches/vitgal" / f"{first}.overlapping" / f"{second}.matches", rows)
    texts = {
        top / "keypoints/vitgal/keypoints.txt": "# name, dtype, dsize\nvitgal, float32, 2\n",
        top / "descriptors/vitgal/descriptors.txt":
            "# name, dtype, dsize, keypoints_type, metric_type\n"
            f"vitgal, float32, {width}, vitgal, L2\n",
        Path(folder) / "sensors/sensors.txt":
            "# sensor_id, name, sensor_type, [sensor_params]+\n" + "".join(sensors),
        Path(folder) / "sensors/records_camera.txt":
            "# timestamp, device_id, image_path\n" + "".join(records),
    }  # fmt: skip
    for path, text in texts.items():
        runs.write_text(path, f"# kapture format: 1.1\n{text}")
    return Path(folder)


def _corner_keypoints(features: LocalFeatures) -> np.ndarray:
    return (features.original_keypoints() + 0.5).astype(np.float32)


def _blob(array: np.ndarray) -> tuple[int, int, bytes]:
    return *array.shape, np.ascontiguousarray(array).tobytes()


def _write_bytes(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.ascontiguousarray(array).tobytes())
