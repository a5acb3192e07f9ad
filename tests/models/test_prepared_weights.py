"""Small files of weights that ask for much memory or time."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tests import layouts
from tests.limited_memory import run_limited
from vitgal.models.network import build_model

HUGE = 1 << 40


def claim(path, program, *storages):
    """A zipped `.pth` whose pickle is written by hand; storages: number of bytes of each."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("a/version", "3\n")
        for number, size in enumerate(storages):
            archive.writestr(f"a/data/{number}", bytes(size))


def storage(numel):
    return (
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
        + b"\x8a\x08"
        + struct.pack("<q", numel)
        + b"tQ"
    )


def tensor(numel, shape, stride):
    """A state dict of one tensor under the name `w`."""
    view = b"".join(b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in dims) + b"t"
                    for dims in (shape, stride))  # fmt: skip
    return (
        b"}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + storage(numel)
        + b"K\0"
        + view
        + b"\x89ccollections\nOrderedDict\n)RtRs"
    )


LOAD = """
for path in sys.argv[1:]:
    try:
        print("loaded", load_model(path))
    except ValueError as error:
        assert path in str(error) and len(str(error)) < 1000
        print(path.rpartition("/")[2], str(error).replace(path, "")[:60])
"""


def refused(*paths):
    """What `load_model` says of each file, in a process that may take 500 MB for all of them."""
    imports = "from vitgal.models.weights import load_model"
    lines = run_limited(imports, LOAD, *paths).splitlines()
    assert len(lines) == len(paths)
    return {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in lines}


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> dict[str, str]:
    """What is said of each file that the functions below write, all read by one process."""
    folder = tmp_path_factory.mktemp("prepared")
    for write in (inflated_checkpoints, inflated_safetensors, wide_codes):
        write(folder)
    return refused(*sorted(folder.iterdir()))


def inflated_checkpoints(folder):
    claim(folder / "storage.pth", tensor(HUGE, (HUGE,), (1,)), 64)
    claim(folder / "shape.pth", tensor(16, (HUGE,), (1,)), 64)
    claim(folder / "view.pth", tensor(16, (HUGE,), (0,)), 64)
    claim(folder / "bytes.pth", b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R")
    bomb = b"c_codecs\nencode\nq\x01" + b"h\x01" * 39 + b"X\x02\0\0\0ab"
    claim(folder / "hex.pth", bomb + b"X\x06\0\0\0latin1\x86R" + 39 * b"X\x03\0\0\0hex\x86R")
    (folder / "memo.pth").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    with zipfile.ZipFile(folder / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps("a" * 10**7, 2))
    claim(folder / "twice.pth", tensor(16, (16,), (1,)), 64)
    with zipfile.ZipFile(folder / "twice.pth", "a") as archive:
        archive.writestr("a/DATA.pkl", b"\x80\x02}.")
    old = folder / "old.pth"
    torch.save({"w": torch.zeros(4)}, old, _use_new_zipfile_serialization=False)
    content = old.read_bytes()
    assert content.count(b"K\x04N") == 1
    old.write_bytes(content.replace(b"K\x04N", b"\x8a\x08" + struct.pack("<q", HUGE) + b"N"))


def test_checkpoints_with_inflated_sizes(messages):
    for name in "storage shape memo packed twice old".split():
        assert messages[f"{name}.pth"].startswith("is no readable checkpoint")
    assert messages["view.pth"].startswith("holds no ViTGaL weights")
    assert messages["bytes.pth"].startswith("was refused: it wants to load builtins.bytearray")
    assert messages["hex.pth"].startswith("was refused: it wants to load _codecs.encode")


def inflated_safetensors(folder):
    header = json.dumps({"w": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}})
    length = struct.pack("<Q", len(header))
    (folder / "length.safetensors").write_bytes(b"\xff" * 8)
    (folder / "header.safetensors").write_bytes(length + header.encode())
    actual = {"format": 1, "architecture": "xcit_small_24_p16_224"}
    for name, change in [
        ("network", {}),
        ("codes", {"code_dim": 10**9}),
        ("dilations", {"dilations": [1] * 10**5}),
        ("dilated", {"dilations": [1, 10**9]}),
        ("huge", {"code_dim": 10**400}),
        ("unhashable", {"architecture": [1]}),
    ]:
        metadata = {"vitgal": json.dumps(actual | change)}
        save_file({"a": torch.ones(1)}, folder / f"{name}.safetensors", metadata=metadata)
    for name, text in [("deep", "[" * 10**5), ("digits", '{"format": 1' + "0" * 10**4 + "}")]:
        path = folder / f"{name}.safetensors"
        save_file({"a": torch.ones(1)}, path, metadata={"vitgal": text})


def test_safetensors_with_inflated_sizes(messages):
    assert messages["network.safetensors"].startswith("does not fit xcit_small_24"), messages
    for name in ("codes", "dilations", "dilated", "huge", "unhashable"):
        assert messages[f"{name}.safetensors"].startswith("asks for a network that cannot be built")
    for name in ("deep", "digits"):
        assert messages[f"{name}.safetensors"].startswith("holds a broken ViTGaL configuration")


def wide_codes(folder):
    """Tensors of one stored row state any number of rows."""
    model = build_model("xcit_nano_12_p16_224", code_dim=48, seed=0)
    tensors = layouts.published(model.state_dict())
    for code_dim in (5000, 10**7):
        wide = torch.zeros(1, 1).expand(code_dim, 128)
        codes = {"whitening_layer.weight": wide, "whitening_layer.bias": wide[:, 0]}
        codes["ae_decoder_layer.weight"] = wide.T
        torch.save(tensors | codes, folder / f"codes{code_dim}.pth")


@pytest.mark.parametrize("code_dim", [5000, 10**7])
def test_a_code_dimension_that_the_file_does_not_hold(messages, code_dim):
    message = messages[f"codes{code_dim}.pth"]
    assert message.startswith("asks for a network that cannot be built")
