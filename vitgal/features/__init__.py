"""Local features: what they are, how they are selected, stored and exchanged."""

import lazy_loader

# __init__.pyi lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
