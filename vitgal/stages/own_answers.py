"""Many queries in a folder of one's own photographs, and the places that it shows.

<run>/own/results.csv    query, rank, image, similarity, inliers, probability
<run>/own/places.csv     place, photograph, best, links, probability
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.photographs import PhotographError, list_photographs
from vitgal.retrieval.places import Place, group_places
from vitgal.retrieval.presence import Presence, PresenceError
from vitgal.settings import RerankingSettings
from vitgal.stages.own import Photographs, find_query, no_formulas, search_photograph

COLUMNS = ("query", "rank", "image", "similarity", "inliers", "probability")


@dataclass(frozen=True)
class NamedQuery:
    """A query by its name, which no other one has, and its file."""

    name: str
    path: Path
    box: tuple[int, ...] | None = None  # in pixels


@dataclass(frozen=True, eq=False)
class Answers:
    """The rankings of a folder for several queries, all with the same settings and presence.

    table: COLUMNS, the verified photographs of each query in their final order, in whose `rank`
    others count as well; `image` is a name in the folder, `probability` is missing where no model
    of presence is known. In addition `global_rank`, from 1.
    """

    photographs: Photographs
    queries: list[NamedQuery]  # those that could be answered
    verdicts: list[str]  # a sentence for each
    files: list[Path]  # where their descriptions are stored
    table: pd.DataFrame
    left_out: dict[str, str]  # queries that could not be searched for -> the reason
    settings: RerankingSettings
    presence: Presence | None


def named_queries(
    photographs: Photographs,
    queries: Sequence[str] = (),
    folder: Path | None = None,
    box: tuple[int, ...] | None = None,
) -> list[NamedQuery]:
    """Returns the queries that a user names; without any, every photograph of the folder.

    queries: as `find_query` takes them. folder: all photographs in it. box: of a single query.
    Raises PhotographError for a query that does not exist, for a folder without photographs, and
    for a box of several queries.
    """
    if not queries and folder is None:
        every = [NamedQuery(name, photographs.path(name)) for name in photographs.names]
    else:
        named = [find_query(photographs, query) for query in queries]
        if folder is not None:
            listing = list_photographs(folder)
            named += [(name, listing.folder / name) for name in listing.names]
        every = [NamedQuery(name, path, box) for name, path in dict.fromkeys(named)]
    if box is not None and len(every) != 1:
        raise PhotographError(f"a box belongs to one query, and there are {len(every)}")
    taken: set[str] = set()
    for index, query in enumerate(every):
        if query.name in taken:  # two files of one name: their paths differ
            every[index] = NamedQuery(str(query.path), query.path, box)
        taken.add(every[index].name)
    return every


def answer(
    photographs: Photographs,
    queries: Sequence[NamedQuery],
    settings: RerankingSettings,
    presence: Presence | None = None,
) -> Answers:
    """Searches the folder for each query; pairs that were verified once are not verified again.

    The first `top` photographs of each are in the answers. A query that cannot be read is left
    out and named; a stopped run loses at most one. Raises PhotographError where none can be read.
    """
    tables, verdicts, files, answered, left_out = [], [], [], [], {}
    for query in tqdm(queries, desc="searching", unit="query"):
        try:
            named = query.name, query.path
            result = search_photograph(photographs, named, query.box, settings, presence)
        except PhotographError as error:
            left_out[query.name] = str(error).removeprefix(f"{query.path.name}: ")
            continue
        table = result.table.dropna(subset="inliers")
        if presence is None:
            table = table.assign(probability=np.nan)
        table = table.rename(columns={"photograph": "image"}).assign(query=query.name)
        tables.append(table[[*COLUMNS, "global_rank"]])
        verdicts.append(result.verdict())
        files.append(result.description.file)
        answered.append(query)
    if not tables:
        name, reason = next(iter(left_out.items()))
        raise PhotographError(
            f"none of the {len(queries)} queries can be read; {runs.printable(name)}: {reason}"
        )
    table = pd.concat(tables, ignore_index=True)
    return Answers(photographs, answered, verdicts, files, table, left_out, settings, presence)


def write_answers(answers: Answers, path: Path) -> Path:
    """Writes COLUMNS as .csv, numbers with six digits; returns the path."""
    table = answers.table[list(COLUMNS)]
    table = table.assign(query=no_formulas(table["query"]), image=no_formulas(table["image"]))
    return runs.write_text(path, table.to_csv(index=False, float_format="%.6f"))


def find_places(answers: Answers) -> list[Place]:
    """Groups the folder into places; members are indices of its names.

    answers: of every photograph of the folder. A pair is a link where it was verified both ways and
    the lower of its two probabilities is not below the model's threshold; `group_places` has the
    rule. Raises PresenceError where no model of presence is known.
    """
    presence = require_presence(answers.presence)
    indices = pd.Series(range(len(answers.photographs.names)), answers.photographs.names)
    table = answers.table.dropna(subset="probability")
    table = table[table["probability"] >= presence.threshold]
    ends = np.column_stack([indices[table[name]].to_numpy() for name in ("query", "image")])
    both = pd.DataFrame({
        "low": ends.min(axis=1), "high": ends.max(axis=1), "probability": table["probability"]
    })  # fmt: skip
    both = both.groupby(["low", "high"])["probability"].agg(["size", "min"]).reset_index()
    both = both[both["size"] == 2]
    pairs = both[["low", "high"]].to_numpy(np.int64)
    return group_places(pairs, both["min"].to_numpy(), presence.threshold)


def require_presence(presence: Presence | None) -> Presence:
    """Returns a model of presence; PresenceError with the remedy where none is known."""
    if presence is None:
        raise PresenceError(
            "places need a probability, which is unknown for this model and these settings: take "
            "the default by a run without a model of its own (--output runs/own), or fit one by "
            "stages.fit_places to a folder with one sub-folder per place"
        )
    return presence


def write_places(photographs: Photographs, places: Sequence[Place], path: Path) -> Path:
    """Writes the photographs of all places as .csv, a line each; returns the path.

    `place` counts from 1, the largest first; `best` is 1 for one photograph of each; `links` is the
    number of the place's photographs that it was verified with, `probability` their mean one.
    """
    rows = [
        (number, photographs.names[image], int(image == place.members[0]), count, total / count)
        for number, place in enumerate(places, 1)
        for image, count, total in zip(place.members, place.links, place.support, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["place", "photograph", "best", "links", "probability"])
    if len(table):
        table["photograph"] = no_formulas(table["photograph"])
    return runs.write_text(path, table.to_csv(index=False, float_format="%.6f"))
