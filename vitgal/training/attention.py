"""XCiT's cross-covariance attention for training: queries and keys are normalised afterwards.

The product of queries and keys is a small matrix. To divide it by their norms takes fewer passes,
forward and backward, than to divide the queries and keys, which have a row for every token.
"""

import torch
from timm.models.xcit import XCA
from torch import Tensor, nn

SMALLEST_NORM = 1e-12  # as in F.normalize


class TrainedAttention(XCA):
    """timm's XCA, which computes the same to rounding in training, and the same bits otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes tokens of the same shape from tokens (B, N, D)."""
        if not self.training or _in_float16(x.device.type):
            return super().forward(x)
        joined = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1)
        query, key, value = joined  # (B, heads, D / heads, N) each
        exact = torch.promote_types(joined.dtype, torch.float32)
        squares = joined[:2].to(exact).square().sum(-1)
        factors = squares.clamp(min=SMALLEST_NORM**2).rsqrt()
        scores = (query @ key.transpose(2, 3)).to(exact)
        scores = scores * (factors[0][..., None] * self.temperature) * factors[1][..., None, :]
        attention = self.attn_drop(scores.softmax(-1))
        mixed = (attention.to(value.dtype) @ value).permute(0, 3, 1, 2).flatten(2)
        return self.proj_drop(self.proj(mixed))


def _in_float16(device: str) -> bool:
    """Whether autocast computes in float16, in which products that are not normalised overflow."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


def replace_attention(network: nn.Module) -> None:
    """Makes every XCA of a network a `TrainedAttention`; parameters and their names stay."""
    for module in network.modules():
        if type(module) is XCA:
            module.__class__ = TrainedAttention
