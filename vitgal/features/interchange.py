"""Exchange of local features with other programs: hloc's HDF5 and the published folders."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data.photographs import SUFFIXES
from vitgal.features.files import FileError, map_array, read_json
from vitgal.features.local import LocalFeatures
from vitgal.features.store.shard import SIZES, item_entry

FOLDERS = ("Locations", "Descriptions")  # of the published code
UNKNOWN_SIZES = {name: [0] * len(sides) for name, sides in SIZES.items()}


def export_hloc(store: Mapping[str, LocalFeatures], path: Path, *, suffix: str = ".jpg") -> Path:
    """Writes an HDF5 file of features as hloc reads them, see `feature_file`; returns its path.

    A group's name is an image's key, with `suffix` where the key has no photograph's. Keypoints and
    scores are float32, descriptors float16.
    """
    import h5py

    with runs.atomic(path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        for key, features in store.items():
            named = Path(key).suffix.lower() in SUFFIXES
            group = file.create_group(key if named else key + suffix)
            group["keypoints"] = features.original_keypoints()
            # As in hloc: one pixel of the network input, in pixels of the photograph.
            crop = np.subtract(features.box[2:], features.box[:2])
            noise = float(np.mean(crop / features.input_size[::-1]))
            group["keypoints"].attrs["uncertainty"] = noise
            group["descriptors"] = features.descriptors.T.astype(np.float16)
            group["scores"] = features.scores
            group["image_size"] = np.array(features.image_size[::-1], np.int64)
    return Path(path)


def published_name(path: str) -> str:
    """Returns the file name under which the published code stores an image's features."""
    return path.replace("../", "").replace("/", "__") + ".npy"


def published_path(name: str) -> str:
    """Derives the image's path as the published code does: wrong for absolute paths and for __."""
    return "../" + name.removesuffix(".npy").replace("__", "/")


def export_published(
    store: Mapping[str, LocalFeatures], folder: Path, paths: Mapping[str, str]
) -> Path:
    """Writes features as the published code stores them, and returns the folder.

    `Descriptions/` holds (N, C) float32 and `Locations/` (N, 2) integers (y, x) in pixels of the
    network input, one `.npy` an image. `index.json` beside them holds paths, sizes and boxes, which
    the published files lack.

    paths: key -> the image's path in the published image list. Raises ValueError where a key of the
    store has no path, or two paths get one published file name.
    """
    folder, index = Path(folder), {}
    for key in store:
        if key not in paths:
            raise ValueError(f"no path is given for {key!r}")
        name = published_name(path := str(paths[key]))
        if name in index:
            raise ValueError(f"{path} and {index[name]['path']} would both be stored as {name}")
        index[name] = {"path": path}
    for name, (key, features) in zip(index, store.items(), strict=True):
        points, whole = features.keypoints, np.rint(features.keypoints)
        if (whole == points).all():
            points = whole.astype(np.int64)
        runs.write_array(folder / "Locations" / name, points[:, ::-1])
        runs.write_array(folder / "Descriptions" / name, features.descriptors)
        index[name] |= item_entry(key, features)
    runs.write_json(folder / "index.json", index)
    return folder


def import_published(
    folder: Path, paths: Iterable[str] = ()
) -> Iterator[tuple[str, LocalFeatures]]:
    """Yields (image path, features) from a folder of published files, ready for `write_shard`.

    Scores and scales are nan, since the published files lack them; the order is kept, best first.
    Without `index.json` boxes and sizes are zero, and a file belongs to the image of `paths` with
    its published name, or else to `published_path`.

    Raises FileNotFoundError where a folder or one of a pair of files is missing, FileError for a
    file that is damaged or does not fit its partner, ValueError where two of `paths` have one
    published name.
    """
    folder, images = Path(folder), {}
    for path in map(str, paths):
        if images.setdefault(name := published_name(path), path) != path:
            raise ValueError(f"{images[name]} and {path} would both have been stored as {name}")
    names = sorted(path.name for path in (folder / "Locations").glob("*.npy"))
    if not names:
        raise FileNotFoundError(f"{folder / 'Locations'} holds no .npy files")
    file = folder / "index.json"
    index = read_json(file, dict) if file.exists() else {}
    for name in names:
        item = index.get(name, {})
        if isinstance(item, dict):
            item = {"path": images.get(name, published_path(name))} | UNKNOWN_SIZES | item
        if not runs.conforms(item, {"path": str} | SIZES):
            raise FileError(f"{file} is damaged at {name}: export the features again")
        points, codes = (_read_matrix(folder / part / name) for part in FOLDERS)
        if points.shape != (len(codes), 2):
            raise FileError(
                f"{folder / 'Locations' / name} has shape {points.shape}, and for "
                f"{codes.shape} in Descriptions it must be {(len(codes), 2)}"
            )
        unknown = np.full(len(points), np.nan, np.float32)
        features = LocalFeatures(
            keypoints=points[:, ::-1].astype(np.float32),
            descriptors=codes.astype(np.float32),
            scores=unknown,
            scales=unknown,
            input_size=tuple(item["input_size"]),
            box=tuple(item["box"]),
            image_size=tuple(item["image_size"]),
        )
        yield item["path"], features


def _read_matrix(path: Path) -> np.ndarray:
    matrix = map_array(path)
    if matrix.ndim != 2 or matrix.dtype.kind == "b":
        raise FileError(f"{path} holds {matrix.dtype} {matrix.shape}, not a matrix of numbers")
    return matrix
