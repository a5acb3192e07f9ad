"""Diagrams of a computation: its steps as boxes with arrows between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.files import map_array
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval.ranking import Ranking
from vitgal.retrieval.verification import inspect_pair
from vitgal.settings import GlobalSettings, RerankingSettings
from vitgal.viz.drawing import drawable, hide_frame, sentence_figure, text_width
from vitgal.viz.style import CAPTION_SIZE, CURVE_COLOURS, INK, STEP_COLOUR, styled

ROW = 0.95  # inches from one row of boxes to the next
GAP = 0.28  # inches between two boxes
MATCHED = {  # in a diagram's words, by `matching`
    "one_way": "nearest",
    "mutual": "nearest both ways",
    "ratio": "nearest by ratio",
    "mutual_ratio": "both ways, by ratio",
}


@dataclass(frozen=True)
class Step:
    """A step of a diagram: its name, the shape of the result, and a short note."""

    name: str
    shape: str
    note: str

    @property
    def width(self) -> float:
        """The inches that the longest line needs; bold letters are a sixth wider."""
        widths = (
            1.17 * text_width(drawable(self.name), CAPTION_SIZE),
            text_width(drawable(self.shape), 9),
            text_width(drawable(self.note), CAPTION_SIZE),
        )
        return max(widths) / 72 + 0.16


@styled
def step_diagram(steps: Sequence[Step], *, width: float = 10.0) -> Axes:
    """Draws steps as boxes with arrows between them, row by row as `width` inches allow.

    Returns the axes, in inches; a sentence where there is no step.
    """
    if not steps:
        return sentence_figure("no steps")
    placed, left, row = [], 0.05, 0
    for step in steps:
        if placed and left + step.width > width - 0.05:
            left, row = 0.05, row + 1
        placed.append((step, left, row))
        left += step.width + GAP
    height = ROW * (row + 1)
    _, axes = plt.subplots(figsize=(width, height))
    hide_frame(axes)
    axes.set(xlim=(0, width), ylim=(height, 0))
    for step, left, row in placed:
        middle = ROW * row + 0.47
        _draw_step(axes, step, left, middle)
        if left > 0.05:
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.0}
            axes.annotate("", (left, middle), (left - GAP, middle), arrowprops=arrow)
    return axes


def _draw_step(axes: Axes, step: Step, left: float, middle: float) -> None:
    corner, blue = (left, middle - 0.35), CURVE_COLOURS[0]
    axes.add_patch(
        Rectangle(corner, step.width, 0.7, facecolor=STEP_COLOUR, edgecolor=blue, linewidth=1)
    )
    for down, text, size, weight, colour in (
        (-0.19, step.name, CAPTION_SIZE, "bold", INK),
        (0.0, step.shape, 9, "normal", blue),
        (0.19, step.note, CAPTION_SIZE, "normal", INK),
    ):
        line = axes.text(left + step.width / 2, middle + down, drawable(text), fontsize=size)
        line.set(weight=weight, color=colour, ha="center", va="center")


def global_diagram(folder: Path) -> Axes:
    """Draws the steps from a photograph to a global descriptor and a position in a ranking.

    folder: a finished global stage, whose shapes are written into the diagram. Returns the axes.
    """
    manifest = runs.read_stage(folder, "04_global_evaluation")
    settings = GlobalSettings.from_manifest(manifest["parameters"])
    network = manifest["recorded"].get("weights") or ""
    images, dimension = map_array(folder / "database.npy").shape
    size, patches = settings.size, (settings.size // 16) ** 2
    tokens, mean = f"{patches} × {dimension}", f"mean of {len(settings.scales)} scale(s)"
    inner = [
        ("patches", tokens, "16 × 16 pixels each"),
        ("XCiT, 12 or 24 blocks", tokens, "cross-covariance attention"),
        ("multi-atrous", tokens, "five dilations and the mean"),
        ("class token joins", f"{patches + 1} × {dimension}", "learnt"),
        ("class attention, twice", f"1 × {dimension}", "the token looks at the patches"),
    ]
    if network.startswith(runs.TIMM):
        name = network.removeprefix(runs.TIMM).partition("@")[0]
        pooling = settings.pooling or "as it was made for"
        inner = [(name, "a map or tokens", "of timm"), ("pooling", f"1 × {dimension}", pooling)]
    steps = [
        ("photograph", "H × W × 3", "cut to the query's box"),
        ("network input", f"{size} × {size} × 3", "about; resized, normalised"),
        *inner,
        (mean, f"{dimension}", "each of length 1, and so the mean"),
        ("similarities", f"{images:,}", "inner products with the database"),
        ("ranking", f"{images:,}", "sorted; ties by index"),
    ]
    return step_diagram([Step(*step) for step in steps])


def reranking_diagram(
    benchmark: RetrievalDataset, folder: Path, query: int, settings: RerankingSettings
) -> Axes:
    """Draws the steps from a query and its first candidate to a number of inliers.

    folder: `<run>/<dataset>` with the finished stages global and local, whose shapes are
    written into the diagram. Raises ValueError for a query that does not exist.
    """
    truth = benchmark.ground_truth
    query = revisited.check_query(truth, query)
    store = FeatureStore.open(folder / "local")
    features = store[truth.queries[query]]
    ranked = Ranking.load(folder / "global").order[:, query].tolist()
    names = (benchmark.database[image] for image in ranked)
    name = next((name for name in names if name in store), None)
    candidate = features if name is None else store[name]
    pair = inspect_pair(features, candidate, settings)
    first, second, matches = len(features), len(candidate), len(pair.matches)
    order = "similarity and count" if settings.order == "fused" else settings.count
    steps = [
        ("query's features", f"{first} × {features.code_dim}", "codes; places (x, y) beside"),
        ("candidate's features", f"{second} × {candidate.code_dim}", "the first candidate's"),
        ("distances", f"{first} × {second}", "Euclidean, between codes"),
        ("matches", f"{matches} × 2", f"{MATCHED[settings.matching.method]}, near enough"),
        ("places of matches", f"{matches} × 4", "x y in both network inputs"),
        ("homography", "3 × 3", f"the best of {settings.verification.iterations:,} draws"),
        ("inliers", f"{pair.verification.count} of {matches}", "mapped within the threshold"),
        ("short list", f"{len(ranked):,} ranks", f"first {settings.top} by {order}"),
    ]
    return step_diagram([Step(*step) for step in steps])
