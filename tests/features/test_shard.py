"""Shards: what is written, what is refused, and what damage is found on opening."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.features.examples import (
    FP32,
    ITEMS,
    damaged,
    damaged_json,
    features,
    fuzz,
    properties,
    restored,
)
from vitgal.features import store
from vitgal.features.store.shard import ARRAYS


@properties
@given(
    names=st.lists(st.text(max_size=3), unique=True, max_size=30),
    shard_size=st.integers(1, 12),
    data=st.data(),
)
def test_a_partition(names, shard_size, data):
    """All names once, sorted, in full shards but the last, whatever the order they came in."""
    parts = store.partition(names, shard_size)
    assert list(itertools.chain(*parts)) == sorted(names)
    assert all(len(part) == shard_size for part in parts[:-1])
    assert all(0 < len(part) <= shard_size for part in parts)
    assert store.partition(data.draw(st.permutations(names)), shard_size) == parts


def test_what_gives_no_partition():
    with pytest.raises(ValueError, match="'a' is listed twice"):
        store.partition(["a", "b", "a"], 2)
    with pytest.raises(ValueError, match="shard_size"):
        store.partition(["a"], 0)


@properties
@given(count=st.integers(1, 20_000), data=st.data())
def test_folders_of_shards_sort_by_number(count, data):
    number = data.draw(st.integers(0, count - 1))
    path, last = (store.shard_folder(Path("x"), i, count) for i in (number, count - 1))
    assert int(path.name.removeprefix("shard-")) == number
    assert len(path.name) == len(last.name) >= len("shard-00")
    assert (path.name < last.name) == (number < count - 1)


def test_same_items_same_bytes(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    store.write_shard(again / "shard-00", list(ITEMS.items())[:2], FP32)
    for path in (again / "shard-00").iterdir():
        assert path.read_bytes() == (folder / "shard-00" / path.name).read_bytes()


def test_items_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same key"):
        store.write_shard(tmp_path / "shard-00", [("a", features(1)), ("a", features(1))])
    with pytest.raises(ValueError, match="width 4, not 10"):
        narrow = features(1, code_dim=4)
        store.write_shard(tmp_path / "shard-00", [("a", features(1)), ("b", narrow)])
    with pytest.raises(ValueError, match="halb"):
        store.write_shard(tmp_path / "shard-00", [], store.ShardFormat("halb"))
    store.write_shard(tmp_path / "shard-00", [("a", features(1))])
    store.write_shard(tmp_path / "shard-01", [("a", features(1))])
    with pytest.raises(store.StoreError, match="shard-01 holds a key"):
        store.FeatureStore.open(tmp_path)


def test_not_finite_is_refused_by_name(tmp_path):
    for field in ("keypoints", "descriptors"):
        bad = features(3)
        getattr(bad, field)[1, 0] = np.nan
        with pytest.raises(ValueError, match="'b'.*nan or infinity"):
            store.write_shard(tmp_path / "shard-00", [("a", features(2)), ("b", bad)])
    assert list(tmp_path.iterdir()) == []


def test_none_one_and_few_features(tmp_path):
    items = [("none", features(0)), ("one", features(1)), ("four", features(4))]
    store.write_shard(tmp_path / "shard-00", items)
    opened = store.FeatureStore.open(tmp_path, verify=True)
    assert {key: len(opened[key]) for key in opened} == {"none": 0, "one": 1, "four": 4}
    assert opened["none"].descriptors.shape == (0, 10)


def test_a_failing_generator_leaves_nothing(tmp_path):
    def items():
        yield "a", features(1)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        store.write_shard(tmp_path / "shard-00", items())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard(tmp_path):
    store.write_shard(tmp_path / "shard-00", [], store.ShardFormat(code_dim=10))
    store.write_shard(tmp_path / "shard-01", [("a", features(2))])
    opened = store.FeatureStore.open(tmp_path, verify=True)
    assert opened.names == ["a"]
    assert len(opened["a"]) == 2


def test_shards_are_read_in_numeric_order(tmp_path):
    for index in (2, 10, 1):
        store.write_shard(tmp_path / f"shard-{index}", [(str(index), features(1))])
    (tmp_path / "shard-x").mkdir()
    assert store.FeatureStore.open(tmp_path).names == ["1", "2", "10"]


@pytest.mark.parametrize("array", ["keypoints", "descriptors", "scores", "scales"])
def test_one_flipped_bit_is_found(folder, array):
    path = folder / "shard-01" / f"{array}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = store.FeatureStore.open(folder)  # reads no features
    with pytest.raises(store.StoreError, match=" c do not match"):
        opened.verify()
    with pytest.raises(store.StoreError):
        store.FeatureStore.open(folder, verify=True)


def test_a_changed_size_is_found(folder):
    path = folder / "shard-01" / "items.json"
    path.write_text(path.read_text().replace("490", "491"))
    with pytest.raises(store.StoreError, match="ähre/1, c do not match"):
        store.FeatureStore.open(folder).verify()


def test_offsets_of_another_type_are_damage(folder):
    np.save(folder / "shard-01" / "offsets.npy", np.array([0, 0, np.nan]))
    with pytest.raises(store.StoreError, match="shard-01 is damaged"):
        store.FeatureStore.open(folder)


def test_files_of_two_shards_mixed(folder):
    shutil.copy(folder / "shard-00/offsets.npy", folder / "shard-01/offsets.npy")
    with pytest.raises(store.StoreError, match="shard-01 is damaged"):
        store.FeatureStore.open(folder)
    (folder / "shard-00/scores.npy").unlink()
    with pytest.raises(store.StoreError, match="shard-00 is damaged"):
        store.FeatureStore.open(folder)


def read_or_refused(folder: Path) -> None:
    try:
        opened = store.FeatureStore.open(folder)
        for key in opened:
            assert opened[key].scores.dtype == np.float32
        opened.verify()
    except store.StoreError as error:
        assert str(folder) in str(error)


@fuzz
@given(data=st.data(), name=st.sampled_from(ARRAYS))
def test_a_damaged_array_is_a_store_error(folder, data, name):
    path = folder / "shard-01" / f"{name}.npy"
    with restored(path) as content:
        path.write_bytes(data.draw(damaged(content)))
        read_or_refused(folder)


@fuzz
@given(data=st.data(), name=st.sampled_from(["items.json", "failures.json"]))
def test_a_damaged_document_is_a_store_error(folder, data, name):
    path = folder / "shard-01" / name
    with restored(path) as content:
        changed = damaged(content) | damaged_json(content.decode()).map(str.encode)
        path.write_bytes(data.draw(changed))
        read_or_refused(folder)
