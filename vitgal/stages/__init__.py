"""The stages of a run: each opens its inputs, calls the pure core and writes its folder.

Their progress bars are tqdm's: with TQDM_DISABLE=1 in the environment there are none.
"""

import lazy_loader

# __init__.pyi lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
