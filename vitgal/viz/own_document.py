"""Answers of one's own photographs as the JSON document that the front end draws."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vitgal.data.photographs import PhotographError
from vitgal.retrieval.places import Place
from vitgal.runs import printable
from vitgal.viz.run_document import MOST_MAPPED, Images, nearest_images, pair_documents

if TYPE_CHECKING:
    from vitgal.stages.own_answers import Answers, NamedQuery

MOST_QUERIES = 1000  # in a page: with 20 images each it has some 10 MB
RANKS = 20  # images of each ranking
PAIRS = 2  # of each query, with their matches
PROTOCOL = "medium"  # without labels there is one ranking; the front end asks it by this name


def own_document(
    answers: "Answers", places: Sequence[Place] | None = None
) -> tuple[dict[str, Any], Images]:
    """Describes answers and places as plain values, with one entry as `run_document` has it.

    There are no labels, scores or map; neighbours are those among the first MOST_MAPPED photographs
    of the rankings. The entry has `kind` "own" and in addition `threshold`, the least probability
    that counts as found, or None; `left_out`, [name, reason] of each query and photograph that
    could not be used; `places`, or None: for each `images`, the best first, and `links` and
    `probability` as in places.csv. A query has in addition `verdict`, a sentence.

    Returns:
        The document of the first MOST_QUERIES queries, and the images whose numbers it uses.
    """
    from tqdm.auto import tqdm

    photographs, entry = answers.photographs, _Entry(answers, Images(upright=True))
    groups = dict(list(answers.table.groupby("query", sort=False)))
    asked = list(zip(answers.queries, answers.files, answers.verdicts, strict=True))
    bar = tqdm(asked[:MOST_QUERIES], desc="matching pairs", unit="query")
    queries = [
        entry.query(query, file, groups[query.name]) | {"verdict": verdict}
        for query, file, verdict in bar
    ]
    scores = {PROTOCOL: dict.fromkeys(("map", "interval", "mp_at")) | {"ap": [None] * len(queries)}}
    left_out = answers.left_out | photographs.left_out
    described = {
        "kind": "own",
        "run": printable(photographs.describer.run.name),
        "dataset": printable(photographs.folder.name),
        "database": len(photographs.names),
        "settings": [[name, str(v)] for name, v in answers.settings.compared().items()],
        "scores": {"global": scores, "reranked": scores},
        "tests": {},
        "matching": None,
        "queries": queries,
        "map": None,
        "neighbours": entry.neighbours(),
        "threshold": None if answers.presence is None else answers.presence.threshold,
        "left_out": [[printable(name), printable(text)] for name, text in left_out.items()],
        "places": None if places is None else [entry.place(place) for place in places],
    }
    return entry.images.document([described]), entry.images


@dataclass(eq=False)
class _Entry:
    """The queries and places of a document, and the images that they mention."""

    answers: "Answers"
    images: Images

    def numbers(self, names: Iterable[str]) -> list[int]:
        """Returns the numbers of photographs of the folder."""
        photographs, images, numbers = self.answers.photographs, self.images, []
        for name in names:
            index = photographs.index(name)
            number = images.number(photographs.path(name), name, photographs.sizes[index])
            images.indices[number] = index
            numbers.append(number)
        return numbers

    def neighbours(self) -> dict[str, list[int]]:
        """Number of a photograph of the rankings -> those of nearest descriptor, best first."""
        indices = self.images.indices
        numbers = [n for n, index in enumerate(indices) if index is not None][:MOST_MAPPED]
        rows = self.answers.photographs.descriptors[[indices[n] for n in numbers]]
        found = nearest_images(rows, range(len(rows))) if len(rows) else []
        return {str(n): [numbers[i] for i in near] for n, near in zip(numbers, found, strict=True)}

    def place(self, place: Place) -> dict[str, Any]:
        """Returns a place's plain values."""
        return {
            "images": self.numbers(self.answers.photographs.names[i] for i in place.members),
            "links": place.links.tolist(),
            "probability": np.round(place.support / place.links, 4).tolist(),
        }

    def query(self, query: "NamedQuery", file: Path, table: pd.DataFrame) -> dict[str, Any]:
        """Returns the plain values of a query.

        file: its description; its photograph may have vanished since. table: its answers in their
        final order.
        """
        from vitgal.stages.own_describer import read_description

        before, after = table.sort_values("global_rank").head(RANKS), table.head(RANKS)
        description = read_description(file) or self.answers.photographs.describer.describe(
            query.path, query.box
        )
        number = self.images.number(query.path, query.name, description.features.image_size)
        verified = table[table["image"].isin([*before["image"], *after["image"]])]
        return {
            "image": number,
            "box": None if query.box is None else list(query.box),
            "labels": {"easy": [], "hard": [], "junk": []},
            "before": self.numbers(before["image"]),
            "similarity": before["similarity"].astype(float).round(4).tolist(),
            "after": {PROTOCOL: self.numbers(after["image"])},
            "verified": self.numbers(verified["image"]),
            "inliers": verified["inliers"].astype(int).tolist(),
            "probability": verified["probability"].astype(float).round(4).tolist(),
            "worst": {},
            "pairs": self.pairs(number, description.features, after["image"][:PAIRS]),
        }

    def pairs(self, number: int, query: Any, names: Iterable[str]) -> list[dict[str, Any]]:
        """Returns the pairs of a query's features and the named photographs."""
        photographs, others = self.answers.photographs, []
        for name in names:
            try:
                features = photographs.features(name)
            except PhotographError:  # it has changed since
                continue
            others.append((*self.numbers([name]), features))
        device = photographs.describer.machine.match_device
        return pair_documents(self.images, (number, query), others, self.answers.settings, device)
