"""Distillation: the retrieval model learns to say what a trained network says of the same pictures.

The name of its landmark is little to learn from a photograph; a network that has seen a million
photographs says of every view of it what it resembles. It is a network of timm with its weights in
a file. It is never trained and is no part of states and models: what remains of it is in the
student's weights, and in one linear map that state/ alone keeps.
"""

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torch import Tensor, nn

from vitgal.data import images
from vitgal.models import weights

GEM = 3.0  # exponent of the pooling that makes a descriptor of a map
TINY = 1e-6
# What efficientnet_pytorch and its kind call an EfficientNet's layers, and what timm does.
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
    """A trained network of timm, frozen and in eval mode: pictures to descriptors.

    A map of features becomes a descriptor by generalised mean pooling (exponent 3, Radenovic et
    al., 2019), any other output as timm pools it. Not a module, so that its tensors are no part of
    what holds it.

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
        fill(network, weights.read_tensors(source), source=source)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        # Pictures come normalised as ours and are shown as the teacher was trained to see them.
        config = timm.data.resolve_model_data_config(network)
        mean, std, its_mean, its_std = (
            torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            for values in (images.MEAN, images.STD, config["mean"], config["std"])
        )
        self.factor, self.offset = std / its_std, (mean - its_mean) / its_std
        self.dim = self.describe(torch.zeros(1, *config["input_size"])).shape[1]

    @torch.no_grad()
    def describe(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W), normalised as ours -> (B, dim) float32, on the pictures' device."""
        if self.factor.device != pictures.device:
            self.network = self.network.to(pictures.device)
            self.factor, self.offset = (
                part.to(pictures.device) for part in (self.factor, self.offset)
            )
        seen = (pictures * self.factor + self.offset).to(memory_format=torch.channels_last)
        features = self.network.forward_features(seen)
        if features.ndim == 4 and features.shape[1] == self.network.num_features:
            return features.float().clamp(min=TINY).pow(GEM).mean((2, 3)).pow(1 / GEM)
        return self.network.forward_head(features, pre_logits=True).float()


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Fills a network of timm with exactly the file's tensors; ValueError names any that differ."""
    names = efficientnet_names(network)
    renamed = {}
    for name, value in tensors.items():
        layer, _, part = name.rpartition(".")
        renamed[f"{names[layer]}.{part}" if layer in names else name] = value
    own = network.state_dict()
    problems = {
        "missing": own.keys() - renamed.keys(),
        "unexpected": renamed.keys() - own.keys(),
        "misshapen": [n for n in own.keys() & renamed.keys() if own[n].shape != renamed[n].shape],
    }
    if any(problems.values()):
        lines = [
            f"{len(found)} {kind}, as {sorted(found)[0]}"
            for kind, found in problems.items()
            if found
        ]
        raise ValueError(f"{source} does not fit the teacher's network: {'; '.join(lines)}")
    network.load_state_dict(renamed)


def efficientnet_names(network: nn.Module) -> dict[str, str]:
    """efficientnet_pytorch's layer -> timm's; nothing for a network that is no EfficientNet."""
    if not isinstance(network, timm.models.EfficientNet):
        return {}
    names, number = dict(TRUNK), 0
    for stage, blocks in enumerate(network.blocks):
        for place, block in enumerate(blocks):
            table = SEPARABLE if isinstance(block, DepthwiseSeparableConv) else INVERTED
            names |= {
                f"_blocks.{number}.{its}": f"blocks.{stage}.{place}.{timms}"
                for its, timms in table.items()
            }
            number += 1
    return names
