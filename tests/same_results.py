"""Compares the results of two run folders byte by byte: `python -m tests.same_results RUN_A RUN_B`.

Results are every .npy, .npz and .safetensors, and every scores.json without its version lines.
Prints
what differs or is missing on one side and exits with 1, or with 0 where all is equal.
"""

import hashlib
import json
import sys
from pathlib import Path

ARRAYS = (".npy", ".npz", ".safetensors")
CACHE = "own"  # own photographs are cached in a folder named by a fingerprint of the settings


def digests(run: Path) -> dict[str, str]:
    """The sha256 of every result of a run, by its path in the run folder."""
    result = {}
    for path in sorted(run.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix in ARRAYS:
            content = path.read_bytes()
        elif path.name == "scores.json":
            scores = json.loads(path.read_text(encoding="utf-8"))
            scores.pop("versions", None)
            content = json.dumps(scores).encode()
        else:
            continue
        parts = path.relative_to(run).parts
        name = "/".join(("own", parts[-1]) if parts[0] == CACHE else parts)
        result[name] = hashlib.sha256(content).hexdigest()
    return result


def differences(first: Path, second: Path) -> list[str]:
    """A line for each result that differs or that one of the two runs lacks."""
    a, b = digests(first), digests(second)
    lines = [f"only in {first}: {name}" for name in sorted(a.keys() - b.keys())]
    lines += [f"only in {second}: {name}" for name in sorted(b.keys() - a.keys())]
    common = sorted(a.keys() & b.keys())
    return lines + [f"differs: {name}" for name in common if a[name] != b[name]]


def main(first: str, second: str) -> int:
    """Prints the differences of two run folders; returns 1 where there are any."""
    lines = differences(Path(first), Path(second))
    print("\n".join(lines) or f"{len(digests(Path(first)))} results are equal")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
