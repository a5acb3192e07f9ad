"""The software that a result is made with."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path

LIBRARIES = (
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
    """Returns the installed versions of the libraries that results depend on, by name."""
    installed = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def commit() -> str | None:
    """Returns the checkout's commit, with `+` where tracked files are changed; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return head.stdout.strip() + ("+" if dirty.stdout else "") if head.returncode == 0 else None
