"""Arbitrary answers, records and archives: they are read, or refused by the reader's own error."""

import contextlib
import json
import tarfile

import pytest
import requests
from hypothesis import given, strategies as st

from tests.data.download_server import tar
from vitgal.data.download import archives, sources
from vitgal.data.download.fetch import total_length

NUMBERS = st.integers(0, 10**25).map(str) | st.sampled_from(["*", "²", "٣", "", "-1", "1e3", " 1"])
RANGES = st.builds("bytes {}-{}/{}".format, NUMBERS, NUMBERS, NUMBERS) | st.text(max_size=20)


@given(st.sampled_from([200, 206, 416, 404]), RANGES, NUMBERS, st.integers(0, 10**18))
def test_a_length_is_read_or_the_range_refused(status, content_range, length, offset):
    headers = {"Content-Range": content_range, "Content-Length": length}
    try:
        total = total_length(status, headers, offset)
    except requests.RequestException:
        assert status == 206
    else:
        assert total is None or total >= 0


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_the_requested_range_gives_the_length(offset, rest):
    total = offset + rest
    headers = {"Content-Range": f"bytes {offset}-{total - 1}/{total}"}
    assert total_length(206, headers, offset) == total
    with pytest.raises(requests.RequestException):
        total_length(206, headers, offset + 1)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["source", "files", "archives", "a.tar", "unpacked", "sha256"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(st.binary(max_size=40) | PLAIN.map(lambda value: json.dumps(value).encode()))
def test_a_record_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "set.download.json"
    path.write_bytes(content)
    source = sources.Source("set", "", "set", "", "", archives=(sources.RemoteFile(url="a.tar"),))
    folder = sources.SourceFolder(source, path.parent)
    try:
        record = folder.record
    except ValueError as error:
        assert str(path) in str(error) and "delete" in str(error)
    else:
        list(folder.pending())
        folder.save_record()
        assert sources.SourceFolder(source, path.parent).record == record


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_a_list_of_sources_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "sources.toml"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert isinstance(sources.read_sources(path), dict)


TYPES = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"Z"])
PARTS = st.sampled_from(["a", "b.jpg", "abc.jpg", "..", ".", ".x", "", "é", "\0", "n" * 300])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


@st.composite
def members(draw):
    info = tarfile.TarInfo(draw(NAMES))
    info.type, info.linkname = draw(TYPES), draw(NAMES)
    info.mode = draw(st.integers(0, 0o7777))
    return info


FILES = st.tuples(NAMES, st.binary(max_size=20))


@given(
    st.lists(FILES | members(), max_size=5),
    st.sampled_from(["w", "w:gz", "w:bz2", "w:xz"]),
    st.sampled_from(["flat", "tree", "by_id"]),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=3),
    st.none() | st.integers(0, 3000),
)
def test_an_archive_is_unpacked_whole_or_refused(
    tmp_path_factory, content, mode, arrange, changes, length
):
    data = bytearray(tar(content, mode))
    for position, value in changes:
        data[position % len(data)] = value
    top = tmp_path_factory.mktemp("archive")
    (top / "set.tar").write_bytes(data[:length])
    try:
        count = archives.unpack(
            top / "set.tar", top / "jpg", arrange=arrange, label="set", progress=False
        )
    except ValueError:
        count = None
    written = [path for path in top.rglob("*") if path.is_file() and path.name != "set.tar"]
    assert all(path.is_relative_to(top / "jpg") for path in written)
    assert not any(path.is_symlink() for path in top.rglob("*"))
    assert count is None or len(written) == count


@given(st.binary(max_size=600))
def test_bytes_that_are_no_archive_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.tar"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        archives.unpack(path, path.parent / "jpg", arrange="tree", label="", progress=False)
