"""Prepared files: none makes objects, brings in another file, or takes more than it holds."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.features.examples import ITEMS, NAMES, ROWS, assert_same, save_hloc, save_npy
from vitgal import runs
from vitgal.features import store
from vitgal.features.descriptors import DescriptorError, read_descriptors
from vitgal.features.files import FileError, map_array, read_arrays
from vitgal.features.store.feature_store import INDEX_ARRAYS
from vitgal.features.store.shard import ARRAYS

# Types that hold addresses or anything else than numbers
TYPES = ["|O", "|V8", "|S8", "<U2", "<M8[s]", "<c16", "<f16", [("a", "|O")], [("a", "<f8")]]
TYPES += [("<f8", (2,))]


def npy(descr, shape=(1,), data: bytes = bytes(8), order: bool = False) -> bytes:
    """A `.npy` with any header before the data."""
    header = io.BytesIO()
    entries = {"descr": descr, "fortran_order": order, "shape": shape}
    np.lib.format.write_array_header_1_0(header, entries)
    return header.getvalue() + data


BAD_HEADERS = [npy(descr, data=bytes(16)) for descr in TYPES]
BAD_HEADERS += [
    npy("<f8", shape) for shape in ((1 << 40,), (2,), (-1,), (0,), (1 << 70, 0), (True,) * 9)
]
BAD_HEADERS += [b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535]
BAD_HEADERS += [b"PK\x03\x04", b"\x80\x04]", b""]


@pytest.mark.parametrize("content", BAD_HEADERS)
def test_only_complete_numeric_arrays_are_read(tmp_path, content):
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(FileError, match="x.npy is not a whole"):
        map_array(path)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(FileError, match="x.npz is not a whole"):
        read_arrays(tmp_path / "x.npz", ["x"])


def test_an_archive_of_arrays_is_not_unpacked(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros(1 << 20))
    with pytest.raises(FileError, match="compressed"):
        read_arrays(path, ["x"])
    runs.write_arrays(path, {"x": np.arange(3), "y": np.eye(2, order="F")})
    arrays = read_arrays(path, ["x", "y"])
    assert arrays["x"].tolist() == [0, 1, 2] and arrays["y"].tolist() == [[1, 0], [0, 1]]
    with pytest.raises(FileError, match="no item named 'z.npy'"):
        read_arrays(path, ["z"])


@pytest.mark.parametrize("dtype", ["O", "|O", "V4", "float64", "bfloat16", ["float16"], {}, 1])
def test_a_json_header_cannot_change_the_type(indexed, dtype):
    """The index counts as none; a shard is damaged."""
    for path in (indexed / "index" / "index.json", indexed / "shard-01" / "items.json"):
        header = runs.read_json(path)
        runs.write_json(path, header | {"dtype": dtype})
        if path.name == "index.json":
            opened = store.FeatureStore.open(indexed)
            assert_same(opened["c"], ITEMS["c"], 5e-4)
    with pytest.raises(store.StoreError, match="shard-01 is damaged"):
        store.FeatureStore.open(indexed)


@pytest.mark.parametrize("entry", ["code_dim", "folders", "format", "failures"])
@pytest.mark.parametrize("value", [-1, 1 << 62, True, None, 1.0, [{}]])
def test_numbers_of_the_index_header(indexed, entry, value):
    path = indexed / "index" / "index.json"
    runs.write_json(path, runs.read_json(path) | {entry: value})
    for key, wanted in store.FeatureStore.open(indexed).items():
        assert_same(wanted, ITEMS[key], 5e-4)


@pytest.mark.parametrize("descr", TYPES)
def test_no_file_of_a_store_makes_objects(indexed, descr):
    for path in (*indexed.glob("index/*.npy"), *indexed.glob("shard-01/*.npy")):
        content = path.read_bytes()
        shape = np.load(path).shape
        path.write_bytes(npy(descr, shape, content[128:]))
        try:
            opened = store.FeatureStore.open(indexed)
            for key in opened:
                assert_same(opened[key], ITEMS[key], 5e-4)
        except store.StoreError:
            assert path.parent.name == "shard-01"
        path.write_bytes(content)


def test_another_order_is_refused(folder):
    path = folder / "shard-00" / "keypoints.npy"
    np.save(path, np.asfortranarray(np.load(path)))
    with pytest.raises(store.StoreError, match="shard-00 is damaged"):
        store.FeatureStore.open(folder)


def changed_ranges() -> dict:
    """Wrong ranges of rows (shard 0: 5 and 3 features, shard 1: none and 7), by what is wrong."""
    right = [[0, 5], [5, 8], [0, 0], [0, 7]]
    cases = {"negative": (0, [-5, 0]), "reversed": (1, [8, 5]), "short": (0, [2, 5])}
    cases |= {"overlap": (1, [4, 8]), "beyond": (3, [0, 1 << 40]), "moved": (3, [-7, 0])}
    wrong = {name: [*right[:at], rows, *right[at + 1 :]] for name, (at, rows) in cases.items()}
    return wrong | {"divided in another way": [[0, 4], [4, 8], *right[2:]]}


@pytest.mark.parametrize("rows", changed_ranges().values(), ids=changed_ranges())
def test_an_index_with_other_ranges_is_ignored(indexed, rows):
    np.save(indexed / "index" / "rows.npy", np.array(rows))
    opened = store.FeatureStore.open(indexed)
    for key, wanted in ITEMS.items():
        assert_same(opened[key], wanted, 5e-4)


@pytest.mark.parametrize("name", ["names", "order"])
def test_an_index_whose_keys_are_in_no_order_counts_as_none(indexed, name):
    path = indexed / "index" / f"{name}.npy"
    np.save(path, np.load(path)[::-1] if name == "order" else np.zeros_like(np.load(path)))
    opened = store.FeatureStore.open(indexed)
    for key, wanted in ITEMS.items():
        assert key in opened
        assert_same(opened[key], wanted, 5e-4)
    with pytest.raises(KeyError, match="not on the short list"):
        opened["of no shard"]


@pytest.mark.parametrize("name", INDEX_ARRAYS)
def test_an_index_with_any_number_changed(indexed, name):
    """What is opened is what was stored, or one sentence."""
    path = indexed / "index" / f"{name}.npy"
    right = np.load(path)
    for at in range(right.size):
        for value in (-1, 1, 3, 127, 128, 255, right.size, 1 << 31, 1 << 40, -(1 << 62)):
            array = right.copy()
            array.flat[at] = np.array(value).astype(right.dtype)
            np.save(path, array)
            try:
                opened = store.FeatureStore.open(indexed)
                for key in ITEMS.keys() & set(opened.names):
                    if key in opened and name not in ("names", "sizes", "order", "name_ends"):
                        assert_same(opened[key], ITEMS[key], 5e-4)
            except store.StoreError as error:
                assert str(indexed) in str(error)


def test_arrays_of_objects_in_every_file_of_a_shard(folder):
    for name in ARRAYS:
        path = folder / "shard-01" / f"{name}.npy"
        content = path.read_bytes()
        np.save(path, np.array([{}], object), allow_pickle=True)
        with pytest.raises(store.StoreError):
            store.FeatureStore.open(folder)
        path.write_bytes(content)


@pytest.mark.parametrize("journal", ["rows", "shape", "checksum", "settings", "failures"])
def test_a_journal_of_rows_with_other_entries_is_ignored(tmp_path, journal):
    file = store.RowFile.open(tmp_path / "rows.npy", (3, 2), settings={})
    file.append(np.ones((2, 2)))
    path = tmp_path / "rows.npy.journal.json"
    for value in (-1, 1 << 70, None, [1], "O", 2.0):
        runs.write_json(path, file.journal | {journal: value})
        assert store.RowFile.open(tmp_path / "rows.npy", (3, 2), settings={}).rows == 0


# Descriptors in HDF5
OUTSIDE = np.arange(2, dtype=np.float32) + 1


def prepared(folder: Path, how: str) -> Path:
    """A file of descriptors whose image `b` is prepared."""
    path = save_hloc(folder / "x.h5", names=NAMES)
    secret = folder / "secret"
    OUTSIDE.tofile(secret)
    save_hloc(folder / "other.h5")
    with h5py.File(path, "r+") as file:
        del file["b.jpg/global_descriptor"]
        group, size = file["b.jpg"], {"shape": (2,), "dtype": "<f4"}
        if how == "external storage":
            group.create_dataset("global_descriptor", **size, external=[(str(secret), 0, 8)])
        elif how == "virtual":
            layout = h5py.VirtualLayout(**size)
            layout[:] = h5py.VirtualSource("other.h5", "b.jpg/global_descriptor", shape=(2,))
            group.create_virtual_dataset("global_descriptor", layout)
        elif how == "external link":
            group["global_descriptor"] = h5py.ExternalLink("other.h5", "b.jpg/global_descriptor")
        elif how == "external group":
            del file["b.jpg"]
            file["b.jpg"] = h5py.ExternalLink("other.h5", "b.jpg")
        elif how == "soft link outside":
            file["there"] = h5py.ExternalLink("other.h5", "/")
            group["global_descriptor"] = h5py.SoftLink("/there/b.jpg/global_descriptor")
        elif how == "chunked, never written":
            group.create_dataset("global_descriptor", (1 << 40,), "<f4", chunks=(1 << 16,))
        elif how == "short, never written":
            group.create_dataset("global_descriptor", (2,), "<f4", chunks=(2,), fillvalue=7)
        elif how == "contiguous, never written":
            group.create_dataset("global_descriptor", (2,), "<f4", fillvalue=7)
        elif how == "packed":
            zeros = np.ones(1 << 22, np.float32)
            group.create_dataset("global_descriptor", data=zeros, compression="gzip")
        elif how == "large chunk":
            data = {"data": np.ones(2, np.float32), "maxshape": (None,), "chunks": (1 << 24,)}
            group.create_dataset("global_descriptor", **data, compression="gzip")
        elif how == "text":
            group["global_descriptor"] = np.array(["a", "b"], h5py.string_dtype())
        elif how == "references":
            group["global_descriptor"] = np.array([file.ref, file.ref], h5py.ref_dtype)
    return path


HOW = {
    "external storage": "of b is stored in another file",
    "virtual": "of b is stored in another file",
    "external link": "links to another file at 'global_descriptor'",
    "external group": "links to another file at 'b.jpg'",
    "soft link outside": "links to another file at 'there'",
    "chunked, never written": "of b has shape",
    "short, never written": "of b was never written",
    "contiguous, never written": "of b was never written",
    "packed": "of b has shape",
    "large chunk": "of b was never written completely, or is packed",
    "text": "of b has .* type object: no list of numbers",
    "references": "of b has .* type object: no list of numbers",
}


@pytest.mark.parametrize(("how", "message"), HOW.items())
def test_hdf5_reads_only_the_file_itself(tmp_path, how, message):
    with pytest.raises(DescriptorError, match=message):
        read_descriptors(prepared(tmp_path, how), NAMES)


def test_hdf5_links_inside_the_file_are_followed(tmp_path):
    path = save_hloc(tmp_path / "x.h5", names=["q", "a", "b", "c"])
    with h5py.File(path, "r+") as file:
        file["sub/c.jpg"] = h5py.SoftLink("../c.jpg")  # leads nowhere: HDF5 has no ..
        del file["sub/c.jpg"]
        file["sub/c.jpg"] = h5py.SoftLink("/via/x.jpg")
        file["via"] = h5py.SoftLink("./real")
        file["real/x.jpg"] = h5py.SoftLink("/c.jpg")
        file["real/x.jpg/self"] = h5py.SoftLink("/real/x.jpg/self")
        file["real/all"] = file["/"]  # a group that holds itself
        del file["via"]["all"]
        file["gone"] = h5py.SoftLink("/nowhere")
    with pytest.raises(DescriptorError, match="no descriptor of 1 of 4 images: d; "):
        read_descriptors(path, ["q", "a", "b", "d"])
    rows = read_descriptors(path, NAMES)
    np.testing.assert_array_equal(rows, read_descriptors(save_npy(tmp_path / "y.npy"), NAMES))


def test_hdf5_packed_descriptors_are_read(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name, row in zip(NAMES, ROWS, strict=True):
            packed = {"compression": "gzip", "shuffle": True, "fletcher32": True}
            file.create_dataset(f"{name}/global_descriptor", data=row, **packed)
    rows = read_descriptors(tmp_path / "x.h5", NAMES)
    np.testing.assert_array_equal(rows, read_descriptors(save_npy(tmp_path / "y.npy"), NAMES))


def twice_in_each_other(path: Path) -> None:
    """Forty groups, each twice in the one before: 2 ** 40 names in a few kilobytes."""
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(40):
            group["a"] = below = group.create_group("b")
            group = below


def test_cyclic_groups_are_refused(tmp_path):
    twice_in_each_other(tmp_path / "x.h5")
    with pytest.raises(DescriptorError, match="groups that hold each other"):
        read_descriptors(tmp_path / "x.h5", NAMES)


def test_groups_far_inside_each_other_end(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as group:
        for _ in range(500):
            group = group.create_group("g")
        group["global_descriptor"] = np.ones(4, np.float32)
    with pytest.raises(DescriptorError, match="groups in groups more than 64 deep"):
        read_descriptors(tmp_path / "x.h5", ["g"])


def test_a_dataset_without_values(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/global_descriptor"] = h5py.Empty("f4")
    with pytest.raises(DescriptorError, match="of a has shape None .*: no list of numbers"):
        read_descriptors(tmp_path / "x.h5", ["a"])


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ("query/{}.jpg", r"without 'query/'\): 'query/a.jpg' to 'a', 'query/b.jpg' to 'b'"),
        ("/home/me/jpg/{}.jpg", r"without '/?home/me/jpg/'\): '/?home/me/jpg/a.jpg' to 'a'"),
        ("C:\\me\\{}.jpg", r"without 'C:.+me.+'\): 'C:.+me.+a.jpg' to 'a'"),
        ("{}_0001.jpg", r"\(the file names 'a_0001.jpg' and 'b_0001.jpg'\)"),
    ],
)
def test_differing_names_are_listed_with_the_expected_names(tmp_path, theirs, message):
    names = [theirs.format(name) for name in ("a", "b", "c")]
    for path in (save_hloc(tmp_path / "x.h5", ROWS[:3], names, ""), tmp_path / "x.npy"):
        if path.suffix == ".npy":
            save_npy(path, ROWS[:3], names)
        with pytest.raises(DescriptorError, match=f"2 of 2 images: a, b; .*{message}"):
            read_descriptors(path, ["a", "b"])


def test_a_file_that_another_program_writes(tmp_path):
    path = save_hloc(tmp_path / "x.h5")
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); input()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(DescriptorError, match="another program writes .*x.h5"):
            read_descriptors(path, NAMES)
        writer.stdin.close()
    assert read_descriptors(path, NAMES).shape == (4, 2)


@pytest.mark.parametrize("how", ["chunked, never written", "packed", "large chunk", "hold", "npz"])
def test_a_small_file_takes_little_memory_and_time(tmp_path, how):
    """In a child process with 300 MB more than its modules take, and two seconds."""
    path = tmp_path / "x.h5"
    if how == "hold":
        twice_in_each_other(path)
    elif how == "npz":
        path = tmp_path / "x.npz"
        np.savez_compressed(path, x=np.zeros(1 << 28, np.uint8))
    else:
        prepared(tmp_path, how)
    code = """
import resource, sys
from pathlib import Path
from vitgal.features.descriptors import read_descriptors
from vitgal.features.files import read_arrays
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, 2 * (pages * resource.getpagesize() + (300 << 20),))
used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
resource.setrlimit(resource.RLIMIT_CPU, (used + 2, used + 2))
try:
    if sys.argv[1].endswith("npz"):
        read_arrays(Path(sys.argv[1]), ["x"])
    read_descriptors(sys.argv[1], ["q", "a", "b", "sub/c"])
except ValueError as error:
    print(type(error).__name__)
"""
    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert child.stdout in ("DescriptorError\n", "FileError\n"), child.stderr


@pytest.mark.parametrize("name", ["items.json", "offsets.npy", "scores.npy", "failures.json"])
def test_a_pipe_in_place_of_a_file_does_not_block(folder, name):
    (folder / "shard-01" / name).unlink()
    os.mkfifo(folder / "shard-01" / name)
    with pytest.raises(store.StoreError, match=f"shard-01 is damaged.*{name}"):
        store.FeatureStore.open(folder)
    os.mkfifo(folder / "x.npz")
    with pytest.raises(FileError, match="x.npz is not a whole"):
        read_arrays(folder / "x.npz", ["x"])
