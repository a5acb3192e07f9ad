"""Manifests: records of a stage's settings, inputs and outputs.

A running stage has `started.json`; `stage.json` is written last, when all outputs are complete.
Both hold the settings that the result depends on.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from vitgal.runs.errors import StageError, printable
from vitgal.runs.files import conforms, inside, read_json
from vitgal.runs.inputs import fingerprint, fingerprint_file

STAGE_FORMAT = 1
MANIFEST = "stage.json"
STARTED = "started.json"
NUMBER = range(1 << 63)
SETTINGS = {"format": NUMBER, "stage": str, "parameters": dict, "inputs": dict}
# A larger file is checked by its length alone: hashing 200 GB of features takes longer than the
# stages that read them, and the feature store has checksums.
HASH_LIMIT = 1 << 30


def read_stage(folder: Path, notebook: str) -> dict:
    """Reads a finished stage's manifest; StageError names the notebook to run or a damaged file."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        state = "was interrupted" if (folder / STARTED).exists() else "has not been run"
        raise StageError(f"the stage in {folder} {state}: run {notebook} first")
    return read_record(folder / MANIFEST)


def read_record(path: Path) -> dict:
    """Reads `stage.json` or `started.json`; StageError for a file that is missing or damaged."""
    record = read_json(path)
    if not conforms(record, SETTINGS) or (path.name == MANIFEST and not _is_manifest(record)):
        raise StageError(f"{path} is damaged; set overwrite: true to make the stage again")
    return record


def _is_manifest(record: dict) -> bool:
    if not conforms(record, {"outputs": dict, "recorded": dict}):
        return False
    recorded = record["recorded"]
    tables = [record["inputs"], recorded.get("versions", {}), recorded.get("stamps", {})]
    texts = itertools.chain.from_iterable(
        table.values() if isinstance(table, dict) else [None] for table in tables
    )
    names = ("dataset_dir", "distractors", "weights", "refine_set")
    paths = (recorded.get(name) or "" for name in names)
    return all(isinstance(text, str) for text in (*texts, *paths)) and all(
        conforms(entry, {"bytes": NUMBER}) and isinstance(entry.get("sha256", ""), str)
        for entry in record["outputs"].values()
    )


def read_settings(folder: Path) -> dict | None:
    """Reads the settings of a folder's finished or interrupted stage; None where there is none."""
    for name in (MANIFEST, STARTED, MANIFEST):  # another worker may turn one into the other
        try:
            record = read_record(folder / name)
        except StageError:
            if (folder / name).exists():
                raise
        else:
            return {key: record[key] for key in SETTINGS}
    return None


def describe_output(path: Path) -> dict[str, Any]:
    """Returns an output's entry in the manifest: "bytes" and, up to HASH_LIMIT, "sha256"."""
    size = path.stat().st_size
    return {"bytes": size} | ({"sha256": fingerprint_file(path)} if size <= HASH_LIMIT else {})


def check_output(folder: Path, output: str, recorded: dict[str, Any]) -> None:
    """Raises StageError where a file differs from its entry in the manifest."""
    path = inside(folder, output)
    unchanged = path.is_file() and path.stat().st_size == recorded["bytes"]
    if unchanged and "sha256" in recorded:
        unchanged = fingerprint_file(path) == recorded["sha256"]
    if not unchanged:
        raise StageError(
            f"{path} is missing or not as the stage left it; set overwrite: true to make the "
            "stage again"
        )


def output_fingerprint(folder: Path, output: str, notebook: str) -> str:
    """Returns the sha256 of a finished stage's output, as the manifest records it.

    Above HASH_LIMIT it is the sha256 of the output's length and the stage's settings. StageError
    names the notebook to run where the output is missing.
    """
    manifest = read_stage(folder, notebook)
    if output not in manifest["outputs"]:
        raise StageError(f"the stage in {folder} has no {output}: run {notebook} again")
    recorded = manifest["outputs"][output]
    if "sha256" in recorded:
        return recorded["sha256"]
    return fingerprint([output, recorded["bytes"], *(manifest[key] for key in SETTINGS)])


def differences(recorded: dict, wanted: dict) -> list[str]:
    """Returns a line for each entry, of any depth, that differs; after twenty their number."""
    lines = _differences(recorded, wanted)
    return lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])


def _differences(recorded: dict, wanted: dict) -> list[str]:
    lines = []
    for key in sorted(set(recorded) | set(wanted)):
        before, now = recorded.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += [f"{printable(key)}.{line}" for line in _differences(before, now)]
        elif not _same(before, now):
            lines.append(f"{printable(key)}: {_shortened(before)} there, {_shortened(now)} now")
    return lines


def _same(before: Any, now: Any) -> bool:
    """Returns whether plain values are equal; 1 equals 1.0 but not True."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_same(before[key], now[key]) for key in before)
    return before == now and isinstance(before, bool) == isinstance(now, bool)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
