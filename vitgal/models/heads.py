"""Classifiers of the training stages: ArcFace and a linear one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitgal.models.network import initialise
from vitgal.settings import TrainingSettings


class ArcFace(nn.Module):
    """Cosine classifier with an additive angular margin (Deng et al., CVPR 2019).

    The published code trains with a margin of 0.15 and a fixed scale of 30; the paper states a
    margin of 0.1 and a learnable scale.

    Args:
        sub_centres: directions of a class, of which the nearest counts (Deng et al., ECCV 2020).
        chunk: number of classes whose logits `loss` holds at a time; the backward pass computes
            them again. The loss is the same to rounding. None: all classes.
        sampled: number of classes that `loss` takes: the batch's own and random others (An et al.,
            Partial FC, CVPR 2022), drawn by torch's generator. None: all classes.
    Raises:
        ValueError: an option below 1, or `chunk` and `sampled` together.
    """

    def __init__(
        self,
        embed_dim: int,
        classes: int,
        margin: float = TrainingSettings.margin,
        scale: float = TrainingSettings.scale,
        *,
        sub_centres: int = 1,
        chunk: int | None = None,
        sampled: int | None = None,
    ):
        super().__init__()
        if any(value is not None and value < 1 for value in (sub_centres, chunk, sampled)):
            raise ValueError("sub_centres, chunk and sampled must be at least 1")
        if chunk and sampled:
            raise ValueError("set chunk or sampled, not both")
        self.weight = nn.Parameter(torch.empty(classes * sub_centres, embed_dim))
        self.margin, self.scale = margin, scale
        self.sub_centres, self.chunk, self.sampled = sub_centres, chunk, sampled
        nn.init.xavier_uniform_(self.weight)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.weight) // self.sub_centres

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Computes logits (B, classes) float32 of features (B, embed_dim), not normalised.

        The angles of the labels (B,) int64, if given, are widened by the margin.
        """
        # NOTE float32 under autocast and a clamp before the square root: in half precision the
        # published head takes the root of negative numbers and training stops with NaN.
        with torch.autocast(features.device.type, enabled=False):
            return self._logits(F.normalize(features.float()), self.weight, labels)

    def loss(
        self, features: Tensor, labels: Tensor, *, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Computes the cross-entropy with the margin, and the predicted classes (B,) int64.

        features: (B, embed_dim).  labels: (B,) int64.  smoothing: fraction of the target that is
        spread over all classes. Raises ValueError where a batch has more classes than `sampled`.
        """
        if self.sampled and self.sampled < self.classes:
            kept = self._sample(labels)
            weight = self.weight.unflatten(0, (self.classes, -1))[kept].flatten(0, 1)
            targets = torch.searchsorted(kept, labels)
        elif self.chunk and self.chunk < self.classes:
            with torch.autocast(features.device.type, enabled=False):
                return self._chunked_loss(F.normalize(features.float()), labels, smoothing)
        else:
            kept, weight, targets = None, self.weight, labels
        with torch.autocast(features.device.type, enabled=False):
            logits = self._logits(F.normalize(features.float()), weight, targets)
        predicted = logits.detach().argmax(1)
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return loss, predicted if kept is None else kept[predicted]

    def _cosines(self, unit: Tensor, weight: Tensor) -> Tensor:
        """(B, classes) cosines of unit features to the nearest of each class's sub-centres."""
        cosine = F.linear(unit, F.normalize(weight.float()))
        if self.sub_centres > 1:
            cosine = cosine.unflatten(1, (-1, self.sub_centres)).amax(2)
        return cosine

    def _logits(self, unit: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
        cosine = self._cosines(unit, weight)
        if labels is not None:
            # NOTE only the B true cosines change; no (B, classes) one-hot matrix is made.
            column = labels[:, None]
            cosine = cosine.scatter(1, column, self._widened(cosine.gather(1, column)))
        return self.scale * cosine

    def _widened(self, cosine: Tensor) -> Tensor:
        """cos(angle + margin); a falling line where the angle would exceed pi."""
        sine = (1 - cosine.square()).clamp(min=1e-7).sqrt()  # 1e-7: float32's resolution at 1
        widened = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        fallback = cosine - self.margin * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), widened, fallback)

    def _sample(self, labels: Tensor) -> Tensor:
        """Returns the batch's classes and random others, `sampled` in all, rising."""
        own = labels.unique()
        if self.sampled < len(own):
            raise ValueError(f"{self.sampled} sampled classes for a batch of {len(own)} classes")
        draws = torch.rand(self.classes, device=labels.device)
        draws[own] = -1  # so that they are kept
        return draws.topk(self.sampled, largest=False).indices.sort().values

    def _chunked_loss(
        self, unit: Tensor, labels: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """`loss` of unit features, one chunk's logits at a time, in the backward pass too."""
        parts = []
        for number, weight in enumerate(self.weight.split(self.chunk * self.sub_centres)):
            first = number * self.chunk
            parts.append(checkpoint(self._chunk, unit, weight, labels - first, use_reentrant=False))
        total, sums, targets, best, predicted = (
            torch.stack(part) for part in zip(*parts, strict=True)
        )
        chosen = best.argmax(0)
        predicted = predicted.gather(0, chosen[None])[0] + self.chunk * chosen
        smooth = smoothing * sums.sum(0) / self.classes
        loss = total.logsumexp(0) - (1 - smoothing) * targets.sum(0) - smooth
        return loss.mean(), predicted

    def _chunk(self, unit: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """What the loss needs of a chunk's logits, (B,) each; labels count from its first class.

        Their log of the sum of exponentials and their sum, the label's (0 where it is in another
        chunk), the largest and its column.
        """
        cosine = self._cosines(unit, weight)
        inside = (labels >= 0) & (labels < cosine.shape[1])
        column = labels.clamp(0, cosine.shape[1] - 1)[:, None]
        own = cosine.gather(1, column)
        own = torch.where(inside[:, None], self._widened(own), own)
        logits = self.scale * cosine.scatter(1, column, own)
        target = torch.where(inside, self.scale * own[:, 0], 0)
        return logits.logsumexp(1), logits.sum(1), target, *logits.detach().max(1)


class LinearClassifier(nn.Linear):
    """The autoencoder's classifier: features (B, embed_dim) to logits (B, classes) float32."""

    def __init__(self, embed_dim: int, classes: int):
        super().__init__(embed_dim, classes)
        initialise(self)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Computes the logits (B, C). `labels` is unused: all classifiers are called alike."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())
