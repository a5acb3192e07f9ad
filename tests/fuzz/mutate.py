"""Damaged and prepared copies of files: bytes, numbers and text anywhere, and known structures."""

import contextlib
import io
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

WORDS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\x1b[2J", "\u202e".encode(), b"../"]
WORDS += [b"/etc/passwd", b'"', b"'", b"[" * 3000, b"{" * 3000, b"&a [*a, *a]", b"!!python/object:"]
WORDS += [b"=cmd|' '!A0", b"nan", b"-inf", b"null", b"1e999", b"9" * 400, b"-1", b"\xed\xa0"]
NUMBERS = [b"-1", b"0", b"99999999999999999999", b"4294967296", b"9" * 5000, b"1e400", b"nan", b""]
INTEGERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 64) - 1]
VALUES = [None, True, -1, 0, 1 << 31, 1 << 62, 1 << 70, 0.5, 1e308, "", "O", "\ud800", "../x", {}]
VALUES += [[], [[]] * 3, {"a": 1}, "x" * 10_000, "\x1b[2J", "float64", [None] * 50]
TYPES = ["|O", "|V8", "|S8", "<U4", "<c16", "<f2", "<f8", ">f4", "|u1", "<i8", "<M8[s]"]
TYPES += [[("a", "|O")], ("<f8", (2,))]


def mutated(content: bytes, name: str, draw: random.Random) -> bytes:
    """Returns a changed copy of a file's content; its name tells the structure."""
    existing = STRUCTURES.get(Path(name).suffix)
    if existing and draw.random() < 0.6:
        with contextlib.suppress(Exception):  # the sample itself was changed too far
            return existing(content, draw)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        content = draw.choice([flip, cut, splice, integer, word, number])(content, draw)
    return content


def flip(content: bytes, draw: random.Random) -> bytes:
    """Changes single bits."""
    changed = bytearray(content or b"\0")
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Ends the file early."""
    return content[: draw.randint(0, len(content))]


def splice(content: bytes, draw: random.Random) -> bytes:
    """Copies a part of the file to another place, or leaves it out."""
    first, second = sorted(draw.randint(0, len(content)) for _ in range(2))
    at = draw.randint(0, len(content))
    part = content[first : min(second, first + 4096)] * draw.choice([0, 1, 1, 40])
    return content[:at] + part + content[draw.choice([at, at + len(part)]) :]


def integer(content: bytes, draw: random.Random) -> bytes:
    """Writes a notable integer of 1 to 8 bytes over the content."""
    size, at = draw.choice([1, 2, 4, 8]), draw.randint(0, len(content))
    value = draw.choice(INTEGERS) % (1 << 8 * size)
    return (
        content[:at] + value.to_bytes(size, draw.choice(["little", "big"])) + content[at + size :]
    )


def word(content: bytes, draw: random.Random) -> bytes:
    """Inserts bytes that mean something somewhere."""
    at = draw.randint(0, len(content))
    return content[:at] + draw.choice(WORDS) + content[at:]


def number(content: bytes, draw: random.Random) -> bytes:
    """Replaces a decimal number."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not numbers:
        return flip(content, draw)
    location = draw.choice(numbers)
    return content[: location.start()] + draw.choice(NUMBERS) + content[location.end() :]


def change_json(content: bytes, draw: random.Random) -> bytes:
    """Replaces, removes or repeats one entry at any depth."""
    root: dict = {"": json.loads(content)}
    container: Any = root
    key: Any = ""
    while isinstance(container[key], (dict, list)) and container[key] and draw.random() < 0.8:
        container = container[key]
        key = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
    action = draw.random()
    if action < 0.15 and container is not root:
        del container[key]
    elif action < 0.25:
        container[key] = [container[key]] * draw.choice([1, 2, 1000])
    elif action < 0.3:
        text = json.dumps(root[""])
        depth = draw.choice([10, 5_000, 200_000])
        return text.replace("1", "[" * depth + "]" * depth, 1).encode()
    else:
        container[key] = draw.choice(VALUES)
    return json.dumps(root.get("", None)).encode()


def change_npy(content: bytes, draw: random.Random) -> bytes:
    """States another type, shape or order in the header, or changes a number."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    header = np.lib.format.header_data_from_array_1_0(array)
    action, data = draw.random(), bytearray(array.tobytes())
    if action < 0.4:
        header["descr"] = draw.choice(TYPES)
    elif action < 0.7:
        shape = list(header["shape"]) or [1]
        shape[draw.randrange(len(shape))] = draw.choice([0, 1, -1, 7, 1 << 20, 1 << 40, 1 << 70])
        header["shape"] = tuple(shape * draw.choice([1, 1, 2, 40]))
    elif action < 0.75:
        header["fortran_order"] = True
    elif data:
        size = array.dtype.itemsize
        at = draw.randrange(len(data) // size) * size
        data[at : at + size] = (draw.choice(INTEGERS) % (1 << 8 * size)).to_bytes(size, "little")
    stream = io.BytesIO()
    write = draw.choice([np.lib.format.write_array_header_1_0] * 9 + [_second_version])
    write(stream, header)
    return stream.getvalue() + bytes(data)


def _second_version(stream: io.BytesIO, header: dict) -> None:
    np.lib.format.write_array_header_2_0(stream, header)


def change_zip(content: bytes, draw: random.Random) -> bytes:
    """Changes, removes, repeats or packs one member of an archive whose checksums stay right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = draw.randrange(len(members))
    name, data = members[at]
    action, packing = draw.random(), zipfile.ZIP_STORED
    if action < 0.1:
        del members[at]
    elif action < 0.2:
        packing = zipfile.ZIP_DEFLATED
    elif action < 0.3:
        members[at] = (draw.choice(members)[0], data)
    else:
        members[at] = (name, mutated(data, name, draw))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def change_hdf5(content: bytes, draw: random.Random) -> bytes:
    """Replaces a dataset or group by one of another kind, or links it elsewhere."""
    stream = io.BytesIO(content)
    with h5py.File(stream, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = draw.choice(names)
        del file[name]
        kind = draw.randrange(8)
        if kind == 0:
            file[name] = h5py.ExternalLink("/tmp/other.h5", "/")
        elif kind == 1:
            file[name] = h5py.SoftLink(draw.choice([*names, "/", ".", name, "/nowhere"]))
        elif kind == 2:
            outside = [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
            file.create_dataset(name, (3,), "<f4", external=outside)
        elif kind == 3:
            layout = h5py.VirtualLayout((2,), "<f4")
            layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (2,))
            file.create_virtual_dataset(name, layout)
        elif kind == 4:
            size = draw.choice([0, 2, 1 << 20, 1 << 40])
            file.create_dataset(name, (size,), "<f4", chunks=(1 << 10,), maxshape=(None,))
        elif kind == 5:
            file.create_dataset(name, data=np.ones(draw.choice([1, 2, 1 << 17])), compression=9)
        elif kind == 6:
            file[name] = draw.choice([np.zeros((2, 2), "i4"), np.bytes_("x"), h5py.Empty("f")])
        else:
            file[name] = file[draw.choice([part for part in [*names, "/"] if part in file])]
    return stream.getvalue()


def change_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Changes the header in JSON, with its length."""
    length = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def change_tar(content: bytes, draw: random.Random) -> bytes:
    """Changes one member's name, kind, size or link."""
    stream = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as before,
        tarfile.open(fileobj=stream, mode=draw.choice(["w", "w:gz"])) as after,
    ):
        members = before.getmembers()
        chosen = draw.choice(members)
        for member in members:
            data = before.extractfile(member).read()
            if member is chosen:
                names = [
                    "../x.jpg",
                    "/tmp/x.jpg",
                    "a" * 300_000,
                    "\n.jpg",
                    members[0].name,
                    "\udcff",
                ]
                member.name = draw.choice([member.name, *names])
                member.type = draw.choice([tarfile.REGTYPE, *b"123456LKxg"[:].hex(" ").split()])
                if isinstance(member.type, str):
                    member.type = bytes.fromhex(member.type)
                member.linkname = draw.choice(["", "../x", "/etc/passwd"])
                member.pax_headers = draw.choice([{}, {"path": "y" * 1_000_000}, {"size": "-1"}])
            after.addfile(member, io.BytesIO(data))
    return stream.getvalue()


STRUCTURES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": change_json,
    ".npy": change_npy,
    ".npz": change_zip,
    ".pth": change_zip,
    ".h5": change_hdf5,
    ".safetensors": change_safetensors,
    ".tar": change_tar,
}
