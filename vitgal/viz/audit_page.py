"""The page of an audit: every pair of copies side by side, to judge by."""

from html import escape
from pathlib import Path

from vitgal import runs
from vitgal.data.photographs import PhotographError, read_upright
from vitgal.viz.report import data_url, fill_in, jpeg

PAIRS = 500  # on a page, of about 50 kB each
PICTURE = 320  # pixels, the longer side


def write_audit_page(result: object, path: Path) -> Path:
    """Writes the first 500 pairs of copies of a `stages.Audit` as one HTML file; returns its path.

    Pictures are inside. Names and texts are data, never markup. A file that has vanished since is
    named without a picture.
    """
    parts, group = [], None
    for row in result.copies.head(PAIRS).itertuples():
        if row.group != group:
            group = row.group
            parts.append(f"<h2>Group {group + 1}</h2>")
        text = f"{row.change}: shared {row.shared_first:.0%} of the first, "
        text += f"{row.shared_second:.0%} of the second; {row.agreement:.0%} of it agree"
        files = result.path(0, row.first), result.path(1, row.second)
        pictures = "".join(map(_picture, files))
        parts.append(f"<p>{escape(text)}</p><figure>{pictures}</figure>")
    beyond = len(result.copies) - PAIRS
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
    source = data_url(jpeg(image, PICTURE))
    return f'<div><img alt="{name}" src="{source}"><p class="name">{name}<br>{size}</p></div>'
