"""Model weights in and out: the published `.pth`, ImageNet XCiT, and our `.safetensors`.

A layout maps a file's tensor names to the model's. There are three; errors use the file's names:

* ours: the model's own names;
* official: XCiT's and ViTGaL's `.pth`, where class attention keeps query, key and value in one
  tensor and a ViTGaL autoencoder checkpoint has its backbone under `retrieval_back_bone.`;
* timm: the names of timm's XCiT, for ImageNet weights.

No code from a file is run: `.pth` are read by torch's weights-only unpickler.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitgal import runs
from vitgal.models.network import ARCHITECTURES, ViTGaL, build_model

FORMAT = 1
CONFIGURATION = "vitgal"  # the metadata entry that holds the configuration
BACKBONE_PREFIX = "retrieval_back_bone."
NAMED = 4  # tensors that an error lists of each kind
Layout = dict[str, tuple[str, ...]]  # a file's name -> the model's, stacked along the first axis


def load_model(source: str | Path, device: str | torch.device = "cpu") -> ViTGaL:
    """Loads a ViTGaL model from a published `.pth` or from our `.safetensors`.

    The architecture is taken from the configuration inside our file, or from width and depth of a
    published one (backbone or autoencoder checkpoint; its classifier `head.*` is left out).

    Returns:
        The model in eval mode, float32.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, no checkpoint, of another architecture, tries to run code,
            or has a tensor missing, unexpected or misshapen; the message names file and tensor.
    """
    source = Path(source)
    tensors, metadata = _read(source)
    if _is_safetensors(source):
        model = _build(source, _parse_configuration(source, metadata))
        layout, dropped = make_layout(model.state_dict(), str), ()
    else:
        model = _build(source, _published_configuration(source, tensors))
        official = _official_name if model.code_dim is None else _official_autoencoder_name
        layout, dropped = make_layout(model.state_dict(), official), ("head.",)
    fill(model, tensors, layout, dropped=dropped, source=source)
    return model.to(device)


def initial_weights(model: ViTGaL, source: str | Path | Mapping[str, Tensor]) -> None:
    """Fills the backbone with ImageNet weights, from which the published training starts.

    Every tensor but `local_atrous.*` and the autoencoder's is filled; a second class attention
    block (`cls_attn_blocks.1.*`) and the classifier (`head.*`) of the file are dropped. A ViTGaL
    model of ours also fills `local_atrous.*`; its autoencoder is dropped.

    Args:
        source: XCiT's `.pth`, timm's `.safetensors` or `.pth`, our `.safetensors`, or such a state
            dict. A tensor has the shape and kind (float or integer) of the model's.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_model`; the model is then unchanged.
    """
    in_memory = isinstance(source, Mapping)
    tensors = source if in_memory else read_tensors(source)
    if any(key.startswith("backbone.") for key in tensors):
        keys = (key for key in model.state_dict() if not key.startswith("autoencoder."))
        rename, dropped = str, ("autoencoder.",)
    else:
        official = any(re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", key) for key in tensors)
        keys = (key for key in model.state_dict() if key.startswith("backbone."))
        rename = _official_name if official else _timm_name
        dropped = ("head.", "cls_attn_blocks.1.")
    name = "the state dict" if in_memory else source
    fill(model, tensors, make_layout(keys, rename), dropped=dropped, source=name)


def save_model(model: ViTGaL, path: str | Path, *, dtype: str = "float32", **metadata: Any) -> Path:
    """Writes a model with its configuration as `.safetensors`: atomically, and reproducibly.

    Args:
        dtype: "float32", or "float16" for half the size; both load as float32.
        metadata: plain values kept beside the configuration (`read_configuration` returns them).
    Returns:
        The path.
    Raises:
        ValueError: another dtype, or a path that does not end in `.safetensors`.
        OSError: the file cannot be written; an older one at `path` is kept.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: models are written as .safetensors")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    tensors = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    for key, value in tensors.items():
        if value.is_floating_point():
            tensors[key] = value.to(getattr(torch, dtype)).contiguous()
    configuration = {
        "format": FORMAT,
        "architecture": model.architecture,
        "code_dim": model.code_dim,
        "dilations": model.dilations,
        "metadata": metadata,
    }
    # A single entry: safetensors writes several in an order that changes from run to run.
    text = json.dumps(runs.plain(configuration), sort_keys=True)
    try:
        with runs.atomic(path) as temporary:
            save_file(tensors, temporary, metadata={CONFIGURATION: text})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); an older file is kept") from error
    return path


def convert(source: str | Path, target: str | Path, *, dtype: str = "float32") -> Path:
    """Writes a published checkpoint, or a model of ours in another dtype, as our `.safetensors`.

    Raises as `load_model` and `save_model` do.
    """
    model = load_model(source)
    sha256 = runs.fingerprint_file(Path(source))
    return save_model(model, target, dtype=dtype, source_sha256=sha256)


# Reading


def read_configuration(path: str | Path) -> dict[str, Any]:
    """Reads the configuration in our `.safetensors`.

    Returns:
        A dict of format, architecture, code_dim, dilations, and metadata as `save_model` got it.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ours.
    """
    path = Path(path)
    if not _is_safetensors(path):
        raise ValueError(f"{path} is no .safetensors file")
    with _open(path) as handle:
        return _parse_configuration(path, handle.metadata())


def read_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """Reads the tensors of any network's file, by name: `.safetensors`, or a `.pth` of tensors.

    They keep the file's dtype and shape and are on the CPU.

    Raises FileNotFoundError, and ValueError where the file is neither.
    """
    return _read(Path(path))[0]


def read_checkpoint(path: str | Path) -> Any:
    """Reads a `.pth` on the CPU, without running code from it.

    Plain values, tensors and `argparse.Namespace` (the published checkpoints carry their arguments)
    are read, every other type is refused.

    Raises FileNotFoundError, and ValueError naming the file and, where one was refused, the type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can fail in any way; each is reported with its name
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path} was refused: it wants to load {refused[1]}, which is neither a tensor nor "
                "plain data and could run code; get the checkpoint from a source you trust"
            ) from error
        raise ValueError(
            f"{path} is no readable checkpoint (cut off, or another kind of file); fetch it again"
        ) from error


def _is_safetensors(path: Path) -> bool:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    return path.suffix == ".safetensors"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole .safetensors file ({error}); fetch or write it again"
        ) from error


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str] | None]:
    """All tensors of a file, and the metadata of a `.safetensors`.

    The published `.pth` hold their tensors under `model`.
    """
    if _is_safetensors(path):
        with _open(path) as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata()
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise ValueError(
            f"{path} holds no model weights: neither tensors nor a dict `model` of them"
        )
    return tensors, None


# Configurations


def _parse_configuration(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    if CONFIGURATION not in (metadata or {}):
        raise ValueError(
            f"{path} holds no ViTGaL configuration, so save_model did not write it; ImageNet "
            "weights go to initial_weights"
        )
    try:
        configuration = json.loads(metadata[CONFIGURATION])
        file_format = configuration["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a broken ViTGaL configuration; write it again") from error
    if file_format != FORMAT:
        raise ValueError(
            f"{path} has format {file_format!r}, this vitgal reads {FORMAT}; update vitgal"
        )
    return configuration


def _published_configuration(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Architecture and code dimension of a published checkpoint, by names and shapes of tensors."""
    has_autoencoder = any(key.startswith(BACKBONE_PREFIX) for key in tensors)
    prefix = BACKBONE_PREFIX if has_autoencoder else ""
    token = f"{prefix}cls_token"
    block = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.")
    depth = max((int(match[1]) + 1 for key in tensors if (match := block.match(key))), default=0)
    if token not in tensors or not depth:
        raise ValueError(
            f"{source} holds no ViTGaL weights (no {token} or no blocks); its tensors are "
            f"{_abridged(tensors) or 'none'}"
        )
    if not any(key.startswith(f"{prefix}local_atrous.") for key in tensors):
        raise ValueError(
            f"{source} has no {prefix}local_atrous.*, so it is XCiT and not ViTGaL; ImageNet "
            "weights go to initial_weights"
        )
    size = (tensors[token].numel(), depth)
    names = [name for name, known_size in ARCHITECTURES.items() if known_size == size]
    if not names:
        known = ", ".join(f"{name} {known_size}" for name, known_size in ARCHITECTURES.items())
        raise ValueError(
            f"{source} is of another architecture: its {token} has width {size[0]} and its blocks "
            f"number {depth}; known: {known}"
        )
    code_dim = _published_code_dim(source, tensors) if has_autoencoder else None
    return {"architecture": names[0], "code_dim": code_dim}


def _published_code_dim(source: Path, tensors: Mapping[str, Tensor]) -> int:
    """The code dimension by majority of three tensors, so that `fill` reports a misshapen one."""
    axes = {"whitening_layer.weight": 0, "whitening_layer.bias": 0, "ae_decoder_layer.weight": -1}
    shapes = {key: tensors[key].shape for key in axes if key in tensors and tensors[key].ndim}
    if not shapes:
        raise ValueError(f"{source} lacks matrices {', '.join(axes)}")
    return statistics.mode(shape[axes[key]] for key, shape in shapes.items())


def _build(source: Path, configuration: dict[str, Any]) -> ViTGaL:
    keys = {"architecture", "code_dim", "dilations"} & configuration.keys()
    try:
        # Any seed: it leaves torch's random state unchanged.
        return build_model(**{key: configuration[key] for key in keys}, seed=0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} asks for a network that cannot be built: {error}") from error


# Layouts


def make_layout(keys: Iterable[str], rename: Callable[[str], str]) -> Layout:
    """Groups a model's keys by their name in the file (query, key and value in this order)."""
    layout: Layout = {}
    for key in keys:
        layout[rename(key)] = (*layout.get(rename(key), ()), key)
    return layout


def _timm_name(key: str) -> str:
    return key.removeprefix("backbone.")


def _official_name(key: str) -> str:
    name = re.sub(r"^pos_embed\.", "pos_embeder.", _timm_name(key))
    return re.sub(r"^(cls_attn_blocks\.\d+\.attn)\.[qkv]\.", r"\1.qkv.", name)


def _official_autoencoder_name(key: str) -> str:
    if not key.startswith("autoencoder."):
        return BACKBONE_PREFIX + _official_name(key)
    name = _official_name(key.removeprefix("autoencoder."))
    name = re.sub(r"^encoder\.", "whitening_layer.", name)
    return re.sub(r"^decoder\.", "ae_decoder_layer.", name)


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    *,
    dropped: tuple[str, ...] = (),
    source: str | Path,
) -> None:
    """Copies every tensor of the layout into the network, or raises before it changes anything.

    Args:
        tensors: by the file's names; each has the shape of the network's tensors that the layout
            lists for it, stacked along the first axis.
        dropped: beginnings of names that the file may have beside the layout.
        source: where the tensors come from, for the error.
    Raises:
        ValueError: a tensor is missing, unexpected or misshapen.
    """
    own = network.state_dict()
    problems = {
        "missing": [name for name in layout if name not in tensors],
        "unexpected": [k for k in tensors if k not in layout and not k.startswith(dropped)],
        "misshapen": [
            f"{name} ({problem})"
            for name, keys in layout.items()
            if name in tensors and (problem := _misfit(tensors[name], [own[key] for key in keys]))
        ],
    }
    if any(problems.values()):
        lines = [f"{kind}: {_abridged(names)}" for kind, names in problems.items() if names]
        name = getattr(network, "architecture", type(network).__name__)
        raise ValueError(f"{source} does not fit {name}; " + "; ".join(lines))
    with torch.no_grad():
        for name, keys in layout.items():
            parts = tensors[name].chunk(len(keys)) if len(keys) > 1 else [tensors[name]]
            for key, part in zip(keys, parts, strict=True):
                own[key].copy_(part)


def _misfit(tensor: Tensor, parts: list[Tensor]) -> str | None:
    """How a file's tensor differs from the network's tensors stacked along the first axis."""
    shape = tuple(parts[0].shape)
    if len(parts) > 1:
        shape = (sum(len(part) for part in parts), *shape[1:])
    if tuple(tensor.shape) != shape:
        return f"{tuple(tensor.shape)} instead of {shape}"
    if tensor.is_floating_point() != parts[0].is_floating_point():
        return f"{tensor.dtype} instead of {parts[0].dtype}"
    return None


def _abridged(names: Iterable[str]) -> str:
    """The first few names and the number of the others."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
