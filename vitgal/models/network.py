"""The ViTGaL network: a vision transformer for global descriptors and local features.

Paper: Phan, Nguyen, Warrier, Gupta, "Patch Embedding as Local Features: Unifying Deep Local and
Global Features via Vision Transformer for Image Retrieval", ACCV 2022. The transformer is XCiT
(El-Nouby et al., 2021) from timm (Apache-2.0). The additions are written from the paper and the
observed behaviour of the published network and compute the same numbers (test_parity.py). Details
that the paper does not mention are marked "As published". Deliberate differences:

* ArcFace runs in float32 under any autocast and clamps before its square root;
* attaching an autoencoder leaves the backbone as it is (the published one initialises it anew);
* `train()` respects a frozen backbone (the published one leaves BatchNorm inconsistent).

The same head goes on any network of timm ("timm:NAME"), see `TimmBackbone`.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.xcit import ClassAttentionBlock
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from vitgal.data.images import PATCH
from vitgal.models.backbones import Backbone, generalised_mean, renormalisation
from vitgal.models.hub import HubModel
from vitgal.models.timm_networks import PREFIX, NetworkError, TimmSource
from vitgal.settings import TrainingSettings
from vitgal.settings.training import CLASS_TOKENS

# Name -> width, number of blocks. The two small ones are the paper's, nano is for the demo.
ARCHITECTURES = {
    "xcit_nano_12_p16_224": (128, 12),
    "xcit_small_12_p16_224": (384, 12),
    "xcit_small_24_p16_224": (384, 24),
}
DILATIONS = (1, 3, 6, 9, 12)
LAYER_NORM_EPS = 1e-6  # XCiT's, not torch's 1e-5
HEAD_WIDTH = 48  # of a head of class attention on a network of timm; XCiT-small's
GEM_TOKEN = "gem"  # of CLASS_TOKENS
ETA = 0.1  # first scale of its new residual branches, as in CaiT (Touvron et al., 2021)


@dataclass(frozen=True)
class TokenFeatures:
    """Tokens, codes and attention of images: one row a patch, row by row over the grid, float32.

    A head's attentions and that of the class token to itself, which is left out, sum to 1.
    """

    grid: tuple[int, int]  # (h, w); N = h * w. Patch (i, j) begins at the pixel (p i, p j): `patch`
    tokens: Tensor  # (B, N, D) the backbone's, after its last norm
    backbone_attention: Tensor  # (B, heads, N) the backbone's class attention
    codes: Tensor | None  # (B, N, code_dim) not normalised; None without autoencoder
    decoded: Tensor | None  # (B, N, D) the tokens decoded from the codes; None without autoencoder
    attention: Tensor  # (B, heads, N) the autoencoder's class attention, or the backbone's


@dataclass(frozen=True)
class TokenCodes:
    """The part of TokenFeatures that local features need."""

    grid: tuple[int, int]
    codes: Tensor
    attention: Tensor


class MultiAtrous(nn.Module):
    """Adds context to every token: dilated convolutions, and the mean over the image.

    Five dilated 3 x 3 convolutions of D // 6 channels and one pooled branch of the remaining
    channels; a depthwise convolution mixes them, then an MLP.
    """

    def __init__(self, dim: int, *, dilations: Sequence[int] = DILATIONS, eta: float = 1.0):
        super().__init__()
        if len(dilations) >= dim or not all(1 <= rate <= 1000 for rate in dilations):
            raise ValueError("dilations are numbers from 1 to 1000, fewer than the tokens' width")
        width = dim // (len(dilations) + 1)
        self.dilated_convs = nn.ModuleList(
            nn.Conv2d(dim, width, 3, padding=rate, dilation=rate) for rate in dilations
        )
        self.gap_branch = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim - width * len(dilations), 1), nn.GELU()
        )
        self.norm = nn.BatchNorm2d(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.gamma = nn.Parameter(torch.full((dim,), eta))
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)  # As published: 1e-5 here, 1e-6 elsewhere.
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Computes tokens of the same shape from tokens (B, h * w, D) of a grid (h, w)."""
        images = tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        branches = [conv(images) for conv in self.dilated_convs]
        # The published bilinear upsampling of a 1 x 1 map is this expansion, exactly.
        branches.append(self.gap_branch(images).expand(-1, -1, *grid))
        # As published: GELU before BatchNorm, so that the pooled branch passes GELU twice.
        mixed = self.depthwise(self.norm(F.gelu(torch.cat(branches, dim=1))))
        tokens = tokens + self.gamma * mixed.flatten(2).transpose(1, 2)
        return tokens + self.gamma2 * self.mlp(self.norm2(tokens))


class Autoencoder(nn.Module):
    """Short codes for tokens; a class token that attends to the decoded tokens scores them."""

    def __init__(self, dim: int, code_dim: int, *, num_heads: int):
        super().__init__()
        self.encoder = nn.Linear(dim, code_dim)
        self.decoder = nn.Linear(code_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_attn_blocks = nn.ModuleList([_class_attention_block(dim, num_heads)])
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(initialise)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Computes codes (B, N, code_dim) and decoded tokens (B, N, D), float32."""
        codes = self.encoder(tokens)
        return codes.float(), self.decoder(codes).float()

    def attend(self, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the class feature (B, D) and attention (B, heads, N) of decoded tokens."""
        joined = _with_class_token(self.cls_token, decoded)
        # As published: once here, while the backbone runs its block twice.
        (block,) = self.cls_attn_blocks
        return self.norm(block(joined)[:, 0]).float(), class_attention(block, joined)


class TimmBackbone(nn.Module):
    """A network of timm in the place of XCiT: the tokens of its last layer, and class attention.

    Its class token, or a learnt one where it has none, joins its tokens. Both are normalised, and
    mapped to another width where one is asked for, at first by an orthogonal projection. Images
    are normalised as for XCiT; the network's own mean and deviation are applied here. A side that
    is no multiple of a transformer's patch is padded with zeros, as XCiT does.

    With `class_token` "gem" the class token is the generalised mean of the tokens, of length
    sqrt(D), and `gate` is the factor (D,) of what class attention adds to it: 0 before training.

    embed_dim: width of the tokens; None: the network's.  num_heads: of the class attention; None:
    heads of about HEAD_WIDTH.  drop_path, class_token: as `build_model`.

    Raises NetworkError for a network that timm does not have or that has no spatial features, and
    ValueError for heads that do not divide the width.
    """

    def __init__(
        self,
        name: str,
        *,
        embed_dim: int | None,
        num_heads: int | None,
        drop_path: float,
        class_token: str,
    ):
        super().__init__()
        options = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            self.trunk = Backbone(TimmSource(name, None), options)
        except TypeError as error:
            raise NetworkError(f"{name} takes no drop_path: set drop_path 0.0") from error
        width = self.trunk.embed_dim
        self.embed_dim = embed_dim or width
        num_heads = num_heads or _number_of_heads(self.embed_dim)
        if self.embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {self.embed_dim}")
        self.token_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.projection = nn.Identity()
        if self.embed_dim != width:
            self.projection = nn.Linear(width, self.embed_dim)
            nn.init.zeros_(self.projection.bias)
            if not self.projection.weight.is_meta:
                nn.init.orthogonal_(self.projection.weight)
        self.gate = None
        if class_token == GEM_TOKEN:
            self.gate = nn.Parameter(torch.zeros(self.embed_dim))
        elif not self.trunk.has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        block = _class_attention_block(self.embed_dim, num_heads, eta=ETA)
        self.cls_attn_blocks = nn.ModuleList([block.apply(initialise)])
        self.norm = nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS)
        factor, offset = renormalisation(self.trunk.mean, self.trunk.std)
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Computes the class token (B or 1, 1, D), the tokens (B, N, D), and their grid."""
        step = 1 if self.trunk.hierarchical else self.trunk.multiple
        height, width = images.shape[-2:]
        if height % step or width % step:
            images = F.pad(images, (0, -width % step, 0, -height % step))
        features = self.trunk(images * self.factor + self.offset)
        tokens = self.projection(self.token_norm(features.tokens))
        if self.gate is not None:
            pooled = F.normalize(self.projection(generalised_mean(features.tokens)), dim=1)
            return pooled[:, None] * math.sqrt(self.embed_dim), tokens, features.grid
        if not self.trunk.has_class_token:
            return self.cls_token, tokens, features.grid
        class_token = self.projection(self.token_norm(features.class_token))
        return class_token[:, None], tokens, features.grid


class ViTGaL(nn.Module, HubModel):
    """XCiT with a multi-atrous block before its class attention, and an optional autoencoder.

    Images are (B, 3, H, W) float32, normalised as `inference.normalise` does, of any size; another
    shape raises ValueError. A side that is no multiple of 16 has its last patch padded with zeros,
    as published, so that the grid is (ceil(H / 16), ceil(W / 16)). No image (B = 0) gives empty
    features in eval mode. All features are float32, under autocast too.

    In the place of XCiT there can be a network of timm, "timm:NAME" (`TimmBackbone`), which takes
    at least one image. Few of them take one size only, and then raise NetworkError.

    Args:
        architecture: one of ARCHITECTURES, or "timm:NAME".
        code_dim: dimension of the autoencoder's codes (published: 128); None: no autoencoder.
        drop_path: fraction of residual branches dropped in training (published: 0.1).
        embed_dim, num_heads: of a network of timm, see `TimmBackbone`.
        class_token: of a network of timm, "own": the network's, or a learnt one where it has none;
            "gem": the generalised mean of its tokens, to which class attention adds.
    Raises:
        ValueError: an unknown architecture or class token, or a number that is not possible.
    """

    def __init__(
        self,
        architecture: str,
        *,
        code_dim: int | None = None,
        drop_path: float = 0.0,
        dilations: Sequence[int] = DILATIONS,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        class_token: str = TrainingSettings.class_token,
    ):
        super().__init__()
        if class_token not in CLASS_TOKENS:
            raise ValueError(
                f"unknown class token {class_token!r}; known: {', '.join(CLASS_TOKENS)}"
            )
        self.architecture = architecture
        self.dilations = tuple(dilations)
        if self.on_timm:
            self.backbone = TimmBackbone(
                architecture.removeprefix(PREFIX),
                embed_dim=embed_dim,
                num_heads=num_heads,
                drop_path=drop_path,
                class_token=class_token,
            )
            eta = ETA
        elif architecture not in ARCHITECTURES:
            raise ValueError(
                f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}, and "
                f"{PREFIX}NAME for any network of timm"
            )
        elif embed_dim or num_heads or class_token != "own":
            raise ValueError(
                f"{architecture} has a fixed width and class token: embed_dim and class_token are "
                f"for {PREFIX}NAME"
            )
        else:
            # The published network has one class-attention block and normalised tokens; timm's nano
            # does not normalise tokens.
            self.backbone = timm.create_model(
                architecture,
                num_classes=0,
                cls_attn_layers=1,
                tokens_norm=True,
                drop_path_rate=drop_path,
            )
            eta = 1.0 if len(self.backbone.blocks) == 12 else 1e-5  # as XCiT's
        self.local_atrous = MultiAtrous(self.embed_dim, dilations=dilations, eta=eta)
        self.local_atrous.apply(initialise)
        self.autoencoder = None
        self.backbone_frozen = self.trunk_frozen = False
        if code_dim is not None:
            self.attach_autoencoder(code_dim)

    @property
    def on_timm(self) -> bool:
        """Whether the backbone is any network of timm and not the published XCiT."""
        return self.architecture.startswith(PREFIX)

    @property
    def class_token(self) -> str:
        """The class token's kind, see `build_model`."""
        return "own" if getattr(self.backbone, "gate", None) is None else GEM_TOKEN

    @property
    def patch(self) -> int:
        """Distance of two tokens in pixels of the network input."""
        return self.backbone.trunk.stride() if self.on_timm else PATCH

    @property
    def multiple(self) -> int:
        """The number of which the sides of images for local features are multiples."""
        return self.patch

    @property
    def trunk(self) -> list[nn.Module]:
        """The modules below the multi-atrous block, which pretrained weights fill."""
        if self.on_timm:
            return [self.backbone.trunk]
        return [self.backbone.patch_embed, self.backbone.pos_embed, self.backbone.blocks]

    @property
    def num_heads(self) -> int:
        """Heads of the class attention."""
        return self.backbone.cls_attn_blocks[0].attn.num_heads

    def check_size(self, height: int, width: int) -> None:
        """Raises NetworkError, with sizes that fit, for a size that the backbone would pad."""
        if self.on_timm:
            self.backbone.trunk.check_size(height, width)

    @property
    def embed_dim(self) -> int:
        """Width D of tokens and global descriptors."""
        return self.backbone.embed_dim

    @property
    def code_dim(self) -> int | None:
        """Width of the local descriptors; None without autoencoder."""
        return None if self.autoencoder is None else self.autoencoder.encoder.out_features

    def attach_autoencoder(self, code_dim: int, *, seed: int | None = None) -> "ViTGaL":
        """Attaches a new autoencoder in place of any other; the backbone's tensors stay.

        Returns the model; raises ValueError where `code_dim` is not positive.
        """
        if not 1 <= code_dim <= 4096:
            raise ValueError(f"code_dim must be from 1 to 4096, got {code_dim}")
        with seeded(seed):
            autoencoder = Autoencoder(self.embed_dim, code_dim, num_heads=self.num_heads)
        device = self.local_atrous.gamma.device
        self.autoencoder = autoencoder.to(device).train(self.training)
        return self

    def freeze_backbone(self) -> "ViTGaL":
        """Freezes all but the autoencoder, BatchNorm statistics included; returns the model."""
        self.backbone_frozen = True
        for module in (self.backbone, self.local_atrous):
            module.requires_grad_(False)
        return self.train(self.training)

    def freeze_trunk(self) -> "ViTGaL":
        """Freezes what lies below the multi-atrous block, BatchNorm included; returns the model."""
        self.trunk_frozen = True
        for module in self.trunk:
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "ViTGaL":
        """Sets training or eval mode; what is frozen stays in eval mode."""
        super().train(mode)
        if self.trunk_frozen:
            for module in self.trunk:
                module.eval()
        if self.backbone_frozen:
            self.backbone.eval()
            self.local_atrous.eval()
        return self

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay besides biases and other vectors."""
        names = {"backbone.cls_token", "autoencoder.cls_token"}
        if self.on_timm and hasattr(self.backbone.trunk.network, "no_weight_decay"):
            inner = self.backbone.trunk.network.no_weight_decay()
            names |= {f"backbone.trunk.network.{name}" for name in inner}
        return names

    def forward(self, images: Tensor) -> Tensor:
        """Computes `global_features`: (B, 3, H, W) -> (B, D)."""
        return self.global_features(images)

    def global_features(self, images: Tensor) -> Tensor:
        """Computes the class token after the last norm (B, D), not normalised.

        With the class token "gem": the generalised mean plus `gate` times that.
        """
        joined, _ = self._joined(images)
        (block,) = self.backbone.cls_attn_blocks
        added = self.backbone.norm(block(block(joined))[:, 0]).float()
        if self.class_token == GEM_TOKEN:
            return joined[:, 0].float() + self.backbone.gate * added
        return added

    def token_features(self, images: Tensor) -> TokenFeatures:
        """Computes tokens, codes and attention of images (B, 3, H, W)."""
        tokens, backbone_attention, grid = self._tokens(images)
        if self.autoencoder is None:
            return TokenFeatures(grid, tokens, backbone_attention, None, None, backbone_attention)
        codes, decoded = self.autoencoder(tokens)
        # As published: the class token attends to the decoded tokens, not to the backbone's.
        _, attention = self.autoencoder.attend(decoded)
        return TokenFeatures(grid, tokens, backbone_attention, codes, decoded, attention)

    def token_codes(self, images: Tensor) -> TokenCodes:
        """Computes codes and attention of images (B, 3, H, W) as `token_features`, but faster.

        The bits are equal: the omitted operations concern class tokens only, and in eval mode the
        result does not depend on them. Raises ValueError in training mode and without autoencoder.
        """
        if self.training:
            raise ValueError("token_codes is for eval mode: call model.eval() first")
        if self.autoencoder is None:
            raise ValueError("the model has no autoencoder, so it gives no codes")
        joined, grid = self._joined(images)
        (block,) = self.backbone.cls_attn_blocks
        patches = joined[:, 1:]
        for _ in range(2):  # as published, see `_tokens`
            patches = _patches_after(block, patches)
        codes, decoded = self.autoencoder(self.backbone.norm(patches).float())
        joined = _with_class_token(self.autoencoder.cls_token, decoded)
        (block,) = self.autoencoder.cls_attn_blocks
        return TokenCodes(grid, codes, class_attention(block, joined))

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes and decodes the tokens of images (B, 3, H, W), without gradient of the backbone.

        Returns the autoencoder's class feature (B, D), for its classifier, the decoded tokens
        (B, N, D), and the backbone's tokens (B, N, D), which they should equal. Raises ValueError
        without autoencoder, in training with a backbone that is not frozen (its BatchNorm
        statistics would drift), and where `images` has another shape.
        """
        if self.autoencoder is None:
            raise ValueError(
                "the model has no autoencoder: call attach_autoencoder(code_dim) first"
            )
        if self.training and not self.backbone_frozen:
            raise ValueError("call freeze_backbone() before training the autoencoder")
        tokens, _ = self.frozen_tokens(images)
        _, decoded = self.autoencoder(tokens)
        feature, _ = self.autoencoder.attend(decoded)
        return feature, decoded, tokens

    @torch.no_grad()
    def frozen_tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Computes the backbone's tokens (B, N, D) and grid (h, w) without gradient."""
        tokens, _, grid = self._tokens(images)
        return tokens, grid

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Final patch tokens (B, N, D), the class attention over them, and the grid."""
        joined, grid = self._joined(images)
        (block,) = self.backbone.cls_attn_blocks
        # As published: the one block runs twice, the second time on its own output, and the
        # attention is the second run's. Each run also changes the patch tokens.
        once = block(joined)
        tokens = self.backbone.norm(block(once)[:, 1:]).float()
        return tokens, class_attention(block, once), grid

    def _joined(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Class token and patch tokens (B, 1 + N, D) before the class attention, and the grid."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if self.on_timm:
            class_token, tokens, grid = self.backbone(images)
            return _with_class_token(class_token, self.local_atrous(tokens, grid)), grid
        tokens, grid = self.backbone.patch_embed(images)
        tokens = tokens + self.backbone.pos_embed(1, *grid).flatten(2).transpose(1, 2)
        for block in self.backbone.blocks:
            tokens = block(tokens, *grid)
        return _with_class_token(self.backbone.cls_token, self.local_atrous(tokens, grid)), grid


def build_model(
    architecture: str = TrainingSettings.architecture, *, seed: int | None = None, **options: Any
) -> ViTGaL:
    """Builds a network with random weights, in eval mode; options and errors are `ViTGaL`'s.

    seed: the same seed gives the same weights bit by bit and leaves torch's random state alone.
    """
    with seeded(seed):
        return ViTGaL(architecture, **options).eval()


def outline(architecture: str = TrainingSettings.architecture, **options: Any) -> ViTGaL:
    """Builds a network on the meta device, without memory for its tensors; as `build_model`.

    Some networks of timm cannot be built on it and take memory.
    """
    build = partial(build_model, architecture, seed=0, **options)
    try:
        with torch.device("meta"), _Uninitialised():
            return build()
    except (NotImplementedError, RuntimeError):
        if not architecture.startswith(PREFIX):
            raise
    return build()


class _Uninitialised(BaseTorchFunctionMode):
    """Leaves out initial values of meta tensors, which take most of the time of `outline`."""

    FILLING = frozenset("uniform_ normal_ erfinv_ mul_ add_ clamp_ fill_ zero_".split())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return super().__torch_function__(func, types, args, kwargs)


def class_attention(block: ClassAttentionBlock, joined: Tensor) -> Tensor:
    """Computes the class attention (B, heads, N) float32 of a block from its input (B, 1 + N, D).

    The softmax is over class token and patches; the class token's attention to itself is left out
    without renormalisation, as published.
    """
    normed, attn = block.norm1(joined), block.attn
    query = attn.q(normed[:, 0]).unflatten(-1, (attn.num_heads, -1)).float()
    key = attn.k(normed).unflatten(-1, (attn.num_heads, -1)).float()
    with torch.autocast(joined.device.type, enabled=False):  # keypoints depend on the scores
        scores = torch.einsum("bhc,bnhc->bhn", query * attn.scale, key)
    return scores.softmax(dim=-1)[:, :, 1:]


def _patches_after(block: ClassAttentionBlock, patches: Tensor) -> Tensor:
    """Returns the patch tokens (B, N, D) after `block`, which only normalises and doubles them."""
    normed = block.norm2(patches + block.gamma1 * block.norm1(patches))
    return normed + normed


def _number_of_heads(dim: int) -> int:
    """The number of heads that divides a width and makes them nearest to HEAD_WIDTH, in ratio."""
    divisors = (heads for heads in range(1, dim + 1) if dim % heads == 0)
    return min(divisors, key=lambda heads: abs(math.log(dim / heads / HEAD_WIDTH)))


def _class_attention_block(dim: int, num_heads: int, *, eta: float = 1.0) -> ClassAttentionBlock:
    """XCiT's block; timm's has the published traits (tokens_norm, patches added to themselves)."""
    return ClassAttentionBlock(
        dim,
        num_heads,
        qkv_bias=True,
        eta=eta,
        tokens_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
    )


def _with_class_token(cls_token: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat((cls_token.expand(len(tokens), -1, -1), tokens), dim=1)


def initialise(module: nn.Module) -> None:
    """Initialises a linear layer as XCiT does: truncated normal, zero bias; leaves others alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds torch's CPU generator and restores its state afterwards; None leaves it alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
