"""Data sets and weights from their publishers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checks": ["Report", "check"],
        "sources": ["Item", "Source", "hint", "list_sources", "read_sources"],
        "transfer": ["download"],
    },
)
