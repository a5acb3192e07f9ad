"""Files from web servers and Google Drive: transfers are resumed, checksums compared."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import requests
import urllib3
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data.download.sources import SOURCES, RemoteFile

HEADERS = {"User-Agent": "vitgal", "Accept-Encoding": "identity"}  # the bytes as on the server
TIMEOUT = (20, 120)  # seconds without an answer: to connect, between two chunks
# Seconds before each retry after an attempt that received nothing; others are continued at once.
# The first attempt is not retried, so that a missing network is reported immediately.
WAITS = (1, 5, 20, 60)


class Checksum(NamedTuple):
    """The hex digest that a file must have, and where it comes from."""

    algorithm: str
    digest: str
    origin: str


def matches(path: Path, checksum: Checksum | None) -> bool:
    """Whether a file has this checksum; None matches every file."""
    return checksum is None or file_digest(path, checksum.algorithm) == checksum.digest


def file_digest(path: Path, algorithm: str) -> str:
    """Returns a file's checksum in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


@dataclass(frozen=True)
class PartialFile:
    """An incomplete file, with the server's tag of its version (ETag) beside it."""

    path: Path

    @property
    def tag(self) -> Path:
        """The file of the tag."""
        return self.path.with_name(f"{self.path.name}.etag")

    @property
    def length(self) -> int:
        """The number of bytes that have arrived."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def delete(self) -> None:
        """Deletes the file and its tag."""
        self.path.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)


@dataclass
class Fetcher:
    """Fetches the files of one source into its work folder.

    Attributes:
        page: web page of the source, for errors.
        reached: whether the network has answered, so that a later failure may be temporary.
    """

    work: Path
    page: str
    progress: bool
    reached: bool = False

    def fetch(self, file: RemoteFile, checksum: Checksum | None, *, label: str) -> Path:
        """Fetches one file, or what is missing of it, and returns its path in the work folder.

        Raises:
            ValueError: it has another checksum, or is a web page; it is deleted.
            ConnectionError: the address cannot be reached, or refuses.
            OSError: the disk is full.
        """
        path = self.work / file.name
        if path.is_file() and matches(path, checksum):
            return path
        self.work.mkdir(parents=True, exist_ok=True)
        part = PartialFile(self.work / f"{file.name}.part")
        receive = fetch_from_drive if file.drive else fetch_over_http
        receive(file.address, part, label=label, progress=self.progress, patient=self.reached)
        self.reached = True
        if error := self._refusal(part.path, file, checksum):
            part.delete()
            raise ValueError(error)
        os.replace(part.path, path)
        part.delete()
        return path

    def _refusal(self, path: Path, file: RemoteFile, checksum: Checksum | None) -> str | None:
        """Returns why a file that has arrived is refused, None where it is not."""
        if not matches(path, checksum):
            return (
                f"{file.address}: expected {checksum.algorithm} {checksum.digest}, got "
                f"{file_digest(path, checksum.algorithm)}. The expected sum is {checksum.origin}; "
                f"run the same command again, and if it differs again see {self.page}"
            )
        with open(path, "rb") as handle:
            beginning = handle.read(512).lstrip().lower()
        if beginning.startswith((b"<!doctype html", b"<html")):
            return (
                f"{file.address} gave a web page in place of {file.name} (a sign-in page of the "
                "network, or a file that has moved); open the address in a browser to see why"
            )
        return None


def fetch_over_http(
    url: str, part: PartialFile, *, label: str, progress: bool, patient: bool
) -> None:
    """Fetches the rest of a file from a web server, with retries.

    Raises ConnectionError where nothing more arrives: after `WAITS` if `patient` or if something
    had arrived, else at once.
    """
    furthest, waits = part.length, list(WAITS if patient else ())
    while True:
        try:
            return _receive(url, part, label=label, progress=progress)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = _innermost(error)
        if part.length > furthest:  # a server without ranges begins anew each time
            furthest, waits = part.length, list(WAITS)
        elif waits:
            time.sleep(waits.pop(0))
        else:
            kept = f"; {format_size(part.length)} of it are kept" if part.length else ""
            raise ConnectionError(
                f"{url} cannot be fetched ({reason}){kept}. Check the network (a proxy is taken "
                "from HTTPS_PROXY and HTTP_PROXY) and run the same command again"
            )


def _receive(url: str, part: PartialFile, *, label: str, progress: bool) -> None:
    """Makes one request and appends the answer; RequestException where the file is not whole."""
    offset = part.length
    headers = HEADERS | ({"Range": f"bytes={offset}-"} if offset else {})
    if offset and part.tag.is_file() and (tag := part.tag.read_text()):
        headers["If-Range"] = tag  # else a changed file would be appended to bytes of the old one
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        total = total_length(response.status_code, response.headers, offset)
        if response.status_code == 416:
            if total == offset:
                return
            part.delete()  # longer than the file: of another version
            raise requests.RequestException("the file has changed")
        _check_status(response)
        if response.status_code == 200:  # the whole file, not a range
            offset = 0
        free = free_space(part.path.parent)
        if total is not None and total - offset > free:
            raise OSError(
                f"{url} needs {format_size(total - offset)} in {part.path.parent}, where "
                f"{format_size(free)} are free; make room and run the same command again"
            )
        tag = response.headers.get("ETag", "W/")  # a weak tag, W/, does not promise the same bytes
        part.tag.write_text(response.headers.get("Last-Modified", "") if tag[:2] == "W/" else tag)
        bar = tqdm(
            desc=label,
            total=total,
            initial=offset,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not progress,
        )
        with bar, open(part.path, "ab" if offset else "wb") as handle:
            for chunk in response.raw.stream(runs.CHUNK, decode_content=False):
                handle.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.length > total:
        part.delete()
        raise requests.RequestException("more came than the server had announced")
    if total is not None and part.length < total:
        raise requests.RequestException("the connection was cut")


def total_length(status: int, headers: Mapping[str, str], offset: int) -> int | None:
    """Returns the whole file's length in bytes from an answer's headers, None where unknown.

    Raises requests.RequestException where a range (status 206) does not begin at `offset`.
    """
    number = "[0-9]{1,18}"
    if status not in (206, 416):
        length = re.fullmatch(number, headers.get("Content-Length", ""))
        return int(length[0]) if length else None
    pattern = rf"bytes (?:({number})-{number}|\*)/({number}|\*)"
    content_range = re.fullmatch(pattern, headers.get("Content-Range", ""))
    start = int(content_range[1] or -1) if content_range else None
    if status == 206 and start != offset:
        raise requests.RequestException("the server sends another range than was asked for")
    return int(content_range[2]) if content_range and content_range[2] != "*" else None


def _check_status(response: requests.Response) -> None:
    """Raises RequestException for an error that may pass, ConnectionError for another one."""
    answer = f"the server answers {response.status_code} {response.reason}"
    if response.status_code >= 500 or response.status_code in (408, 429):
        raise requests.RequestException(answer)
    if response.status_code not in (200, 206):
        raise ConnectionError(
            f"{response.url} cannot be fetched: {answer}. The file may have moved: correct its "
            f"address in {SOURCES}"
        )


def fetch_from_drive(
    url: str, part: PartialFile, *, label: str, progress: bool, patient: bool = False
) -> None:
    """Fetches the rest of a file from Google Drive; `patient` has no effect.

    Raises ConnectionError where it cannot be fetched.
    """
    import gdown  # slow to import

    try:
        gdown.download(url, str(part.path), quiet=not progress, resume=True)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
            raise  # an error of the disk
        path = part.path.parent.parent / part.path.name.removesuffix(".part")
        raise ConnectionError(
            f"{label} cannot be fetched from Google Drive ({_innermost(error)}). Run the same "
            f"command again, or open {url} in a browser, save the file as {path} and run the "
            "command then: it takes the file as it is"
        ) from error


def _innermost(error: BaseException) -> str:
    """Returns the innermost cause in one short line: requests wraps what urllib3 wraps."""
    cause: object = error
    while isinstance(cause, BaseException):
        error = cause
        cause = error.__cause__ or error.__context__ or getattr(error, "reason", None)
    return " ".join((str(error) or type(error).__name__).split())[:200]


def free_space(folder: Path) -> int:
    """Returns the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def format_size(size: int) -> str:
    """Formats a number of bytes, as in 12.0MB."""
    return tqdm.format_sizeof(size, "B")
