"""Search in a folder of one's own photographs, without labels."""

import bisect
import functools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.photographs import (
    PhotographError,
    find_photograph,
    list_photographs,
    size_note,
)
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.exact_search import search
from vitgal.retrieval.presence import Presence
from vitgal.retrieval.ranking import fused_scores
from vitgal.retrieval.verification import PairInspection, inspect_pair
from vitgal.settings import RerankingSettings
from vitgal.stages.own_describer import Describer, Description, Glance, read_description
from vitgal.stages.verified_pairs import VerifiedPairs

SUGGESTIONS = 3  # names in an error


@dataclass(frozen=True, eq=False)
class Photographs:
    """A described folder, to which all names are relative."""

    folder: Path
    describer: Describer
    names: list[str]  # the N photographs that can be searched, sorted
    files: list[Path]  # their descriptions on disk
    descriptors: np.ndarray  # (N, D) float32, their global descriptors
    sizes: np.ndarray  # (N, 2) int, height and width in pixels, upright
    left_out: dict[str, str]  # photographs that cannot be searched -> the reason
    notes: dict[str, str]  # photographs of unusual shape or size -> a warning
    other_files: int  # number of files that are no photographs
    extracted: int  # number of photographs that were described anew

    def path(self, name: str) -> Path:
        """Returns a photograph's file."""
        return self.folder / name

    def index(self, name: str) -> int:
        """Returns a photograph's index among the names."""
        return bisect.bisect_left(self.names, name)

    def description(self, name: str) -> Description:
        """Reads a photograph's description, also where its file has changed or vanished since."""
        stored = read_description(self.files[self.index(name)])
        return stored or self.describer.describe(self.path(name))

    @functools.cached_property
    def _identities(self) -> list[tuple[int, int] | None]:
        return [_identity(self.path(name)) for name in self.names]

    def others(self, path: Path) -> np.ndarray:
        """Returns (N,) bool: which photographs are not this file under any of its names."""
        identity = _identity(path)
        return np.array([identity is None or other != identity for other in self._identities])

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


def describe_folder(folder: Path, describer: Describer) -> Photographs:
    """Describes every photograph of a folder that has no description yet; a killed run goes on.

    Unchanged files are not read again. A photograph that cannot be used is left out and named with
    the reason, and the run's own files are passed over. In memory are the global descriptors and
    one photograph. Raises PhotographError where none can be used, StageError where another process
    describes with the same settings.
    """
    listing = list_photographs(folder, without=(describer.run, describer.run / "own"))
    runs.refuse_links([describer.folder.parent])
    extracted_before = describer.extracted
    left_out = dict(listing.unsupported)
    glances: dict[str, Glance] = {}

    def look(names: Sequence[str], task: str, new: bool) -> Iterator[str]:
        """Looks for descriptions, and makes them with `new`; yields names without one."""
        for name in tqdm(names, desc=task, unit="image") if names else ():
            path = listing.folder / name
            try:
                name.encode()
                if new:
                    describer.describe(path)
                if glance := describer.glance(path):
                    glances[name] = glance
                else:
                    yield name
            except UnicodeEncodeError:
                left_out[name] = "its name is no UTF-8: rename it"
            except PhotographError as error:
                left_out[name] = str(error).removeprefix(f"{Path(name).name}: ")

    with runs.locked(describer.folder):
        try:
            missing = list(look(listing.names, "looking", False))
            missing = list(look(missing, "describing", True))
        finally:
            describer.known_files.save()
    left_out |= dict.fromkeys(missing, "it changed while it was read: run this again")
    if not glances:
        first = next(iter(left_out))
        raise PhotographError(
            f"none of the {len(left_out)} photographs in {listing.folder} can be used; "
            f"{runs.printable(first)}: {left_out[first]}"
        )
    glances = {name: glances[name] for name in listing.names if name in glances}
    notes = {name: _note(glance) for name, glance in glances.items()}
    return Photographs(
        folder=listing.folder,
        describer=describer,
        names=list(glances),
        files=[glance.file for glance in glances.values()],
        descriptors=np.stack([glance.descriptor for glance in glances.values()]),
        sizes=np.array([glance.image_size for glance in glances.values()]),
        left_out=left_out,
        notes={name: note for name, note in notes.items() if note},
        other_files=listing.other_files,
        extracted=describer.extracted - extracted_before,
    )


def _note(glance: Glance) -> str:
    return "; ".join(filter(None, (size_note(*glance.image_size), glance.note)))


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The ranking of a folder for one query, or for a box (x0, y0, x1, y1) in pixels of it.

    table: one row a photograph without the query, in the final order: `photograph`, `rank` and
    `global_rank` from 1, `similarity`, and for the short list `matches`, `inliers`, `evidence`
    (missing beyond it), the last 0 where the homography is implausible; with `presence` also
    `probability`, that of showing the query's place.
    """

    photographs: Photographs
    query: str  # its printable name
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
        features = self.photographs.features(name)
        device = self.photographs.describer.machine.match_device
        pair = inspect_pair(self.description.features, features, self.settings, device=device)
        return features, pair


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
        identity = _identity(path)
        name = next((name for name in listed if _identity(folder / name) == identity), None)
    if name in left_out:
        raise PhotographError(f"the query {name}: {left_out[name]}")
    return name or path.name, path


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # the file has vanished
        return None
    return status.st_dev, status.st_ino


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name.lower())


def search_folder(
    photographs: Photographs,
    query: str,
    box: Sequence[float] | None,
    settings: RerankingSettings,
    presence: Presence | None = None,
) -> SearchResult:
    """Ranks a folder for one photograph, or a box in it, and reranks the first.

    The first `top` photographs are matched, verified and sorted by their count or, with the order
    "fused", by `fused_scores`; equal ones by similarity.

    query: see `find_query`; it is not among its own results. box: (x0, y0, x1, y1) in pixels of the
    upright photograph; None: all of it. presence: gives probabilities, see `known_presence`. With
    it the order "fused" has the similarities to the mean of the query and of what shows it. Raises
    PhotographError where the query does not exist or cannot be used, or nothing else is there.
    """
    name, path = find_query(photographs, query)
    if name not in photographs.names:
        print(f"the query is {runs.printable(path)}, which is none of the photographs")
    return search_photograph(photographs, (name, path), box, settings, presence)


def search_photograph(
    photographs: Photographs,
    query: tuple[str, Path],
    box: Sequence[float] | None,
    settings: RerankingSettings,
    presence: Presence | None = None,
) -> SearchResult:
    """Does what `search_folder` does for a query that is known by name and file."""
    name, path = query
    try:
        box = None if box is None else tuple(int(side) for side in box)
    except (ValueError, OverflowError):  # nan or infinity
        raise PhotographError(f"a box is four finite numbers, not {runs.short(box)}") from None
    description = photographs.describer.describe(path, box)
    others = photographs.others(path)
    if not others.any():
        raise PhotographError(f"{photographs.folder} holds nothing but the query: add photographs")
    similarities, ranking = search(
        description.descriptor[None], photographs.descriptors, k=len(others)
    )
    kept = others[ranking[:, 0]]
    ranked, similarities = ranking[kept, 0].tolist(), similarities[kept, 0]
    names = [photographs.names[index] for index in ranked]
    table = pd.DataFrame({
        "photograph": names,
        "global_rank": np.arange(1, len(names) + 1),
        "similarity": similarities,
    })  # fmt: skip
    files = [photographs.files[index] for index in ranked[: settings.top]]
    pairs = VerifiedPairs(photographs.describer, settings)
    counts = pairs.counts(description, files, lambda index: photographs.features(names[index]))
    table = _rerank(table, counts, settings)
    if presence is not None:
        verified = table["matches"].notna()
        counts = table.loc[verified, "evidence"].to_numpy(np.int64)
        values = presence.probabilities(table.loc[verified, "similarity"], counts)
        table["probability"] = pd.Series(values, table.index[verified])
        if settings.order == "fused":
            table = _expand(photographs, description, table, settings, presence.threshold)
    label = runs.printable(name)
    return SearchResult(photographs, label, path, box, description, table, settings, presence)


def _rerank(table: pd.DataFrame, counts: np.ndarray, settings: RerankingSettings) -> pd.DataFrame:
    """Adds the counts (n, 4) of the first n rows, and sorts these as the settings say."""
    matches, inliers, features, plausible = counts.T
    scores = features if settings.count == "features" else inliers
    evidence = scores * plausible
    if settings.order == "fused":
        similarities = table["similarity"].to_numpy()[: len(counts)]
        scores = fused_scores(similarities, evidence, settings.fused_weight, settings.fused_cap)
    missing = [pd.NA] * (len(table) - len(counts))
    for column, values in (("matches", matches), ("inliers", inliers), ("evidence", evidence)):
        table[column] = pd.array([*values.tolist(), *missing], "Int64")
    order = np.argsort(-scores, kind="stable")
    order = np.concatenate([order, np.arange(len(counts), len(table))])
    table = table.iloc[order].reset_index(drop=True)
    table.insert(1, "rank", np.arange(1, len(table) + 1))
    return table


def _expand(
    photographs: Photographs,
    query: Description,
    table: pd.DataFrame,
    settings: RerankingSettings,
    threshold: float,
) -> pd.DataFrame:
    """Sorts by the similarity to the mean of the query and of what shows it, and by evidence.

    Where nothing reaches the threshold the order stays. Source: Chum et al., Total Recall, ICCV
    2007, average query expansion by verified results.
    """
    showing = (table["probability"] >= threshold).to_numpy()
    if not showing.any():
        return table
    indices = pd.Index(photographs.names).get_indexer(table["photograph"])
    rows = photographs.descriptors[indices]
    mean = query.descriptor + rows[showing].sum(axis=0)
    similarities = rows @ (mean / np.linalg.norm(mean))
    verified = table["evidence"].notna().to_numpy()
    evidence = table.loc[verified, "evidence"].to_numpy(np.int64)
    scores = similarities.astype(np.float64)
    scores[verified] = fused_scores(
        similarities[verified], evidence, settings.fused_weight, settings.fused_cap
    )
    table = table.iloc[np.argsort(-scores, kind="stable")].reset_index(drop=True)
    return table.assign(rank=np.arange(1, len(table) + 1))


def write_ranking(result: SearchResult, path: Path) -> Path:
    """Writes a ranking as .csv, numbers with six digits, and its verdict beside it as verdict.txt.

    Returns the path of the ranking.
    A name that a spreadsheet would run as a formula, as `=x.jpg`, is written as `./=x.jpg`.
    """
    table = result.table.assign(photograph=no_formulas(result.table["photograph"]))
    runs.write_text(path.with_name("verdict.txt"), f"{result.verdict()}\n")
    return runs.write_text(path, table.to_csv(index=False, float_format="%.6f"))


def no_formulas(names: pd.Series) -> pd.Series:
    """Returns names (N,) of which none begins as a formula does in a spreadsheet."""
    return names.str.replace(r"^(?=[=+\-@\t\r＝＋－＠])", "./", regex=True)
