"""Where work is done: on this machine, or on a Ray cluster."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cluster": [
            "ClusterError",
            "Pipeline",
            "Share",
            "ask",
            "check_engine",
            "connected",
            "parallel",
            "resources",
        ],
    },
)
