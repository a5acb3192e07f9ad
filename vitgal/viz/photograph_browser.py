"""A browser over one's own photographs: choose one, draw a box on it, search, look at matches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import ipywidgets as widgets

from vitgal.data.photographs import PhotographError, read_upright
from vitgal.stages import own
from vitgal.viz.photographs import pair_figure, ranking_figure, reduced
from vitgal.viz.widgets import LABELLED, WIDE, Screen, refill, unobserved

PREVIEW = 480  # pixels, the longer side of the photograph on which a box is drawn


class PhotographBrowser:
    """The controls and the pictures of `browse_photographs`; `widget` is shown."""

    def __init__(self, photographs: Any, query: str, box: Any, shown: int, options: dict) -> None:
        self.photographs, self.options = photographs, options
        name, _ = own.find_query(photographs, query)
        names = photographs.names if name in photographs.names else [query, *photographs.names]
        value = name if name in photographs.names else query
        self.query = widgets.Dropdown(options=names, value=value, description="query", **LABELLED)
        self.shown, self.found = shown, None
        self.across = widgets.IntRangeSlider(description="left, right", **LABELLED)
        self.down = widgets.IntRangeSlider(description="top, bottom", **LABELLED)
        self.preview = widgets.Image(format="jpeg")
        self.button = widgets.Button(
            description="search with this box", button_style="primary", layout=WIDE
        )
        self.result = widgets.Dropdown(options=[], description="matches with", **LABELLED)
        self.ranking, self.pair = Screen(), Screen()
        self._open(box)
        self.query.observe(lambda _: self._open(None), "value")
        for slider in (self.across, self.down):
            slider.observe(self._outline, "value")
        self.button.on_click(lambda _: self.ranking.redraw(self._search))
        self.result.observe(self._other_result, "value")
        self.ranking.draw(self._search)
        controls = widgets.VBox([self.query, self.across, self.down, self.button])
        top = widgets.HBox([controls, self.preview])
        self.widget = widgets.VBox([top, self.ranking.widget, self.result, self.pair.widget])

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The box as the sliders stand, in pixels of the upright photograph; None: all of it."""
        (x0, x1), (y0, y1) = self.across.value, self.down.value
        whole = (0, 0, self.across.max, self.down.max)
        return None if (x0, y0, x1, y1) == whole else (x0, y0, x1, y1)

    def _open(self, box: Sequence[int] | None) -> None:
        """Shows the query's photograph and sets the sliders to the box, or to all of it."""
        try:
            image = read_upright(self._path())
        except PhotographError as error:
            self.ranking.show([], str(error), failed=True)
            return
        height, width = image.shape[:2]
        x0, y0, x1, y1 = (0, 0, width, height) if box is None else map(int, box)
        self.small, self.factor = reduced(image, PREVIEW)
        for slider, low, high, most in ((self.across, x0, x1, width), (self.down, y0, y1, height)):
            with unobserved(slider, self._outline):
                slider.min, slider.max = 0, most
                slider.value = (low, high)
        self._outline()

    def _path(self) -> Path:
        return own.find_query(self.photographs, self.query.value)[1]

    def _outline(self, _: object = None) -> None:
        """The photograph with the box on it, everything outside faded."""
        (x0, x1), (y0, y1) = self.across.value, self.down.value
        x0, y0, x1, y1 = (round(side * self.factor) for side in (x0, y0, x1, y1))
        drawn = self.small // 3 + 160
        drawn[y0:y1, x0:x1] = self.small[y0:y1, x0:x1]
        cv2.rectangle(drawn, (x0, y0), (max(x0, x1 - 1), max(y0, y1 - 1)), (255, 225, 77), 2)
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        self.preview.value = jpeg.tobytes()

    def _search(self) -> None:
        self.found = own.search_folder(self.photographs, self.query.value, self.box, **self.options)
        ranking_figure(self.found, columns=self.shown)
        entries = [
            (f"{row.rank}  {row.photograph}", row.photograph)
            for row in self.found.table.head(50).itertuples()
        ]
        with unobserved(self.result, self._other_result):
            refill(self.result, entries)
        self.pair.draw(self._pair)

    def _other_result(self, _: object) -> None:
        self.pair.redraw(self._pair)

    def _pair(self) -> None:
        pair_figure(self.found, self.result.value)


def browse_photographs(
    photographs: Any,
    query: str,
    box: Sequence[int] | None = None,
    *,
    shown: int = 7,
    **options: Any,
) -> widgets.VBox:
    """A browser over your own photographs: choose one, draw a box on it, search, look at matches.

    photographs: `own.Photographs`. query, box: at first, as `own.search_folder` takes them. shown:
    photographs in a row of the ranking. options: `own.search_folder`'s. A search with a box that is
    new runs the network once. Raises PhotographError where the first search fails.
    """
    return PhotographBrowser(photographs, query, box, shown, options).widget
