"""What is left of a shard after a kill or damage: the whole shard, or its whole images."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from vitgal.features.files import leading_rows
from vitgal.features.store.codec import StoreError
from vitgal.features.store.shard import ARRAYS, EncodedFeatures, Shard, ShardFormat, split_images


def whole_shard(folder: Path, names: Sequence[str], shard_format: ShardFormat) -> Shard | None:
    """Opens the shard in `folder` if it is whole; None where it has to be written again.

    It is whole where its items and failures together are exactly `names` (those of the partition),
    its format is the one wanted, and every checksum is right.
    """
    if not Path(folder).exists():
        return None
    try:
        shard = Shard.open(folder)
        listed = shard.names + [failure["name"] for failure in shard.failures]
    except StoreError:
        return None
    same = shard.format.header() == shard_format.header() and sorted(listed) == sorted(names)
    return shard if same and not shard.damaged() else None


def salvage(folder: Path, shard_format: ShardFormat) -> dict[str, EncodedFeatures]:
    """Returns what a damaged shard still holds: key -> each image whose bytes match its checksum.

    Any of its files may be cut short, changed or missing. Empty for a shard of another format or
    none.
    """
    folder = Path(folder)
    header, items = _leading_items(folder / "items.json")
    if header != shard_format.header():
        return {}
    arrays = {name: leading_rows(folder / f"{name}.npy") for name in ARRAYS}
    for name, (dtype, shape) in shard_format.layout(0, 0).items():
        if (arrays[name].dtype, arrays[name].shape[1:]) != (dtype, shape[1:]):
            return {}
    images = split_images(items, arrays)
    return {image.item["name"]: image for image in images if image.is_whole()}


def _leading_items(path: Path) -> tuple[dict, list[dict]]:
    """The header and the whole items at the beginning of an items.json, which may be cut short."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    head, _, rest = text.partition('"items": [')
    items: list[dict] = []
    try:
        header = json.loads(head.rstrip().rstrip(",") + "}")
    except (ValueError, RecursionError):
        return {}, items
    with contextlib.suppress(ValueError, RecursionError):  # where the file ends, or was changed
        while (rest := rest.lstrip(", \n")).startswith("{"):
            item, end = json.JSONDecoder().raw_decode(rest)
            items.append(item)
            rest = rest[end:]
    return header, items
