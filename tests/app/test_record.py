"""The recorder of benchmarks: what a script prints stands in the page, once, and only if it ran."""

import importlib.util
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def record():
    path = Path(__file__).parents[2] / "benchmarks" / "record.py"
    spec = importlib.util.spec_from_file_location("record", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_printed_text_is_on_the_page_once(record, tmp_path, capfd):
    page = tmp_path / "README.md"
    page.write_text("# Measurements\n\nWords.\n")
    script = tmp_path / "a.py"
    for number in (1, 2):
        script.write_text(f"import sys; print('| x |', {number}, *sys.argv[1:]); print('**')")
        assert record.main(["a.py", "--n", "3 4"], page, tmp_path) == 0
    (tmp_path / "b.py").write_text("print('other')")
    record.main(["b.py"], page, tmp_path)
    text = page.read_text()
    assert text.startswith("# Measurements\n\nWords.\n\n## As printed\n\n`python benchmarks/a.py ")
    assert text.count("## As printed") == 1
    blocks = re.findall(
        r"^`python (.+)`, \d{4}-\d\d-\d\d, \d+ cores of .+:\n\n```\n((?:.|\n)*?)```", text, re.M
    )
    assert blocks == [
        ("benchmarks/a.py --n '3 4'", "| x | 2 --n 3 4\n**\n"),
        ("benchmarks/b.py", "other\n"),
    ]
    assert "| x | 1 --n 3 4\n" in capfd.readouterr().out


def test_a_script_that_fails_leaves_the_page(record, tmp_path, capfd):
    page = tmp_path / "README.md"
    page.write_text("as it was\n")
    (tmp_path / "a.py").write_text("print('half'); raise SystemExit(3)")
    assert record.main(["a.py"], page, tmp_path) == 3
    for arguments in ([], ["../a.py"], ["c.py"]):
        assert record.main(arguments, page, tmp_path) == 2
    assert page.read_text() == "as it was\n"
    assert "scripts: a.py" in capfd.readouterr().out
