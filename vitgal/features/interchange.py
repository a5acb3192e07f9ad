"""Local features from and for other programs: hloc's HDF5 and the published folders."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.features.local import LocalFeatures
from vitgal.features.store.feature_store import FeatureStore
from vitgal.features.store.shard import item_entry


def export_hloc(store: FeatureStore, path: Path, *, suffix: str = ".jpg") -> Path:
    """Writes an HDF5 file of features as hloc reads them, and returns its path.

    One group an image, named by its key and `suffix` (hloc names images with their extension), with
    `keypoints` (N, 2) float32 in pixels of the photograph, (0, 0) the centre of the top-left pixel,
    `descriptors` (C, N) float16, `scores` (N,) float32 and `image_size` (2,) as width, height.
    Source: hloc, extract_features.
    """
    import h5py

    with runs.atomic(path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        for key, features in store.items():
            group = file.create_group(key + suffix)
            group["keypoints"] = features.original_keypoints()
            # As hloc has it: one pixel of the network input, in pixels of the photograph.
            crop = np.subtract(features.box[2:], features.box[:2])
            noise = float(np.mean(crop / features.input_size[::-1]))
            group["keypoints"].attrs["uncertainty"] = noise
            group["descriptors"] = features.descriptors.T.astype(np.float16)
            group["scores"] = features.scores
            group["image_size"] = np.array(features.image_size[::-1], np.int64)
    return Path(path)


def published_name(path: str) -> str:
    """The file name under which the published code stores an image's features."""
    return path.replace("../", "").replace("/", "__") + ".npy"


def published_path(name: str) -> str:
    """The image path that the published code makes of such a file name.

    Right for paths of the form ../folder/image.jpg alone: absolute paths, ./image.jpg and names
    with __ come out wrong, which is why `export_published` writes an index too.
    """
    return "../" + name.removesuffix(".npy").replace("__", "/")


def export_published(store: FeatureStore, folder: Path, paths: Mapping[str, str]) -> Path:
    """Writes features as the published code stores them, and returns the folder.

    `Descriptions/` holds (N, C) float32, `Locations/` (N, 2) integers (y, x) in the network input's
    frame, one `.npy` an image. `index.json` beside them keeps the paths and what the published
    files lose: sizes, boxes.

    Args:
        paths: key -> the image's path as the published image list has it; every key of the store.
    Raises:
        ValueError: a key has no path, or two paths get one published file name.
    """
    index = {}
    for key in store:
        if key not in paths:
            raise ValueError(f"no path is given for {key!r}")
        path = str(paths[key])
        name = published_name(path)
        if name in index:
            raise ValueError(f"{path} and {index[name]['path']} would both be stored as {name}")
        index[name] = {"path": path}
    folder = Path(folder)
    for name, (key, features) in zip(index, store.items(), strict=True):
        whole = np.rint(features.keypoints)
        points = (
            whole.astype(np.int64) if (whole == features.keypoints).all() else features.keypoints
        )
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
    Without our `index.json` boxes and sizes are zero, and a file's path is that of `paths`, the
    images that may be there, whose published name it has; failing that the one that the published
    code would read, which is right for `../folder/image.jpg` alone.

    Raises FileNotFoundError where a folder or one of a pair of files is missing, ValueError where
    two of `paths` have one published name.
    """
    known: dict[str, str] = {}
    for path in map(str, paths):
        if known.setdefault(published_name(path), path) != path:
            name = published_name(path)
            raise ValueError(f"{known[name]} and {path} would both have been stored as {name}")
    folder = Path(folder)
    names = sorted(path.name for path in (folder / "Locations").glob("*.npy"))
    if not names:
        raise FileNotFoundError(f"{folder / 'Locations'} holds no .npy files")
    index = runs.read_json(folder / "index.json") if (folder / "index.json").exists() else {}
    for name in names:
        item = index.get(name, {"path": known.get(name, published_path(name))})
        points = np.load(folder / "Locations" / name, allow_pickle=False)
        codes = np.load(folder / "Descriptions" / name, allow_pickle=False)
        unknown = np.full(len(points), np.nan, np.float32)
        yield (
            item["path"],
            LocalFeatures(
                keypoints=points[:, ::-1].astype(np.float32),
                descriptors=codes.astype(np.float32),
                scores=unknown,
                scales=unknown,
                input_size=tuple(item.get("input_size", (0, 0))),
                box=tuple(item.get("box", (0, 0, 0, 0))),
                image_size=tuple(item.get("image_size", (0, 0))),
            ),
        )
