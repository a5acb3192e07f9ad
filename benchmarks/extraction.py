"""Extraction: the published loop beside ours on real photographs, in one run.

    python benchmarks/extraction.py [--images 16] [--batch 4] [--threads 1]

XCiT-S12 with seeded random weights, the bundled photographs, local features at five scales and
global descriptors. The published loop is rebuilt from its description: one image at a time in
float32, every token of every scale, scales by `scale_factor`, selection and suppression in Python.
Times are processor time, loader included, so that other work on the machine counts little. Measure
one part a run: ours also changes how the process keeps freed memory.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vitgal.data.images import MEAN, STD
from vitgal.features.local import LocalFeatures
from vitgal.models.network import ViTGaL, build_model
from vitgal.models.prepared import prepare
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings
from vitgal.stages.images import ImageTask, load_image
from vitgal.stages.local_describer import LocalDescriber

PHOTOGRAPHS = Path(__file__).parent.parent / "third_party" / "landmarks"


class Clock:
    """Processor seconds spent within `with`, added up."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._began = time.process_time()

    def __exit__(self, *_):
        self.seconds += time.process_time() - self._began


def published_input(path: Path, squash: bool) -> Tensor:
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    height, width = image.shape[:2]
    sides = (512, 512)
    if not squash:
        stretch = (width / height) ** 0.5
        sides = tuple(int(512 * each) // 16 * 16 for each in (stretch, 1 / stretch))
    image = cv2.resize(image, sides, interpolation=cv2.INTER_LINEAR)
    normal = (image / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(normal.transpose(2, 0, 1).astype(np.float32).copy())[None]


def published_suppress(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Greedy suppression, a box at a time."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-scores, kind="stable")[:1200]
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(int(best))
        mine, others = boxes[best], boxes[order]
        y = np.minimum(mine[2], others[:, 2]) - np.maximum(mine[0], others[:, 0])
        x = np.minimum(mine[3], others[:, 3]) - np.maximum(mine[1], others[:, 1])
        shared = np.maximum(0, y) * np.maximum(0, x)
        order = order[shared / (areas[best] + areas[order] - shared) <= 0.5]
    return kept[:1000]


def published_local(model: ViTGaL, path: Path, network: Clock) -> tuple[np.ndarray, np.ndarray]:
    """Locations (y, x) and descriptors of one image."""
    image = published_input(path, squash=False)
    boxes, scores, codes = [], [], []
    for scale in LocalSettings.scales:
        wanted = [-(-int(side * scale) // 16) * 16 for side in image.shape[2:]]
        factors = [new / old for new, old in zip(wanted, image.shape[2:], strict=True)]
        with network:
            scaled = F.interpolate(image, scale_factor=factors, mode="bilinear")
            found = model.token_features(scaled)
        heads = found.attention[0]
        score = (heads / heads.max(dim=1, keepdim=True).values).mean(dim=0)
        score = score / score.sum() * len(score)
        bound, kept = 60.0, torch.nonzero(score > 60.0).flatten()
        while len(kept) < 400 * factors[0] * factors[1] and bound / 2 >= 0.6:
            bound /= 2
            kept = torch.nonzero(score > bound).flatten()
        for token in kept.tolist():
            row, column = divmod(token, scaled.shape[3] // 16)
            corners = (row * 16, column * 16, row * 16 + 16, column * 16 + 16)
            boxes.append([int(c / factors[i % 2]) for i, c in enumerate(corners)])
        scores.append(score[kept])
        codes.append(F.normalize(found.codes[0].index_select(0, kept), dim=1))
    boxes = np.array(boxes)
    best = published_suppress(boxes, torch.cat(scores).numpy())
    return (boxes[best, :2] + boxes[best, 2:]) // 2, torch.cat(codes)[best].numpy()


def published_global(model: ViTGaL, path: Path, network: Clock) -> np.ndarray:
    image = published_input(path, squash=True)
    with network:
        return F.normalize(model.global_features(image), dim=1)[0].numpy()


def timed(work: Callable, repeats: int) -> tuple[float, object]:
    """The least processor seconds of some rounds, and the result."""
    spent = []
    for _ in range(repeats):
        clock = Clock()
        with clock:
            found = work()
        spent.append(clock.seconds)
    return min(spent), found


prepared = functools.cache(prepare)  # the first of the rounds, which counts least, prepares


def ours(
    model: ViTGaL, paths: list[Path], precision: str, batch: int, resize: str
) -> list[LocalFeatures] | np.ndarray:
    machine = MachineSettings(batch_size=batch, local_batch_size=batch, read_threads=1)
    settings = GlobalSettings(size=512, resize=resize) if resize == "squash" else LocalSettings()
    describer = LocalDescriber(prepared(model, precision), settings, machine, precision)
    tasks = [ImageTask(str(path), path) for path in paths]
    with tqdm(disable=True) as bar, describer.stream(tasks, bar) as images:
        if resize == "squash":
            return describer.global_rows(images, len(tasks))[0]
        return [item for _, item in describer.local_items(images, [t.key for t in tasks])[0]]


def agreement(results: list[LocalFeatures], published: list[tuple]) -> str:
    """Formats the fraction of the published locations that ours contain."""
    fractions = []
    for features, (locations, _) in zip(results, published, strict=True):
        keypoints = {tuple(point) for point in features.keypoints[:, ::-1].astype(int).tolist()}
        fractions.append(np.mean([tuple(point) in keypoints for point in locations.tolist()]))
    return f"{100 * np.mean(fractions):.1f} % of the published locations"


def compare(
    name: str, published: Callable, ours: Callable, paths: list[Path], options: argparse.Namespace
) -> list:
    network = Clock()
    reference, expected = timed(
        lambda: [published(path, network) for path in paths], options.repeats
    )
    fraction = network.seconds / options.repeats / reference
    count = len(paths)
    print(
        f"{name:34}{1000 * reference / count:10.0f} ms   1.00   network {fraction:.0%}", flush=True
    )
    for precision in ("fp32", "bf16"):
        for batch in dict.fromkeys((1, options.batch)):
            seconds, results = timed(lambda p=precision, b=batch: ours(p, b), options.repeats)
            note = agreement(results, expected) if isinstance(expected[0], tuple) else ""
            line = f"  ours, {precision}, batches of {batch}"
            print(f"{line:34}{1000 * seconds / count:10.0f} ms {reference / seconds:6.2f}   {note}")
    return expected


def loader(paths: list[Path]) -> None:
    """Processor time to read, decode and resize an image."""
    tasks = [ImageTask(str(path), path) for path in paths]
    for resize in ("area", "squash"):
        spent, _ = timed(lambda mode=resize: [load_image(task, 512, mode) for task in tasks], 3)
        each = 1000 * spent / len(paths)
        print(f"loader, {resize}: {each:.2f} ms an image, {1000 / each:.0f} images/s a core")
    pixels = np.mean([np.prod(cv2.imread(str(path)).shape[:2]) for path in paths]) / 1e6
    print(f"photographs of {pixels:.2f} megapixels on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--part", choices=["local", "global", "loader"], action="append")
    options = parser.parse_args()
    parts = options.part or ["local", "global", "loader"]
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    every = sorted(PHOTOGRAPHS.glob("*/*.jpg"))
    paths = every[:: max(1, len(every) // options.images)][: options.images]
    model = build_model("xcit_small_12_p16_224", code_dim=128, seed=0)
    print(f"{len(paths)} photographs, {options.threads} thread(s); processor time an image")
    with torch.no_grad():
        if "local" in parts:
            compare(
                "published, local, 5 scales",
                lambda path, network: published_local(model, path, network),
                lambda precision, batch: ours(model, paths, precision, batch, "area"),
                paths,
                options,
            )
        if "global" in parts:
            compare(
                "published, global",
                lambda path, network: published_global(model, path, network),
                lambda precision, batch: ours(model, paths, precision, batch, "squash"),
                paths,
                options,
            )
    if "loader" in parts:
        loader(every)


if __name__ == "__main__":
    main()
