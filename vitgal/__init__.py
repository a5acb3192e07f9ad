"""ViTGaL, landmark image retrieval with one vision transformer: the notebooks' helper package.

Public names and sub-packages are imported when they are first used, so that importing the package
costs nothing and notebooks that need no network never load torch.
"""

import importlib.metadata

import lazy_loader

_attach, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "app",
        "data",
        "engines",
        "evaluation",
        "features",
        "models",
        "retrieval",
        "runs",
        "settings",
        "stages",
        "training",
        "viz",
    ],
    submod_attrs={
        "data.images": ["ImageError", "crop_box", "read_image"],
        "data.revisited": ["GroundTruth", "RetrievalDataset", "load_ground_truth", "open_dataset"],
        "evaluation.protocol": ["evaluate"],
        "features.local": ["LocalFeatures"],
        "features.store.feature_store": ["FeatureStore"],
        "models.descriptors": ["extract_global", "extract_local"],
        "models.heads": ["ArcFace"],
        "models.network": ["TokenFeatures", "ViTGaL", "build_model"],
        "models.weights": ["initial_weights", "load_model", "save_model"],
        "retrieval.exact_search": ["search"],
        "retrieval.matching": ["match"],
        "retrieval.ranking": ["Positions"],
        "retrieval.reranking": ["rerank"],
        "retrieval.verification": ["Verification", "verify"],
        "runs.errors": ["StageError"],
    },
)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("vitgal")
    return _attach(name)
