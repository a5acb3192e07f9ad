"""Any network of timm as a backbone: class token, patch tokens with their grid, attention.

Each position of a convolutional network's feature map counts as a token. Features are computed by
timm's `forward_intermediates`, which nearly all of its networks have.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from vitgal import runs
from vitgal.data.images import MEAN, STD
from vitgal.models.timm_networks import NetworkError, TimmSource, for_size, open_network

GEM = 3.0  # exponent of generalised mean pooling
TINY = 1e-6
SIZES_KEPT = 4  # copies of a network of one size, for the sizes that were used last
# How timm makes a transformer take any size, in the order of preference.
ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})


@dataclass(frozen=True)
class BackboneFeatures:
    """Features of images: one row per position, row by row over the grid."""

    grid: tuple[int, int]  # (h, w); N = h * w
    tokens: Tensor  # (B, N, D); class and register tokens are left out
    class_token: Tensor | None  # (B, D); None where the network or the block has none
    attention: Tensor | None  # (B, heads, N) float32 of the class token; None without one


class Backbone(nn.Module):
    """A network of timm without its classifier, with random or trained weights, in eval mode.

    Images are (B, 3, H, W) float32, normalised with `mean` and `std`, of any size whose sides are
    multiples of `multiple`. A vision transformer of a fixed size interpolates its position
    embeddings; where timm cannot do this in the forward pass, a copy is built for each size, and
    the last SIZES_KEPT are kept. `forward` raises NetworkError for a size that the network cannot
    take, with the sizes that it can.

    name: of the network in timm.  network: timm's module, whose training trains the backbone.
    """

    def __init__(self, source: TimmSource, options: dict[str, Any] | None = None):
        """Opens the network; options are those of `timm.create_model`, such as drop_path_rate.

        Raises as `open_network`, and NetworkError for a network without spatial features.
        """
        super().__init__()
        self.name = source.name
        self._options = {"num_classes": 0} | (options or {})
        self.network = self._open(source)
        if not hasattr(self.network, "forward_intermediates") or not self.network.feature_info:
            raise NetworkError(
                f"{self.name} has no spatial features, so it has no tokens to pool or to match; "
                "take a transformer or a convolutional network"
            )
        self._any_size = bool(self._options.keys() & {"dynamic_img_size", "strict_img_size"})
        config = timm.data.resolve_model_data_config(self.network)
        # (height, width) in pixels of the images that it was trained on
        self.native_size: tuple[int, int] = tuple(config["input_size"][1:])
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])  # of pixels in [0, 1]
        self.embed_dim: int = self.network.num_features  # of its last tokens and its class token
        self._info = [dict(entry) for entry in self.network.feature_info]
        self.blocks = [entry["module"] for entry in self._info]  # `forward` can give their tokens
        self._sizes: dict[tuple[int, int], nn.Module] = {}
        if self.has_class_token:
            for module in self.network.modules():
                if isinstance(getattr(module, "fused_attn", None), bool):
                    module.fused_attn = True  # the call that `_AttentionRecorder` sees
        self.eval()

    def _open(self, source: TimmSource) -> nn.Module:
        for extra in ANY_SIZE:
            try:
                network = open_network(source, self._options | extra)
            except TypeError:  # the network has no such argument
                continue
            self._options |= extra
            return network
        return open_network(source, self._options)

    @property
    def has_class_token(self) -> bool:
        """Whether the network has a class token."""
        return getattr(self.network, "cls_token", None) is not None

    @property
    def hierarchical(self) -> bool:
        """Whether the map shrinks from stage to stage, as in convolutional networks and Swin."""
        return len({entry["reduction"] for entry in self._info}) > 1

    @property
    def multiple(self) -> int:
        """Number of which an image's sides should be multiples: a transformer's patch."""
        return 16 if self.hierarchical else self.stride()

    def width(self, block: str | None = None) -> int:
        """Returns the width of a block's tokens; None: of the last tokens."""
        return self.embed_dim if block is None else self._info[self._index(block)]["num_chs"]

    def stride(self, block: str | None = None) -> int:
        """Returns the distance in pixels between two tokens of a block; None: of the last."""
        return self._info[-1 if block is None else self._index(block)]["reduction"]

    def local_block(self) -> str:
        """Returns the block for local features: of a transformer the last but two, else stride 16.

        Of a hierarchical network it is the last stage of stride 16, or the finest one.
        """
        if not self.hierarchical:
            return self.blocks[max(0, len(self.blocks) - 3)]
        fitting = [name for name in self.blocks if self.stride(name) == 16]
        return fitting[-1] if fitting else min(self.blocks, key=self.stride)

    def _index(self, block: str) -> int:
        if block not in self.blocks:
            raise NetworkError(
                f"{self.name} has no block {runs.short(block)}; it has {', '.join(self.blocks)}"
            )
        return self.blocks.index(block)

    def check_size(self, height: int, width: int) -> None:
        """Raises NetworkError, with the sizes that it takes, for an image size that it cannot."""
        if not self.hierarchical and (height % self.multiple or width % self.multiple):
            step = self.multiple
            near = [max(step, size // step * step) for size in (height, height + step)]
            raise NetworkError(
                f"{self.name} takes no images of {width} x {height} pixels, only sides that are "
                f"multiples of its patch of {step}: {near[0]} or {near[1]}, say"
            )

    def forward(
        self, images: Tensor, block: str | None = None, *, attention: bool = False
    ) -> BackboneFeatures:
        """Computes the features of images (B, 3, H, W) after the last or a named block.

        Those of a named block of a transformer pass the last norm, as is usual; the computation
        stops there. With `attention` the class token's attention in the same block is computed.
        """
        network = self._sized(images)
        named = block is not None
        compute = network.forward_intermediates
        if named and self.has_class_token and not self.hierarchical:
            if "return_prefix_tokens" in inspect.signature(compute).parameters:
                compute = functools.partial(compute, return_prefix_tokens=True)
        recorder = _AttentionRecorder()
        recording = recorder if attention and self.has_class_token else contextlib.nullcontext()
        with self._refusing_sizes(images), recording:
            result = compute(
                images,
                indices=[self._index(block) if named else len(self.blocks) - 1],
                norm=named and not self.hierarchical,
                stop_early=named,
                intermediates_only=named,
            )
        if not named:
            last, (spatial,) = result
            return self._last(last, spatial, recorder)
        (spatial,) = result
        spatial, prefix = spatial if isinstance(spatial, tuple) else (spatial, None)
        grid = tuple(spatial.shape[-2:])
        tokens = spatial.flatten(2).transpose(1, 2)
        if prefix is None:  # the block's attention, if any, is none of a class token
            return BackboneFeatures(grid, tokens, None, None)
        return BackboneFeatures(grid, tokens, prefix[:, 0], recorder.attention(tokens.shape[1]))

    def _last(
        self, last: Tensor, spatial: Tensor, recorder: "_AttentionRecorder"
    ) -> BackboneFeatures:
        """Features of the network's last output: tokens, or a map with channels first or last."""
        ndim = last.ndim if isinstance(last, Tensor) else 0
        if ndim == 4:
            if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
                last = last.permute(0, 3, 1, 2)
            grid = tuple(last.shape[-2:])
            return BackboneFeatures(grid, last.flatten(2).transpose(1, 2), None, None)
        grid = tuple(spatial.shape[-2:])
        count = grid[0] * grid[1]
        if ndim != 3 or last.shape[1] < count:
            raise NetworkError(
                f"the last output of {self.name} has no spatial tokens; take a named block: "
                + ", ".join(self.blocks)
            )
        tokens = last[:, last.shape[1] - count :]
        class_token = last[:, 0] if self.has_class_token else None
        return BackboneFeatures(grid, tokens, class_token, recorder.attention(count))

    def pooled(self, images: Tensor) -> Tensor:
        """Computes what timm pools for the classifier, (B, D): of the tokens, their mean, a map."""
        network = self._sized(images)
        with self._refusing_sizes(images):
            return network.forward_head(network.forward_features(images), pre_logits=True)

    def _sized(self, images: Tensor) -> nn.Module:
        """The network for the images' size."""
        size = tuple(images.shape[-2:])
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        fixed = self.network.pretrained_cfg.get("fixed_input_size", False)
        if self._any_size or not fixed or size == self.native_size or self.training:
            self.check_size(*size)
            return self.network
        resized = self._sizes.pop(size, None)
        if resized is None:
            resized = for_size(self.network, self.name, size, self._options)
        self._sizes[size] = resized  # behind those that were used before
        if len(self._sizes) > SIZES_KEPT:
            del self._sizes[next(iter(self._sizes))]
        return resized

    @contextlib.contextmanager
    def _refusing_sizes(self, images: Tensor) -> Iterator[None]:
        """Raises NetworkError for what networks that take few sizes raise."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            height, width = images.shape[-2:]
            own = "{1} x {0}".format(*self.native_size)
            raise NetworkError(
                f"{self.name} takes no images of {width} x {height} pixels "
                f"({runs.printable(error)[:100]}); it was made for {own}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sizes": {}}  # copies are not copied


def generalised_mean(tokens: Tensor) -> Tensor:
    """Pools tokens (B, N, D) to (B, D) float32 by the generalised mean; signs are kept."""
    values = tokens.float()
    powers = (values.sign() * values.abs().pow(GEM)).mean(1)
    return powers.sign() * powers.abs().clamp(min=TINY**GEM).pow(1 / GEM)


def renormalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Returns factor and offset, (3, 1, 1) each, from our normalisation to another mean and std."""
    ours_mean, ours_std, mean, std = (
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD, mean, std)
    )
    return ours_std / std, (ours_mean - mean) / std


class _AttentionRecorder(BaseTorchFunctionMode):
    """Keeps queries and keys of the last attention that a network computes.

    All of timm's transformers with a class token compute attention by one function of torch, so
    that rotary positions, norms and biases are what the network really uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, self.key = args[:2]
            self.query = query[:, :, :1]  # the class token's
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.mask = None if mask is None else mask[..., :1, :]
            self.scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        return super().__torch_function__(func, types, args, kwargs)

    def attention(self, count: int) -> Tensor | None:
        """Computes (B, heads, count) float32 over the last `count` keys; None without a record.

        The attention to class and register tokens is left out without renormalisation.
        """
        if self.query is None or self.key.shape[2] <= count:
            return None  # without the class token among the keys it is another attention
        logits = (self.query.float() * self.scale) @ self.key.float().transpose(-2, -1)
        if self.mask is not None:
            logits = logits + self.mask.float()
        return logits.softmax(-1)[:, :, 0, -count:]
