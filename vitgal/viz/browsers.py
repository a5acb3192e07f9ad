"""Widgets for notebooks: training curves, and searches among one's own photographs.

A browser draws its first choice at once, so that a headless run fails if the drawing fails. Later
errors are shown in place of the picture.

Pictures are `widgets.Image` and text is `widgets.HTML`: with `widgets.Output` about 1 % of the
cells of a headless run never ended (see `execution.Client.process_message`).
"""

import contextlib
import html
import io
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from vitgal import runs
from vitgal.data.images import crop_box
from vitgal.data.photographs import PhotographError, read_upright
from vitgal.runs import printable
from vitgal.settings import RerankingSettings
from vitgal.viz import style
from vitgal.viz.charts import training_curves
from vitgal.viz.drawing import reduce_image
from vitgal.viz.run_figures import pair_figure, ranking_figure

if TYPE_CHECKING:  # the stage imports torch; it is imported where it is used
    from vitgal.stages.own import Photographs, SearchResult

PREVIEW = 480  # pixels, the longer side of the photograph on which a box is drawn
LISTED = 50  # photographs that can be chosen for their matches
Options = Sequence[tuple[str, int]]  # the entries of a list: text and index
NARROW = widgets.Layout(width="3em")
WIDE = widgets.Layout(width="26em")
LIST = widgets.Layout(width="36em")  # a name, its label and its numbers
NATURAL = widgets.Layout(align_self="flex-start", max_width="100%")  # not stretched


class FigureOutput:
    """The output of a browser: a line of text, and pictures below it.

    `work` prints the text and opens the figures, which are closed once they are shown.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.words, self.pictures = widgets.HTML(), widgets.VBox()
        self.widget = widgets.VBox([self.words, self.pictures])

    def draw(self, work: Callable[[], object] | None = None) -> None:
        """Shows the output of `work`, or of another one once; its errors are raised."""
        others, text = set(plt.get_fignums()), io.StringIO()
        try:
            with contextlib.redirect_stdout(text):
                (work or self.work)()
            new = sorted(set(plt.get_fignums()) - others)
            self._show([_png(plt.figure(number)) for number in new], text.getvalue())
        finally:
            for number in set(plt.get_fignums()) - others:
                plt.close(number)

    def redraw(self, _: object = None, work: Callable[[], object] | None = None) -> None:
        """Shows as `draw` does, or the error in place of the picture."""
        try:
            self.draw(work)
        except runs.UserError as error:
            self.show_error(str(error))
        except Exception as error:
            (frame,) = traceback.extract_tb(error.__traceback__)[-1:]
            line = f"{Path(frame.filename).name}, line {frame.lineno}"
            self.show_error(f"{type(error).__name__}: {error} ({line})")

    def show_error(self, message: str) -> None:
        """Shows a message in red and no picture."""
        self._show([], message, colour=style.ERROR_COLOUR)

    def _show(self, pictures: Sequence[bytes], words: str, colour: str = "inherit") -> None:
        lines = "\n".join(printable(line) for line in words.strip().split("\n"))
        attributes = f"style='color:{colour};white-space:pre-wrap'"
        self.words.value = f"<pre {attributes}>{html.escape(lines)}</pre>"
        images = self.pictures.children
        if len(images) != len(pictures):  # otherwise the old ones are reused, without flicker
            images = [widgets.Image(format="png", layout=NATURAL) for _ in pictures]
        for image, picture in zip(images, pictures, strict=True):
            image.value = picture
        self.pictures.children = tuple(images)


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    # Little compression, which took a quarter of the time of a redraw.
    with plt.style.context("default"):
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


class Chooser:
    """A list to choose from, with two arrows that move the choice by one."""

    def __init__(self, label: str, options: Options, first: int | None) -> None:
        """first: the index that is chosen; IndexError where the list does not have it."""
        if options and first not in [value for _, value in options]:
            raise IndexError(f"there is no {label} {first}: choose 0 to {len(options) - 1}")
        value = first if options else None
        self.list = widgets.Dropdown(options=options, value=value, description=label, layout=LIST)
        arrows = [widgets.Button(description=sign, layout=NARROW) for sign in "◀▶"]
        for arrow, step in zip(arrows, (-1, 1), strict=True):
            arrow.on_click(lambda _, step=step: self._move(step))
        self.widget = widgets.HBox([self.list, *arrows])

    @property
    def value(self) -> int | None:
        """The chosen index; None where the list is empty."""
        return self.list.value

    def _move(self, step: int) -> None:
        if self.list.options:
            self.list.index = ((self.list.index or 0) + step) % len(self.list.options)


def labelled(control: widgets.Widget) -> widgets.Widget:
    """Gives a control the common width; returns it."""
    control.style.description_width, control.layout = "9em", WIDE
    return control


@contextlib.contextmanager
def unobserved(widget: widgets.Widget, handler: Callable) -> Iterator[None]:
    """Keeps changes of the widget's value within the block from calling the handler."""
    widget.unobserve(handler, "value")
    try:
        yield
    finally:
        widget.observe(handler, "value")


def refill(dropdown: widgets.Dropdown, options: Sequence[tuple[str, object]]) -> None:
    """Replaces the entries of a list and chooses the first."""
    dropdown.options = options
    dropdown.index = 0 if options else None  # a list that was empty stays without a choice


def live_curves() -> Callable[[pd.DataFrame], None]:
    """Returns a function that draws training curves into this cell; pass it to a fit as `watch`.

    It updates one output, which holds the last state after a headless run.
    """
    handle = display(display_id=True)

    def watch(log: pd.DataFrame) -> None:
        """Draws the log in place of the previous drawing."""
        figure = training_curves(log)[0].figure
        plt.close(figure)  # otherwise the inline backend shows it twice
        handle.update(figure)

    return watch


class PhotographBrowser:
    """The controls and the pictures of `browse_photographs`; `widget` holds them."""

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
        listed = name in photographs.names
        names = photographs.names if listed else [query, *photographs.names]
        options = [(printable(entry), entry) for entry in names]
        self.query = widgets.Dropdown(
            options=options, value=name if listed else query, description="query"
        )
        self.across = widgets.IntRangeSlider(description="left, right")
        self.down = widgets.IntRangeSlider(description="top, bottom")
        self.button = widgets.Button(
            description="search with this box", button_style="primary", layout=WIDE
        )
        self.preview = widgets.Image(format="jpeg")
        self.partner = widgets.Dropdown(options=[], description="matches with")
        self.ranking = FigureOutput(self._search)
        self.pair = FigureOutput(lambda: pair_figure(self.result, self.partner.value))
        self._open_query(box)
        self.query.observe(self._change_query, "value")
        for slider in (self.across, self.down):
            slider.observe(self._draw_preview, "value")
        self.button.on_click(self.ranking.redraw)
        self.partner.observe(self.pair.redraw, "value")
        self.ranking.draw()
        for control in (self.query, self.across, self.down, self.partner):
            labelled(control)
        controls = widgets.VBox([self.query, self.across, self.down, self.button])
        top = widgets.HBox([controls, self.preview])
        self.widget = widgets.VBox([top, self.ranking.widget, self.partner, self.pair.widget])

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The box (x0, y0, x1, y1) in pixels of the upright photograph; None: all of it."""
        (x0, x1), (y0, y1) = self.across.value, self.down.value
        whole = (0, 0, self.across.max, self.down.max)
        return None if (x0, y0, x1, y1) == whole else (x0, y0, x1, y1)

    def _change_query(self, _: object) -> None:
        try:
            self._open_query(None)
        except PhotographError as error:
            self.ranking.show_error(str(error))

    def _open_query(self, box: Sequence[int] | None) -> None:
        from vitgal.stages.own import find_query

        name, path = find_query(self.photographs, self.query.value)
        image = read_upright(path)
        try:
            _, (x0, y0, x1, y1) = crop_box(image, box)
        except ValueError as error:
            raise PhotographError(f"{name}: {error}") from None
        height, width = image.shape[:2]
        self.reduced, self.factor = reduce_image(image, PREVIEW)
        for slider, low, high, end in ((self.across, x0, x1, width), (self.down, y0, y1, height)):
            with unobserved(slider, self._draw_preview):
                slider.min, slider.max = 0, end
                slider.value = (low, high)
        self._draw_preview()

    def _draw_preview(self, _: object = None) -> None:
        (x0, x1), (y0, y1) = self.across.value, self.down.value
        x0, y0, x1, y1 = (round(side * self.factor) for side in (x0, y0, x1, y1))
        image: np.ndarray = self.reduced // 3 + 160
        image[y0:y1, x0:x1] = self.reduced[y0:y1, x0:x1]
        corner = (max(x0, x1 - 1), max(y0, y1 - 1))
        cv2.rectangle(image, (x0, y0), corner, style.BOX_RGB, 2)
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.preview.value = jpeg.tobytes()

    def _search(self) -> None:
        from vitgal.stages.own import search_folder

        self.result = search_folder(self.photographs, self.query.value, self.box, self.settings)
        ranking_figure(self.result, columns=self.columns)
        entries = [
            (f"{row.rank}  {printable(row.photograph)}", row.photograph)
            for row in self.result.table.head(LISTED).itertuples()
        ]
        with unobserved(self.partner, self.pair.redraw):
            refill(self.partner, entries)
        self.pair.draw()


def browse_photographs(
    photographs: "Photographs",
    query: str,
    box: Sequence[int] | None,
    settings: RerankingSettings,
    *,
    columns: int = 7,
) -> widgets.VBox:
    """Shows a browser over one's own photographs; a search with a new box runs the network once.

    query: the first one, as `search_folder` takes it. box: its box (x0, y0, x1, y1) in pixels of
    the upright photograph; None: all of it. settings: of every search. columns: photographs in a
    row of the ranking. Raises PhotographError where the first search fails.
    """
    return PhotographBrowser(photographs, query, box, settings, columns).widget
