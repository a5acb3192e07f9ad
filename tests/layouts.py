"""Weights under the names of their first publishers, made from ours: what the tests read back."""

import torch
from torch import Tensor

PREFIXES = (  # ours, theirs; the first that fits
    ("autoencoder.encoder.", "whitening_layer."),
    ("autoencoder.decoder.", "ae_decoder_layer."),
    ("autoencoder.", ""),
    ("backbone.pos_embed.", "retrieval_back_bone.pos_embeder."),
    ("backbone.", "retrieval_back_bone."),
    ("local_atrous.", "retrieval_back_bone.local_atrous."),
)


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A complete model of ours as the published ViTGaL code would have saved it."""
    renamed = {}
    for key, value in _joined(state).items():
        actual, reference = next(pair for pair in PREFIXES if key.startswith(pair[0]))
        renamed[reference + key[len(actual) :]] = value.clone()
    assert len(renamed) == len(_joined(state))
    return renamed


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's XCiT in the layout of XCiT's own files."""
    return {key.replace("pos_embed.", "pos_embeder."): v for key, v in _joined(state).items()}


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The three projections of each class attention as one tensor, in their place's order."""
    joined = dict(state)
    for key in [key for key in joined if key.endswith((".attn.q.weight", ".attn.q.bias"))]:
        parts = [joined.pop(key.replace(".q.", f".{letter}.")) for letter in "qkv"]
        joined[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return joined
