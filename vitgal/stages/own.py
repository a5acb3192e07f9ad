"""Search in a folder of one's own photographs, without labels.

Descriptions are stored under the sha256 of the photograph's file, so that a renamed or moved
photograph is not described again:

    <run>/own/<fingerprint of the settings>/settings.json    what the descriptions depend on
    <run>/own/<fingerprint of the settings>/ab/abcd….npz      one photograph, or a box of it

All coordinates are pixels of the upright photograph, turned by its EXIF orientation.
"""

import bisect
import functools
import itertools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.images import PATCH, crop_box, resize
from vitgal.data.photographs import (
    PhotographError,
    end_note,
    file_digest,
    find_photograph,
    list_photographs,
    read_oriented,
    size_note,
)
from vitgal.features import store
from vitgal.features.files import read_arrays
from vitgal.features.interchange import export_hloc
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import Frame
from vitgal.models import describers as networks, inference
from vitgal.models.descriptors import describe, local_features, require_codes
from vitgal.models.local_extractors import LocalExtractor, extractor_inputs, make_extractor
from vitgal.retrieval.evidence import Evidence, weigh
from vitgal.retrieval.exact_search import search
from vitgal.retrieval.presence import Presence
from vitgal.retrieval.ranking import fused_scores
from vitgal.retrieval.verification import PairInspection, inspect_shortlist
from vitgal.settings import (
    GlobalSettings,
    LocalSettings,
    MachineSettings,
    RerankingSettings,
    SelectionSettings,
    SettingsError,
)

SUGGESTIONS = 3  # names in an error


@dataclass(frozen=True, eq=False)
class Description:
    """The description of one photograph, or of a box in it.

    file: where it is stored. descriptor: (D,) float32, the global descriptor, of length 1.
    orientation: by EXIF, 1 to 8.
    """

    file: Path
    descriptor: np.ndarray
    features: LocalFeatures
    orientation: int


@dataclass(eq=False)
class Describer:
    """Describes photographs with one model and keeps the descriptions in the run's folder.

    The model is loaded when the first new photograph is described. Each model and each choice of
    settings has its own folder, which is never deleted. The descriptors of local features
    are always stored as float16.

    model: as for `open_model`. machine: device and threads of the network; where matching runs.
    extracted: number of descriptions that were computed, not read. local_model: of local features
    that are tokens, a weight file with autoencoder; None: `model`.
    """

    run: Path
    model: Path | str
    global_settings: GlobalSettings = GlobalSettings()
    local_settings: LocalSettings = LocalSettings()
    machine: MachineSettings = MachineSettings()
    extracted: int = 0
    local_model: Path | str | None = None

    @functools.cached_property
    def describing(self) -> GlobalSettings:
        """The settings of global descriptors, with the network's own size as a number."""
        return networks.sized(self.global_settings, self.model)

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """Everything that a description depends on, in plain values."""
        local, precision = self.local_settings, self._precision(self.global_settings)
        # Later options are added only if they are not the default, so that old folders stay valid.
        if local.local_features is not None:
            raise SettingsError(
                "local_features is for benchmarks; own photographs are described here: set local"
            )
        if not local.own_tokens:
            inputs = extractor_inputs(local).items()
            options = {"local": local.local, "max_keypoints": local.max_keypoints}
            options |= {f"local {name}": part.fingerprint() for name, part in inputs}
        else:
            options = {"scales": local.scales, "max_keypoints": local.max_keypoints}
            for field in fields(SelectionSettings):
                if getattr(local, field.name) != field.default:
                    options[field.name] = getattr(local, field.name)
            if self._precision(local) != precision:
                options["precision"] = self._precision(local)
            if self.local_model not in (None, self.model):
                options["local_weights"] = inference.weights_fingerprint(self.local_model)
        for name in ("multiple", "pooling"):
            if (value := getattr(self.describing, name)) is not None:
                options[f"global_{name}"] = value
        return runs.plain({
            "format": 1,
            "weights": inference.weights_fingerprint(self.model),
            "global_size": self.describing.size,
            "global_resize": self.describing.resize,
            "global_scales": self.describing.scales,
            "local_size": local.size,
            "precision": precision,
            "options": options,
        })  # fmt: skip

    def _precision(self, settings: GlobalSettings | LocalSettings) -> str:
        device = inference.pick_device(self.machine.device)
        return inference.resolve_precision(settings.precision, device)

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of the descriptions with these settings."""
        folder = self.run / "own" / runs.fingerprint(self.parameters)[:12]
        runs.refuse_links([folder.parent, folder])
        if not (folder / "settings.json").exists():
            runs.write_json(folder / "settings.json", self.parameters)
        return folder

    @functools.cached_property
    def network(self) -> networks.Describer:
        """The model of global descriptors in memory."""
        device = inference.pick_device(self.machine.device)
        return inference.open_model(self.model, device, pooling=self.global_settings.pooling)

    @functools.cached_property
    def local_network(self) -> networks.Describer:
        """The model of local features in memory; ValueError where it has no autoencoder."""
        network = self.network
        if self.local_model not in (None, self.model):
            network = inference.open_model(self.local_model, inference.device_of(network))
        require_codes(network)
        return network

    @functools.cached_property
    def extractor(self) -> LocalExtractor:
        """What finds local features in place of tokens."""
        return make_extractor(self.local_settings, self.machine.device)

    def describe(self, path: Path, box: Sequence[int] | None = None) -> Description:
        """Reads the description of a photograph or of a box in it, and computes a missing one.

        box: (x0, y0, x1, y1) in pixels of the upright photograph. Raises PhotographError where the
        photograph cannot be used, or the box does not fit it.
        """
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise PhotographError(f"{path.name}: no regular file, but a folder, pipe or device")
        digest = file_digest(path)
        name = digest if box is None else "-".join([digest, *(str(int(side)) for side in box)])
        file = self.folder / digest[:2] / f"{name}.npz"
        description = _read(file)
        if description is None:
            arrays = self._extract(path, box)
            if file_digest(path) != digest:
                raise PhotographError(f"{path.name}: it changed while it was read: run this again")
            runs.write_arrays(file, **arrays)
            self.extracted += 1
            description = _read(file)
        return description

    def _extract(self, path: Path, box: Sequence[int] | None) -> dict[str, np.ndarray]:
        """Returns a description's arrays: its descriptor, encoded features and sizes."""
        image, orientation = read_oriented(path)
        try:
            crop, crop_frame = crop_box(image, box)
        except ValueError as error:
            raise PhotographError(f"{path.name}: {error}") from None
        if min(crop.shape[:2]) < PATCH:
            raise PhotographError(
                f"{path.name}: a box of {crop.shape[1]} x {crop.shape[0]} pixels is less "
                f"than one patch of {PATCH} x {PATCH}: draw a larger one"
            )
        with inference.limited_threads(self.machine.threads):
            descriptor, features = self._compute(crop, (crop_frame, image.shape[:2]))
        sizes = np.array([*features.sizes, orientation])
        arrays = store.encode_features(features, "float16")
        return {"descriptor": descriptor} | arrays | {"sizes": sizes}

    def _compute(self, crop: np.ndarray, frame: Frame) -> tuple[np.ndarray, LocalFeatures]:
        """Returns the global descriptor (D,) and the local features of a crop (h, w, 3) uint8."""
        settings, local = self.describing, self.local_settings
        local_network = self.local_network if local.own_tokens else None
        whole = resize(crop, settings.size, settings.resize, settings.multiple)[None]
        with inference.inference(self.network, self._precision(settings)):
            (descriptor,) = describe(self.network, whole, settings.scales)
        whole = resize(crop, local.size, "area", getattr(local_network, "multiple", None))
        if local_network is None:
            return descriptor, self.extractor.extract([whole], [frame])[0]
        whole = inference.network_input(whole[None], inference.device_of(local_network))
        with inference.inference(local_network, self._precision(local)):
            (features,) = local_features(local_network, whole, [frame], local)
        return descriptor, features


def _read(file: Path) -> Description | None:
    try:
        arrays = read_arrays(file, ("descriptor", *store.FEATURE_ARRAYS, "sizes"))
    except (OSError, ValueError):
        return None
    stored = store.ShardFormat("float16", sum(arrays["descriptors"].shape[1:]))
    layout = stored.layout(arrays["scores"].size, 0) | {
        "descriptor": (np.dtype(np.float32), (arrays["descriptor"].size,)),
        "sizes": (np.dtype(np.int64), (9,)),
    }
    if any((array.dtype, array.shape) != layout[name] for name, array in arrays.items()):
        return None
    sizes = arrays["sizes"].tolist()
    features = store.decode_features(arrays, sizes, stored.dtype, stored.code_dim)
    return Description(file, arrays["descriptor"], features, orientation=sizes[8])


@dataclass(frozen=True, eq=False)
class Photographs:
    """A described folder, to which all names are relative.

    Attributes:
        names: the N photographs that can be searched, sorted.
        files: the descriptions of these on disk.
        descriptors: (N, D) float32, their global descriptors.
        left_out: photographs that cannot be searched, each with the reason.
        notes: photographs of unusual shape or size, each with a warning.
        other_files: number of files that are no photographs.
        extracted: number of photographs that were described anew.
    """

    folder: Path
    describer: Describer
    names: list[str]
    files: list[Path]
    descriptors: np.ndarray
    left_out: dict[str, str]
    notes: dict[str, str]
    other_files: int
    extracted: int

    def path(self, name: str) -> Path:
        """Returns a photograph's file."""
        return self.folder / name

    def description(self, name: str) -> Description:
        """Reads a photograph's description, also where its file has changed or vanished since."""
        stored = _read(self.files[bisect.bisect_left(self.names, name)])
        return stored or self.describer.describe(self.path(name))

    def features(self, name: str) -> LocalFeatures:
        """Reads a photograph's local features."""
        return self.description(name).features

    def report(self) -> str:
        """Returns the counts, the photographs left out and the notes, a line each."""
        lines = [
            f"{len(self.names)} photographs described, {self.other_files} other files passed over"
        ]
        for title, texts in (("left out", self.left_out), ("note", self.notes)):
            for name, text in sorted(texts.items()):
                lines.append(f"{title}: {runs.printable(name)}: {runs.printable(text)}")
        return "\n".join(lines)


def describe_folder(folder: Path, describer: Describer, *, progress: bool = True) -> Photographs:
    """Describes every photograph of a folder that has no description yet; a killed run goes on.

    A photograph that cannot be used is left out and named with the reason. Raises PhotographError
    where none can be used, StageError where another process describes with the same settings.
    """
    listing = list_photographs(folder)
    extracted_before = describer.extracted
    described: dict[str, Description] = {}
    left_out, notes = dict(listing.unsupported), {}
    runs.refuse_links([describer.folder.parent])
    with runs.locked(describer.folder):
        for name in tqdm(listing.names, desc="describing", unit="image", disable=not progress):
            try:
                _refuse_undecodable(name)
                description = describer.describe(listing.folder / name)
            except PhotographError as error:
                left_out[name] = str(error).removeprefix(f"{Path(name).name}: ")
                continue
            described[name] = description
            remarks = (size_note(*description.features.image_size), end_note(folder / name))
            if note := "; ".join(filter(None, remarks)):
                notes[name] = note
    if not described:
        first = next(iter(left_out))
        raise PhotographError(
            f"none of the {len(left_out)} photographs in {folder} can be used; "
            f"{runs.printable(first)}: {left_out[first]}"
        )
    return Photographs(
        folder=listing.folder,
        describer=describer,
        names=list(described),
        files=[description.file for description in described.values()],
        descriptors=np.stack([description.descriptor for description in described.values()]),
        left_out=left_out,
        notes=notes,
        other_files=listing.other_files,
        extracted=describer.extracted - extracted_before,
    )


def _refuse_undecodable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PhotographError("its name is no UTF-8: rename it") from None


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The ranking of a folder for one query, or for a box (x0, y0, x1, y1) in pixels of it.

    query, path, description: printable name, file and description of the query. table: one row a
    photograph without the query, in the final order: `photograph`, `rank` and `global_rank` from 1,
    `similarity`, and for the short list `matches`, `inliers`, `evidence` (missing beyond it), the
    last 0 where the homography is implausible; with `presence` also `probability`, that of showing
    the query's place.
    """

    photographs: Photographs
    query: str
    path: Path
    box: tuple[int, ...] | None
    description: Description
    table: pd.DataFrame
    settings: RerankingSettings
    presence: Presence | None = None

    def verdict(self) -> str:
        """States whether any photograph shows the query's place, with which probability."""
        if self.presence is None:
            return (
                "how probable it is that any of these shows it is unknown for these settings: "
                "fit a model by stages.fit_places to a folder with one sub-folder per place"
            )
        return self.presence.sentence(float(self.table["probability"].max()))

    def pair(self, name: str) -> tuple[LocalFeatures, PairInspection]:
        """Returns a photograph's local features, and its matches with the query."""
        (pair,) = _inspect(self.photographs, self.description, [name], self.settings)
        return self.photographs.features(name), pair


def find_query(photographs: Photographs, query: str) -> tuple[str, Path]:
    """Returns name and file of a query: a photograph of the folder, or any file by its path.

    `find_photograph` states the order; here a relative path counts from the checkout. Of a file
    outside the folder the name is the last part of its path. Raises PhotographError for a query
    that does not exist, is ambiguous or was left out.
    """
    folder, left_out = photographs.folder, photographs.left_out
    path = find_photograph(folder, query, runs.checkout())
    if path is None:
        stem = _composed(Path(query).stem)
        close = [name for name in photographs.names if stem and stem in _composed(name)]
        hint = (
            f"do you mean {' or '.join(close[:SUGGESTIONS])}?"
            if close
            else f"one is {photographs.names[0]}"
        )
        raise PhotographError(f"there is no query {query} in {folder}; {hint}")
    listed = dict.fromkeys((*photographs.names, *left_out))
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None
    if name not in listed:  # perhaps a link to one of them
        name = next((name for name in listed if _same(folder / name, path)), None)
    if name in left_out:
        raise PhotographError(f"the query {name}: {left_out[name]}")
    return name or path.name, path


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name.lower())


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # the file has vanished
        return False


def search_folder(
    photographs: Photographs,
    query: str,
    box: Sequence[float] | None,
    settings: RerankingSettings,
    presence: Presence | None = None,
) -> SearchResult:
    """Ranks a folder for one photograph, or a box in it, and reranks the first.

    Args:
        query: see `find_query`; the query is not among its own results.
        box: (x0, y0, x1, y1) in pixels of the upright photograph; None: all of it.
        settings: the first `top` photographs are matched, verified and sorted by their count or,
            with the order "fused", by `fused_scores`; equal ones by similarity.
        presence: gives these their probabilities; None: none, see `known_presence`.
    Raises:
        PhotographError: the query does not exist or cannot be used, or nothing else is there.
    """
    name, path = find_query(photographs, query)
    if name not in photographs.names:
        print(f"the query is {runs.printable(path)}, which is none of the photographs")
    try:
        box = None if box is None else tuple(int(side) for side in box)
    except (ValueError, OverflowError):  # nan or infinity
        raise PhotographError(f"a box is four finite numbers, not {runs.short(box)}") from None
    description = photographs.describer.describe(path, box)
    others = [
        index
        for index, other in enumerate(photographs.names)
        if not _same(photographs.path(other), path)
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
    evidence = _weigh(photographs, description, names[: settings.top], settings)
    table = _rerank(table, list(evidence), settings)
    if presence is not None:
        verified = table["matches"].notna()
        counts = table.loc[verified, "evidence"].to_numpy(np.int64)
        values = presence.probabilities(table.loc[verified, "similarity"], counts)
        table["probability"] = pd.Series(values, table.index[verified])
    label = runs.printable(name)
    return SearchResult(photographs, label, path, box, description, table, settings, presence)


def _inspect(
    photographs: Photographs,
    query: Description,
    names: Sequence[str],
    settings: RerankingSettings,
) -> Iterator[PairInspection]:
    features = map(photographs.features, names)
    device = photographs.describer.machine.match_device
    return inspect_shortlist(query.features, features, settings, device=device)


def _weigh(
    photographs: Photographs,
    query: Description,
    names: Sequence[str],
    settings: RerankingSettings,
) -> Iterator[Evidence]:
    """Weighs the evidence of the query and each of the named photographs."""
    features, compared = itertools.tee(map(photographs.features, names))
    device = photographs.describer.machine.match_device
    pairs = inspect_shortlist(query.features, compared, settings, device=device)
    for pair, database in zip(pairs, features, strict=True):
        yield weigh(query.features, database, pair)


def _rerank(
    table: pd.DataFrame, evidence: Sequence[Evidence], settings: RerankingSettings
) -> pd.DataFrame:
    """Adds the counts of the first rows, and sorts these as the settings say."""
    columns = {
        "matches": [pair.matches for pair in evidence],
        "inliers": [pair.inliers for pair in evidence],
        "evidence": [pair.believed(settings.count) for pair in evidence],
    }
    scores = np.array([pair.count(settings.count) for pair in evidence])
    if settings.order == "fused":
        similarities = table["similarity"].to_numpy()[: len(evidence)]
        scores = fused_scores(
            similarities, columns["evidence"], settings.fused_weight, settings.fused_cap
        )
    missing = [pd.NA] * (len(table) - len(evidence))
    for column, values in columns.items():
        table[column] = pd.array([*values, *missing], "Int64")
    order = np.argsort(-scores, kind="stable")
    order = np.concatenate([order, np.arange(len(evidence), len(table))])
    table = table.iloc[order].reset_index(drop=True)
    table.insert(1, "rank", np.arange(1, len(table) + 1))
    return table


def write_ranking(result: SearchResult, path: Path) -> Path:
    """Writes a ranking as .csv, numbers with six digits, and its verdict beside it as verdict.txt.

    Returns the path of the ranking.
    A name that a spreadsheet would run as a formula, as `=x.jpg`, is written as `./=x.jpg`.
    """
    names = result.table["photograph"].str.replace(r"^(?=[=+\-@\t\r＝＋－＠])", "./", regex=True)
    table = result.table.assign(photograph=names)
    runs.write_text(path.with_name("verdict.txt"), f"{result.verdict()}\n")
    return runs.write_text(path, table.to_csv(index=False, float_format="%.6f"))


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
