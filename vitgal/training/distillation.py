"""Distillation: the retrieval model is trained with labels and a teacher's descriptors."""

from torch import Tensor, nn
from torch.nn import functional as F

from vitgal.models.heads import ArcFace
from vitgal.models.network import ViTGaL
from vitgal.models.teacher import TINY, Teacher
from vitgal.training.networks import RetrievalNetwork


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

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the scalars `loss`, `accuracy` (with the margin) and `distilled`.

        pictures: (B, 3, S, S) float32. labels: (B,) int64.
        """
        features = self.model.global_features(pictures)
        loss, predicted = self.head.loss(features, labels, smoothing=self.label_smoothing)
        distilled = disagreement(self.projection(features), self.teacher.describe(pictures))
        return {
            "loss": (1 - self.weight) * loss + self.weight * distilled,
            "accuracy": (predicted == labels).float().mean(),
            "distilled": distilled,
        }


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
