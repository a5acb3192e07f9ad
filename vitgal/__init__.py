"""ViTGaL, landmark image retrieval with one vision transformer: the notebooks' helper package.

Public names are resolved when they are first used, so that importing the package costs nothing and
notebooks that need no network never load torch.
"""

import importlib
import importlib.metadata

_HOMES = {
    "runs": ("StageError", "read_stage", "resolve", "run_folder", "stage"),
    "images": ("ImageError", "crop_box", "read_image"),
    "features": ("LocalFeatures",),
    "store": ("FeatureStore",),
    "revisited": ("GroundTruth", "RetrievalDataset", "load_ground_truth", "open_dataset"),
    "search": ("Positions",),
    "evaluation": ("evaluate",),
    "reranking": ("Verification", "match", "verify"),
    "model": ("ArcFace", "TokenFeatures", "ViTGaL", "build_model"),
    "weights": ("initial_weights", "load_model", "save_model"),
    "extraction": ("extract_global", "extract_local"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("vitgal")
    if name not in _HOME:
        raise AttributeError(f"module 'vitgal' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vitgal.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
