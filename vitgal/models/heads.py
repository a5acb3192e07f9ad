"""Classifiers of the training stages: ArcFace and a linear one."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
                unit = F.normalize(features.float())
                return _ChunkedLoss.apply(unit, self.weight, labels, self, smoothing)
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

    def _chunk_logits(self, unit: Tensor, weight: Tensor, labels: Tensor, first: int) -> Tensor:
        """Logits of the classes from `first` on that `weight` holds, with the margin."""
        cosine = self._cosines(unit, weight)
        rows, columns = _within(labels, first, cosine.shape[1])
        widened = self._widened(cosine[rows, columns])
        return self.scale * cosine.index_put((rows, columns), widened)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy over chunks of classes: neither pass holds more than one chunk's logits."""

    @staticmethod
    def forward(
        ctx, unit: Tensor, weight: Tensor, labels: Tensor, head: ArcFace, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the mean loss and the predicted classes (B,) of features (B, D)."""
        size = len(labels)
        total = unit.new_full((size,), -math.inf)  # log of the sum of exponentials so far
        best, predicted = total.clone(), labels.clone()
        target, mean = unit.new_zeros(size), unit.new_zeros(size)
        for first, rows in _chunks(head):
            logits = head._chunk_logits(unit, weight[rows], labels, first)
            total = torch.logaddexp(total, logits.logsumexp(1))
            top, column = logits.max(1)
            predicted = torch.where(top > best, column + first, predicted)
            best = torch.maximum(best, top)
            inside, columns = _within(labels, first, logits.shape[1])
            target[inside] = logits[inside, columns]
            mean += logits.sum(1) / head.classes
        ctx.save_for_backward(unit, weight, labels, total)
        ctx.head, ctx.smoothing = head, smoothing
        ctx.mark_non_differentiable(predicted)
        loss = total - (1 - smoothing) * target - smoothing * mean
        return loss.mean(), predicted

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the features (B, D) and the classes' directions."""
        unit, weight, labels, total = ctx.saved_tensors
        head, smoothing = ctx.head, ctx.smoothing
        unit_grad, weight_grad = torch.zeros_like(unit), torch.empty_like(weight)
        for first, rows in _chunks(head):
            with torch.enable_grad():
                inputs = unit.detach().requires_grad_(), weight[rows].detach().requires_grad_()
                logits = head._chunk_logits(*inputs, labels, first)
            with torch.no_grad():
                # d loss / d logits: softmax less the smoothed target
                slope = (logits - total[:, None]).exp() - smoothing / head.classes
                inside = _within(labels, first, logits.shape[1])
                slope[inside] -= 1 - smoothing
                slope *= grad / len(labels)
            unit_part, weight_grad[rows] = torch.autograd.grad(logits, inputs, slope)
            unit_grad += unit_part
        return unit_grad, weight_grad, None, None, None


def _within(labels: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """The rows with a label in [first, first + count), and the label's column in that range."""
    rows = ((labels >= first) & (labels < first + count)).nonzero().flatten()
    return rows, labels[rows] - first


def _chunks(head: ArcFace) -> Iterator[tuple[int, slice]]:
    for first in range(0, head.classes, head.chunk):
        last = min(first + head.chunk, head.classes)
        yield first, slice(first * head.sub_centres, last * head.sub_centres)


class LinearClassifier(nn.Linear):
    """The autoencoder's classifier: features (B, embed_dim) to logits (B, classes) float32."""

    def __init__(self, embed_dim: int, classes: int):
        super().__init__(embed_dim, classes)
        initialise(self)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Computes the logits (B, C). `labels` is unused: all classifiers are called alike."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())
