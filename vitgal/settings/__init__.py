"""Every setting once: its default, unit and meaning, and whether it changes results."""

import lazy_loader

# __init__.pyi lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
