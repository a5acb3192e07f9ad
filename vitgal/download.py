"""Data sets and weights: from the addresses in third_party/sources.toml to checked local files.

What a source has brought is kept in `<folder>/<name>.download.json`: each file's checksum, and
which archives are unpacked. What is still under way lies in `<folder>/.download-<name>/`. A kill, a
cut line or a full disk at any moment leaves these as they are; the same command goes on from there.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import os
import platform
import re
import shutil
import tarfile
import time
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import pooch
import requests
import urllib3
from tqdm.auto import tqdm

from vitgal import images, landmarks, revisited, runs

SOURCES = "third_party/sources.toml"
AGENT = {"User-Agent": "vitgal", "Accept-Encoding": "identity"}  # bytes as they are on the server
TIMEOUT = (20, 120)  # seconds without an answer: to connect, between two pieces
# Seconds before each further try after a transfer brought nothing. One that brought something is
# taken up at once; one where nothing ever came fails at once, so that a missing network shows.
WAITS = (1, 5, 20, 60)
# Photographs hardly compress: an archive that unpacks to far more than its size is no set of them.
UNPACKED_RATIO, UNPACKED_SPARE, MAX_MEMBERS = 10, 16 << 20, 2_000_000
DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
STAGING = ".unpacking"  # inside the image folder: on the same disk, even where that is a link
BATCH = 4096  # images handed to the reading threads at once
SHOWN = 3  # names that an error spells out


@dataclass(frozen=True)
class Item:
    """One file to fetch: a file of its own (`to`), or an archive to unpack (`arrange`)."""

    name: str
    url: str
    drive: bool  # on Google Drive
    bytes: int
    to: str | None = None
    arrange: str | None = None
    sha256: str | None = None
    md5: str | None = None  # the address of the published sum


@dataclass(frozen=True)
class Source:
    """One entry of sources.toml."""

    name: str
    about: str
    folder: str
    files: tuple[Item, ...]
    archives: tuple[Item, ...]
    image_folder: str | None
    lists: tuple[str, ...]  # the first that exists says which images there must be
    images: int | None
    tables: tuple[str, ...]
    rows: int | None
    classes: int | None
    page: str
    licence: str
    note: str


@dataclass
class _Job:
    """One source while it is brought: where it goes, what is recorded, how to go about it."""

    source: Source
    folder: Path
    record: dict
    progress: bool
    reached: bool = False  # something has come over the network since the command began

    @property
    def work(self) -> Path:
        return self.folder / f".download-{self.source.name}"

    @property
    def images(self) -> Path:
        return _images(self.source, self.folder)

    def save(self) -> None:
        runs.write_json(_record_path(self.source, self.folder), self.record)


# Sources


def read_sources(path: Path | None = None) -> dict[str, Source]:
    """The sources by name, from a TOML file; by default third_party/sources.toml.

    Raises FileNotFoundError where the file is missing, ValueError where it is no such file.
    """
    path = runs.resolve(SOURCES) if path is None else Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: _source(name, entry) for name, entry in content.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no list of sources {path}") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of sources: {error!r}") from error


def list_sources(sources: Path | None = None) -> pd.DataFrame:
    """A table of what can be downloaded: a row a name; GB is the disk space it fills."""
    known = read_sources(sources)
    rows = [
        {
            "GB": round(sum(item.bytes for item in (*s.files, *s.archives)) / 1e9, 2),
            "folder": s.folder,
            "about": s.about,
        }
        for s in known.values()
    ]
    return pd.DataFrame(rows, index=pd.Index(known, name="name"))


def hint(path: str | os.PathLike, *, sources: Path | None = None) -> str | None:
    """The source whose folder or file a path is (or lies in); None where it is no source's.

    Only names are compared (`.../roxford5k/jpg` is roxford5k), so that it holds for any target; a
    folder that several sources share belongs to none.
    """
    parts = Path(path).parts
    known = read_sources(sources)
    best: tuple[int, int] = (0, 0)
    found = None
    for source in known.values():
        for place, to_the_end in _places(source, known):
            last = len(parts) - len(place)
            starts = [last] if to_the_end else range(last + 1)
            for start in starts:
                if start >= 0 and parts[start : start + len(place)] == place:
                    if (len(place), start) > best:
                        best, found = (len(place), start), source.name
    return found


def _places(source: Source, known: dict[str, Source]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """A source's own places as path parts, and whether a path must end there (a file)."""
    shared = sum(other.folder == source.folder for other in known.values()) > 1
    folder = PurePosixPath(source.folder)
    if not shared:
        yield folder.parts, False
    if source.image_folder:
        yield (folder / source.image_folder).parts, False
    for file in {*(item.to for item in source.files), *source.tables}:
        yield (folder / file).parts, True


def _source(name: str, entry: dict) -> Source:
    lists = entry.get("list", ())
    return Source(
        name=name,
        about=entry["about"],
        folder=entry["folder"],
        files=tuple(item for part in entry.get("files", ()) for item in _items(part)),
        archives=tuple(item for part in entry.get("archives", ()) for item in _items(part)),
        image_folder=entry.get("image_folder"),
        lists=(lists,) if isinstance(lists, str) else tuple(lists),
        images=entry.get("images"),
        tables=tuple(entry.get("tables", ())),
        rows=entry.get("rows"),
        classes=entry.get("classes"),
        page=entry["page"],
        licence=entry["licence"],
        note=entry.get("note", ""),
    )


def _items(part: dict) -> Iterator[Item]:
    first, last = part.get("numbers", (0, 0))
    for number in range(first, last + 1):
        drive = "drive" in part
        url = f"https://drive.google.com/uc?id={part['drive']}" if drive else part["url"]
        url = url.format(number) if "numbers" in part else url
        md5 = part.get("md5")
        yield Item(
            name=PurePosixPath(part.get("to") or url).name,
            url=url,
            drive=drive,
            bytes=part["bytes"],
            to=part.get("to"),
            arrange=part.get("arrange"),
            sha256=part.get("sha256"),
            md5=md5.format(number) if md5 and "numbers" in part else md5,
        )


def _chosen(names: str | Iterable[str], known: dict[str, Source]) -> list[Source]:
    names = list(dict.fromkeys([names] if isinstance(names, str) else names))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"there is no source named {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return [known[name] for name in names]


# Bringing a source


def download(
    names: str | Iterable[str],
    *,
    target: str | os.PathLike | None = None,
    progress: bool = True,
    sources: Path | None = None,
) -> dict[str, Path]:
    """Brings data sets and weights by name and returns each one's folder.

    What is whole is not asked for again (no request is made), what is half there is taken up where
    it stopped. A set of images that was unpacked by hand is recognised once its list is there.

    Args:
        target: the folder that all sources' folders lie in; by default data/ of the checkout.
        sources: another list of sources than third_party/sources.toml.
    Raises:
        ValueError: an unknown name, a wrong checksum (both sums are named; the file is removed), a
            damaged archive or one with links, devices or paths that lead out (it is set aside).
        ConnectionError: an address cannot be reached or refuses.
        OSError: there is not disk space enough, before or in the middle of it.
        FileNotFoundError: all archives are unpacked, yet listed images are missing.
    """
    target = runs.resolve("data") if target is None else Path(target).expanduser()
    chosen = _chosen(names, read_sources(sources))
    _check_space(chosen, target, progress=progress)
    return {
        source.name: _bring(source, target / source.folder, progress=progress) for source in chosen
    }


def _bring(source: Source, folder: Path, *, progress: bool) -> Path:
    with _disk_errors(source.name, folder), _locked(folder, source.name):
        job = _Job(source, folder, _read_record(source, folder), progress)
        _sweep(job)
        for item in source.files:
            _bring_file(job, item)
        if source.archives:
            _bring_archives(job)
        shutil.rmtree(job.work, ignore_errors=True)
    if source.note and progress:
        print(f"{source.name}: {source.note}")
    return folder


def _bring_file(job: _Job, item: Item) -> None:
    """One file of its own: verified where it is there already, else fetched and recorded."""
    path = job.folder / item.to
    known, origin = _known_sum(job, item, entry=job.record["files"].get(item.to))
    if path.is_file() and not pooch.hashes.hash_matches(path, known):
        aside = path.with_name(f"{path.name}.bad")
        os.replace(path, aside)
        print(f"{path} does not have the checksum {origin}: kept as {aside.name}, fetched anew")
    if path.is_file():
        if item.to not in job.record["files"]:
            job.record["files"][item.to] = _sums(path)
            job.save()
        return
    fetched = _fetch(job, item, known=known, origin=origin, label=item.name)
    # The record first: what a kill leaves between the two is found whole in the work folder.
    job.record["files"][item.to] = _sums(fetched)
    job.save()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(fetched, path)


def _bring_archives(job: _Job) -> None:
    entries = job.record["archives"]
    if not job.images.is_dir():  # removed to have it anew: the sums stay, and are checked
        for entry in entries.values():
            entry["unpacked"] = False
    if not entries and _missing(job.source, job.folder) == []:
        for item in job.source.archives:  # unpacked by hand, and whole
            entries[item.name] = {"unpacked": True}
        job.save()
    total = len(job.source.archives)
    for number, item in enumerate(job.source.archives, 1):
        if not entries.get(item.name, {}).get("unpacked"):
            label = f"{item.name} ({number}/{total})" if total > 1 else item.name
            _bring_archive(job, item, label=label)
    missing = _missing(job.source, job.folder)
    if missing:
        raise FileNotFoundError(
            f"every archive of {job.source.name} is unpacked, yet {len(missing):,} listed images "
            f"are missing in {job.images}: {_some(missing)}; put them back, or delete that folder "
            "and run the same command again"
        )


def _bring_archive(job: _Job, item: Item, *, label: str) -> None:
    entry = job.record["archives"].get(item.name, {})
    known, origin = _known_sum(job, item, entry=entry)
    archive = _fetch(job, item, known=known, origin=origin, label=label)
    sums = {"md5": known.partition(":")[2]} if item.md5 else _sums(archive)
    try:
        count = _unpack(
            archive, job.images, arrange=item.arrange, label=label, progress=job.progress
        )
    except (*DAMAGED, ValueError) as error:
        aside = job.folder / f"{item.name}.bad"
        os.replace(archive, aside)
        raise ValueError(
            f"{item.url} is refused: {error or type(error).__name__}; nothing of it was unpacked, "
            f"and the archive is kept as {aside}. See {job.source.page}, delete it, and run the "
            "same command again to fetch it anew"
        ) from error
    job.record["archives"][item.name] = sums | {"images": count, "unpacked": True}
    job.save()
    archive.unlink()


def _known_sum(job: _Job, item: Item, *, entry: dict | None) -> tuple[str | None, str]:
    """The checksum a file must have as `algorithm:hex`, and where it comes from."""
    if item.sha256:
        return f"sha256:{item.sha256}", "published with its address"
    if item.md5:
        return f"md5:{_published_md5(job, item)}", f"published in {item.md5}"
    if entry and "sha256" in entry:
        record = _record_path(job.source, job.folder)
        return f"sha256:{entry['sha256']}", f"recorded at the first download in {record}"
    return None, "none"


def _published_md5(job: _Job, item: Item) -> str:
    listed = Item(name=f"{item.name}.md5", url=item.md5, drive=False, bytes=0)
    path = _fetch(job, listed, known=None, origin="none", label=listed.name)
    text = path.read_text(encoding="utf-8", errors="replace")
    path.unlink()
    found = re.match(r"\s*([0-9a-fA-F]{32})\b", text)
    if found is None:
        raise ValueError(f"{item.md5} holds no md5 sum but {text[:60]!r}; see {job.source.page}")
    return found[1].lower()


def _sums(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": runs.fingerprint_file(path)}


def _record_path(source: Source, folder: Path) -> Path:
    return folder / f"{source.name}.download.json"


def _read_record(source: Source, folder: Path) -> dict:
    path = _record_path(source, folder)
    found = runs.read_json(path) if path.is_file() else {}
    return {"source": source.name, "files": {}, "archives": {}} | found


def _sweep(job: _Job) -> None:
    """Removes what a killed process left that nothing can be resumed from."""
    shutil.rmtree(job.images / STAGING, ignore_errors=True)
    record = _record_path(job.source, job.folder).name
    for path in (*job.work.glob("tmp*"), *job.folder.glob(f"{runs.TEMPORARY}*-{record}")):
        path.unlink()


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Lets one process at a time bring a source; the kernel frees the lock after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".download-{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is bringing {name} to {folder}; wait for it") from None
        yield


# Disk space


def _check_space(chosen: list[Source], target: Path, *, progress: bool) -> None:
    """Raises OSError before anything is fetched where the disk cannot hold what is to come."""
    pending = [item for source in chosen for item in _pending(source, target / source.folder)]
    if not pending:
        return
    # Archives are fetched, unpacked and deleted one by one: only the largest comes on top.
    largest = max((item.bytes for item in pending if item.arrange), default=0)
    needed = sum(item.bytes for item in pending) + largest
    free = _free(target)
    if progress:
        print(
            f"about {_size(sum(item.bytes for item in pending))} to download in {len(pending)} "
            f"files, {_size(needed)} of disk space; {_size(free)} are free in {target}"
        )
    if needed > free:
        raise OSError(
            f"{', '.join(source.name for source in chosen)} need about {_size(needed)} of disk "
            f"space in {target}, where {_size(free)} are free; make room or choose another folder "
            "(--to)"
        )


def _pending(source: Source, folder: Path) -> Iterator[Item]:
    yield from (item for item in source.files if not (folder / item.to).is_file())
    entries = _read_record(source, folder)["archives"]
    whole = not entries and _missing(source, folder) == []
    there = _images(source, folder).is_dir()
    for item in source.archives:
        if not whole and not (there and entries.get(item.name, {}).get("unpacked")):
            yield item


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


@contextlib.contextmanager
def _disk_errors(name: str, folder: Path) -> Iterator[None]:
    """Says in one line what a full disk means here; any other error passes through."""
    try:
        yield
    except OSError as error:
        if not runs.disk_full(error):
            raise
        raise OSError(
            f"no space left for {name} in {folder} ({error.strerror}); make room and run the same "
            "command again: it goes on from what has arrived"
        ) from error


# Transfer: to `<work>/<name>.part`, then checked


def _fetch(job: _Job, item: Item, *, known: str | None, origin: str, label: str) -> Path:
    """Brings one item into the work folder, whole and with the known checksum, and its path."""
    part = job.work / f"{item.name}.part"

    def transfer(url: str, output: str, _: Any) -> None:
        # Google Drive differs from other servers in this one function, nowhere else.
        bring = _fetch_drive if item.drive else _fetch_http
        bring(url, part, label=label, progress=job.progress, patient=job.reached)
        job.reached = True
        # A link, not a move: a kill while the checksum is worked out must not lose the file.
        os.unlink(output)
        try:
            os.link(part, output)
        except OSError:  # a file system without hard links
            os.replace(part, output)

    with _quiet_pooch():
        try:
            pooch.retrieve(item.url, known, fname=item.name, path=job.work, downloader=transfer)
        except ValueError as error:
            _forget(part)
            raise ValueError(
                f"{item.url}: {error} The expected sum is {origin}; run the same command again, "
                f"and if it differs again see {job.source.page}"
            ) from None
    _forget(part)
    _refuse_web_page(job.work / item.name, item)
    return job.work / item.name


def _fetch_http(url: str, part: Path, *, label: str, progress: bool, patient: bool) -> None:
    """Brings a URL's bytes to `part`, from where it ends; tries on while something arrives."""
    furthest, waits = _length(part), list(WAITS if patient else ())
    while True:
        problem = _stream(url, part, label=label, progress=progress)
        if problem is None:
            return
        if _length(part) > furthest:  # a server without ranges begins anew each time
            furthest, waits = _length(part), list(WAITS)
            continue
        if not waits:
            kept = f"; {_size(_length(part))} of it are kept" if _length(part) else ""
            raise ConnectionError(
                f"{url} cannot be fetched ({problem}){kept}. Check the network (a proxy is taken "
                "from HTTPS_PROXY and HTTP_PROXY) and run the same command again"
            )
        time.sleep(waits.pop(0))


def _stream(url: str, part: Path, *, label: str, progress: bool) -> str | None:
    """One request, appended to `part`; None once the file is whole, else what went wrong."""
    offset = _length(part)
    try:
        with requests.get(
            url, headers=_range(part, offset), stream=True, timeout=TIMEOUT
        ) as response:
            total = _total(response, offset)
            if response.status_code == 416:
                if total == offset:
                    return None
                _forget(part)  # longer than the file: it is another file's beginning
                return "the file has changed"
            _refuse_status(response)
            offset = offset if response.status_code == 206 else 0
            _check_room(url, part, total=total, offset=offset)
            _save(response, part, offset=offset, total=total, label=label, progress=progress)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        return _reason(error)
    if total is not None and _length(part) > total:  # never twice: it would grow without end
        _forget(part)
        return "more came than the server had announced"
    return None if total is None or _length(part) == total else "the connection was cut"


def _save(
    response: requests.Response,
    part: Path,
    *,
    offset: int,
    total: int | None,
    label: str,
    progress: bool,
) -> None:
    validator = response.headers.get("ETag", "")
    if validator.startswith("W/"):  # a weak one does not promise the same bytes
        validator = ""
    _validator(part).write_text(validator or response.headers.get("Last-Modified", ""))
    bar = tqdm(
        desc=label,
        total=total,
        initial=offset,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not progress,
    )
    with bar, open(part, "ab" if offset else "wb") as handle:
        for chunk in response.raw.stream(runs.CHUNK, decode_content=False):
            handle.write(chunk)
            bar.update(len(chunk))


def _range(part: Path, offset: int) -> dict[str, str]:
    if not offset:
        return AGENT
    validator = _validator(part)
    same = validator.read_text() if validator.is_file() else ""
    # With If-Range a file that has changed on the server comes whole, not spliced onto old bytes.
    return AGENT | {"Range": f"bytes={offset}-"} | ({"If-Range": same} if same else {})


def _total(response: requests.Response, offset: int) -> int | None:
    """The whole file's length, as far as the server tells."""
    if response.status_code in (206, 416):
        found = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "")
        )
        if response.status_code == 206 and (found is None or int(found[1] or -1) != offset):
            raise requests.RequestException("the server sends another range than was asked for")
        return int(found[2]) if found and found[2] != "*" else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _refuse_status(response: requests.Response) -> None:
    status = response.status_code
    if status >= 500 or status in (408, 429):  # may pass: worth another try
        raise requests.RequestException(f"the server answers {status} {response.reason}")
    if status not in (200, 206):
        raise ConnectionError(
            f"{response.url} cannot be fetched: the server answers {status} {response.reason}. The "
            f"file may have moved: correct its address in {SOURCES}"
        )


def _check_room(url: str, part: Path, *, total: int | None, offset: int) -> None:
    free = _free(part.parent)
    if total is not None and total - offset > free:
        raise OSError(
            f"{url} needs {_size(total - offset)} in {part.parent}, where {_size(free)} are free; "
            "make room and run the same command again"
        )


def _fetch_drive(url: str, part: Path, *, label: str, progress: bool, patient: bool) -> None:
    """Brings a file of Google Drive to `part`; gdown asks for its confirmations and resumes."""
    import gdown  # slow to import, and needed for two files alone

    try:
        gdown.download(url, str(part), quiet=not progress, resume=True)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
            raise  # the disk's
        name = part.name.removesuffix(".part")
        raise ConnectionError(
            f"{label} cannot be fetched from Google Drive ({_reason(error)}). Run the same command "
            f"again, or open {url} in a browser, save the file as {part.parent.parent / name} and "
            "run the command then: it takes the file as it is"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one short line: requests wraps what urllib3 wraps."""
    inner = error
    while inner.__cause__ or inner.__context__ or getattr(inner, "reason", None):
        following = inner.__cause__ or inner.__context__ or inner.reason
        if not isinstance(following, BaseException):
            break
        inner = following
    return " ".join((str(inner) or type(inner).__name__).split())[:200]


def _refuse_web_page(path: Path, item: Item) -> None:
    """A sign-in page in place of the file must not become the recorded first download."""
    with open(path, "rb") as handle:
        head = handle.read(512).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        path.unlink()
        raise ValueError(
            f"{item.url} gave a web page in place of {item.name} (a sign-in page of the network, "
            "or a file that has moved); open the address in a browser to see why"
        )


@contextlib.contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Without pooch's own lines: the checksum it advises to note is recorded by us."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# Archives


def _unpack(archive: Path, folder: Path, *, arrange: str, label: str, progress: bool) -> int:
    """Unpacks plain files into `folder` and returns how many; all of them, or none.

    Raises ValueError on a member that is no plain file or folder or leads out of the folder, on two
    members with one place, and on sizes that no archive of photographs has; what tarfile and gzip
    raise on a damaged archive; OSError on a full disk.
    """
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        places = _extract(archive, staging, arrange=arrange, label=label, progress=progress)
        for place in places:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / place, folder / place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(places)


def _extract(
    archive: Path, staging: Path, *, arrange: str, label: str, progress: bool
) -> list[PurePosixPath]:
    limit = UNPACKED_RATIO * archive.stat().st_size + UNPACKED_SPARE
    unpacked = 0
    places = []
    with (
        tarfile.open(archive) as tar,
        tqdm(desc=f"unpacking {label}", unit=" files", leave=False, disable=not progress) as bar,
    ):
        for count, member in enumerate(tar, 1):
            _vet(member, staging)
            unpacked += member.size
            if unpacked > limit or count > MAX_MEMBERS:
                raise ValueError(f"it unpacks to more than {_size(limit)} or {MAX_MEMBERS:,} files")
            place = None if member.isdir() else ARRANGEMENTS[arrange](PurePosixPath(member.name))
            if place is None:
                continue
            path = staging / place
            if path.exists():
                raise ValueError(f"it holds two files for {place} (the second is {member.name})")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as content, open(path, "wb") as handle:
                shutil.copyfileobj(content, handle, runs.CHUNK)
            places.append(place)
            bar.update()
    return places


def _vet(member: tarfile.TarInfo, staging: Path) -> None:
    """Raises ValueError on all but plain files and folders inside; links pass the data filter."""
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
    if not plain or member.issparse():
        raise ValueError(f"{member.name} in it is a link, a device or another special file")
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{member.name} in it leads out of the folder")
    if not hasattr(tarfile, "data_filter"):  # Python 3.11.0 to 3.11.3
        raise RuntimeError(
            f"Python {platform.python_version()} cannot check archives (tarfile.data_filter is "
            "missing): download with Python 3.11.4 or newer, or unpack the archive by hand"
        )
    try:
        tarfile.data_filter(member, str(staging))
    except tarfile.FilterError as error:
        raise ValueError(f"{member.name} in it is not safe to unpack ({error})") from error


def _photograph(name: PurePosixPath) -> bool:
    return name.suffix.lower() == ".jpg" and not name.name.startswith(".")


def _flat(name: PurePosixPath) -> PurePosixPath | None:
    return PurePosixPath(name.name) if _photograph(name) else None


def _tree(name: PurePosixPath) -> PurePosixPath | None:
    return None if any(part.startswith(".") for part in name.parts) else name


def _by_id(name: PurePosixPath) -> PurePosixPath | None:
    if not _photograph(name):
        return None
    if len(name.stem) < 3:
        raise ValueError(f"{name} in it has no id of 3 or more letters")
    return PurePosixPath(landmarks.image_path(name.stem))


# A member's place below the image folder; None leaves it out (read-me files, hidden files).
ARRANGEMENTS: dict[str, Callable[[PurePosixPath], PurePosixPath | None]] = {
    "flat": _flat,
    "tree": _tree,
    "by_id": _by_id,
}


# Checking a folder


@dataclass(frozen=True)
class Report:
    """What `check` found; `str` gives it line by line, every missing or unreadable image named.

    images: files in the image folder.  listed: how many the list names (None: there is no list).
    missing: listed images that are not there.  unreadable: (place, reason) of listed images, or of
    all where there is no list.  unlisted: the same of images that no result depends on.
    problems: everything else that is wrong, a line each.
    """

    name: str
    folder: Path
    problems: tuple[str, ...] = ()
    images: int | None = None
    listed: int | None = None
    missing: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    unlisted: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where nothing is wrong that a result depends on."""
        return not (self.problems or self.missing or self.unreadable)

    def __str__(self) -> str:
        lines = [f"{self.name} in {self.folder}: {'whole' if self.ok else 'NOT whole'}"]
        if self.images is not None:
            listed = "no list" if self.listed is None else f"{self.listed:,} listed"
            lines.append(f"  {self.images:,} images ({listed})")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  missing: {place}" for place in self.missing]
        lines += [f"  unreadable: {place}: {reason}" for place, reason in self.unreadable]
        lines += [f"  unreadable, not listed: {place}: {reason}" for place, reason in self.unlisted]
        return "\n".join(lines)


def check(
    name: str,
    *,
    folder: str | os.PathLike,
    progress: bool = True,
    threads: int | None = None,
    sources: Path | None = None,
) -> Report:
    """Verifies a folder without changing it: checksums, counts, layout, every image decoded.

    Args:
        folder: the folder that `download` was given as target, or the source's own folder.
        threads: that decode at once; by default one a processor.
    Raises ValueError on an unknown name; all that is wrong with the folder is in the report.
    """
    known = read_sources(sources)
    (source,) = _chosen(name, known)
    folder = _own_folder(source, Path(folder).expanduser())
    if not folder.is_dir():
        return Report(name, folder, (f"it is not there; `vitgal download {name}` brings it",))
    report = Report(name, folder, (*_check_files(source, folder), *_check_archives(source, folder)))
    if source.tables:
        report = _check_tables(source, report)
    if not source.image_folder:
        return report
    return _check_images(source, report, threads=threads, progress=progress)


def _own_folder(source: Source, folder: Path) -> Path:
    inside = folder / source.folder
    if inside.is_dir():
        return inside
    marks = [item.to for item in source.files] + [*source.tables, source.image_folder or ""]
    own = any(mark and (folder / mark).exists() for mark in marks)
    return folder if own else inside


def _check_files(source: Source, folder: Path) -> Iterator[str]:
    entries = _read_record(source, folder)["files"]
    for item in source.files:
        if not (folder / item.to).is_file():
            if item.to not in source.tables:  # one of several tables will do: see _check_tables
                yield f"{item.to} is missing; `vitgal download {source.name}` brings it"
            continue
        expected = item.sha256 or entries.get(item.to, {}).get("sha256")
        found = runs.fingerprint_file(folder / item.to)
        if expected and found != expected:
            kind = "published" if item.sha256 else "recorded"
            yield f"{item.to} has the sha256 {found}, the {kind} one is {expected}"


def _check_archives(source: Source, folder: Path) -> Iterator[str]:
    entries = _read_record(source, folder)["archives"]
    left = [i.name for i in source.archives if not entries.get(i.name, {}).get("unpacked")]
    if entries and left:
        yield (
            f"{len(left)} of {len(source.archives)} archives are not unpacked yet ({_some(left)}); "
            f"`vitgal download {source.name}` goes on with them"
        )


def _check_tables(source: Source, report: Report) -> Report:
    problems, notes = [], []
    present = [table for table in source.tables if (report.folder / table).is_file()]
    if not present:
        problems.append(
            f"neither of {', '.join(source.tables)} is there; `vitgal download {source.name}` "
            "brings the first"
        )
    for name in present:
        try:
            table = landmarks.read_landmark_table(report.folder / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        counts = (len(table), table["landmark_id"].nunique())
        notes.append(f"{name}: {counts[0]:,} images of {counts[1]:,} classes")
        if source.rows is not None and counts != (source.rows, source.classes):
            problems.append(
                f"{name} lists {counts[0]:,} images of {counts[1]:,} classes; the clean set has "
                f"{source.rows:,} of {source.classes:,}"
            )
    return dataclasses.replace(
        report, problems=(*report.problems, *problems), notes=(*report.notes, *notes)
    )


def _check_images(source: Source, report: Report, *, threads: int | None, progress: bool) -> Report:
    folder = _images(source, report.folder)
    if not folder.is_dir():
        problem = f"{source.image_folder}/ is missing; `vitgal download {source.name}` brings it"
        return dataclasses.replace(report, problems=(*report.problems, problem), images=0)
    present = sorted(_walk(folder))
    problems = list(report.problems)
    try:
        listed = _listed(source, report.folder)
    except ValueError as error:
        problems.append(str(error))
        listed = None
    missing = sorted(set(listed or ()) - set(present))
    problems += _misplaced(source, missing, present=present)
    if listed is None and source.images is not None and len(present) != source.images:
        problems.append(f"{len(present):,} images; the whole set has {source.images:,}")
    failures = _unreadable(folder, present, threads=threads, progress=progress)
    wanted = set(present if listed is None else listed)
    return dataclasses.replace(
        report,
        problems=tuple(problems),
        images=len(present),
        listed=None if listed is None else len(listed),
        missing=tuple(missing),
        unreadable=tuple(failure for failure in failures if failure[0] in wanted),
        unlisted=tuple(failure for failure in failures if failure[0] not in wanted),
    )


def _misplaced(source: Source, missing: list[str], *, present: list[str]) -> Iterator[str]:
    """Listed images that lie in another sub-folder: the usual slip of unpacking by hand."""
    elsewhere = {PurePosixPath(place).name: place for place in present} if missing else {}
    found = [(place, elsewhere.get(PurePosixPath(place).name)) for place in missing]
    moved = [f"{there} for {place}" for place, there in found if there]
    if moved:
        yield (
            f"{len(moved):,} missing images lie elsewhere in {source.image_folder}/ "
            f"({_some(moved)}): move them"
        )


def _unreadable(
    folder: Path, places: list[str], *, threads: int | None, progress: bool
) -> list[tuple[str, str]]:
    def failure(place: str) -> str | None:
        try:
            images.read_image(folder / place)
        except images.ImageError as error:
            return error.reason
        return None

    failures = []
    bar = tqdm(desc="reading", total=len(places), unit=" images", disable=not progress)
    with bar, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        # In batches: a future for each of four million images would fill the memory.
        for start in range(0, len(places), BATCH):
            batch = places[start : start + BATCH]
            for place, reason in zip(batch, pool.map(failure, batch), strict=True):
                bar.update()
                if reason is not None:
                    failures.append((place, reason))
    return failures


def _images(source: Source, folder: Path) -> Path:
    return folder / (source.image_folder or ".")


def _walk(folder: Path) -> Iterator[str]:
    """Every file below a folder as a path relative to it, hidden ones left out."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(where).relative_to(folder).as_posix()
        for name in files:
            if not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


def _listed(source: Source, folder: Path) -> list[str] | None:
    """Where every image that must be there lies below the image folder; None without a list."""
    path = next((folder / name for name in source.lists if (folder / name).is_file()), None)
    if path is None:
        return None
    if path.suffix == ".pkl":
        truth = revisited.load_ground_truth(path)
        return [name + revisited.EXTENSION for name in (*truth.database, *truth.queries)]
    if path.suffix == ".csv":
        return [landmarks.image_path(image) for image in landmarks.read_landmark_table(path)["id"]]
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _missing(source: Source, folder: Path) -> list[str] | None:
    """The listed images that are not there, sorted; None where there is nothing to compare."""
    if not _images(source, folder).is_dir():
        return None
    try:
        listed = _listed(source, folder)
    except ValueError:  # another table of that name, say: `check` reports it, images come anyway
        return None
    if listed is None:
        return None
    missing = set(listed)
    missing.difference_update(_walk(_images(source, folder)))
    return sorted(missing)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
