"""The page of an audit: every pair of copies side by side, to judge by."""

import base64
from html import escape
from pathlib import Path

from vitgal import runs
from vitgal.data.photographs import PhotographError, read_upright
from vitgal.viz.drawing import reduce_image
from vitgal.viz.report import ENLARGED, jpeg

PAIRS = 500  # on a page, of about 50 kB each
PICTURE = 320  # pixels, the longer side
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 52rem; padding: 0 1rem }
h2 { margin-top: 2.5rem } figure { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
figure div { max-width: 320px } img { max-width: 100% } p { margin: 0.2rem 0 }
.name { color: #555; font-size: 13px; overflow-wrap: anywhere }
"""


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
    return runs.write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>vitgal audit</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Copies</h1>\n<p>{escape(summary)}</p>\n" + "\n".join(parts) + "\n</main>\n"
        "</body>\n</html>\n",
    )


def _picture(file: Path) -> str:
    name = escape(runs.printable(f"{file.parent.name}/{file.name}"))
    try:
        image = read_upright(file)
    except PhotographError:
        return f'<div><p class="name">{name}: it cannot be read any more</p></div>'
    data = base64.b64encode(jpeg(reduce_image(image, PICTURE)[0], ENLARGED)).decode()
    size = f"{image.shape[1]} x {image.shape[0]} pixels"
    source = f"data:image/jpeg;base64,{data}"
    return f'<div><img alt="{name}" src="{source}"><p class="name">{name}<br>{size}</p></div>'
