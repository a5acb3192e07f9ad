"""Search in a folder of one's own photographs, without labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.photographs import PhotographError, list_photographs, size_note
from vitgal.features.interchange import export_hloc
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.exact_search import search
from vitgal.retrieval.verification import PairInspection, inspect_shortlist
from vitgal.settings import RerankingSettings
from vitgal.stages.own_descriptions import Describer, Description

SUGGESTIONS = 3  # names in an error


@dataclass(frozen=True, eq=False)
class Photographs:
    """A described folder.

    Attributes:
        folder: the folder; all names are relative to it.
        describer: holds the descriptions.
        names: the N photographs that can be searched, sorted.
        descriptors: (N, D) float32, their global descriptors.
        left_out: photographs that cannot be searched, each with the reason.
        notes: photographs of unusual shape or size, each with a warning.
        other_files: number of files that are no photographs.
        extracted: number of photographs that were described anew.
    """

    folder: Path
    describer: Describer
    names: list[str]
    descriptors: np.ndarray
    left_out: dict[str, str]
    notes: dict[str, str]
    other_files: int
    extracted: int

    def path(self, name: str) -> Path:
        """Returns a photograph's file."""
        return self.folder / name

    def features(self, name: str) -> LocalFeatures:
        """Reads a photograph's local features."""
        return self.describer.describe(self.path(name)).features

    def report(self) -> str:
        """Returns the counts, what was left out and the notes, a line each."""
        lines = [
            f"{len(self.names)} photographs described, {self.other_files} other files passed over"
        ]
        for title, texts in (("left out", self.left_out), ("note", self.notes)):
            lines += [f"{title}: {name}: {text}" for name, text in sorted(texts.items())]
        return "\n".join(lines)


def describe_folder(folder: Path, describer: Describer, *, progress: bool = True) -> Photographs:
    """Describes every photograph of a folder that has no description yet.

    A photograph that cannot be used is left out and named with the reason. An interrupted run
    continues.

    Raises:
        PhotographError: no photograph can be used.
        StageError: another process describes photographs with the same settings.
    """
    listing = list_photographs(folder)
    extracted_before = describer.extracted
    descriptors: dict[str, np.ndarray] = {}
    left_out, notes = dict(listing.unsupported), {}
    with runs.locked(describer.folder):
        for name in tqdm(listing.names, desc="describing", unit="image", disable=not progress):
            try:
                description = describer.describe(listing.folder / name)
            except PhotographError as error:
                left_out[name] = str(error).removeprefix(f"{Path(name).name}: ")
                continue
            descriptors[name] = description.descriptor
            if note := size_note(*description.features.image_size):
                notes[name] = note
    if not descriptors:
        first = next(iter(left_out))
        raise PhotographError(
            f"none of the {len(left_out)} photographs in {folder} can be used; {first}: "
            f"{left_out[first]}"
        )
    return Photographs(
        folder=listing.folder,
        describer=describer,
        names=list(descriptors),
        descriptors=np.stack(list(descriptors.values())),
        left_out=left_out,
        notes=notes,
        other_files=listing.other_files,
        extracted=describer.extracted - extracted_before,
    )


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The ranking of a folder for one query.

    Attributes:
        photographs: the folder that was searched.
        query: name of the query.
        path: file of the query.
        box: (x0, y0, x1, y1) of the query in pixels, None: all of it.
        description: of the query.
        table: one row a photograph without the query, in the final order: `photograph`, `rank` and
            `global_rank` from 1, `similarity`, and for the short list `matches` and `inliers`
            (missing beyond it).
        settings: of matching, verification and reranking.
    """

    photographs: Photographs
    query: str
    path: Path
    box: tuple[int, ...] | None
    description: Description
    table: pd.DataFrame
    settings: RerankingSettings

    def pair(self, name: str) -> tuple[LocalFeatures, PairInspection]:
        """Returns a photograph's local features, and its matches with the query."""
        (pair,) = _inspect(self.photographs, self.description, [name], self.settings)
        return self.photographs.features(name), pair


def find_query(photographs: Photographs, query: str) -> tuple[str, Path]:
    """Returns name and file of a query: a photograph of the folder, or any file by its path.

    Raises PhotographError for a query that does not exist or was left out.
    """
    folder = photographs.folder
    for path in (folder / query, runs.resolve(query)):
        if path.is_file():
            inside = path.is_relative_to(folder)
            name = path.relative_to(folder).as_posix() if inside else path.name
            if name in photographs.left_out:
                raise PhotographError(f"the query {name}: {photographs.left_out[name]}")
            return name, path
    stem = Path(query).stem.lower()
    close = [name for name in photographs.names if stem and stem in name.lower()][:SUGGESTIONS]
    hint = f"do you mean {' or '.join(close)}?" if close else f"one is {photographs.names[0]}"
    raise PhotographError(f"there is no query {query} in {folder}; {hint}")


def search_folder(
    photographs: Photographs,
    query: str,
    box: Sequence[float] | None,
    settings: RerankingSettings,
) -> SearchResult:
    """Ranks a folder for one photograph, or a box in it, and reranks the first by inliers.

    Args:
        query: see `find_query`; the query is not among its own results.
        box: (x0, y0, x1, y1) in pixels of the upright photograph; None: all of it.
        settings: the first `top` photographs are matched, verified and sorted by inliers, equal
            numbers by similarity.
    Raises:
        PhotographError: the query does not exist or cannot be used, or nothing else is there.
    """
    name, path = find_query(photographs, query)
    box = None if box is None else tuple(int(side) for side in box)
    description = photographs.describer.describe(path, box)
    others = [
        index
        for index, other in enumerate(photographs.names)
        if not photographs.path(other).samefile(path)
    ]
    if not others:
        raise PhotographError(f"{photographs.folder} holds nothing but the query: add photographs")
    similarities, ranking = search(
        description.descriptor[None], photographs.descriptors[others], k=len(others)
    )
    names = [photographs.names[others[index]] for index in ranking[:, 0]]
    table = pd.DataFrame({
        "photograph": names,
        "global_rank": np.arange(1, len(names) + 1),
        "similarity": similarities[:, 0],
    })  # fmt: skip
    pairs = _inspect(photographs, description, names[: settings.top], settings)
    counts = [(len(pair.matches), pair.verification.count) for pair in pairs]
    table = _rerank(table, np.array(counts, np.int64).reshape(-1, 2))
    return SearchResult(photographs, name, path, box, description, table, settings)


def _inspect(
    photographs: Photographs,
    query: Description,
    names: Sequence[str],
    settings: RerankingSettings,
) -> Iterator[PairInspection]:
    features = map(photographs.features, names)
    device = photographs.describer.machine.match_device
    return inspect_shortlist(query.features, features, settings, device=device)


def _rerank(table: pd.DataFrame, counts: np.ndarray) -> pd.DataFrame:
    """Adds matches and inliers (n, 2) of the first rows, and sorts these by falling inliers."""
    missing = [pd.NA] * (len(table) - len(counts))
    for column, values in zip(("matches", "inliers"), counts.T, strict=True):
        table[column] = pd.array([*values.tolist(), *missing], "Int64")
    order = np.argsort(-counts[:, 1], kind="stable")
    order = np.concatenate([order, np.arange(len(counts), len(table))])
    table = table.iloc[order].reset_index(drop=True)
    table.insert(1, "rank", np.arange(1, len(table) + 1))
    return table


def write_ranking(result: SearchResult, path: Path) -> Path:
    """Writes a ranking as .csv, similarities with six digits, and returns its path."""
    return runs.write_text(path, result.table.to_csv(index=False, float_format="%.6f"))


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
    white space, at which both would cut it.
    """
    for name in sorted({name for pair in pairs for name in pair}):
        if any(character.isspace() for character in name):
            raise PhotographError(
                f"{name!r} has a blank in it, and hloc and COLMAP end a name there: rename it"
            )
    return runs.write_text(path, "".join(f"{first} {second}\n" for first, second in pairs))


def export_features(photographs: Photographs, path: Path) -> Path:
    """Writes all local features as hloc's HDF5 (`features.export_hloc`) and returns the path.

    Keypoints are pixels of the photographs as stored, before the EXIF orientation is applied, as
    hloc and COLMAP read them.
    """
    return export_hloc(_StoredFeatures(photographs), path, suffix="")


@dataclass(frozen=True, eq=False)
class _StoredFeatures(Mapping[str, LocalFeatures]):
    """The features of a folder in pixels of the photographs as stored, read one by one."""

    photographs: Photographs

    def __getitem__(self, name: str) -> LocalFeatures:
        description = self.photographs.describer.describe(self.photographs.path(name))
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
