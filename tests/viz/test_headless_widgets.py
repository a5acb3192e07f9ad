"""Widgets of notebooks where nobody can click: a headless run ends, with a picture or an error."""

import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.viz.reported_run import write_run

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
