"""The feature store beside HDF5 and two `.npy` files an image, in one run.

    python benchmarks/store.py [--images 512] [--reads 2000]
    python benchmarks/store.py --opening 1000 10000 100000 1000000

Random reads: the same features (877 of 128 numbers, the paper's mean on ROxford) in a store, in one
HDF5 file that is opened for every image, as hloc and its users do, and in two `.npy` files an
image, as the published code stores them. All three give float32 descriptors; the files are in the
system's memory, so that the formats are compared and not the disk. Opening: stores of one feature
an image.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np

from vitgal import runs
from vitgal.features import interchange, store
from vitgal.features.local import LocalFeatures
from vitgal.settings.sections import FEATURE_DTYPES

WIDTH, FEATURES = 128, 877
OPEN = """
import sys, time
from vitgal import store
began = time.perf_counter()
opened = store.FeatureStore.open(sys.argv[1])
middle = time.perf_counter()
opened[sys.argv[2]]
print(middle - began, time.perf_counter() - began, len(opened))
"""


def features(count: int, rng: np.random.Generator) -> LocalFeatures:
    codes = rng.standard_normal((count, WIDTH), np.float32)
    return LocalFeatures(
        keypoints=rng.integers(8, 568, (count, 2)).astype(np.float32),
        descriptors=codes / np.linalg.norm(codes, axis=1, keepdims=True),
        scores=np.sort(rng.random(count, np.float32))[::-1],
        scales=rng.choice(np.float32([0.5, 1]), count),
        input_size=(448, 576),
        box=(0, 0, 1024, 768),
        image_size=(768, 1024),
    )


def write_store(folder: Path, items: dict[str, LocalFeatures], dtype: str, size: int = 256) -> Path:
    parts = store.partition(items, size)
    for number, keys in enumerate(parts):
        shard = store.shard_folder(folder, number, len(parts))
        store.write_shard(shard, ((key, items[key]) for key in keys), store.ShardFormat(dtype))
    store.write_index(folder)
    return folder


def write_npy(folder: Path, items: dict[str, LocalFeatures]) -> Path:
    folder.mkdir()
    for key, value in items.items():
        np.save(folder / f"{key}.points.npy", value.keypoints.astype(np.int64)[:, ::-1])
        np.save(folder / f"{key}.codes.npy", value.descriptors)
    return folder


def read_hdf5(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints and descriptors as stored, in float16."""
    with h5py.File(path, "r") as file:
        group = file[f"{key}.jpg"]
        return group["keypoints"][()], group["descriptors"][()]


def read_hdf5_float32(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    keypoints, descriptors = read_hdf5(path, key)
    return keypoints, descriptors.T.astype(np.float32)


def read_copied(opened: store.FeatureStore, key: str) -> list[np.ndarray]:
    """Every array of an image as stored, brought into memory."""
    return [np.array(array) for array in opened.raw(key).values()]


def read_npy(folder: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / f"{key}.points.npy"), np.load(folder / f"{key}.codes.npy")


def each(read: Callable[[str], object], keys: list[str]) -> float:
    """Microseconds of processor time a read, the mean over the keys."""
    began = time.process_time()
    for key in keys:
        read(key)
    return 1e6 * (time.process_time() - began) / len(keys)


def reads(images: int, number: int, folder: Path) -> None:
    rng = np.random.default_rng(0)
    items = {f"image_{i:06d}": features(FEATURES, rng) for i in range(images)}
    asked = [str(key) for key in rng.choice(list(items), number)]
    stores = {dtype: write_store(folder / dtype, items, dtype, 64) for dtype in FEATURE_DTYPES}
    hdf5 = interchange.export_hloc(
        store.FeatureStore.open(stores["float16"]), folder / "features.h5"
    )
    npy = write_npy(folder / "npy", items)
    opened = {dtype: store.FeatureStore.open(path) for dtype, path in stores.items()}
    ways: dict[str, Callable] = {
        "HDF5 opened per image": lambda key: read_hdf5(hdf5, key),
        "HDF5, to float32": lambda key: read_hdf5_float32(hdf5, key),
        "two .npy per image": lambda key: read_npy(npy, key),
    }
    for dtype, each_store in opened.items():
        ways[f"store, {dtype}"] = each_store.__getitem__
    ways["store, float16, as stored"] = lambda key: read_copied(opened["float16"], key)
    ways["store, float16, mapped"] = opened["float16"].raw
    rounds = [{name: each(read, asked) for name, read in ways.items()} for _ in range(5)]
    taken = {name: statistics.median(found[name] for found in rounds) for name in ways}
    print(f"{number} random reads of {images} images, {FEATURES} x {WIDTH}, median of 5 turns")
    print(f"{'':28}{'us a read':>10}{'x HDF5':>9}{'x .npy':>9}")
    for name, value in taken.items():
        against = (taken["HDF5 opened per image"] / value, taken["two .npy per image"] / value)
        print(f"{name:28}{value:10.0f}{against[0]:9.1f}{against[1]:9.2f}")
    for name, path in {"HDF5": hdf5, "npy": npy, **stores}.items():
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        size = sum(each.stat().st_size for each in files) / images
        print(f"{name:28}{size / 1000:10.1f} kB an image")


def opening(sizes: list[int], folder: Path) -> None:
    """How long a fresh process takes to open a store, and to open it and read one item."""
    rng = np.random.default_rng(0)
    one = features(1, rng)
    print(f"{'images':>10}{'shards':>8}{'open, ms':>10}{'and read one':>14}{'without index':>15}")
    for size in sizes:
        path = write_store(folder / str(size), {f"image_{i:08d}": one for i in range(size)}, "int8")
        wanted = f"image_{size // 2:08d}"
        found = [_child(path, wanted) for _ in range(7)]
        (path / store.INDEX / store.INDEX_HEADER).rename(folder / "aside")
        without = _child(path, wanted)[0]
        alone, read = (1000 * statistics.median(each[i] for each in found) for i in (0, 1))
        shards = len(store.shard_folders(path))
        print(f"{size:10,}{shards:8}{alone:10.2f}{read:14.2f}{1000 * without:15.1f}", flush=True)


def _child(path: Path, key: str) -> list[float]:
    command = [sys.executable, "-c", OPEN, str(path), key]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in child.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--reads", type=int, default=2000)
    parser.add_argument("--opening", type=int, nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.opening:
            # Nothing is to be kept, so nothing is forced to the disk.
            runs.os.fsync = lambda handle: None
            opening(options.opening, Path(folder))
        else:
            reads(options.images, options.reads, Path(folder))


if __name__ == "__main__":
    main()
