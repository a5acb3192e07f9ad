"""Short codes of token features: PCA with whitening, fitted once and kept with a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from vitgal import runs
from vitgal.features.files import FileError, read_arrays

FEATURES_A_VALUE = 10  # of a code, that a fit needs at least
RANK = 1e-9  # variances of vectors of length 1 that are smaller are rounding


class CodeError(runs.UserError, ValueError):
    """Codes cannot be fitted; the message has the remedy."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A map of vectors, ``(x - mean) @ projection``, stored as one `.npz`.

    mean: (D,) float32. projection: (D, C) float32. NAME: of the kind, for messages. Raises
    ValueError where the shapes do not fit.
    """

    mean: np.ndarray
    projection: np.ndarray
    NAME: ClassVar[str]

    def __post_init__(self) -> None:
        if self.projection.ndim != 2 or self.mean.shape != self.projection.shape[:1]:
            raise ValueError(
                f"{self.NAME} of shapes {self.mean.shape} and {self.projection.shape} do not fit "
                "together"
            )

    def save(self, path: Path) -> Path:
        """Writes the map atomically; equal maps give equal bytes."""
        return runs.write_arrays(path, {"mean": self.mean, "projection": self.projection})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file of `save`; FileError where it is damaged, FileNotFoundError for none."""
        mean, projection = read_arrays(Path(path), ("mean", "projection")).values()
        try:
            if not mean.dtype == projection.dtype == np.float32:
                raise ValueError("other numbers than float32")
            return cls(mean, projection)
        except ValueError as error:
            raise FileError(f"{path} holds no {cls.NAME} ({error}): make it again") from error


class Codes(LinearMap):
    """A linear map of normalised features to short codes: ``((x / |x|) - mean) @ projection``.

    mean: of the normalised features. projection: the C first principal directions, each over the
    root of its variance: the values of a code are uncorrelated and of variance 1 over the features
    that it was fitted to.
    """

    NAME = "codes"

    @property
    def code_dim(self) -> int:
        """Dimension C of a code."""
        return self.projection.shape[1]


@dataclass(eq=False)
class Moments:
    """Number, sum and outer products of features of dimension D, accumulated part by part.

    Memory is 8 D^2 bytes, whatever their number.
    """

    dimension: int
    count: int = 0
    total: np.ndarray = field(init=False)  # (D,) float64
    products: np.ndarray = field(init=False)  # (D, D) float64

    def __post_init__(self) -> None:
        self.total = np.zeros(self.dimension)
        self.products = np.zeros((self.dimension, self.dimension))

    def add(self, features: np.ndarray) -> None:
        """Adds features (N, D), each of length 1; N may be 0."""
        features = np.asarray(features, np.float64)
        self.count += len(features)
        self.total += features.sum(axis=0)
        self.products += features.T @ features

    def codes(self, code_dim: int) -> Codes:
        """Fits codes of `code_dim` values to the features.

        Source of whitening by principal components: Jegou and Chum, "Negative evidences and
        co-occurences in image retrieval", ECCV 2012.

        Raises CodeError for more values than the features have directions, or too few features.
        """
        check_code_dim(code_dim, self.dimension)
        if self.count < FEATURES_A_VALUE * code_dim:
            most = self.count // FEATURES_A_VALUE
            lower = f", or lower code_dim to {most}" if most else ""
            raise CodeError(
                f"{self.count} features are too few for a PCA of {code_dim} values: it takes "
                f"{FEATURES_A_VALUE} per value; name a folder of more images as code_images{lower}"
            )
        mean = self.total / self.count
        variances, directions = np.linalg.eigh(self.products / self.count - np.outer(mean, mean))
        rank = int((variances > RANK).sum())
        if code_dim > rank:
            raise CodeError(
                f"code_dim {code_dim} is above {rank}, the number of directions in which the "
                f"{self.count} features differ: lower it, or name other images as code_images"
            )
        first = slice(-1, -code_dim - 1, -1)  # the greatest variances first
        variances, directions = variances[first], directions[:, first]
        # The sign of a direction is arbitrary; equal features give equal codes.
        largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
        projection = directions * np.sign(largest) / np.sqrt(variances)
        return Codes(mean.astype(np.float32), projection.astype(np.float32))


def check_code_dim(code_dim: int, dimension: int) -> None:
    """Raises CodeError for codes of more values than the features have."""
    if code_dim > dimension:
        raise CodeError(
            f"code_dim {code_dim} is above {dimension}, the dimension of the tokens: lower it, or "
            "set another local_block"
        )
