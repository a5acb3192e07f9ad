"""Archives: unsafe or damaged ones are refused whole."""

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
