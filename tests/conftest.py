"""Fixtures, and the order and grouping of the tests."""

import functools
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import hypothesis
import nbformat
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from vitgal.runs import environment

TOP = Path(__file__).resolve().parent.parent

# The same examples in every run; no time limit an example, for a machine that is shared.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("repeatable")

# The objects of all imported modules make collections of garbage slow: one for 50,000 new objects,
# not for 700. Freezing them instead would look like a launch to data workers.
gc.set_threshold(50_000, 10, 10)


# Files that take minutes. They begin first, so that all workers end at about the same time.
LONG = (
    *("test_tiny_run.py", "test_real_params.py", "test_cluster.py", "test_rparis_mini.py"),
    *("test_training_launch.py", "test_training_faults.py"),
)


@functools.cache
def needs_notebooks(path: Path) -> bool:
    """Whether a file is a notebook, or has tests that use the run which the notebooks leave."""
    text = "" if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return path.suffix == ".ipynb" or re.search(r"\bfinished_run\b", text) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files: the notebooks, what uses their run, long ones, slow ones, all others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> tuple[bool, ...]:
        path = item.path
        first = (path.suffix == ".ipynb", needs_notebooks(path), path.name in LONG, path in slow)
        return tuple(not yes for yes in first)

    items.sort(key=place)


class ByFile(LoadFileScheduling):
    """Gives a file's tests to one worker, in order; the notebooks' and their run's are one file.

    `--dist loadgroup` would do, but pytest-xdist 3.8 loses the groups under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        name = super()._split_scope(nodeid)
        return "notebooks" if needs_notebooks(self.config.rootpath / name) else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    config.option.loadscopereorder = False  # keep the order above
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _runs_elsewhere(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No test writes to the user's runs/, whatever it forgets."""
    has_folder = "tmp_path" in request.fixturenames  # to make one for every test takes seconds
    folder = request.getfixturevalue("tmp_path") if has_folder else tmp_path_factory.getbasetemp()
    monkeypatch.setenv("VITGAL_RUNS", str(folder / "runs"))


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsets the variables that a manifest records; some machines set one for every program."""
    for name in environment.NUMERIC:
        monkeypatch.delenv(name, raising=False)


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
