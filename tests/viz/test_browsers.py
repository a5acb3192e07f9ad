"""Browsers: what is drawn when, and that they work where nobody can click."""

import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient

from tests.viz.reported_run import write_run
from vitgal import runs
from vitgal.viz import browsers

OPENED = """
%matplotlib inline
from pathlib import Path
import pandas as pd
from vitgal.data import revisited
from vitgal import viz
folder = Path({folder!r})
data = revisited.open_dataset("tiny", folder / "data")
"""
SHOWN = "viz.Instrument(folder / 'run', data)"


@pytest.mark.slow
def test_a_notebook_shows_the_widgets_and_fails_with_their_errors(tmp_path):
    write_run(tmp_path)
    cells = [
        OPENED.format(folder=str(tmp_path)) + SHOWN,
        "viz.Instrument(folder / 'none', data)",
        "watch = viz.live_curves()\n"
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
    assert "AnyModel" in names and "OutputModel" not in names
    assert [output.get("ename") for output in second.outputs] == ["StageError"]
    # the growing curves are one output, which two drawings have updated
    assert ["image/png" in output.data for output in third.outputs] == [True]


@pytest.mark.slow
def test_plain_papermill_never_waits_for_a_widget(tmp_path):
    """With an output widget in their place, a run of these cells seldom came to its end."""
    write_run(tmp_path)
    cells = [OPENED.format(folder=str(tmp_path)), *[SHOWN] * 40]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    command = [sys.executable, "-m", "papermill", "a.ipynb", "b.ipynb", "-k", "python3"]
    # The limit only ends a run that would never end.
    subprocess.run([*command, "--no-progress-bar"], cwd=tmp_path, check=True, timeout=300)
    done = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
    assert [cell.execution_count for cell in done] == list(range(1, 42))


def words(output: browsers.FigureOutput) -> str:
    return output.words.value


def pictures(output: browsers.FigureOutput) -> list[bytes]:
    return [bytes(image.value) for image in output.pictures.children]


def test_only_own_figures_are_shown_and_closed():
    others, index = plt.figure().number, 0

    def draw() -> None:
        print(f"query <{index}>")
        for _ in range(index + 1):
            plt.figure(figsize=(1, 1))

    output = browsers.FigureOutput(draw)
    output.draw()
    (first,) = pictures(output)
    assert first.startswith(b"\x89PNG") and "query &lt;0&gt;" in words(output)
    index = 1
    output.redraw()
    assert len(pictures(output)) == 2 and "query &lt;1&gt;" in words(output)
    assert plt.get_fignums() == [others]


def test_a_failing_drawing_is_raised_and_leaves_no_figure():
    def draw() -> None:
        plt.figure()
        raise ValueError("no features")

    with pytest.raises(ValueError, match="no features"):
        browsers.FigureOutput(draw).draw()
    assert not plt.get_fignums()


def test_a_later_failure_is_shown_with_its_message():
    errors = [runs.StageError("run 05 first"), KeyError("x")]

    def draw() -> None:
        plt.figure(figsize=(1, 1))
        if errors:
            raise errors.pop(0)

    output = browsers.FigureOutput(draw)
    output.redraw()
    assert ">run 05 first<" in words(output) and pictures(output) == []
    output.redraw()
    assert "KeyError: &#x27;x&#x27; (test_browsers.py, line" in words(output)
    output.redraw()  # the picture is there again, the words are not
    assert len(pictures(output)) == 1 and "KeyError" not in words(output)


def test_arrows_wrap_at_the_ends():
    chooser = browsers.Chooser("query", [("a", 4), ("b", 7), ("c", 2)], 7)
    _, back, forth = chooser.widget.children
    values = []
    for button in (forth, forth, back):
        button.click()
        values.append(chooser.value)
    assert values == [2, 4, 2]


def test_a_list_may_be_empty_and_filled_again():
    chooser = browsers.Chooser("query", [], None)
    chooser.widget.children[2].click()
    assert chooser.value is None
    browsers.refill(chooser.list, [("a", 3), ("b", 1)])
    assert chooser.value == 3
    browsers.refill(chooser.list, [])
    assert chooser.value is None


def test_a_first_choice_that_does_not_exist_is_refused():
    with pytest.raises(IndexError, match="no query 3: choose 0 to 2"):
        browsers.Chooser("query", [("a", 0), ("b", 1), ("c", 2)], 3)
