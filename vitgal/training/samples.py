"""Training data: the images of a split by (epoch, index), batches by (epoch, step)."""

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitgal import runs
from vitgal.data import gldv2, images, splits
from vitgal.data.revisited import GroundTruth
from vitgal.evaluation import protocol, statistics
from vitgal.evaluation.landmarks import find_landmarks
from vitgal.retrieval import exact_search
from vitgal.settings import Recipe
from vitgal.training import augmentation
from vitgal.training.errors import TrainingError


class Sample(NamedTuple):
    """One image as a data worker reads it; in a batch every field has a first axis B."""

    picture: Tensor  # (3, S, S) uint8
    hole: Tensor  # (3,) int64: top, left, side of the square that is set to zero
    label: int
    index: int  # of the image that was read
    unreadable: int  # index of the unreadable image that it replaces; -1: none
    view: Tensor  # (3, T, T) uint8: the same for a teacher of another size; (0,) without one


class TrainingImages(Dataset):
    """Samples by (epoch, index), which seed the augmentation.

    An image that cannot be decoded is replaced by the next readable one.
    """

    def __init__(
        self, folder: Path, table: pd.DataFrame, settings: Recipe, augment: str | None = None
    ):
        self.folder, self.settings = Path(folder), settings
        # Arrays, not lists: reading an object changes its reference count, and a forked worker
        # would then copy its page of memory.
        self.names = table["path"].to_numpy(dtype=str)
        self.labels = table["label"].to_numpy()
        self.augment = augment or settings.augment
        self.teacher_size = settings.teacher_size if augment is None else None
        self.skipped = self._indices(settings.skip_images) if augment is None else frozenset()
        self.transform = {
            "published": augmentation.augment_published,
            "fast": augmentation.augment_fast,
            "none": lambda image, size, rng: images.resize(image, size, "squash"),
        }[self.augment]

    def __len__(self) -> int:
        return len(self.names)

    def _indices(self, names: tuple[str, ...]) -> frozenset[int]:
        indices = np.flatnonzero(np.isin(self.names, names)) if names else ()
        unknown = set(names) - {str(self.names[index]) for index in indices}
        if unknown:
            raise TrainingError(f"skip_images names {min(unknown)}, which train.csv does not list")
        return frozenset(int(index) for index in indices)

    def path(self, index: int) -> Path:
        """Returns the path of an image."""
        return self.folder / str(self.names[index])

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = np.random.default_rng((self.settings.seed, epoch, index))
        unreadable = -1
        for further in range(len(self)):
            used = (index + further) % len(self)
            if used in self.skipped:
                continue
            try:
                image = self.read(used)
            except (images.ImageError, FileNotFoundError):
                unreadable = index
                continue
            same = copy.deepcopy(rng)
            picture, hole = self.change(image, self.settings.image_size, rng)
            view = torch.empty(0, dtype=torch.uint8)
            if self.teacher_size is not None:
                view, _ = self.change(image, self.teacher_size, same)
            return Sample(picture, hole, int(self.labels[used]), used, unreadable, view)
        raise TrainingError(f"none of the {len(self)} images can be read, {self.path(0)} first")

    def read(self, index: int) -> np.ndarray:
        """Reads the photograph (H, W, 3) uint8 RGB, smaller where the fast augmentation allows."""
        least = None
        if self.augment == "fast":
            side = max(self.settings.image_size, self.teacher_size or 0)
            least = math.ceil(augmentation.FAST_MARGIN * side)
        return images.read_image(self.path(index), least_side=least)

    def change(
        self, image: np.ndarray, size: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Augments a photograph (H, W, 3) uint8 to (3, size, size); returns its hole (3,) too.

        What is drawn does not depend on the size. The hole is the one of a picture of `image_size`:
        zeros where there is none, or where it is already cut (augment "published").
        """
        settings = self.settings
        picture, hole = self.transform(image, size, rng), torch.zeros(3, dtype=torch.int64)
        if self.augment != "none":
            if settings.rand_augment:
                picture = augmentation.rand_augment(
                    picture, settings.rand_augment, settings.rand_augment_magnitude, rng
                )
            hole = torch.tensor(augmentation.draw_hole(settings.image_size, rng))
        if self.augment == "published":
            scaled = augmentation.scaled_hole(hole, size / settings.image_size)
            augmentation.cut_hole(picture, tuple(scaled.tolist()))
            hole = torch.zeros_like(hole)
        return torch.from_numpy(picture).permute(2, 0, 1), hole


@dataclass(frozen=True)
class Batches:
    """One rank's batches of one epoch from step `first` on: lists of (epoch, index) keys.

    The epoch's order is a permutation by (seed, epoch), or with `labels` a draw in which every
    class is equally frequent. A step takes from it a batch for each rank, then the next accumulated
    batch for each rank: two processes see the images of one that accumulates two batches. Images
    after the last whole step are dropped.
    """

    count: int
    batch_size: int
    processes: int
    rank: int
    seed: int
    epoch: int
    first: int = 0
    accumulate: int = 1
    labels: np.ndarray | None = None

    @property
    def steps(self) -> int:
        """The whole steps in the epoch."""
        return self.count // (self.batch_size * self.processes * self.accumulate)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order()
        for batch in range(self.first * self.accumulate, self.steps * self.accumulate):
            start = (batch * self.processes + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]

    def order(self) -> np.ndarray:
        """Returns the image indices (N,) in the epoch's order."""
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.labels is None:
            return rng.permutation(self.count)
        by_class = np.argsort(self.labels, kind="stable")
        sizes = np.bincount(self.labels)
        starts = np.cumsum(sizes) - sizes
        rounds = -(-self.count // len(sizes))
        classes = np.concatenate([rng.permutation(len(sizes)) for _ in range(rounds)])[: self.count]
        offsets = (rng.random(self.count) * sizes[classes]).astype(np.int64)
        return by_class[starts[classes] + offsets]


@dataclass(frozen=True)
class SplitData:
    """The images of one split folder, for training.

    validation: the images of val.csv and val_retrieval.csv, each once; label -1 where the class is
    not trained.
    """

    train: TrainingImages
    validation: TrainingImages
    queries: np.ndarray  # (Q,) positions of retrieval validation's queries among `validation`
    database: np.ndarray  # (N,) positions of its database
    ground_truth: GroundTruth | None  # None where there is no retrieval validation
    classes: int  # number of trained classes

    @functools.cached_property
    def retrieval_set(self) -> np.ndarray:
        """Positions (V,) of the queries and the database; none without retrieval validation."""
        if self.ground_truth is None:
            return np.arange(0)
        return np.union1d(self.queries, self.database)

    def score(self, results: list[tuple[np.ndarray, dict[str, Tensor]]]) -> dict[str, float]:
        """Computes means over all validation images, and the retrieval set's mAP.

        The mAP comes with the ends of its 95 % bootstrap interval over landmarks.

        results: positions (B,) among the validation images, and the network's values for them.
        """
        positions = np.concatenate([batch for batch, _ in results])
        order = np.argsort(positions)
        values = {
            key: torch.cat([result[key] for _, result in results]).float().numpy()[order]
            for key in results[0][1]
        }
        scores = {}
        if len(positions) == len(self.validation):
            trained = self.validation.labels >= 0
            scores = {
                key: float(value[trained].mean()) if trained.any() else math.nan
                for key, value in values.items()
                if key != "features"
            }
        if "features" in values and self.ground_truth is not None:
            scores |= self._retrieval_scores(positions[order], values["features"])
        return scores

    def _retrieval_scores(self, positions: np.ndarray, features: np.ndarray) -> dict[str, float]:
        """mAP of the queries over the database; positions: rising, a row of features each."""
        queries, database = (
            features[np.searchsorted(positions, part)] for part in (self.queries, self.database)
        )
        _, ranks = exact_search.search(queries, database, k=len(database))
        result = protocol.evaluate(ranks, self.ground_truth)["medium"]
        clusters = find_landmarks(self.ground_truth).clusters
        low, high = statistics.bootstrap_interval(result["ap"], clusters)
        return {"val_map": result["map"], "val_map_low": low, "val_map_high": high}

    def refuse_missing(self) -> None:
        """Raises FileNotFoundError with the first missing images and their number."""
        names = [*self.train.names.tolist(), *self.validation.names.tolist()]
        # Names are a/b/c/<id>.jpg; a Path for each of a million would take seconds.
        ids = [name.rpartition("/")[2][:-4] for name in names]
        if missing := gldv2.missing_images(self.train.folder, ids):
            first = runs.abbreviate([gldv2.image_path(image) for image in missing[:4]])
            raise FileNotFoundError(
                f"{len(missing):,} of {len(ids):,} images of the split are not in "
                f"{self.train.folder}, first {first}; bring them back, or make the split anew"
            )


def read_data(split: Path, image_folder: Path, settings: Recipe) -> SplitData:
    """Reads the tables of a split folder.

    Raises FileNotFoundError without the image folder, ValueError where the training labels are not
    the classes of the split, each with an image.
    """
    if not Path(image_folder).is_dir():
        raise FileNotFoundError(f"the image folder {image_folder} does not exist")
    train = TrainingImages(image_folder, splits.read_split(split, "train"), settings)
    classes = int((~splits.class_counts(split)["held_out"].astype(bool)).sum())
    _check_labels(train.labels, classes, split / "train.csv")
    retrieval = splits.read_split(split, "val_retrieval")
    val = splits.read_split(split, "val")[["path", "label"]]
    val = pd.concat([val, retrieval[["path", "label"]]]).drop_duplicates("path", ignore_index=True)
    val["label"] = val["label"].where(val["label"] < classes, -1)
    position = pd.Series(val.index, index=val["path"])
    queries, database = (
        position[retrieval.loc[retrieval["role"] == role, "path"]].to_numpy()
        for role in ("query", "database")
    )
    return SplitData(
        train=train,
        validation=TrainingImages(image_folder, val, settings, "none"),
        queries=queries,
        database=database,
        ground_truth=splits.validation_ground_truth(retrieval) if len(queries) else None,
        classes=classes,
    )


def _check_labels(labels: np.ndarray, classes: int, table: Path) -> None:
    if len(labels) == 0:
        raise ValueError(f"{table} lists no image: make the split anew")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(
            f"{table} has the label {labels[wrong][0]} in row {wrong.argmax()}, but the split has "
            f"the classes 0 to {classes - 1}; make the split anew"
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(empty):
        raise ValueError(
            f"{len(empty)} of the {classes} classes have no image in {table}, class {empty[0]} "
            "first: make the split anew without it"
        )
