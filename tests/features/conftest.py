"""A small store on disk, written once and copied for each test."""

import shutil
from pathlib import Path

import pytest

from tests.features.examples import FAILURE, FP32, ITEMS
from vitgal.features import store


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """Two copies of a store of two shards: `plain`, and `indexed` with an index."""
    folder = tmp_path_factory.mktemp("stores")
    first, second = list(ITEMS.items())[:2], list(ITEMS.items())[2:]
    store.write_shard(folder / "plain" / "shard-00", first, FP32)
    store.write_shard(folder / "plain" / "shard-01", second, FP32, failures=[FAILURE])
    shutil.copytree(folder / "plain", folder / "indexed")
    store.write_index(folder / "indexed")
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A store of two shards without an index, one image of which could not be read."""
    return shutil.copytree(written / "plain", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def indexed(written, tmp_path) -> Path:
    """The same store with an index."""
    return shutil.copytree(written / "indexed", tmp_path, dirs_exist_ok=True)
