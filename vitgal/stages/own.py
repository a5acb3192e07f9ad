"""Your own photographs: a folder and no labels; what looks like one of them, and by which patches.

A photograph is described once: its global descriptor and its local features are kept under the
sha256 of the file's bytes, so that adding, renaming and moving photographs costs what is new alone.

    <run>/own/<settings>/settings.json        what the descriptions depend on
    <run>/own/<settings>/ab/abcd….npz         one photograph, or a box of it

Photographs stand upright here, turned by their EXIF tag as every viewer shows them: boxes and
keypoints are pixels of the upright photograph. `export_features` gives them back as stored.
"""

import functools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.images import PATCH, crop_box
from vitgal.data.photographs import (
    SHOWN,
    PhotographError,
    _digest,
    _orientation,
    _unread,
    list_photographs,
    read_upright,
    remark,
)
from vitgal.features import interchange, store
from vitgal.features.local import LocalFeatures
from vitgal.models import descriptors as models_descriptors
from vitgal.models import inference, local_features
from vitgal.retrieval import exact_search
from vitgal.retrieval.pairs import PairInspection, inspect_shortlist


@dataclass(frozen=True, eq=False)
class Described:
    """One photograph, or a box of it, as the network sees it.

    digest: the sha256 of the file's bytes. descriptor: (D,) float32, of length 1. features: its
    local features. orientation: the EXIF tag, 1 to 8.
    """

    digest: str
    descriptor: np.ndarray
    features: LocalFeatures
    orientation: int


@dataclass(eq=False)
class Describer:
    """Describes photographs with one model and keeps what it finds; loads the model when it must.

    run: the run's folder. model: a weight file with autoencoder, or "untrained:<architecture>".
    global_size, global_resize, global_scales: of `extraction.extract_global`; local_size, options:
    of `extract_local`; precision of both. extracted: how many were computed so far, the others were
    there. Another model or setting gets another folder; none is ever thrown away.
    """

    run: Path
    model: Path | str
    global_size: int = 512
    global_resize: str = "squash"
    global_scales: Sequence[float] = (1.0,)
    local_size: int = 512
    precision: str = "fp32"
    seed: int = 0
    threads: int | None = None
    device: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    extracted: int = 0

    @functools.cached_property
    def settings(self) -> dict:
        """What a description depends on, in plain values."""
        names = ("global_size", "global_resize", "global_scales", "local_size", "precision")
        weights = inference.weights_fingerprint(self.model, seed=self.seed)
        chosen = {name: getattr(self, name) for name in (*names, "options")}
        return runs.plain({"format": 1, "weights": weights} | chosen)

    @functools.cached_property
    def folder(self) -> Path:
        """Where descriptions with these settings are kept."""
        folder = self.run / "own" / runs.fingerprint(self.settings)[:12]
        if not (folder / "settings.json").exists():
            runs.write_json(folder / "settings.json", self.settings)
        return folder

    @functools.cached_property
    def network(self) -> Any:
        """The model; ValueError where it has no autoencoder."""
        place = inference.pick_device(self.device)
        network = inference.open_model(self.model, place, seed=self.seed)
        local_features.require_codes(network)
        return network

    def describe(self, path: Path, box: Sequence[int] | None = None) -> Described:
        """A photograph's description, or that of a box (x0, y0, x1, y1) in it, computed once.

        Raises PhotographError for a photograph that cannot be used and a box that does not fit.
        """
        digest = _digest(path)
        name = digest if box is None else "-".join([digest, *(str(int(side)) for side in box)])
        file = self.folder / digest[:2] / f"{name}.npz"
        found = _read_description(file, digest)
        if found is None:
            self._extract(path, box, file)
            self.extracted += 1
            found = _read_description(file, digest)
        return found

    def _extract(self, path: Path, box: Sequence[int] | None, file: Path) -> None:
        image = read_upright(path)
        try:
            crop = crop_box(image, box)[0]
        except ValueError as error:
            raise PhotographError(f"{Path(path).name}: {error}") from None
        if min(crop.shape[:2]) < PATCH:
            raise PhotographError(
                f"{Path(path).name}: a box of {crop.shape[1]} x {crop.shape[0]} pixels is less "
                f"than one patch of {PATCH} x {PATCH}: draw a larger one"
            )
        seen = {"size": self.global_size, "resize": self.global_resize}
        seen |= {"scales": self.global_scales, "precision": self.precision}
        with inference.limited_threads(self.threads):
            whole = models_descriptors.extract_global(self.network, [crop], **seen)
            features = models_descriptors.extract_local(
                *(self.network, image, box),
                size=self.local_size,
                precision=self.precision,
                **self.options,
            )
        _write_description(file, whole[0], features, _orientation(path))


def _write_description(
    file: Path, descriptor: np.ndarray, features: LocalFeatures, orientation: int
) -> None:
    runs.write_arrays(
        file,
        descriptor=descriptor,
        keypoints=features.keypoints,
        descriptors=store.encode(features.descriptors, "float16"),
        scores=features.scores,
        scales=features.scales,
        sizes=np.array([*features.input_size, *features.box, *features.image_size, orientation]),
    )


def _read_description(file: Path, digest: str) -> Described | None:
    """A description that is kept; None where there is none, or one that its checksums refute."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, ValueError):
        return None
    sizes = [int(value) for value in found["sizes"]]
    codes = found["descriptors"]
    features = LocalFeatures(
        keypoints=found["keypoints"],
        descriptors=store.decode(codes, "float16", codes.shape[1]),
        scores=found["scores"],
        scales=found["scales"],
        input_size=tuple(sizes[:2]),
        box=tuple(sizes[2:6]),
        image_size=tuple(sizes[6:8]),
    )
    return Described(digest, found["descriptor"], features, sizes[8])


@dataclass(frozen=True, eq=False)
class Photographs:
    """A described folder.

    names: the photographs that could be used, sorted; descriptors: (N, D) float32, a row each.
    left_out: name -> why it could not be used. remarks: name -> what to know of it. others: files
    that are no photographs. extracted: how many were described anew.
    """

    folder: Path
    describer: Describer
    names: list[str]
    descriptors: np.ndarray
    left_out: dict[str, str]
    remarks: dict[str, str]
    others: int
    extracted: int

    def path(self, name: str) -> Path:
        """A photograph's file."""
        return self.folder / name

    def features(self, name: str) -> LocalFeatures:
        """A photograph's local features, as they are kept."""
        return self.describer.describe(self.path(name)).features

    def report(self) -> str:
        """What was found, in a few lines: counts, what was left out, what to know."""
        lines = [f"{len(self.names)} photographs described, {self.others} other files passed over"]
        for title, texts in (("left out", self.left_out), ("note", self.remarks)):
            lines += [f"{title}: {name}: {text}" for name, text in sorted(texts.items())]
        return "\n".join(lines)


def describe_folder(folder: Path, describer: Describer, *, progress: bool = True) -> Photographs:
    """Describes every photograph of a folder that was not described before.

    One that cannot be used is left out and named with its reason. Killed and run again, it goes on
    where it stopped. Raises PhotographError where no photograph can be used, StageError where
    another process describes with the same settings.
    """
    listing = list_photographs(folder)
    before, rows, names = describer.extracted, [], []
    left_out = {name: _unread(name) for name in listing.unread}
    remarks = {}
    with runs.locked(describer.folder):
        for name in tqdm(listing.names, desc="describing", unit="image", disable=not progress):
            try:
                found = describer.describe(listing.folder / name)
            except PhotographError as error:
                left_out[name] = str(error).removeprefix(f"{Path(name).name}: ")
                continue
            names.append(name)
            rows.append(found.descriptor)
            if text := remark(*found.features.image_size):
                remarks[name] = text
    if not names:
        first = next(iter(left_out))
        raise PhotographError(
            f"none of the {len(left_out)} photographs in {folder} can be used; {first}: "
            f"{left_out[first]}"
        )
    new = describer.extracted - before
    return Photographs(
        *(listing.folder, describer, names, np.stack(rows), left_out, remarks),
        *(listing.others, new),
    )


@dataclass(frozen=True, eq=False)
class Found:
    """A query's ranking of a folder.

    query: its name; path: its file; box: what of it was searched with, None: all. described: the
    query. table: one row a photograph but the query itself, in the final order, with `photograph`,
    `rank` and `global_rank` from 1 on, `similarity`, and for the short list `matches` and
    `inliers` (missing beyond it). options: of matching and verification.
    """

    photographs: Photographs
    query: str
    path: Path
    box: tuple[int, ...] | None
    described: Described
    table: pd.DataFrame
    options: dict[str, Any]

    def pair(self, name: str) -> tuple[LocalFeatures, PairInspection]:
        """A photograph's local features, and its matches with the query."""
        features = self.photographs.features(name)
        pairs = inspect_shortlist(self.described.features, [features], **self.options)
        return features, next(pairs)


def find_query(photographs: Photographs, query: str) -> tuple[str, Path]:
    """A query's name and file: a photograph of the folder, or any file by its path.

    Raises PhotographError for one that is neither, with names that are close.
    """
    inside = photographs.folder / query
    for path in (inside, runs.resolve(query)):
        if path.is_file():
            name = _name(path, photographs.folder)
            if name in photographs.left_out:
                raise PhotographError(f"the query {name}: {photographs.left_out[name]}")
            return name, path
    stem = Path(query).stem.lower()
    close = [name for name in photographs.names if stem and stem in name.lower()][:SHOWN]
    hint = f"do you mean {' or '.join(close)}?" if close else f"one is {photographs.names[0]}"
    raise PhotographError(f"there is no query {query} in {photographs.folder}; {hint}")


def _name(path: Path, folder: Path) -> str:
    """A file's name below the folder, outside it its own."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def search_folder(
    photographs: Photographs,
    query: str,
    box: Sequence[float] | None = None,
    *,
    top: int = 100,
    **options: Any,
) -> Found:
    """Ranks a folder for one photograph, or for a box in it, and reranks the first.

    Args:
        query: see `find_query`. It is not among its own results.
        box: (x0, y0, x1, y1) in pixels of the upright photograph.
        top: photographs whose local features are compared with the query's: they change places
            among themselves by falling inlier count, equal counts by similarity.
        options: `inspect_shortlist`'s: max_distance, max_keypoints, estimator, threshold, ….
    Raises:
        PhotographError: there is no such query, it cannot be used, or there is nothing beside it.
    """
    name, path = find_query(photographs, query)
    box = None if box is None else tuple(int(side) for side in box)
    described = photographs.describer.describe(path, box)
    files = [photographs.path(other) for other in photographs.names]
    others = [place for place, file in enumerate(files) if not file.samefile(path)]
    if not others:
        raise PhotographError(f"{photographs.folder} holds nothing but the query: add photographs")
    similarities, ranks = exact_search.search(
        described.descriptor[None], photographs.descriptors[others], k=len(others)
    )
    names = [photographs.names[others[rank]] for rank in ranks[:, 0]]
    table = pd.DataFrame({"photograph": names, "similarity": similarities[:, 0]})
    table.insert(1, "global_rank", np.arange(1, len(names) + 1))
    counts = _verify(photographs, described.features, names[:top], options)
    return Found(photographs, name, path, box, described, _reranked(table, counts), options)


def _verify(
    photographs: Photographs, query: LocalFeatures, names: Sequence[str], options: dict
) -> np.ndarray:
    """Matches and inliers (n, 2) of the query with the first photographs of its ranking."""
    features = map(photographs.features, names)
    pairs = inspect_shortlist(query, features, **options)
    counts = [(len(pair.matches), pair.verification.count) for pair in pairs]
    return np.array(counts, np.int64).reshape(-1, 2)


def _reranked(table: pd.DataFrame, counts: np.ndarray) -> pd.DataFrame:
    """The table with the counts, the verified rows first by falling number of inliers."""
    blank = [pd.NA] * (len(table) - len(counts))
    for column, values in zip(("matches", "inliers"), counts.T, strict=True):
        table[column] = pd.array([*values.tolist(), *blank], "Int64")
    order = np.argsort(-counts[:, 1], kind="stable")
    order = np.concatenate([order, np.arange(len(counts), len(table))])
    table = table.iloc[order].reset_index(drop=True)
    table.insert(1, "rank", np.arange(1, len(table) + 1))
    return table


def write_ranking(found: Found, path: Path) -> Path:
    """Writes a ranking as a .csv, similarities with six digits, and returns its path."""
    return runs.write_text(path, found.table.to_csv(index=False, float_format="%.6f"))


def retrieval_pairs(photographs: Photographs, count: int = 20) -> list[tuple[str, str]]:
    """Pairs worth matching: every photograph with the `count` most similar ones, each pair once.

    By the global descriptors alone, as hloc's pairs_from_retrieval does. The first name of a pair
    is the lower one; pairs are sorted. One photograph, or count 0: no pair.
    """
    number = min(count, len(photographs.names) - 1)
    if number < 1:
        return []
    rows = photographs.descriptors
    ranks = exact_search.search(rows, rows, k=number + 1)[1]
    pairs = set()
    for place, column in enumerate(ranks.T):
        others = [other for other in column.tolist() if other != place][:number]
        pairs |= {tuple(sorted((place, other))) for other in others}
    return [tuple(photographs.names[place] for place in pair) for pair in sorted(pairs)]


def export_pairs(pairs: Sequence[tuple[str, str]], path: Path) -> Path:
    """Writes `name name` a line, as hloc and COLMAP's matches_importer read it; returns the path.

    Names are relative to the folder, which is their image path. Raises PhotographError for a name
    with a blank, at which both would cut it.
    """
    for name in sorted({name for pair in pairs for name in pair}):
        if any(letter.isspace() for letter in name):
            raise PhotographError(
                f"{name!r} has a blank in it, and hloc and COLMAP end a name there: rename it"
            )
    return runs.write_text(path, "".join(f"{one} {other}\n" for one, other in pairs))


def export_features(photographs: Photographs, path: Path) -> Path:
    """Writes all local features as hloc's HDF5 (`store.export_hloc`); returns the path.

    Keypoints are in pixels of the photograph as stored, not turned, as hloc and COLMAP read it.
    """
    return interchange.export_hloc(_Stored(photographs), path, suffix="")


@dataclass(frozen=True, eq=False)
class _Stored(Mapping[str, LocalFeatures]):
    """All features of a folder in the pixels of the stored photographs, read one by one."""

    photographs: Photographs

    def __getitem__(self, name: str) -> LocalFeatures:
        found = self.photographs.describer.describe(self.photographs.path(name))
        return as_stored(found.features, found.orientation)

    def __iter__(self) -> Iterator[str]:
        return iter(self.photographs.names)

    def __len__(self) -> int:
        return len(self.photographs.names)


def as_stored(features: LocalFeatures, orientation: int) -> LocalFeatures:
    """Features of a whole upright photograph as features of the photograph as it is stored.

    orientation: the EXIF tag: 2 to 4 mirror or turn by 180 degrees, 5 to 8 exchange the sides.
    """
    height, width = features.input_size
    x, y = features.keypoints.T
    # Where the upright photograph's x and y point to in the stored one (EXIF 2.3, 4.6.4)
    places = {
        1: (x, y),
        2: (width - x, y),
        3: (width - x, height - y),
        4: (x, height - y),
        5: (y, x),
        6: (y, width - x),
        7: (height - y, width - x),
        8: (height - y, x),
    }[orientation]
    points = np.stack(places, axis=1).astype(np.float32)
    if orientation <= 4:
        return replace(features, keypoints=points)
    return replace(
        features,
        keypoints=points,
        input_size=features.input_size[::-1],
        box=tuple(features.box[place] for place in (1, 0, 3, 2)),
        image_size=features.image_size[::-1],
    )
