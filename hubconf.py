"""Entry points of torch.hub: `torch.hub.load(FOLDER, "vitgal_lite0", source="local")`."""

from pathlib import Path

import vitgal

dependencies = ["torch", "timm", "safetensors", "lazy_loader", "cv2", "huggingface_hub"]


def vitgal_lite0() -> vitgal.ViTGaL:
    """The small model of weights/: ViTGaL's head on EfficientNet-Lite0."""
    return vitgal.load_model(Path(__file__).with_name("weights") / "vitgal_lite0.safetensors")


def vitgal_model(source: str) -> vitgal.ViTGaL:
    """A model from a file (.pth, .safetensors), a folder, or by its name on the hub."""
    if Path(source).is_file():
        return vitgal.load_model(source)
    return vitgal.ViTGaL.from_pretrained(source)
