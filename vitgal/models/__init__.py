"""Networks: ViTGaL, its heads, weights, and how they are run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "descriptors": ["describe", "extract_global", "extract_local"],
        "heads": ["ArcFace", "LinearClassifier"],
        "inference": [
            "BatchLimit",
            "batches",
            "device_of",
            "limited_threads",
            "network_input",
            "normalise",
            "open_model",
            "pick_device",
            "resolve_precision",
            "weights_fingerprint",
            "weights_input",
        ],
        "local_features": ["require_codes", "rescale", "token_scores"],
        "network": [
            "Autoencoder",
            "MultiAtrous",
            "TokenCodes",
            "TokenFeatures",
            "ViTGaL",
            "build_model",
            "class_attention",
            "seeded",
        ],
        "teacher": ["Teacher", "efficientnet_names"],
        "weights": [
            "Layout",
            "convert",
            "fill",
            "initial_weights",
            "load_model",
            "read_checkpoint",
            "read_configuration",
            "read_tensors",
            "save_model",
        ],
    },
)
