"""The list of sources: names, paths, the project's own entries."""

import hashlib
from pathlib import Path

import pytest

from vitgal.data import revisited
from vitgal.data.download import (
    checks,
    sources as download_sources,
    transfer,
)

SHARED = Path(__file__).resolve().parents[3] / "shared"


def test_an_unknown_name_lists_the_known_ones(world, tmp_path):
    with pytest.raises(ValueError, match="no source named roxford, paris;.*roxford5k, rparis6k"):
        transfer.download(["roxford", "xcit", "paris"], target=tmp_path, sources=world)
    with pytest.raises(ValueError, match="no source named nothing"):
        checks.check("nothing", folder=tmp_path, sources=world)


def test_sources_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no list of sources"):
        download_sources.read_sources(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[a]\nfolder = 'x'\n")
    with pytest.raises(ValueError, match=r"bad\.toml.*about"):
        download_sources.read_sources(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("[a\n")
    with pytest.raises(ValueError, match=r"bad\.toml is not a list of sources"):
        download_sources.read_sources(tmp_path / "bad.toml")


GOOD = """
[a]
about = "a"
page = "p"
licence = "l"
folder = "a"
image_folder = "jpg"
list = "list.txt"
[[a.files]]
url = "https://x/b"
to = "b/c"
[[a.archives]]
url = "https://x/d_{:03d}.tar"
numbers = [1, 2]
arrange = "flat"
"""


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("b/c", "../../x", r"'\.\./\.\./x' is not the path of a file inside"),
        ("b/c", "/etc/x", "'/etc/x' is not the path"),
        ('"a"\nimage', '"../a"\nimage', "'../a' is not"),
        ('"a"\nimage', '"."\nimage', "'.' is not"),
        ("jpg", "/", "'/' is not"),
        ("list.txt", "b/../../x", "is not the path"),
        ("[a]", "a2 = []\n[a]", "no attribute"),
        ("a.files", "a.tables", "tables"),
        ("https://x/b", "file:///etc/passwd", "'file:///etc/passwd' is no web address"),
        ("https://x/d_{:03d}.tar", "https://x/..", "'..' is not the path"),
        ("https://x/d_{:03d}.tar", "", "'' is not the path"),
        ("[1, 2]", "[0, 1_000_000_000]", "more than 10,000"),
        ('arrange = "flat"', "", "archives need `arrange`"),
        ('to = "b/c"', "", "`to` is missing"),
        ('"flat"', '"flat" # \nmd5 = "gopher://x"', "no web address"),
        ('"flat"', '"up"', "arrange"),
    ],
)
def test_paths_and_addresses_of_sources_are_checked(before, after, reason, tmp_path):
    path = tmp_path / "sources.toml"
    path.write_text(GOOD)
    archives = download_sources.read_sources(path)["a"].archives
    assert [archive.name for archive in archives] == ["d_001.tar", "d_002.tar"]
    assert before in GOOD
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(ValueError, match=rf"sources\.toml is not a list of sources: .*{reason}"):
        download_sources.read_sources(path)


def test_a_name_of_a_source_is_no_path(tmp_path):
    path = tmp_path / "sources.toml"
    path.write_text(GOOD.replace("[a]", "['../a']").replace("[a.", "['../a'."))
    with pytest.raises(ValueError, match="not the path of a file inside"):
        download_sources.read_sources(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/roxford5k", "roxford5k"),
        ("/disk/sets/rparis6k/jpg/a.jpg", "rparis6k"),
        ("data/revisitop1m/jpg", "revisitop1m"),
        ("data/gldv2/train", "gldv2_train"),
        ("data/gldv2/train/0/a/1/x.jpg", "gldv2_train"),
        ("data/gldv2/train_clean.csv", "gldv2_clean"),
        ("data/gldv2/train.csv", "gldv2_clean"),
        ("data/weights/vitgal_s12.pth", "vitgal_s12"),
        ("data/weights/xcit_small_24_p16_224.pth", "xcit_small_24_p16_224"),
        ("data/rparis6k/old/roxford5k", "roxford5k"),  # the innermost of two
        ("data/weights", None),
        ("data/gldv2", None),
        ("runs/demo/data/benchmark", None),
        ("data/my_roxford5k", None),
        ("", None),
    ],
)
def test_hint(path, name):
    assert download_sources.source_of(path) == name


def test_the_projects_own_sources():
    existing = download_sources.read_sources()
    assert list(existing) == list(download_sources.list_sources().index)
    assert set(revisited.DOWNLOADS) < set(existing)
    counts = {name: len(source.archives) for name, source in existing.items() if source.archives}
    assert counts == {"roxford5k": 1, "rparis6k": 2, "revisitop1m": 100, "gldv2_train": 500}
    archives = existing["gldv2_train"].archives
    assert archives[7].url == "https://s3.amazonaws.com/google-landmark/train/images_007.tar"
    assert archives[499].md5.endswith("/md5sum/train/md5.images_499.txt")
    assert existing["revisitop1m"].archives[-1].url.endswith("/jpg/revisitop1m.100.tar.gz")
    drive = {name for name, source in existing.items() if any(item.drive for item in source.files)}
    assert drive == {"vitgal_s12", "vitgal_s24"}
    (s12,) = existing["vitgal_s12"].files
    assert s12.address == "https://drive.google.com/uc?id=1IiNwn9HBkL4hHbOfJhxVQf8Plp5ET58m"
    for source in existing.values():
        assert all(item.arrange and not item.to for item in source.archives)
        assert all(item.to and not item.arrange for item in source.files)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the official labels in ../shared")
@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_the_sums_of_the_ground_truths_are_those_of_the_official_files(name):
    (item,) = download_sources.read_sources()[name].files
    content = (SHARED / "data" / "revisited" / f"gnd_{name}.pkl").read_bytes()
    assert item.sha256 == hashlib.sha256(content).hexdigest()
    assert item.bytes == len(content)
