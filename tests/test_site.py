"""The site of `make docs`: it builds without warnings, opens from disk, and refuses bad sources."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.viz.reported_run import write_run
from tests.viz.test_browser import ARGUMENTS, executable

TOP = Path(__file__).resolve().parents[1]
PAGES = {
    "docs/index": "ViTGaL, explained and executable",
    "notebooks/06_rerank": "6 · Reranking: does the geometry agree?",
    "docs/settings": "Settings",
    "docs/api": "Python interface",
}

pytestmark = pytest.mark.slow


def build(sources: Path, target: Path, runs: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", str(sources / "docs")]
    command += ["-d", str(target.parent / "doctrees"), str(sources), str(target)]
    environment = os.environ | {"VITGAL_RUNS": str(runs)}
    return subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True)


def test_the_site_builds_and_its_pages_open(tmp_path):
    run = write_run(tmp_path / "runs")
    run.rename(run.with_name("demo"))
    child = build(TOP, tmp_path / "site", tmp_path / "runs")
    assert child.returncode == 0, child.stderr
    if executable() is None:
        pytest.skip("no browser is installed")
    requests, errors = [], []
    with sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=executable(), args=ARGUMENTS)
        page = chromium.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name, title in PAGES.items():
            page.goto((tmp_path / "site" / f"{name}.html").as_uri())
            assert page.locator("article h1").first.inner_text().removesuffix("#") == title
            if name.startswith("notebooks"):
                assert page.locator("math").count() >= 5
                frame = page.frame_locator("iframe[title='The demo run, to explore']")
                page.locator("iframe").scroll_into_view_if_needed()
                frame.get_by_text("easy").first.wait_for()
        chromium.close()
    assert not errors
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture
def sources(tmp_path) -> Path:
    """One page and one notebook with the site's configuration."""
    (tmp_path / "sources" / "docs").mkdir(parents=True)
    (tmp_path / "sources" / "notebooks").mkdir()
    shutil.copy(TOP / "docs" / "conf.py", tmp_path / "sources" / "docs")
    notebook = tmp_path / "sources" / "notebooks" / "08_own_photos.ipynb"
    shutil.copy(TOP / "notebooks" / "08_own_photos.ipynb", notebook)
    text = "# One page\n\n```{toctree}\n../notebooks/08_own_photos\n```\n"
    (tmp_path / "sources" / "docs" / "index.md").write_text(text)
    return tmp_path / "sources"


def test_a_link_to_nowhere_is_an_error(sources, tmp_path):
    index = sources / "docs" / "index.md"
    index.write_text(index.read_text() + "\n[lost](nowhere.md)\n")
    child = build(sources, tmp_path / "site", tmp_path)
    assert child.returncode != 0
    assert "nowhere.md" in child.stderr and "index.md" in child.stderr


def test_a_notebook_that_was_not_run_is_an_error(sources, tmp_path):
    path = sources / "notebooks" / "08_own_photos.ipynb"
    notebook = json.loads(path.read_text())
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    codes[0]["execution_count"] = None
    path.write_text(json.dumps(notebook))
    child = build(sources, tmp_path / "site", tmp_path)
    assert child.returncode != 0
    assert "08_own_photos.ipynb" in child.stderr
