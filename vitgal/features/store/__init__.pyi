from .codec import (
    FEATURE_ARRAYS as FEATURE_ARRAYS,
    PRECISION_REMEDY as PRECISION_REMEDY,
    StoreError as StoreError,
    decode_features as decode_features,
    encode_features as encode_features,
    forecast as forecast,
)
from .feature_store import FeatureStore as FeatureStore, write_index as write_index
from .rows import RowFile as RowFile
from .shard import (
    FAILURES as FAILURES,
    PARTIAL as PARTIAL,
    Shard as Shard,
    ShardFormat as ShardFormat,
    clear_partial as clear_partial,
    drop_index as drop_index,
    partition as partition,
    shard_folder as shard_folder,
    shard_folders as shard_folders,
    whole_shard as whole_shard,
    write_shard as write_shard,
)
