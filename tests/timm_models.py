"""Networks of timm for tests."""

from typing import Any

from vitgal.models.backbones import Backbone
from vitgal.models.timm_networks import TimmSource


def build_backbone(name: str, **options: Any) -> Backbone:
    """A network of timm with random weights; options of `timm.create_model`."""
    return Backbone(TimmSource(name, None), options)


def open_backbone(source: str) -> Backbone:
    """Opens "timm:NAME" or "timm:NAME@FILE"."""
    return Backbone(TimmSource.parse(source))
