"""The trained networks, each a model with classifier and loss; optimizer and learning rates."""

import math
from collections.abc import Callable

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from vitgal.models.heads import ArcFace
from vitgal.models.network import ViTGaL
from vitgal.models.teacher import TINY, Teacher
from vitgal.models.weights import TRUNK_PREFIX
from vitgal.settings import AutoencoderSettings, Recipe
from vitgal.training.attention import replace_attention
from vitgal.training.code_losses import contrast, second_view, spread
from vitgal.training.errors import TrainingError


class TrainedNetwork(nn.Module):
    """A model that trains with a classifier; the base of both stages' networks."""

    retrieves = False  # whether `validate` gives features, for retrieval scores

    def __init__(self, model: ViTGaL, label_smoothing: float):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        replace_attention(model)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay besides biases and other vectors."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict | Callable[[str], float]:
        """Returns timm's layers for layer-wise learning rates: stem, blocks, and the new parts.

        A network of timm has its own; new layers come after its last.
        """
        if self.model.on_timm:
            network = self.model.backbone.trunk.network
            if not hasattr(network, "group_matcher"):
                raise TrainingError(f"{self.model.architecture} has no layers: unset layer_decay")
            layers = group_parameters(network, network.group_matcher(), reverse=True)
            return lambda name: layers.get(name.removeprefix(f"model.{TRUNK_PREFIX}"), math.inf)
        return {
            "stem": r"^model\.backbone\.(?:patch_embed|pos_embed|cls_token)",
            "blocks": [(r"^model\.backbone\.blocks\.(\d+)", None), (r".", (1000,))],
        }


class RetrievalNetwork(TrainedNetwork):
    """The retrieval model with ArcFace."""

    retrieves = True

    def __init__(self, model: ViTGaL, head: ArcFace, label_smoothing: float = 0.0):
        super().__init__(model, label_smoothing)
        self.head = head

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the scalars `loss` and `accuracy` (with the margin).

        pictures: (B, 3, S, S) float32. labels: (B,) int64.
        """
        return self._classified(self.model.global_features(pictures), labels)

    def _classified(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss, predicted = self.head.loss(features, labels, smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (predicted == labels).float().mean()}

    @torch.no_grad()
    def validate(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes features (B, D), and hits (B,) bool with and without the margin.

        An image of label -1, whose class is not trained, is no hit.
        """
        features = self.model.global_features(pictures).float()
        targets, trained = labels.clamp(min=0), labels >= 0
        return {
            "features": F.normalize(features),
            "val_accuracy": (self.head(features).argmax(1) == targets) & trained,
            "val_accuracy_margin": (self.head(features, targets).argmax(1) == targets) & trained,
        }


class DistilledNetwork(RetrievalNetwork):
    """The retrieval model with ArcFace and a teacher.

    weight: the teacher's fraction of the loss, above 0; at 1 the labels have no influence.

    Source: a linear map of the student's features regresses the teacher's, as in FitNets (Romero
    et al., 2015).
    """

    def __init__(
        self,
        model: ViTGaL,
        head: ArcFace,
        teacher: Teacher,
        weight: float,
        label_smoothing: float = 0.0,
    ):
        super().__init__(model, head, label_smoothing)
        self.teacher, self.weight = teacher, weight
        self.projection = nn.Linear(model.embed_dim, teacher.dim)

    def forward(
        self, pictures: Tensor, labels: Tensor, views: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Computes the scalars of `RetrievalNetwork.forward` and `distilled`.

        views: (B, 3, T, T) the pictures in the teacher's size; None: it sees the pictures.
        """
        features = self.model.global_features(pictures)
        scalars = self._classified(features, labels)
        described = self.teacher.describe(pictures if views is None else views)
        distilled = disagreement(self.projection(features), described)
        loss = (1 - self.weight) * scalars["loss"] + self.weight * distilled
        return scalars | {"loss": loss, "distilled": distilled}


def disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean of 1 - cosine between rows (B, C), a scalar in [0, 2].

    The teacher's dimensions are standardised over the batch first: otherwise their mean would
    dominate every cosine. Raises ValueError for a batch of one picture.
    """
    if len(teacher) < 2:
        raise ValueError("a teacher needs batches of two pictures or more: set batch_size")
    centred = teacher - teacher.mean(0)
    scaled = centred / (centred.square().mean(0).sqrt() + TINY)
    return 1 - F.cosine_similarity(student.float(), scaled, dim=1).mean()


class AutoencoderNetwork(TrainedNetwork):
    """The autoencoder on a frozen backbone: cross-entropy plus weighted reconstruction error.

    A `code_loss` other than the published one is added with its weight.

    Source: ViTGaL section 3 and published loss: CE of the autoencoder's own class token + 10 MSE.
    """

    def __init__(self, model: ViTGaL, classifier: nn.Module, settings: AutoencoderSettings):
        super().__init__(model, settings.label_smoothing)
        self.classifier, self.settings = classifier, settings

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the scalars `loss`, `accuracy`, `reconstruction`, and `codes` where it counts.

        pictures: (B, 3, S, S) float32. labels: (B,) int64.
        """
        features, decoded, tokens = self.model.reconstruct(pictures)
        logits = self.classifier(features).float()
        reconstruction = F.mse_loss(decoded.float(), tokens.float())
        entropy = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        scalars = {
            "loss": entropy + self.settings.reconstruction_weight * reconstruction,
            "accuracy": (logits.detach().argmax(1) == labels).float().mean(),
            "reconstruction": reconstruction,
        }
        if self.settings.code_loss != "published":
            scalars["codes"] = self._code_loss(pictures, tokens, labels)
            scalars["loss"] = scalars["loss"] + self.settings.code_loss_weight * scalars["codes"]
        return scalars

    def _code_loss(self, pictures: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        encode = self.model.autoencoder.encoder
        exact = torch.autocast(pictures.device.type, enabled=False)
        if self.settings.code_loss == "whitened":
            with exact:
                return spread(encode(tokens))
        views, maps = second_view(pictures)
        other, grid = self.model.frozen_tokens(views)
        with exact:
            return contrast(encode(tokens), encode(other), maps, grid, labels)

    @torch.no_grad()
    def validate(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes hits (B,) bool and mean squared reconstruction errors (B,)."""
        features, decoded, tokens = self.model.reconstruct(pictures)
        hits = self.classifier(features).argmax(1) == labels.clamp(min=0)
        error = (decoded.float() - tokens.float()).square().mean((1, 2))
        return {"val_accuracy": hits & (labels >= 0), "val_reconstruction": error}


def build_optimizer(network: nn.Module, settings: Recipe) -> torch.optim.Optimizer:
    """Builds AdamW with timm's groups: no decay for vectors, biases and class tokens.

    With `layer_decay` a group has an `lr_scale`, the factor of its learning rate. Raises
    TrainingError for a network without trainable parameters.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise TrainingError("the network has no parameter to train")
    return create_optimizer_v2(
        network,
        opt="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=1e-8,
        filter_bias_and_bn=True,
        layer_decay=settings.layer_decay,
        fused=torch.cuda.device_count() > 0 or None,
    )


def learning_rates(settings: Recipe) -> list[float]:
    """Returns the learning rate of every epoch: timm's cosine, one epoch late as published.

    The published loop steps its schedule with the number of the epoch that has just ended. The
    first value is therefore used twice, and one warm-up epoch becomes the paper's two.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs,
        lr_min=settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
    )
    return [schedule._get_lr(max(epoch - 1, 0))[0] for epoch in range(settings.epochs)]
