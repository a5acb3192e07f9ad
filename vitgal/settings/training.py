"""The settings of training: the recipe of both stages, the retrieval model, the autoencoder."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from vitgal.runs.errors import short
from vitgal.settings.section import Section, SettingsError, later, path, setting

SEED_MEANING = "seed of all random draws"
# The settings that `may_change` may name.
CHANGEABLE = (
    *("lr", "warmup_lr", "min_lr", "clip_grad", "precision", "skip_images", "skip_bad_batches"),
    *("accumulate", "batch_size", "num_processes", "threads"),
)
CODE_LOSSES = ("published", "whitened", "contrastive")
CLASS_TOKENS = ("own", "gem")
AUGMENTATIONS = ("published", "fast", "none")
TRAINING_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe(Section):
    """Optimisation of a training stage; the defaults are the published retrieval recipe.

    `lr`, `warmup_lr` and `min_lr` are absolute. `sync_batchnorm` needs GPUs.
    """

    image_size: int = setting(512, "side of the square network input", unit="pixels", low=16)
    epochs: int = setting(40, "passes over the training images", low=1)
    warmup_epochs: int = setting(1, "epochs of warm-up; 1 lasts two epochs, as published", low=0)
    batch_size: int = setting(64, "images per process and step", low=1)
    lr: float = setting(5e-5, "highest learning rate", above=0)
    warmup_lr: float = setting(3e-5, "learning rate at the start of the warm-up", low=0)
    min_lr: float = setting(1e-7, "learning rate at the end", low=0)
    weight_decay: float = setting(0.005, "weight decay of AdamW", low=0)
    clip_grad: float | None = setting(None, "largest norm of the gradient", above=0)
    augment: str = setting("published", '"fast": the same in one warp', choices=AUGMENTATIONS)
    precision: str = setting("auto", "arithmetic of training", choices=TRAINING_PRECISIONS)
    seed: int = setting(0, SEED_MEANING, low=0)
    validate_every: int = setting(1, "epochs between two validations", published=4, low=1)
    sync_batchnorm: bool = setting(True, "BatchNorm over the batches of all GPUs", published=False)
    accumulate: int = later(1, "batches whose gradients make one step", low=1)
    ema_decay: float | None = later(
        None, "decay of an averaged model, which is validated and written", above=0, below=1
    )
    rand_augment: int = later(0, "RandAugment's operations per image", low=0)
    rand_augment_magnitude: int = later(9, "strength of RandAugment", low=0, high=30)
    balanced: bool = later(False, "sample all classes equally often")
    label_smoothing: float = later(
        0.0, "fraction of the target spread over all classes", low=0, below=1
    )
    channels_last: bool = later(False, "channels-last memory format")
    compile: bool = later(False, "compile the network with torch.compile")
    skip_bad_batches: int = later(
        0, "steps of a run that may be skipped for a loss that is not finite", low=0
    )
    skip_images: tuple[str, ...] = later(
        (), "training images (names as in train.csv) to replace by the next one"
    )
    step_images: int | None = setting(
        None, "images per step that the rates are meant for; None: any", low=1, result=False
    )
    scale_lr: bool = later(False, "scale the rates by images per step over step_images")
    may_change: tuple[str, ...] = setting(
        (), "settings that a resumed run may change: " + ", ".join(CHANGEABLE), result=False
    )

    @property
    def of_sixteens(self) -> bool:
        """Whether image_size is known to be for patches of 16; else the stage checks it."""
        return False

    # Settings of the retrieval model's training alone.
    layer_decay: ClassVar[float | None] = None
    teacher_size: ClassVar[int | None] = None

    def check(self) -> None:
        """Raises SettingsError for a size that is not a whole number of patches."""
        name = self.PREFIX + "image_size"
        if self.image_size < 32:
            raise SettingsError(f"{name} {self.image_size} is less than 32 pixels")
        if self.of_sixteens and self.image_size % 16:
            raise SettingsError(f"{name} {self.image_size} is not a multiple of 16 above 16")
        if self.scale_lr and self.step_images is None:
            raise SettingsError("scale_lr needs step_images, for which the rates are meant")
        if unknown := set(self.may_change) - set(CHANGEABLE):
            raise SettingsError(
                f"may_change names {min(unknown)}, which no resumed run can change; it can: "
                + ", ".join(CHANGEABLE)
            )


@dataclass(frozen=True)
class TrainingSettings(Recipe):
    """Training of the retrieval model with ArcFace."""

    architecture: str = setting(
        "xcit_small_12_p16_224", "backbone: a name of timm's XCiT, or timm:NAME for any network"
    )
    initial_weights: str | None = path(
        "the backbone's weights or a ViTGaL model; pretrained: timm's; timm:NAME@FILE; None: random"
    )
    embed_dim: int | None = later(
        None, "width of tokens and descriptors on timm:NAME; None: the network's", low=8
    )
    class_token: str = later(
        "own",
        '"gem": the mean of a timm network\'s tokens, to which class attention adds',
        choices=CLASS_TOKENS,
    )
    freeze_backbone: bool = later(False, "train only what ViTGaL adds to the backbone")
    drop_path: float = setting(0.1, "stochastic depth", low=0, below=1)
    margin: float = setting(0.15, "ArcFace's angle; paper: 0.1", unit="radians", low=0)
    scale: float = setting(30.0, "ArcFace's factor", above=0)
    layer_decay: float | None = later(
        None, "factor of the learning rate from a block to the one below", above=0, below=1
    )
    sub_centres: int = later(1, "sub-centres of a class in ArcFace", low=1)
    class_chunk: int | None = later(None, "classes per chunk of ArcFace's logits; None: all", low=1)
    sampled_classes: int | None = later(
        None, "classes that ArcFace samples per batch; None: all", low=1
    )
    teacher: str | None = setting(None, "timm network to distil from; None: no distillation")
    teacher_weights: str | None = path("weights of the teacher")
    distill_weight: float = setting(0.8, "the teacher's fraction of the loss", above=0, high=1)
    teacher_size: int | None = later(
        None, "side of the teacher's view; None: image_size", unit="pixels", low=32
    )

    @property
    def of_sixteens(self) -> bool:
        """Whether image_size is known to be for patches of 16; else the stage checks it."""
        return not self.architecture.startswith("timm:")

    def check(self) -> None:
        """Raises SettingsError for contradictory classes or an incomplete teacher."""
        super().check()
        if "@" in self.architecture:
            raise SettingsError(
                f"architecture {short(self.architecture)} names weights: set initial_weights to it"
            )
        if self.embed_dim is not None and self.of_sixteens:
            raise SettingsError("embed_dim is for an architecture timm:NAME; XCiT's is fixed")
        if self.class_token != "own" and self.of_sixteens:
            raise SettingsError("class_token gem is for an architecture timm:NAME")
        if self.freeze_backbone and self.layer_decay is not None:
            raise SettingsError("set freeze_backbone or layer_decay, not both")
        if self.freeze_backbone and self.initial_weights is None:
            raise SettingsError(
                "freeze_backbone needs initial_weights, or the backbone stays random"
            )
        if self.class_chunk and self.sampled_classes:
            raise SettingsError("set class_chunk or sampled_classes, not both")
        if (self.teacher is None) != (self.teacher_weights is None):
            raise SettingsError("teacher is a network's name, teacher_weights its file: set both")
        if self.teacher is None and self.teacher_size is not None:
            raise SettingsError("teacher_size needs a teacher")

    def compared(self) -> dict[str, Any]:
        """Returns the parameters of a recipe, without distillation if there is no teacher."""
        values = super().compared()
        if self.teacher is None:
            del values["teacher"], values["distill_weight"]
        return values


@dataclass(frozen=True)
class AutoencoderSettings(Recipe):
    """Training of the autoencoder on the frozen retrieval model.

    Flat names of a recipe's settings begin with `ae_`, but for those in SHARED.
    """

    PREFIX: ClassVar[str] = "ae_"
    SHARED: ClassVar[frozenset[str]] = frozenset(
        {"augment", "precision", "seed", "accumulate", "channels_last", "compile"}
        | {"skip_bad_batches", "may_change", "step_images", "scale_lr"}
    )
    PREFIXED: ClassVar[frozenset[str]] = (
        frozenset(entry.name for entry in dataclasses.fields(Recipe)) - SHARED
    )

    epochs: int = setting(25, "passes over the training images; published README: 30", low=1)
    backbone_weights: str | None = path("trained retrieval model; None: this run's")
    code_dim: int = setting(128, "dimension of a local descriptor", low=1)
    reconstruction_weight: float = setting(
        10.0, "weight of the reconstruction error beside the cross-entropy", low=0
    )
    code_loss: str = later(
        "published",
        '"whitened": codes spread over all directions; "contrastive": codes of a place agree '
        "in two views",
        choices=CODE_LOSSES,
    )
    code_loss_weight: float = later(1.0, "weight of code_loss beside the published loss", above=0)
