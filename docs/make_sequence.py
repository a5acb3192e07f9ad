"""Makes the README's moving picture and the notebooks' cards: `python docs/make_sequence.py [RUN]`.

The sequence shows views of `vitgal report` for a query whose images are all public domain or CC0.
Run it after make_pictures.py: some cards are cut from its pictures.
"""

import base64
import io
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

from vitgal import runs, stages, viz
from vitgal.data import revisited
from vitgal.viz.run_document import run_document

TOP = Path(__file__).parents[1]
FREE = {"Public Domain", "CC0-1.0"}
SHOWN = 8  # images of each ranking in the page
VIEW = {"width": 1200, "height": 800}
WIDTH, SECONDS, COLOURS = 900, 2.5, 160
CARD = (300, 170)
# The card of each notebook: a picture of its outputs, counted from 0, or one of docs/. None shows a
# photograph that is not free.
CARDS = {
    **{"01": 1, "02": 2, "03": 0, "04": 1, "05": 1, "06": "failure.jpg"},
    **{"07": "matches.jpg", "08": "gallery.jpg"},
}


def main(run_dir: str = "demo") -> None:
    run = runs.run_folder(run_dir)
    benchmark = revisited.open_dataset("demo", run / "data" / "benchmark")
    views = pd.read_csv(run / "data" / "benchmark" / "views.csv", index_col="name")
    query, image = free_query(run, benchmark, views["licence"].isin(FREE))
    draw_sequence(run, query, benchmark.database[image], TOP / "docs" / "instrument.gif")
    draw_cards(TOP / "docs" / "cards")


def free_query(
    run: Path, benchmark: revisited.RetrievalDataset, free: pd.Series
) -> tuple[int, int]:
    """Returns a query and one of its hard images, whose rankings show free photographs alone.

    Of such queries the one with most inliers on a hard image is taken.
    """
    folder, truth = run / "demo" / "rerank", benchmark.ground_truth
    document, _ = run_document([run], ranks=SHOWN)
    names, pairs = document["names"], []
    for query, entry in enumerate(document["entries"][0]["queries"]):
        shown = {names[image] for image in [*entry["before"], *entry["after"]["hard"]]}
        if free[[truth.queries[query], *shown]].all():
            counts = stages.inlier_counts(folder, query)
            hard = stages.hard_candidates(folder, truth, query)
            pairs += [(counts[i], query, i) for i in hard if benchmark.database[i] in shown]
    if not pairs:
        raise ValueError("no query whose rankings show public domain and CC0 photographs alone")
    _, query, image = max(pairs)
    return query, image


def draw_sequence(run: Path, query: int, name: str, target: Path) -> None:
    """Writes the views of the page one after the other as an animated GIF."""
    frames = []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as engine:
        page = viz.write_report([run], Path(scratch) / "report", ranks=SHOWN)
        browser = engine.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        window = browser.new_page(viewport=VIEW)
        window.goto(f"{page.as_uri()}#view=overview&protocol=hard")
        window.add_style_tag(content="td img { visibility: hidden }")  # not all of them are free
        window.locator("canvas, svg").first.wait_for()
        frames.append(screenshot(window))
        window.goto("about:blank")
        window.goto(f"{page.as_uri()}#view=ranking&protocol=hard&query={query}")
        window.locator("section", has_text="After reranking").get_by_title(name).wait_for()
        frames.append(screenshot(window))
        window.locator("section", has_text="After reranking").get_by_title(name).click()
        window.wait_for_function("document.querySelectorAll('.crops canvas').length === 3")
        frames.append(screenshot(window))
        browser.close()
    first, *others = [frame.quantize(COLOURS) for frame in frames]
    options = {"save_all": True, "append_images": others, "duration": int(1000 * SECONDS)}
    first.save(target, loop=0, optimize=True, **options)


def screenshot(window: Page) -> Image.Image:
    picture = Image.open(io.BytesIO(window.screenshot(animations="disabled"))).convert("RGB")
    return picture.resize((WIDTH, WIDTH * picture.height // picture.width), Image.LANCZOS)


def draw_cards(folder: Path) -> None:
    """Writes one picture of each notebook's stored outputs, cut to a card."""
    folder.mkdir(exist_ok=True)
    for number, source in CARDS.items():
        if isinstance(source, str):
            picture = Image.open(TOP / "docs" / source)
        else:
            (path,) = TOP.glob(f"notebooks/{number}_*.ipynb")
            picture = Image.open(io.BytesIO(pictures(path)[source]))
        card = ImageOps.fit(picture.convert("RGB"), CARD, Image.LANCZOS)
        card.save(folder / f"{number}.jpg", quality=85)


def pictures(path: Path) -> list[bytes]:
    """Returns the PNG and JPEG pictures among a notebook's outputs, in order."""
    outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", ())]
    return [
        base64.b64decode(data[kind])
        for data in (output.get("data", {}) for output in outputs)
        for kind in ("image/png", "image/jpeg")
        if kind in data
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
