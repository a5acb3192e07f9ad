"""Entry points of torch.hub: `torch.hub.load(FOLDER, "vitgal_nano", source="local")`."""

from pathlib import Path

import vitgal

dependencies = ["torch", "timm", "safetensors", "lazy_loader", "cv2", "huggingface_hub"]


def vitgal_nano() -> vitgal.ViTGaL:
    """The small model of weights/, which `make demo` trains anew."""
    return vitgal.load_model(Path(__file__).with_name("weights") / "vitgal_nano.safetensors")


def vitgal_model(source: str) -> vitgal.ViTGaL:
    """A model from a file (.pth, .safetensors), a folder, or by its name on the hub."""
    if Path(source).is_file():
        return vitgal.load_model(source)
    return vitgal.ViTGaL.from_pretrained(source)
