"""Local features of another system, read from hloc's HDF5.

Each image is a group with `keypoints` (N, 2) in pixels of the photograph, (0, 0) the centre of its
top-left pixel, and `descriptors` (C, N); `scores` (N,) and `image_size` (width, height) may be
there. Source: hloc, extract_features.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from vitgal import runs
from vitgal.data.images import crop_box
from vitgal.features import foreign
from vitgal.features.foreign import DescriptorError
from vitgal.features.local import LocalFeatures

MOST = 1 << 26  # values of an image's descriptors: 256 MB in float32
ARRAYS = ("keypoints", "descriptors", "scores", "image_size")


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """An HDF5 file of local features.

    groups: the group of each wanted image. code_dim: the dimension of every descriptor.
    """

    path: Path
    groups: dict[str, str]
    code_dim: int

    @classmethod
    def open(cls, path: str | os.PathLike, names: Sequence[str]) -> "FeatureFile":
        """Finds the groups of images, whose names may begin with `jpg/` and have a suffix.

        Raises FileNotFoundError, or DescriptorError for a file that is damaged, reads other files,
        names an image twice or lacks one (with its own first names and the remedy).
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there are no local features {path}: hloc's .h5")
        with foreign.opened_hdf5(path) as file:
            datasets = foreign.find_datasets(file, path, ("keypoints", "descriptors"))
            stored = sorted({name for name, _ in datasets})
            positions = foreign.find_names(stored, names, path, "local features")
            groups = {name: stored[at] for name, at in zip(names, positions, strict=True)}
            width = 0
            if names:
                width = _arrays(file, groups[names[0]], path, names[0])["descriptors"].shape[0]
        return cls(path, groups, width)

    def read(
        self,
        name: str,
        image_size: tuple[int, int],
        box: Sequence[float] | None = None,
        max_keypoints: int | None = None,
    ) -> LocalFeatures:
        """Reads an image's features within a box, best first.

        Keypoints and input size are in pixels of the photograph, so that thresholds count these.

        image_size: (h, w) of the photograph in pixels. box: (x0, y0, x1, y1), as `crop_box`; None:
        the whole photograph. max_keypoints: those of the greatest scores are kept, without scores
        the first; None: all. Raises DescriptorError for missing keypoints or descriptors, arrays
        that do not fit, another width or image size, a keypoint outside the photograph, or values
        that are not finite; ValueError for a box that does not fit the photograph.
        """
        with foreign.opened_hdf5(self.path) as file:
            arrays = _arrays(file, self.groups[name], self.path, name)
            points, codes, scores = self._values(arrays, name)
        self._check_places(points, arrays.get("image_size"), image_size, name)
        _, frame = crop_box(np.broadcast_to(np.uint8(0), image_size), box)
        low, high = np.array(frame[:2]) - 0.5, np.array(frame[2:]) - 0.5
        inside = ((points >= low) & (points <= high)).all(axis=1)
        kept = np.flatnonzero(inside) if box is not None else np.arange(len(points))
        kept = kept[np.argsort(-scores[kept], kind="stable")][:max_keypoints]
        codes = codes[kept]
        return LocalFeatures(
            keypoints=(points[kept] - low).astype(np.float32),
            descriptors=codes / np.linalg.norm(codes, axis=1, keepdims=True),
            scores=scores[kept],
            scales=np.full(len(kept), np.nan, np.float32),
            input_size=(frame[3] - frame[1], frame[2] - frame[0]),
            box=frame,
            image_size=image_size,
        )

    def count(self, name: str) -> int:
        """Returns the number of an image's features in the file."""
        with foreign.opened_hdf5(self.path) as file:
            return _arrays(file, self.groups[name], self.path, name)["keypoints"].shape[0]

    def _values(self, arrays: dict, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keypoints (N, 2), descriptors (N, C) and scores (N,) in float32; nan without scores."""
        stored, label = arrays["descriptors"], f"{self.path}: image {runs.printable(name)}"
        count = arrays["keypoints"].shape[0]
        if stored.shape[0] != self.code_dim:
            first = next(iter(self.groups))
            raise DescriptorError(
                f"{label} has descriptors of {stored.shape[0]} values, {runs.printable(first)} of "
                f"{self.code_dim}: extract all images with one method (hloc's shape is "
                "(values, keypoints))"
            )
        points = arrays["keypoints"][()].astype(np.float32)
        codes = np.ascontiguousarray(stored[()].T, np.float32)
        lengths = np.linalg.norm(codes, axis=1)
        if not (np.isfinite(points).all() and np.isfinite(lengths).all() and lengths.all()):
            raise DescriptorError(
                f"{label} has a keypoint or descriptor that is zero throughout or not finite: "
                "extract it again"
            )
        if "scores" not in arrays:
            return points, codes, np.full(count, np.nan, np.float32)
        return points, codes, arrays["scores"][()].astype(np.float32)

    def _check_places(
        self, points: np.ndarray, stated: h5py.Dataset | None, size: tuple[int, int], name: str
    ) -> None:
        """Refuses features of a photograph of another size than (h, w)."""
        height, width = size
        label = f"{self.path}: image {runs.printable(name)}"
        remedy = "keypoints must be in pixels of the photograph as it is stored"
        if stated is not None and stated.tolist() != [width, height]:
            raise DescriptorError(
                f"{label} was extracted from {' x '.join(map(str, stated.tolist()))} pixels, and "
                f"the photograph has {width} x {height}: {remedy}"
            )
        outside = ((points < -1) | (points > (width, height))).any(axis=1)  # a pixel's tolerance
        if outside.any():
            x, y = points[np.argmax(outside)]
            raise DescriptorError(
                f"{label} has {outside.sum()} keypoints outside the photograph of {width} x "
                f"{height} pixels, the first at ({x:g}, {y:g}): {remedy}"
            )


def _arrays(file: h5py.File, group: str, path: Path, name: str) -> dict:
    """Opens an image's datasets and checks their shapes; reads the image size alone."""
    label, members = f"{path}: image {runs.printable(name)}", {}
    parent = foreign.follow(file, os.fsencode(group), path)
    for part in ARRAYS:
        item = foreign.follow(parent, part.encode(), path)
        if isinstance(item, h5py.Dataset):
            foreign.check_values(item, f"{label}: {part}", MOST, least=0)
            members[part] = item
    for part in ("keypoints", "descriptors"):
        if part not in members:
            raise DescriptorError(
                f"{label} has no {part}: a local feature needs both, as hloc's extract_features "
                "writes them"
            )
    points, codes = members["keypoints"], members["descriptors"]
    scores = members.get("scores")
    floats = all(item.dtype.kind == "f" for item in (points, codes))
    if not floats or points.ndim != 2 or codes.ndim != 2 or points.shape[1] != 2:
        raise DescriptorError(
            f"{label} has keypoints {points.dtype} {points.shape} and descriptors {codes.dtype} "
            f"{codes.shape}: they must be floats (N, 2) and (values, N)"
        )
    if codes.shape[1] != len(points) or (scores is not None and scores.shape != (len(points),)):
        raise DescriptorError(
            f"{label} has {len(points)} keypoints, descriptors of shape {codes.shape}"
            + (f" and scores of shape {scores.shape}" if scores is not None else "")
            + ": they must be (values, N) and (N,)"
        )
    if "image_size" in members:
        members["image_size"] = members["image_size"][()].ravel()
    return members
