"""Pages that open from disk, without a server or a kernel: of runs, and of an audit's copies."""

import base64
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import cv2
import numpy as np

from vitgal import runs
from vitgal.data.images import ImageError
from vitgal.data.photographs import PhotographError, read_upright
from vitgal.viz.drawing import reduce_image
from vitgal.viz.run_document import Images, run_document

THUMBNAIL, ENLARGED, COPY = 160, 800, 320  # pixels, the longer side
MOST_COPIES = 500  # pairs on an audit's page, of about 50 kB each
FRONTEND = Path(__file__).with_name("frontend")
PAGE, MARK = "index.html", '<meta name="generator" content="vitgal report">'


def write_report(
    run_folders: Sequence[Path],
    folder: Path | None = None,
    *,
    ranks: int = 100,
    pairs: int = 4,
    single_file: bool = False,
) -> Path:
    """Writes the page of one or several runs, which are then compared, and returns its path.

    folder: receives index.html, thumbs/ and photos/; None: `report/` of the first run. ranks,
    pairs: see `run_document`, whose errors are raised too. single_file: puts all images into
    index.html. Raises StageError where the folder holds other files than a report's.
    """
    folder = Path(folder or Path(run_folders[0]) / "report").absolute()
    _refuse_other_files(folder)
    document, images = run_document(run_folders, ranks=ranks, pairs=pairs)
    return write_page(document, images, folder, single_file=single_file)


def write_page(
    document: dict[str, Any], images: Images, folder: Path, *, single_file: bool = False
) -> Path:
    """Writes a document with its images as `write_report` does; returns the path of index.html.

    Raises StageError where the folder holds other files than a page's.
    """
    _refuse_other_files(folder)
    (folder / PAGE).unlink(missing_ok=True)  # written last: a page has all of its images
    document["thumbs"], document["photos"] = _write_images(folder, images, inline=single_file)
    return runs.write_text(folder / PAGE, page(document))


def page(document: dict[str, Any]) -> str:
    """Returns the HTML of a document, with the front end inside; texts of the document are data."""
    # A JSON text within a script element ends at the next "</script" and may not open a comment.
    data = json.dumps(document, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    script, style = ((FRONTEND / f"instrument.{kind}").read_text("utf-8") for kind in ("js", "css"))
    return fill_in("page.html", data=data, script=script, style=style)


def fill_in(template: str, **parts: str) -> str:
    """Returns a page of the front end with its parts, which are HTML."""
    return Template((FRONTEND / template).read_text("utf-8")).substitute(parts)


def _refuse_other_files(folder: Path) -> None:
    runs.refuse_links([folder])
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    others = [name for name in entries if name not in (PAGE, "thumbs", "photos")]
    if PAGE in entries and MARK not in (folder / PAGE).read_text("utf-8", "replace")[:2000]:
        others.append(PAGE)
    if others:
        raise runs.StageError(
            f"{folder} holds {runs.printable(others[0])}, which is no part of a report: choose "
            "another folder by --to"
        )


def _write_images(
    folder: Path, images: Images, *, inline: bool
) -> tuple[list[str | None], dict[str, str]]:
    """Writes or encodes the images; returns the addresses of the small and of the large ones."""

    def convert(number: int) -> tuple[str | None, str | None]:
        """Returns the addresses of an image's small and large picture; None: there is none."""
        try:
            pixels = images.read(number)
        except (ImageError, PhotographError, OSError):
            return None, None
        small = jpeg(pixels, THUMBNAIL)
        large = jpeg(pixels, ENLARGED) if number in images.enlarged else None
        return store("thumbs", number, small), large and store("photos", number, large)

    def store(part: str, number: int, data: bytes) -> str:
        """Returns the address of a picture."""
        if inline:
            return data_url(data)
        path = folder / part / f"{number:06}.jpg"
        path.write_bytes(data)
        return f"{part}/{path.name}"

    for part in ("thumbs", "photos"):
        runs.refuse_links([folder / part])
        (folder / part).mkdir(parents=True, exist_ok=True)
        for old in (folder / part).glob("*.jpg"):
            old.unlink()
    with ThreadPoolExecutor(4) as threads:
        addresses = list(threads.map(convert, range(len(images.paths))))
    photos = {str(number): large for number, (_, large) in enumerate(addresses) if large}
    return [small for small, _ in addresses], photos


def jpeg(pixels: np.ndarray, size: int) -> bytes:
    """Returns an image (H, W, 3) uint8 RGB as JPEG, reduced to at most `size` pixels a side."""
    quality = 75 if size <= THUMBNAIL else 82
    reduced = cv2.cvtColor(reduce_image(pixels, size)[0], cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", reduced, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def data_url(picture: bytes) -> str:
    """Returns a JPEG as an address that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def write_audit_page(result: object, path: Path) -> Path:
    """Writes the first 500 pairs of copies of a `stages.Audit` as one HTML file; returns its path.

    Pictures are inside. Names and texts are data, never markup. A file that has vanished since is
    named without a picture.
    """
    parts, group = [], None
    for row in result.copies.head(MOST_COPIES).itertuples():
        if row.group != group:
            group = row.group
            parts.append(f"<h2>Group {group + 1}</h2>")
        text = f"{row.change}: shared {row.shared_first:.0%} of the first, "
        text += f"{row.shared_second:.0%} of the second; {row.agreement:.0%} of it agree"
        files = result.path(0, row.first), result.path(1, row.second)
        pictures = "".join(map(_picture, files))
        parts.append(f"<p>{escape(text)}</p><figure>{pictures}</figure>")
    beyond = len(result.copies) - MOST_COPIES
    summary = result.report().split("\n")[0] + (f"; {beyond} more in copies.csv" * (beyond > 0))
    page = fill_in("audit.html", summary=escape(summary), groups="\n".join(parts))
    return runs.write_text(path, page)


def _picture(file: Path) -> str:
    name = escape(runs.printable(f"{file.parent.name}/{file.name}"))
    try:
        image = read_upright(file)
    except PhotographError:
        return f'<div><p class="name">{name}: it cannot be read any more</p></div>'
    size = f"{image.shape[1]} x {image.shape[0]} pixels"
    source = data_url(jpeg(image, COPY))
    return f'<div><img alt="{name}" src="{source}"><p class="name">{name}<br>{size}</p></div>'
