"""The trained networks, each a model with its classifier and loss; the optimizer."""

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from vitgal.models.heads import ArcFace
from vitgal.models.network import ViTGaL
from vitgal.settings import Recipe
from vitgal.training.errors import TrainingError


class RetrievalNetwork(nn.Module):
    """The retrieval model with ArcFace."""

    retrieves = True  # whether `validate` gives features, for retrieval scores

    def __init__(self, model: ViTGaL, head: ArcFace, label_smoothing: float = 0.0):
        super().__init__()
        self.model, self.head, self.label_smoothing = model, head, label_smoothing

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the scalars `loss` and `accuracy` (with the margin).

        pictures: (B, 3, S, S) float32. labels: (B,) int64.
        """
        features = self.model.global_features(pictures)
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

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay besides biases and other vectors."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Returns timm's layers for layer-wise learning rates: stem, blocks, and the new parts."""
        return {
            "stem": r"^model\.backbone\.(?:patch_embed|pos_embed|cls_token)",
            "blocks": [(r"^model\.backbone\.blocks\.(\d+)", None), (r".", (1000,))],
        }


class AutoencoderNetwork(nn.Module):
    """The autoencoder on a frozen backbone: cross-entropy plus weighted reconstruction error.

    Source: ViTGaL section 3 and published loss: CE of the autoencoder's own class token + 10 MSE.
    """

    retrieves = False

    def __init__(
        self,
        model: ViTGaL,
        classifier: nn.Module,
        reconstruction_weight: float,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.model, self.classifier = model, classifier
        self.reconstruction_weight = reconstruction_weight
        self.label_smoothing = label_smoothing

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the scalars `loss`, `accuracy` and `reconstruction`.

        pictures: (B, 3, S, S) float32. labels: (B,) int64.
        """
        features, decoded, tokens = self.model.reconstruct(pictures)
        logits = self.classifier(features).float()
        reconstruction = F.mse_loss(decoded.float(), tokens.float())
        entropy = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {
            "loss": entropy + self.reconstruction_weight * reconstruction,
            "accuracy": (logits.detach().argmax(1) == labels).float().mean(),
            "reconstruction": reconstruction,
        }

    @torch.no_grad()
    def validate(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes hits (B,) bool and mean squared reconstruction errors (B,)."""
        features, decoded, tokens = self.model.reconstruct(pictures)
        hits = self.classifier(features).argmax(1) == labels.clamp(min=0)
        error = (decoded.float() - tokens.float()).square().mean((1, 2))
        return {"val_accuracy": hits & (labels >= 0), "val_reconstruction": error}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay besides biases and other vectors."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}


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
