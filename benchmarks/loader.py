"""Reading training images: our loader beside a plain torchvision composition, in one run.

    python benchmarks/loader.py [--images 60] [--width 1024] [--height 768] [--size 512]

Synthetic photographs (smooth colours and edges under noise), saved as JPEG of quality 92. One
process, one thread, no data workers: seconds of processor time an image. "decode" is full-size JPEG
decoding alone, by OpenCV. The plain composition is what one writes with torchvision.transforms.v2
for the published steps: decode_image, the transforms, normalisation, and the cut-out square.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one core; libraries read it when they are imported

import cv2
import numpy as np
import pandas as pd
import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from vitgal.data import gldv2, images
from vitgal.settings import Recipe
from vitgal.training import augmentation, samples

ROUNDS = 3


def write_photographs(folder: Path, count: int, height: int, width: int) -> pd.DataFrame:
    """Photographs of about 2 bits a pixel, as the real ones have; their table."""
    rng = np.random.default_rng(0)
    names = []
    for index in range(count):
        small = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
        image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
        image += rng.normal(0, 6, image.shape).astype(int)
        for _ in range(20):
            x, y = rng.integers(width), rng.integers(height)
            image[y : y + height // 6, x : x + width // 8] += int(rng.integers(-80, 80))
        name = gldv2.image_path(f"{index:016x}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = image.clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / name), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        names.append(name)
    return pd.DataFrame({"path": names, "label": 0})


class Hole(torch.nn.Module):
    """One black square of a quarter of the side with p 0.5."""

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) < 0.5:
            side = picture.shape[-1] // 4
            top, left = torch.randint(picture.shape[-1] - side + 1, (2,)).tolist()
            picture[:, top : top + side, left : left + side] = 0
        return picture


def plain_composition(size: int) -> v2.Compose:
    """The published steps, each by torchvision's own transform."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.4)]),
            v2.RandomApply([v2.JPEG((99, 100))]),
            v2.RandomApply([v2.RandomAffine(10, (0.2, 0.2), (0.7, 1.3), interpolation=2)], p=0.7),
            v2.RandomApply([v2.RandomResizedCrop(size, (0.9, 1.0), antialias=False)]),
            v2.Resize((size, size), antialias=False),
            Hole(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(images.MEAN, images.STD),
        ]
    )


def seconds(work: Callable[[int], object], count: int) -> float:
    """The least processor time an image of some rounds over all of them."""
    work(0)
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for index in range(count):
            work(index)
        found.append((time.process_time() - began) / count)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_photographs(folder, options.images, options.height, options.width)
        paths = [folder / path for path in table["path"]]
        size = sum(path.stat().st_size for path in paths) / len(paths)
        print(f"{len(paths)} photographs, {options.width} x {options.height}, {size / 1e3:.0f} kB")
        measure(options, folder, table, paths)


def measure(
    options: argparse.Namespace, folder: Path, table: pd.DataFrame, paths: list[Path]
) -> None:
    composition = plain_composition(options.size)

    def ours(augment: str) -> Callable[[int], object]:
        settings = Recipe(image_size=options.size, augment=augment)
        dataset = samples.TrainingImages(folder, table, settings)
        return lambda index: dataset[0, index]

    def plain(index: int) -> torch.Tensor:
        return composition(decode_image(str(paths[index]), ImageReadMode.RGB))

    found = {
        "decode": seconds(lambda i: cv2.imdecode(np.fromfile(paths[i], np.uint8), 1), len(paths)),
        "torchvision, published steps": seconds(plain, len(paths)),
        "published": seconds(ours("published"), len(paths)),
        "fast": seconds(ours("fast"), len(paths)),
    }
    batch = torch.randint(0, 256, (16, 3, options.size, options.size), dtype=torch.uint8)
    holes = torch.zeros(16, 3, dtype=torch.int64)
    found["normalisation on the device (here: a processor)"] = (
        seconds(lambda _: augmentation.network_input(batch, holes), 5) / 16
    )
    print(f"{'':50}{'ms':>8}{'x decode':>10}{'x torchvision':>15}")
    for name, value in found.items():
        ratio = found["torchvision, published steps"] / value
        print(f"{name:50}{1e3 * value:8.1f}{value / found['decode']:10.2f}{ratio:15.2f}")


if __name__ == "__main__":
    main()
