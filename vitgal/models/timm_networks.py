"""Networks of timm by name: their weights, from timm's hub or a file, and their image sizes.

`timm:NAME` names a network with the weights that timm downloads and caches, `timm:NAME@FILE` one
with the weights of a local file. A file is read as data: no code from it runs.
"""

import contextlib
import difflib
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torch import Tensor, nn

from vitgal import runs
from vitgal.features.files import FileError
from vitgal.models import layouts
from vitgal.models.checkpoint_files import use_tensors
from vitgal.models.sources import PRETRAINED, NetworkError, TimmSource

PREFIX = runs.TIMM
NEAREST = 3  # names in an error
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


def check_name(name: str) -> None:
    """Raises NetworkError, with the nearest names, where timm has no network of this name."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*timm.list_models(), *timm.list_pretrained()]
        near = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.4)
        raise NetworkError(
            f"timm has no network {runs.short(name)}"
            + (f"; the nearest are {', '.join(near)}" if near else "; timm.list_models() has all")
        )
    tags = timm.list_pretrained(f"{architecture}.*") if tag else ()
    if tag and name not in tags:
        raise NetworkError(
            f"timm has no weights {runs.short(name)}; of {architecture} it has "
            + (", ".join(tags) or "none")
        )


def open_network(source: TimmSource, options: Mapping[str, Any]) -> nn.Module:
    """Builds a network of timm for its own image size, with its weights, in eval mode.

    options: of `timm.create_model`; `num_classes` 0 leaves the classifier out.

    Raises:
        FileNotFoundError: there is no such file.
        NetworkError, FileError: an unknown network, one without weights in timm, a hub that cannot
            be reached or refuses, or a file that does not fit.
    """
    check_name(source.name)
    if source.weights != PRETRAINED:
        network = _create(source.name, options)
        if source.weights is not None:
            file = Path(source.weights)
            use_tensors(file, lambda tensors: _fill_timm(network, tensors, file))
        return network
    config = timm.get_pretrained_cfg(source.name)
    origins = ("url", "hf_hub_id", "file", "state_dict")
    if not any(getattr(config, origin, None) for origin in origins):
        raise NetworkError(
            f"timm has no weights for {source.name}: name a file, {PREFIX}{source.name}@FILE"
        )
    with _hub_errors(source.name, config):
        return _create(source.name, {**options, "pretrained": True})


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    return timm.create_model(name, **options).eval()


@contextlib.contextmanager
def _hub_errors(name: str, config: Any) -> Iterator[None]:
    """Turns the errors of a download, from any library, into one sentence with the remedy."""
    try:
        yield
    except TypeError:  # an argument that the network does not have
        raise
    except Exception as error:  # of requests, httpx, huggingface_hub, urllib or timm
        repository = getattr(config, "hf_hub_id", None)
        page = f"https://huggingface.co/{repository}" if repository else config.url
        if "401 Client" in str(error) or "403 Client" in str(error):
            raise NetworkError(
                f"the weights of {name} are given out under a licence: accept it at {page}, then "
                "log in with `hf auth login`, or download model.safetensors there and name it, "
                f"{PREFIX}{name}@FILE"
            ) from error
        raise NetworkError(
            f"the weights of {name} cannot be fetched ({runs.printable(error)[:150]}): download "
            f"{'model.safetensors from ' if repository else ''}{page} elsewhere, copy it here and "
            f"name it, {PREFIX}{name}@FILE; nothing unfinished in timm's cache is used"
        ) from error


def fingerprint_tensors(network: nn.Module) -> str:
    """Returns the sha256 of a network's tensors with their names, types and shapes, in hex."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if value.ndim
            else repr(value.item()).encode()
        )
    return digest.hexdigest()


def for_size(
    network: nn.Module, name: str, size: tuple[int, int], options: dict[str, Any]
) -> nn.Module:
    """Returns the network, or a copy with interpolated positions, for (height, width) in pixels.

    Many transformers take one size only: their positions are interpolated as timm does it.

    name, options: with which timm built it. Raises NetworkError, with the sizes that it takes.
    """
    if _takes(network, size):
        return network
    embed = getattr(network, "patch_embed", None)
    step = embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)
    near = tuple(max(1, round(side / part)) * part for side, part in zip(size, step, strict=True))
    resized = _resized(network, name, near, options)
    if resized is not None and near == tuple(size):
        return resized
    own = "{} x {}".format(*network.pretrained_cfg["input_size"][1:])
    sizes = own if resized is None else f"sides that are multiples of {step[0]}, as {near}"
    raise NetworkError(f"{name} takes no images of {size[0]} x {size[1]} pixels, only {sizes}")


def _takes(network: nn.Module, size: tuple[int, int]) -> bool:
    device = next(network.parameters()).device
    try:
        with torch.inference_mode():
            network.forward_features(torch.zeros(1, 3, *size, device=device))
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
        resized = _create(name, options | {"img_size": size})
        resized.load_state_dict(adapt(state, resized) if adapt else state)
        resized.to(next(network.parameters()).device)
    except Exception:  # as above
        return None
    return resized if _takes(resized, size) else None


def _fill_timm(network: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    names = efficientnet_names(network)
    if not set(names.values()) & {key.rpartition(".")[0] for key in tensors}:
        names = {}  # the file uses timm's names

    def rename(key: str) -> str:
        """Returns the name in the file of the tensor that timm calls `key`."""
        layer, _, part = key.rpartition(".")
        return f"{names[layer]}.{part}" if layer in names else key

    layout = layouts.make_layout(network.state_dict(), rename)
    classifiers = network.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    dropped = tuple(f"{layer}." for layer in (*classifiers, "_fc"))
    fill = functools.partial(layouts.fill, network, dropped=dropped, source=source)
    try:
        fill(tensors, layout)
    except FileError as refusal:
        # Names of the network's authors, as DINOv2's, which timm knows how to read.
        adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        try:
            fill(adapt(dict(tensors), network), layout)
        except Exception:  # made for its own files; others raise anything
            raise refusal from None


def efficientnet_names(network: nn.Module) -> dict[str, str]:
    """Maps timm's layers to efficientnet_pytorch's; empty for a network that is no EfficientNet."""
    if not isinstance(network, timm.models.EfficientNet):
        return {}
    blocks = [
        (f"blocks.{stage}.{index}", block)
        for stage, stages in enumerate(network.blocks)
        for index, block in enumerate(stages)
    ]
    names = {timm_layer: layer for layer, timm_layer in TRUNK.items()}
    for number, (prefix, block) in enumerate(blocks):
        table = SEPARABLE if isinstance(block, DepthwiseSeparableConv) else INVERTED
        for layer, timm_layer in table.items():
            names[f"{prefix}.{timm_layer}"] = f"_blocks.{number}.{layer}"
    return names
