"""Reads tensors from untrusted files: `.safetensors`, and `.pth` of any training.

No code from a file is run, and no file allocates more memory than its size.
"""

import argparse
import codecs
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from vitgal import runs
from vitgal.features.files import FileError
from vitgal.models.sources import is_safetensors, open_safetensors

SCALES = ".scales"  # after the name of a tensor of 8 bits
NAMED = 4  # tensors that an error lists of each kind
REMEDY = "of a network of your own, save the state dict alone: torch.save(net.state_dict(), path)"
# Names under which checkpoints hold a state dict, and words that wrappers put before its names.
CONTAINERS = (
    "model state_dict model_state_dict network net module model_ema state_dict_ema ema_model ema"
).split()
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
# Names allowed in the pickle of a `.pth`: the parts of tensors and plain values ...
TENSORS = re.compile(
    r"torch\.(storage\.)?\w*Storage|torch\.(Size|device|(b?float|u?int|bool|half|double|long)\w*)|"
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter|"
    r"collections\.(OrderedDict|Counter)|argparse\.Namespace|(builtins|__builtin__)\.set|"
    r"_codecs\.encode"
)
# ... and values of a training's arguments that are not needed.
IGNORED = (
    "numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar "
    "numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct "
    "pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath "
    "pathlib._local.PosixPath pathlib._local.PurePosixPath pathlib._local.WindowsPath "
    "pathlib._local.PureWindowsPath"
).split()
Result = TypeVar("Result")


def use_tensors(source: str | Path, use: Callable[[Mapping[str, Tensor]], Result]) -> Result:
    """Calls `use` with the tensors of a network's file: `.safetensors`, or a `.pth` of tensors.

    In a `.pth` they are at the top level or under a key such as `model` or `state_dict`. Where
    `use` raises ValueError, it is called again without the prefixes of wrappers (`module.`,
    `_orig_mod.`, …) and with the file's other state dicts; the accepted one is printed.

    Raises FileNotFoundError, and ValueError where the file is neither or `use` accepts none.
    """
    source = Path(source)
    if is_safetensors(source):
        state_dicts = {"": read_safetensors(source)[0]}
    else:
        state_dicts = _state_dicts(read_checkpoint(source))
    errors: dict[str, ValueError] = {}  # by key, the last one
    for key, tensors in state_dicts.items():
        stripped = _without_prefixes(tensors)
        for candidate in [tensors] if stripped is None else [tensors, stripped]:
            try:
                result = use(_checked(source, candidate))
            except ValueError as error:
                errors[key] = error
                continue
            prefixes = ", its names without prefixes" if candidate is stripped else ""
            if prefixes or key not in ("", "model"):
                print(f"{runs.printable(source)}: read {key or 'the state dict'}{prefixes}")
            return result
    raise next(
        iter(errors.values()),
        FileError(f"{source} holds no model weights: no dict `model` of tensors; {REMEDY}"),
    )


def _state_dicts(checkpoint: Any, path: str = "") -> dict[str, Mapping[str, Tensor]]:
    """Returns the state dicts in a checkpoint by their dotted keys, those of `model` first."""
    if not isinstance(checkpoint, Mapping):
        return {}
    inner = [name for name in CONTAINERS if isinstance(checkpoint.get(name), Mapping)]
    if inner and path.count(".") < 2:
        parts = (_state_dicts(checkpoint[name], f"{path}.{name}".strip(".")) for name in inner)
        state_dicts = {key: tensors for part in parts for key, tensors in part.items()}
        first = {id(tensors): key for key, tensors in reversed(state_dicts.items())}
        return {key: tensors for key, tensors in state_dicts.items() if first[id(tensors)] == key}
    if all(isinstance(key, str) for key in checkpoint) and any(
        isinstance(value, Tensor) for value in checkpoint.values()
    ):
        return {path: checkpoint}
    return {}


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns the tensors without the prefixes of wrappers; None if there are none."""
    names = [key for key in tensors if key != "n_averaged"]  # a count of torch's AveragedModel
    stripped = [WRAPPERS.sub("", key) for key in names]
    for word in 3 * CONTAINERS:
        if all(key.startswith(f"{word}.") for key in stripped):
            stripped = [key.removeprefix(f"{word}.") for key in stripped]
    if stripped == list(tensors) or len(set(stripped)) < len(names):
        return None
    return {new: tensors[key] for new, key in zip(stripped, names, strict=True)}


def _checked(source: Path, tensors: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors; FileError where one is something else, sparse, quantized or without values."""
    for key, value in tensors.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not plain or value.is_quantized or value.is_meta:
            raise FileError(f"{source}: {abridged([key])} is no plain tensor; {REMEDY}")
    return tensors


def read_checkpoint(path: str | Path) -> Any:
    """Reads a `.pth` on the CPU, without running code from it.

    Tensors, plain values and `argparse.Namespace` (the published checkpoints carry their arguments)
    are read; NumPy's scalars and paths become `Ignored`; every other type is refused.

    Raises FileNotFoundError, and ValueError naming the file and, where one was refused, the type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {runs.printable(path)}")
    allowed = [argparse.Namespace, *((Ignored, name) for name in IGNORED)]
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            refused = _scan_zip(file) if zipped else _scan_pickles(file, 5)
        if not refused:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a foreign file can fail in any way; each is reported with its name
        raise FileError(
            f"{path} is no readable checkpoint (cut off, or another kind of file); fetch it again"
        ) from error
    raise FileError(
        f"{path} was refused: it wants to load {runs.printable(refused)[:150]}, which is neither a "
        f"tensor nor plain data and could run code; get it from a source you trust; {REMEDY}"
    )


class Ignored:
    """A placeholder for an unneeded value in a training's arguments."""

    def __new__(cls, *arguments: Any) -> "Ignored":
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _scan_zip(file: BinaryIO) -> str | None:
    """`_scan_pickles` of a zipped `.pth`; ValueError where it unpacks to more than the file."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # The first record of torch's files begins the file. Otherwise, as with names that differ in
        # case only, torch could read other members than Python.
        starts = min(member.header_offset for member in members) == 0
        unique = len({member.filename.lower() for member in members}) == len(members)
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        total = sum(member.file_size for member in members)
        if not (starts and unique and stored) or total > file.seek(0, 2):
            raise ValueError("not as torch writes it")
        for member in members:
            if member.filename.lower().endswith("data.pkl"):
                with archive.open(member) as pickle:
                    if refused := _scan_pickles(pickle, 1):
                        return refused
    return None


def _scan_pickles(file: BinaryIO, count: int) -> str | None:
    """Returns the first unneeded name in the pickles; torch allows some that allocate gigabytes."""
    for _ in range(count):
        names, texts = set(), []
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                names.add(argument.replace(" ", "."))
            elif isinstance(argument, str):
                texts.append(argument)
        refused = {name for name in names if not (TENSORS.fullmatch(name) or name in IGNORED)}
        if refused:
            return min(refused)
        if "_codecs.encode" in names and any(map(_is_binary_codec, texts)):
            return "_codecs.encode"  # "hex" doubles its input
    return None


def _is_binary_codec(text: str) -> bool:
    try:
        return len(text) < 30 and not codecs.lookup(text)._is_text_encoding
    except (LookupError, ValueError):
        return False


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Reads the tensors of a `.safetensors` by name, `rounded` ones as float32, and its metadata.

    Raises FileError where the scales of a rounded tensor do not fit it.
    """
    with open_safetensors(path, "pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}
        metadata = handle.metadata()
    for key in [key for key in tensors if key.endswith(SCALES)]:
        scales, name = tensors.pop(key), key.removesuffix(SCALES)
        whole = tensors.get(name, scales)
        rows = (*whole.shape[:1], *(1,) * (whole.ndim - 1))
        if whole.dtype != torch.int8 or scales.shape != rows:
            raise FileError(f"{path}: {abridged([key])} fits no 8-bit tensor; write it again")
        tensors[name] = whole * scales
    return tensors, metadata


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rounds matrices and kernels (C, ...) to 8 bits, a scale per row under the name + SCALES.

    The largest value of a row becomes 127 or -127, so that the error is at most 1/254 of it.
    Vectors and integers stay as they are.
    """
    result = dict(tensors)
    for key, value in tensors.items():
        if value.is_floating_point() and value.ndim > 1:
            largest = value.float().abs().amax(tuple(range(1, value.ndim)), keepdim=True)
            scales = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
            result[key], result[key + SCALES] = (value / scales).round().to(torch.int8), scales
    return result


def abridged(names: Iterable[str]) -> str:
    """The first few names and the number of the others."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(runs.printable(name)[:150] for name in names[:NAMED]) + more
