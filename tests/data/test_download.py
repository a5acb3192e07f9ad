"""Downloads from a real HTTP server on the loopback: cut lines, bad sums, unsafe archives.

Google Drive cannot be reached from a test. Its two sources differ from the others in the transfer
function alone, and that one is tested here with an ordinary address, which gdown takes as well.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from vitgal.data import revisited
from vitgal.data.download import archives as download_archives
from vitgal.data.download import checks, fetch, transfer
from vitgal.data.download import sources as download_sources

SHARED = Path(__file__).resolve().parents[3] / "shared"
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass
class Site:
    """What the server gives, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)  # bytes sent before each cut, in turn
    statuses: dict[str, list[int]] = field(default_factory=dict)  # in turn, after the cuts
    ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    root: str = ""

    def asked(self, name: str) -> list[str | None]:
        """The Range header of each request for a file."""
        return [header for path, header in self.requests if path == name]


class Handler(BaseHTTPRequestHandler):
    """GET with ranges, entity tags and If-Range; or without ranges."""

    def do_GET(self):
        site = self.server.site
        name = self.path.lstrip("/")
        wanted = self.headers.get("Range")
        site.requests.append((name, wanted))
        if name not in site.cuts and site.statuses.get(name):
            return self.send_error(site.statuses[name].pop(0))
        if name not in site.files:
            return self.send_error(404)
        content = site.files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start = 0
        if wanted and site.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return None
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        sent = site.cuts[name].pop(0) if site.cuts.get(name) else len(content)
        if not site.cuts.get(name):
            site.cuts.pop(name, None)
        self.wfile.write(content[start : start + sent])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server on a free port; its thread ends with the test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = Site(root=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.site
    server.shutdown()
    thread.join()
    server.server_close()


def photo(seed, size=(24, 32)):
    """A small JPEG of noise: its bytes do not compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def tar(members, mode="w"):
    """An archive of (name, content) pairs or TarInfo objects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HEAD = 'about = "a test"\npage = "the page"\nlicence = "none"\n'


def one_file(tmp_path, site, content=b"x" * 1000, extra="", name="thing.bin"):
    """A source with a single file, on the server; returns the path of its sources file."""
    site.files[name] = content
    path = tmp_path / "sources.toml"
    path.write_text(
        f'[thing]\n{HEAD}folder = "things"\n[[thing.files]]\nurl = "{site.root}/{name}"\n'
        f'to = "{name}"\nbytes = {len(content)}\n{extra}'
    )
    return path


def one_archive(tmp_path, site, content, arrange="tree", extra=""):
    """A source with a single archive, on the server."""
    site.files["set.tar"] = content
    path = tmp_path / "sources.toml"
    path.write_text(
        f'[set]\n{HEAD}folder = "set"\nimage_folder = "jpg"\n[[set.archives]]\n'
        f'url = "{site.root}/set.tar"\narrange = "{arrange}"\nbytes = {len(content)}\n{extra}'
    )
    return path


def files_below(folder):
    """Every file below a folder but the lock."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found if path.suffix != ".lock")


def bring(name, tmp_path, sources):
    return transfer.download(name, target=tmp_path / "data", progress=False, sources=sources)[name]


# The real layouts


OXFORD = ["all_souls_000001", "oxford_000002", "radcliffe_000003"]
DISTRACTORS = ["0/aa.jpg", "0/bb.jpg", "1/aa.jpg"]  # one base name twice: folders must stay
LANDMARKS = ["0a1b", "0a1c", "ff00", "f00d"]


def ground_truth(tmp_path, name, database, queries):
    truth = revisited.GroundTruth(
        name,
        database,
        queries,
        np.tile([0.0, 0.0, 8.0, 8.0], (len(queries), 1)),
        easy=[np.array([0])] * len(queries),
        hard=[np.array([], np.int64)] * len(queries),
        junk=[np.array([], np.int64)] * len(queries),
    )
    return revisited.write_ground_truth(tmp_path / f"gnd_{name}.pkl", truth).read_bytes()


@pytest.fixture
def world(site, tmp_path):
    """All sets in small, laid out on the server as the real ones are; the path of their sources."""
    photos = {name: photo(i) for i, name in enumerate([*OXFORD, *DISTRACTORS, *LANDMARKS])}
    oxford = ground_truth(tmp_path, "roxford5k", OXFORD[:2], OXFORD[2:])
    paris = ground_truth(tmp_path, "rparis6k", ["paris_defense_1", "paris_louvre_1"], ["paris_q"])
    by_id = {name: f"./{name[0]}/{name[1]}/{name[2]}/{name}.jpg" for name in LANDMARKS}
    site.files |= {
        "gnd_roxford5k.pkl": oxford,
        "gnd_rparis6k.pkl": paris,
        "oxbuild.tgz": tar(
            [(f"{name}.jpg", photos[name]) for name in OXFORD] + [("README", b"text")], "w:gz"
        ),
        "paris_1.tgz": tar(
            [
                special("paris", tarfile.DIRTYPE),
                ("paris/defense/paris_defense_1.jpg", photo(91)),
                ("paris/defense/._paris_defense_1.jpg", b"resource fork"),
                ("paris/general/paris_q.jpg", photo(92)),
            ],
            "w:gz",
        ),
        "paris_2.tgz": tar(
            [
                ("paris/louvre/paris_louvre_1.jpg", photo(93)),
                ("paris/louvre/paris_damaged.jpg", photo(94)[:200]),  # listed nowhere
            ],
            "w:gz",
        ),
        "revisitop1m.txt": "\n".join(DISTRACTORS[::-1]).encode() + b"\n",
        "revisitop1m.1.tar.gz": tar([(name, photos[name]) for name in DISTRACTORS[:2]], "w:gz"),
        "revisitop1m.2.tar.gz": tar([(name, photos[name]) for name in DISTRACTORS[2:]], "w:gz"),
        "images_000.tar": tar([(by_id[name], photos[name]) for name in LANDMARKS[:2]]),
        "images_001.tar": tar([(by_id[name], photos[name]) for name in LANDMARKS[2:]]),
        "train_clean.csv": b"landmark_id,images\n7,0a1b ff00\n9,f00d\n",
        "xcit.pth": bytes(range(256)) * 40,
    }
    for number in range(2):
        name = f"images_00{number}.tar"
        line = f"{hashlib.md5(site.files[name]).hexdigest()}  {name}\n"
        site.files[f"md5.images_00{number}.txt"] = line.encode()
    path = tmp_path / "sources.toml"
    path.write_text(
        WORLD.format(root=site.root, head=HEAD, oxford=hashlib.sha256(oxford).hexdigest())
    )
    return path


WORLD = """
[roxford5k]
{head}folder = "roxford5k"
image_folder = "jpg"
list = "gnd_roxford5k.pkl"
[[roxford5k.files]]
url = "{root}/gnd_roxford5k.pkl"
to = "gnd_roxford5k.pkl"
bytes = 400
sha256 = "{oxford}"
[[roxford5k.archives]]
url = "{root}/oxbuild.tgz"
arrange = "flat"
bytes = 9000
[rparis6k]
{head}folder = "rparis6k"
image_folder = "jpg"
list = "gnd_rparis6k.pkl"
[[rparis6k.files]]
url = "{root}/gnd_rparis6k.pkl"
to = "gnd_rparis6k.pkl"
bytes = 400
[[rparis6k.archives]]
url = "{root}/paris_{{}}.tgz"
numbers = [1, 2]
arrange = "flat"
bytes = 9000
[revisitop1m]
{head}folder = "revisitop1m"
image_folder = "jpg"
list = "revisitop1m.txt"
[[revisitop1m.files]]
url = "{root}/revisitop1m.txt"
to = "revisitop1m.txt"
bytes = 30
[[revisitop1m.archives]]
url = "{root}/revisitop1m.{{}}.tar.gz"
numbers = [1, 2]
arrange = "tree"
bytes = 9000
[gldv2_train]
{head}folder = "gldv2"
image_folder = "train"
list = ["train_clean.csv", "train.csv"]
images = 4
[[gldv2_train.archives]]
url = "{root}/images_{{:03d}}.tar"
md5 = "{root}/md5.images_{{:03d}}.txt"
numbers = [0, 1]
arrange = "by_id"
bytes = 9000
[gldv2_clean]
{head}folder = "gldv2"
tables = ["train_clean.csv", "train.csv"]
rows = 3
classes = 2
[[gldv2_clean.files]]
url = "{root}/train_clean.csv"
to = "train_clean.csv"
bytes = 40
[xcit]
{head}folder = "weights"
[[xcit.files]]
url = "{root}/xcit.pth"
to = "xcit.pth"
bytes = 10240
"""

EXPECTED = {
    "roxford5k": ["gnd_roxford5k.pkl"] + [f"jpg/{name}.jpg" for name in OXFORD],
    "rparis6k": ["gnd_rparis6k.pkl"]
    + [f"jpg/paris_{name}.jpg" for name in ("damaged", "defense_1", "louvre_1", "q")],
    "revisitop1m": [f"jpg/{name}" for name in DISTRACTORS] + ["revisitop1m.txt"],
    "gldv2_train": [
        "train/0/a/1/0a1b.jpg",
        "train/0/a/1/0a1c.jpg",
        "train/f/0/0/f00d.jpg",
        "train/f/f/0/ff00.jpg",
    ],
    "gldv2_clean": ["train_clean.csv"],
    "xcit": ["xcit.pth"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_layout_and_second_run_makes_no_request(name, world, site, tmp_path):
    folder = bring(name, tmp_path, world)
    assert files_below(folder) == sorted([*EXPECTED[name], f"{name}.download.json"])
    asked = len(site.requests)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert bring(name, tmp_path, world) == folder
    assert len(site.requests) == asked
    after = {path: path.stat().st_mtime_ns for path in before if path.suffix != ".lock"}
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


def test_the_google_drive_transfer_resumes_and_names_what_to_do(site, tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    site.files["weights.pth"] = content
    part = fetch.PartialFile(tmp_path / "things" / ".download-thing" / "weights.pth.part")
    part.path.parent.mkdir(parents=True)
    options = {"label": "weights.pth", "progress": False}
    url = f"{site.root}/weights.pth"
    site.cuts["weights.pth"] = [2_000_000]
    with pytest.raises(ConnectionError, match=rf"{url}.*save the file as .*/things/weights\.pth"):
        fetch.fetch_from_drive(url, part, **options)
    fetch.fetch_from_drive(url, part, **options)
    assert part.path.read_bytes() == content
    resumed = int(re.fullmatch(r"bytes=(\d+)-", site.asked("weights.pth")[-1])[1])
    assert 0 < resumed <= 2_000_000


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
    found = hashlib.sha256(b"tampered").hexdigest()
    with pytest.raises(ValueError, match=rf"{'0' * 64}.*{found}.*published with its address"):
        bring("thing", tmp_path, sources)
    assert files_below(tmp_path / "data") == []


def test_a_wrong_md5_of_an_archive_shows_both(world, site, tmp_path):
    site.files["md5.images_001.txt"] = b"0123456789abcdef0123456789abcdef  images_001.tar\n"
    found = hashlib.md5(site.files["images_001.tar"]).hexdigest()
    with pytest.raises(ValueError, match=rf"0123456789abcdef.*{found}.*md5\.images_001\.txt"):
        bring("gldv2_train", tmp_path, world)
    # The first archive's images stay, and are not fetched again.
    folder = tmp_path / "data" / "gldv2"
    expected = [*EXPECTED["gldv2_train"][:2], "gldv2_train.download.json"]
    assert files_below(folder) == sorted(expected)
    line = f"{found}  images_001.tar\n".encode()
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


# Archives


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
    with pytest.raises(ValueError, match=r"two files for x\.jpg \(the second is b/x\.jpg\)"):
        bring("set", tmp_path, sources)


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(site, tmp_path):
    # 40 MB of zeros pack to some 40 kB: allowed are ten times that and 16 MiB.
    sources = one_archive(tmp_path, site, tar([("zeros.jpg", bytes(40_000_000))], "w:gz"))
    assert len(site.files["set.tar"]) < 100_000
    with pytest.raises(ValueError, match=r"set\.tar is refused: it unpacks to more than 17 MB"):
        bring("set", tmp_path, sources)


def test_a_damaged_archive_is_set_aside_and_fetched_anew(site, tmp_path):
    whole = tar([("a.jpg", photo(1)), ("b.jpg", photo(2))], "w:gz")
    sources = one_archive(tmp_path, site, whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"set\.tar is refused: Compressed file ended"):
        bring("set", tmp_path, sources)
    assert files_below(tmp_path / "data") == ["set/set.tar.bad"]
    site.files["set.tar"] = whole
    assert len(list((bring("set", tmp_path, sources) / "jpg").iterdir())) == 2


def test_half_unpacked_by_a_kill_is_resumed_without_fetching_what_is_whole(world, site, tmp_path):
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


def test_too_little_disk_is_said_before_any_request(site, tmp_path):
    sources = one_archive(tmp_path, site, tar([("a.jpg", b"1")]))
    text = sources.read_text()
    sources.write_text(re.sub(r"bytes = \d+", f"bytes = {10**18}", text))
    # Twice: the archive, and what it unpacks to.
    with pytest.raises(OSError, match=r"set need about 2,000,000,000\.0 GB of disk space.*free"):
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


# Check


def test_check_names_every_missing_and_every_unreadable_image(world, tmp_path):
    folder = bring("roxford5k", tmp_path, world)
    (folder / "jpg" / "oxford_000002.jpg").unlink()
    (folder / "jpg" / "all_souls_000001.jpg").write_bytes(photo(0)[:300])
    (folder / "jpg" / "radcliffe_000003.jpg").write_bytes(b"")
    (folder / "jpg" / "extra.jpg").write_bytes(b"no image")
    report = checks.check("roxford5k", folder=tmp_path / "data", progress=False, sources=world)
    assert not report.ok
    assert (report.images, report.listed) == (3, 3)
    assert report.missing == ["oxford_000002.jpg"]
    assert report.unreadable == [
        ("all_souls_000001.jpg", "the file is cut short"),
        ("radcliffe_000003.jpg", "the file is empty"),
    ]
    assert [place for place, _ in report.unlisted] == ["extra.jpg"]
    text = str(report)
    assert "NOT whole" in text
    for name in ("oxford_000002.jpg", "all_souls_000001.jpg: the file is cut", "extra.jpg"):
        assert name in text
    # The source's own folder is understood as well as the one above.
    assert checks.check("roxford5k", folder=folder, progress=False, sources=world) == report


def test_unreadable_images_that_no_list_names_leave_a_set_whole(world, tmp_path):
    bring("rparis6k", tmp_path, world)
    report = checks.check("rparis6k", folder=tmp_path / "data", progress=False, sources=world)
    assert report.ok
    assert report.unlisted == [("paris_damaged.jpg", "the file is cut short")]
    assert (report.images, report.listed) == (4, 3)


def test_check_says_where_images_lie_that_were_unpacked_elsewhere(world, tmp_path):
    folder = bring("roxford5k", tmp_path, world)
    (folder / "jpg" / "sub").mkdir()
    os.replace(folder / "jpg" / "oxford_000002.jpg", folder / "jpg" / "sub" / "oxford_000002.jpg")
    report = checks.check("roxford5k", folder=folder, progress=False, sources=world)
    assert report.missing == ["oxford_000002.jpg"]
    assert "sub/oxford_000002.jpg for oxford_000002.jpg" in report.problems[0]


def test_check_counts_where_there_is_no_list(world, tmp_path):
    folder = bring("gldv2_train", tmp_path, world)
    assert checks.check("gldv2_train", folder=folder, progress=False, sources=world).ok
    (folder / "train" / "0" / "a" / "1" / "0a1c.jpg").unlink()
    report = checks.check("gldv2_train", folder=folder, progress=False, sources=world)
    assert report.problems == ["3 images; the whole set has 4"]
    # With the clean table there, the removed image is one that nothing lists.
    bring("gldv2_clean", tmp_path, world)
    assert checks.check("gldv2_train", folder=folder, progress=False, sources=world).ok


def test_check_knows_both_clean_tables_and_refuses_the_noisy_one(world, tmp_path):
    folder = bring("gldv2_clean", tmp_path, world)
    (folder / "train.csv").write_text("id,landmark_id\n0a1b,7\nff00,7\nf00d,9\n")
    report = checks.check("gldv2_clean", folder=folder, sources=world)
    assert report.ok
    assert report.notes == [
        "train_clean.csv: 3 images of 2 classes",
        "train.csv: 3 images of 2 classes",
    ]
    (folder / "train_clean.csv").unlink()  # Kaggle's alone will do
    assert checks.check("gldv2_clean", folder=folder, sources=world).ok
    (folder / "train.csv").write_text("id,url,landmark_id\n0a1b,http://x,7\n")
    assert "noisy" in checks.check("gldv2_clean", folder=folder, sources=world).problems[0]
    (folder / "train.csv").write_text("id,landmark_id\n0a1b,7\n")
    report = checks.check("gldv2_clean", folder=folder, sources=world)
    assert "lists 1 images of 1 classes; the clean set has 3 of 2" in report.problems[0]


def test_check_of_what_is_not_there(world, tmp_path):
    report = checks.check("roxford5k", folder=tmp_path / "data", sources=world)
    assert report.problems == ["it is not there; `vitgal download roxford5k` brings it"]
    (tmp_path / "data" / "roxford5k").mkdir(parents=True)
    report = checks.check("roxford5k", folder=tmp_path / "data", sources=world)
    assert [problem.split()[0] for problem in report.problems] == ["gnd_roxford5k.pkl", "jpg/"]
    (tmp_path / "data" / "gldv2").mkdir()
    report = checks.check("gldv2_clean", folder=tmp_path / "data", sources=world)
    assert "neither of train_clean.csv, train.csv is there" in report.problems[0]
    (tmp_path / "data" / "weights").mkdir()
    report = checks.check("xcit", folder=tmp_path / "data", sources=world)
    assert report.problems == ["xcit.pth is missing; `vitgal download xcit` brings it"]


# Names


def test_an_unknown_name_lists_the_known_ones(world, tmp_path):
    with pytest.raises(ValueError, match="no source named roxford, paris;.*roxford5k, rparis6k"):
        transfer.download(["roxford", "xcit", "paris"], target=tmp_path, sources=world)
    with pytest.raises(ValueError, match="no source named nothing"):
        checks.check("nothing", folder=tmp_path, sources=world)


def test_another_process_in_the_folder_is_refused(site, tmp_path):
    sources = one_file(tmp_path, site)
    folder = tmp_path / "data" / "things"
    folder.mkdir(parents=True)
    with open(folder / ".download-thing.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process .* thing"):
            bring("thing", tmp_path, sources)


def test_sources_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no list of sources"):
        download_sources.read_sources(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[a]\nfolder = 'x'\n")
    with pytest.raises(ValueError, match=r"bad\.toml.*about"):
        download_sources.read_sources(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("[a\n")
    with pytest.raises(ValueError, match=r"bad\.toml is not a list of sources"):
        download_sources.list_sources(tmp_path / "bad.toml")


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
    known = download_sources.read_sources()
    assert list(known) == list(download_sources.list_sources().index)
    assert set(revisited.DOWNLOADS) < set(known)
    counts = {name: len(source.archives) for name, source in known.items() if source.archives}
    assert counts == {"roxford5k": 1, "rparis6k": 2, "revisitop1m": 100, "gldv2_train": 500}
    archives = known["gldv2_train"].archives
    assert archives[7].url == "https://s3.amazonaws.com/google-landmark/train/images_007.tar"
    assert archives[499].md5.endswith("/md5sum/train/md5.images_499.txt")
    assert known["revisitop1m"].archives[-1].url.endswith("/jpg/revisitop1m.100.tar.gz")
    drive = {name for name, source in known.items() if any(item.drive for item in source.files)}
    assert drive == {"vitgal_s12", "vitgal_s24"}
    (s12,) = known["vitgal_s12"].files
    assert s12.address == "https://drive.google.com/uc?id=1IiNwn9HBkL4hHbOfJhxVQf8Plp5ET58m"
    for source in known.values():
        assert all(item.arrange in download_archives.ARRANGEMENTS for item in source.archives)
        assert all(item.to and not item.arrange for item in source.files)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the official labels in ../shared")
@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_the_sums_of_the_ground_truths_are_those_of_the_official_files(name):
    (item,) = download_sources.read_sources()[name].files
    content = (SHARED / "data" / "revisited" / f"gnd_{name}.pkl").read_bytes()
    assert item.sha256 == hashlib.sha256(content).hexdigest()
    assert item.bytes == len(content)
