"""Local features: what they are, how they are selected, stored and exchanged."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["store"],
    submod_attrs={
        "descriptors": ["DescriptorError", "read_descriptors"],
        "interchange": ["export_hloc", "export_published", "import_published"],
        "local": ["LocalFeatures"],
    },
)
