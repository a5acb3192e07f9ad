"""Every setting once: its default, unit and meaning, and whether it changes results or only speed.

A section is a frozen dataclass for one stage. Its defaults are those of the published code, or the
safe choice where nothing was published; the demo's values are in the notebooks and in params/.
A setting has two names: the field's (`GlobalSettings.size`), which stage manifests use, and a flat
one (`global_size`), which is unique and which notebooks, YAML files and the command line use.
"""

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from vitgal.runs.errors import short
from vitgal.settings.refinement import Step, read_chain
from vitgal.settings.section import Section, SettingsError, fact, later, neutral, path, setting
from vitgal.settings.training import SEED_MEANING, AutoencoderSettings, TrainingSettings


@dataclass(frozen=True)
class RunSettings(Section):
    """Where a run's inputs and outputs are. Contents are compared by fingerprint, never paths."""

    run_dir: str = neutral("", "run folder, below runs/ or $VITGAL_RUNS")
    overwrite: bool = neutral(False, "delete finished stages and make them again")
    verify: bool = neutral(False, "read images again even where sizes and times are the same")
    dataset: str = neutral("", "benchmark: its labels are gnd_<dataset>.pkl")
    dataset_dir: str | None = path("folder of jpg/ and gnd_<dataset>.pkl; None: the run's own")
    image_folder: str | None = path("folder of a/b/c/<id>.jpg; None: the run's own training images")
    distractors: str | None = path("folder of further database images (revisitop1m)")
    weights: str | None = path(
        "model file, or timm:NAME[@FILE]; None: the run's model, else the small weights of the "
        "checkout (own photographs: EfficientNet-Lite0 before these)"
    )
    descriptors: str | None = path("global descriptors of another system (.npy or .h5)")
    refine_set: str | None = path(
        "photographs, or descriptors of another system, from which a whitening is learnt; None: "
        "the run's training images"
    )
    recipe: str | None = neutral(None, "training settings: a file of params/recipes/")
    machine: str | None = neutral(None, "speed settings: a file of params/machines/")
    compared_run: str | None = neutral(None, "run to test against; None: global ranking alone")


@dataclass(frozen=True)
class DemoSettings(Section):
    """The simulated views of the bundled photographs."""

    seed: int = setting(0, SEED_MEANING, low=0)
    view_size: int = setting(256, "longer side", flat="demo_view_size", unit="pixels", low=32)
    train_views: int = setting(24, "views of each training photograph", flat="demo_views", low=1)


@dataclass(frozen=True)
class SplitSettings(Section):
    """How photographs of landmarks are divided into training and validation."""

    train_table: str | None = path("GLDv2's train.csv or train_clean.csv; None: the demo data")
    exclude: str | None = path("file of image or class ids to leave out")
    overlap_table: str | None = path("csv of classes known to overlap the test sets")
    seed: int = setting(0, SEED_MEANING, low=0)
    val_share: float = setting(
        0.1,
        "validation's fraction of the images that are not the first of their class",
        published=0.2,
        low=0,
        below=1,
    )
    held_out_classes: int = setting(0, "untrained classes, for retrieval validation", low=0)
    val_queries: int = setting(1000, "queries of retrieval validation, at most", low=0)
    val_database: int = setting(5000, "database images of retrieval validation, at most", low=0)
    min_val_images: int = setting(4, "images that a class needs to give a query", low=2)
    expected_images: int | None = neutral(None, "refuse a table of another size", low=1)
    expected_classes: int | None = neutral(None, "refuse a table of other classes", low=1)


PRECISIONS = ("fp32", "bf16", "auto")
RESIZE_MODES = ("squash", "longest", "area")
POOLINGS = ("class", "gem", "both")


@dataclass(frozen=True)
class GlobalSettings(Section):
    """Global descriptors, and the ranking that follows from them."""

    PREFIX: ClassVar[str] = "global_"
    PREFIXED: ClassVar[frozenset[str]] = frozenset({"size", "resize", "scales"})

    size: int | None = setting(
        None,
        "network input; its meaning depends on resize; None: the network's own (ViTGaL: 512)",
        unit="pixels",
        published=512,
        low=16,
    )
    resize: str = setting("squash", '"longest" and "area" keep the aspect', choices=RESIZE_MODES)
    scales: tuple[float, ...] = setting((1.0,), "of the input", above=0, high=16, filled=True)
    multiple: int | None = later(
        None,
        "number of which the network input's sides are multiples; None: the network's own",
        flat="size_multiple",
        unit="pixels",
        low=1,
    )
    pooling: str | None = later(
        None, "a timm network's: class token, GeM or both; None: as trained", choices=POOLINGS
    )
    crop_queries: bool = setting(True, "describe only the query's box, as in the protocol")
    precision: str = setting("fp32", "of inference", flat="inference_precision", choices=PRECISIONS)
    top: int = setting(100, "length of the short list", low=1)
    display: int = setting(1000, "ranks kept for display", low=1)
    index: str | None = later(None, 'faiss index, "IVF1024,PQ64; nprobe=32"; None: exact search')
    refine: tuple[str, ...] = later(
        (), 'steps that refine the ranking, such as "expansion" (docs/refinement.md)'
    )
    refine_images: int = later(20_000, "images from which a whitening is learnt, at most", low=2)

    max_failed_share: float = neutral(0.001, "unreadable images, as a fraction", low=0, high=1)

    def check(self) -> None:
        """Raises SettingsError for a chain of steps that makes no sense."""
        read_chain(self.refine)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the refinement, in order."""
        return read_chain(self.refine)


INTERPOLATIONS = ("size", "published")
FEATURE_DTYPES = ("float32", "float16", "int8", "bit")
# Thresholds on a token's score, whose mean over the image is 1; tried from the top. The published
# argument of 0.6 is never used, because halving 60 passes from 0.9375 to 0.47.
LADDER = (60.0, 30.0, 15.0, 7.5, 3.75, 1.875, 0.9375)


@dataclass(frozen=True)
class SelectionSettings(Section):
    """Which patch tokens become local features."""

    PREFIX: ClassVar[str] = "local_"
    PREFIXED: ClassVar[frozenset[str]] = frozenset({"size", "scales"})

    scales: tuple[float, ...] = setting(
        (0.3535, 0.5, 0.7071, 1.0, 1.4142), "of the network input", above=0, high=16, filled=True
    )
    max_keypoints: int = setting(1000, "features kept of an image", low=1)
    nms_candidates: int = setting(1200, "tokens that enter non-maximum suppression", low=1)
    nms_overlap: float = setting(0.5, "greatest overlap (IoU) of two features", low=0, high=1)
    target_per_scale: int = setting(400, "tokens wanted at scale 1", low=1)
    ladder: tuple[float, ...] = setting(LADDER, "falling thresholds on the score", filled=True)
    interpolation: str = setting(
        "size", '"published" loses a pixel at a few sizes', choices=INTERPOLATIONS
    )

    def check(self) -> None:
        """Raises SettingsError for thresholds that do not fall."""
        if any(a <= b for a, b in itertools.pairwise(self.ladder)):
            raise SettingsError(f"ladder: the thresholds must fall; got {short(self.ladder)}")


LOCAL_METHODS = ("tokens", "sift", "xfeat")


@dataclass(frozen=True)
class LocalSettings(SelectionSettings):
    """Local features of the images on the short lists."""

    PREFIXED: ClassVar[frozenset[str]] = SelectionSettings.PREFIXED | {"block"}

    local: str = later(
        "tokens", '"sift": RootSIFT; "xfeat" needs the extra baselines', choices=LOCAL_METHODS
    )
    local_features: str | None = path("local features of another system (hloc's .h5)")
    block: str | None = later(
        None, "block of a timm network; None: the last but two, or of stride 16"
    )
    code_dim: int = later(
        128, "dimension of a timm network's codes; by default at most its tokens'", low=1
    )
    code_images: str | None = path(
        "photographs that a timm network's codes are fitted to; None: the run's training split"
    )
    size: int = setting(512, "network input: the square root of its area", unit="pixels", low=16)
    crop_queries: bool = setting(True, "as in the global stage")
    precision: str = setting("fp32", "of inference", flat="inference_precision", choices=PRECISIONS)
    dtype: str = setting(
        "float16",
        "of stored descriptors",
        flat="feature_dtype",
        published="float32",
        choices=FEATURE_DTYPES,
    )
    shard_size: int = setting(256, "images a shard", low=1)
    max_failed_share: float = neutral(0.001, "unreadable images, as a fraction", low=0, high=1)

    def check(self) -> None:
        """Raises SettingsError for a method beside features that are there already."""
        super().check()
        if self.local != "tokens" and self.local_features is not None:
            raise SettingsError("set local or local_features, not both")

    def compared(self) -> dict[str, Any]:
        """Returns the parameters of extraction; for other methods without those of tokens."""
        values = super().compared()
        if self.own_tokens:
            return values
        unused = {entry.name for entry in dataclasses.fields(SelectionSettings)}
        unused |= {"precision", "block", "code_dim"}
        unused |= {"size"} if self.local_features is not None else set()
        return {name: values[name] for name in values if name not in unused - {"max_keypoints"}}

    @property
    def own_tokens(self) -> bool:
        """Whether local features are tokens of the model."""
        return self.local == "tokens" and self.local_features is None

    @property
    def method(self) -> str:
        """What the features are, in a word or two."""
        return "features of a file" if self.local_features is not None else self.local


MATCHINGS = ("one_way", "mutual", "ratio", "mutual_ratio")


@dataclass(frozen=True)
class MatchingSettings(Section):
    """Nearest neighbours among local descriptors."""

    max_distance: float = setting(0.82, "distance below which descriptors match; S24: 0.79", low=0)
    max_keypoints: int | None = setting(
        None, "features matched, best first; None: all", flat="match_keypoints", low=1
    )
    method: str = later(
        "one_way",
        '"mutual": nearest both ways; "ratio": Lowe\'s test; "mutual_ratio": both',
        flat="matching",
        choices=MATCHINGS,
    )
    ratio: float = later(
        0.95, "of Lowe's test: nearest over second nearest", flat="match_ratio", above=0, high=1
    )

    def compared(self) -> dict[str, Any]:
        """Returns the parameters, without a ratio that is not tested."""
        values = super().compared()
        if "ratio" not in self.method:
            values.pop("ratio", None)
        return values


ESTIMATORS = ("degensac", "magsac", "poselib")


@dataclass(frozen=True)
class VerificationSettings(Section):
    """A homography by RANSAC."""

    estimator: str = setting("degensac", "of the homography", choices=ESTIMATORS)
    threshold: float = setting(
        16.0, "reprojection error: one patch", unit="pixels of the network input", above=0
    )
    iterations: int = setting(2000, "maximum iterations of RANSAC", low=1)
    confidence: float = setting(1.0, "at which RANSAC stops; 1.0: never early", above=0, high=1)
    # For pydegensac a negative seed means the clock.
    seed: int = setting(0, SEED_MEANING, low=0, high=2**31 - 1)


TIES = ("global", "published")
COUNTS = ("inliers", "features")
ORDERS = ("inliers", "fused")


@dataclass(frozen=True)
class RerankingSettings(Section):
    """Short lists in order of their inliers, or of similarity and inliers together."""

    top: int = setting(100, "candidates of a query that are verified", low=1)
    ties: str = setting(
        "global", 'order of equal counts; "published": NumPy\'s unstable sort', choices=TIES
    )
    verification: VerificationSettings = VerificationSettings()
    matching: MatchingSettings = MatchingSettings()
    count: str = later(
        "inliers",
        '"features": different features among the inliers, on the side with fewer',
        choices=COUNTS,
    )
    order: str = later(
        "inliers",
        '"fused": by similarity and by how far the count exceeds chance; an implausible homography '
        "counts 0",
        choices=ORDERS,
    )
    fused_weight: float = later(
        2.0, "worth of the excess over chance, in deviations of similarity: see the glossary", low=0
    )
    fused_cap: int = later(60, "count above which no more is added", low=1)

    def compared(self) -> dict[str, Any]:
        """Returns the parameters, without those of an order that is not used."""
        values = super().compared()
        if self.order != "fused":
            values = {name: values[name] for name in values if not name.startswith("fused_")}
        return values


@dataclass(frozen=True)
class TuningSettings(Section):
    """The grid of settings, the current ones included, that is tried on val_retrieval."""

    PREFIX: ClassVar[str] = "tune_"
    PREFIXED: ClassVar[frozenset[str]] = frozenset(
        {"thresholds", "tops", "matchings", "estimators", "counts", "orders", "weights", "caps"}
    )

    tune: bool = neutral(False, "tune reranking on val_retrieval")
    max_queries: int | None = setting(None, "queries used; None: all", flat="tune_queries", low=1)
    max_distances: tuple[float, ...] = setting(
        (0.7, 0.75, 0.78, 0.8, 0.85, 0.9, 0.95),
        "values of max_distance",
        flat="tune_distances",
        above=0,
    )
    thresholds: tuple[float, ...] = setting((8.0, 32.0), "values of threshold", above=0)
    tops: tuple[int, ...] = setting((5, 10, 20, 50), "values of top", low=1)
    matchings: tuple[str, ...] = later(
        ("one_way", "mutual"), "values of matching", choices=MATCHINGS
    )
    estimators: tuple[str, ...] = later((), "values of estimator", choices=ESTIMATORS)
    counts: tuple[str, ...] = later(("inliers", "features"), "values of count", choices=COUNTS)
    orders: tuple[str, ...] = later(("inliers", "fused"), "values of order", choices=ORDERS)
    weights: tuple[float, ...] = later((1.0, 2.0, 4.0), "values of fused_weight", low=0)
    caps: tuple[int, ...] = later((15, 30), "values of fused_cap", low=1)


@dataclass(frozen=True)
class OwnSettings(Section):
    """A search among one's own photographs."""

    photographs_folder: str = path("photographs, also in sub-folders", "third_party/landmarks")
    query_image: str = neutral("", "a name in the folder, or any file")
    query_box: tuple[int, ...] | None = neutral(
        None, "x0, y0, x1, y1 of the query; None: all of it", unit="pixels", low=0
    )
    export_pairs: int = setting(0, "similar photographs a photograph in pairs.txt", low=0)
    export_features: bool = setting(False, "write features.h5 for hloc and COLMAP")

    def check(self) -> None:
        """Raises SettingsError for a box that is not four numbers."""
        if self.query_box is not None and len(self.query_box) != 4:
            raise SettingsError(f"query_box is {short(self.query_box)}; it must be x0, y0, x1, y1")


@dataclass(frozen=True)
class MachineSettings(Section):
    """Speed; in training, threads and processes also change the last bits of results."""

    device: str | None = neutral(None, "torch device; None: a GPU if there is one")
    threads: int | None = neutral(None, "torch's threads on the CPU; None: torch's default", low=1)
    read_threads: int = neutral(4, "threads that decode images ahead of the network", low=0)
    batch_size: int = neutral(
        16, "images at once in the global stage", flat="batch_size_inference", low=1
    )
    local_batch_size: int = neutral(8, "images at once in the local stage", low=1)
    cuda_graphs: bool = neutral(
        False, "on a GPU, in the local stage: launch the kernels of a shape together"
    )
    worker: int = neutral(0, "number of this process, where several extract together", low=0)
    worker_count: int = neutral(1, "processes that extract together", low=1)
    workers: int | None = neutral(None, "processes that verify; None: one a core", low=1)
    match_device: str | None = neutral(
        None, 'device of matching; None: NumPy; "auto": a GPU if there is one'
    )
    engine: str = neutral("local", '"ray": a Ray cluster', choices=("local", "ray"))
    ray_address: str | None = neutral(None, "HOST:PORT of the cluster's head; None: Ray here")
    num_processes: int = setting(1, "training processes, one a GPU", low=1)
    data_workers: int = neutral(4, "processes that read training images", low=0)
    checkpoint_minutes: float = neutral(10.0, "between two saved states within an epoch", low=0)
    timeout_minutes: float = neutral(30.0, "after which a silent process is given up", above=0)
    dry_run: bool = neutral(True, "on a GPU: measure first whether the batch fits")
    tracker: str | None = neutral(
        None, "further tracker of training, by accelerate's name, such as wandb; None: none"
    )

    def check(self) -> None:
        """Raises SettingsError for a worker out of range, and for an address without Ray."""
        if self.worker >= self.worker_count:
            raise SettingsError(
                f"worker is {self.worker}: {self.worker_count} workers are numbered from 0 on"
            )
        if self.engine == "local" and self.ray_address is not None:
            raise SettingsError(f"ray_address {self.ray_address!r} needs engine: ray, not local")


@dataclass(frozen=True)
class ShowSettings(Section):
    """What notebooks draw, and the bounds that the demo asserts; no result depends on it."""

    shown_queries: tuple[int, ...] = neutral((), "queries in the gallery", low=0)
    shown_images: tuple[int, ...] = neutral((), "queries whose features are drawn", low=0)
    shown_pairs: int = neutral(3, "pairs drawn", low=0)
    query_index: int | None = neutral(None, "inspected query; None: the notebook's own")
    image_index: int | None = neutral(None, "database image; None: the best verified hard one")
    show_attention: bool = neutral(True, "one pass of the network over both photographs")
    save_figures: bool = neutral(False, "write the figures to a folder as well")
    figure_format: str = neutral("pdf", "of saved figures", choices=("pdf", "svg", "png"))
    untrained: str | None = neutral(None, "architecture whose random weights are scored as well")
    baseline: bool = neutral(
        False, "score EfficientNet-Lite0 as well; its weights come with the extra `baselines`"
    )
    min_train_gain: float | None = neutral(None, "retrieval mAP gained in training")
    max_reconstruction: float | None = neutral(None, "fraction of variance lost")
    min_medium_map: float | None = neutral(None, "Medium mAP")
    min_gain: float | None = neutral(None, "Medium mAP above the untrained network")
    min_rerank_gain: float | None = neutral(None, "mAP gained by reranking")


# Settings that name weights: a file, or a network as well (`runs.split_source`).
WEIGHTS = ("weights", "initial_weights")
NOTEBOOKS: dict[str, tuple[type[Section], ...]] = {
    "01_data_split": (RunSettings, DemoSettings, SplitSettings),
    "02_train": (RunSettings, TrainingSettings, MachineSettings, ShowSettings),
    "03_train_autoencoder": (RunSettings, AutoencoderSettings, MachineSettings, ShowSettings),
    "04_global_evaluation": (RunSettings, GlobalSettings, MachineSettings, ShowSettings),
    "05_local_extraction": (RunSettings, LocalSettings, MachineSettings, ShowSettings),
    "06_rerank": (RunSettings, RerankingSettings, TuningSettings, MachineSettings, ShowSettings),
    "07_match_visualization": (RunSettings, RerankingSettings, MachineSettings, ShowSettings),
    "08_own_photos": (
        *(RunSettings, OwnSettings, GlobalSettings, LocalSettings, RerankingSettings),
        *(MachineSettings, ShowSettings),
    ),
}
SECTIONS = tuple(dict.fromkeys(section for used in NOTEBOOKS.values() for section in used))


@functools.cache
def all_names() -> dict[str, dataclasses.Field]:
    """Returns a field by flat name; fields of one name have one type."""
    return {name: entry for section in SECTIONS for name, entry in section.flat().items()}


def is_path(name: str) -> bool:
    """Returns whether a setting is a file or folder (`run_dir` is neither)."""
    return name in all_names() and fact(all_names()[name]).path
