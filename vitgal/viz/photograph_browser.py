"""A browser over one's own photographs: choose one, draw a box on it, search, look at matches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import ipywidgets as widgets
import numpy as np

from vitgal.data.photographs import PhotographError, read_upright
from vitgal.settings import RerankingSettings
from vitgal.viz.controls import WIDE, FigureOutput, labelled, refill, unobserved
from vitgal.viz.photographs import pair_figure, ranking_figure, reduce_image
from vitgal.viz.style import BOX_RGB

if TYPE_CHECKING:  # the stage needs torch: it is imported where it works
    from vitgal.stages.own import Photographs, SearchResult

PREVIEW = 480  # pixels, the longer side of the photograph on which a box is drawn
LISTED = 50  # photographs that can be chosen for their matches


class PhotographBrowser:
    """The controls and the pictures of `browse_photographs`; `widget` is what is shown.

    Attributes:
        result: the last search.
        widget: the browser.
    """

    def __init__(
        self,
        photographs: "Photographs",
        query: str,
        box: Sequence[int] | None,
        settings: RerankingSettings,
        columns: int,
    ) -> None:
        from vitgal.stages.own import find_query

        self.photographs, self.settings, self.columns = photographs, settings, columns
        self.result: SearchResult | None = None
        name, _ = find_query(photographs, query)
        if name in photographs.names:
            names, value = photographs.names, name
        else:
            names, value = [query, *photographs.names], query
        self.query = labelled(widgets.Dropdown(options=names, value=value, description="query"))
        self.across = labelled(widgets.IntRangeSlider(description="left, right"))
        self.down = labelled(widgets.IntRangeSlider(description="top, bottom"))
        self.preview = widgets.Image(format="jpeg")
        self.button = widgets.Button(
            description="search with this box", button_style="primary", layout=WIDE
        )
        self.partner = labelled(widgets.Dropdown(options=[], description="matches with"))
        self.ranking, self.pair = FigureOutput(), FigureOutput()
        self._open_query(box)
        self._connect()
        self.ranking.draw(self._search)
        controls = widgets.VBox([self.query, self.across, self.down, self.button])
        top = widgets.HBox([controls, self.preview])
        self.widget = widgets.VBox([top, self.ranking.widget, self.partner, self.pair.widget])

    def _connect(self) -> None:
        self.query.observe(lambda _: self._open_query(None), "value")
        for slider in (self.across, self.down):
            slider.observe(self._draw_preview, "value")
        self.button.on_click(lambda _: self.ranking.redraw(self._search))
        self.partner.observe(self._redraw_pair, "value")

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The box (x0, y0, x1, y1) on the sliders, in pixels of the upright photograph.

        None where it covers the whole photograph.
        """
        (x0, x1), (y0, y1) = self.across.value, self.down.value
        whole = (0, 0, self.across.max, self.down.max)
        return None if (x0, y0, x1, y1) == whole else (x0, y0, x1, y1)

    def _open_query(self, box: Sequence[int] | None) -> None:
        """Shows the chosen query and sets the sliders to the box, or to the whole photograph."""
        from vitgal.stages.own import find_query

        try:
            image = read_upright(find_query(self.photographs, self.query.value)[1])
        except PhotographError as error:
            self.ranking.show_error(str(error))
            return
        height, width = image.shape[:2]
        x0, y0, x1, y1 = (0, 0, width, height) if box is None else map(int, box)
        self.reduced, self.factor = reduce_image(image, PREVIEW)
        for slider, low, high, end in ((self.across, x0, x1, width), (self.down, y0, y1, height)):
            with unobserved(slider, self._draw_preview):
                slider.min, slider.max = 0, end
                slider.value = (low, high)
        self._draw_preview()

    def _draw_preview(self, _: object = None) -> None:
        """Draws the query with the box, everything outside it faded."""
        (x0, x1), (y0, y1) = self.across.value, self.down.value
        x0, y0, x1, y1 = (round(side * self.factor) for side in (x0, y0, x1, y1))
        image: np.ndarray = self.reduced // 3 + 160
        image[y0:y1, x0:x1] = self.reduced[y0:y1, x0:x1]
        cv2.rectangle(image, (x0, y0), (max(x0, x1 - 1), max(y0, y1 - 1)), BOX_RGB, 2)
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.preview.value = jpeg.tobytes()

    def _search(self) -> None:
        from vitgal.stages.own import search_folder

        self.result = search_folder(self.photographs, self.query.value, self.box, self.settings)
        ranking_figure(self.result, columns=self.columns)
        entries = [
            (f"{row.rank}  {row.photograph}", row.photograph)
            for row in self.result.table.head(LISTED).itertuples()
        ]
        with unobserved(self.partner, self._redraw_pair):
            refill(self.partner, entries)
        self.pair.draw(self._draw_pair)

    def _redraw_pair(self, _: object) -> None:
        self.pair.redraw(self._draw_pair)

    def _draw_pair(self) -> None:
        pair_figure(self.result, self.partner.value)


def browse_photographs(
    photographs: "Photographs",
    query: str,
    box: Sequence[int] | None,
    settings: RerankingSettings,
    *,
    columns: int = 7,
) -> widgets.VBox:
    """Shows a browser over one's own photographs.

    A search with a new box runs the network once.

    Args:
        photographs: the described folder.
        query: the first query, as `search_folder` takes it.
        box: its box (x0, y0, x1, y1) in pixels of the upright photograph; None: all of it.
        settings: of every search.
        columns: photographs in a row of the ranking.
    Raises:
        PhotographError: the first search fails.
    """
    browser = PhotographBrowser(photographs, query, box, settings, columns)
    return browser.widget
