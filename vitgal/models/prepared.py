"""A network prepared for inference on a CPU: the same numbers to rounding, in fewer passes.

The prepared network is a copy that shares the parameters. Its heavy modules are replaced:

* linear layers hold their weights in oneDNN's order, in the precision of the run;
* GELU is computed with the product before it, and the residual is added in the product;
* layer scale is multiplied into the weights before it, and BatchNorm after a convolution too;
* XCiT's queries and keys are normalised after their product, where the matrix is small, and its
  projection is multiplied with the attention, once an image in place of once a token; in float32,
  and with more tokens than channels, so are the values' weights.

The affine part of LayerNorm stays: its kernel computes it at no cost. In bf16 the sums of residual
branches stay float32, and GELU is a pass of its own, which is faster there.

The plain network is the reference (test_prepared.py). Whether a network is prepared depends on the
machine alone, never on a measured time: another order of sums gives other last bits, and one
machine is to give the same bytes always. benchmarks/extraction.py measures the gain.
"""

import copy
import ctypes
import functools
import warnings
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.models.xcit import ConvPatchEmbed, XCABlock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vitgal.models.inference import device_of, resolve_precision
from vitgal.models.network import MultiAtrous
from vitgal.settings import GlobalSettings

Network = TypeVar("Network", bound=nn.Module)

# Arguments of glibc's mallopt: never map a block of its own, and keep up to 1 GiB of freed memory.
M_MMAP_MAX, M_TRIM_THRESHOLD, KEPT_BYTES = -4, -1, 1 << 30
PACKED_ROWS = 1024  # for how many rows, tokens of an image, oneDNN orders weights


def prepare(model: Network, precision: str = GlobalSettings.precision) -> Network:
    """Returns a network that computes what `model` does in eval mode, faster; it stays as it is.

    Later changes of the model's weights do not reach the prepared network. A prepared network is
    returned as it is, as is every network on a GPU. So is one on a CPU without AVX-512, without
    bf16 where that is asked for, or with a PyTorch that lacks oneDNN's operations; a warning says
    which.

    precision: "fp32", "bf16" or "auto", in which the network will run on its device.
    """
    device = device_of(model)
    if device.type != "cpu" or is_prepared(model):
        return model
    keep_memory()
    precision = resolve_precision(precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if reason := _lacking(dtype):
        # Placed here, not at the caller, so that Python shows it once a process.
        warnings.warn(f"networks run unprepared and slower: {reason}", stacklevel=1)
        return model
    with torch.no_grad():
        prepared = _copied(model, dtype, {}).eval()
    prepared.prepared_for = precision
    return prepared


def is_prepared(model: nn.Module) -> bool:
    """Returns whether a network comes from `prepare`, changed."""
    return hasattr(model, "prepared_for")


@functools.cache
def keep_memory() -> bool:
    """Keeps freed memory for the next tensors, up to 1 GiB; returns whether the machine can.

    glibc maps every large block anew, and to touch new memory takes long: batches were slower an
    image than single images. No result depends on it. It does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
    except (OSError, AttributeError):
        return False


def _lacking(dtype: torch.dtype) -> str | None:
    """Says what this machine lacks for prepared networks; None where it lacks nothing."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the processor has no AVX-512"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "the processor has no bf16"
        if not _sums_right(dtype):
            return "this PyTorch's oneDNN operations round otherwise"
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return "this PyTorch lacks oneDNN's operations for linear layers and convolutions"
    return None


def _sums_right(dtype: torch.dtype) -> bool:
    """Whether the operations compute what PyTorch's own do; they are undocumented."""
    inputs = torch.linspace(-1, 1, 3 * 16).reshape(1, 3, 16).to(dtype)
    layer = _linear(torch.linspace(0.3, -0.7, 256).reshape(16, 16), torch.linspace(1, 2, 16))
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    packed = PackedLinear(layer, dtype)
    plain = F.linear(inputs, weight, bias)
    kernel = weight[:, :, None, None]
    image = inputs.transpose(1, 2).unsqueeze(3)
    pairs = [
        (packed(inputs), plain),
        (packed.gelu(inputs), F.gelu(plain)),
        (packed.add(inputs, inputs), plain + inputs),
        (_conv_gelu(image, kernel, bias, 1, 0), F.gelu(F.conv2d(image, kernel, bias))),
    ]
    # Rounding of 16 products is below 1e-5; with factors rounded to bf16 it is above 1e-3.
    bound = 1e-5 if dtype == torch.float32 else 0.1
    return all(torch.allclose(mine, other, rtol=0, atol=bound) for mine, other in pairs)


def _copied(module: nn.Module, dtype: torch.dtype, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the tree of modules with replacements; parameters are shared."""
    if module not in done:
        if replacement := _REPLACED.get(type(module)):
            done[module] = replacement(module, dtype)
        else:
            done[module] = twin = copy.copy(module)
            twin._modules = {
                name: child if child is None else _copied(child, dtype, done)
                for name, child in module._modules.items()
            }
    return done[module]


class PackedLinear(nn.Linear):
    """A linear layer with its weights, times `scale` (C,) if given, in oneDNN's order.

    It computes (..., C) in `dtype` from inputs (..., D) of any other.
    """

    def __init__(self, plain: nn.Linear, dtype: torch.dtype, scale: Tensor | None = None):
        super().__init__(plain.in_features, plain.out_features, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        weight, bias = plain.weight.detach(), plain.bias
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        self.dtype = dtype
        self.addend = None if bias is None else bias.detach().to(dtype)
        weight = weight.to(dtype).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes outputs of the shape (..., out_features)."""
        return self._product(inputs, "none", "")

    def gelu(self, inputs: Tensor) -> Tensor:
        """Computes GELU of the outputs, of the shape (..., out_features)."""
        if self.dtype == torch.bfloat16:
            return F.gelu(self(inputs))
        return self._product(inputs, "gelu", "none")

    def add(self, inputs: Tensor, others: Tensor) -> Tensor:
        """Adds the outputs to `others`, of the shape (..., out_features), in their dtype."""
        if others.dtype != self.dtype or not inputs.numel():
            return others + self(inputs)
        return torch.ops.mkldnn._linear_pointwise.binary(
            inputs.to(self.dtype), others, self.packed, self.addend, "add"
        )

    def _product(self, inputs: Tensor, function: str, algorithm: str) -> Tensor:
        if not inputs.numel():
            return inputs.new_zeros(*inputs.shape[:-1], self.out_features, dtype=self.dtype)
        return torch.ops.mkldnn._linear_pointwise(
            inputs.to(self.dtype), self.packed, self.addend, function, [], algorithm
        )


class _Fused(nn.Module):
    """In the place of a plain module, which computes for no images."""

    def __init__(self, plain: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.plain, self.dtype = plain, dtype

    def forward(self, inputs: Tensor, *grid: object) -> Tensor | tuple:
        """Computes what the plain module does, of the same shape."""
        return self.fused(inputs, *grid) if len(inputs) else self.plain(inputs, *grid)


class FusedPatches(_Fused):
    """XCiT's four strided convolutions, each with its BatchNorm inside and GELU behind it."""

    def __init__(self, plain: ConvPatchEmbed, dtype: torch.dtype):
        super().__init__(plain, dtype)
        fused = [fuse_conv_bn_eval(*pair) for pair in plain.proj[::2].eval()]
        self.kernels = [_kernel(conv, dtype) for conv in fused]

    def fused(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, D) of images (B, 3, H, W), and their grid."""
        maps = images.to(self.dtype)
        for weight, bias in self.kernels[:-1]:
            maps = _conv_gelu(maps, weight, bias, 2, 1)
        maps = F.conv2d(maps, *self.kernels[-1], stride=2, padding=1)
        return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])


class FusedBlock(_Fused):
    """A block of XCiT: cross-covariance attention, local convolutions, MLP."""

    def __init__(self, plain: XCABlock, dtype: torch.dtype):
        super().__init__(plain, dtype)
        attention, maps = plain.attn, plain.local_mp
        self.heads = attention.num_heads
        weight, bias = attention.qkv.weight.detach(), attention.qkv.bias.detach()
        size = len(weight) // 3
        self.pair, self.values = PackedLinear(attention.qkv, dtype), None
        if dtype == torch.float32:  # in bf16 one product is faster than two
            self.pair = PackedLinear(_linear(weight[: 2 * size], bias[: 2 * size]), dtype)
            self.values = PackedLinear(_linear(weight[2 * size :], bias[2 * size :]), dtype)
        self.temperature = attention.temperature.detach()
        scaled = (plain.gamma1[:, None] * attention.proj.weight).detach().T
        self.projection = scaled.unflatten(0, (self.heads, -1)).to(dtype).contiguous()
        self.offset = (plain.gamma1 * attention.proj.bias).detach()
        self.first = _kernel(maps.conv1, dtype)
        self.second = _kernel(maps.conv2, dtype, plain.gamma3)
        self.expand = PackedLinear(plain.mlp.fc1, dtype)
        self.reduce = PackedLinear(plain.mlp.fc2, dtype, plain.gamma2.detach())

    def fused(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, N, D) float32 after the block, of a grid (height, width)."""
        plain = self.plain
        tokens = self._attended(tokens.float())
        normed = plain.norm3(tokens).to(self.dtype)
        maps = normed.transpose(1, 2).unflatten(2, (height, width))
        maps = plain.local_mp.bn(_conv_gelu(maps, *self.first, 1, 1))
        maps = F.conv2d(maps, *self.second, padding=1, groups=maps.shape[1])
        tokens += maps.flatten(2).transpose(1, 2)
        return self.reduce.add(self.expand.gelu(plain.norm2(tokens)), tokens)

    def _attended(self, tokens: Tensor) -> Tensor:
        width, normed = tokens.shape[2], self.plain.norm1(tokens)
        joined = self.pair(normed)
        pair = joined[..., : 2 * width]
        norms = (pair * pair).sum(1).float().sqrt().clamp(min=1e-12)  # F.normalize's bound
        norms = norms.unflatten(1, (2, self.heads, -1))
        query, key = pair.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (query.transpose(2, 3) @ key).float()
        scores = scores / (norms[:, 0, :, :, None] * norms[:, 1, :, None]) * self.temperature
        attention = scores.softmax(-1).transpose(2, 3).to(self.dtype)
        mixed = (attention @ self.projection).flatten(1, 2)  # (B, D, D): one matrix an image
        if self.values is None:
            return (tokens + self.offset).add_(joined[..., 2 * width :] @ mixed)
        if tokens.shape[1] > width:
            # More tokens than channels: values are not computed, their weights are in the matrix.
            offset = (self.values.bias @ mixed).unsqueeze(1) + self.offset
            return torch.baddbmm(tokens, normed, self.values.weight.T @ mixed).add_(offset)
        return torch.baddbmm(tokens, self.values(normed), mixed).add_(self.offset)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.T.shape, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return layer


class FusedAtrous(_Fused):
    """The multi-atrous block."""

    def __init__(self, plain: MultiAtrous, dtype: torch.dtype):
        super().__init__(plain, dtype)
        self.kernels = [_kernel(conv, dtype) for conv in plain.dilated_convs]
        self.depthwise = _kernel(plain.depthwise, dtype, plain.gamma)
        self.expand = PackedLinear(plain.mlp.fc1, dtype)
        self.reduce = PackedLinear(plain.mlp.fc2, dtype, plain.gamma2.detach())

    def fused(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, D) float32 after the block."""
        plain, tokens = self.plain, tokens.float()
        images = tokens.to(self.dtype).transpose(1, 2).unflatten(2, grid)
        branches = [
            F.conv2d(images, *kernel, padding=conv.padding, dilation=conv.dilation)
            for kernel, conv in zip(self.kernels, plain.dilated_convs, strict=True)
        ]
        pooled = plain.gap_branch(images.mean((2, 3), keepdim=True).float())
        branches.append(pooled.to(self.dtype).expand(-1, -1, *grid))
        mixed = plain.norm(F.gelu(torch.cat(branches, 1)))
        mixed = F.conv2d(mixed, *self.depthwise, padding=1, groups=mixed.shape[1])
        tokens = tokens + mixed.flatten(2).transpose(1, 2)
        return self.reduce.add(self.expand.gelu(plain.norm2(tokens)), tokens)


_REPLACED = {
    nn.Linear: PackedLinear,
    ConvPatchEmbed: FusedPatches,
    XCABlock: FusedBlock,
    MultiAtrous: FusedAtrous,
}


def _kernel(
    conv: nn.Conv2d, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A convolution's weights and bias, times `scale` (channels,)."""
    weight, bias = conv.weight.detach(), conv.bias.detach()
    if scale is not None:
        weight, bias = weight * scale.detach().view(-1, 1, 1, 1), bias * scale.detach()
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)


def _conv_gelu(maps: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """GELU of a convolution of (B, C, H, W), depthwise where the weights have one channel."""
    groups = maps.shape[1] // weight.shape[1]
    if maps.dtype == torch.bfloat16:
        return F.gelu(F.conv2d(maps, weight, bias, stride, padding, groups=groups))
    sizes = ([size, size] for size in (padding, stride, 1))
    return torch.ops.mkldnn._convolution_pointwise(
        maps, weight, bias, *sizes, groups, "gelu", [], "none"
    )
