"""Downloads of data sets and weights from their publishers, and checks of their folders."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checks": ["Report", "check"],
        "sources": ["RemoteFile", "Source", "list_sources", "read_sources", "source_of"],
        "transfer": ["download"],
    },
)
