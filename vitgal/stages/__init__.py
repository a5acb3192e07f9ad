"""The stages of a run: each opens its inputs, calls the pure core and writes its folder.

With TQDM_DISABLE=1 in the environment tqdm shows no progress bars, but those of training.
"""

import lazy_loader

# __init__.pyi lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
