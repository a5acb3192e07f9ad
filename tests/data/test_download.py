"""Downloads from a real HTTP server on the loopback: cut connections, wrong sums, full disks.

Google Drive cannot be reached from a test. Its two sources differ from the others in the transfer
function alone, and that one is tested here with an ordinary address, which gdown takes as well.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.download_server import (
    DISTRACTORS,
    EXPECTED,
    OXFORD,
    bring,
    files_below,
    one_archive,
    one_file,
    photo,
    tar,
)
from vitgal import runs
from vitgal.data import revisited
from vitgal.data.download import checks, fetch, transfer

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", EXPECTED)
def test_real_layout_and_second_run_makes_no_request(name, world, site, tmp_path):
    folder = bring(name, tmp_path, world)
    assert files_below(folder) == sorted([*EXPECTED[name], f"{name}.download.json"])
    asked = len(site.requests)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert bring(name, tmp_path, world) == folder
    assert len(site.requests) == asked
    after = {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"}
    assert after == {path: before[path] for path in after}
    assert checks.check(name, folder=tmp_path / "data", progress=False, sources=world).ok


def test_bytes_are_the_servers(world, site, tmp_path):
    assert (bring("xcit", tmp_path, world) / "xcit.pth").read_bytes() == site.files["xcit.pth"]
    folder = bring("roxford5k", tmp_path, world)
    for i, name in enumerate(OXFORD):
        assert (folder / "jpg" / f"{name}.jpg").read_bytes() == photo(i)
    dataset = revisited.open_dataset("roxford5k", folder)
    assert dataset.database == OXFORD[:2]


def test_several_names_at_once_and_a_repeated_one(world, site, tmp_path):
    target = tmp_path / "elsewhere"
    names = ["gldv2_train", "gldv2_clean", "gldv2_train"]
    folders = transfer.download(names, target=target, progress=False, sources=world)
    assert folders == {"gldv2_train": target / "gldv2", "gldv2_clean": target / "gldv2"}
    assert site.asked("images_000.tar") == [None]
    assert transfer.download([], target=target, sources=world) == {}


def test_images_unpacked_by_hand_are_recognised(world, site, tmp_path):
    images = tmp_path / "data" / "revisitop1m" / "jpg"
    for name in DISTRACTORS:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(photo(1))
    bring("revisitop1m", tmp_path, world)
    assert [path for path, _ in site.requests] == ["revisitop1m.txt"]
    record = json.loads((images.parent / "revisitop1m.download.json").read_text())
    assert all(entry["unpacked"] for entry in record["archives"].values())


def test_an_image_removed_later_is_named_and_comes_back_with_its_folder(world, site, tmp_path):
    folder = bring("roxford5k", tmp_path, world)
    (folder / "jpg" / "oxford_000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 listed images.*oxford_000002\.jpg"):
        bring("roxford5k", tmp_path, world)
    for path in (folder / "jpg").iterdir():
        path.unlink()
    (folder / "jpg").rmdir()
    bring("roxford5k", tmp_path, world)
    assert (folder / "jpg" / "oxford_000002.jpg").is_file()
    assert len(site.asked("oxbuild.tgz")) == 2


def test_a_changed_archive_is_refused_by_the_sum_of_the_first_download(world, site, tmp_path):
    folder = bring("roxford5k", tmp_path, world)
    first = hashlib.sha256(site.files["oxbuild.tgz"]).hexdigest()
    site.files["oxbuild.tgz"] = tar([("other.jpg", photo(5))], "w:gz")
    for path in (folder / "jpg").iterdir():
        path.unlink()
    (folder / "jpg").rmdir()
    with pytest.raises(ValueError, match=rf"{first}.*recorded at the first download"):
        bring("roxford5k", tmp_path, world)
    assert not (folder / "jpg").exists()


# Transfers


def test_a_cut_transfer_goes_on_by_range_in_the_same_run(site, tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    sources = one_file(tmp_path, site, content)
    site.cuts["thing.bin"] = [1_000_000, 500_000]
    folder = bring("thing", tmp_path, sources)
    assert (folder / "thing.bin").read_bytes() == content
    assert site.asked("thing.bin") == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_cut_transfer_goes_on_by_range_in_the_next_run(site, tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    sources = one_file(tmp_path, site, content)
    site.cuts["thing.bin"] = [100_000]
    site.statuses["thing.bin"] = [404]
    with pytest.raises(ConnectionError, match="404"):
        bring("thing", tmp_path, sources)
    assert not (tmp_path / "data" / "things" / "thing.bin").exists()
    folder = bring("thing", tmp_path, sources)
    assert (folder / "thing.bin").read_bytes() == content
    assert site.asked("thing.bin") == [None, "bytes=100000-", "bytes=100000-"]
    assert files_below(folder) == ["thing.bin", "thing.download.json"]


def test_a_server_without_ranges_sends_the_whole_again(site, tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    sources = one_file(tmp_path, site, content)
    site.ranges = False
    site.cuts["thing.bin"] = [100_000]
    assert (bring("thing", tmp_path, sources) / "thing.bin").read_bytes() == content
    assert site.asked("thing.bin") == [None, "bytes=100000-"]


def test_a_file_that_changed_on_the_server_is_not_spliced(site, tmp_path):
    sources = one_file(tmp_path, site, b"old" * 1000)
    site.cuts["thing.bin"] = [2000]
    site.statuses["thing.bin"] = [404]
    with pytest.raises(ConnectionError):
        bring("thing", tmp_path, sources)
    site.files["thing.bin"] = b"new" * 1000
    assert (bring("thing", tmp_path, sources) / "thing.bin").read_bytes() == b"new" * 1000


def test_a_part_that_is_whole_already_is_taken(site, tmp_path):
    sources = one_file(tmp_path, site, b"abc" * 50)
    part = tmp_path / "data" / "things" / ".download-thing" / "thing.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"abc" * 50)  # as after a kill while the checksum was worked out
    assert (bring("thing", tmp_path, sources) / "thing.bin").read_bytes() == b"abc" * 50
    assert site.asked("thing.bin") == ["bytes=150-"]


def test_a_part_longer_than_the_file_is_thrown_away(site, tmp_path):
    sources = one_file(tmp_path, site, b"abc" * 50)
    part = tmp_path / "data" / "things" / ".download-thing" / "thing.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"z" * 500)
    with pytest.raises(ConnectionError, match="has changed"):
        bring("thing", tmp_path, sources)
    assert (bring("thing", tmp_path, sources) / "thing.bin").read_bytes() == b"abc" * 50


def test_no_network_is_one_clear_error(site, tmp_path):
    sources = one_file(tmp_path, site)
    # Port 1 of the loopback refuses.
    sources.write_text(sources.read_text().replace(site.root, "http://127.0.0.1:1"))
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:1/thing\.bin.*refused.*again"):
        bring("thing", tmp_path, sources)


def test_a_missing_page_and_a_server_error_are_named(site, tmp_path):
    sources = one_file(tmp_path, site)
    site.statuses["thing.bin"] = [403, 503]
    with pytest.raises(ConnectionError, match="403 Forbidden.*sources.toml"):
        bring("thing", tmp_path, sources)
    with pytest.raises(ConnectionError, match="503 Service Unavailable"):
        bring("thing", tmp_path, sources)


def test_a_web_page_is_not_recorded_as_the_file(site, tmp_path):
    sources = one_file(tmp_path, site, b"  <!DOCTYPE html><p>Please sign in", name="model.pth")
    with pytest.raises(ValueError, match="gave a web page in place of model.pth"):
        bring("thing", tmp_path, sources)
    assert files_below(tmp_path / "data") == []
    site.files["model.pth"] = b"weights"
    assert (bring("thing", tmp_path, sources) / "model.pth").read_bytes() == b"weights"


def test_the_google_drive_transfer_resumes_and_names_the_remedy(site, tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    site.files["weights.pth"] = content
    part = tmp_path / "things" / ".download-thing" / "weights.pth.part"
    part.parent.mkdir(parents=True)
    url = f"{site.root}/weights.pth"
    transfer = fetch.Transfer(url, part, len(content), "weights.pth", progress=False)
    site.cuts["weights.pth"] = [2_000_000]
    with pytest.raises(ConnectionError, match=rf"{url}.*save the file as .*/things/weights\.pth"):
        transfer.from_drive()
    transfer.from_drive()
    assert part.read_bytes() == content
    resumed = int(re.fullmatch(r"bytes=(\d+)-", site.asked("weights.pth")[-1])[1])
    assert 0 < resumed <= 2_000_000


def test_an_endless_transfer_stops_at_the_listed_size(site, tmp_path):
    content = b"x" * 1000
    for extra, most in ("", 2_000 + (1 << 20)), (f'sha256 = "{"0" * 64}"\n', 1000):
        sources = one_file(tmp_path, site, content, extra)
        site.endless = {"thing.bin"}
        with pytest.raises(ValueError, match=r"thing\.bin is larger than the .*`bytes` in third_p"):
            bring("thing", tmp_path, sources)
        assert files_below(tmp_path / "data") == []
        site.endless = set()
        site.files["thing.bin"] = b"y" * (most + 1)  # announced: nothing of it is fetched
        with pytest.raises(ValueError, match="larger than"):
            bring("thing", tmp_path, sources)


def test_an_endless_checksum_file_is_refused(world, site, tmp_path):
    site.endless = {"md5.images_000.txt"}
    with pytest.raises(ValueError, match=r"md5\.images_000\.txt is larger than the 1\.05MB"):
        bring("gldv2_train", tmp_path, world)


def test_an_endless_drive_transfer_stops_at_the_listed_size(site, tmp_path):
    site.endless = {"weights.pth"}
    part = tmp_path / "things" / ".download-thing" / "weights.pth.part"
    part.parent.mkdir(parents=True)
    transfer = fetch.Transfer(f"{site.root}/weights.pth", part, 10**6, "weights.pth", False)
    with pytest.raises(ValueError, match=r"weights\.pth is larger than the 1\.00MB"):
        transfer.from_drive()
    assert list(part.parent.iterdir()) == []


@pytest.mark.parametrize(("end", "reason"), [("", "404"), ("\x9b", "cannot be fetched")])
def test_a_server_cannot_write_to_the_terminal(end, reason, site, tmp_path):
    sources = one_file(tmp_path, site)
    site.redirects = {"thing.bin": f"/gone\x1b[2J\x07{end}"}
    with pytest.raises(ConnectionError, match=reason) as error:
        bring("thing", tmp_path, sources)
    assert str(error.value).isprintable()


def test_a_planted_link_is_refused(site, tmp_path):
    """In the work folder, in place of it, of its lock, of a record, and of the file itself."""
    sources = one_file(tmp_path, site, b"new")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thing.bin").write_bytes(b"mine")
    folder = tmp_path / "data" / "things"
    work = folder / ".download-thing"
    for link in (work, work / ".lock", work / "thing.bin.part", work / "thing.bin.part.etag"):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(mine if link is work else mine / "thing.bin")
        with pytest.raises(runs.PathError, match=f"{link.name} is a link to {mine}"):
            bring("thing", tmp_path, sources)
        link.unlink()
    for name in ("thing.bin", "thing.download.json"):
        (folder / name).symlink_to(tmp_path / "nothing")
    bring("thing", tmp_path, sources)
    assert (folder / "thing.bin").read_bytes() == b"new" and not (folder / "thing.bin").is_symlink()
    assert files_below(mine) == ["thing.bin"] and (mine / "thing.bin").read_bytes() == b"mine"
    assert not (tmp_path / "nothing").exists()


def test_a_file_put_there_by_hand_is_taken_and_recorded(site, tmp_path):
    sources = one_file(tmp_path, site)
    path = tmp_path / "data" / "things" / "thing.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"by hand")
    bring("thing", tmp_path, sources)
    assert site.requests == []
    record = json.loads((path.parent / "thing.download.json").read_text())
    expected = {"bytes": 7, "sha256": hashlib.sha256(b"by hand").hexdigest()}
    assert record["files"]["thing.bin"] == expected


# Checksums


def test_a_wrong_published_sum_shows_both_and_removes_the_file(site, tmp_path):
    sources = one_file(tmp_path, site, b"tampered", f'sha256 = "{"0" * 64}"\n')
    result = hashlib.sha256(b"tampered").hexdigest()
    with pytest.raises(ValueError, match=rf"{'0' * 64}.*{result}.*published with its address"):
        bring("thing", tmp_path, sources)
    assert files_below(tmp_path / "data") == []


def test_a_wrong_md5_of_an_archive_shows_both(world, site, tmp_path):
    site.files["md5.images_001.txt"] = b"0123456789abcdef0123456789abcdef  images_001.tar\n"
    result = hashlib.md5(site.files["images_001.tar"]).hexdigest()
    with pytest.raises(ValueError, match=rf"0123456789abcdef.*{result}.*md5\.images_001\.txt"):
        bring("gldv2_train", tmp_path, world)
    # The first archive's images stay, and are not fetched again.
    folder = tmp_path / "data" / "gldv2"
    expected = [*EXPECTED["gldv2_train"][:2], "gldv2_train.download.json"]
    assert files_below(folder) == sorted(expected)
    line = f"{result}  images_001.tar\n".encode()
    site.files["md5.images_001.txt"] = line
    bring("gldv2_train", tmp_path, world)
    assert len(site.asked("images_000.tar")) == 1
    assert len(site.asked("images_001.tar")) == 2


def test_an_md5_file_without_a_sum_is_named(world, site, tmp_path):
    site.files["md5.images_000.txt"] = b"try again later"
    with pytest.raises(ValueError, match=r"md5\.images_000\.txt holds no md5 sum"):
        bring("gldv2_train", tmp_path, world)


def test_a_file_damaged_on_disk_is_kept_aside_and_fetched_anew(site, tmp_path, capsys):
    sources = one_file(tmp_path, site, b"right")
    path = bring("thing", tmp_path, sources) / "thing.bin"
    path.write_bytes(b"wrong")
    report = checks.check("thing", folder=tmp_path / "data", sources=sources)
    right, wrong = (hashlib.sha256(word).hexdigest() for word in (b"right", b"wrong"))
    assert report.problems == [f"thing.bin has the sha256 {wrong}, the recorded one is {right}"]
    bring("thing", tmp_path, sources)
    assert path.read_bytes() == b"right"
    assert path.with_name("thing.bin.bad").read_bytes() == b"wrong"
    assert "kept as thing.bin.bad" in capsys.readouterr().out


def test_a_killed_unpacking_resumes_without_fetching_again(world, site, tmp_path):
    folder = bring("revisitop1m", tmp_path, world)
    # As a kill leaves it: the second archive whole in the work folder, some of it staged, one image
    # moved and the archive not marked.
    record = folder / "revisitop1m.download.json"
    content = json.loads(record.read_text())
    del content["archives"]["revisitop1m.2.tar.gz"]
    record.write_text(json.dumps(content))
    work = folder / ".download-revisitop1m"
    work.mkdir()
    (work / "revisitop1m.2.tar.gz").write_bytes(site.files["revisitop1m.2.tar.gz"])
    (work / "tmpabcd").write_bytes(b"half")
    (folder / "jpg" / ".unpacking").mkdir()
    (folder / "jpg" / ".unpacking" / "torn.jpg").write_bytes(b"")
    (folder / "jpg" / "1" / "aa.jpg").write_bytes(b"torn")
    report = checks.check("revisitop1m", folder=tmp_path / "data", progress=False, sources=world)
    assert "1 of 2 archives are not unpacked yet (revisitop1m.2.tar.gz)" in report.problems[0]
    asked = len(site.requests)
    bring("revisitop1m", tmp_path, world)
    assert len(site.requests) == asked
    assert (folder / "jpg" / "1" / "aa.jpg").read_bytes() == photo(5)  # the sixth of `world`
    assert files_below(folder) == [*EXPECTED["revisitop1m"][:3], record.name, "revisitop1m.txt"]


# Disk space


def test_too_little_disk_is_reported_before_any_request(site, tmp_path):
    sources = one_archive(tmp_path, site, tar([("a.jpg", b"1")]))
    text = sources.read_text()
    sources.write_text(re.sub(r"bytes = \d+", f"bytes = {10**18}", text))
    # Twice: the archive, and what it unpacks to.
    with pytest.raises(OSError, match=r"set need about 2\.00EB of disk space.*free"):
        bring("set", tmp_path, sources)
    assert site.requests == []
    assert not (tmp_path / "data").exists()


LIMITED = """
import resource, sys
from pathlib import Path
from vitgal.data import download
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    download.download(sys.argv[1], target=sys.argv[2], progress=False, sources=Path(sys.argv[4]))
except OSError as error:
    sys.exit(str(error))
"""


def bring_limited(name, tmp_path, sources, limit):
    """Downloads in a process that cannot write a file longer than `limit`; its error output."""
    command = [sys.executable, "-c", LIMITED, name, str(tmp_path / "data"), str(limit), sources]
    done = subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"NO_PROXY": "*"}
    )
    assert done.returncode == 1
    return done.stderr


def test_a_disk_full_in_the_transfer_is_one_error_and_the_next_run_resumes(site, tmp_path):
    content = np.random.default_rng(0).bytes(2_500_000)
    sources = one_file(tmp_path, site, content)
    error = bring_limited("thing", tmp_path, sources, 1_500_000)
    assert re.fullmatch(r"no space left for thing in \S+things \(.*\); make room.*\n", error)
    folder = tmp_path / "data" / "things"
    kept = (folder / ".download-thing" / "thing.bin.part").read_bytes()
    assert 0 < len(kept) <= 1_500_000
    assert content.startswith(kept)
    bring("thing", tmp_path, sources)
    assert (folder / "thing.bin").read_bytes() == content
    assert site.asked("thing.bin") == [None, f"bytes={len(kept)}-"]


def test_a_disk_full_in_unpacking_is_one_error_and_the_archive_is_kept(site, tmp_path):
    big = bytes(3_000_000)  # packs to 3 kB: the transfer passes, the unpacking does not
    sources = one_archive(tmp_path, site, tar([("a.jpg", b"1"), ("big.jpg", big)], "w:gz"))
    error = bring_limited("set", tmp_path, sources, 1_000_000)
    assert re.fullmatch(r"no space left for set in \S+set \(.*\); make room.*\n", error)
    assert files_below(tmp_path / "data") == ["set/.download-set/set.tar"]
    folder = bring("set", tmp_path, sources)
    assert site.asked("set.tar") == [None]
    assert (folder / "jpg" / "big.jpg").read_bytes() == big


def test_another_process_in_the_folder_is_refused(site, tmp_path):
    sources = one_file(tmp_path, site)
    with runs.locked(tmp_path / "data" / "things" / ".download-thing"):
        with pytest.raises(runs.StageError, match="another process .*things"):
            bring("thing", tmp_path, sources)


def test_a_mirror_answers_where_the_source_does_not(site, tmp_path):
    summed = f'sha256 = "{hashlib.sha256(b"thing").hexdigest()}"\n'
    mirrors = f'mirrors = ["{site.root}/gone.bin", "{site.root}/copy.bin"]\n'
    sources = one_file(tmp_path, site, b"thing", summed + mirrors)
    site.files["copy.bin"] = site.files.pop("thing.bin")
    folder = bring("thing", tmp_path, sources)
    assert (folder / "thing.bin").read_bytes() == b"thing"
    assert [name for name, _ in site.requests] == ["thing.bin", "gone.bin", "copy.bin"]
    site.files.clear()
    (folder / "thing.bin").unlink()
    with pytest.raises(ConnectionError, match=r"/thing\.bin.*; nor its mirror: .*/copy\.bin"):
        bring("thing", tmp_path, sources)
    sources = one_file(tmp_path, site, b"thing", mirrors)
    with pytest.raises(ValueError, match="a file with mirrors needs a sha256 or md5"):
        bring("thing", tmp_path, sources)


def test_a_file_behind_a_web_form_says_what_to_click(site, tmp_path):
    sources = one_file(tmp_path, site, extra='form = "accept the terms, choose ViT-S"\n')
    place = tmp_path / "data" / "things" / "thing.bin"
    clicks = (
        rf"open {site.root}/thing\.bin, accept the terms, choose ViT-S, save the file as {place}"
    )
    with pytest.raises(ConnectionError, match=clicks):
        bring("thing", tmp_path, sources)
    assert site.requests == []
    place.write_bytes(b"by hand")
    bring("thing", tmp_path, sources)
    assert place.read_bytes() == b"by hand"
