"""Layouts: which tensors of a network each tensor of a file fills."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitgal.features.files import FileError
from vitgal.models.checkpoint_files import REMEDY, abridged

Layout = dict[str, tuple[str, ...]]  # a file's name -> the model's, stacked along the first axis


def make_layout(keys: Iterable[str], rename: Callable[[str], str]) -> Layout:
    """Groups a model's keys by their name in the file (query, key and value in this order)."""
    layout: Layout = {}
    for key in keys:
        layout[rename(key)] = (*layout.get(rename(key), ()), key)
    return layout


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
    refuse_misfits(network, tensors, layout, dropped=dropped, source=source)
    own = network.state_dict()
    if any(value.is_meta for value in own.values()):
        own = network.to_empty(device="cpu").state_dict()
    with torch.no_grad():
        for name, keys in layout.items():
            parts = tensors[name].chunk(len(keys)) if len(keys) > 1 else [tensors[name]]
            for key, part in zip(keys, parts, strict=True):
                own[key].copy_(part)


def refuse_misfits(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    *,
    dropped: tuple[str, ...] = (),
    source: str | Path,
) -> None:
    """Raises ValueError where `fill` would. The arguments are those of `fill`."""
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
        lines = [f"{kind}: {abridged(names)}" for kind, names in problems.items() if names]
        timms = getattr(network, "pretrained_cfg", {}).get("architecture", type(network).__name__)
        name = getattr(network, "architecture", timms)
        raise FileError(f"{source} does not fit {name}; " + "; ".join([*lines, REMEDY]))


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
