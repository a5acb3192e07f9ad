"""Networks of timm: built for any size of image they can take, and as teachers of distillation."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torch import Tensor, nn

from vitgal.data import images
from vitgal.models import weights
from vitgal.models.checkpoint_files import use_tensors

GEM = 3.0  # exponent of generalised mean pooling
TINY = 1e-6
# efficientnet_pytorch's layer names -> timm's: of the network, then of its two kinds of blocks
TRUNK = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_network(
    name: str, size: tuple[int, int], source: Path | None = None, **options: Any
) -> nn.Module:
    """Builds a network of timm, in eval mode, for images of one size.

    Many transformers take one size only. They are built for theirs, then their positions are
    interpolated as timm does it; a network that cannot change is refused with the sizes it takes.

    Args:
        size: (height, width) in pixels.
        source: weights: .safetensors or .pth in timm's names or, for an EfficientNet, in those of
            efficientnet_pytorch; beside the network's tensors it may hold the classifier's.
        options: of timm.create_model.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown network, or a file or size that does not fit it.
    """
    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"{name!r} is no network of timm; timm.list_models() has all")
    network = timm.create_model(name, **options).eval()
    if source is not None:
        use_tensors(source, lambda tensors: _fill_timm(network, tensors, source))
    if _takes(network, size):
        return network
    embed = getattr(network, "patch_embed", None)
    step = embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)
    near = tuple(max(1, round(side / part)) * part for side, part in zip(size, step, strict=True))
    resized = _resized(network, name, near, options | {"pretrained": False})
    if resized is not None and near == tuple(size):
        return resized
    own = "{} x {}".format(*network.pretrained_cfg["input_size"][1:])
    sizes = own if resized is None else f"sides that are multiples of {step[0]}, as {near}"
    raise ValueError(f"{name} takes no images of {size[0]} x {size[1]} pixels, only {sizes}")


def _takes(network: nn.Module, size: tuple[int, int]) -> bool:
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, *size))
    except Exception:  # each timm network raises its own errors
        return False
    return True


def _resized(
    network: nn.Module, name: str, size: tuple[int, int], options: dict[str, Any]
) -> nn.Module | None:
    """The network for another size, its positions interpolated; None where timm has none."""
    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    state = network.state_dict()
    try:
        resized = timm.create_model(name, img_size=size, **options).eval()
        resized.load_state_dict(adapt(state, resized) if adapt else state)
    except Exception:  # as above
        return None
    return resized if _takes(resized, size) else None


def _fill_timm(network: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    names = efficientnet_names(network)
    if not names.keys() & {key.rpartition(".")[0] for key in tensors}:
        names = {}  # the file uses timm's names
    layout = weights.make_layout(network.state_dict(), _renamer(names))
    classifiers = network.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    dropped = tuple(f"{layer}." for layer in (*classifiers, "_fc"))
    weights.fill(network, tensors, layout, dropped=dropped, source=source)


class Teacher:
    """A trained network of timm that computes descriptors, frozen and in eval mode.

    Feature maps are pooled by the generalised mean (exponent 3, Radenovic et al., 2019), other
    outputs as timm does. The class is no nn.Module, so that its tensors are not saved with the
    network that holds it.

    name: timm's, as "tf_efficientnet_lite0".  source: its weights.  size: (height, width) of its
    images; and errors: as `timm_network`.
    """

    def __init__(self, name: str, source: Path, size: tuple[int, int]):
        network = timm_network(name, size, source)
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        # From our normalisation to the teacher's.
        config = timm.data.resolve_model_data_config(network)
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            for values in (images.MEAN, images.STD, config["mean"], config["std"])
        )
        self.factor, self.offset = std / own_std, (mean - own_mean) / own_std
        self.dim = self.describe(torch.zeros(1, 3, *size)).shape[1]

    @torch.no_grad()
    def describe(self, pictures: Tensor) -> Tensor:
        """Computes descriptors (B, dim) float32 of (B, 3, H, W) with our normalisation."""
        if self.factor.device != pictures.device:
            self.network = self.network.to(pictures.device)
            self.factor, self.offset = (
                part.to(pictures.device) for part in (self.factor, self.offset)
            )
        inputs = (pictures * self.factor + self.offset).to(memory_format=torch.channels_last)
        features = self.network.forward_features(inputs)
        if features.ndim == 4 and features.shape[1] == self.network.num_features:
            return features.float().clamp(min=TINY).pow(GEM).mean((2, 3)).pow(1 / GEM)
        return self.network.forward_head(features, pre_logits=True).float()


def efficientnet_names(network: nn.Module) -> dict[str, str]:
    """Maps efficientnet_pytorch's layers to timm's; empty for a network that is no EfficientNet."""
    if not isinstance(network, timm.models.EfficientNet):
        return {}
    names, number = dict(TRUNK), 0
    for stage, blocks in enumerate(network.blocks):
        for index, block in enumerate(blocks):
            table = SEPARABLE if isinstance(block, DepthwiseSeparableConv) else INVERTED
            names |= {
                f"_blocks.{number}.{layer}": f"blocks.{stage}.{index}.{timm_layer}"
                for layer, timm_layer in table.items()
            }
            number += 1
    return names


def _renamer(names: dict[str, str]) -> Callable[[str], str]:
    """Renames timm's tensors to the file's."""
    in_file = {timm_layer: layer for layer, timm_layer in names.items()}

    def rename(key: str) -> str:
        """Returns the name in the file of the tensor that timm calls `key`."""
        layer, _, part = key.rpartition(".")
        return f"{in_file[layer]}.{part}" if layer in in_file else key

    return rename
