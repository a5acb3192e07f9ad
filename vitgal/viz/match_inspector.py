"""The match inspector: a query and a database image under any parameters of matching."""

from dataclasses import dataclass, replace

import ipywidgets as widgets
from matplotlib.axes import Axes

from vitgal.runs import printable
from vitgal.settings import RerankingSettings
from vitgal.settings.sections import ESTIMATORS, MATCHINGS
from vitgal.stages.inspection import ComparedPair, InspectionError, Inspector
from vitgal.viz.browsers import WIDE, Chooser, FigureOutput, Options, labelled, refill, unobserved
from vitgal.viz.matching import MatchedImage, match_lines

LAYERS = (  # as the fields of Layers
    ("rejected matches", "rejected"),
    ("outline", "outline"),
    ("dropped features", "dropped"),
)


@dataclass(frozen=True)
class Layers:
    """What `inspected_matches` draws besides the inliers.

    Attributes:
        rejected: the matches that are no inliers.
        outline: the query's box, and its image under the homography.
        dropped: crosses at dropped tokens.
        attention: scale and head (from 0; None: all) of the attention map; None: no map.
    """

    rejected: bool = True
    outline: bool = True
    dropped: bool = False
    attention: tuple[float, int | None] | None = None


def inspected_matches(
    inspector: Inspector,
    query: int,
    image: int,
    pair: ComparedPair,
    layers: Layers,
    *,
    max_lines: int = 100,
) -> Axes:
    """Draws the compared pair of a query and a database image, given by index.

    Attention and dropped tokens are drawn of those images for which `inspector.selection` has
    been called. layers: the drawn layers besides inliers. max_lines: most inliers, and most
    rejected matches, that are drawn.
    """
    sides = []
    for side, features in ((("query", query), pair.query), (("database", image), pair.database)):
        selection = inspector.selections.get(side)
        matched = MatchedImage(inspector.image(*side), features, inspector.name(*side))
        if selection and layers.dropped:
            matched = replace(matched, dropped=selection.dropped)
        if selection and layers.attention:
            matched = replace(matched, heat=selection.heat(*layers.attention))
        sides.append(matched)
    outline, rejected = layers.outline, layers.rejected
    return match_lines(*sides, pair.result, outline=outline, rejected=rejected, max_lines=max_lines)


class MatchInspector:
    """The controls and the picture of `inspect_matches`; `widget` holds them."""

    def __init__(
        self, inspector: Inspector, query: int, image: int | None, settings: RerankingSettings
    ) -> None:
        self.inspector, self.settings, self.output = inspector, settings, FigureOutput(self._draw)
        names = inspector.dataset.ground_truth.queries
        options = [(f"{index}  {printable(name)}", index) for index, name in enumerate(names)]
        self.query = Chooser("query", options, query)
        entries, first = self._candidates(), inspector.choose(query, image)
        if first not in [value for _, value in entries]:
            entries = [self._entry(first), *entries]
        self.image = Chooser("image", entries, first)
        self.other_image = widgets.Text(placeholder="or another: name or index, Enter")
        self.other_image.continuous_update = False
        self._make_controls()
        self.query.list.observe(self._change_query, "value")
        self.other_image.observe(self._add_image, "value")
        self.button.on_click(lambda _: self.output.redraw(work=self._look))
        parameters = (self.distance, self.matching, self.threshold, self.count, self.estimator)
        layers = (self.hidden_scales, self.layers, self.attention)
        for control in (self.image.list, *map(labelled, (*parameters, *layers))):
            control.observe(self.output.redraw, "value")
        self.output.draw()
        images = widgets.HBox([*self.image.widget.children, self.other_image])
        controls = widgets.HBox([widgets.VBox(parameters), widgets.VBox([*layers, self.button])])
        self.widget = widgets.VBox([self.query.widget, images, controls, self.output.widget])

    def _candidates(self) -> Options:
        counts = self.inspector.counts(self.query.value)
        order = sorted(counts, key=lambda image: (-counts[image], image))
        return [self._entry(image, f", {counts[image]} inliers") for image in order]

    def _entry(self, image: int, note: str = "") -> tuple[str, int]:
        label = self.inspector.relevance(self.query.value, image)
        return printable(f"{self.inspector.name('database', image)}  ({label}{note})"), image

    def _make_controls(self) -> None:
        matching, verification = self.settings.matching, self.settings.verification
        most = self.inspector.settings.max_keypoints
        distance, threshold = matching.max_distance, verification.threshold
        self.distance = widgets.FloatSlider(
            distance, min=0, max=max(1.5, distance), step=0.01, description="max_distance"
        )
        self.threshold = widgets.FloatSlider(
            threshold, min=0.5, max=max(64, threshold), step=0.5, description="threshold (px)"
        )
        count, least = matching.max_keypoints or most, min(5, most)
        self.count = widgets.IntSlider(count, min=least, max=most, step=5, description="features")
        self.estimator = widgets.Dropdown(
            options=ESTIMATORS, value=verification.estimator, description="estimator"
        )
        self.matching = widgets.Dropdown(
            options=MATCHINGS, value=matching.method, description="matching"
        )
        listed = self.inspector.settings.scales if self.inspector.shows_tokens else ()
        scales = [(f"{scale:g}", scale) for scale in listed]
        self.hidden_scales = widgets.SelectMultiple(
            options=scales, description="hidden scales", rows=len(scales)
        )
        self.layers = widgets.SelectMultiple(
            options=LAYERS, value=("rejected", "outline"), description="drawn", rows=3
        )
        self.attention = widgets.Dropdown(options=[("none", None)], description="attention")
        self.button = widgets.Button(
            description="look with the network (one pass a photograph)", layout=WIDE
        )

    def _change_query(self, _: object) -> None:
        with unobserved(self.image.list, self.output.redraw):
            refill(self.image.list, self._candidates())
        self.output.redraw()

    def _add_image(self, _: object) -> None:
        images, typed = self.image.list, self.other_image.value.strip()
        if not typed:
            return
        try:
            image = self.inspector.find(typed)
        except InspectionError as error:
            self.output.show_error(str(error))
            return
        with unobserved(images, self.output.redraw):
            if image not in [value for _, value in images.options]:
                images.options = [self._entry(image), *images.options]
            images.value = image
        self.output.redraw()

    def _sides(self) -> tuple[tuple[str, int], tuple[str, int]]:
        if self.image.value is None:
            raise InspectionError("this query has no verified image: type any database image")
        return ("query", self.query.value), ("database", self.image.value)

    def pair(self) -> ComparedPair:
        """Compares the chosen pair under the controls' current parameters."""
        distance, count = self.distance.value, self.count.value
        threshold, estimator = self.threshold.value, self.estimator.value
        matching, verification = self.settings.matching, self.settings.verification
        matching = replace(
            matching, max_distance=distance, max_keypoints=count, method=self.matching.value
        )
        verification = replace(verification, threshold=threshold, estimator=estimator)
        settings = replace(self.settings, matching=matching, verification=verification)
        (_, query), (_, image) = self._sides()
        return self.inspector.pair(query, image, settings, hidden_scales=self.hidden_scales.value)

    def _look(self) -> None:
        selection, _ = [self.inspector.selection(*side) for side in self._sides()]
        if len(self.attention.options) == 1:
            heads = len(next(iter(selection.attention.values())))
            names = {None: "all heads"} | {head: f"head {head + 1}" for head in range(heads)}
            maps = [
                (f"{name}, scale {scale:g}", (scale, head))
                for scale in selection.attention
                for head, name in names.items()
            ]
            nearest = min(selection.attention, key=lambda scale: abs(scale - 1))
            with unobserved(self.attention, self.output.redraw):
                self.attention.options = [("none", None), *maps]
                self.attention.value = (nearest, None)
            with unobserved(self.layers, self.output.redraw):
                self.layers.value = (*self.layers.value, "dropped")
        self._draw()

    def _draw(self) -> None:
        pair, sides = self.pair(), self._sides()
        print(f"{pair.sentence()}; features: {len(pair.query)} and {len(pair.database)}")
        if self.hidden_scales.value:
            scales = ", ".join(f"{scale:g}" for scale in self.hidden_scales.value)
            print(
                f"features of scale {scales} are hidden, not extracted anew: the others are those "
                "that passed suppression beside them"
            )
        drawn = [layer in self.layers.value for _, layer in LAYERS]
        layers = Layers(*drawn, self.attention.value)
        computed = self.inspector.selections.keys()
        if (layers.dropped or layers.attention) and not computed >= {*sides}:
            print("attention and dropped features of this photograph: press the button")
        inspected_matches(self.inspector, self.query.value, self.image.value, pair, layers)


def inspect_matches(
    inspector: Inspector, query: int, image: int | None, settings: RerankingSettings
) -> widgets.VBox:
    """Shows the match inspector; a change compares the stored features again.

    A button runs the network on both photographs, once each. query, image: indices drawn
    at first; image None: the verified one of most inliers. settings: of matching and
    verification; the controls' first values. Raises InspectionError where the first pair does
    not exist or cannot be compared.
    """
    return MatchInspector(inspector, query, image, settings).widget
