"""The feature store and the resumable row file: what goes in comes out, damage does not."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from vitgal import runs
from vitgal.features import interchange, store
from vitgal.features.local import LocalFeatures
from vitgal.settings.sections import FEATURE_DTYPES


def features(count: int, seed: int = 0, code_dim: int = 10) -> LocalFeatures:
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((count, code_dim)).astype(np.float32)
    return LocalFeatures(
        keypoints=rng.integers(0, 500, (count, 2)).astype(np.float32),
        descriptors=codes / np.linalg.norm(codes, axis=1, keepdims=True),
        scores=np.sort(rng.random(count, np.float32))[::-1],
        scales=rng.choice(np.float32([0.5, 1]), count),
        input_size=(432, 576),
        box=(10, 20, 490, 380),
        image_size=(400, 500 + seed),
    )


FP32 = store.ShardFormat(settings={"precision": "fp32"})
ITEMS = {"b": features(5, 1), "query/b": features(3, 2), "ähre/1": features(0, 3), "c": features(7)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store of two shards, one image of which could not be read."""
    first, second = list(ITEMS.items())[:2], list(ITEMS.items())[2:]
    store.write_shard(tmp_path / "shard-00", first, FP32)
    failed = [{"name": "d", "reason": "the file is empty"}]
    store.write_shard(
        tmp_path / "shard-01",
        second,
        failures=failed,
        shard_format=FP32,
    )
    return tmp_path


def assert_same(found: LocalFeatures, wanted: LocalFeatures, atol: float) -> None:
    np.testing.assert_array_equal(found.keypoints, wanted.keypoints)
    np.testing.assert_array_equal(found.scores, wanted.scores)
    np.testing.assert_array_equal(found.scales, wanted.scales)
    np.testing.assert_allclose(found.descriptors, wanted.descriptors, atol=atol)
    assert found.descriptors.dtype == found.keypoints.dtype == np.float32
    for name in ("input_size", "box", "image_size"):
        assert getattr(found, name) == getattr(wanted, name)


DOCUMENTS = ("items.json", "failures.json")


class TestCodes:
    @pytest.mark.parametrize(
        ("dtype", "atol"),
        # float32 is renormalised; half precision keeps 11 bits of numbers up to 1; int8 rounds to
        # half of 1 / 127 of the largest, below 1
        [("float32", 1e-6), ("float16", 5e-4), ("int8", 0.5 / 127 + 1e-4)],
    )
    def test_round_trip(self, dtype, atol):
        codes = features(50).descriptors
        stored = store.encode(codes, dtype)
        assert stored.dtype == dtype
        decoded = store.decode(stored, dtype, 10)
        np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(decoded, codes, atol=atol)

    def test_bits_by_hand(self):
        codes = np.array([[0.3, -0.2, 0.1, 0.0, 0.9, -0.1, 0.2, 0.1, -0.5, 0.4]], np.float32)
        stored = store.encode(codes, "bit")
        assert stored.tolist() == [[0b10101011, 0b01000000]]
        signs = np.array([1, -1, 1, -1, 1, -1, 1, 1, -1, 1])
        np.testing.assert_allclose(
            store.decode(stored, "bit", 10)[0], signs / np.sqrt(10), rtol=1e-6
        )

    @pytest.mark.parametrize("dtype", FEATURE_DTYPES)
    def test_none_and_zero(self, dtype):
        assert store.decode(store.encode(np.zeros((0, 9), np.float32), dtype), dtype, 9).shape == (
            0,
            9,
        )
        zero = store.decode(store.encode(np.zeros((1, 9), np.float32), dtype), dtype, 9)
        assert np.isfinite(zero).all()
        assert dtype == "bit" or not zero.any()

    def test_errors(self):
        with pytest.raises(ValueError, match="float32, float16, int8, bit"):
            store.encode(np.zeros((1, 2)), "half")
        with pytest.raises(ValueError, match="nan"):
            store.encode(np.array([[np.nan, 1]]), "float16")


class TestPartition:
    def test_sorted_and_cut(self):
        assert store.partition(["c", "a", "b"], 2) == [["a", "b"], ["c"]]
        assert store.partition(["b", "a"], 2) == [["a", "b"]]
        assert store.partition([], 2) == []

    def test_errors(self):
        with pytest.raises(ValueError, match="'a' is listed twice"):
            store.partition(["a", "b", "a"], 2)
        with pytest.raises(ValueError, match="shard_size"):
            store.partition(["a"], 0)

    def test_folders(self):
        assert store.shard_folder(Path("x"), 3, 9) == Path("x/shard-03")
        assert store.shard_folder(Path("x"), 3, 1000) == Path("x/shard-003")


class TestStore:
    def test_round_trip(self, folder):
        opened = store.FeatureStore.open(folder, verify=True)
        assert opened.names == list(opened) == ["b", "query/b", "ähre/1", "c"]
        assert len(opened) == 4
        assert opened.code_dim == 10
        for key, wanted in ITEMS.items():
            assert_same(opened[key], wanted, 5e-4)  # half precision
        assert opened.failures == {"d": "the file is empty"}

    def test_raw(self, folder):
        raw = store.FeatureStore.open(folder).raw("c")
        np.testing.assert_array_equal(raw["descriptors"], ITEMS["c"].descriptors.astype(np.float16))
        assert not raw["descriptors"].flags.writeable

    def test_missing_keys_say_why(self, folder):
        opened = store.FeatureStore.open(folder)
        for key, message in (("d", "the file is empty"), ("e", "not in")):
            with pytest.raises(KeyError, match=message):
                opened[key]

    def test_pickles_as_its_folder(self, folder):
        opened = store.FeatureStore.open(folder)
        packed = pickle.dumps(opened)
        assert len(packed) < 500
        assert_same(pickle.loads(packed)["c"], opened["c"], 0)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="05_local_extraction"):
            store.FeatureStore.open(tmp_path)

    def test_an_empty_shard(self, tmp_path):
        store.write_shard(tmp_path / "shard-00", [], store.ShardFormat(code_dim=10))
        store.write_shard(tmp_path / "shard-01", [("a", features(2))])
        opened = store.FeatureStore.open(tmp_path, verify=True)
        assert opened.names == ["a"]
        assert len(opened["a"]) == 2

    def test_shards_are_read_in_numeric_order(self, tmp_path):
        for index in (2, 10, 1):
            store.write_shard(tmp_path / f"shard-{index}", [(str(index), features(1))])
        (tmp_path / "shard-x").mkdir()
        assert store.FeatureStore.open(tmp_path).names == ["1", "2", "10"]

    @pytest.mark.parametrize("array", ["keypoints", "descriptors", "scores", "scales"])
    def test_one_flipped_bit_is_found(self, folder, array):
        path = folder / "shard-01" / f"{array}.npy"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        opened = store.FeatureStore.open(folder)  # reads no features
        with pytest.raises(store.StoreError, match=" c do not match"):
            opened.verify()
        with pytest.raises(store.StoreError):
            store.FeatureStore.open(folder, verify=True)

    def test_a_changed_size_is_found(self, folder):
        path = folder / "shard-01" / "items.json"
        path.write_text(path.read_text().replace("490", "491"))
        with pytest.raises(store.StoreError, match="ähre/1, c do not match"):
            store.FeatureStore.open(folder).verify()

    def test_a_cut_file_is_found_on_opening(self, folder):
        path = folder / "shard-00" / "descriptors.npy"
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(store.StoreError, match="shard-00 is damaged"):
            store.FeatureStore.open(folder)

    def test_offsets_of_another_type_are_damage(self, folder):
        np.save(folder / "shard-01" / "offsets.npy", np.array([0, 0, np.nan]))
        with pytest.raises(store.StoreError, match="shard-01 do not fit"):
            store.FeatureStore.open(folder)

    def test_files_of_two_shards_mixed(self, folder):
        shutil.copy(folder / "shard-00/offsets.npy", folder / "shard-01/offsets.npy")
        with pytest.raises(store.StoreError, match="shard-01 do not fit"):
            store.FeatureStore.open(folder)
        (folder / "shard-00/scores.npy").unlink()
        with pytest.raises(store.StoreError, match="shard-00 is damaged"):
            store.FeatureStore.open(folder)

    def test_same_items_same_bytes(self, folder, tmp_path_factory):
        again = tmp_path_factory.mktemp("again")
        store.write_shard(again / "shard-00", list(ITEMS.items())[:2], FP32)
        for path in (again / "shard-00").iterdir():
            assert path.read_bytes() == (folder / "shard-00" / path.name).read_bytes()

    def test_bad_items(self, tmp_path):
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

    def test_a_failing_generator_leaves_nothing(self, tmp_path):
        def items():
            yield "a", features(1)
            raise OSError("disk gone")

        with pytest.raises(OSError, match="disk gone"):
            store.write_shard(tmp_path / "shard-00", items())
        assert list(tmp_path.iterdir()) == []

    def test_forecast_is_within_five_per_cent(self, tmp_path):
        for dtype in FEATURE_DTYPES:
            shard = store.write_shard(
                tmp_path / f"{dtype}/shard-00",
                ((f"image_{i:04}", features(100, i, 128)) for i in range(40)),
                store.ShardFormat(dtype),
            )
            size = sum(path.stat().st_size for path in shard.iterdir())
            # A header of 128 bytes a file, and names in JSON, are what is guessed.
            assert store.forecast(40, 100, 128, dtype) == pytest.approx(size, rel=0.1)


class TestIndex:
    """A store with an index says what one without it says, and reads no shard to say it."""

    @pytest.fixture
    def indexed(self, folder) -> Path:
        store.write_index(folder)
        return folder

    @pytest.mark.parametrize("dtype", FEATURE_DTYPES)
    def test_says_the_same(self, tmp_path, dtype):
        items = list(ITEMS.items())
        failures = [{"name": "d", "reason": "the file is empty"}]
        kind = store.ShardFormat(dtype)
        store.write_shard(
            tmp_path / "shard-00", items[:2], store.ShardFormat(dtype), failures=failures
        )
        store.write_shard(tmp_path / "shard-01", [("ü", features(0))], kind)
        store.write_shard(tmp_path / "shard-02", items[2:], kind)
        plain = store.FeatureStore.open(tmp_path)
        listed = store.write_index(tmp_path)
        assert listed and all((tmp_path / name).is_file() for name in listed)
        opened = store.FeatureStore.open(tmp_path, verify=True)
        assert opened.names == plain.names == ["b", "query/b", "ü", "ähre/1", "c"]
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

    def test_no_shard_is_touched_before_it_is_needed(self, indexed):
        (indexed / "shard-01").rename(indexed / "elsewhere")
        opened = store.FeatureStore.open(indexed)
        assert len(opened) == 4 and len(opened["b"]) == 5
        with pytest.raises(store.StoreError, match=r"shard-01 is damaged.*No such file"):
            opened["c"]

    def test_a_shard_written_anew_takes_the_index_away(self, indexed):
        store.write_shard(indexed / "shard-01", [("new", features(2))], FP32)
        opened = store.FeatureStore.open(indexed)
        assert opened.names == ["b", "query/b", "new"] and len(opened["new"]) == 2

    @pytest.mark.parametrize("name", ["index.json", *(f"{n}.npy" for n in store.INDEX_ARRAYS)])
    def test_a_cut_index_is_done_without(self, indexed, name):
        path = indexed / "index" / name
        path.write_bytes(path.read_bytes()[:-3])
        opened = store.FeatureStore.open(indexed)
        assert opened.names == ["b", "query/b", "ähre/1", "c"]
        assert_same(opened["c"], ITEMS["c"], 5e-4)

    @pytest.mark.parametrize("array", store.ARRAYS[:4])
    @pytest.mark.parametrize("left", [0, 5, -1])
    def test_a_cut_array_is_found_when_it_is_read(self, indexed, array, left):
        path = indexed / "shard-01" / f"{array}.npy"
        path.write_bytes(path.read_bytes()[:left])
        opened = store.FeatureStore.open(indexed)
        with pytest.raises(
            store.StoreError, match=rf"shard-01 does not fit.*{array}|shard-01.*mmap"
        ):
            opened["c"]
        assert len(opened["b"]) == 5

    def test_an_index_that_is_not_of_these_shards(self, indexed, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        for shard, key in (("shard-00", "b"), ("shard-01", "x")):
            store.write_shard(other / shard, [(key, features(5, 1))])
        store.write_index(other)
        shutil.rmtree(indexed / "index")
        shutil.copytree(other / "index", indexed / "index")
        with pytest.raises(store.StoreError, match="does not fit the shards"):
            store.FeatureStore.open(indexed, verify=True)

    def test_what_gets_no_index(self, folder):
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

    def test_more_shards_than_files_may_be_open(self, tmp_path):
        """50 shards of six files each where a process may open 64, as 10,000 would where 1,024."""
        for number in range(50):
            where = store.shard_folder(tmp_path, number, 50)
            store.write_shard(where, [(f"image_{number}", features(3, number))])
        code = f"""
import resource, numpy as np
from vitgal.features import store
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
folder = {str(tmp_path)!r}
plain = store.FeatureStore.open(folder)
store.write_index(folder)
opened = store.FeatureStore.open(folder, verify=True)
for number in np.random.default_rng(0).integers(0, 50, 500):
    for each in (plain, opened):
        assert each[f"image_{{number}}"].image_size == (400, 500 + number)
print(store.most_open())
"""
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.stdout == "5\n", child.stderr


class TestWholeShard:
    def test_reused_only_when_whole(self, folder):
        shard = folder / "shard-01"
        same = store.ShardFormat("float16", 10, {"precision": "fp32"})
        assert store.whole_shard(shard, ["c", "d", "ähre/1"], same) is not None
        assert store.whole_shard(shard, ["c", "ähre/1"], same) is None
        for other in (
            {"dtype": "float32"},
            {"settings": {"precision": "bf16"}},
            {"settings": {}},
        ):
            assert store.whole_shard(shard, ["c", "d", "ähre/1"], replace(same, **other)) is None
        assert store.whole_shard(folder / "shard-07", ["c"], same) is None

    def test_damage_means_not_whole(self, folder):
        path = folder / "shard-01" / "scores.npy"
        same = store.ShardFormat("float16", 10, {"precision": "fp32"})
        assert store.whole_shard(path.parent, ["c", "d", "ähre/1"], same) is not None
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert store.whole_shard(path.parent, ["c", "d", "ähre/1"], same) is None
        (path.parent / "items.json").write_text("{")
        assert store.whole_shard(path.parent, ["c", "d", "ähre/1"], same) is None

    @pytest.mark.parametrize("name", [*(f"{n}.npy" for n in store.ARRAYS), *DOCUMENTS])
    def test_any_byte_changed(self, folder, name):
        """Never an error of another kind, never another image than was written."""
        shard, names = folder / "shard-01", ["c", "d", "ähre/1"]
        same = store.ShardFormat("float16", 10, {"precision": "fp32"})
        whole = store.salvage(shard, same)
        assert list(whole) == ["ähre/1", "c"]
        content, kept = (shard / name).read_bytes(), 0
        for at in range(len(content)):
            changed = bytearray(content)
            changed[at] ^= 1 << at % 7
            (shard / name).write_bytes(changed)
            found = store.whole_shard(shard, names, same)
            if name.endswith(".npy") and at >= 128:  # behind NumPy's header
                assert found is None
            for key, stored in store.salvage(shard, same).items():
                kept += 1
                assert stored.checksum == whole[key].checksum
        assert kept

    def test_half_written_shards_are_cleared(self, folder):
        (folder / ".partial-shard-02").mkdir()
        (folder / ".partial-shard-02/scores.npy").write_bytes(b"1")
        assert len(store.FeatureStore.open(folder)) == 4
        store.clear_partial(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["shard-00", "shard-01"]


class TestSalvage:
    """A shard of which one file is cut short at every byte."""

    MADE = store.ShardFormat("int8", 5, {"precision": "fp32"})

    @pytest.fixture
    def shard(self, tmp_path) -> Path:
        items = [(f"a{i}", features(i % 3 + 1, i, code_dim=5)) for i in range(4)]
        return store.write_shard(tmp_path / "shard-00", items, self.MADE)

    @pytest.mark.parametrize("name", [*(f"{each}.npy" for each in store.ARRAYS), "items.json"])
    def test_truncated_at_any_byte(self, shard, name):
        """What is kept equals what was written, and grows with what is left of the file."""
        whole = store.salvage(shard, self.MADE)
        assert list(whole) == ["a0", "a1", "a2", "a3"]
        content, names, sizes = (shard / name).read_bytes(), ["a0", "a1", "a2", "a3"], []
        for length in range(len(content)):
            (shard / name).write_bytes(content[:length])
            if name != "items.json" or length < len(content) - 1:  # the last is a line break
                assert store.whole_shard(shard, names, self.MADE) is None
            kept = store.salvage(shard, self.MADE)
            sizes.append(len(kept))
            for key, stored in kept.items():
                assert stored.checksum == whole[key].checksum
                for part in stored.arrays:
                    np.testing.assert_array_equal(stored.arrays[part], whole[key].arrays[part])
        assert sizes == sorted(sizes)
        assert {0, 3} <= set(sizes)  # nothing at first, all but the last image in the end

    def test_kept_images_are_written_as_they_were(self, shard, tmp_path):
        kept = store.salvage(shard, self.MADE)
        again = store.write_shard(tmp_path / "shard-01", kept.items(), self.MADE)
        for path in shard.iterdir():
            assert (again / path.name).read_bytes() == path.read_bytes()

    def test_nothing_of_another_making_is_kept(self, shard, tmp_path):
        for other in ({"dtype": "float16"}, {"code_dim": 6}, {"settings": {"precision": "bf16"}}):
            assert store.salvage(shard, replace(self.MADE, **other)) == {}
        assert store.salvage(tmp_path / "shard-09", self.MADE) == {}

    def test_changed_bytes_and_missing_files(self, shard):
        path = shard / "scores.npy"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert list(store.salvage(shard, self.MADE)) == ["a0", "a1", "a2"]
        path.write_bytes(content[:20] + b"((((" + content[24:])  # the header is no header
        assert store.salvage(shard, self.MADE) == {}
        path.unlink()
        assert store.salvage(shard, self.MADE) == {}


class TestBadFeatures:
    def test_not_finite_is_refused_by_name(self, tmp_path):
        for field in ("keypoints", "descriptors"):
            bad = features(3)
            getattr(bad, field)[1, 0] = np.nan
            with pytest.raises(ValueError, match="'b'.*nan or infinity"):
                store.write_shard(tmp_path / "shard-00", [("a", features(2)), ("b", bad)])
        assert list(tmp_path.iterdir()) == []

    def test_another_width_is_refused(self, tmp_path):
        items = [("a", features(2)), ("b", features(2, code_dim=11))]
        with pytest.raises(ValueError, match="'b' has descriptors of width 11, not 10"):
            store.write_shard(tmp_path / "shard-00", items)
        store.write_shard(tmp_path / "shard-00", items[:1])
        store.write_shard(tmp_path / "shard-01", items[1:])
        with pytest.raises(store.StoreError, match="shard-00: 10 .* shard-01: 11 values"):
            store.FeatureStore.open(tmp_path)

    def test_none_one_and_few_features(self, tmp_path):
        items = [("none", features(0)), ("one", features(1)), ("four", features(4))]
        store.write_shard(tmp_path / "shard-00", items)
        opened = store.FeatureStore.open(tmp_path, verify=True)
        assert {key: len(opened[key]) for key in opened} == {"none": 0, "one": 1, "four": 4}
        assert opened["none"].descriptors.shape == (0, 10)


class TestOtherFormats:
    def test_hloc(self, folder, tmp_path):
        path = interchange.export_hloc(store.FeatureStore.open(folder), tmp_path / "features.h5")
        with h5py.File(path) as file:
            group, wanted = file["b.jpg"], ITEMS["b"]
            # The crop of 480 x 360 was seen at 576 x 432: 5 / 6 of a photograph's pixel each.
            expected = wanted.keypoints * (5 / 6) + (10, 20) - 0.5
            np.testing.assert_allclose(group["keypoints"], expected, rtol=1e-6)
            assert group["keypoints"].attrs["uncertainty"] == pytest.approx(5 / 6)
            np.testing.assert_array_equal(group["image_size"], [501, 400])
            assert group["descriptors"].shape == (10, 5)
            # rounded to half precision twice
            np.testing.assert_allclose(group["descriptors"][:].T, wanted.descriptors, atol=1e-3)
            assert len(file["query/b.jpg"]["scores"]) == 3
            assert file["ähre/1.jpg"]["keypoints"].shape == (0, 2)

    def test_published_names(self):
        assert interchange.published_name("../data/jpg/a.jpg") == "data__jpg__a.jpg.npy"
        assert interchange.published_path("data__jpg__a.jpg.npy") == "../data/jpg/a.jpg"

    def test_published_files(self, folder, tmp_path):
        paths = {
            "b": "../data/jpg/b.jpg",
            "query/b": "/data/query/b.jpg",  # these three the published code reads wrongly
            "ähre/1": "./x.jpg",
            "c": "../data/jpg/c__2.jpg",
        }
        opened = store.FeatureStore.open(folder)
        out = interchange.export_published(opened, tmp_path / "published", paths)
        locations = np.load(out / "Locations/data__jpg__b.jpg.npy")
        assert locations.dtype == np.int64
        np.testing.assert_array_equal(locations, ITEMS["b"].keypoints[:, ::-1])
        assert np.load(out / "Descriptions/data__jpg__b.jpg.npy").dtype == np.float32
        back = dict(interchange.import_published(out))
        assert set(back) == set(paths.values())
        for key, path in paths.items():
            np.testing.assert_array_equal(back[path].keypoints, opened[key].keypoints)
            np.testing.assert_array_equal(back[path].descriptors, opened[key].descriptors)
            assert back[path].box == opened[key].box
            assert np.isnan(back[path].scores).all()

    def test_files_from_the_published_code(self, folder, tmp_path):
        out = interchange.export_published(
            store.FeatureStore.open(folder), tmp_path / "p", {key: f"../{key}.jpg" for key in ITEMS}
        )
        (out / "index.json").unlink()
        back = dict(interchange.import_published(out))
        assert sorted(back) == sorted(f"../{key}.jpg" for key in ITEMS)
        with pytest.raises(ValueError, match="extract them again"):
            back["../b.jpg"].original_keypoints()
        (out / "Descriptions/b.jpg.npy").unlink()
        with pytest.raises(FileNotFoundError, match="b.jpg.npy"):
            dict(interchange.import_published(out))

    def test_names_that_the_published_code_cannot_undo(self, folder, tmp_path):
        """Files without an index, as the published code leaves them, and the list of images."""
        paths = {"b": "/data/jpg/b.jpg", "query/b": "./q/b.jpg", "ähre/1": "../a__b/1.jpg"}
        paths["c"] = "../../data/jpg/c.jpg"
        opened = store.FeatureStore.open(folder)
        out = interchange.export_published(opened, tmp_path / "p", paths)
        (out / "index.json").unlink()
        assert not set(paths.values()) & {path for path, _ in interchange.import_published(out)}
        back = dict(interchange.import_published(out, ["../other.jpg", *paths.values()]))
        assert set(back) == set(paths.values())
        for key, path in paths.items():
            np.testing.assert_array_equal(back[path].descriptors, opened[key].descriptors)
        with pytest.raises(ValueError, match=r"\.\./a__b\.jpg and \.\./a/b\.jpg would both"):
            next(interchange.import_published(out, ["../a__b.jpg", "../a/b.jpg"]))

    def test_published_errors(self, folder, tmp_path):
        opened = store.FeatureStore.open(folder)
        with pytest.raises(ValueError, match="no path is given for 'query/b'"):
            interchange.export_published(opened, tmp_path / "p", {"b": "b.jpg"})
        clash = {"b": "../a/b.jpg", "query/b": "../a__b.jpg", "ähre/1": "1", "c": "2"}
        with pytest.raises(ValueError, match="a__b.jpg.npy"):
            interchange.export_published(opened, tmp_path / "p", clash)
        with pytest.raises(FileNotFoundError, match="Locations"):
            next(interchange.import_published(tmp_path))


class TestRowFile:
    SETTINGS = {"precision": "fp32"}

    def open(self, tmp_path, settings=None):
        return store.RowFile.open(tmp_path / "rows.npy", (5, 3), settings=settings or self.SETTINGS)

    def test_block_by_block(self, tmp_path):
        rows = np.arange(15, dtype=np.float32).reshape(5, 3)
        file = self.open(tmp_path)
        file.append(rows[:2], [{"name": "a", "reason": "empty"}])
        file.append(rows[2:2])
        file.append(rows[2:])
        assert not (tmp_path / "rows.npy").exists()
        np.testing.assert_array_equal(np.load(file.finish()), rows)
        file.forget()
        assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]

    def test_continues_after_a_kill(self, tmp_path):
        rows = np.arange(15, dtype=np.float32).reshape(5, 3)
        self.open(tmp_path).append(rows[:2], [{"name": "a", "reason": "empty"}])
        with open(tmp_path / "rows.npy.partial", "ab") as handle:
            handle.write(b"half a row")  # killed between data and journal
        file = self.open(tmp_path)
        assert file.rows == 2
        assert file.failures == [{"name": "a", "reason": "empty"}]
        file.append(rows[2:], [{"name": "b", "reason": "cut"}])
        np.testing.assert_array_equal(np.load(file.finish()), rows)
        again = self.open(tmp_path)  # killed after finish, before the stage was whole
        assert again.rows == 5
        assert [failure["name"] for failure in again.failures] == ["a", "b"]
        np.testing.assert_array_equal(np.load(again.finish()), rows)

    @pytest.mark.parametrize("damage", ["flip", "cut", "header", "gone"])
    def test_damaged_rows_are_not_continued(self, tmp_path, damage):
        self.open(tmp_path).append(np.ones((3, 3)))
        partial = tmp_path / "rows.npy.partial"
        data = bytearray(partial.read_bytes())
        if damage == "flip":
            data[-2] ^= 4
        if damage == "header":
            data[20] ^= 4
        partial.write_bytes(data[:-4] if damage == "cut" else data)
        if damage == "gone":
            partial.unlink()
        assert self.open(tmp_path).rows == 0

    def test_other_settings_are_refused(self, tmp_path):
        file = self.open(tmp_path)
        assert self.open(tmp_path, {"precision": "bf16"}).rows == 0  # nothing is lost
        file = self.open(tmp_path)
        file.append(np.ones((3, 3)))
        with pytest.raises(runs.StageError, match='precision: "fp32" there, "bf16" now.*auto dep'):
            self.open(tmp_path, {"precision": "bf16"})
        assert self.open(tmp_path).rows == 3

    def test_no_rows_at_all(self, tmp_path):
        file = store.RowFile.open(tmp_path / "rows.npy", (0, 3), settings={})
        assert np.load(file.finish()).shape == (0, 3)

    def test_errors(self, tmp_path):
        file = self.open(tmp_path)
        with pytest.raises(ValueError, match="0 of 5 rows"):
            file.finish()
        with pytest.raises(ValueError, match="block"):
            file.append(np.ones((2, 4)))
        with pytest.raises(ValueError, match="block"):
            file.append(np.ones((6, 3)))

    def test_a_full_disk_loses_nothing(self, tmp_path):
        """A child process may write files of 4 KiB at most, as on a disk that is full."""
        code = f"""
import resource, numpy as np
from vitgal.features.store import RowFile
file = RowFile.open({str(tmp_path / "rows.npy")!r}, (600, 4), settings={{}})
file.append(np.full((100, 4), 7))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
file.append(np.full((500, 4), 8))
"""
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.returncode == 1
        assert "File too large" in child.stderr
        file = store.RowFile.open(tmp_path / "rows.npy", (600, 4), settings={})
        assert file.rows == 100
        file.append(np.full((500, 4), 8))
        rows = np.load(file.finish())
        assert (rows[:100] == 7).all() and (rows[100:] == 8).all()


def test_no_torch_is_imported():
    modules = "vitgal.features.store.feature_store, vitgal.data.images"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(found.stdout.lower()) is False
