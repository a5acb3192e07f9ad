"""Browsers: what is drawn when, and that they work where nobody can click."""

import shutil
import subprocess
import sys

import ipywidgets as widgets
import nbformat
import pytest
from nbclient import NotebookClient

from vitgal.viz import browsers


def parts(browser: widgets.VBox) -> tuple:
    """The two orders, the list of queries, its arrows, and the pictures."""
    (order, protocols), (chooser, *arrows) = (row.children for row in browser.children[:2])
    words, pictures = browser.children[2].children
    return order, protocols, chooser, arrows, pictures


def test_failures_are_sorted_anew_and_drawn(failing):
    run, benchmark = failing
    browser = browsers.browse_failures(run, benchmark, columns=4)
    order, protocols, chooser, arrows, pictures = parts(browser)
    # Query r has no positives: the last in any order
    assert [label for label, _ in chooser.options] == ["0  q   AP 42 → 79", "1  r   AP nan → nan"]
    assert [label for label, _ in order.options] == list(browsers.ORDERS)
    before = bytes(pictures.children[0].value)
    assert before.startswith(b"\x89PNG")
    arrows[1].click()
    assert chooser.value == 1 and bytes(pictures.children[0].value) != before
    order.value = "miss"
    assert chooser.value == 0 and bytes(pictures.children[0].value) == before
    protocols.value = "hard"
    assert chooser.options[0][0] == "0  q   AP 25 → 100"  # b alone counts: d b, then b d
    assert bytes(pictures.children[0].value) != before
    with pytest.raises(ValueError, match="by is 'x'; queries are sorted by ap, change, miss"):
        browsers.browse_failures(run, benchmark, by="x")


def test_the_global_ranking_alone_is_browsed(failing):
    run, benchmark = failing
    shutil.rmtree(run / "tiny" / "rerank")
    browser = browsers.browse_failures(run, benchmark, reranked=False, columns=4)
    assert parts(browser)[2].options[0][0] == "0  q   AP 42"


@pytest.mark.slow
def test_a_notebook_shows_the_browser_and_fails_with_the_drawing(failing, tmp_path):
    run, _ = failing
    opened = (
        "%matplotlib inline\nfrom pathlib import Path\nimport pandas as pd\n"
        "from vitgal.data import revisited\nfrom vitgal.viz import browsers\n"
        f"run, data = Path({str(run)!r}), revisited.open_dataset('tiny', {str(tmp_path)!r})\n"
    )
    cells = [
        opened + "browsers.browse_failures(run, data)",
        "browsers.browse_failures(run / 'none', data)",
        "watch = browsers.live_curves()\n"
        "for steps in (1, 2):\n"
        "    watch(pd.DataFrame({'step': range(steps), 'loss': range(steps)}))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, kernel_name="python3", allow_errors=True, timeout=60)
    client.execute()
    first, second, third = notebook.cells
    assert [output.output_type for output in first.outputs] == ["execute_result"]
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    names = [state["model_name"] for state in states.values()]
    assert names.count("ImageModel") == 1 and "OutputModel" not in names
    assert [output.get("ename") for output in second.outputs] == ["StageError"]
    # the growing curves are one output, which two drawings have updated
    assert ["image/png" in output.data for output in third.outputs] == [True]


@pytest.mark.slow
def test_plain_papermill_never_waits_for_a_browser(failing, tmp_path):
    """With an output widget in their place, a run of these cells seldom came to its end."""
    cells = [
        "%matplotlib inline\nfrom pathlib import Path\n"
        "from vitgal.data import revisited\nfrom vitgal.viz import browsers\n"
        f"run = Path({str(failing[0])!r})\n"
        f"data = revisited.open_dataset('tiny', {str(tmp_path)!r})"
    ]
    cells += ["browsers.browse_failures(run, data)"] * 60
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    command = [sys.executable, "-m", "papermill", "a.ipynb", "b.ipynb", "-k", "python3"]
    # The limit only ends a run that would never end.
    subprocess.run([*command, "--no-progress-bar"], cwd=tmp_path, check=True, timeout=300)
    done = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
    assert [cell.execution_count for cell in done] == list(range(1, 62))
