"""A damaged shard is never taken for whole."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.features.examples import features
from vitgal.features import store
from vitgal.features.store.shard import ARRAYS

DOCUMENTS = ("items.json", "failures.json")
FORMAT = store.ShardFormat("int8", 5, {"precision": "fp32"})
HALF = store.ShardFormat("float16", 10, {"precision": "fp32"})


@pytest.fixture(scope="module")
def written_shard(tmp_path_factory) -> Path:
    items = [(f"a{i}", features(i % 3 + 1, i, code_dim=5)) for i in range(4)]
    return store.write_shard(tmp_path_factory.mktemp("store") / "shard-00", items, FORMAT)


@pytest.fixture
def shard(written_shard, tmp_path) -> Path:
    return shutil.copytree(written_shard, tmp_path / "shard-00")


def test_reused_only_when_whole(folder):
    shard = folder / "shard-01"
    assert store.whole_shard(shard, ["c", "d", "ähre/1"], HALF) is not None
    assert store.whole_shard(shard, ["c", "ähre/1"], HALF) is None
    for other in ({"dtype": "float32"}, {"code_dim": 9}, {"settings": {"precision": "bf16"}}):
        assert store.whole_shard(shard, ["c", "d", "ähre/1"], replace(HALF, **other)) is None
    assert store.whole_shard(folder / "shard-07", ["c"], HALF) is None


def test_damage_means_not_whole(folder):
    path = folder / "shard-01" / "scores.npy"
    assert store.whole_shard(path.parent, ["c", "d", "ähre/1"], HALF) is not None
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert store.whole_shard(path.parent, ["c", "d", "ähre/1"], HALF) is None
    (path.parent / "items.json").write_text("{")
    assert store.whole_shard(path.parent, ["c", "d", "ähre/1"], HALF) is None


@pytest.mark.parametrize("name", [*(f"{n}.npy" for n in ARRAYS), *DOCUMENTS])
def test_any_byte_changed(folder, name):
    """Never an error of another kind, and behind NumPy's header never taken for whole."""
    shard, names = folder / "shard-01", ["c", "d", "ähre/1"]
    content = (shard / name).read_bytes()
    for at in range(0, len(content), 2 if name.endswith(".npy") else 3):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 7
        (shard / name).write_bytes(changed)
        opened = store.whole_shard(shard, names, HALF)
        if name.endswith(".npy") and at >= 128:
            assert opened is None


def test_half_written_shards_are_cleared(folder):
    (folder / ".partial-shard-02").mkdir()
    (folder / ".partial-shard-02/scores.npy").write_bytes(b"1")
    assert len(store.FeatureStore.open(folder)) == 4
    store.clear_partial(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["shard-00", "shard-01"]


@pytest.mark.parametrize("name", [*(f"{each}.npy" for each in ARRAYS), "items.json"])
def test_truncated_at_any_byte(shard, name):
    """A file that is cut short or missing is never taken for whole, and opening names the shard."""
    names = ["a0", "a1", "a2", "a3"]
    assert store.whole_shard(shard, names, FORMAT) is not None
    content = (shard / name).read_bytes()
    for length in range(0, len(content) - 1, 2 if name.endswith(".npy") else 5):
        (shard / name).write_bytes(content[:length])
        assert store.whole_shard(shard, names, FORMAT) is None
    (shard / name).unlink()
    assert store.whole_shard(shard, names, FORMAT) is None
    with pytest.raises(store.StoreError, match=r"shard-00 is damaged .*; run 05_local_extraction"):
        store.Shard.open(shard)
