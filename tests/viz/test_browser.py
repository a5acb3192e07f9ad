"""The notebooks as a person uses them: JupyterLab in a real browser, on the finished demo run.

Each notebook is opened, all its cells are run, another query is chosen, a slider is moved, and the
picture must change without an error on the page. Every wait is for a state of the page; limits only
end a test that would never end. Screenshots are left in the folder VITGAL_SCREENSHOTS, if set.
"""

import contextlib
import hashlib
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
pytestmark = pytest.mark.slow


def executable() -> str | None:
    """The system's Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def address(finished_run, tmp_path_factory) -> Iterator[str]:
    """A JupyterLab on copies of the notebooks: saving would change the committed ones."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(TOP / "notebooks", folder / "notebooks")
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

    def browser(self):
        """The notebook's browser: the output with widgets that holds pictures."""
        result = self.page.locator(".jp-OutputArea-output:has(img.widget-image)")
        result.last.scroll_into_view_if_needed()
        return result.last

    def pictures(self) -> list[str]:
        """A fingerprint of every picture that the browser shows, as the page has decoded it."""
        sources = (
            self.browser()
            .locator("img.widget-image")
            .evaluate_all(
                """images => Promise.all(images.map(async image => {
                const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
                return image.complete && image.naturalWidth ? String(bytes) : null;
            }))"""
            )
        )
        return [hashlib.sha256(str(source).encode()).hexdigest() for source in sources]

    def changes(self, act) -> None:
        """`act` changes a picture: waits until the page shows another one, and the kernel rests."""
        before = self.pictures()
        sources = "image => image.src"
        visible = (
            self.browser()
            .locator("img.widget-image")
            .evaluate_all(f"images => images.map({sources})")
        )
        act()
        self.wait(
            """([shown]) => {
                const found = [...document.querySelectorAll(
                    '.jp-OutputArea-output:has(img.widget-image)')].at(-1);
                const images = [...found.querySelectorAll('img.widget-image')];
                return images.some(image => !shown.includes(image.src))
                    && images.every(image => image.complete && image.naturalWidth > 0);
            }""",
            [visible],
        )
        self.await_idle()
        assert self.pictures() != before

    def choose(self, label: str, place: int) -> None:
        """Chooses another entry of a list, by hand."""
        box = self.browser().locator(".widget-dropdown", has_text=label).first
        self.changes(lambda: box.locator("select").select_option(index=place))

    def slide(self, label: str, key: str = "ArrowLeft", times: int = 1) -> None:
        """Moves a slider's (first) handle with the keyboard."""
        handle = self.browser().locator(".widget-slider", has_text=label).locator(".noUi-handle")
        handle.first.focus()
        for _ in range(times):
            self.changes(lambda: self.page.keyboard.press(key))

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


def test_matches_are_inspected(lab):
    notebook = lab("07_match_visualization")
    notebook.keep("-opened")
    notebook.choose("query", 3)
    notebook.choose("image", 1)
    notebook.slide("threshold", times=2)
    notebook.choose("estimator", 1)
    notebook.keep("-knobs")
    notebook.slide("features", "Home")
    notebook.slide("features", "End")
    notebook.slide("max_distance", "Home")
    look = notebook.browser().get_by_role("button", name="look with the network")
    notebook.changes(look.click)
    notebook.choose("attention", 3)
    notebook.slide("max_distance", "End")
    hidden = notebook.browser().locator(".widget-select-multiple", has_text="hidden").first
    notebook.changes(lambda: hidden.locator("select").select_option(index=0))
    assert "not extracted anew" in notebook.browser().inner_text()
    notebook.check()
    notebook.keep("-looked")


def test_own_photographs_are_searched(lab):
    notebook = lab("08_own_photos")
    notebook.keep("-opened")
    notebook.slide("left, right", "PageUp", times=2)
    notebook.slide("top, bottom", "ArrowRight")
    search = notebook.browser().get_by_role("button", name="search with this box")
    notebook.changes(search.click)
    notebook.choose("matches with", 2)
    notebook.choose("query", 5)
    notebook.changes(search.click)
    notebook.check()
    notebook.keep("-searched")
