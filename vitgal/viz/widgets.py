"""Browsers for notebooks: choose a query, a pair or a knob's value, and see it drawn.

A thin layer of ipywidgets: what is drawn is the caller's function, usually a few lines over
`plots`. A browser draws its first choice at once, also where nobody can click, so that a notebook
that is executed headlessly runs the same code and fails where the drawing fails. Later, under a
person's hand, an error is shown in its own words where the picture would be.

Pictures are `widgets.Image` and words `widgets.HTML`, never `widgets.Output`: that one makes the
headless client answer on the socket where it awaits the cell's end, by which about one cell in a
hundred waited for ever.
"""

import contextlib
import html
import io
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS, RetrievalDataset
from vitgal.retrieval import verification
from vitgal.stages.inspection import InspectionError, Inspector, Pair
from vitgal.viz import figures, matching, training_curves

NARROW = widgets.Layout(width="3em")
WIDE = widgets.Layout(width="26em")
LIST = widgets.Layout(width="36em")  # a name, what it is and its numbers
LABELLED = {"style": {"description_width": "9em"}, "layout": WIDE}
NATURAL = widgets.Layout(align_self="flex-start", max_width="100%")  # not stretched


class Screen:
    """Where a browser shows what is drawn: a line of words, and the pictures under it."""

    def __init__(self) -> None:
        self.words = widgets.HTML()
        self.pictures = widgets.VBox()
        self.widget = widgets.VBox([self.words, self.pictures])

    def draw(self, work: Callable[..., object], *choice: object) -> None:
        """Shows the figures that `work(*choice)` makes and what it prints; raises what it raises.

        The figures are closed; those that others have open are left alone.
        """
        pictures, words = _drawn(work, *choice)
        self.show(pictures, words)

    def redraw(self, work: Callable[..., object], *choice: object) -> None:
        """`draw` under a person's hand: an error is shown in place of the picture."""
        try:
            self.draw(work, *choice)
        except Exception as error:
            self.show([], _told(error), failed=True)

    def show(self, pictures: Sequence[bytes], words: str = "", *, failed: bool = False) -> None:
        """Shows .png pictures and words, red where something failed."""
        colour = "color:#A31621;" if failed else ""
        self.words.value = (
            f"<pre style='{colour}white-space:pre-wrap'>{html.escape(words.strip())}</pre>"
        )
        shown = self.pictures.children
        if len(shown) != len(pictures):  # else the old ones are filled anew, without flicker
            shown = [widgets.Image(format="png", layout=NATURAL) for _ in pictures]
        for image, picture in zip(shown, pictures, strict=True):
            image.value = picture
        self.pictures.children = tuple(shown)


def _drawn(work: Callable[..., object], *choice: object) -> tuple[list[bytes], str]:
    """The pictures of the figures that `work` opens, and the text that it prints."""
    others, text = set(plt.get_fignums()), io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            work(*choice)
        numbers = sorted(set(plt.get_fignums()) - others)
        return [_png(plt.figure(number)) for number in numbers], text.getvalue()
    finally:
        for number in set(plt.get_fignums()) - others:
            plt.close(number)


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    # Compressed least: a quarter of the time that a turn of a knob takes went into compressing.
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def _told(error: Exception) -> str:
    """An error in its own words; one that no person can put right with its kind and place."""
    if isinstance(error, runs.UserError):
        return str(error)
    (frame,) = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


def browse_queries(
    draw: Callable[[int], object], names: Sequence[str], *, first: int = 0
) -> widgets.VBox:
    """A browser over queries: a list to choose from, arrows for one by one.

    draw: called with the query's index; makes figures, which the browser shows and closes, and may
    print. names: of the queries. first: the index drawn at once. Returns the widget; as the last
    value of a cell it appears. No names: a browser that says so. Raises what `draw` raises, and
    IndexError for a first query that does not exist.
    """
    screen = Screen()
    chooser, row = _chooser("query", _numbered(names), first)
    work = _unless_empty(draw)
    chooser.observe(lambda _: screen.redraw(work, chooser.value), "value")
    screen.draw(work, chooser.value)
    return widgets.VBox([row, screen.widget])


def _unless_empty(draw: Callable[..., object]) -> Callable[..., object]:
    """The drawing, which says so where there is nothing to choose from."""

    def work(*choice: int | None) -> None:
        if None in choice:
            print("nothing to choose from")
        else:
            draw(*choice)

    return work


Options = Sequence[tuple[str, int]]


def _numbered(names: Sequence[str]) -> Options:
    return [(f"{index}  {name}", index) for index, name in enumerate(names)]


def _chooser(label: str, options: Options, first: int) -> tuple[widgets.Dropdown, widgets.HBox]:
    """A list to choose from and two arrows; its value is an index, None where it is empty."""
    values = [value for _, value in options]
    if options and first not in values:
        raise IndexError(f"there is no {label} {first}: choose 0 to {len(options) - 1}")
    value = first if options else None
    chooser = widgets.Dropdown(options=options, value=value, description=label, layout=LIST)
    arrows = [_arrow(chooser, sign, step) for sign, step in (("◀", -1), ("▶", 1))]
    return chooser, widgets.HBox([chooser, *arrows])


def _arrow(chooser: widgets.Dropdown, sign: str, step: int) -> widgets.Button:
    """A button that moves the choice by one place, round the ends."""
    button = widgets.Button(description=sign, layout=NARROW)

    def move(_: object) -> None:
        if chooser.options:
            chooser.index = ((chooser.index or 0) + step) % len(chooser.options)

    button.on_click(move)
    return button


@contextlib.contextmanager
def unobserved(widget: widgets.Widget, handler: Callable) -> Iterator[None]:
    """Changes of the widget's value within do not call the handler."""
    widget.unobserve(handler, "value")
    try:
        yield
    finally:
        widget.observe(handler, "value")


def refill(chooser: widgets.Dropdown, options: Options) -> None:
    """Gives a list other entries and chooses the first of them."""
    chooser.options = options
    chooser.index = 0 if options else None  # a list that was empty stays without a choice


def live_curves() -> Callable[[pd.DataFrame], None]:
    """Training curves that grow in the cell: give it to a fit as `watch`.

    The returned function draws the log so far into one output that it updates; where nobody looks
    (a headless run) the executed notebook holds the last state.
    """
    handle = display(display_id=True)

    def watch(log: pd.DataFrame) -> None:
        figure = training_curves.training_curves(log)[0].figure
        plt.close(figure)  # else the inline backend shows it a second time
        handle.update(figure)

    return watch


SORTS = {"lowest AP": "ap", "AP lost by reranking": "change", "worst miss": "miss"}


def browse_failures(
    run: Path,
    dataset: RetrievalDataset | str,
    *,
    by: str = "ap",
    protocol: str = "medium",
    reranked: bool = True,
    **options: Any,
) -> widgets.VBox:
    """A browser over a run's queries, the worst first.

    by: "ap", "change" or "miss" and protocol, chosen at first: of `figures.failure_table`.
    reranked: False looks at the global ranking alone. options: `figures.failure_figure`'s. Raises
    ValueError for an unknown `by` and what those raise.
    """
    if by not in SORTS.values():
        raise ValueError(f"by is {by!r}; queries are sorted by {', '.join(SORTS.values())}")
    protocols = widgets.Dropdown(options=PROTOCOLS, value=protocol, description="protocol")
    order = widgets.Dropdown(options=list(SORTS.items()), value=by, description="sorted by")

    def entries() -> Options:
        return _failures(run, dataset, order.value, protocols.value, reranked)

    found = entries()
    chooser, row = _chooser("query", found, found[0][1] if found else 0)
    screen = Screen()

    def draw(query: int) -> None:
        shown = dict(protocol=protocols.value, reranked=reranked, **options)
        figures.failure_figure(run, dataset, query, **shown)

    work = _unless_empty(draw)

    def show(_: object = None) -> None:
        screen.redraw(work, chooser.value)

    def resort(_: object) -> None:
        with unobserved(chooser, show):
            refill(chooser, entries())
        show()

    chooser.observe(show, "value")
    for control in (order, protocols):
        control.observe(resort, "value")
    screen.draw(work, chooser.value)
    return widgets.VBox([widgets.HBox([order, protocols]), row, screen.widget])


def _failures(
    run: Path, dataset: RetrievalDataset | str, by: str, protocol: str, reranked: bool
) -> Options:
    """The queries in their order, each with its AP in percent, before and after reranking."""
    table = figures.failure_table(run, dataset, by=by, protocol=protocol, reranked=reranked)
    after = [f" → {100 * ap:.0f}" if reranked else "" for ap in table["after"]]
    return [
        (f"{query}  {row.query}   AP {100 * row.before:.0f}{end}", int(query))
        for query, row, end in zip(table.index, table.itertuples(), after, strict=True)
    ]


class MatchInspector:
    """The controls and the picture of `inspect_matches`; `widget` is shown, the rest is for tests.

    inspector: what the run holds. options: of matching and verification, the sliders' first values.
    """

    def __init__(self, inspector: Inspector, query: int, image: int | None, options: dict) -> None:
        self.inspector, self.options, self.screen = inspector, options, Screen()
        benchmark = inspector.benchmark
        self.query, upper = _chooser("query", _numbered(benchmark.ground_truth.queries), query)
        entries = self._candidates(query)
        first = inspector.choose(query, image)
        if first not in [value for _, value in entries]:
            entries = [self._entry(first), *entries]
        self.image, lower = _chooser("image", entries, first)
        self.other = widgets.Text(placeholder="or another: name or index, Enter")
        self.other.continuous_update = False
        self._make_knobs()
        self._make_layers()
        self._connect()
        self.screen.draw(self._show)
        lower = widgets.HBox([*lower.children, self.other])
        knobs = widgets.VBox([self.distance, self.threshold, self.count, self.estimator])
        side = widgets.VBox([self.hidden, self.layers, self.heat, self.ask])
        self.widget = widgets.VBox([upper, lower, widgets.HBox([knobs, side]), self.screen.widget])

    def _candidates(self, query: int) -> Options:
        """A query's verified images, most inliers first, then nothing: others are typed in."""
        counts = self.inspector.counts(query)
        order = sorted(counts, key=lambda image: (-counts[image], image))
        return [self._entry(image, f", {counts[image]} inliers", query) for image in order]

    def _entry(self, image: int, note: str = "", query: int | None = None) -> tuple[str, int]:
        query = self.query.value if query is None else query
        label = self.inspector.relevance(query, image)
        return f"{self.inspector.name('database', image)}  ({label}{note})", image

    def _make_knobs(self) -> None:
        given = self.options
        most = self.inspector.max_keypoints
        self.distance = widgets.FloatSlider(
            given.get("max_distance", 0.82), min=0, max=1.5, step=0.01, description="max_distance"
        )
        self.threshold = widgets.FloatSlider(
            given.get("threshold", 16.0), min=0.5, max=64, step=0.5, description="threshold (px)"
        )
        self.count = widgets.IntSlider(
            given.get("max_keypoints") or most, min=5, max=most, step=5, description="features"
        )
        self.estimator = widgets.Dropdown(
            options=list(verification.ESTIMATORS),
            value=given.get("estimator", "degensac"),
            description="estimator",
        )
        for knob in (self.distance, self.threshold, self.count, self.estimator):
            knob.style.description_width, knob.layout = "9em", WIDE

    def _make_layers(self) -> None:
        scales = [(f"{scale:g}", scale) for scale in self.inspector.scales]
        self.hidden = widgets.SelectMultiple(
            options=scales, description="hidden scales", rows=len(scales), **LABELLED
        )
        names = ["rejected matches", "outline", "dropped features"]
        self.layers = widgets.SelectMultiple(
            options=names, value=names[:2], description="drawn", rows=3, **LABELLED
        )
        self.heat = widgets.Dropdown(options=["none"], description="attention", **LABELLED)
        self.ask = widgets.Button(
            description="look with the network (one pass a photograph)", layout=WIDE
        )

    def _connect(self) -> None:
        self.query.observe(self._other_query, "value")
        self.image.observe(self._changed, "value")
        self.other.observe(self._typed, "value")
        knobs = (self.distance, self.threshold, self.count, self.estimator)
        for control in (*knobs, self.hidden, self.layers, self.heat):
            control.observe(self._changed, "value")
        self.ask.on_click(lambda _: self.screen.redraw(self._look))

    def _changed(self, _: object = None) -> None:
        self.screen.redraw(self._show)

    def _other_query(self, _: object) -> None:
        with unobserved(self.image, self._changed):
            refill(self.image, self._candidates(self.query.value))
        self._changed()

    def _typed(self, _: object) -> None:
        """Adds the database image that was typed to the list and chooses it."""
        if not self.other.value.strip():
            return
        try:
            image = self.inspector.find(self.other.value.strip())
        except InspectionError as error:
            self.screen.show([], str(error), failed=True)
            return
        if image not in [value for _, value in self.image.options]:
            with unobserved(self.image, self._changed):
                self.image.options = [self._entry(image), *self.image.options]
        if self.image.value == image:
            self._changed()
        else:
            self.image.value = image

    def pair(self) -> Pair:
        """The pair as the controls stand, compared from stored features."""
        if self.image.value is None:
            raise InspectionError("this query has no verified image: type any database image")
        return self.inspector.pair(
            *(self.query.value, self.image.value),
            **(self.options | {
                "max_distance": self.distance.value,
                "threshold": self.threshold.value,
                "max_keypoints": self.count.value,
                "estimator": self.estimator.value,
                "hidden_scales": self.hidden.value,
            }),
        )  # fmt: skip

    def _chosen(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("query", self.query.value), ("database", self.image.value)

    def _look(self) -> None:
        """One pass of the network over each of the two photographs; the rest is drawn from it."""
        looks = [self.inspector.look(*side) for side in self._chosen()]
        heads = len(next(iter(looks[0].attention.values())))
        names = ["all heads", *(f"head {head + 1}" for head in range(heads))]
        entries = [
            (f"{name}, scale {scale:g}", (name, scale))
            for scale in looks[0].attention
            for name in names
        ]
        if len(self.heat.options) == 1:
            nearest = min(looks[0].attention, key=lambda scale: abs(scale - 1))
            with unobserved(self.heat, self._changed):
                self.heat.options = [("none", "none"), *entries]
                self.heat.value = ("all heads", nearest)
            with unobserved(self.layers, self._changed):
                self.layers.value = (*self.layers.value, "dropped features")
        self._show()

    def _show(self) -> None:
        pair, layers = self.pair(), set(self.layers.value)
        looks = [self.inspector.looks.get(side) for side in self._chosen()]
        found = pair.found.verification
        print(f"{pair.sentence()}; features: {len(pair.query)} and {len(pair.database)}")
        if self.hidden.value:
            scales = ", ".join(f"{scale:g}" for scale in self.hidden.value)
            print(
                f"features of scale {scales} are hidden, not extracted anew: the others are those "
                "that passed suppression beside them"
            )
        wanted = "dropped features" in layers or self.heat.value != "none"
        if wanted and None in looks:
            print("attention and dropped features of this photograph: press the button")
        matching.inspection(
            *(self.inspector.image(*side) for side in self._chosen()),
            *(pair.query, pair.database, pair.found.matches, found.inliers),
            homography=found.homography,
            outline="outline" in layers,
            rejected="rejected matches" in layers,
            dropped=tuple(
                look.dropped if look and "dropped features" in layers else None for look in looks
            ),
            heat=tuple(self._map(look) for look in looks),
            titles=tuple(self.inspector.name(*side) for side in self._chosen()),
        )

    def _map(self, look: Any) -> np.ndarray | None:
        """The chosen heat map of a look; None without one."""
        if look is None or self.heat.value == "none":
            return None
        name, scale = self.heat.value
        if name == "all heads":
            return look.scores[scale]
        return look.attention[scale][int(name.removeprefix("head ")) - 1]


def inspect_matches(
    inspector: Inspector, query: int, image: int | None = None, **options: Any
) -> widgets.VBox:
    """The match inspector: any query against any database image, with the knobs of matching.

    query, image: indices drawn at first; image None: the query's verified image of most inliers.
    options: `inspection.compare`'s, the knobs' first values. A change recomputes from stored
    features; a button looks at both photographs with the network, once each. Raises what the first
    drawing raises.
    """
    return MatchInspector(inspector, query, image, options).widget
