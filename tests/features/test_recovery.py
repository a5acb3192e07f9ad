"""What is kept of a damaged shard: every image that is whole, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
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
    """Never an error of another kind, never another image than was written."""
    shard, names = folder / "shard-01", ["c", "d", "ähre/1"]
    whole = store.salvage(shard, HALF)
    assert list(whole) == ["ähre/1", "c"]
    content, kept = (shard / name).read_bytes(), 0
    for at in range(0, len(content), 2 if name.endswith(".npy") else 3):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 7
        (shard / name).write_bytes(changed)
        opened = store.whole_shard(shard, names, HALF)
        if name.endswith(".npy") and at >= 128:  # behind NumPy's header
            assert opened is None
        for key, stored in store.salvage(shard, HALF).items():
            kept += 1
            assert stored.checksum == whole[key].checksum
    assert kept


def test_half_written_shards_are_cleared(folder):
    (folder / ".partial-shard-02").mkdir()
    (folder / ".partial-shard-02/scores.npy").write_bytes(b"1")
    assert len(store.FeatureStore.open(folder)) == 4
    store.clear_partial(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["shard-00", "shard-01"]


@pytest.mark.parametrize("name", [*(f"{each}.npy" for each in ARRAYS), "items.json"])
def test_truncated_at_any_byte(shard, name):
    """What is kept equals what was written, and grows with what is left of the file."""
    whole = store.salvage(shard, FORMAT)
    assert list(whole) == ["a0", "a1", "a2", "a3"]
    content, names, sizes = (shard / name).read_bytes(), ["a0", "a1", "a2", "a3"], []
    for length in range(0, len(content), 2 if name.endswith(".npy") else 5):
        (shard / name).write_bytes(content[:length])
        if name != "items.json" or length < len(content) - 1:  # the last is a line break
            assert store.whole_shard(shard, names, FORMAT) is None
        kept = store.salvage(shard, FORMAT)
        sizes.append(len(kept))
        for key, stored in kept.items():
            assert stored.checksum == whole[key].checksum
            for part in stored.arrays:
                np.testing.assert_array_equal(stored.arrays[part], whole[key].arrays[part])
    assert sizes == sorted(sizes)
    assert {0, 3} <= set(sizes)  # nothing at first, all but the last image in the end


def test_kept_images_are_written_as_they_were(shard, tmp_path):
    kept = store.salvage(shard, FORMAT)
    again = store.write_shard(tmp_path / "shard-01", kept.items(), FORMAT)
    for path in shard.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_nothing_of_another_format_is_kept(shard, tmp_path):
    for other in ({"dtype": "float16"}, {"code_dim": 6}, {"settings": {"precision": "bf16"}}):
        assert store.salvage(shard, replace(FORMAT, **other)) == {}
    assert store.salvage(tmp_path / "shard-09", FORMAT) == {}


def test_changed_bytes_and_missing_files(shard):
    path = shard / "scores.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert list(store.salvage(shard, FORMAT)) == ["a0", "a1", "a2"]
    path.write_bytes(content[:20] + b"((((" + content[24:])  # the header is no header
    assert store.salvage(shard, FORMAT) == {}
    path.unlink()
    assert store.salvage(shard, FORMAT) == {}
