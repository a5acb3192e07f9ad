"""Model weights in and out: the published `.pth`, ImageNet XCiT, and our `.safetensors`.

A file names its tensors in one of three layouts. Each is a table from the file's names to the
model's, so that loading is one strict comparison, reported in the names that the file uses:

* ours: the model's own names;
* official: XCiT's and ViTGaL's `.pth`, where class attention keeps query, key and value in one
  tensor and a ViTGaL autoencoder checkpoint has its backbone under `retrieval_back_bone.`;
* timm: the names of timm's XCiT, for ImageNet weights.

Nothing here runs code from a file: `.pth` are read by torch's weights-only unpickler.
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
from torch import Tensor

from vitgal import runs
from vitgal.models.network import ARCHITECTURES, ViTGaL, build_model

FORMAT = 1
CONFIGURATION = "vitgal"  # the metadata entry that holds the configuration
BACKBONE_PREFIX = "retrieval_back_bone."
NAMED = 4  # tensors that an error lists of each kind
Layout = dict[str, tuple[str, ...]]  # a file's name -> the model's, stacked along the first axis


def load_model(source: str | Path, device: str | torch.device = "cpu") -> ViTGaL:
    """A ViTGaL model from a published `.pth` or from our `.safetensors`, in eval mode, float32.

    The architecture is read from the file: from the configuration inside ours, from width and depth
    of a published one (backbone or autoencoder checkpoint; its classifier `head.*` is left out).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, no checkpoint, of another architecture, tries to run code,
            or has a tensor missing, unexpected or misshapen; the message names file and tensor.
    """
    source = Path(source)
    if _is_safetensors(source):
        tensors, configuration = _read_safetensors(source)
        model = _build(source, _checked(source, configuration))
        layout, dropped = _layout(model.state_dict(), str), ()
    else:
        tensors = _state_dict(source)
        model = _build(source, _published_configuration(source, tensors))
        official = _official if model.code_dim is None else _official_autoencoder
        layout, dropped = _layout(model.state_dict(), official), ("head.",)
    _fill(model, tensors, layout, dropped=dropped, source=source)
    return model.to(device)


def initial_weights(model: ViTGaL, source: str | Path | Mapping[str, Tensor]) -> None:
    """Fills the backbone with ImageNet weights, from which the published training starts.

    Every tensor but `local_atrous.*` and the autoencoder's is filled; a second class attention
    block (`cls_attn_blocks.1.*`) and the classifier (`head.*`) of the file are dropped. A ViTGaL
    model of ours, to train it further, fills `local_atrous.*` too; its autoencoder is dropped.

    Args:
        source: XCiT's `.pth`, timm's `.safetensors` or `.pth`, our `.safetensors`, or such a state
            dict.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_model`; the model is then unchanged.
    """
    if isinstance(source, Mapping):
        tensors, name = source, "the state dict"
    elif _is_safetensors(name := Path(source)):
        tensors, _ = _read_safetensors(name)
    else:
        tensors = _state_dict(name)
    if any(key.startswith("backbone.") for key in tensors):
        ours = (key for key in model.state_dict() if not key.startswith("autoencoder."))
        _fill(model, tensors, _layout(ours, str), dropped=("autoencoder.",), source=name)
        return
    official = any(re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", key) for key in tensors)
    backbone = (key for key in model.state_dict() if key.startswith("backbone."))
    layout = _layout(backbone, _official if official else _timm)
    _fill(model, tensors, layout, dropped=("head.", "cls_attn_blocks.1."), source=name)


def save_model(model: ViTGaL, path: str | Path, *, dtype: str = "float32", **metadata: Any) -> Path:
    """Writes a model with its configuration as `.safetensors`, atomically; same model, same bytes.

    Args:
        dtype: "float32", or "float16" for half the size; both load as float32.
        metadata: plain values kept beside the configuration (`read_configuration` gives them).
    Raises:
        ValueError: another dtype, or a path that does not end in `.safetensors`.
        OSError: the file cannot be written; an older one at `path` is whole.
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
    # One entry alone: safetensors writes several in an order that changes from run to run.
    text = json.dumps(runs.plain(configuration), sort_keys=True)
    try:
        with runs.atomic(path) as temporary:
            save_file(tensors, temporary, metadata={CONFIGURATION: text})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); what was there is kept") from error
    return path


def convert(source: str | Path, target: str | Path, *, dtype: str = "float32") -> Path:
    """Writes a published checkpoint, or a model of ours in another dtype, as our `.safetensors`.

    Raises as `load_model` and `save_model` do.
    """
    model = load_model(source)
    sha256 = runs.fingerprint_file(Path(source))
    return save_model(model, target, dtype=dtype, source_sha256=sha256)


def read_configuration(path: str | Path) -> dict[str, Any]:
    """What our `.safetensors` says of its model.

    A dict of format, architecture, code_dim, dilations, and metadata as given to `save_model`.
    Raises FileNotFoundError, and ValueError where the file is none of ours.
    """
    path = Path(path)
    if not _is_safetensors(path):
        raise ValueError(f"{path} is no .safetensors file")
    with _open(path) as handle:
        return _checked(path, handle.metadata())


def read_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of any network's file, by name: `.safetensors`, or a `.pth` that holds them.

    Raises FileNotFoundError, and ValueError where the file is none of both.
    """
    path = Path(path)
    return _read_safetensors(path)[0] if _is_safetensors(path) else _state_dict(path)


def read_checkpoint(path: str | Path) -> Any:
    """The content of a `.pth` on the CPU, unpickled without running code.

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
    """A safetensors handle, a context manager; a broken header is reported here."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole .safetensors file ({error}); fetch or write it again"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """All tensors and the metadata."""
    with _open(path) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata()


def _checked(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Our configuration from the metadata of a safetensors file."""
    if CONFIGURATION not in (metadata or {}):
        raise ValueError(
            f"{path} holds no ViTGaL configuration, so save_model did not write it; ImageNet "
            "weights go to initial_weights"
        )
    try:
        configuration = json.loads(metadata[CONFIGURATION])
        found = configuration["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a broken ViTGaL configuration; write it again") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this vitgal reads {FORMAT}; update vitgal")
    return configuration


def _state_dict(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a `.pth`, whether saved alone or under `model` as the published ones are."""
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise ValueError(
            f"{path} holds no model weights: neither tensors nor a dict `model` of them"
        )
    return tensors


def _published_configuration(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Architecture and code width of a published checkpoint, from its tensors' names and shapes."""
    with_autoencoder = any(key.startswith(BACKBONE_PREFIX) for key in tensors)
    prefix = BACKBONE_PREFIX if with_autoencoder else ""
    token = f"{prefix}cls_token"
    blocks = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.")
    depth = max((int(found[1]) + 1 for key in tensors if (found := blocks.match(key))), default=0)
    if token not in tensors or not depth:
        raise ValueError(
            f"{source} holds no ViTGaL weights (no {token} or no blocks); its tensors are "
            f"{_some(tensors) or 'none'}"
        )
    if not any(key.startswith(f"{prefix}local_atrous.") for key in tensors):
        raise ValueError(
            f"{source} has no {prefix}local_atrous.*, so it is XCiT and not ViTGaL; ImageNet "
            "weights go to initial_weights"
        )
    size = (tensors[token].numel(), depth)
    names = [name for name, known in ARCHITECTURES.items() if known == size]
    if not names:
        raise ValueError(
            f"{source} is of another architecture: its {token} has width {size[0]} and its blocks "
            f"number {depth}; known: "
            + ", ".join(f"{name} {known}" for name, known in ARCHITECTURES.items())
        )
    code_dim = _code_dim(source, tensors) if with_autoencoder else None
    return {"architecture": names[0], "code_dim": code_dim}


def _code_dim(source: Path, tensors: Mapping[str, Tensor]) -> int:
    """The width that most of the coder's tensors agree on, so that a misshapen one is found out."""
    axes = {"whitening_layer.weight": 0, "whitening_layer.bias": 0, "ae_decoder_layer.weight": -1}
    found = {key: tensors[key].shape for key in axes if key in tensors and tensors[key].ndim}
    widths = [shape[axes[key]] for key, shape in found.items()]
    if not widths:
        raise ValueError(f"{source} lacks matrices {', '.join(axes)}")
    return statistics.mode(widths)


def _build(source: Path, configuration: dict[str, Any]) -> ViTGaL:
    """The configuration's network; the seed only keeps torch's random state as it is."""
    wanted = {
        key: configuration[key]
        for key in ("architecture", "code_dim", "dilations")
        if key in configuration
    }
    try:
        return build_model(**wanted, seed=0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} asks for a network that cannot be built: {error}") from error


def _layout(keys: Iterable[str], rename: Callable[[str], str]) -> Layout:
    """Groups the model's keys by their name in the file (query, key and value in this order)."""
    layout: dict[str, tuple[str, ...]] = {}
    for key in keys:
        layout[rename(key)] = (*layout.get(rename(key), ()), key)
    return layout


def _timm(key: str) -> str:
    return key.removeprefix("backbone.")


def _official(key: str) -> str:
    name = re.sub(r"^pos_embed\.", "pos_embeder.", _timm(key))
    return re.sub(r"^(cls_attn_blocks\.\d+\.attn)\.[qkv]\.", r"\1.qkv.", name)


def _official_autoencoder(key: str) -> str:
    if not key.startswith("autoencoder."):
        return BACKBONE_PREFIX + _official(key)
    name = _official(key.removeprefix("autoencoder."))
    name = re.sub(r"^encoder\.", "whitening_layer.", name)
    return re.sub(r"^decoder\.", "ae_decoder_layer.", name)


def _fill(
    model: ViTGaL,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    *,
    dropped: tuple[str, ...],
    source: Path | str,
) -> None:
    """Copies every tensor of the layout into the model, or raises before it changes anything."""
    own = model.state_dict()
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
        lines = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
        raise ValueError(f"{source} does not fit {model.architecture}; " + "; ".join(lines))
    with torch.no_grad():
        for name, keys in layout.items():
            parts = tensors[name].chunk(len(keys)) if len(keys) > 1 else [tensors[name]]
            for key, part in zip(keys, parts, strict=True):
                own[key].copy_(part)


def _misfit(found: Tensor, parts: list[Tensor]) -> str | None:
    """How a file's tensor differs from the model's tensors stacked along the first axis."""
    shape = tuple(parts[0].shape)
    if len(parts) > 1:
        shape = (sum(len(part) for part in parts), *shape[1:])
    if tuple(found.shape) != shape:
        return f"{tuple(found.shape)} instead of {shape}"
    if found.is_floating_point() != parts[0].is_floating_point():
        return f"{found.dtype} instead of {parts[0].dtype}"
    return None


def _some(names: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
