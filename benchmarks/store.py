"""The feature store beside HDF5 and two `.npy` files an image, in one run.

    python benchmarks/store.py [--images 512] [--reads 2000]
    python benchmarks/store.py --opening 1000 10000 100000 1000000

Random reads: the same features (877 of 128 values, the paper's mean on ROxford) in a store, in one
HDF5 file that is opened for every image, as hloc and its users do, and in two `.npy` files an
image, as the published code stores them. All three give float32 descriptors. The files are in the
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

from vitgal.features import store
from vitgal.features.interchange import export_hloc
from vitgal.features.local import LocalFeatures
from vitgal.features.store.shard import INDEX, INDEX_HEADER
from vitgal.settings.sections import FEATURE_DTYPES

DIMENSION, FEATURES = 128, 877
OPEN = """
import sys, time
from vitgal.features.store.feature_store import FeatureStore
began = time.perf_counter()
opened = FeatureStore.open(sys.argv[1])
middle = time.perf_counter()
opened[sys.argv[2]]
print(middle - began, time.perf_counter() - began)
"""


def random_features(count: int, generator: np.random.Generator) -> LocalFeatures:
    """Draws features of one image, with descriptors of length 1."""
    codes = generator.standard_normal((count, DIMENSION), np.float32)
    return LocalFeatures(
        keypoints=generator.integers(8, 568, (count, 2)).astype(np.float32),
        descriptors=codes / np.linalg.norm(codes, axis=1, keepdims=True),
        scores=np.sort(generator.random(count, np.float32))[::-1],
        scales=generator.choice(np.float32([0.5, 1]), count),
        input_size=(448, 576),
        box=(0, 0, 1024, 768),
        image_size=(768, 1024),
    )


def write_store(
    folder: Path, items: dict[str, LocalFeatures], dtype: str, shard_size: int = 256
) -> Path:
    """Writes a complete store with its index, and returns its folder."""
    parts = store.partition(items, shard_size)
    for number, keys in enumerate(parts):
        shard = store.shard_folder(folder, number, len(parts))
        store.write_shard(shard, ((key, items[key]) for key in keys), store.ShardFormat(dtype))
    store.write_index(folder)
    return folder


def write_npy(folder: Path, items: dict[str, LocalFeatures]) -> Path:
    """Writes two `.npy` files an image, as the published code does, and returns their folder."""
    folder.mkdir()
    for key, features in items.items():
        np.save(folder / f"{key}.points.npy", features.keypoints.astype(np.int64)[:, ::-1])
        np.save(folder / f"{key}.codes.npy", features.descriptors)
    return folder


def read_npy(folder: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the locations (N, 2) int64 and codes (N, C) float32 of an image."""
    return np.load(folder / f"{key}.points.npy"), np.load(folder / f"{key}.codes.npy")


def read_hdf5(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads keypoints (N, 2) float32 and descriptors (C, N) float16 as stored."""
    with h5py.File(path, "r") as file:
        group = file[f"{key}.jpg"]
        return group["keypoints"][()], group["descriptors"][()]


def read_hdf5_float32(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads keypoints (N, 2) and descriptors (N, C), both float32."""
    keypoints, descriptors = read_hdf5(path, key)
    return keypoints, descriptors.T.astype(np.float32)


def microseconds(read: Callable[[str], object], keys: list[str]) -> float:
    """Returns the processor time of a read, the mean over the keys."""
    began = time.process_time()
    for key in keys:
        read(key)
    return 1e6 * (time.process_time() - began) / len(keys)


def compare_reads(images: int, number: int, folder: Path) -> None:
    """Prints the time of a random read and the space of an image, format by format."""
    generator = np.random.default_rng(0)
    items = {f"image_{i:06d}": random_features(FEATURES, generator) for i in range(images)}
    keys = [str(key) for key in generator.choice(list(items), number)]
    files = {dtype: write_store(folder / dtype, items, dtype, 64) for dtype in FEATURE_DTYPES}
    opened = {dtype: store.FeatureStore.open(path) for dtype, path in files.items()}
    files["HDF5"] = export_hloc(opened["float16"], folder / "features.h5")
    files["npy"] = write_npy(folder / "npy", items)
    raw = opened["float16"].raw
    reads: dict[str, Callable[[str], object]] = {
        "HDF5 opened per image": lambda key: read_hdf5(files["HDF5"], key),
        "HDF5, to float32": lambda key: read_hdf5_float32(files["HDF5"], key),
        "two .npy per image": lambda key: read_npy(files["npy"], key),
        **{f"store, {dtype}": features.__getitem__ for dtype, features in opened.items()},
        "store, float16, as stored": lambda key: [np.array(part) for part in raw(key).values()],
        "store, float16, mapped": raw,
    }
    rounds = [{name: microseconds(read, keys) for name, read in reads.items()} for _ in range(5)]
    times = {name: statistics.median(times[name] for times in rounds) for name in reads}
    print(f"{number} random reads of {images} images, {FEATURES} x {DIMENSION}, median of 5 rounds")
    print(f"{'':28}{'us a read':>10}{'x HDF5':>9}{'x .npy':>9}")
    for name, value in times.items():
        hdf5, npy = (
            times[other] / value for other in ("HDF5 opened per image", "two .npy per image")
        )
        print(f"{name:28}{value:10.0f}{hdf5:9.1f}{npy:9.2f}")
    for name, path in files.items():
        parts = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
        size = sum(part.stat().st_size for part in parts) / images
        print(f"{name:28}{size / 1000:10.1f} kB an image")


def compare_opening(sizes: list[int], folder: Path) -> None:
    """Prints how long a fresh process takes to open a store, and to open it and read one item."""
    features = random_features(1, np.random.default_rng(0))
    print(f"{'images':>10}{'shards':>8}{'open, ms':>10}{'and read one':>14}{'without index':>15}")
    for size in sizes:
        items = {f"image_{i:08d}": features for i in range(size)}
        path, key = write_store(folder / str(size), items, "int8"), f"image_{size // 2:08d}"
        times = [_seconds_in_child(path, key) for _ in range(7)]
        (path / INDEX / INDEX_HEADER).rename(folder / "aside")
        without = _seconds_in_child(path, key)[0]
        alone, read = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        shards = len(store.shard_folders(path))
        print(f"{size:10,}{shards:8}{alone:10.2f}{read:14.2f}{1000 * without:15.1f}", flush=True)


def _seconds_in_child(path: Path, key: str) -> list[float]:
    command = [sys.executable, "-c", OPEN, str(path), key]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in child.stdout.split()]


def main() -> None:
    """Reads the command line and runs one comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--reads", type=int, default=2000)
    parser.add_argument("--opening", type=int, nargs="+", metavar="IMAGES")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.opening:
            os.fsync = lambda handle: None  # nothing is kept, so nothing waits for the disk
            compare_opening(options.opening, Path(folder))
        else:
            compare_reads(options.images, options.reads, Path(folder))


if __name__ == "__main__":
    main()
