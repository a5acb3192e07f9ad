"""The front end over one's own photographs: a query, a box drawn on it, results and pairs."""

import contextlib
import functools
import hashlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitgal import runs
from vitgal.data.photographs import PhotographError
from vitgal.data.revisited import LABELS
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.presence import Presence
from vitgal.settings import RerankingSettings
from vitgal.stages.inspection import TokenSelection
from vitgal.viz import run_document
from vitgal.viz.instrument import Answer, InstrumentWidget, Question
from vitgal.viz.run_figures import safe_file_name

if TYPE_CHECKING:  # the stage imports torch; it is imported where it is used
    from vitgal.stages.own import Photographs, SearchResult

LARGEST_DROPPED = 9 << 20  # bytes: a Jupyter server takes messages of 10 MiB
KEPT = 16  # searches whose pairs can be opened without another search
RESULTS = 300  # photographs of a ranking, at most


class PhotographInstrument(InstrumentWidget):
    """The viewer of a search in a described folder of photographs.

    A query is chosen or dropped, a box drawn on it; results open as pairs with live matching.

    query, box: of the first search; with settings and presence as for `search_folder`. figure: as
    for InstrumentWidget. Raises PhotographError where the first search fails.
    """

    def __init__(
        self,
        photographs: "Photographs",
        query: str,
        box: Sequence[int] | None,
        settings: RerankingSettings,
        presence: Presence | None = None,
        *,
        figure: Figure | None = None,
    ) -> None:
        self._photographs, self.settings, self._presence = photographs, settings, presence
        self._dropped = tempfile.TemporaryDirectory(prefix="vitgal-query-")
        images = run_document.Images(upright=True)
        for name, size in zip(photographs.names, photographs.sizes, strict=True):
            path = photographs.path(name)
            images.number(path, name, size if path.exists() else (0, 0))
        describer = photographs.describer
        features = run_document.extraction_document(
            describer.local_settings, tokens=describer.local_settings.own_tokens
        )
        entry: dict[str, Any] = {
            "kind": "search",
            "threshold": None if presence is None else presence.threshold,
            "run": runs.printable(describer.run.name),
            "dataset": runs.printable(photographs.folder.name),
            "database": len(photographs.names),
            "photographs": list(range(len(photographs.names))),
            "settings": [],
            "scores": {"global": {}},
            "tests": {},
            "matching": run_document.knobs(settings),
            "features": features,
            "map": None,
            "neighbours": {},
        }
        self.document, self.images = images.document([entry]), images
        self._results: dict[tuple[int, Any], SearchResult] = {}
        self.search(query, box)
        super().__init__(describer.run, self.document, images, figure, {"view": "own"})

    def selections(self, question: Question) -> list[TokenSelection]:
        """Returns the tokens of the query and a photograph, by one pass of the network each."""
        result, other = self._searched(question), self.images.paths[question["image"]]
        return [self._selection(result.path, result.box), self._selection(other, None)]

    def features(self, question: Question) -> tuple[LocalFeatures, LocalFeatures]:
        """Returns the features of the searched query and of a photograph."""
        path = self.images.paths[question["image"]].relative_to(self._photographs.folder)
        image = self._photographs.features(path.as_posix())
        return self._searched(question).description.features, image

    @functools.cached_property
    def _selection(self) -> Callable[..., TokenSelection]:
        return functools.lru_cache(maxsize=8)(self._photographs.describer.selection)

    def search(self, query: str, box: Sequence[int] | None) -> dict[str, Any]:
        """Searches, and describes the result as `queries` of a document's entry.

        Raises PhotographError as `search_folder` does.
        """
        from vitgal.stages.own import search_folder

        with contextlib.redirect_stdout(io.StringIO()) as words:
            result = search_folder(self._photographs, query, box, self.settings, self._presence)
        described = self._describe(result, words.getvalue().strip())
        self._results[described["image"], result.box] = result
        if len(self._results) > KEPT:
            del self._results[next(iter(self._results))]
        self.document["entries"][0]["queries"] = [described]
        return described

    def _searched(self, question: Question) -> "SearchResult":
        """Returns the search that a question is about; another view may have searched since."""
        image, box = question["searched"], question["box"]
        key = image, None if box is None else tuple(box)
        if key not in self._results:
            self.search(str(self.images.paths[image].absolute()), box)
        return self._results[key]

    def _describe(self, result: "SearchResult", remark: str) -> dict[str, Any]:
        table = result.table.head(RESULTS)
        numbers = [self._photographs.index(name) for name in table["photograph"]]
        verified = table["inliers"].notna().to_numpy()
        probability = table.get("probability", pd.Series(np.nan, table.index))[verified]
        return runs.plain({
            "image": self._number(result),
            "box": None if result.box is None else list(result.box),
            "labels": {label: [] for label in LABELS},
            "before": numbers,
            "similarity": table["similarity"].astype(float).round(4).tolist(),
            "global": table["global_rank"].tolist(),
            "probability": probability.astype(float).round(3).tolist(),
            "after": {},
            "verified": np.array(numbers, int)[verified].tolist(),
            "inliers": [int(count) for count in table["inliers"][verified]],
            "worst": {},
            "pairs": [],
            "verdict": " ".join(filter(None, [result.verdict(), remark])),
        })  # fmt: skip

    def _number(self, result: "SearchResult") -> int:
        """Returns the number of the query, which the document lists from now on."""
        same = np.flatnonzero(~self._photographs.others(result.path))
        if len(same):
            return int(same[0])
        size = result.description.features.image_size
        return self.images.number(result.path, result.query, size)

    def _reply(self, described: dict[str, Any]) -> Answer:
        number = described["image"]
        name, size = self.images.names[number], self.images.sizes[number]
        return {"query": described, "name": name, "size": size}, []

    def _answer_search(self, question: Question, _: Sequence[bytes]) -> Answer:
        path, box = self.images.paths[question["image"]], question["box"]
        return self._reply(self.search(str(path.absolute()), box))

    def _answer_drop(self, question: Question, buffers: Sequence[bytes]) -> Answer:
        """Searches with a photograph that the front end sends; it is kept while the kernel runs."""
        data = bytes(buffers[0])
        if len(data) > LARGEST_DROPPED:
            raise PhotographError("the photograph is larger than 9 MB: put it into the folder")
        folder = Path(self._dropped.name) / hashlib.sha256(data).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        path = folder / safe_file_name(str(question["name"]).rpartition("/")[2])
        path.write_bytes(data)
        return self._reply(self.search(str(path), None))
