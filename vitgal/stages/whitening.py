"""The images from which a global stage's whitening is learnt; never the benchmark's own."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data import photographs, splits
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.descriptors import described_images, read_descriptors
from vitgal.retrieval import refine
from vitgal.settings import GlobalSettings
from vitgal.settings.refinement import LearnedWhitening, Whitening
from vitgal.stages.images import benchmark_images

PER_CLASS = 8  # images of a landmark that are drawn, at most: enough for pairs
SOURCES = ("training split", "photographs", "descriptors")  # as scores.json names them


@dataclass(frozen=True, eq=False)
class StoredDescriptors:
    """Another system's descriptors of some images, see `read_descriptors`, read once."""

    file: Path
    names: Sequence[str]

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """(N, D) float32."""
        return read_descriptors(self.file, self.names)

    @property
    def as_input(self) -> runs.Input:
        """The input of a stage: the descriptors, read again where a file has changed."""
        files = [path for path in (self.file, self.file.with_suffix(".txt")) if path.is_file()]
        stamp = runs.images_input([path.name for path in files], files).stamp
        return runs.Input(stamp, lambda: hashlib.sha256(self.rows.data).hexdigest())


@dataclass(frozen=True, eq=False)
class RefineSet:
    """Images from which a whitening is learnt."""

    source: str  # one of SOURCES
    file: Path | None  # the folder or file that was set; None: the training split
    names: list[str]  # F images
    paths: list[Path]  # their files; none for descriptors
    labels: np.ndarray  # (F,) int64, equal for images of one landmark

    @property
    def as_input(self) -> runs.Input:
        """The input of a stage that learns from the images."""
        if self.source == SOURCES[2]:
            images = StoredDescriptors(self.file, self.names).as_input
        else:
            images = runs.images_input(self.names, self.paths)
        return runs.combined_input([images], lambda part: [self.names, self.labels.tolist(), part])

    def rows(self) -> np.ndarray:
        """Reads the descriptors (F, D) float32 of a set of descriptors."""
        return StoredDescriptors(self.file, self.names).rows

    def refuse_benchmark(self, dataset: RetrievalDataset) -> None:
        """Raises RefinementError where an image of the set is a query or a labelled image.

        Photographs are compared by content, descriptors by name.
        """
        if self.paths:
            shared = [path.name for path in benchmark_images(self.paths, dataset)]
        else:
            truth = dataset.ground_truth
            known = {Path(name).stem for name in (*truth.queries, *truth.database)}
            shared = [name for name in self.names if Path(name).stem in known]
        if shared:
            raise refine.RefinementError(
                f"{len(shared)} of {len(self.names)} images that the whitening would be learnt "
                f"from are images of the benchmark {dataset.name} ({runs.abbreviate(shared)}): "
                "leave them out of refine_set"
            )


def learnt_step(settings: GlobalSettings) -> Whitening | LearnedWhitening | None:
    """Returns the step of the refinement that is learnt; None where there is none."""
    learnt = (step for step in settings.steps if isinstance(step, (Whitening, LearnedWhitening)))
    return next(learnt, None)


def open_refine_set(
    run: Path, settings: GlobalSettings, file: Path | None, image_folder: Path | None
) -> RefineSet:
    """Opens the images that a whitening is learnt from, at most `refine_images` of them.

    They are drawn landmark by landmark, with a fixed seed. In a folder of photographs each
    sub-folder is a landmark; descriptors of another system have the landmarks of the run's split,
    if there is one.

    file: a folder of photographs or a file of descriptors (`read_descriptors`); None: the training
    images of the run's split, in `image_folder`. Raises StageError where the run has no split;
    FileNotFoundError, PhotographError or DescriptorError where images or descriptors are missing or
    cannot be read.
    """
    if file is None:
        runs.read_stage(run / "split", "01_data_split (or set refine_set)")
        table = splits.read_split(run / "split", "train")
        names, labels = table["path"].tolist(), table["label"].to_numpy(np.int64)
        source = SOURCES[0]
    elif file.is_dir():
        names = photographs.list_photographs(file).names
        labels = _folder_labels(names)
        source, image_folder = SOURCES[1], file
    else:
        names = described_images(file)
        labels = _split_labels(run, names)
        source, image_folder = SOURCES[2], None
    drawn = _draw(labels, settings.refine_images)
    names = [names[index] for index in drawn]
    paths = [] if image_folder is None else [Path(image_folder) / name for name in names]
    return RefineSet(source, file, names, paths, labels[drawn])


def _folder_labels(names: Sequence[str]) -> np.ndarray:
    """One label per sub-folder; photographs directly in the folder have one each."""
    keys = [name if "/" not in name else str(Path(name).parent) + "/" for name in names]
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _split_labels(run: Path, names: Sequence[str]) -> np.ndarray:
    """The split's labels of images by the stem of their names; other images have one each."""
    known: dict[str, int] = {}
    if (run / "split" / runs.MANIFEST).exists():
        table = splits.read_split(run / "split", "train")
        stems = (Path(path).stem for path in table["path"])
        known = dict(zip(stems, table["label"].tolist(), strict=True))
    free = max(known.values(), default=-1) + 1
    labels = [known.get(Path(name).stem, free + index) for index, name in enumerate(names)]
    return np.array(labels, np.int64)


def _draw(labels: np.ndarray, count: int) -> np.ndarray:
    """Rising indices of at most `count` images, of up to PER_CLASS a label in random order."""
    if len(labels) <= count:
        return np.arange(len(labels))
    shuffled = np.random.default_rng([0, 4]).permutation(len(labels))
    landmarks, group = np.unique(labels[shuffled], return_inverse=True)
    turn = pd.Series(group).groupby(group).cumcount().to_numpy()  # of an image at its landmark
    order = np.random.default_rng([0, 5]).permutation(len(landmarks))[group]
    # All turns of one landmark before the next one, beyond PER_CLASS after all landmarks.
    sorter = np.lexsort((turn, order, turn // PER_CLASS))
    return np.sort(shuffled[sorter[:count]])


def refuse_same_rows(rows: np.ndarray, *benchmark: np.ndarray) -> None:
    """Raises RefinementError where a row (F, D) equals one of the benchmark's (N, D), bit for bit.

    An image of the benchmark may stand in the set under another name. Zeros are left out.
    """
    known = {row.tobytes() for part in benchmark for row in np.asarray(part) if row.any()}
    shared = sum(row.tobytes() in known for row in np.asarray(rows))
    if shared:
        raise refine.RefinementError(
            f"{shared} of {len(rows)} descriptors that the whitening would be learnt from are the "
            "benchmark's own: leave these images out of refine_set"
        )


@dataclass(frozen=True, eq=False)
class Learnt:
    """A whitening, and the source and number of the images that it is learnt from."""

    whitening: refine.WhiteningMap
    source: str
    images: int

    @property
    def facts(self) -> dict[str, Any]:
        """The entry in scores.json."""
        fingerprint = self.whitening.fingerprint
        return {"learnt from": self.source, "images": self.images, "sha256": fingerprint}


def learn_whitening(settings: GlobalSettings, rows: np.ndarray, images: RefineSet) -> Learnt:
    """Learns the whitening of a refinement from descriptors (F, D) of these images.

    Rows of zeros, images that could not be read, are left out. Raises RefinementError.
    """
    step = learnt_step(settings)
    read = np.flatnonzero(np.any(rows, axis=1))
    rows = np.asarray(rows[read])
    if isinstance(step, LearnedWhitening):
        pairs = refine.matching_pairs(images.labels[read])
        whitening = refine.learned_whitening(rows, pairs, dimensions=step.dimensions)
    else:
        whitening = refine.pca_whitening(
            rows, dimensions=step.dimensions, power=step.power, shrinkage=step.shrinkage
        )
    return Learnt(whitening, images.source, len(read))
