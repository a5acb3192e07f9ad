"""A run as one JSON document that the front end draws: rankings, scores, pairs, a map."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.images import ImageError, read_image, stored_size
from vitgal.data.photographs import read_upright
from vitgal.data.revisited import PROTOCOLS, RetrievalDataset
from vitgal.evaluation import comparison
from vitgal.evaluation.scores import Scores, read_scores
from vitgal.features.files import map_array
from vitgal.features.local import LocalFeatures
from vitgal.features.store import FeatureStore
from vitgal.retrieval import exact_search
from vitgal.retrieval.evidence import weigh
from vitgal.retrieval.ranking import Ranking
from vitgal.retrieval.verification import PairInspection, inspect_shortlist
from vitgal.runs import printable
from vitgal.settings import LocalSettings, RerankingSettings
from vitgal.stages import rerank
from vitgal.stages.inspection import Inspector
from vitgal.viz.run_figures import GLOBAL_NOTEBOOK, crops_queries, last_positive

NOTES = "notes.json"  # of a run: stars and remarks on queries and pairs
MOST_MAPPED = 8000  # database images on the map and with neighbours: t-SNE takes minutes for more
MOST_MAPPED_AT_ONCE = 1000  # the same in a notebook, where a cell may take seconds
NEIGHBOURS = 24  # of a database image
MOST_INLIERS, MOST_REJECTED = 500, 200  # matches of a pair that are stored
SCORE_PARTS = ("map", "interval", "mp_at", "ap")


@dataclass(eq=False)
class Images:
    """The images that a document shows, each file once, numbered in the order of their mention.

    A document shares the lists of names, sizes and indices. sizes: [width, height] of each in
    pixels, [0, 0] where it is unreadable.
    """

    paths: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # as they are printed
    sizes: list[list[int]] = field(default_factory=list)
    enlarged: set[int] = field(default_factory=set)  # numbers of those that a pair shows
    indices: list[int | None] = field(default_factory=list)  # in the database, if it is in it
    upright: bool = False  # whether all are turned by their EXIF orientation
    _numbers: dict[Path, int] = field(default_factory=dict)

    def number(self, path: Path, name: str, size: Sequence[int] | None = None) -> int:
        """Returns the number of an image; the first mention adds it.

        size: (height, width) in pixels; None: as the file is stored.
        """
        if path not in self._numbers:
            self._numbers[path] = len(self.paths)
            self.paths.append(path)
            self.names.append(printable(name))
            self.indices.append(None)
            self.sizes.append(_size(path) if size is None else [int(size[1]), int(size[0])])
        return self._numbers[path]

    def database_image(self, dataset: RetrievalDataset, index: int) -> int:
        """Returns the number of a database image, as `number` does."""
        number = self.number(dataset.database_paths[index], dataset.database[index])
        self.indices[number] = index
        return number

    def read(self, number: int) -> np.ndarray:
        """Reads an image by its number, (H, W, 3) uint8 RGB; ImageError or PhotographError."""
        return (read_upright if self.upright else read_image)(self.paths[number])

    def document(self, entries: Sequence[dict[str, Any]], **parts: Any) -> dict[str, Any]:
        """Returns a document of these entries and further parts in plain values."""
        whole = runs.plain({"entries": entries, "comparisons": [], "notes": {}} | parts)
        return whole | {"names": self.names, "sizes": self.sizes, "indices": self.indices}


def _size(path: Path) -> list[int]:
    try:
        return list(stored_size(path))[::-1]
    except (ImageError, OSError):
        return [0, 0]


def run_document(
    run_folders: Sequence[Path], *, ranks: int = 100, pairs: int = 4
) -> tuple[dict[str, Any], Images]:
    """Describes the results of runs as plain values, one entry per run and data set.

    A query has the `inliers` of each of its `verified` images and the `probability` that the image
    shows its landmark, None where it is unknown.

    ranks: images of each ranking, at most. pairs: matched images per query: the first after
    reranking, and the positive ranked last. Returns the document, and the images whose numbers it
    uses. Raises StageError where a run holds no finished global stage, FileNotFoundError where a
    run or its data set is missing.
    """
    images = Images()
    entries = [
        _Entry(Path(run), dataset, images, ranks)
        for run in run_folders
        for dataset in _datasets(Path(run))
    ]
    return _document(entries, pairs)


def dataset_document(run: Path, dataset: RetrievalDataset) -> tuple[dict[str, Any], Images]:
    """Describes a run's results on one opened data set as `run_document`, without pairs.

    It has no neighbours, which a kernel finds when they are asked for. With more than
    MOST_MAPPED_AT_ONCE database images it has no map unless a report has stored one.
    Raises StageError where the run has no global stage of this data set.
    """
    runs.read_stage(Path(run) / dataset.name / "global", GLOBAL_NOTEBOOK)
    return _document([_Entry(Path(run), dataset, Images(), at_once=True)], 0)


def _document(entries: Sequence["_Entry"], pairs: int) -> tuple[dict[str, Any], Images]:
    notes: dict[str, Any] = {}
    for run in dict.fromkeys(entry.run for entry in entries):
        notes |= read_notes(run)
    images = entries[0].images
    document = images.document(
        [entry.document(pairs) for entry in entries],
        notes=notes,
        comparisons=_comparisons(entries),
    )
    return document, images


def _datasets(run: Path) -> list[RetrievalDataset]:
    manifests = sorted(run.glob(f"*/global/{runs.MANIFEST}"))
    if not manifests:
        raise runs.StageError(f"{run} has no finished global stage: run {GLOBAL_NOTEBOOK} first")
    datasets = []
    for manifest in manifests:
        recorded = runs.read_stage(manifest.parent, GLOBAL_NOTEBOOK)["recorded"]
        folder = runs.data_folder(run, recorded.get("dataset_dir"), "benchmark")
        distractors = recorded.get("distractors")
        datasets.append(
            revisited.open_dataset(
                manifest.parents[1].name,
                folder,
                distractors=None if distractors is None else runs.resolve(distractors),
            )
        )
    return datasets


@dataclass(eq=False)
class _Entry:
    """One run's results on one data set."""

    run: Path
    dataset: RetrievalDataset
    images: Images
    ranks: int = 100
    at_once: bool = False  # only what takes seconds, for a notebook's cell

    @property
    def folder(self) -> Path:
        """`<run>/<dataset>`."""
        return self.run / self.dataset.name

    @functools.cached_property
    def reranked(self) -> bool:
        """Whether the run's rankings were reranked."""
        return (self.folder / "rerank" / runs.MANIFEST).exists()

    @functools.cached_property
    def before(self) -> Ranking:
        """The global ranking."""
        return Ranking.load(self.folder / "global")

    @functools.cached_property
    def after(self) -> dict[str, Ranking]:
        """The reranked rankings by protocol; empty without reranking."""
        names = PROTOCOLS if self.reranked else ()
        return {name: Ranking.load(self.folder / "rerank", name) for name in names}

    @functools.cached_property
    def scores(self) -> dict[str, Scores]:
        """The scores of the stages "global" and, if there is one, "reranked"."""
        folders = {"global": "global"} | ({"reranked": "rerank"} if self.reranked else {})
        return {name: read_scores(self.folder / folder) for name, folder in folders.items()}

    @property
    def newest(self) -> Scores:
        """The scores of the last stage."""
        return list(self.scores.values())[-1]

    def document(self, pairs: int) -> dict[str, Any]:
        """Returns the entry's plain values."""
        from tqdm.auto import tqdm

        truth = self.dataset.ground_truth
        count = len(truth.queries)
        queries = tqdm(range(count), desc="matching pairs", unit="query", disable=not pairs)
        return {
            "run": printable(self.run.name),
            "dataset": printable(self.dataset.name),
            "database": len(self.dataset.database),
            "settings": [[k, str(v)] for k, v in comparison.settings_of(self.newest).items()],
            "scores": {name: _result(values) for name, values in self.scores.items()},
            "tests": _sentences(self.newest),
            "matching": knobs(self._settings) if self.reranked else None,
            "features": self._extraction(),
            "queries": [self._query(query, pairs) for query in queries],
            "map": self._map(),
            "neighbours": self._neighbours(),
        }

    def _image(self, image: int) -> int:
        return self.images.database_image(self.dataset, image)

    def _numbers(self, images: np.ndarray) -> list[int]:
        return [self._image(image) for image in images.tolist() if image >= 0]

    def _query(self, query: int, pairs: int) -> dict[str, Any]:
        dataset, truth = self.dataset, self.dataset.ground_truth
        order = self.before.order[: self.ranks, query]
        similarities = map_array(self.folder / "global" / "similarities.npy")
        similarities = similarities[: self.ranks, query].astype(float)
        afters = {name: ranking.order[: self.ranks, query] for name, ranking in self.after.items()}
        counts = rerank.inlier_counts(self.folder / "rerank", query) if self.reranked else {}
        drawn = {image for column in (order, *afters.values()) for image in column.tolist()}
        counts = {image: count for image, count in counts.items() if image in drawn}
        shows = rerank.presence_probabilities(self.folder / "rerank", query) if counts else {}
        return {
            "image": self.images.number(dataset.query_paths[query], truth.queries[query]),
            "box": truth.boxes[query].tolist() if self._cropped else None,
            "labels": {
                label: self._numbers(getattr(truth, label)[query]) for label in revisited.LABELS
            },
            "before": self._numbers(order),
            "similarity": np.round(similarities, 4).tolist(),
            "after": {name: self._numbers(column) for name, column in afters.items()},
            "verified": [self._image(image) for image in counts],
            "inliers": list(counts.values()),
            "probability": [round(shows[n], 4) if n in shows else None for n in counts],
            "worst": self._worst(query),
            "pairs": self._pairs(query, self._chosen(query, pairs)),
        }

    @functools.cached_property
    def _cropped(self) -> bool:
        return crops_queries(self.folder)

    @functools.cached_property
    def _labelled(self) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
        """Protocol -> each query's positive and each query's ignored images."""
        truth = self.dataset.ground_truth
        return {
            protocol: (revisited.positives(truth, protocol), revisited.ignored(truth, protocol))
            for protocol in PROTOCOLS
        }

    def _worst(self, query: int) -> dict[str, Any]:
        """Protocol -> [image, rank before, rank after] of the positive that ranks last."""
        worst = {}
        for protocol in PROTOCOLS:
            positives, ignored = (images[query] for images in self._labelled[protocol])
            ranking = self.after.get(protocol, self.before)
            image, after = last_positive(ranking, query, positives, ignored)
            if image is not None:
                before = self.before.rank(query, np.array([image]), ignored)[0] + 1
                worst[protocol] = [self._image(image), before, after]
        return worst

    def _chosen(self, query: int, pairs: int) -> list[int]:
        """Database indices of the images whose matches are stored."""
        chosen = []
        for protocol in ("medium", "hard") if pairs else ():
            positives, ignored = (images[query] for images in self._labelled[protocol])
            ranking = self.after.get(protocol, self.before)
            order = ranking.order[:, query]
            chosen += order[~np.isin(order, ignored) & (order >= 0)][:pairs].tolist()
            last, _ = last_positive(ranking, query, positives, ignored)
            chosen += [] if last is None else [last]
        return list(dict.fromkeys(chosen))

    @functools.cached_property
    def _features(self) -> FeatureStore | None:
        """The local features; None where nothing was reranked or they were removed since."""
        kept = self.reranked and (self.folder / "local" / runs.MANIFEST).exists()
        return FeatureStore.open(self.folder / "local") if kept else None

    @functools.cached_property
    def _settings(self) -> RerankingSettings:
        return rerank.used_settings(self.folder / "rerank")

    def _extraction(self) -> dict[str, Any] | None:
        """What the local features are, for the knobs; None where the run keeps none."""
        if self._features is None:
            return None
        inspector = Inspector(self.run, self.dataset)
        return extraction_document(inspector.settings, tokens=inspector.shows_tokens)

    def _pairs(self, query: int, chosen: Sequence[int]) -> list[dict[str, Any]]:
        store, dataset = self._features, self.dataset
        name = dataset.ground_truth.queries[query]
        if store is None or name not in store:
            return []
        others = [
            (self._image(image), store[dataset.database[image]])
            for image in chosen
            if dataset.database[image] in store
        ]
        number = self.images.number(dataset.query_paths[query], name)
        return pair_documents(self.images, (number, store[name]), others, self._settings)

    def _map(self) -> dict[str, Any] | None:
        """Positions of queries and database images in the plane, the queries first."""
        truth, folder = self.dataset.ground_truth, self.folder / "global"
        database = map_array(folder / "database.npy")[:MOST_MAPPED]
        queries = map_array(folder / "queries.npy")
        if len(queries) + len(database) < 4:
            return None
        source = runs.output_fingerprint(folder, "database.npy", GLOBAL_NOTEBOOK)
        file = self.folder / "map" / f"{source[:16]}.npy"
        if not file.exists():
            if self.at_once and len(database) > MOST_MAPPED_AT_ONCE:
                return None
            runs.refuse_links([file.parent])
            runs.write_array(file, descriptor_map(np.concatenate([queries, database])))
        points = map_array(file)
        numbers = map(self.images.number, self.dataset.query_paths, truth.queries)
        numbers = [*numbers, *(self._image(index) for index in range(len(database)))]
        return {"images": numbers, "points": np.round(points, 3).ravel().tolist()}

    def _neighbours(self) -> dict[str, list[int]]:
        """Image -> the database images of nearest descriptors, best first, without itself."""
        if self.at_once:
            return {}
        database = map_array(self.folder / "global" / "database.npy")[:MOST_MAPPED]
        found = nearest_images(database, range(len(database)))
        return {
            str(self._image(image)): [self._image(other) for other in others]
            for image, others in enumerate(found)
        }


def nearest_images(database: np.ndarray, images: Sequence[int]) -> list[list[int]]:
    """Finds the NEIGHBOURS nearest rows of some rows of descriptors (N, D), without themselves.

    Returns the indices of each, best first.
    """
    count = min(NEIGHBOURS + 1, len(database))
    _, ranks = exact_search.search(database[list(images)], database, k=count)
    return [
        [other for other in column if other != image][:NEIGHBOURS]
        for image, column in zip(images, ranks.T.tolist(), strict=True)
    ]


def knobs(settings: RerankingSettings) -> dict[str, Any]:
    """Returns the settings of matching that can be turned in a notebook; None: no limit."""
    matching, verification = settings.matching, settings.verification
    return {
        "method": matching.method,
        "max_distance": matching.max_distance,
        "max_keypoints": matching.max_keypoints,
        "threshold": verification.threshold,
        "estimator": verification.estimator,
    }


def extraction_document(settings: LocalSettings, *, tokens: bool) -> dict[str, Any]:
    """Describes the local features: most of a photograph, scales, whether they are tokens."""
    scales = list(settings.scales) if tokens else []
    return {"most": settings.max_keypoints, "scales": scales, "tokens": tokens}


def read_notes(run: Path) -> dict[str, dict[str, Any]]:
    """Returns a run's stars and notes by query or pair; empty where it has no notes.json."""
    path = Path(run) / NOTES
    if not path.exists():
        return {}
    notes = runs.read_json(path)
    if not isinstance(notes, dict):
        raise runs.StageError(f"{path} holds no notes: move it away")
    return {
        name: {"star": bool(value.get("star")), "note": str(value.get("note", ""))}
        for name, value in notes.items()
        if isinstance(value, dict)
    }


def _result(scores: Scores) -> dict[str, Any]:
    return {
        protocol: {part: scores[protocol].get(part) for part in SCORE_PARTS}
        for protocol in PROTOCOLS
        if protocol in scores
    }


def _sentences(scores: Scores) -> dict[str, str]:
    """Protocol -> the test of reranking against the global ranking, in words."""
    if "global" not in scores:
        return {}
    names = ("global", "reranked")
    result = comparison.compare_results(scores["global"], scores, names=names)
    return {protocol: result.sentence(protocol) for protocol in result.tests}


def _comparisons(entries: Sequence["_Entry"]) -> list[dict[str, Any]]:
    """Compares the entries pairwise: `first` and `second`, and `tests` or the `reason` for none."""
    results = []
    for (first, one), (second, other) in itertools.combinations(enumerate(entries), 2):
        result: dict[str, Any] = {"first": first, "second": second}
        names = printable(one.run.name), printable(other.run.name)
        if one.run.name == other.run.name:
            names = ("the first", "the second")
        try:
            compared = comparison.compare_results(one.newest, other.newest, names=names)
        except ValueError as error:
            result["reason"] = str(error)
        else:
            result["tests"] = {name: compared.sentence(name) for name in compared.tests}
        results.append(result)
    return results


def pair_documents(
    images: Images,
    query: tuple[int, LocalFeatures],
    others: Sequence[tuple[int, LocalFeatures]],
    settings: RerankingSettings,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Matches a query with other images, describes the pairs, and has their images enlarged.

    query, others: numbers in the document, and features. device: as for `inspect_shortlist`.
    """
    number, first = query
    candidates = [features for _, features in others]
    inspections = inspect_shortlist(first, candidates, settings, device=device)
    images.enlarged |= {image for image, _ in [query, *others] if others}
    return [
        {"image": image} | pair_document(first, features, pair)
        for (image, features), pair in zip(others, inspections, strict=True)
    ]


def pair_document(
    query: LocalFeatures, database: LocalFeatures, inspection: PairInspection
) -> dict[str, Any]:
    """Describes the matches of one pair in plain values.

    Returns:
        `matches`, `count`, `features`: the numbers of matches, of inliers, and of the different
        features among these. `doubt`: why the homography is implausible (`Evidence.doubt`).
        `points`: x and y in the query and x and y in the database image of each of M stored
        matches, in pixels of the stored photographs; (0, 0) is the centre of the top-left one. The
        first MOST_INLIERS inliers and MOST_REJECTED others are stored, in the order of the query's
        features. `inlier`: M times 0 or 1. `distance`, `scale`, `score`: of each match; scale and
        score of the query's feature, None where unknown. `homography`:
        nine numbers from query to database pixels, or None.
    """
    inliers = inspection.verification.inliers
    kept = np.flatnonzero(inliers)[:MOST_INLIERS], np.flatnonzero(~inliers)[:MOST_REJECTED]
    kept = np.sort(np.concatenate(kept))
    first, second = inspection.matches[kept].T
    points = np.hstack([query.original_keypoints()[first], database.original_keypoints()[second]])
    between = query.descriptors[first] - database.descriptors[second]
    homography = inspection.verification.homography
    evidence = weigh(query, database, inspection)
    if homography is not None:
        homography = _to_photograph(database) @ homography @ np.linalg.inv(_to_photograph(query))
        homography = (homography / np.linalg.norm(homography)).ravel().tolist()
    return {
        "matches": len(inliers),
        "count": inspection.verification.count,
        "features": evidence.features,
        "doubt": evidence.doubt,
        "points": np.round(points.astype(float), 1).ravel().tolist(),
        "inlier": inliers[kept].astype(int).tolist(),
        "distance": np.round(np.linalg.norm(between, axis=1).astype(float), 3).tolist(),
        "scale": np.round(query.scales[first].astype(float), 3).tolist(),
        "score": np.round(query.scores[first].astype(float), 2).tolist(),
        "homography": homography,
    }


def _to_photograph(features: LocalFeatures) -> np.ndarray:
    """The (3, 3) matrix of `LocalFeatures.to_photograph`."""
    corners = np.array([[0, 0], [64, 0], [0, 64]], np.float32)
    affine = cv2.getAffineTransform(corners, features.to_photograph(corners))
    return np.vstack([affine, [0, 0, 1]])


def descriptor_map(descriptors: np.ndarray) -> np.ndarray:
    """Places descriptors (N, D) in the plane by PCA, then t-SNE (van der Maaten & Hinton, 2008).

    Returns (N, 2) float32 within the unit square. N is at least 4. The same input gives the same
    points.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, width = descriptors.shape
    reduced = PCA(min(50, count - 1, width), random_state=0).fit_transform(descriptors)
    perplexity = min(30.0, (count - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="random", random_state=0, n_jobs=1)
    points = tsne.fit_transform(reduced)
    low, high = points.min(axis=0), points.max(axis=0)
    return ((points - low) / np.maximum(high - low, 1e-9)).astype(np.float32)
