"""A small store on disk."""

from pathlib import Path

import pytest

from tests.features.examples import FAILURE, FP32, ITEMS
from vitgal.features import store


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store of two shards without an index, one image of which could not be read."""
    first, second = list(ITEMS.items())[:2], list(ITEMS.items())[2:]
    store.write_shard(tmp_path / "shard-00", first, FP32)
    store.write_shard(tmp_path / "shard-01", second, FP32, failures=[FAILURE])
    return tmp_path
