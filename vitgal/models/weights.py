"""Model weights in and out: the published `.pth`, ImageNet XCiT, and our `.safetensors`.

A layout maps a file's tensor names to the model's. There are three; errors use the file's names:

* ours: the model's own names;
* official: XCiT's and ViTGaL's `.pth`, where class attention keeps query, key and value in one
  tensor and a ViTGaL autoencoder checkpoint has its backbone under `retrieval_back_bone.`;
* timm: the names of timm's XCiT, for ImageNet weights.

No network is built before the file's names and shapes fit it.
"""

import functools
import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitgal import runs
from vitgal.features.files import FileError
from vitgal.models import checkpoint_files
from vitgal.models.layouts import fill, make_layout, refuse_misfits
from vitgal.models.network import ARCHITECTURES, ViTGaL, build_model, outline
from vitgal.models.sources import (
    CONFIGURATION,
    FORMAT,
    PRETRAINED,
    NetworkError,
    TimmSource,
    is_safetensors,
    open_safetensors,
    parse_configuration,
    read_configuration,
)
from vitgal.models.timm_networks import PREFIX, open_network

BUILT_FROM = ("architecture", "code_dim", "dilations", "embed_dim", "num_heads", "class_token")
DTYPES = ("float32", "float16", "int8")
NETWORK = "network"  # the metadata entry that names a network of timm
BACKBONE_PREFIX = "retrieval_back_bone."
TRUNK_PREFIX = "backbone.trunk.network."


def load_model(source: str | Path, device: str | torch.device = "cpu") -> ViTGaL:
    """Loads a ViTGaL model, float32 in eval mode, from a published `.pth` or our `.safetensors`.

    The architecture is taken from the configuration inside our file, or from width and depth of a
    published one (backbone or autoencoder checkpoint; its classifier `head.*` is left out). A
    `.pth` with our names is read too. Prefixes of wrappers: see `use_tensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, no checkpoint, of another architecture, tries to run code,
            or has a tensor missing, unexpected or misshapen; the message names file and tensor.
    """
    source = Path(source)
    if is_safetensors(source):
        tensors, metadata = checkpoint_files.read_safetensors(source)
        return _filled(source, tensors, parse_configuration(source, metadata)).to(device)
    return checkpoint_files.use_tensors(source, functools.partial(_load_unlabelled, source)).to(
        device
    )


def initial_weights(model: ViTGaL, source: str | Path | Mapping[str, Tensor]) -> None:
    """Fills the backbone with ImageNet weights, from which the published training starts.

    Every tensor but `local_atrous.*` and the autoencoder's is filled; a second class attention
    block (`cls_attn_blocks.1.*`) and the classifier (`head.*`) of the file are dropped. A ViTGaL
    model of ours also fills `local_atrous.*`; its autoencoder is dropped. Of a network of timm the
    network itself is filled, and its class attention stays random.

    Args:
        source: XCiT's `.pth`, timm's `.safetensors` or `.pth`, our `.safetensors`, or such a state
            dict. A tensor has the shape and kind (float or integer) of the model's. "pretrained"
            are the weights that timm downloads, "timm:NAME@FILE" those of a file.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_model`, or another network's name; the model is then unchanged.
    """

    def fill_backbone(tensors: Mapping[str, Tensor]) -> None:
        """Fills the model with tensors in any of the three layouts."""
        if any(key.startswith("backbone.") for key in tensors):
            keys = (key for key in model.state_dict() if not key.startswith("autoencoder."))
            rename, dropped = str, ("autoencoder.",)
        else:
            official = any(re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", key) for key in tensors)
            keys = (key for key in model.state_dict() if key.startswith("backbone."))
            rename = _official_name if official else _timm_name
            if model.on_timm:
                keys = (key for key in model.state_dict() if key.startswith(TRUNK_PREFIX))
                rename = _trunk_name
            dropped = ("head.", "cls_attn_blocks.1.")
        fill(model, tensors, make_layout(keys, rename), dropped=dropped, source=name)

    if isinstance(source, Mapping):
        name = "the state dict"
        fill_backbone(source)
    elif (of_timm := _timm_source(model, source)) is not None:
        name = str(of_timm)
        fill_backbone(open_network(of_timm, {"num_classes": 0}).state_dict())
    else:
        name = source
        checkpoint_files.use_tensors(source, fill_backbone)


def _timm_source(model: ViTGaL, source: str | Path) -> TimmSource | None:
    """The network of timm that fills the model; None for a file that `fill_backbone` reads."""
    own = model.architecture.removeprefix(PREFIX)
    if source == PRETRAINED:
        return TimmSource(own)
    parsed = TimmSource.parse(source)
    if parsed is not None and parsed.name.partition(".")[0] != own.partition(".")[0]:
        raise NetworkError(
            f"{source} are weights of {parsed.name} and the architecture is "
            f"{model.architecture}: name the same network in both"
        )
    if parsed is None and model.on_timm and not _is_ours(Path(source)):
        return TimmSource(own, Path(source))
    return parsed


def _is_ours(path: Path) -> bool:
    if not is_safetensors(path):
        return False
    with open_safetensors(path) as handle:
        return CONFIGURATION in (handle.metadata() or {})


def save_model(model: ViTGaL, path: str | Path, *, dtype: str = "float32", **metadata: Any) -> Path:
    """Writes a model with its configuration as `.safetensors`, reproducibly, and returns the path.

    Args:
        dtype: "float32", "float16" for half the size, or "int8" for a quarter, as `rounded`; all
            load as float32.
        metadata: plain values kept beside the configuration (`read_configuration` returns them).
    Raises:
        ValueError: another dtype, or a path that does not end in `.safetensors`.
        OSError: the file cannot be written; an older one at `path` is kept.
    """
    path = Path(path)
    configuration = {
        "format": FORMAT,
        "architecture": model.architecture,
        "code_dim": model.code_dim,
        "dilations": model.dilations,
        "metadata": metadata,
    }
    if model.on_timm:
        configuration |= {"embed_dim": model.embed_dim, "num_heads": model.num_heads}
        if model.class_token != "own":
            configuration["class_token"] = model.class_token
    return _write(path, model.state_dict(), dtype, {CONFIGURATION: configuration})


def _write(path: Path, tensors: Mapping[str, Tensor], dtype: str, entry: dict[str, Any]) -> Path:
    """Writes tensors with one entry of metadata."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: models are written as .safetensors")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    tensors = {key: value.detach().cpu() for key, value in tensors.items()}
    if dtype == "int8":
        tensors = checkpoint_files.rounded(tensors)
    else:
        for key, value in tensors.items():
            if value.is_floating_point():
                tensors[key] = value.to(getattr(torch, dtype)).contiguous()
    # A single entry: safetensors writes several in an order that changes from run to run.
    ((key, value),) = entry.items()
    metadata = {key: json.dumps(runs.plain(value), sort_keys=True)}
    try:
        with runs.atomic(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); an older file is kept") from error
    return path


def convert(source: str | Path, target: str | Path, *, dtype: str = "float32") -> Path:
    """Writes a published checkpoint, or a model of ours in another dtype, as our `.safetensors`.

    Of "timm:NAME@FILE" timm's network is written, without its classifier, for use under that name.
    Raises as `load_model` and `save_model` do, and for a network of timm as `open_network`.
    """
    if network := TimmSource.parse(source):
        tensors = open_network(network, {"num_classes": 0}).state_dict()
        return _write(Path(target), tensors, dtype, {NETWORK: network.name})
    model = load_model(source)
    sha256 = runs.fingerprint_file(Path(source))
    return save_model(model, target, dtype=dtype, source_sha256=sha256)


def _load_unlabelled(source: Path, tensors: Mapping[str, Tensor]) -> ViTGaL:
    """Loads a checkpoint whose architecture and code dimension follow from names and shapes."""
    if any(key.startswith(BACKBONE_PREFIX) for key in tensors):
        prefix, rename = BACKBONE_PREFIX, _official_autoencoder_name
    elif "backbone.cls_token" in tensors:
        prefix, rename = "backbone.", str
    else:
        prefix, rename = "", _official_name
    token = f"{prefix}cls_token"
    block = re.compile(rf"{re.escape(prefix)}blocks\.(\d{{1,3}})\.")
    depth = max((int(match[1]) + 1 for key in tensors if (match := block.match(key))), default=0)
    if token not in tensors or not depth:
        raise FileError(
            f"{source} holds no ViTGaL weights (no {token} or no blocks); its tensors are "
            f"{checkpoint_files.abridged(tensors) or 'none'}; {checkpoint_files.REMEDY}"
        )
    atrous = rename("local_atrous.")
    if not any(key.startswith(atrous) for key in tensors):
        raise FileError(
            f"{source} has no {atrous}*, so it is XCiT and not ViTGaL; ImageNet weights go to "
            "initial_weights"
        )
    size = (tensors[token].numel(), depth)
    names = [name for name, shape in ARCHITECTURES.items() if shape == size]
    if not names:
        sizes = ", ".join(f"{name} {shape}" for name, shape in ARCHITECTURES.items())
        raise FileError(
            f"{source} is of another architecture: its {token} has width {size[0]} and its blocks "
            f"number {depth}; known: {sizes}"
        )
    code_dim = _code_dim(source, tensors, rename) if rename is not _official_name else None
    configuration = {"architecture": names[0], "code_dim": code_dim}
    return _filled(source, tensors, configuration, rename, ("head.",))


def _code_dim(
    source: Path, tensors: Mapping[str, Tensor], rename: Callable[[str], str]
) -> int | None:
    """The code dimension by majority of three tensors, so that `fill` reports a misshapen one."""
    parts = {"encoder.weight": 0, "encoder.bias": 0, "decoder.weight": -1}
    axes = {rename(f"autoencoder.{part}"): axis for part, axis in parts.items()}
    shapes = {key: tensors[key].shape for key in axes if key in tensors and tensors[key].ndim}
    if not shapes and rename is not str:
        raise FileError(f"{source} lacks matrices {', '.join(axes)}")
    sizes = [shape[axes[key]] for key, shape in shapes.items()]
    return statistics.mode(sizes) if sizes else None


def load_outline(source: str | Path) -> ViTGaL:
    """Builds the network of a weight file without its tensors, on the meta device.

    A `.pth` has the published XCiT. Raises as `load_model`.
    """
    source = Path(source)
    if not is_safetensors(source):
        return outline()
    return _outlined(source, read_configuration(source))


def _built(build: Callable[..., ViTGaL], configuration: dict[str, Any]) -> ViTGaL:
    """The network of a configuration by `build`, which is `build_model` or `outline`."""
    return build(**{key: configuration[key] for key in BUILT_FROM if key in configuration})


def _outlined(source: Path, configuration: dict[str, Any]) -> ViTGaL:
    try:
        return _built(outline, configuration)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise FileError(
            f"{source} asks for a network that cannot be built: {runs.printable(error)[:200]}"
        ) from error


def _filled(
    source: Path,
    tensors: Mapping[str, Tensor],
    configuration: dict[str, Any],
    rename: Callable[[str], str] = str,
    dropped: tuple[str, ...] = (),
) -> ViTGaL:
    """Builds the network without memory for its tensors, and fills it if all of them fit."""
    model = _outlined(source, configuration)
    layout = make_layout(model.state_dict(), rename)
    if model.on_timm:  # it can have buffers that no file holds
        refuse_misfits(model, tensors, layout, dropped=dropped, source=source)
        model = _built(functools.partial(build_model, seed=0), configuration)
    fill(model, tensors, layout, dropped=dropped, source=source)
    return model


# Layouts


def _timm_name(key: str) -> str:
    return key.removeprefix("backbone.")


def _trunk_name(key: str) -> str:
    return key.removeprefix(TRUNK_PREFIX)


def _official_name(key: str) -> str:
    name = re.sub(r"^pos_embed\.", "pos_embeder.", _timm_name(key))
    return re.sub(r"^(cls_attn_blocks\.\d+\.attn)\.[qkv]\.", r"\1.qkv.", name)


def _official_autoencoder_name(key: str) -> str:
    if not key.startswith("autoencoder."):
        return BACKBONE_PREFIX + _official_name(key)
    name = _official_name(key.removeprefix("autoencoder."))
    name = re.sub(r"^encoder\.", "whitening_layer.", name)
    return re.sub(r"^decoder\.", "ae_decoder_layer.", name)
