"""The feature store: local features of any number of images, memory-mapped."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "codec": [
            "PRECISION_REMEDY",
            "StoreError",
            "decode_features",
            "encode_features",
            "forecast",
        ],
        "feature_store": ["FeatureStore"],
        "index": ["write_index"],
        "recovery": ["salvage", "whole_shard"],
        "rows": ["RowFile"],
        "shard": [
            "EncodedFeatures",
            "PARTIAL",
            "Shard",
            "ShardFormat",
            "clear_partial",
            "drop_index",
            "partition",
            "shard_folder",
            "shard_folders",
            "write_shard",
        ],
    },
)
