"""What notebooks declare and take, which are chosen, and what is injected into each."""

from pathlib import Path

import nbformat
import pytest

from vitgal.app import pipeline
from vitgal.settings.reader import Values
from vitgal.settings.section import SettingsError

FIRST = "run_dir: str = 'demo'\nsize: int = 4  # pixels\nrate: float = 0.5\nname: str | None = None"


def test_declared_reads_name_type_default(scratch):
    declarations = pipeline.declared(scratch("01_first.ipynb", FIRST)).values()
    assert [(d.name, d.kind, d.default) for d in declarations] == [
        ("run_dir", str, "demo"),
        ("size", int, 4),
        ("rate", float, 0.5),
        ("name", str | None, None),
    ]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("size = 4", "name: type = value"),
        ("size: int", "name: type = value"),
        ("import os", "name: type = value"),
        ("size: int = 2 * 2", "malformed"),
        ("size: int = 'four'", "int"),
        ("size: Path = 'x'", "is none of int"),
        ("size: list[list[dict]] = []", "is none of int"),
        ("%matplotlib inline", "invalid syntax"),
    ],
)
def test_declared_refuses_what_papermill_cannot_inject(scratch, line, remedy):
    with pytest.raises(ValueError, match="01_a.ipynb") as error:
        pipeline.declared(scratch("01_a.ipynb", line))
    assert remedy in str(error.value)


def test_declared_needs_exactly_one_tagged_cell(scratch):
    path = scratch("01_a.ipynb", "a: int = 1", "a: int = 2")
    notebook = nbformat.read(path, as_version=4)
    for tags, count in ([], 0), (["parameters"], 2):
        notebook.cells[0].metadata["tags"] = notebook.cells[1].metadata["tags"] = tags
        nbformat.write(notebook, path)
        with pytest.raises(ValueError, match=f"has {count} cells tagged"):
            pipeline.declared(path)


@pytest.mark.parametrize(
    ("choice", "numbers"),
    [
        ({}, "01 02 03 05"),
        ({"only": ["05", "2"]}, "02 05"),
        ({"only": ["03_c"]}, "03"),
        ({"between": ("02", None)}, "02 03 05"),
        ({"between": (None, "2")}, "01 02"),
        ({"between": ("03", "03")}, "03"),
    ],
)
def test_select(choice, numbers):
    paths = [Path(name) for name in ("01_a.ipynb", "02_b.ipynb", "03_c.ipynb", "05_e.ipynb")]
    assert [path.name[:2] for path in pipeline.select(paths, **choice)] == numbers.split()


@pytest.mark.parametrize(
    "choice",
    [
        {"only": ["04"]},
        {"only": [""]},
        {"between": ("x", None)},
        {"between": ("02", "01")},
        {"only": ["01"], "between": (None, "02")},
    ],
)
def test_select_refuses(choice):
    with pytest.raises(SettingsError):
        pipeline.select([Path("01_a.ipynb"), Path("02_b.ipynb")], **choice)


@pytest.mark.parametrize("value", [4, "04", "04:07", "four-five", ["04"], "04-"])
def test_a_range_of_notebooks_is_two_numbers(value):
    with pytest.raises(SettingsError, match="04-07"):
        pipeline.notebook_range(Values.of({"notebooks": value}, "a file"))


def test_the_range_of_notebooks():
    assert pipeline.notebook_range(Values({}, {})) == (None, None)
    assert pipeline.notebook_range(Values.of({"notebooks": "4-07"}, "a")) == ("4", "07")


def test_notebooks_outside_the_chain_are_left_out(scratch):
    for name in ("01_a.ipynb", "08_own.ipynb", "Untitled.ipynb"):
        folder = scratch(name, "a: int = 1").parent
    assert [path.name for path in pipeline.chain(folder)] == ["01_a.ipynb"]


def test_an_empty_chain_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match="no numbered notebook"):
        pipeline.chain(tmp_path)


def test_a_notebook_gets_the_values_that_differ_from_its_own(scratch):
    notebook = scratch("01_first.ipynb", FIRST)
    values = Values.of({"size": 4, "rate": 1.0, "run_dir": "x", "lr": 1.0}, "a file")
    assert pipeline.injected(values, notebook) == {"rate": 1.0, "run_dir": "x"}


def test_a_numbered_notebook_takes_every_setting_of_its_sections():
    names = pipeline.takes(Path("notebooks/02_train.ipynb"))
    assert {"lr", "drop_path", "threads", "run_dir", "min_train_gain"} <= names
    assert not {"max_distance", "global_size"} & names
