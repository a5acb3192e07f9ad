"""The notebooks as a person uses them: JupyterLab in a real browser, on the finished demo run.

Notebooks are opened, all their cells are run, and their views are used: queries, knobs, patches,
boxes and pairs must change the picture without an error on the page. Every wait is for a state of
the page; limits only end a test that would never end. Screenshots are left in the folder
VITGAL_SCREENSHOTS, if set.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from vitgal import runs

TOP = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = """--no-sandbox --disable-dev-shm-usage --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync""".split()
TOKEN = "a-token-for-one-test"
LIMIT = 300_000  # milliseconds
SETTINGS = {  # no question about news, no look for updates, every cell in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
PAIR = """from vitgal import runs, stages, viz
from vitgal.data import revisited
run = runs.run_folder("demo")
benchmark = revisited.open_dataset("demo", run / "data" / "benchmark")
hard = stages.hard_candidates(run / "demo" / "rerank", benchmark.ground_truth, 14)
viz.Instrument(run, benchmark, view="pair", query=14, image=int(hard[0]))"""
pytestmark = pytest.mark.slow


def executable() -> str | None:
    """The system's Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def address(finished_run, tmp_path_factory) -> Iterator[str]:
    """A JupyterLab on copies of the notebooks: saving would change the committed ones."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(TOP / "notebooks", folder / "notebooks")
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    pair = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(PAIR)], metadata={"kernelspec": kernel}
    )
    nbformat.write(pair, folder / "notebooks" / "pair.ipynb")
    with jupyterlab(folder, {"VITGAL_RUNS": str(finished_run.parent)}) as address:
        yield address


@contextlib.contextmanager
def jupyterlab(folder: Path, variables: dict[str, str]) -> Iterator[str]:
    """Serves `<folder>/notebooks` by JupyterLab, whose own files are in `folder` too."""
    if executable() is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH")
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        runs.write_json(path, values)
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder / 'notebooks'}", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"]
    command += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"]
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    places |= {"IPYTHONDIR": "ipython", "JUPYTER_DATA_DIR": "data"}
    environment = os.environ | {name: str(folder / location) for name, location in places.items()}
    with open(folder / "log.txt", "wb") as log:
        server = subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log)
        try:
            await_server(server, port, folder / "log.txt")
            yield f"http://127.0.0.1:{port}/lab/tree"
        finally:
            server.terminate()
            server.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as single:
        single.bind(("127.0.0.1", 0))
        return single.getsockname()[1]


def await_server(server: subprocess.Popen, port: int, log: Path) -> None:
    """Returns when the server answers; fails with its log where it ends instead."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/status", headers={"Authorization": f"token {TOKEN}"}
    )
    for _ in range(LIMIT // 200):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)  # between two questions; the answer ends the wait
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()}")


@pytest.fixture(scope="module")
def chromium(address, tmp_path_factory):
    """One browser with a fresh profile."""
    with fresh_browser(tmp_path_factory.mktemp("profile")) as context:
        yield context


@contextlib.contextmanager
def fresh_browser(profile: Path) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            str(profile),
            executable_path=executable(),
            headless=True,
            args=ARGUMENTS,
            viewport={"width": 1400, "height": 1500},
        )
        context.set_default_timeout(LIMIT)
        yield context
        context.close()


class Notebook:
    """A notebook opened in JupyterLab, seen through its page."""

    def __init__(self, context, address: str, name: str):
        self.name, self.errors = name, []
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{address}/{name}.ipynb?token={TOKEN}&reset")
        self.wait("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady")
        self.wait("() => window.jupyterapp.shell.currentWidget.context.isReady")
        self.await_idle()

    def wait(self, state: str, argument: object = None) -> None:
        self.page.wait_for_function(state, arg=argument)

    def await_idle(self) -> None:
        kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
        self.wait(f"() => {kernel}?.status === 'idle'")

    def cells(self) -> list[dict]:
        """The code cells as the page holds them: source, count, kinds of output."""
        return self.page.evaluate(
            """() => window.jupyterapp.shell.currentWidget.content.widgets
                .filter(cell => cell.model.type === 'code')
                .map(cell => cell.model.toJSON())"""
        )

    def run_all(self) -> None:
        """Runs all cells by the menu, after forgetting the stored outputs; waits for the last."""
        self.page.evaluate("() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        self.page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        self.wait(
            """() => window.jupyterapp.shell.currentWidget.content.widgets
                .filter(cell => cell.model.type === 'code' && cell.model.sharedModel.source.trim())
                .every(cell => cell.model.executionCount !== null
                    || cell.model.outputs.toJSON().some(one => one.output_type === 'error'))"""
        )
        self.await_idle()

    def check(self) -> None:
        """No error in a cell's outputs, on the page, or in the browser."""
        for cell in self.cells():
            failed = [out for out in cell["outputs"] if out["output_type"] == "error"]
            assert not failed, "".join(failed[0]["traceback"])
        assert self.page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
        assert self.page.locator(".jp-Dialog").count() == 0
        assert self.errors == []

    def keep(self, note: str = "") -> None:
        """Leaves a screenshot where VITGAL_SCREENSHOTS says."""
        if folder := os.environ.get("VITGAL_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{self.name}{note}.png")


@pytest.fixture
def lab(chromium, address):
    """Opens a notebook, runs all its cells and checks the page; at the end checks it again."""
    opened = []

    def open_and_run(name: str) -> Notebook:
        notebook = Notebook(chromium, address, name)
        opened.append(notebook)
        notebook.run_all()
        notebook.check()
        return notebook

    yield open_and_run
    for notebook in opened:
        notebook.page.close()


@pytest.mark.parametrize("name", ["04_global_evaluation", "06_rerank"])
def test_queries_are_explored(lab, name):
    notebook = lab(name)
    instrument = notebook.page.locator(".vitgal")
    instrument.get_by_role("button", name="Overview").click()
    instrument.locator("table.queries tbody tr").nth(3).get_by_role("button").click()
    instrument.locator("h3", has_text="Global ranking").wait_for()
    notebook.keep("-ranking")
    instrument.locator(".tile").first.click()
    instrument.locator("p", has_text="matches").first.wait_for()
    notebook.check()
    notebook.keep("-pair")


def changed(canvas, act) -> None:
    """`act` redraws a canvas: waits for another picture."""
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    act()
    arguments = [before]
    canvas.page.wait_for_function(
        "([before]) => document.querySelector('.vitgal canvas.pair').toDataURL() !== before",
        arg=arguments,
    )


def test_matches_are_inspected(lab):
    notebook = lab("07_match_visualization")
    root = notebook.page.locator(".vitgal")
    root.locator("p", has_text="inliers on").first.wait_for()
    root.scroll_into_view_if_needed()
    notebook.keep("-opened")
    canvas = root.locator("canvas.pair")
    changed(canvas, lambda: root.get_by_label("matching", exact=True).select_option("one_way"))
    changed(canvas, lambda: root.get_by_label("threshold").fill("3"))
    changed(canvas, lambda: root.get_by_label("max_distance").fill("0.5"))
    root.get_by_label("estimator").select_option("magsac")
    changed(canvas, lambda: root.get_by_label("max_distance").fill("1.0"))
    changed(canvas, lambda: root.get_by_label("features", exact=False).first.fill("50"))
    changed(canvas, lambda: root.get_by_label("scale 1", exact=False).first.click())
    notebook.keep("-knobs")
    changed(canvas, lambda: root.get_by_label("overlay", exact=True).select_option("0"))
    changed(root.locator("canvas.pair"), lambda: overlay(root, "3"))
    notebook.keep("-overlay")
    box = root.locator("canvas.pair").bounding_box()
    place = {"x": box["width"] / 4, "y": box["height"] / 2}
    root.locator("canvas.pair").click(position=place)
    root.locator("p", has_text="Most similar patches").wait_for()
    notebook.keep("-patch")
    root.get_by_label("display").select_option("checkerboard")
    notebook.keep("-warped")
    notebook.check()


def overlay(root, layer: str) -> None:
    root.get_by_label("overlay", exact=True).select_option(layer)


def test_own_photographs_are_searched(lab):
    notebook = lab("08_own_photos")
    page, root = notebook.page, notebook.page.locator(".vitgal")
    root.locator(".own .tile").first.wait_for()
    root.scroll_into_view_if_needed()
    notebook.keep("-opened")
    photograph = root.locator("svg.boxed")
    photograph.scroll_into_view_if_needed()
    frame = photograph.bounding_box()
    middle = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    page.mouse.move(middle[0] - 50, middle[1] - 40)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 50)
    page.mouse.up()
    page.wait_for_function(
        "() => +document.querySelector('[aria-label=\"left of the box\"]').value > 0"
    )
    notebook.keep("-box")
    root.locator(".own").nth(1).get_by_text("+ pair").click()
    root.locator("li").wait_for()
    with page.expect_download() as download:
        root.get_by_role("button", name="pairs.txt").click()
    assert len(Path(download.value.path()).read_text().split()) == 2
    root.locator(".own .tile").first.click()
    root.locator("p", has_text="inliers on").wait_for()
    notebook.keep("-pair")
    changed(root.locator("canvas.pair"), lambda: overlay(root, "0"))
    notebook.keep("-overlay")
    root.locator("canvas.pair").focus()
    page.keyboard.press("Escape")
    root.get_by_label("query", exact=True).select_option(index=5)
    page.wait_for_function(
        "() => +document.querySelector('[aria-label=\"left of the box\"]').value === 0"
    )
    notebook.keep("-searched")
    notebook.check()


def test_a_kernel_that_dies_is_said_and_the_picture_stays(lab):
    notebook = lab("pair")
    page, root = notebook.page, notebook.page.locator(".vitgal")
    root.locator("p", has_text="inliers on").first.wait_for()
    canvas = root.locator("canvas.pair")
    page.evaluate(
        """() => new Promise(done => {
            const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            kernel.statusChanged.connect((_, status) => status === 'autorestarting' && done());
            kernel.requestExecute({code: 'import os; os._exit(1)'});
        })"""
    )
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    root.get_by_label("max_distance").fill("0.5")
    root.locator("p", has_text="The kernel has ended").wait_for()
    assert canvas.evaluate("canvas => canvas.toDataURL()") == before
    notebook.keep("-dead")
