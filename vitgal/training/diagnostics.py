"""Tables and maps that notebooks 02 and 03 show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vitgal.data import images, splits
from vitgal.models import weights
from vitgal.models.inference import network_input
from vitgal.models.network import ViTGaL
from vitgal.settings import Recipe
from vitgal.training.networks import learning_rates


def schedule_table(settings: Recipe) -> pd.DataFrame:
    """Returns the learning rate of each epoch: columns epoch, lr."""
    rates = learning_rates(settings)
    return pd.DataFrame({"epoch": range(len(rates)), "lr": rates})


def epoch_table(log: pd.DataFrame) -> pd.DataFrame:
    """Formats the last five validated epochs of a log as text: fractions in percent.

    log: see `read_log`. A column that the log lacks is left out; an empty log gives no row.
    """
    formats = {
        "epoch": ("epoch", "{:.0f}"),
        "step": ("step", "{:.0f}"),
        "lr": ("lr", "{:.1e}"),
        "loss": ("loss", "{:.3f}"),
        "accuracy": ("train %", "{:.1f}"),
        "val_accuracy": ("val %", "{:.1f}"),
        "val_accuracy_margin": ("val % (margin)", "{:.1f}"),
        "val_map": ("mAP %", "{:.1f}"),
        "val_reconstruction": ("val reconstruction", "{:.4f}"),
        "images_per_second": ("images/s", "{:.1f}"),
        "hours_left": ("hours left", "{:.2f}"),
    }
    scored = [name for name in ("val_accuracy", "val_map") if name in log]
    rows = log.dropna(subset=scored, how="all").tail(5) if scored else log[:0]
    columns = {}
    for name, (title, form) in formats.items():
        if name in rows:
            values = 100 * rows[name] if title.startswith(("train", "val %", "mAP")) else rows[name]
            columns[title] = [form.format(value).replace("nan", "-") for value in values]
        if name == "val_map" and {"val_map_low", "val_map_high"} <= set(rows):
            ends = zip(100 * rows["val_map_low"], 100 * rows["val_map_high"], strict=True)
            columns["95 % interval"] = [
                "-" if pd.isna(low) else f"{low:.1f} to {high:.1f}" for low, high in ends
            ]
    return pd.DataFrame(columns)


def parameter_table(model: ViTGaL) -> pd.DataFrame:
    """Counts the parameters of each part of the network: columns part, parameters, share."""
    backbone = model.backbone
    if model.on_timm:
        parts = {model.architecture: (backbone.trunk,)}
        parts["to the head"] = (backbone.token_norm, backbone.projection)
    else:
        parts = {"patch embedding": (backbone.patch_embed, backbone.pos_embed)}
        parts["XCiT blocks"] = (backbone.blocks,)
    parts["multi-atrous block"] = (model.local_atrous,)
    parts["class attention"] = (backbone.cls_attn_blocks, backbone.norm)
    if model.autoencoder is not None:
        parts["autoencoder"] = (model.autoencoder,)
    counts = [
        sum(parameter.numel() for module in modules for parameter in module.parameters())
        for modules in parts.values()
    ]
    shares = [f"{100 * count / sum(counts):.0f} %" for count in counts]
    return pd.DataFrame({"part": list(parts), "parameters": counts, "share": shares})


def validation_photographs(split: Path, image_folder: Path, *, count: int) -> list[np.ndarray]:
    """Reads `count` validation images, (H, W, 3) uint8 RGB each, spread evenly over their list."""
    paths = splits.read_split(split, "val")["path"].tolist()
    indices = np.linspace(0, len(paths) - 1, num=min(count, len(paths)), dtype=int)
    return [images.read_image(Path(image_folder) / paths[index]) for index in indices]


@torch.no_grad()
def token_maps(
    model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int
) -> dict[str, list[np.ndarray]]:
    """Computes (h, w) maps of each photograph (H, W, 3) uint8 RGB, squashed to `size` pixels.

    "tokens" are the tokens themselves (h, w, D), "error" is the mean squared difference of tokens
    and decoded tokens, "backbone_attention" and "attention" are the means over heads of the two
    class attentions. A model without autoencoder has neither an "error" nor two attentions:
    "attention" is the backbone's.
    """
    maps = {key: [] for key in ("tokens", "error", "backbone_attention", "attention")}
    for photograph in photographs:
        features = model.token_features(_network_input(photograph, size))
        rows = {
            "tokens": features.tokens[0],
            "backbone_attention": features.backbone_attention.mean(1)[0],
            "attention": features.attention.mean(1)[0],
        }
        if features.decoded is not None:
            rows["error"] = (features.decoded - features.tokens).square().mean(2)[0]
        for key, row in rows.items():
            maps[key].append(row.unflatten(0, features.grid).numpy())
    return maps


@torch.no_grad()
def lost_variance(model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int) -> float:
    """Computes the fraction of the tokens' variance that the autoencoder loses (1: as the mean).

    photographs: (H, W, 3) uint8 RGB, each squashed to `size` x `size` pixels.
    """
    features = [model.token_features(_network_input(image, size)) for image in photographs]
    tokens = torch.cat([image.tokens[0] for image in features])
    decoded = torch.cat([image.decoded[0] for image in features])
    return float((decoded - tokens).square().sum() / (tokens - tokens.mean(0)).square().sum())


@torch.no_grad()
def photograph_tokens(model: ViTGaL, photographs: Sequence[np.ndarray], *, size: int) -> np.ndarray:
    """Computes the tokens (N, D) float32 of photographs (H, W, 3) uint8 RGB, one after the other.

    Each photograph is squashed to `size` x `size` pixels. There must be at least one.
    """
    parts = [model.token_features(_network_input(image, size)).tokens[0] for image in photographs]
    return torch.cat(parts).numpy()


def _network_input(photograph: np.ndarray, size: int) -> torch.Tensor:
    return network_input(images.resize(photograph, size, "squash")[None], "cpu").contiguous()


def same_backbone(model: ViTGaL, source: Path) -> bool:
    """Returns whether all tensors but the autoencoder's equal those of `source`, bit for bit."""
    other = weights.load_model(source).state_dict()
    return all(
        torch.equal(value, other[key])
        for key, value in model.state_dict().items()
        if not key.startswith("autoencoder.")
    )
