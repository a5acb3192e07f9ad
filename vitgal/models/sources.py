"""Sources of models: what a name or a file stands for, before it is opened.

Nothing here imports torch, so that a finished stage answers within a second.
"""

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open

from vitgal import runs
from vitgal.settings import GlobalSettings

PRETRAINED = "pretrained"  # a source of weights: timm's own
SEED = 0  # of untrained networks
CONFIGURATION = "vitgal"  # the metadata entry of our .safetensors that holds the configuration
VITGAL_SIZE = 512  # pixels, as published


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
        architecture = _architecture(path)
    network = TimmSource.parse(architecture)  # the model, or what is below ViTGaL's head
    if network is None:
        return replace(settings, size=settings.size or VITGAL_SIZE)
    from vitgal.models.describers import sized_for  # imports torch

    return sized_for(network.name, settings)


def _architecture(path: Path) -> str:
    """Reads the architecture from our `.safetensors`. Raises as `weights.read_configuration`."""
    with contextlib.suppress(Exception), safe_open(path, "numpy") as handle:
        return str(json.loads(handle.metadata()[CONFIGURATION])["architecture"])
    from vitgal.models.weights import read_configuration  # says what is wrong

    return str(read_configuration(path).get("architecture"))


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
