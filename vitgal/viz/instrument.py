"""The front end in a notebook: a widget whose kernel reads images and matches pairs on demand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import traitlets
from matplotlib.figure import Figure

from vitgal import runs
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.files import map_array
from vitgal.features.local import LocalFeatures
from vitgal.settings import RerankingSettings
from vitgal.stages import rerank
from vitgal.stages.inspection import (
    Inspector,
    TokenSelection,
    changed_settings,
    compare,
    similar_patches,
)
from vitgal.viz import run_document
from vitgal.viz.report import ENLARGED, FRONTEND, THUMBNAIL, jpeg
from vitgal.viz.style import stored_picture

LONGEST_NOTE = 2000  # characters
PICTURE_DPI = 110  # of the picture that stands in for the widget
Question = Mapping[str, Any]
Answer = tuple[dict[str, Any], list[bytes]]  # plain values, and bytes beside them


class InstrumentWidget(anywidget.AnyWidget):
    """A widget of the front end; a subclass answers the questions of its views.

    run: keeps stars and notes. document: what the front end draws, as of `run_document`. images:
    those that it numbers. figure: what is stored with the notebook and shown where no widget can
    be, as on GitHub; None: a line of text. start: see State in instrument.js.
    """

    _esm = FRONTEND / "instrument.js"
    _css = FRONTEND / "instrument.css"
    settings: RerankingSettings  # of the ranking that is shown
    start = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        run: Path,
        document: dict[str, Any],
        images: run_document.Images,
        figure: Figure | None,
        start: Mapping[str, Any],
    ) -> None:
        self.document, self.images = document, images
        self._run = Path(run)
        self._picture = {} if figure is None else _picture(figure)
        super().__init__(start=dict(start))
        self.on_msg(self._answer)

    def _repr_mimebundle_(self, **_: Any) -> Any:  # the base classes ignore the options as well
        data, metadata = super()._repr_mimebundle_()
        title = self.document["entries"][0]["dataset"]
        data["text/plain"] = f"the instrument on {title}: run this cell"
        return data | self._picture, metadata

    def selections(self, question: Question) -> list[TokenSelection]:
        """Returns the tokens of both photographs of a pair, by one pass of the network each."""
        raise NotImplementedError

    def features(self, question: Question) -> tuple[LocalFeatures, LocalFeatures]:
        """Returns the local features of both photographs of a pair."""
        raise NotImplementedError

    def _answer(self, _: Any, question: Question, buffers: Sequence[Any]) -> None:
        """Answers a question of the front end by the method of its kind; errors are shown there."""
        reply: dict[str, Any] = {"id": question.get("id")}
        attached: list[bytes] = []
        try:
            answer, attached = getattr(self, f"_answer_{question['kind']}")(question, buffers)
            reply |= answer
        except runs.UserError as error:
            reply["error"] = runs.printable(error)
        except Exception as error:  # whatever it is, the view has to say it
            reply["error"] = runs.printable(f"{type(error).__name__}: {error}")
        self.send(reply, attached)

    def _answer_document(self, *_: Any) -> Answer:
        return {"document": self.document}, []

    def _answer_image(self, question: Question, _: Sequence[bytes]) -> Answer:
        size = ENLARGED if question["large"] else THUMBNAIL
        return {}, [jpeg(self.images.read(question["image"]), size)]

    def _answer_pair(self, question: Question, _: Sequence[bytes]) -> Answer:
        """Matches a pair under settings that replace the ranking's: any of `knobs`, and `hidden`.

        hidden: scales that are left out.
        """
        changes = question["settings"]
        settings = changed_settings(self.settings, changes)
        query, image = self.features(question)
        pair = compare(query, image, settings, hidden_scales=changes.get("hidden", ()))
        return {"pair": run_document.pair_document(pair.query, pair.database, pair.result)}, []

    def _answer_tokens(self, question: Question, _: Sequence[bytes]) -> Answer:
        """Scores, lengths of codes and attention at a scale, as (2 + heads, h, w) bytes a side."""
        grids, boxes, attached = [], [], []
        for selection in self.selections(question):
            scale = selection.nearest_scale(float(question["scale"]))
            scores, norms = selection.scores[scale], selection.norms[scale]
            norms = (norms - norms.min()) / max(np.ptp(norms), 1e-9)  # lengths differ little
            layers = [scores / max(scores.max(), 1e-9), norms, *selection.attention[scale]]
            attached.append(np.rint(255 * np.stack(layers)).astype(np.uint8).tobytes())
            grids.append([len(layers), *scores.shape])
            boxes.append([float(value) for value in selection.kept.box])
        return {"grids": grids, "boxes": boxes}, attached

    def _answer_patch(self, question: Question, _: Sequence[bytes]) -> Answer:
        """The patch at a pixel, and its similarity (h, w) to every patch of the other photograph.

        Similarities of 0 to 1 are sent as bytes, negative ones as 0.
        """
        first, other = self.selections(question)[:: -1 if question["side"] else 1]
        token = first.patch_at(question["x"], question["y"], float(question["scale"]))
        scale, row, column = token
        maps, best = similar_patches(first.codes[scale][row, column], other)
        similarity = maps[other.nearest_scale(scale)]
        nearest = [
            {"box": list(other.patch_box(*patch)), "scale": patch[0]}
            | {"similarity": round(float(maps[patch[0]][patch[1:]]), 3)}
            for patch in best
        ]
        described = {"patch": list(first.patch_box(*token)), "nearest": nearest}
        described |= {"grid": similarity.shape, "box": [float(value) for value in other.kept.box]}
        return described, [np.rint(255 * similarity.clip(0, 1)).astype(np.uint8).tobytes()]

    def _answer_note(self, question: Question, _: Sequence[bytes]) -> Answer:
        name, value = str(question["name"]), question["value"]
        note = {"star": bool(value["star"]), "note": str(value["note"])[:LONGEST_NOTE]}
        notes = run_document.read_notes(self._run) | {name: note}
        kept = {key: entry for key, entry in sorted(notes.items()) if any(entry.values())}
        runs.write_json(self._run / run_document.NOTES, kept)
        self.document["notes"] = kept
        return {}, []


class Instrument(InstrumentWidget):
    """The interactive viewer of one data set of a run.

    figure: as for InstrumentWidget. inspector: reads features and runs the network; None: one with
    the run's own model. start: what is shown first, any of `view` ("overview", "ranking" or
    "pair"), `query` and `image` (indices) and `protocol`. Raises StageError where notebook 04 has
    not been run for this data set.
    """

    def __init__(
        self,
        run: Path,
        dataset: RetrievalDataset,
        *,
        figure: Figure | None = None,
        inspector: Inspector | None = None,
        **start: Any,
    ) -> None:
        self._dataset, self._inspector = dataset, inspector or Inspector(Path(run), dataset)
        document, images = run_document.dataset_document(run, dataset)
        if start.get("image") is not None:
            start["image"] = images.database_image(dataset, start["image"])
        super().__init__(run, document, images, figure, start)

    def selections(self, question: Question) -> list[TokenSelection]:
        """Returns the tokens of a pair's query and database image."""
        return [self._inspector.selection(*side) for side in self._sides(question)]

    def _sides(self, question: Question) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("query", question["query"]), ("database", self.images.indices[question["image"]])

    def _answer_neighbours(self, question: Question, _: Sequence[bytes]) -> Answer:
        """The database images nearest to one by descriptor, and what the document has on them."""
        images, dataset = self.images, self._dataset
        rows = map_array(self._run / dataset.name / "global" / "database.npy")
        (nearest,) = run_document.nearest_images(rows, [images.indices[question["image"]]])
        found = [images.database_image(dataset, index) for index in nearest]
        parts = ("names", "sizes", "indices")
        described = {name: [getattr(images, name)[number] for number in found] for name in parts}
        return {"neighbours": found} | described, []

    @property
    def settings(self) -> RerankingSettings:
        """The settings of reranking, which may have been made since the widget."""
        return rerank.used_settings(self._run / self._dataset.name / "rerank")

    def features(self, question: Question) -> tuple[LocalFeatures, LocalFeatures]:
        """Returns the features of both; the network describes an image of no short list.

        Raises InspectionError where a photograph has no local features.
        """
        inspector, sides = self._inspector, self._sides(question)
        for side in sides:
            name = inspector.name(*side)
            known = name in inspector.features or name in inspector.features.failures
            if not known and inspector.shows_tokens:
                inspector.selection(*side)
        query, image = sides
        return inspector.stored(*query), inspector.stored(*image)


def _picture(figure: Figure) -> dict[str, str]:
    """Returns a figure's picture in base64 by its media type, and closes the figure."""
    stored = {
        f"image/{kind}": stored_picture(figure, kind, PICTURE_DPI) for kind in ("jpeg", "png")
    }
    plt.close(figure)
    return {kind: picture[0] for kind, picture in stored.items() if picture is not None}
