"""Own photographs for hloc, COLMAP and kapture: similar pairs, local features, matches."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from vitgal import runs
from vitgal.data.photographs import PhotographError
from vitgal.features import reconstruction
from vitgal.features.interchange import export_hloc
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.exact_search import search
from vitgal.retrieval.verification import inspect_shortlist
from vitgal.settings import RerankingSettings
from vitgal.stages.own import Photographs

LEAST_INLIERS = 15  # of a pair that is written, as COLMAP's default asks


def retrieval_pairs(photographs: Photographs, count: int = 20) -> list[tuple[str, str]]:
    """Pairs every photograph with the `count` most similar ones by their global descriptors.

    Source: hloc, pairs_from_retrieval. Each pair occurs once, its names sorted; the pairs are
    sorted. One photograph, or count 0, gives no pair.
    """
    count = min(count, len(photographs.names) - 1)
    if count < 1:
        return []
    descriptors = photographs.descriptors
    ranking = search(descriptors, descriptors, k=count + 1)[1]
    pairs = set()
    for index, column in enumerate(ranking.T):
        neighbours = [other for other in column.tolist() if other != index][:count]
        pairs |= {tuple(sorted((index, other))) for other in neighbours}
    names = photographs.names
    return [(names[first], names[second]) for first, second in sorted(pairs)]


def export_pairs(pairs: Sequence[tuple[str, str]], path: Path) -> Path:
    """Writes a line `name name` a pair, for hloc and COLMAP's matches_importer; returns the path.

    Both read names as relative to the folder of photographs. Raises PhotographError for a name with
    white space, at which both would cut it, and for one that begins like a comment.
    """
    for name in sorted({name for pair in pairs for name in pair}):
        if any(character.isspace() for character in name) or name.startswith("#"):
            reason = "begins with #, which marks a comment there"
            if not name.startswith("#"):
                reason = "has a blank in it, and hloc and COLMAP end a name there"
            raise PhotographError(f"{name!r} {reason}: rename it")
    return runs.write_text(path, "".join(f"{first} {second}\n" for first, second in pairs))


def export_features(photographs: Photographs, path: Path) -> Path:
    """Writes all local features as hloc's HDF5 (`features.export_hloc`) and returns the path.

    Keypoints are pixels of the photographs as stored, before the EXIF orientation is applied, as
    hloc and COLMAP read them.
    """
    return export_hloc(_StoredFeatures(photographs), path, suffix="")


def verified_matches(
    photographs: Photographs, pairs: Sequence[tuple[str, str]], settings: RerankingSettings
) -> Iterator[reconstruction.VerifiedMatches]:
    """Matches and verifies pairs of photographs; yields those with LEAST_INLIERS inliers."""
    stored = _StoredFeatures(photographs)
    for first, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        seconds = [second for _, second in group]
        features = map(photographs.features, seconds)
        inspections = inspect_shortlist(photographs.features(first), features, settings)
        for second, pair in zip(seconds, inspections, strict=True):
            inliers = pair.verification.inliers
            if inliers.sum() < LEAST_INLIERS:
                continue
            points = [stored[name].original_keypoints()[pair.matches[inliers, side]]
                      for side, name in enumerate((first, second))]  # fmt: skip
            homography = cv2.findHomography(*points)[0]
            if homography is not None:
                yield reconstruction.VerifiedMatches(
                    first, second, pair.matches, inliers, homography
                )


def export_photographs(
    photographs: Photographs,
    target: str,
    folder: Path,
    settings: RerankingSettings,
    *,
    neighbours: int = 20,
) -> Path:
    """Writes a folder's features and verified matches for another program; returns the folder.

    target: "hloc" (features.h5, pairs.txt, matches.h5), "colmap" (database.db, pairs.txt) or
    "kapture". neighbours: of each photograph that are matched. Raises as `export_pairs` and
    `export_kapture`.
    """
    pairs = retrieval_pairs(photographs, neighbours)
    matches = list(verified_matches(photographs, pairs, settings))
    stored = _StoredFeatures(photographs)
    if target == "kapture":
        return reconstruction.export_kapture(stored, matches, folder)
    export_pairs([(pair.first, pair.second) for pair in matches], folder / "pairs.txt")
    if target == "colmap":
        reconstruction.export_colmap(stored, matches, folder / "database.db")
    else:
        export_features(photographs, folder / "features.h5")
        reconstruction.export_hloc_matches(matches, folder / "matches.h5")
    return folder


@dataclass(frozen=True, eq=False)
class _StoredFeatures(Mapping[str, LocalFeatures]):
    """The features of a folder in pixels of the photographs as stored, read one by one."""

    photographs: Photographs

    def __getitem__(self, name: str) -> LocalFeatures:
        description = self.photographs.description(name)
        return undo_orientation(description.features, description.orientation)

    def __iter__(self) -> Iterator[str]:
        return iter(self.photographs.names)

    def __len__(self) -> int:
        return len(self.photographs.names)


def undo_orientation(features: LocalFeatures, orientation: int) -> LocalFeatures:
    """Moves features of a whole upright photograph to the pixels of the photograph as stored.

    features: keypoints (N, 2) in pixels of the upright network input. orientation: by EXIF, 2 to 4
    mirror or turn by 180 degrees, 5 to 8 exchange the sides. Returns keypoints (N, 2) float32.
    """
    height, width = features.input_size
    x, y = features.keypoints.T
    # EXIF 2.3, 4.6.4
    if orientation in (2, 3, 6, 7):
        x = width - x
    if orientation in (3, 4, 7, 8):
        y = height - y
    if orientation <= 4:
        return replace(features, keypoints=np.stack([x, y], axis=1).astype(np.float32))
    x0, y0, x1, y1 = features.box
    return replace(
        features,
        keypoints=np.stack([y, x], axis=1).astype(np.float32),
        input_size=features.input_size[::-1],
        box=(y0, x0, y1, x1),
        image_size=features.image_size[::-1],
    )
