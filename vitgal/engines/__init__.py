"""Engines that do the work of a stage: this machine, or a Ray cluster."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "connection": ["ENGINES", "ClusterError", "check_engine", "connected"],
        "devices": ["check_device", "find_gpu"],
        "pipeline": ["ActorPlan", "Pipeline", "call_remotely", "node_resources"],
        "pool": ["parallel"],
    },
)
