"""The teacher of distillation: a trained network of timm. It is frozen and never saved."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torch import Tensor, nn

from vitgal.data import images
from vitgal.models import weights

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


class Teacher:
    """A trained network of timm that computes descriptors, frozen and in eval mode.

    Feature maps are pooled by the generalised mean (exponent 3, Radenovic et al., 2019), other
    outputs as timm does. The class is no nn.Module, so that its tensors are not saved with the
    network that holds it.

    Args:
        name: timm's, as "tf_efficientnet_lite0".
        source: its weights: .safetensors or .pth in timm's names or, for an EfficientNet, in those
            of efficientnet_pytorch.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: timm does not know the network, or the file does not fit it.
    """

    def __init__(self, name: str, source: Path):
        if not timm.is_model(name):
            raise ValueError(f"teacher {name!r} is no network of timm; timm.list_models() has all")
        network = timm.create_model(name)
        tensors, names = weights.read_tensors(source), efficientnet_names(network)
        if not names.keys() & {key.rpartition(".")[0] for key in tensors}:
            names = {}  # the file uses timm's names
        layout = weights.make_layout(network.state_dict(), _renamer(names))
        weights.fill(network, tensors, layout, source=source)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        # From our normalisation to the teacher's.
        config = timm.data.resolve_model_data_config(network)
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            for values in (images.MEAN, images.STD, config["mean"], config["std"])
        )
        self.factor, self.offset = std / own_std, (mean - own_mean) / own_std
        self.dim = self.describe(torch.zeros(1, *config["input_size"])).shape[1]

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
