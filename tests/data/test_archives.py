"""Archives: unsafe or damaged ones are refused whole."""

import functools
import gzip
import io
import subprocess
import sys
import tarfile

import pytest

from tests.data.download_server import bring, files_below, one_archive, photo, special, tar

UNSAFE = {
    "outside": ([("ok.jpg", b"1"), ("../evil.jpg", b"2")], "leads out"),
    "hidden outside": ([("ok.jpg", b"1"), ("a/../../evil.jpg", b"2")], "leads out"),
    "absolute": ([("/evil.jpg", b"2")], "leads out"),
    "symlink": ([("ok.jpg", b"1"), special("l.jpg", tarfile.SYMTYPE, "ok.jpg")], "a link"),
    "symlink out": ([special("d", tarfile.SYMTYPE, ".."), ("d/evil.jpg", b"2")], "a link"),
    "hard link": ([("ok.jpg", b"1"), special("l.jpg", tarfile.LNKTYPE, "ok.jpg")], "a link"),
    "device": ([special("null.jpg", tarfile.CHRTYPE)], "a device"),
    "pipe": ([special("pipe.jpg", tarfile.FIFOTYPE)], "a device"),
    "twice": ([("a.jpg", b"1"), ("./a.jpg", b"2")], r"two files for a\.jpg"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_archive_is_refused_whole(case, site, tmp_path):
    members, reason = UNSAFE[case]
    sources = one_archive(tmp_path, site, tar(members))
    with pytest.raises(ValueError, match=rf"set\.tar is refused.*{reason}"):
        bring("set", tmp_path, sources)
    assert files_below(tmp_path / "data") == ["set/set.tar.bad"]
    assert files_below(tmp_path) == ["data/set/set.tar.bad", "sources.toml"]
    site.files["set.tar"] = tar([("good.jpg", b"1")])
    assert (bring("set", tmp_path, sources) / "jpg" / "good.jpg").read_bytes() == b"1"


def test_flattening_two_images_of_one_name_is_refused(site, tmp_path):
    sources = one_archive(tmp_path, site, tar([("a/x.jpg", b"1"), ("b/x.jpg", b"2")]), "flat")
    with pytest.raises(ValueError, match=r"two files for x\.jpg \(the second is 'b/x\.jpg'\)"):
        bring("set", tmp_path, sources)


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(site, tmp_path):
    # 40 MB of zeros pack to some 40 kB: allowed are ten times that and 16 MiB.
    sources = one_archive(tmp_path, site, tar([("zeros.jpg", bytes(40_000_000))], "w:gz"))
    assert len(site.files["set.tar"]) < 100_000
    with pytest.raises(ValueError, match=r"set\.tar is refused: it unpacks to more than 17"):
        bring("set", tmp_path, sources)


def test_a_damaged_archive_is_set_aside_and_fetched_anew(site, tmp_path):
    whole = tar([("a.jpg", photo(1)), ("b.jpg", photo(2))], "w:gz")
    sources = one_archive(tmp_path, site, whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"set\.tar is refused: Compressed file ended"):
        bring("set", tmp_path, sources)
    assert files_below(tmp_path / "data") == ["set/set.tar.bad"]
    site.files["set.tar"] = whole
    assert len(list((bring("set", tmp_path, sources) / "jpg").iterdir())) == 2


def header(name, kind, size, *, linkname=""):
    """A header of 512 bytes, whose claims are never checked."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, linkname
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**values):
    """A PAX header of true length."""
    return tarfile.TarInfo._create_pax_generic_header(values, tarfile.XHDTYPE, "utf-8")


@functools.cache
def gzipped(data):
    return gzip.compress(data)


def packed(*parts):
    """A .tar.gz of bytes, and of (bytes, count): they are repeated, each 32 MB compressed once."""
    content = b""
    for part in parts:
        data, count = part if isinstance(part, tuple) else (part, 1)
        block = min(count, max(1, (32 << 20) // len(data)))
        content += gzipped(data * block) * (count // block)
    return content


GIGABYTE, MEGABYTE = 1 << 30, b"a" * (1 << 20)
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}
HUGE = {
    "name": [header("././@LongLink", tarfile.GNUTYPE_LONGNAME, GIGABYTE), (MEGABYTE, 1024)],
    "link name": [header("././@LongLink", tarfile.GNUTYPE_LONGLINK, GIGABYTE), (MEGABYTE, 1024)],
    "PAX header": [header("a", tarfile.XHDTYPE, GIGABYTE), (MEGABYTE, 1024)],
    "global PAX header": [header("a", tarfile.XGLTYPE, GIGABYTE), (MEGABYTE, 1024)],
    "Solaris header": [header("a", tarfile.SOLARIS_XHDTYPE, GIGABYTE), (MEGABYTE, 1024)],
    "claimed name": [header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 8**11 - 1)],
    "chained names": [
        (header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 60_000) + b"a" * 60_416, 20_000)
    ],
    "global headers": [
        (
            tarfile.TarInfo._create_pax_generic_header(
                {f"key{number}": "x" * 1000 for number in range(50)}, tarfile.XGLTYPE, "utf-8"
            )
            + header(".a", tarfile.REGTYPE, 0),
            600,
        )
    ],
    "content": [header("a.jpg", tarfile.REGTYPE, GIGABYTE), (MEGABYTE, 1024)],
    "content left out": [header(".a", tarfile.REGTYPE, GIGABYTE), (MEGABYTE, 1024)],
    "PAX size": [pax(size=str(10**15)), header("a.jpg", tarfile.REGTYPE, 10)],
    "sparse map": [
        pax(**SPARSE),
        header("a.jpg", tarfile.REGTYPE, 512),
        b"1" * 512,
        (MEGABYTE, 96),
    ],
    "sparse numbers": [
        pax(**SPARSE),
        header("a.jpg", tarfile.REGTYPE, 1 << 29),
        b"99999999\n",
        (b"1\n" * (1 << 19), 1024),
    ],
    "sparse list": [
        pax(**{"GNU.sparse.map": "0,1," * 10_000, "GNU.sparse.size": str(10**15)}),
        header("a.jpg", tarfile.REGTYPE, 0),
    ],
    "old sparse": [header("a.jpg", tarfile.GNUTYPE_SPARSE, 512), (b"\1" * 512, 1 << 21)],
    "unknown kind": [header("a.jpg", b"Z", GIGABYTE), (MEGABYTE, 1024)],
}

LIMITED = """
import resource, sys
from pathlib import Path
from vitgal.data.download import archives
memory = sum(int(line.split()[1]) for line in open("/proc/self/status") if line[:6] == "VmSize")
limit = 1024 * memory + (150 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for archive in sys.argv[2:]:
    try:
        archives.unpack(Path(archive), Path(sys.argv[1]), arrange="tree", label="", progress=False)
        print("unpacked")
    except ValueError as error:
        print(len(str(error)) < 500 and "MemoryError" not in str(error), str(error)[:100])
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


def test_small_archives_cannot_fill_the_memory(tmp_path):
    """Each is refused with less than 150 MB, and nothing of it is left."""
    for name, parts in HUGE.items():
        (tmp_path / f"{name}.tar").write_bytes(packed(*parts))
    paths = [str(tmp_path / f"{name}.tar") for name in HUGE]
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "jpg"), *paths]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    *lines, left = child.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["True"] * len(HUGE), child.stdout
    assert left == "[]"


@pytest.mark.parametrize("name", ["name", "claimed name", "PAX size", "sparse map", "old sparse"])
def test_an_archive_that_claims_too_much_is_set_aside(name, site, tmp_path):
    sources = one_archive(tmp_path, site, packed(*HUGE[name]))
    with pytest.raises(ValueError, match=r"set\.tar is refused"):
        bring("set", tmp_path, sources)
    assert files_below(tmp_path / "data") == ["set/set.tar.bad"]
    site.files["set.tar"] = tar([("good.jpg", b"1")])
    assert (bring("set", tmp_path, sources) / "jpg" / "good.jpg").read_bytes() == b"1"


def test_ordinary_long_names_are_unpacked(site, tmp_path):
    name = "/".join(["n" * 100] * 5) + "/é.jpg"
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", format=format) as archive:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        sources = one_archive(tmp_path, site, buffer.getvalue())
        folder = bring("set", tmp_path / str(format), sources)
        assert (folder / "jpg" / name).read_bytes() == b"abc"


def test_no_archive_writes_through_a_link(site, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.jpg").write_bytes(b"mine")
    images = tmp_path / "data" / "set" / "jpg"
    images.mkdir(parents=True)
    (images / "sub").symlink_to(outside)
    sources = one_archive(tmp_path, site, tar([("ok.jpg", b"1"), ("sub/a.jpg", b"2")]))
    with pytest.raises(ValueError, match="sub is a link to .*outside"):
        bring("set", tmp_path, sources)
    assert (outside / "a.jpg").read_bytes() == b"mine"
    assert [path.name for path in images.iterdir()] == ["sub"]
    # A link in place of a file is replaced, and an image folder may be a link.
    (images / "sub").unlink()
    (images / "sub").mkdir()
    (images / "sub" / "a.jpg").symlink_to(outside / "a.jpg")
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "set" / "set.tar.bad").unlink()
    bring("set", tmp_path, sources)
    assert (outside / "a.jpg").read_bytes() == b"mine"
    assert (tmp_path / "elsewhere" / "sub" / "a.jpg").read_bytes() == b"2"
