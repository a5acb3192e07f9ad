"""The feature store: local features of any number of images, memory-mapped."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "codec": [
            "AUTO",
            "DTYPES",
            "FEATURE_BYTES",
            "FORMAT",
            "ITEM_BYTES",
            "QUERY",
            "StoreError",
            "decode",
            "encode",
            "forecast",
            "query_key",
            "stored_type",
            "stored_width",
        ],
        "feature_store": ["FeatureStore"],
        "index": ["INDEX_ARRAYS", "Index", "OPEN_SHARDS", "most_open", "write_index"],
        "rows": ["RowFile"],
        "shard": [
            "ARRAYS",
            "INDEX",
            "INDEX_HEADER",
            "Layout",
            "PARTIAL",
            "SHARD",
            "Shard",
            "Stored",
            "clear_partial",
            "drop_index",
            "partition",
            "salvage",
            "shard_folder",
            "shard_folders",
            "whole_shard",
            "write_shard",
        ],
    },
)
