"""Answers of one's own photographs as the JSON document that the front end draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.photographs import PhotographError
from vitgal.retrieval.places import Place
from vitgal.retrieval.verification import inspect_shortlist
from vitgal.runs import printable
from vitgal.viz.run_document import Images, pair_document

if TYPE_CHECKING:
    from vitgal.stages.own_answers import Answers, NamedQuery

MOST_QUERIES = 1000  # in a page: with 20 images each it has some 10 MB
PROTOCOL = "medium"  # without labels there is one ranking; the front end asks it by this name
NO_SCORES = {"map": None, "interval": None, "mp_at": None}


def own_document(
    answers: "Answers",
    places: Sequence[Place] | None = None,
    *,
    ranks: int = 20,
    pairs: int = 2,
    progress: bool = True,
) -> tuple[dict[str, Any], Images]:
    """Describes answers and places as plain values, with one entry as `run_document` has it.

    There are no labels, scores, map or neighbours; the entry has `kind` "own" and in addition
    `threshold`, the least probability that counts as found, or None; `left_out`, [name, reason] of
    each query and photograph that could not be used; `places`, or None: for each `images`, the best
    first, and `links` and `probability` as in places.csv. A query has in addition `probability` of
    each of its `verified` images, None where it is unknown, and `verdict`, a sentence.

    Args:
        ranks: images of each ranking, at most. pairs: those whose matches are in the document.
    Returns:
        The document of the first MOST_QUERIES queries, and the images whose numbers it uses.
    """
    from tqdm.auto import tqdm

    photographs, images, sizes = answers.photographs, Images(upright=True), {}
    groups = {name: rows for name, rows in answers.table.groupby("query", sort=False)}
    asked = list(zip(answers.queries, answers.files, answers.verdicts, strict=True))
    asked = asked[:MOST_QUERIES]
    bar = tqdm(asked, desc="matching pairs", unit="query", disable=not progress)
    entry = _Entry(answers, images, sizes, ranks, pairs)
    queries = [
        entry.query(query, file, groups[query.name]) | {"verdict": verdict}
        for query, file, verdict in bar
    ]
    empty = NO_SCORES | {"ap": [None] * len(queries)}
    left_out = answers.left_out | photographs.left_out
    document = {
        "kind": "own",
        "run": printable(photographs.describer.run.name),
        "dataset": printable(photographs.folder.name),
        "database": len(photographs.names),
        "settings": [[name, str(v)] for name, v in answers.settings.compared().items()],
        "scores": {"global": {PROTOCOL: empty}, "reranked": {PROTOCOL: empty}},
        "tests": {},
        "matching": None,
        "queries": queries,
        "map": None,
        "neighbours": {},
        "threshold": None if answers.presence is None else answers.presence.threshold,
        "left_out": [[printable(name), printable(text)] for name, text in left_out.items()],
        "places": None if places is None else [entry.place(place) for place in places],
    }
    shown = [sizes[number] for number in range(len(images.paths))]
    whole = {"entries": [document], "comparisons": [], "names": images.names, "sizes": shown}
    return runs.plain(whole), images


class _Entry:
    """The queries and places of a document, and the images that they mention."""

    def __init__(
        self, answers: "Answers", images: Images, sizes: dict[int, list[int]], *limits: int
    ) -> None:
        self.answers, self.photographs = answers, answers.photographs
        self.images, self.sizes = images, sizes
        self.ranks, self.pairs = limits
        self.indices = {name: index for index, name in enumerate(self.photographs.names)}

    def image(self, name: str) -> int:
        """Returns the number of a photograph of the folder."""
        number = self.images.number(self.photographs.path(name), name)
        height, width = self.photographs.sizes[self.indices[name]].tolist()
        self.sizes.setdefault(number, [width, height])
        return number

    def place(self, place: Place) -> dict[str, Any]:
        """Returns a place's plain values."""
        return {
            "images": [self.image(self.photographs.names[index]) for index in place.members],
            "links": place.links.tolist(),
            "probability": np.round(place.support / place.links, 4).tolist(),
        }

    def query(self, query: "NamedQuery", file: Path, table: pd.DataFrame) -> dict[str, Any]:
        """Returns the plain values of a query.

        file: its description; its photograph may have vanished since. table: its answers in their
        final order.
        """
        from vitgal.stages.own_describer import read_description

        before = table.sort_values("global_rank").head(self.ranks)
        after = table.head(self.ranks)
        number = self.images.number(query.path, query.name)
        description = read_description(file) or self.photographs.describer.describe(
            query.path, query.box
        )
        height, width = description.features.image_size
        self.sizes.setdefault(number, [width, height])
        shown = table[table["image"].isin([*before["image"], *after["image"]])]
        return {
            "image": number,
            "box": None if query.box is None else list(query.box),
            "labels": {"easy": [], "hard": [], "junk": []},
            "before": [self.image(name) for name in before["image"]],
            "similarity": before["similarity"].astype(float).round(4).tolist(),
            "after": {PROTOCOL: [self.image(name) for name in after["image"]]},
            "verified": [self.image(name) for name in shown["image"]],
            "inliers": shown["inliers"].astype(int).tolist(),
            "probability": [
                None if np.isnan(value) else round(value, 4) for value in shown["probability"]
            ],
            "worst": {},
            "pairs": self.matches(number, description.features, after["image"][: self.pairs]),
        }

    def matches(self, number: int, query: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the pairs of a query's features and the named photographs."""
        features, machine = [], self.photographs.describer.machine
        for name in names:
            try:
                features.append((name, self.photographs.features(name)))
            except PhotographError:  # it has changed since
                continue
        others = [other for _, other in features]
        settings, device = self.answers.settings, machine.match_device
        found = inspect_shortlist(query, others, settings, device=device)
        documents = []
        for (name, other), pair in zip(features, found, strict=True):
            image = self.image(name)
            self.images.enlarged |= {number, image}
            documents.append(
                {"image": image, "index": self.indices[name]} | pair_document(query, other, pair)
            )
        return documents
