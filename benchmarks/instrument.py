"""The front end in Chromium: how fast a large page opens, its plots and pairs move, a knob answers.

    python benchmarks/instrument.py [--queries 70] [--database 6322] [--turns 40]

A page of so many queries with 300 ranks and 5,000 thumbnails (the bundled photographs, repeated) is
written to a temporary folder and opened from disk; frames are counted by requestAnimationFrame
while the mouse moves. On a finished run (--run) the kernel's answers are timed without a browser,
and knobs and patches in JupyterLab, from the event to the drawn picture. --live: these alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
from playwright.sync_api import Page, sync_playwright

from tests.viz.test_browser import ARGUMENTS, Notebook, executable, fresh_browser, jupyterlab
from vitgal import runs, stages, viz
from vitgal.data import revisited
from vitgal.data.images import read_image
from vitgal.viz import report

FRAMES = """() => {
    window.frames_ = [];
    const count = (time) => { window.frames_.push(time); requestAnimationFrame(count); };
    requestAnimationFrame(count);
}"""


def large_document(queries: int, database: int, ranks: int = 300) -> dict:
    """Returns a document of random rankings, with one stored pair of 1,000 matches a query."""
    generator = np.random.default_rng(0)
    total = queries + database
    entries = [
        random_query(generator, number, queries, database, ranks) for number in range(queries)
    ]
    ap = generator.uniform(size=(2, queries)).round(4).tolist()
    scores = {
        stage: {"medium": {"map": 0.5, "interval": [0.4, 0.6], "mp_at": {"10": 0.5}, "ap": values}}
        for stage, values in zip(("global", "reranked"), ap, strict=True)
    }
    points = generator.uniform(size=2 * total).round(3).tolist()
    entry = {"run": "large", "dataset": "random", "database": database, "settings": []}
    entry |= {"scores": scores, "tests": {}, "matching": None, "features": None, "neighbours": {}}
    entry |= {"queries": entries, "map": {"images": list(range(total)), "points": points}}
    names = [f"image_{number:06}" for number in range(total)]
    sizes = [[1024, 768]] * total
    whole = {"entries": [entry], "comparisons": [], "names": names, "sizes": sizes, "notes": {}}
    return whole | {"indices": list(range(-queries, database))}


def random_query(
    generator: np.random.Generator, number: int, queries: int, database: int, ranks: int
) -> dict:
    """Returns one query with two orders of its images, which are numbered behind the queries."""
    order = (queries + generator.permutation(database)[:ranks]).tolist()
    labels = {"easy": order[:20], "hard": order[20:60], "junk": order[60:70]}
    points = generator.uniform(0, 760, (1000, 4)).round(1)
    homography = [1, 0, 0, 0, 1, 0, 0, 0, 1]
    pair = {"image": order[0], "matches": 1000, "count": 500}
    pair |= {"features": 400, "doubt": "", "points": points.ravel().tolist()}
    pair |= {"inlier": [0, 1] * 500, "distance": [0.5] * 1000, "scale": [1.0] * 1000}
    pair |= {"score": [1.0] * 1000, "homography": homography}
    query = {"image": number, "box": [10, 10, 900, 700], "labels": labels, "before": order}
    query |= {"similarity": np.linspace(0.9, 0.1, ranks).round(4).tolist(), "worst": {}}
    query |= {"after": {"medium": order[::-1]}, "verified": order[:100], "inliers": [20] * 100}
    return query | {"pairs": [pair]}


def write_page(folder: Path, document: dict, thumbnails: int) -> Path:
    """Writes the page with the bundled photographs over and over; others have no picture."""
    paths = sorted((runs.checkout() / "third_party" / "landmarks").rglob("*.jpg"))
    pixels = [read_image(path) for path in paths]
    pictures = {
        size: [report.jpeg(image, size) for image in pixels]
        for size in (report.THUMBNAIL, report.ENLARGED)
    }
    (folder / "thumbs").mkdir()
    (folder / "photos").mkdir()
    small, large = pictures.values()
    for number in range(thumbnails):
        (folder / "thumbs" / f"{number:06}.jpg").write_bytes(small[number % len(small)])
    known = [f"thumbs/{number:06}.jpg" for number in range(thumbnails)]
    document["thumbs"] = (known + [None] * len(document["names"]))[: len(document["names"])]
    document["photos"] = {}
    shown = {
        image
        for query in document["entries"][0]["queries"]
        for image in (query["image"], query["before"][0])
    }
    for image in shown:
        (folder / "photos" / f"{image:06}.jpg").write_bytes(large[image % len(large)])
        document["photos"][str(image)] = f"photos/{image:06}.jpg"
    return runs.write_text(folder / report.PAGE, report.page(document))


def frames(page: Page, selector: str, act: Callable[[int, float, float], None], steps: int) -> str:
    """Returns frames a second and the longest frame while `act(step, x, y)` is repeated."""
    box = page.locator(selector).bounding_box()
    page.evaluate(FRAMES)
    for step in range(steps):
        act(step, box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    times = np.diff(page.evaluate("() => window.frames_"))
    return f"{1000 / times.mean():.0f} frames a second, the longest {times.max():.0f} ms"


def brush(page: Page) -> None:
    """Draws a rectangle on the map while frames are counted, and times the selection."""
    selector = "canvas.chart"
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()

    def move(step: int, x: float, y: float) -> None:
        page.mouse.move(x + step, y + step / 2)

    print("map, brushing:", frames(page, selector, move, 90))
    began = time.perf_counter()
    page.mouse.up()
    page.locator("button", has_text="show all").first.wait_for()
    wall = time.perf_counter() - began
    print(f"map, all views after the brush: {1000 * wall:.0f} ms")
    page.keyboard.press("Escape")


def pair(page: Page) -> None:
    """Pans and zooms a pair of which all matches are drawn."""
    page.keyboard.press("2")
    page.locator(".tile.stored").first.click()
    page.get_by_label("rejected").check()
    page.get_by_label("most lines").fill("1000")
    page.wait_for_timeout(500)  # the photographs are decoded
    page.mouse.move(300, 500)
    page.mouse.down()

    def pan(step: int, x: float, y: float) -> None:
        page.mouse.move(x + step, y + step / 2)

    print("pair of 1,000 matches, panning:", frames(page, "canvas.pair", pan, 90))
    page.mouse.up()

    def zoom(step: int, *_: float) -> None:
        page.mouse.wheel(0, -20 if step < 45 else 20)

    print("pair of 1,000 matches, zooming:", frames(page, "canvas.pair", zoom, 90))


def kernel(name: str, dataset: str, turns: int) -> None:
    """Times what the kernel answers to a knob and to a click on a patch."""
    run = runs.run_folder(name)
    benchmark = revisited.open_dataset(dataset, run / "data" / "benchmark")
    inspector = stages.Inspector(run, benchmark)
    began = time.process_time()
    start = {"query": 0, "image": inspector.choose(0)}
    instrument = viz.Instrument(run, benchmark, inspector=inspector, **start)
    print(f"Instrument: {time.process_time() - began:.1f} s of processor time")
    answers, image = instrument.answers(), instrument.start["image"]
    place = {"query": 0, "image": image, "scale": 1.0, "side": 1, "x": 60, "y": 60}
    answers["tokens"](place, ())  # the network looks once
    questions = {"patch": ("patch", place)}
    for method in ("one_way", "mutual", "ratio"):
        question = {"query": 0, "image": image, "settings": {"method": method}}
        questions[f"knob, {method}"] = ("pair", question)
    for title, (kind, question) in questions.items():
        times = []
        for _ in range(turns):
            began = time.process_time()
            answers[kind](question, ())
            times.append(1000 * (time.process_time() - began))
        print(f"{title}: {statistics.median(times):.0f} ms, at most {max(times):.0f}")


CELL = """
from vitgal import runs, stages, viz
from vitgal.data import revisited
run = runs.run_folder({name!r})
benchmark = revisited.open_dataset({dataset!r}, run / "data" / "benchmark")
inspector = stages.Inspector(run, benchmark)
viz.Instrument(
    run, benchmark, inspector=inspector, view="pair", query=0, image=inspector.choose(0)
)
"""
TIMES = """async (turns) => {
    const root = document.querySelector('.vitgal');
    const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const drawn = (node, done) => new Promise((resolve) => {
        const watcher = new MutationObserver(() => {
            if (!done(node.textContent)) return;
            watcher.disconnect();
            requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
        });
        watcher.observe(node, { childList: true });
    });
    const [knob, facts] = ['[aria-label="settings of matching"] input', 'p[aria-live]']
        .map((selector) => root.querySelector(selector));
    const [canvas, hint] = ['canvas.pair', 'p.small[aria-live]']
        .map((selector) => root.querySelector(selector));
    const box = canvas.getBoundingClientRect();
    const acts = {
        'an empty cell': async () => {
            await kernel.requestExecute({ code: '' }).done;
            return performance.now();
        },
        'knob': (turn) => {
            knob.value = turn % 2 ? 0.6 : 0.9;
            knob.dispatchEvent(new Event('input'));
            return drawn(facts, (text) => text.includes('inliers on'));
        },
        'patch': (turn) => {
            const [x, y] = [box.x + box.width / 5 + 4 * turn, box.y + box.height / 2];
            for (const kind of ['pointerdown', 'pointerup'])
                canvas.dispatchEvent(new PointerEvent(kind, { clientX: x, clientY: y }));
            return drawn(hint, (text) => text.startsWith('Most similar'));
        },
    };
    canvas.setPointerCapture = () => {};  // there is no real pointer
    await acts.patch(0);  // the network looks once
    const times = { 'an empty cell': [], 'knob': [], 'patch': [] };
    for (let turn = 0; turn < turns; turn++)
        for (const [name, act] of Object.entries(acts)) {
            const began = performance.now();
            times[name].push(await act(turn) - began);
        }
    return times;
}"""


def interaction(name: str, dataset: str, turns: int) -> None:
    """Times a knob and a click on a patch in JupyterLab, from the event to the drawn picture.

    The answer to an empty cell, in the same session, is what the kernel's channel takes at least.
    """
    cell = nbformat.v4.new_code_cell(CELL.format(name=name, dataset=dataset))
    spec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": spec})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "notebooks").mkdir()
        nbformat.write(notebook, folder / "notebooks" / "timed.ipynb")
        with jupyterlab(folder, {}) as address, fresh_browser(folder / "profile") as context:
            opened = Notebook(context, address, "timed")
            opened.run_all()
            opened.page.locator("p", has_text="inliers on").first.wait_for()
            times = opened.page.evaluate(TIMES, turns)
    for title, values in times.items():
        low, median, high = np.percentile(values, (10, 50, 90))
        print(f"{title}: {median:.0f} ms (the middle 80 %: {low:.0f} to {high:.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=70)
    parser.add_argument("--database", type=int, default=6322)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--run", help="a finished run for the kernel's part")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--live", action="store_true", help="only what needs a kernel")
    options = parser.parse_args()
    if not options.live:
        large_page(options.queries, options.database)
    if options.run:
        kernel(options.run, options.dataset, options.turns)
        interaction(options.run, options.dataset, options.turns)


def large_page(queries: int, database: int) -> None:
    """Writes and opens a page, and moves its plots and pairs."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as engine:
        document = large_document(queries, database)
        index = write_page(Path(folder), document, 5000)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.*"))
        print(f"page: {size / 1e6:.1f} MB, index.html {index.stat().st_size / 1e6:.1f} MB")
        browser = engine.chromium.launch(executable_path=executable(), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        times = []
        for _ in range(3):
            began = time.perf_counter()
            page.goto(index.as_uri())
            page.locator("table.queries").wait_for()
            page.evaluate("() => new Promise(requestAnimationFrame)")
            times.append(time.perf_counter() - began)
        print("opened in", ", ".join(f"{seconds:.2f}" for seconds in times), "s")
        brush(page)
        pair(page)
        browser.close()


if __name__ == "__main__":
    main()
