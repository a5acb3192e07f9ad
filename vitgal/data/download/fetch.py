"""Files from web servers and Google Drive: resumed, limited and checked."""

import contextlib
import gzip
import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pooch
import requests
import urllib3
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.download.sources import SOURCES, Item, _Job, _record_path, _size

AGENT = {"User-Agent": "vitgal", "Accept-Encoding": "identity"}  # bytes as they are on the server
TIMEOUT = (20, 120)  # seconds without an answer: to connect, between two pieces
# Seconds before each further try after a transfer brought nothing. One that brought something is
# taken up at once; one where nothing ever came fails at once, so that a missing network shows.
WAITS = (1, 5, 20, 60)
DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
STAGING = ".unpacking"  # inside the image folder: on the same disk, even where that is a link
BATCH = 4096  # images handed to the reading threads at once


def _sweep(job: _Job) -> None:
    """Removes what a killed process left that nothing can be resumed from."""
    shutil.rmtree(job.images / STAGING, ignore_errors=True)
    record = _record_path(job.source, job.folder).name
    for path in (*job.work.glob("tmp*"), *job.folder.glob(f"{runs.TEMPORARY}*-{record}")):
        path.unlink()


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


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
