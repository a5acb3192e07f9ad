"""Why two photographs match: what their local features were chosen from, and what a knob changes.

Matching and verification start from stored features and take milliseconds. What the store does not
keep, attention by head and the tokens that were dropped, comes from one pass of the network over a
photograph (`look`), asked for photograph by photograph and kept in memory.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.images import crop_box, read_image
from vitgal.data.images import resize as resize_image
from vitgal.data.revisited import RetrievalDataset
from vitgal.features.local import LocalFeatures
from vitgal.features.store.feature_store import FeatureStore
from vitgal.retrieval.pairs import PairInspection, inspect_pair
from vitgal.retrieval.verification import MIN_MATCHES
from vitgal.settings.sections import SelectionSettings
from vitgal.stages.rerank import inlier_counts
from vitgal.viz import rankings

LOCAL_NOTEBOOK = "05_local_extraction"
SUPPRESSION = {"overlap": "nms_overlap", "candidates": "nms_candidates", "keep": "max_keypoints"}
REASONS = {
    "overlap": "its patch overlaps a better one",
    "candidates": "not among the candidates of suppression",
    "keypoints": "more than max_keypoints",
}
KNOBS = {  # what `sweep` turns, and through which values
    "max_distance": tuple(np.round(np.arange(0.3, 1.21, 0.05), 2).tolist()),
    "threshold": (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0),
    "max_keypoints": (25, 50, 100, 200, 300, 400, 600, 800, 1000),
}


class InspectionError(runs.UserError, ValueError):
    """A photograph or a pair that cannot be looked at; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Look:
    """What the network made of one photograph, or of its box, on the way to local features.

    attention: scale -> (heads, h, w) float32, each head's class attention over its peak. scores:
    scale -> (h, w) float32, of mean 1: the mean over heads, by which tokens are chosen. kept: the
    features, as extraction gives them. dropped: those that passed the ladder of thresholds and are
    not kept, best first. reasons: (len(dropped),) strings, keys of REASONS.
    """

    attention: dict[float, np.ndarray]
    scores: dict[float, np.ndarray]
    kept: LocalFeatures
    dropped: LocalFeatures
    reasons: np.ndarray


def look(
    model: Any,
    image: np.ndarray,
    box: Sequence[float] | None = None,
    *,
    size: int = 512,
    precision: str = "fp32",
    **options: Any,
) -> Look:
    """One pass of the network over a photograph (H, W, 3) uint8 RGB, with all that it shows.

    box, size, precision, options: of `extraction.extract_local`, whose features are `kept`. Raises
    ValueError as it does.
    """
    from vitgal.models import inference, local_features

    defaults = dict(scales=SelectionSettings.scales, max_keypoints=1000, nms_candidates=1200)
    defaults |= dict(nms_overlap=0.5, target_per_scale=400, ladder=SelectionSettings.ladder)
    options = defaults | dict(interpolation="size") | options
    local_features.require_codes(model)
    crop, taken = crop_box(image, box)
    batch = resize_image(crop, size, "area")[None]
    with inference.inference(model, precision):
        images = inference.network_input(batch, next(model.parameters()).device)
        passes = {scale: _at_scale(model, images, scale, options) for scale in options["scales"]}
    frame = dict(input_size=batch.shape[1:3], box=taken, image_size=image.shape[:2])
    kept, dropped, reasons = _chosen(passes, options, frame)
    return Look(
        {scale: found["attention"] for scale, found in passes.items()},
        {scale: found["map"] for scale, found in passes.items()},
        *(kept, dropped, reasons),
    )


def shared_features(found: LocalFeatures, stored: LocalFeatures) -> float:
    """The share of stored features that a pass found again, by place and scale; 1 without any.

    It is 1 where the pass computes as extraction did. Another batch or precision moves the last
    bits of a score, and with them a feature at a threshold.
    """
    if not len(stored):
        return 1.0
    places = [
        set(zip(*each.keypoints.T.tolist(), each.scales.tolist(), strict=True))
        for each in (found, stored)
    ]
    return len(places[0] & places[1]) / len(places[1])


def _at_scale(model: Any, images: Any, scale: float, options: Mapping) -> dict[str, np.ndarray]:
    """Attention and the tokens above the threshold at one scale, as `local_features` finds them."""
    from vitgal.data import images as data_images
    from vitgal.features import selection
    from vitgal.models import local_features

    resized, factors = local_features.rescale(images, scale, options["interpolation"])
    features = model.token_features(resized)
    scores = local_features.token_scores(features.attention)[0].cpu().numpy()
    target = options["target_per_scale"] * factors[0] * factors[1]
    tokens = selection.select_tokens(scores, target, options["ladder"])
    published = options["interpolation"] == "published"
    columns = resized.shape[-1] // data_images.PATCH if published else features.grid[1]
    heads = features.attention[0].float()
    heads = (heads / heads.amax(dim=1, keepdim=True)).cpu().numpy()
    return {
        "attention": heads.reshape(len(heads), *features.grid),
        "map": scores.reshape(features.grid),
        "boxes": selection.patch_boxes(tokens, columns, factors),
        "scores": scores[tokens],
        "scales": np.full(len(tokens), scale, np.float32),
        "codes": features.codes[0].float().cpu().numpy()[tokens],
    }


def _chosen(
    passes: Mapping[float, dict], options: Mapping, frame: Mapping
) -> tuple[LocalFeatures, LocalFeatures, np.ndarray]:
    """The features kept, those dropped and why, out of the tokens of all scales."""
    from vitgal.features import selection

    names = ("boxes", "scores", "scales", "codes")
    boxes, scores, scales, codes = (
        np.concatenate([found[name] for found in passes.values()]) for name in names
    )
    limits = {name: options[option] for name, option in SUPPRESSION.items()}
    order = np.argsort(-scores, kind="stable")
    survivors = selection.suppress(boxes, scores, **(limits | {"keep": len(scores)}))
    reason = np.full(len(scores), "overlap", dtype="<U10")
    reason[order[limits["candidates"] :]] = "candidates"
    reason[survivors[limits["keep"] :]] = "keypoints"
    kept = survivors[: limits["keep"]]
    dropped = order[~np.isin(order, kept)]
    length = np.linalg.norm(codes, axis=1, keepdims=True)
    every = LocalFeatures(
        selection.centres(boxes), codes / np.where(length > 0, length, 1), scores, scales, **frame
    )
    return every.subset(kept), every.subset(dropped), reason[dropped]


def without_scales(features: LocalFeatures, hidden: Sequence[float]) -> LocalFeatures:
    """The features that were not found at the hidden scales (to a thousandth).

    No re-extraction: the others are those that passed suppression beside the hidden ones.
    """
    apart = np.abs(features.scales[:, None] - np.asarray(hidden, np.float32)[None])
    return features.subset((apart > 1e-3).all(axis=1))


def map_near(found: Look, scale: float) -> np.ndarray:
    """The scores (h, w) of a look at its scale nearest to the one that is wanted."""
    return found.scores[min(found.scores, key=lambda one: abs(one - scale))]


@dataclass(frozen=True, eq=False)
class Pair:
    """A query and a database image, compared. found's matches point into query and database."""

    query: LocalFeatures
    database: LocalFeatures
    found: PairInspection

    def sentence(self) -> str:
        """The outcome in words."""
        count = len(self.found.matches)
        if not len(self.query) or not len(self.database):
            side = "query" if not len(self.query) else "database image"
            return f"the {side} has no local features left: nothing to match"
        if count < MIN_MATCHES:
            return (
                f"{count} matches: below {MIN_MATCHES} no homography is fitted and no inlier "
                "counted, as published"
            )
        if self.found.verification.homography is None:
            return f"no homography fits the {count} matches: no inlier"
        return f"{self.found.verification.count} inliers of {count} matches"


def compare(
    query: LocalFeatures,
    database: LocalFeatures,
    *,
    hidden_scales: Sequence[float] = (),
    max_keypoints: int | None = None,
    **options: Any,
) -> Pair:
    """Matches and verifies two photographs' features, without those of some scales.

    max_keypoints: so many of each that are left, best first. options: `reranking.inspect_pair`'s.
    """
    one, other = (
        without_scales(features, hidden_scales).subset(slice(max_keypoints))
        for features in (query, database)
    )
    return Pair(one, other, inspect_pair(one, other, **options))


def sweep(query: LocalFeatures, database: LocalFeatures, **options: Any) -> pd.DataFrame:
    """What each knob does to one pair, the others as in `options`: matches and inliers.

    Returns rows of `knob`, `value`, `matches`, `inliers`, over the values in KNOBS; more features
    than there are is not asked for.
    """
    most = max(len(query), len(database))
    rows = []
    for knob, values in KNOBS.items():
        for value in values:
            if knob == "max_keypoints" and value > most:
                continue
            found = compare(query, database, **(options | {knob: value})).found
            rows.append((knob, value, len(found.matches), found.verification.count))
    return pd.DataFrame(rows, columns=["knob", "value", "matches", "inliers"])


@dataclass(eq=False)
class Inspector:
    """A run's queries and database images, their stored features, and the looks asked for so far.

    run, dataset: of the finished stages. weights: the model of stage local; None: the run's own.
    crop_queries: as in that stage. Nothing is read before it is asked for.
    """

    run: Path
    benchmark: RetrievalDataset
    weights: str | None = None
    crop_queries: bool = True
    looks: dict[tuple[str, int], Look] = field(default_factory=dict)

    @functools.cached_property
    def features(self) -> FeatureStore:
        """The store of stage local."""
        return FeatureStore.open(self._folder)

    @property
    def _folder(self) -> Path:
        return self.run / self.benchmark.name / "local"

    @functools.cached_property
    def scales(self) -> tuple[float, ...]:
        """The scales that features were extracted at."""
        return tuple(self._manifest["parameters"]["scales"])

    @property
    def max_keypoints(self) -> int:
        """The most features that an image can have."""
        return self._manifest["parameters"]["max_keypoints"]

    def find(self, text: str) -> int:
        """A database image by its index or its name; InspectionError where there is none."""
        if text.isdecimal():
            self.name("database", int(text))
            return int(text)
        if text in self.benchmark.database:
            return self.benchmark.database.index(text)
        close = [name for name in self.benchmark.database if text.lower() in name.lower()][:3]
        hint = f"; do you mean {' or '.join(close)}?" if close else ""
        raise InspectionError(f"there is no database image {text!r}{hint}")

    @functools.cached_property
    def _manifest(self) -> dict:
        return runs.read_stage(self._folder, LOCAL_NOTEBOOK)

    @functools.cached_property
    def _model(self) -> Any:
        """The model that extracted the features; InspectionError for any other."""
        from vitgal.models import inference

        source = runs.model_file(self.run, self.weights)
        if inference.weights_fingerprint(source) != self._manifest["inputs"]["weights"]:
            raise InspectionError(
                "these weights are not those that the local features were extracted with: set "
                f"weights as in {LOCAL_NOTEBOOK}"
            )
        return inference.open_model(source, inference.pick_device())

    def name(self, side: str, index: int) -> str:
        """The name of a query (side "query") or a database image (side "database").

        Raises InspectionError where there is no such index.
        """
        names = self.benchmark.ground_truth.queries if side == "query" else self.benchmark.database
        if not 0 <= index < len(names):
            what = "query" if side == "query" else "database image"
            raise InspectionError(
                f"there is no {what} {index}: {self.benchmark.name} has 0 to {len(names) - 1}"
            )
        return names[index]

    def box(self, side: str, index: int) -> tuple[float, ...] | None:
        """What of the photograph is described: a query's box, else all (None)."""
        if side == "database" or not self.crop_queries:
            return None
        return tuple(map(float, self.benchmark.ground_truth.boxes[index]))

    def image(self, side: str, index: int) -> np.ndarray:
        """The photograph (H, W, 3) uint8 RGB, as stored."""
        self.name(side, index)
        paths = self.benchmark.query_paths if side == "query" else self.benchmark.database_paths
        return self._read(paths[index])

    @functools.cached_property
    def _read(self) -> Any:
        """Decodes a file; the last few stay in memory while knobs are turned."""
        return functools.lru_cache(maxsize=4)(read_image)

    def stored(self, side: str, index: int) -> LocalFeatures:
        """The features of stage local, or of a look where the stage has none.

        Raises InspectionError for a database image of no short list, which 05 has not visited.
        """
        name = self.name(side, index)
        if name in self.features:
            return self.features[name]
        if (side, index) in self.looks:
            return self.looks[side, index].kept
        if name in self.features.failures:
            raise InspectionError(f"{name} could not be read: {self.features.failures[name]}")
        raise InspectionError(
            f"{name} is on no short list, so {LOCAL_NOTEBOOK} extracted no features of it: look at "
            "it with the network, which takes one pass"
        )

    def look(self, side: str, index: int) -> Look:
        """One pass of the network over the photograph, the first time it is asked for."""
        if (side, index) not in self.looks:
            given = self._manifest["parameters"]
            known = ("scales", "max_keypoints", "nms_candidates", "nms_overlap")
            known += ("target_per_scale", "ladder", "interpolation", "size", "precision")
            options = {"ladder": SelectionSettings.ladder} | {
                name: given[name] for name in known if name in given
            }
            options["precision"] = self._manifest["recorded"].get("precision", "fp32")
            self.looks[side, index] = look(
                self._model, self.image(side, index), self.box(side, index), **options
            )
        return self.looks[side, index]

    def pair(self, query: int, image: int, **options: Any) -> Pair:
        """A query and a database image, compared (`compare`) from what is stored."""
        return compare(self.stored("query", query), self.stored("database", image), **options)

    def choose(self, query: int, image: int | None = None) -> int:
        """The database image as it is, or for None the query's verified one of most inliers.

        A hard one where there is any. Raises InspectionError for an index that does not exist, and
        where None cannot be resolved because nothing was verified.
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
        hard = set(self.benchmark.ground_truth.hard[query].tolist())
        return min(counts, key=lambda other: (other not in hard, -counts[other], other))

    def counts(self, query: int) -> dict[int, int]:
        """The inlier counts of a query's verified images, by database index."""
        return inlier_counts(self.run / self.benchmark.name / "rerank", query)

    def relevance(self, query: int, image: int) -> str:
        """What the ground truth says of the pair: easy, hard, junk or negative."""
        return rankings.relevance(self.benchmark.ground_truth, query, [image])[0]
