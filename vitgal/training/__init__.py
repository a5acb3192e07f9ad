"""Training: augmentation, samples, networks, the loop and its checkpoints, several processes."""

import lazy_loader

# The public names stand in __init__.pyi, where editors find them as well.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
