"""What training reads: the images of a split by (epoch, index), batches by (epoch, step)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitgal import evaluation, images, landmarks, search
from vitgal.augmentation import augment_fast, augment_published, squashed
from vitgal.recipe import Recipe, TrainingError
from vitgal.revisited import GroundTruth


class TrainingImages(Dataset):
    """Images of a split by (epoch, index); the augmentation's randomness follows from both.

    `dataset[epoch, index]` gives ((3, size, size) float32, label, index, unreadable). An image that
    cannot be decoded is replaced by the next readable one, and `unreadable` is its index, else -1.
    """

    def __init__(self, folder: Path, table: pd.DataFrame, size: int, augment: str, seed: int):
        self.paths = [Path(folder) / path for path in table["path"]]
        self.labels = table["label"].to_numpy()
        self.size, self.seed = size, seed
        self.transform = {
            "published": augment_published,
            "fast": augment_fast,
            "none": squashed,
        }[augment]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        unreadable = -1
        for used in (*range(index, len(self)), *range(index)):
            try:
                image = images.read_image(self.paths[used])
            except images.ImageError:
                unreadable = index
                continue
            return self.transform(image, self.size, rng), int(self.labels[used]), used, unreadable
        raise TrainingError(f"none of the {len(self)} images can be read, {self.paths[0]} first")


@dataclass(frozen=True)
class Batches:
    """One rank's batches of one epoch from `first` on: lists of (epoch, index) keys.

    The epoch's order is a permutation by (seed, epoch); a step takes `batch_size * processes` of
    it and rank r its r-th part. What is left over after the last whole step is dropped.
    """

    count: int
    batch_size: int
    processes: int
    rank: int
    seed: int
    epoch: int
    first: int = 0

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.processes) - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        for step in range(self.first, self.first + len(self)):
            start = (step * self.processes + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


@dataclass(frozen=True)
class SplitData:
    """The images of one split folder as training reads them.

    `validation` holds the images of val.csv and val_retrieval.csv, each once, label -1 where its
    class is not trained; `queries` and `database` are positions in it.
    """

    train: TrainingImages
    validation: TrainingImages
    queries: np.ndarray
    database: np.ndarray
    ground_truth: GroundTruth | None
    classes: int
    max_failed_share: float = 0.001

    @property
    def train_count(self) -> int:
        return len(self.train)

    def score(self, parts: list[tuple[np.ndarray, dict[str, Tensor]]]) -> dict[str, float]:
        """Means over the validation images, and mAP of the retrieval validation set."""
        order = np.argsort(np.concatenate([indices for indices, _ in parts]))
        values = {
            key: torch.cat([result[key] for _, result in parts]).float().numpy()[order]
            for key in parts[0][1]
        }
        trained = self.validation.labels >= 0
        scores = {
            key: float(value[trained].mean()) if trained.any() else math.nan
            for key, value in values.items()
            if key != "features"
        }
        if "features" in values and self.ground_truth is not None:
            features = values["features"]
            database = features[self.database]
            _, ranks = search.search(features[self.queries], database, k=len(database))
            scores["val_map"] = evaluation.evaluate(ranks, self.ground_truth)["medium"]["map"]
        return scores


def read_data(
    split: Path, image_folder: Path, recipe: Recipe, max_failed_share: float = 0.001
) -> SplitData:
    """The training and validation images of a split folder, ready for the loop.

    Raises FileNotFoundError where the image folder is missing, ValueError where labels are not
    0 .. classes - 1.
    """
    if not Path(image_folder).is_dir():
        raise FileNotFoundError(f"the image folder {image_folder} does not exist")
    train = landmarks.read_split(split, "train")
    classes = int(train["label"].max()) + 1
    if train["label"].min() < 0 or train["label"].nunique() != classes:
        raise ValueError(f"labels in {split / 'train.csv'} are not 0 to {classes - 1} without gaps")
    retrieval = landmarks.read_split(split, "val_retrieval")
    val = landmarks.read_split(split, "val")[["path", "label"]]
    val = pd.concat([val, retrieval[["path", "label"]]]).drop_duplicates("path", ignore_index=True)
    place = pd.Series(val.index, index=val["path"])
    queries, database = (retrieval[retrieval["role"] == role] for role in ("query", "database"))
    shown = val.assign(label=val["label"].where(val["label"] < classes, -1))
    return SplitData(
        train=TrainingImages(image_folder, train, recipe.image_size, recipe.augment, recipe.seed),
        validation=TrainingImages(image_folder, shown, recipe.image_size, "none", recipe.seed),
        queries=place[queries["path"]].to_numpy(),
        database=place[database["path"]].to_numpy(),
        ground_truth=_class_ground_truth(queries, database) if len(queries) else None,
        classes=classes,
        max_failed_share=max_failed_share,
    )


def _class_ground_truth(queries: pd.DataFrame, database: pd.DataFrame) -> GroundTruth:
    """Every database image of the query's class is a positive (easy); nothing else is labelled."""
    of_class = database.reset_index(drop=True).groupby("label").indices
    nothing = np.zeros(0, np.int64)
    return GroundTruth(
        name="val_retrieval",
        database=tuple(database["path"]),
        queries=tuple(queries["path"]),
        boxes=np.zeros((len(queries), 4)),
        easy=[np.asarray(of_class.get(label, nothing)) for label in queries["label"]],
        hard=[nothing] * len(queries),
        junk=[nothing] * len(queries),
    )
