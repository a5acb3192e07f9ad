"""Diagrams of a computation: its steps as boxes, or one photograph on its way."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
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
from vitgal.viz import drawing
from vitgal.viz.maps import component_colours, mix_heat
from vitgal.viz.style import CAPTION_SIZE, INK, OURS_COLOUR, STEP_COLOUR, styled

WIDTH = 10.0  # inches
ROW = 0.95  # inches from one row of boxes to the next
GAP = 0.28  # inches between two boxes
STEP_LINES = (  # name, shape and note: inches below the middle, size, weight, colour
    (-0.19, CAPTION_SIZE, "bold", INK),
    (0.0, 9, "normal", OURS_COLOUR),
    (0.19, CAPTION_SIZE, "normal", INK),
)
MATCHED = {  # in a diagram's words, by `matching`
    "one_way": "nearest",
    "mutual": "nearest both ways",
    "ratio": "nearest by ratio",
    "mutual_ratio": "both ways, by ratio",
}


@styled
def step_diagram(steps: Sequence[tuple[str, str, str]]) -> Axes:
    """Draws steps as boxes with arrows between them, row by row as WIDTH inches allow.

    steps: of each its name, the shape of the result, and a short note. Returns the axes, in inches;
    a sentence where there is no step.
    """
    if not steps:
        return drawing.sentence_figure("no steps")
    corners, left, row = [], 0.05, 0
    for step in steps:
        wide = _step_width(*step)
        if corners and left + wide > WIDTH - 0.05:
            left, row = 0.05, row + 1
        corners.append((left, ROW * row + 0.12, wide))
        left += wide + GAP
    height = ROW * (row + 1)
    _, axes = plt.subplots(figsize=(WIDTH, height))
    drawing.hide_frame(axes)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    for step, (left, top, wide) in zip(steps, corners, strict=True):
        box = Rectangle((left, top), wide, 0.7, facecolor=STEP_COLOUR, linewidth=1)
        box.set_edgecolor(OURS_COLOUR)
        axes.add_patch(box)
        middle = top + 0.35
        for text, (down, size, weight, colour) in zip(step, STEP_LINES, strict=True):
            line = axes.text(left + wide / 2, middle + down, drawing.drawable(text), fontsize=size)
            line.set(weight=weight, color=colour, ha="center", va="center")
        if left > 0.05:
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.0}
            axes.annotate("", (left, middle), (left - GAP, middle), arrowprops=arrow)
    return axes


def _step_width(name: str, shape: str, note: str) -> float:
    """The inches that the longest line needs; bold letters are a sixth wider."""
    lines = ((name, 1.17 * CAPTION_SIZE), (shape, 9), (note, CAPTION_SIZE))
    return max(drawing.text_width(drawing.drawable(text), size) for text, size in lines) / 72 + 0.16


def global_diagram(folder: Path) -> Axes:
    """Draws the steps from a photograph to a global descriptor and a position in a ranking.

    folder: a finished global stage, whose shapes are written into the diagram. Returns the axes.
    """
    manifest = runs.read_stage(folder, "04_global_evaluation")
    settings = GlobalSettings.from_manifest(manifest["parameters"])
    recorded = manifest["recorded"]
    network, patch = recorded.get("weights") or "", recorded.get("patch", 16)
    trunk, note = "XCiT, 12 or 24 blocks", "cross-covariance attention"
    if "architecture" in recorded:
        trunk, note = recorded["architecture"].removeprefix(runs.TIMM), "of timm"
    joining = "the tokens' GeM" if recorded.get("class_token") == "gem" else "learnt"
    images, dimension = map_array(folder / "database.npy").shape
    size, patches = settings.size, (settings.size // patch) ** 2
    tokens, mean = f"{patches} × {dimension}", f"mean of {len(settings.scales)} scale(s)"
    inner = [
        ("patches", tokens, f"{patch} × {patch} pixels each"),
        (trunk, tokens, note),
        ("multi-atrous", tokens, "five dilations and the mean"),
        ("class token joins", f"{patches + 1} × {dimension}", joining),
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
    return step_diagram(steps)


@styled
def flow_figure(
    image: drawing.ImageSource,
    box: Sequence[float] | None,
    maps: Mapping[str, Sequence[np.ndarray]],
    descriptor: np.ndarray,
    patch: int = 16,
) -> np.ndarray:
    """Draws one photograph's way to its descriptor: patches, tokens, attention, vector.

    image: the photograph. box: its part that the network sees (x0, y0, x1, y1), in pixels; None:
    all. maps: `training.token_maps` of that part alone. descriptor: (D,). patch: its side in pixels
    of the network's input. Tokens are coloured by their first three principal components. Returns
    the axes, shape (5,).
    """
    picture = drawing.read_pixels(image)
    x0, y0, x1, y1 = (int(v) for v in box) if box is not None else (0, 0, *picture.shape[1::-1])
    x0, y0 = max(0, x0), max(0, y0)
    tokens, heat = maps["tokens"][0], maps["backbone_attention"][0]
    rows, columns, width = tokens.shape
    figure, axes = plt.subplots(1, 5, figsize=(10, 2.5))
    crop = cv2.resize(
        picture[y0:y1, x0:x1], (16 * columns, 16 * rows), interpolation=cv2.INTER_AREA
    )
    drawing.draw_photograph(axes[0], picture, 2)
    drawing.draw_box(axes[0], (x0, y0, x1, y1))
    drawing.draw_photograph(axes[1], crop, 2)
    for lines, count, side in ((axes[1].axvline, columns, 16), (axes[1].axhline, rows, 16)):
        for number in range(1, count):
            lines(side * number - 0.5, color="white", linewidth=0.7)
    drawing.draw_photograph(
        axes[2], np.repeat(np.repeat(component_colours([tokens])[0], 16, 0), 16, 1), 2
    )
    drawing.draw_photograph(axes[3], mix_heat(crop, heat, (0, 0, crop.shape[1], crop.shape[0])), 2)
    _draw_vector(axes[4], descriptor)
    shape = f"{rows} × {columns}"
    captions = (
        ("photograph", "and the query's box"),
        ("patches", f"{shape} of {patch} × {patch} pixels"),
        ("tokens", f"{shape} × {width}, as colours"),
        ("attention", "of the class token"),
        ("descriptor", f"{len(descriptor)} numbers, length 1"),
    )
    for axis, (name, note) in zip(axes, captions, strict=True):
        axis.set_title(name, fontweight="bold")
        axis.set_xlabel(note, fontsize=CAPTION_SIZE)
        axis.set_anchor("C")
    for ends in itertools.pairwise(axes):
        drawing.draw_arrow(ends, (1.01, 0.5), (-0.01, 0.5), color=INK)
    figure.get_layout_engine().set(w_pad=0.12)
    return axes


def _draw_vector(axes: Axes, descriptor: np.ndarray) -> None:
    """Draws a vector (D,) as rows of eight cells, coloured by sign and size."""
    side = -(-len(descriptor) // 8)
    cells = np.pad(
        descriptor.astype(float), (0, 8 * side - len(descriptor)), constant_values=np.nan
    )
    reach = np.abs(descriptor).max() or 1
    axes.imshow(cells.reshape(side, 8), cmap="PuOr", vmin=-reach, vmax=reach, aspect=8 / side)
    drawing.hide_frame(axes)


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
        ("query's features", f"{first} × {features.code_dim}", "codes; positions (x, y) beside"),
        ("candidate's features", f"{second} × {candidate.code_dim}", "the first candidate's"),
        ("distances", f"{first} × {second}", "Euclidean, between codes"),
        ("matches", f"{matches} × 2", f"{MATCHED[settings.matching.method]}, near enough"),
        ("positions of matches", f"{matches} × 4", "x y in both network inputs"),
        ("homography", "3 × 3", f"the best of {settings.verification.iterations:,} draws"),
        ("inliers", f"{pair.verification.count} of {matches}", "mapped within the threshold"),
        ("short list", f"{len(ranked):,} ranks", f"first {settings.top} by {order}"),
    ]
    return step_diagram(steps)
