"""A store with an index holds what it holds without one, and opens no shard to tell."""

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.features.examples import (
    FAILURE,
    FP32,
    ITEMS,
    assert_same,
    damaged,
    damaged_json,
    features,
    fuzz,
    restored,
)
from vitgal.features import store
from vitgal.features.store.codec import FEATURE_ARRAYS
from vitgal.features.store.feature_store import INDEX_ARRAYS
from vitgal.settings.sections import FEATURE_DTYPES

NAMES = ["b", "q/b", "ähre/1", "c"]


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
def test_the_index_changes_nothing(tmp_path, dtype):
    items = list(ITEMS.items())
    kind = store.ShardFormat(dtype)
    store.write_shard(tmp_path / "shard-00", items[:2], kind, failures=[FAILURE])
    store.write_shard(tmp_path / "shard-01", [("ü", features(0))], kind)
    store.write_shard(tmp_path / "shard-02", items[2:], kind)
    plain = store.FeatureStore.open(tmp_path)
    listed = store.write_index(tmp_path)
    assert listed and all((tmp_path / name).is_file() for name in listed)
    opened = store.FeatureStore.open(tmp_path, verify=True)
    assert opened.names == plain.names == ["b", "q/b", "ü", "ähre/1", "c"]
    assert opened.failures == plain.failures == {"d": "the file is empty"}
    assert (len(opened), opened.code_dim) == (5, 10)
    for key in plain:
        assert key in opened
        assert_same(opened[key], plain[key], 0)
        assert len(opened.raw(key)["scores"]) == len(plain[key])
    assert not opened.raw("c")["descriptors"].flags.writeable
    assert "a" not in opened and "z" not in opened and "" not in opened and 3 not in opened
    with pytest.raises(KeyError, match="the file is empty"):
        opened["d"]
    assert_same(pickle.loads(pickle.dumps(opened))["c"], plain["c"], 0)


def test_no_shard_is_touched_before_it_is_needed(indexed):
    (indexed / "shard-01").rename(indexed / "elsewhere")
    opened = store.FeatureStore.open(indexed)
    assert len(opened) == 4 and len(opened["b"]) == 5
    with pytest.raises(store.StoreError, match=r"shard-01 is damaged.*No such file"):
        opened["c"]


def test_a_shard_written_anew_takes_the_index_away(indexed):
    store.write_shard(indexed / "shard-01", [("new", features(2))], FP32)
    opened = store.FeatureStore.open(indexed)
    assert opened.names == ["b", "q/b", "new"] and len(opened["new"]) == 2


@pytest.mark.parametrize("name", ["index.json", *(f"{n}.npy" for n in INDEX_ARRAYS)])
def test_a_cut_index_is_done_without(indexed, name):
    path = indexed / "index" / name
    path.write_bytes(path.read_bytes()[:-3])
    opened = store.FeatureStore.open(indexed)
    assert opened.names == NAMES
    assert_same(opened["c"], ITEMS["c"], 5e-4)


@pytest.mark.parametrize("array", FEATURE_ARRAYS)
@pytest.mark.parametrize("left", [0, 5, -1])
def test_a_cut_array_is_found_when_it_is_read(indexed, array, left):
    path = indexed / "shard-01" / f"{array}.npy"
    path.write_bytes(path.read_bytes()[:left])
    opened = store.FeatureStore.open(indexed)
    with pytest.raises(store.StoreError, match=rf"shard-01 is damaged.*{array}"):
        opened["c"]
    assert len(opened["b"]) == 5


def test_an_index_that_is_not_of_these_shards(indexed, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for shard, key in (("shard-00", "b"), ("shard-01", "x")):
        store.write_shard(other / shard, [(key, features(5, 1))])
    store.write_index(other)
    shutil.rmtree(indexed / "index")
    shutil.copytree(other / "index", indexed / "index")
    with pytest.raises(store.StoreError, match="does not fit the shards"):
        store.FeatureStore.open(indexed, verify=True)


def test_what_gets_no_index(folder):
    (folder / "shard-01").rename(folder / "shard-02")
    with pytest.raises(store.StoreError, match="not numbered from 0 on"):
        store.write_index(folder)
    store.write_shard(folder / "shard-01", [("b", features(1))], FP32)
    with pytest.raises(store.StoreError, match=r"shard-01 holds a key of an earlier .*\('b'\)"):
        store.write_index(folder)
    store.write_shard(folder / "shard-01", [("x", features(1, code_dim=12))], FP32)
    with pytest.raises(store.StoreError, match="shard-00: 10 values as.*shard-01: 12 values"):
        store.write_index(folder)
    other = replace(FP32, settings={"precision": "bf16"})
    store.write_shard(folder / "shard-01", [("x", features(1))], other)
    with pytest.raises(store.StoreError, match="float16, precision fp32; .*precision bf16"):
        store.write_index(folder)
    assert not (folder / "index" / "index.json").exists()


def test_more_shards_than_files_may_be_open(tmp_path):
    """24 shards of six files each where a process may open 64, as 10,000 would where 1,024."""
    for number in range(24):
        shard = store.shard_folder(tmp_path, number, 24)
        store.write_shard(shard, [(f"image_{number}", features(3, number))])
    code = f"""
import resource, numpy as np
from vitgal.features import store
from vitgal.features.store import feature_store
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
folder = {str(tmp_path)!r}
plain = store.FeatureStore.open(folder)
store.write_index(folder)
opened = store.FeatureStore.open(folder, verify=True)
for number in np.random.default_rng(0).integers(0, 24, 300):
    for each in (plain, opened):
        assert each[f"image_{{number}}"].image_size == (400, 500 + number)
print(feature_store.most_open())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout == "5\n", child.stderr


def read_or_refused(folder: Path) -> None:
    try:
        opened = store.FeatureStore.open(folder)
        assert len(opened.names) == len(opened)
        assert isinstance(opened.failures, dict)
        for key in (*NAMES, "absent"):
            if key in opened:
                assert opened[key].scores.dtype == np.float32
    except store.StoreError as error:
        assert str(folder) in str(error)


@fuzz
@given(data=st.data(), name=st.sampled_from(INDEX_ARRAYS))
def test_a_damaged_file_of_the_index(indexed, data, name):
    path = indexed / "index" / f"{name}.npy"
    with restored(path) as content:
        path.write_bytes(data.draw(damaged(content)))
        read_or_refused(indexed)


@fuzz
@given(data=st.data(), name=st.sampled_from(INDEX_ARRAYS[1:]), value=st.integers(-9, 2**31 - 1))
def test_a_changed_number_in_the_index(indexed, data, name, value):
    path = indexed / "index" / f"{name}.npy"
    with restored(path):
        array = np.load(path)
        array.flat[data.draw(st.integers(0, array.size - 1))] = value
        np.save(path, array)
        read_or_refused(indexed)


@fuzz
@given(data=st.data())
def test_a_damaged_header_of_the_index(indexed, data):
    path = indexed / "index" / "index.json"
    with restored(path) as content:
        path.write_text(data.draw(damaged_json(content.decode())))
        read_or_refused(indexed)
