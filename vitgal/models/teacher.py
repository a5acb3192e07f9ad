"""Networks of timm as teachers of distillation."""

from pathlib import Path

import timm
import torch
from torch import Tensor

from vitgal.models.backbones import GEM, TINY, renormalisation
from vitgal.models.timm_networks import TimmSource, for_size, open_network


class Teacher:
    """A trained network of timm that computes descriptors, frozen and in eval mode.

    Feature maps are pooled by the generalised mean (exponent 3, Radenovic et al., 2019), other
    outputs as timm does. The class is no nn.Module, so that its tensors are not saved with the
    network that holds it.

    name: timm's, as "tf_efficientnet_lite0".  source: the file of its weights.  size: (height,
    width) of its images in pixels. Raises as `open_network` and `for_size`.
    """

    def __init__(self, name: str, source: Path, size: tuple[int, int]):
        network = for_size(open_network(TimmSource(name, source), {}), name, size, {})
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        config = timm.data.resolve_model_data_config(network)
        self.factor, self.offset = renormalisation(config["mean"], config["std"])
        self.dim = self.describe(torch.zeros(1, 3, *size)).shape[1]

    @torch.no_grad()
    def describe(self, pictures: Tensor) -> Tensor:
        """Computes descriptors (B, dim) float32 of (B, 3, H, W) with our normalisation."""
        if self.factor.device != pictures.device:
            self.network = self.network.to(pictures.device)
            self.factor = self.factor.to(pictures.device)
            self.offset = self.offset.to(pictures.device)
        inputs = (pictures * self.factor + self.offset).to(memory_format=torch.channels_last)
        features = self.network.forward_features(inputs)
        if features.ndim == 4 and features.shape[1] == self.network.num_features:
            return features.float().clamp(min=TINY).pow(GEM).mean((2, 3)).pow(1 / GEM)
        return self.network.forward_head(features, pre_logits=True).float()
