"""ViTGaL, landmark image retrieval with one vision transformer: the notebooks' helper package.

Public names and sub-packages are imported when they are first used, so that importing the package
costs nothing and notebooks that need no network never load torch.
"""

import importlib.metadata

import lazy_loader

_attach, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("vitgal")
    return _attach(name)
