"""Fixtures and the order of the tests: unit tests, nbval, slow tests, a Ray cluster's."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import nbformat
import pytest

TOP = Path(__file__).resolve().parent.parent

# The same examples in every run; no time limit an example, for a machine that is shared.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come last: they reuse the run that the notebooks leave behind."""

    def place(item: pytest.Item) -> int:
        if item.path.suffix == ".ipynb":
            return 1
        if item.get_closest_marker("last"):
            return 3
        return 2 if item.get_closest_marker("slow") else 0

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _runs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's runs/, whatever it forgets."""
    monkeypatch.setenv("VITGAL_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def finished_run() -> Path:
    """The run folder that the notebooks under nbval have just filled (`make test`)."""
    folder = os.environ.get("VITGAL_FINISHED_RUN")
    if not folder or not any(Path(folder).glob("*/global/scores.json")):
        pytest.skip("no finished run in VITGAL_FINISHED_RUN: `make test` makes one")
    return Path(folder)


@pytest.fixture
def scratch(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small notebook: `scratch("01_a.ipynb", parameters, *sources)` gives its path."""
    folder = tmp_path / "notebooks"
    folder.mkdir()

    def write(name: str, parameters: str, *sources: str) -> Path:
        notebook = nbformat.v4.new_notebook(
            metadata={
                "kernelspec": {
                    "name": "python3",
                    "display_name": "Python 3 (ipykernel)",
                    "language": "python",
                },
                "language_info": {"name": "python"},
            }
        )
        notebook.cells = [
            nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, sources),
        ]
        nbformat.write(notebook, folder / name)
        return folder / name

    return write
