"""The instrument in JupyterLab, in a real browser, on a small run of its own."""

from pathlib import Path

import nbformat
import pytest

from tests.viz.reported_run import DATABASE, write_run
from tests.viz.test_browser import Notebook, fresh_browser, jupyterlab

pytestmark = pytest.mark.slow
CELL = """
from pathlib import Path
from vitgal.data import revisited
from vitgal import viz
folder = Path({folder!r})
dataset = revisited.open_dataset("tiny", folder / "data")
viz.Instrument(folder / "run", dataset, view="ranking", query=0, protocol="hard")
"""
TWICE = CELL.replace("viz.Instr", "shown = viz.Instr") + "display(shown)\ndisplay(shown)\n"


@pytest.fixture(params=[CELL])
def notebook(tmp_path: Path, request):
    write_run(tmp_path)
    cell = nbformat.v4.new_code_cell(request.param.format(folder=str(tmp_path)))
    spec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    scratch = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": spec})
    (tmp_path / "lab" / "notebooks").mkdir(parents=True)
    nbformat.write(scratch, tmp_path / "lab" / "notebooks" / "scratch.ipynb")
    with jupyterlab(tmp_path / "lab", {}) as address, fresh_browser(tmp_path / "p") as context:
        yield Notebook(context, address, "scratch")


def test_a_pair_is_opened_and_matched_anew_by_the_kernel(notebook):
    notebook.run_all()
    notebook.check()
    page = notebook.page
    root = page.locator(".vitgal")
    first = root.locator("section:has(h3:text('After reranking')) .tile").first
    assert first.get_attribute("title") == DATABASE[1]
    first.locator("img").wait_for()
    page.wait_for_function("() => document.querySelector('.vitgal .tile img')?.naturalWidth > 0")
    notebook.keep("-ranking")

    first.click()
    facts = root.locator("p", has_text="30 inliers on 30 features of 30 matches")
    facts.wait_for()
    notebook.keep("-pair")
    distance = root.get_by_label("max_distance")
    distance.fill("1.4")  # all features match now
    root.locator("p", has_text="of 30 matches").wait_for()
    root.get_by_label("estimator").select_option("magsac")
    root.locator("p", has_text="30 inliers on 30 features of 30 matches").wait_for()
    # Keys work where the instrument has the focus, and do not reach the notebook.
    root.locator("canvas.pair").focus()
    page.keyboard.press("Escape")
    first.wait_for()
    page.keyboard.press("n")
    root.locator("section:has(h3:text('Nearest to')) .tile").nth(4).wait_for()
    page.keyboard.press("1")
    root.locator("h2", has_text="Scores").wait_for()
    assert len(notebook.cells()) == 1
    assert page.evaluate("window.bad") is None
    notebook.check()


@pytest.mark.parametrize("notebook", [TWICE], indirect=True)
def test_two_views_of_one_widget_are_independent(notebook):
    notebook.run_all()
    first, second = (notebook.page.locator(".vitgal").nth(number) for number in (0, 1))
    for view, place, inliers in (
        (first, 0, "30 inliers on 30 features of"),
        (second, 1, "matches"),
    ):
        tiles = view.locator("section:has(h3:text('After reranking')) .tile")
        tiles.nth(place).wait_for()
        tiles.nth(place).click()
        view.locator("p", has_text=inliers).first.wait_for()
    assert first.locator("h2").inner_text() != second.locator("h2").inner_text()
    assert "30 inliers on 30 features" in first.inner_text()
    assert "30 inliers on 30 features" not in second.inner_text()
    notebook.check()
    notebook.keep("-twice")
