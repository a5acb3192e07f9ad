"""Inspects a pair of a run's images: matches under other settings, kept and dropped tokens.

Matching uses stored features and takes milliseconds. Attention and dropped tokens are not stored:
they take one pass of the network a photograph, are computed on demand and kept in memory.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.images import crop_box, read_image, resize
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.files import map_array
from vitgal.features.local import LocalFeatures
from vitgal.features.store import FeatureStore
from vitgal.retrieval.evidence import weigh
from vitgal.retrieval.verification import MIN_MATCHES, PairInspection, inspect_pair
from vitgal.settings import GlobalSettings, LocalSettings, RerankingSettings
from vitgal.stages.rerank import LOCAL_NOTEBOOK, inlier_counts

SWEPT_VALUES = {  # the values that `sweep` tries
    "max_distance": tuple(np.round(np.arange(0.3, 1.21, 0.05), 2).tolist()),
    "threshold": (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0),
    "max_keypoints": (25, 50, 100, 200, 300, 400, 600, 800, 1000),
}
REASONS = {
    "overlap": "its patch overlaps a better one",
    "candidates": "not among the candidates of suppression",
    "keypoints": "more than max_keypoints",
}
UNLIMITED = 10**9


class InspectionError(runs.UserError, ValueError):
    """A photograph or a pair cannot be inspected; the message gives reason and remedy."""


@dataclass(frozen=True, eq=False)
class ComparedPair:
    """The features of a query and a database image, and their matches and verification."""

    query: LocalFeatures
    database: LocalFeatures
    result: PairInspection

    def sentence(self) -> str:
        """Returns the outcome in words."""
        count, verification = len(self.result.matches), self.result.verification
        if not len(self.query) or not len(self.database):
            side = "query" if not len(self.query) else "database image"
            return f"the {side} has no local features left: nothing to match"
        if count < MIN_MATCHES:
            return (
                f"{count} matches: below {MIN_MATCHES} no homography is fitted and no inlier "
                "counted, as published"
            )
        if verification.homography is None:
            return f"no homography fits the {count} matches: no inlier"
        evidence = weigh(self.query, self.database, self.result)
        spread = f" over {evidence.spread:.0%} of the image" if evidence.spread >= 0 else ""
        doubt = f"; implausible: {evidence.doubt}" if evidence.doubt else ""
        return (
            f"{evidence.inliers} inliers of {count} matches, on {evidence.features} features"
            f"{spread}, outline {evidence.area:.0%} of the query{doubt}"
        )


def without_scales(features: LocalFeatures, hidden: Sequence[float]) -> LocalFeatures:
    """Returns the features of other scales than the hidden ones (to a thousandth).

    Suppression is not repeated.
    """
    distance = np.abs(features.scales[:, None] - np.asarray(hidden, np.float32)[None])
    return features.subset((distance > 1e-3).all(axis=1))


def compare(
    query: LocalFeatures,
    database: LocalFeatures,
    settings: RerankingSettings,
    *,
    hidden_scales: Sequence[float] = (),
) -> ComparedPair:
    """Matches and verifies the features of two photographs, leaving out some scales.

    `max_keypoints` of the settings counts the features that are left.
    """
    kept = slice(settings.matching.max_keypoints)
    query, database = (
        without_scales(features, hidden_scales).subset(kept) for features in (query, database)
    )
    return ComparedPair(query, database, inspect_pair(query, database, settings))


def sweep(
    query: LocalFeatures, database: LocalFeatures, settings: RerankingSettings
) -> pd.DataFrame:
    """Compares one pair under other values of one parameter at a time.

    Returns rows of `parameter`, `value`, `matches`, `inliers`, over SWEPT_VALUES; those of
    max_keypoints end with the number of features.
    """
    most = max(len(query), len(database))
    rows = []
    for parameter, values in SWEPT_VALUES.items():
        if parameter == "max_keypoints":
            values = [*(value for value in values if value < most), most]
        for value in values:
            result = compare(query, database, changed_settings(settings, {parameter: value})).result
            rows.append((parameter, value, len(result.matches), result.verification.count))
    return pd.DataFrame(rows, columns=["parameter", "value", "matches", "inliers"])


def changed_settings(settings: RerankingSettings, values: Mapping[str, Any]) -> RerankingSettings:
    """Returns reranking settings with other values of the fields that `values` names.

    Other names are ignored. Raises SettingsError for a value that is not allowed.
    """
    fields = vars(settings) | vars(settings.matching) | vars(settings.verification)
    return RerankingSettings.from_manifest(fields | values)


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Attention, scores and features of one photograph, or of its box; maps by scale, float32."""

    attention: dict[float, np.ndarray]  # (heads, h, w), each head's class attention over its peak
    scores: dict[float, np.ndarray]  # (h, w) of mean 1 over heads, by which tokens are chosen
    kept: LocalFeatures  # as extraction returns them
    dropped: LocalFeatures  # tokens above the threshold that are not kept, best first
    reasons: np.ndarray  # (len(dropped),) strings, keys of REASONS
    codes: dict[float, np.ndarray]  # (h, w, D), the code of every token, of length 1
    norms: dict[float, np.ndarray]  # (h, w), the lengths that the codes had

    def heat(self, scale: float, head: int | None = None) -> np.ndarray:
        """Returns the map of a head, or the scores, of shape (h, w) at the nearest scale."""
        nearest = self.nearest_scale(scale)
        return self.scores[nearest] if head is None else self.attention[nearest][head]

    def nearest_scale(self, scale: float) -> float:
        """Returns the scale of the selection that is nearest to one."""
        return min(self.scores, key=lambda candidate: abs(candidate - scale))

    def patch_box(self, scale: float, row: int, column: int) -> tuple[float, ...]:
        """Returns a token's patch (x0, y0, x1, y1) in pixels of the photograph."""
        (x0, y0, x1, y1), (height, width) = self.kept.box, self.scores[scale].shape
        across, down = (x1 - x0) / width, (y1 - y0) / height
        left, top = x0 + column * across, y0 + row * down
        return left, top, left + across, top + down

    def patch_at(self, x: float, y: float, scale: float) -> tuple[float, int, int]:
        """Returns nearest scale, row and column of the token at a pixel of the photograph.

        Raises InspectionError for a pixel outside the described box.
        """
        scale = self.nearest_scale(scale)
        (x0, y0, x1, y1), (height, width) = self.kept.box, self.scores[scale].shape
        row, column = (y + 0.5 - y0) / (y1 - y0) * height, (x + 0.5 - x0) / (x1 - x0) * width
        if not (0 <= row < height and 0 <= column < width):
            raise InspectionError("this place is outside the part of the photograph described")
        return scale, int(row), int(column)


class _Recorder:
    """A model for `compute_tokens` that keeps its outputs, one a scale."""

    def __init__(self, model: Any) -> None:
        self.model, self.outputs = model, []
        self.code_dim, self.patch, self.multiple = model.code_dim, model.patch, model.multiple

    def token_codes(self, images: Any) -> Any:
        """Computes the TokenCodes of images (1, 3, H, W)."""
        self.outputs.append(self.model.token_codes(images))
        return self.outputs[-1]


def explain_selection(
    model: Any,
    image: np.ndarray,
    box: Sequence[float] | None = None,
    settings: LocalSettings | None = None,
) -> TokenSelection:
    """Extracts a photograph's kept and dropped local features in one pass.

    model: a ViTGaL with autoencoder, or a TokenNetwork. image: (H, W, 3) uint8 RGB. box: (x0, y0,
    x1, y1) in pixels, the part that is described. Raises ValueError where the box does not fit the
    image, or the model has no autoencoder.
    """
    from vitgal.models.descriptors import compute_tokens, select_features, token_scores
    from vitgal.models.inference import device_of, inference, network_input
    from vitgal.models.prepared import prepare

    settings = settings or LocalSettings()
    model = prepare(model, settings.precision)
    recorder = _Recorder(model)
    crop, box = crop_box(image, box)
    suppressed = replace(settings, max_keypoints=UNLIMITED)
    unlimited = replace(suppressed, nms_candidates=UNLIMITED, nms_overlap=1.0)
    with inference(model, settings.precision):
        pixels = resize(crop, settings.size, "area", model.multiple)
        images = network_input(pixels[None], device_of(model))
        tokens = compute_tokens(recorder, images, settings)
        kept, survivors, everything = (
            select_features(tokens, [(box, image.shape[:2])], selection)[0]
            for selection in (settings, suppressed, unlimited)
        )
        attention, scores, codes, norms = {}, {}, {}, {}
        for scale, output in zip(settings.scales, recorder.outputs, strict=True):
            heads = output.attention[0].float()
            heads = (heads / heads.amax(dim=1, keepdim=True)).cpu().numpy()
            attention[scale] = heads.reshape(len(heads), *output.grid)
            scores[scale] = token_scores(output.attention)[0].cpu().numpy().reshape(output.grid)
            unit = output.codes[0].float().cpu().numpy()
            length = np.linalg.norm(unit, axis=1, keepdims=True)
            unit /= np.maximum(length, 1e-12)
            codes[scale], norms[scale] = unit.reshape(*output.grid, -1), length.reshape(output.grid)
    reasons = np.full(len(everything), "overlap", dtype="<U10")
    reasons[settings.nms_candidates :] = "candidates"
    reasons[_among(everything, survivors)] = "keypoints"
    dropped = ~_among(everything, kept)
    dropped_features = everything.subset(dropped)
    return TokenSelection(attention, scores, kept, dropped_features, reasons[dropped], codes, norms)


def similar_patches(
    code: np.ndarray, other: TokenSelection, *, count: int = 3
) -> tuple[dict[float, np.ndarray], list[tuple[float, int, int]]]:
    """Compares a token's code (D,) of length 1 with every token of another photograph.

    Returns scale -> (h, w) float32 similarities, and scale, row and column of the most similar
    tokens over all scales, best first.
    """
    maps = {scale: codes @ code for scale, codes in other.codes.items()}
    flat = np.concatenate([values.ravel() for values in maps.values()])
    scales = np.repeat(list(maps), [values.size for values in maps.values()])
    cells = np.concatenate([np.indices(values.shape).reshape(2, -1) for values in maps.values()], 1)
    best = np.argsort(-flat, kind="stable")[:count]
    return maps, [(float(scales[index]), *cells[:, index].tolist()) for index in best]


def matching_fraction(extracted: LocalFeatures, stored: LocalFeatures) -> float:
    """Returns the fraction of stored features that another extraction repeats; 1 for none.

    Features are compared by position and scale. Another batch or precision changes the last bits of
    a score, which can drop a feature at a threshold.
    """
    return float(_among(stored, extracted).mean()) if len(stored) else 1.0


def _among(features: LocalFeatures, others: LocalFeatures) -> np.ndarray:
    """(N,) bool: which features have the position and scale of one of the others."""
    keys, other_keys = (
        list(zip(*part.keypoints.T.tolist(), part.scales.tolist(), strict=True))
        for part in (features, others)
    )
    stored = set(other_keys)
    return np.array([key in stored for key in keys], bool)


@dataclass(eq=False)
class Inspector:
    """The images of a run and their stored features, read on demand.

    A side is "query" or "database". selections: (side, index) -> results of `selection`.
    """

    run: Path
    dataset: RetrievalDataset
    weights: str | None = None  # the model that stage local used; None: the run's own
    selections: dict[tuple[str, int], TokenSelection] = field(default_factory=dict)

    @functools.cached_property
    def features(self) -> FeatureStore:
        """The store of stage local."""
        return FeatureStore.open(self.run / self.dataset.name / "local")

    @functools.cached_property
    def _manifest(self) -> dict:
        return runs.read_stage(self.run / self.dataset.name / "local", LOCAL_NOTEBOOK)

    @functools.cached_property
    def settings(self) -> LocalSettings:
        """The settings that features were extracted with, from the manifest of stage local."""
        # The manifest records the precision that "auto" was resolved to.
        precision = self._manifest["recorded"].get("precision", "fp32")
        return LocalSettings.from_manifest(self._manifest["parameters"] | {"precision": precision})

    @property
    def shows_tokens(self) -> bool:
        """Whether the features are tokens, so that attention and dropped tokens can be shown."""
        return self.settings.own_tokens and "local features" not in self._manifest["inputs"]

    @functools.cached_property
    def _model(self) -> Any:
        """The model that extracted the features; InspectionError for any other."""
        from vitgal.models import inference
        from vitgal.models.sources import weights_fingerprint
        from vitgal.models.token_network import local_network
        from vitgal.stages.codes import read_codes

        if not self.shows_tokens:
            raise InspectionError(
                "the local features are no tokens of a network (local is "
                f"{self._manifest['parameters'].get('local', 'a file')}): there is no attention "
                "and no dropped token to show"
            )
        source = runs.model_file(self.run, self.weights)
        if weights_fingerprint(source) != self._manifest["inputs"]["weights"]:
            raise InspectionError(
                f"{source} is not the model that the local features were extracted with: set "
                f"weights as in {LOCAL_NOTEBOOK}"
            )
        codes = self._manifest["inputs"].get("codes")
        return local_network(
            inference.open_model(source, inference.pick_device()),
            self.settings,
            codes and read_codes(self.run, codes),
        )

    def name(self, side: str, index: int) -> str:
        """Returns the name of an image; InspectionError where there is no such index."""
        names = self.dataset.ground_truth.queries if side == "query" else self.dataset.database
        if not 0 <= index < len(names):
            kind = "query" if side == "query" else "database image"
            raise InspectionError(
                f"there is no {kind} {index}: {self.dataset.name} has 0 to {len(names) - 1}"
            )
        return names[index]

    def image(self, side: str, index: int) -> np.ndarray:
        """Returns the photograph (H, W, 3) uint8 RGB, as stored."""
        self.name(side, index)
        paths = self.dataset.query_paths if side == "query" else self.dataset.database_paths
        return self._read(paths[index])

    @functools.cached_property
    def _read(self) -> Callable[[Path], np.ndarray]:
        return functools.lru_cache(maxsize=4)(read_image)  # the last four stay in memory

    def stored(self, side: str, index: int) -> LocalFeatures:
        """Returns the features of stage local, or of `selection` where the stage has none.

        Raises InspectionError for a database image that is on no short list.
        """
        name = self.name(side, index)
        if name in self.features:
            return self.features[name]
        if (side, index) in self.selections:
            return self.selections[side, index].kept
        if name in self.features.failures:
            raise InspectionError(f"{name} could not be read: {self.features.failures[name]}")
        raise InspectionError(
            f"{name} is on no short list, so {LOCAL_NOTEBOOK} extracted no features of it: run "
            "the network on it, which takes one pass"
        )

    def selection(self, side: str, index: int) -> TokenSelection:
        """Returns the selection of a photograph's tokens; the first call runs the network."""
        if (side, index) not in self.selections:
            boxes, image = self.dataset.ground_truth.boxes, self.image(side, index)
            cropped = side == "query" and self.settings.crop_queries
            self.selections[side, index] = explain_selection(
                self._model, image, boxes[index].tolist() if cropped else None, self.settings
            )
        return self.selections[side, index]

    def pair(
        self,
        query: int,
        image: int,
        settings: RerankingSettings,
        *,
        hidden_scales: Sequence[float] = (),
    ) -> ComparedPair:
        """Compares a query and a database image from their stored features, as `compare` does."""
        features = self.stored("query", query), self.stored("database", image)
        return compare(*features, settings, hidden_scales=hidden_scales)

    def choose(self, query: int, image: int | None = None) -> int:
        """Returns `image`, or for None the verified image of most inliers, hard ones first.

        Raises InspectionError where there is no such index, or nothing was verified.
        """
        self.name("query", query)
        if image is not None:
            self.name("database", image)
            return image
        counts = self.counts(query)
        if not counts:
            raise InspectionError(
                f"query {self.name('query', query)} has no verified image: set image_index"
            )
        hard = set(self.dataset.ground_truth.hard[query].tolist())
        return min(counts, key=lambda other: (other not in hard, -counts[other], other))

    def counts(self, query: int) -> dict[int, int]:
        """Returns the inlier counts of a query's verified images, by database index."""
        return inlier_counts(self.run / self.dataset.name / "rerank", query)


def query_flow(
    folder: Path, benchmark: RetrievalDataset, source: str | Path, query: int
) -> tuple[np.ndarray, np.ndarray, dict[str, list[np.ndarray]], np.ndarray, int] | None:
    """Computes what `viz.flow_figure` draws of a query, by one pass of the network.

    folder: the finished global stage. source: its model. The box is squashed to a square. Returns
    the photograph (H, W, 3), its box, the maps of `training.token_maps`, the descriptor (D,) and a
    patch's side; None for networks that are not ViTGaL's, whose tokens need not lie on a grid.
    """
    from vitgal import training
    from vitgal.models.weights import load_model

    if str(source).startswith(runs.NETWORKS):
        return None
    settings = GlobalSettings.from_manifest(runs.read_stage(folder, "notebook 04")["parameters"])
    image = read_image(benchmark.query_paths[query])
    height, width = image.shape[:2]
    box = np.array([0, 0, width, height])
    if settings.crop_queries:
        box = benchmark.ground_truth.boxes[query].clip(0, box[[2, 3, 2, 3]]).astype(int)
    x0, y0, x1, y1 = box
    model = load_model(source)
    maps = training.token_maps(model, [image[y0:y1, x0:x1]], size=settings.size)
    return image, box, maps, map_array(folder / "queries.npy")[query], model.patch
