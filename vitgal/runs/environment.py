"""The software that a result was made with."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path

VERSIONED = (
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "opencv-python-headless",
    "faiss-cpu",
    "pydegensac",
    "poselib",
)


def versions() -> dict[str, str]:
    """The installed versions of the libraries that results depend on."""
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """The checkout's commit, with `+` where tracked files are changed; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return head.stdout.strip() + ("+" if dirty.stdout else "") if head.returncode == 0 else None
