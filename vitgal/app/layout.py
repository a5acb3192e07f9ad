"""The notebooks and params that vitgal brings, copied to a folder to work in."""

from pathlib import Path

from vitgal import runs


def lay_out(folder: Path) -> list[Path]:
    """Copies notebooks/ and params/ to a folder; returns the files there that differ and are kept.

    With an installed wheel, relative paths in them then count from this folder. Weights and
    photographs stay in the wheel. Raises StageError where the installation lacks its files, OSError
    where the folder cannot be written.
    """
    bundled, kept = runs.bundled_folder(), []
    for pattern in ("notebooks/*.ipynb", "params/**/*.yaml", "params/**/*.sh"):
        for source in sorted(bundled.glob(pattern)):
            target = Path(folder) / source.relative_to(bundled)
            content = source.read_bytes()
            if target.exists():
                kept += [target] if target.read_bytes() != content else []
                continue
            with runs.atomic(target) as temporary:
                temporary.write_bytes(content)
    return kept
