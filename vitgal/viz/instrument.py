"""The front end in a notebook: a widget whose kernel reads images and matches pairs on demand."""

import base64
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import matplotlib.pyplot as plt
import traitlets
from matplotlib.figure import Figure

from vitgal import runs
from vitgal.data.images import read_image
from vitgal.data.revisited import RetrievalDataset
from vitgal.settings import RerankingSettings
from vitgal.stages.inspection import Inspector
from vitgal.viz.report import ENLARGED, THUMBNAIL, jpeg
from vitgal.viz.run_document import RERANK_NOTEBOOK, dataset_document, pair_document

FRONTEND = Path(__file__).with_name("frontend")
KNOBS = {"max_distance": "matching", "threshold": "verification", "estimator": "verification"}


class Instrument(anywidget.AnyWidget):
    """The interactive viewer of one data set of a run.

    Where no widget can be shown, as on GitHub, the output is the picture of `figure`.

    Args:
        run: the run's folder, whose notebook 04 is finished for this data set.
        dataset: the opened benchmark.
        figure: what is stored with the notebook in place of the widget; None: a line of text.
        start: what is shown first, any of `view` ("overview", "ranking" or "pair"), `query` (its
            index) and `protocol`.
    Raises:
        StageError: notebook 04 has not been run.
    """

    _esm = FRONTEND / "instrument.js"
    _css = FRONTEND / "instrument.css"
    start = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        run: Path,
        dataset: RetrievalDataset,
        *,
        figure: Figure | None = None,
        **start: Any,
    ) -> None:
        self._run, self._dataset = Path(run), dataset
        self._document, self._images = dataset_document(run, dataset)
        self._inspector = Inspector(self._run, dataset)
        self._picture = None if figure is None else _png(figure)
        super().__init__(start=start)
        self.on_msg(self._answer)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = (
            f"the instrument on {runs.printable(self._dataset.name)}: run this cell"
        )
        if self._picture is not None:
            data["image/png"] = self._picture
        return bundle

    def _answer(self, _: Any, question: Mapping[str, Any], buffers: Any) -> None:
        """Answers a question of the front end; its errors are shown there."""
        reply: dict[str, Any] = {"id": question.get("id")}
        attached: list[bytes] = []
        try:
            if question["kind"] == "document":
                reply["document"] = self._document
            elif question["kind"] == "image":
                attached = [self.image(question["image"], large=bool(question["large"]))]
            else:
                chosen = question["query"], question["image"], question["settings"]
                reply["pair"] = self.pair(*chosen)
        except (ValueError, OSError, KeyError, runs.StageError) as error:
            reply["error"] = runs.printable(error)
        self.send(reply, attached)

    def image(self, number: int, *, large: bool = False) -> bytes:
        """Returns an image of the document as JPEG, of at most 160 or 800 pixels a side."""
        size = ENLARGED if large else THUMBNAIL
        return jpeg(read_image(self._images.paths[number]), size)

    def pair(self, query: int, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Matches a query and an image of the document; `settings` replace the run's.

        settings: any of max_distance, threshold, estimator. Returns as `pair_document`. Raises
        InspectionError where a photograph has no local features, SettingsError for other settings.
        """
        manifest = runs.read_stage(self._run / self._dataset.name / "rerank", RERANK_NOTEBOOK)
        chosen = RerankingSettings.from_manifest(manifest["parameters"])
        for name, value in settings.items():
            section = KNOBS[name]
            changed = replace(getattr(chosen, section), **{name: value})
            chosen = replace(chosen, **{section: changed})
        image = self._dataset.database_paths.index(self._images.paths[number])
        pair = self._inspector.pair(query, image, chosen)
        return pair_document(pair.query, pair.database, pair.result)


def _png(figure: Figure) -> str:
    """Returns a figure's picture in base64, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
