"""A web server on the loopback with small data sets laid out as the real ones, and misbehaviour."""

import contextlib
import hashlib
import io
import re
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

from vitgal.data import revisited
from vitgal.data.download import transfer


@dataclass
class Site:
    """What the server gives, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)  # bytes sent before each cut, in turn
    statuses: dict[str, list[int]] = field(default_factory=dict)  # in turn, after the cuts
    ranges: bool = True
    endless: set[str] = field(default_factory=set)  # files that never end, of no stated length
    redirects: dict[str, str] = field(default_factory=dict)
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
        if name in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[name])
            self.end_headers()
            return None
        if name in site.endless:
            return self.send_without_end()
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

    def send_without_end(self):
        """Sends bytes until the client has enough."""
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 16))

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
    result = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in result if path.name != ".lock")


def bring(name, tmp_path, sources):
    return transfer.download(name, target=tmp_path / "data", progress=False, sources=sources)[name]


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
