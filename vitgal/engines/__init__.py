"""Engines that do the work of a stage: this machine, or a Ray cluster."""

import lazy_loader

# __init__.pyi lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
