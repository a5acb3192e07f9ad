"""Files from web servers and Google Drive: transfers are resumed, checksums compared."""

import contextlib
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

HEADERS = {"User-Agent": "vitgal", "Accept-Encoding": "identity"}  # uncompressed
TIMEOUT = (20, 120)  # seconds without an answer: to connect, between two chunks
# Seconds before each retry after an attempt that received nothing; others are continued at once.
# The first attempt is not retried, so that a missing network is reported immediately.
WAITS = (1, 5, 20, 60)


class SizeError(runs.UserError, ValueError):
    """A server sends more bytes than are listed."""


class Checksum(NamedTuple):
    """The hex digest that a file must have, and where it comes from."""

    algorithm: str
    digest: str
    origin: str


def matches(path: Path, checksum: Checksum | None) -> bool:
    """Whether a file has this checksum; None matches every file."""
    return checksum is None or _digest(path, checksum.algorithm) == checksum.digest


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


@dataclass
class Fetcher:
    """Fetches the files of one source into its work folder."""

    work: Path
    page: str  # of the source, for errors
    progress: bool
    reached: bool = False  # once the network has answered, a failure may be temporary

    def fetch(self, file: RemoteFile, checksum: Checksum | None, *, label: str) -> Path:
        """Fetches one file, or the rest of it, and returns its path in the work folder.

        Its mirrors are tried in turn where an address cannot be reached.

        Raises ValueError where it has another checksum, is larger than listed, or is a web page (it
        is deleted); ConnectionError where no address can be reached, each refuses, or a web form
        gives it out; OSError where the disk is full.
        """
        path = self.work / file.name
        if path.is_file() and matches(path, checksum):
            return path
        if file.form:
            raise ConnectionError(
                f"{file.name} is given out by a web form, which no program may fill in: open "
                f"{file.url}, {file.form}, save the file as {self.work.parent / (file.to or '')} "
                "and run the same command again"
            )
        failures = []
        for address in (file.address, *file.mirrors):
            try:
                return self._fetch(path, file, address, checksum, runs.printable(label))
            except ConnectionError as error:
                failures.append(error)
        raise ConnectionError("; nor its mirror: ".join(map(str, failures))) from failures[-1]

    def _fetch(
        self, path: Path, file: RemoteFile, address: str, checksum: Checksum | None, label: str
    ) -> Path:
        part = self.work / f"{file.name}.part"
        transfer = Transfer(address, part, file.limit, label, self.progress)
        if file.drive and address == file.address:
            transfer.from_drive()
        else:
            transfer.over_http(patient=self.reached)
        self.reached = True
        if error := self._refusal(part, file, checksum):
            transfer.delete()
            raise ValueError(error)
        os.replace(part, path)
        transfer.delete()
        return path

    def _refusal(self, path: Path, file: RemoteFile, checksum: Checksum | None) -> str | None:
        """Returns why a fetched file is refused, None where it is accepted."""
        if not matches(path, checksum):
            return (
                f"{file.address}: expected {checksum.algorithm} {checksum.digest}, got "
                f"{_digest(path, checksum.algorithm)}. The expected sum is {checksum.origin}; "
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


@dataclass(frozen=True)
class Transfer:
    """The transfer of one file, of at most `limit` bytes, to an incomplete file `part`."""

    url: str
    part: Path
    limit: int
    label: str
    progress: bool

    @property
    def tag(self) -> Path:
        """The file of the server's tag of its version (ETag)."""
        return self.part.with_name(f"{self.part.name}.etag")

    @property
    def length(self) -> int:
        """The number of bytes that have arrived."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def delete(self) -> None:
        """Deletes the incomplete file, its tag, and gdown's own incomplete file."""
        for path in list(self.part.parent.iterdir()):
            if path.name.startswith(self.part.name):
                path.unlink()

    def over_http(self, *, patient: bool) -> None:
        """Fetches the rest of the file from a web server, with retries.

        Raises ConnectionError where nothing more arrives: after `WAITS` if `patient` or if
        something had arrived, else at once; SizeError for more bytes than listed.
        """
        furthest, waits = self.length, list(WAITS if patient else ())
        while True:
            try:
                return self._receive()
            except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as error:
                reason = _innermost(error)
            if self.length > furthest:  # a server without ranges begins anew each time
                furthest, waits = self.length, list(WAITS)
            elif waits:
                time.sleep(waits.pop(0))
            else:
                kept = f"; {format_size(self.length)} of it are kept" if self.length else ""
                raise ConnectionError(
                    f"{self.url} cannot be fetched ({reason}){kept}. Check the network (a proxy is "
                    "taken from HTTPS_PROXY and HTTP_PROXY) and run the same command again"
                )

    def _receive(self) -> None:
        """Makes one request and appends the answer; RequestException: the file is not whole."""
        offset = self.length
        headers = HEADERS | ({"Range": f"bytes={offset}-"} if offset else {})
        with contextlib.suppress(FileNotFoundError):
            tag = self.tag.read_bytes()[:1000].decode("latin-1")
            if offset and tag.isprintable() and tag:
                headers["If-Range"] = tag  # otherwise bytes of two versions could be joined
        with requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            total = total_length(response.status_code, response.headers, offset)
            if response.status_code == 416:
                if total == offset:
                    return
                self.delete()  # longer than the file: of another version
                raise requests.RequestException("the file has changed")
            self._check_status(response)
            if response.status_code == 200:  # the whole file, not a range
                offset = 0
            self._check_size(total or 0, offset)
            tag = response.headers.get("ETag", "W/")  # a weak tag, W/, promises no equal bytes
            tag = response.headers.get("Last-Modified", "") if tag[:2] == "W/" else tag
            self.tag.write_bytes(tag.encode("latin-1", "replace"))
            bar = tqdm(
                desc=self.label,
                total=total,
                initial=offset,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=not self.progress,
            )
            with bar, open(self.part, "ab" if offset else "wb") as handle:
                for chunk in response.raw.stream(runs.CHUNK, decode_content=False):
                    self._check_size(handle.tell() + len(chunk))
                    handle.write(chunk)
                    bar.update(len(chunk))
        if total is not None and self.length > total:
            self.delete()
            raise requests.RequestException("the server sent more bytes than announced")
        if total is not None and self.length < total:
            raise requests.RequestException("the connection was cut")

    def _check_size(self, size: int, offset: int | None = None) -> None:
        """Raises SizeError for more bytes than are listed, OSError for more than are free."""
        if size > self.limit:
            self.delete()
            raise SizeError(
                f"{self.url} is larger than the {format_size(self.limit)} allowed: stopped. "
                f"If the file has grown, correct its `bytes` in {SOURCES}"
            )
        if offset is not None and size - offset > (free := free_space(self.part.parent)):
            raise OSError(
                f"{self.url} needs {format_size(size - offset)} in {self.part.parent}, where "
                f"{format_size(free)} are free; make room and run the same command again"
            )

    def _check_status(self, response: requests.Response) -> None:
        """Raises RequestException for an error that may pass, ConnectionError for another one."""
        answer = f"the server answers {response.status_code} {runs.printable(response.reason)}"
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise requests.RequestException(answer)
        if self.url.startswith("https:") and not response.url.startswith("https:"):
            answer = "the server redirects from https to an unencrypted address"
        elif response.status_code in (200, 206):
            return
        raise ConnectionError(
            f"{runs.printable(response.url)} cannot be fetched: {answer}. The file may have moved: "
            f"correct its address in {SOURCES}"
        )

    def from_drive(self) -> None:
        """Fetches the rest from Google Drive; ConnectionError or SizeError if it cannot."""
        import gdown  # slow to import

        try:
            gdown.download(
                self.url,
                str(self.part),
                quiet=not self.progress,
                resume=True,
                use_cookies=False,  # of the user's home folder
                timeout=TIMEOUT,
                progress=lambda size, _: self._check_size(size),
            )
        except Exception as error:
            of_disk = isinstance(error, OSError) and not isinstance(
                error, requests.RequestException
            )
            if of_disk or isinstance(error, SizeError):
                raise
            path = self.part.parent.parent / self.part.name.removesuffix(".part")
            raise ConnectionError(
                f"{self.label} cannot be fetched from Google Drive ({_innermost(error)}). Run the "
                f"same command again, or open {self.url} in a browser, save the file as {path} and "
                "run the command again"
            ) from error


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
        raise requests.RequestException("the server sent another range than requested")
    return int(content_range[2]) if content_range and content_range[2] != "*" else None


def _innermost(error: BaseException) -> str:
    """Returns the innermost cause in one short line; requests and urllib3 wrap errors twice."""
    cause: object = error
    while isinstance(cause, BaseException):
        error = cause
        cause = error.__cause__ or error.__context__ or getattr(error, "reason", None)
    return runs.printable(" ".join((str(error) or type(error).__name__).split())[:200])


def free_space(folder: Path) -> int:
    """Returns the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def format_size(size: int) -> str:
    """Formats a number of bytes, as in 12.0MB."""
    return tqdm.format_sizeof(size, "B")
