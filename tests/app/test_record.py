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


def test_all_goes_on_after_a_failure(record, tmp_path, capfd):
    page = tmp_path / "README.md"
    page.write_text("# Measurements\n")
    (tmp_path / "a.py").write_text("raise SystemExit(1)")
    (tmp_path / "b.py").write_text("print('measured')")
    assert record.run_all(page, tmp_path, ["a.py --n 1", "b.py"]) == 1
    assert "measured" in page.read_text() and "a.py" not in page.read_text()
    assert capfd.readouterr().out.endswith("failed: a.py --n 1\n")
    assert record.run_all(page, tmp_path, ["b.py"]) == 0


def test_what_make_bench_runs_is_there_and_printed(record):
    for command in record.SUITE:
        assert (record.FOLDER / command.split()[0]).is_file()
        assert f"\n`python benchmarks/{command}`, " in record.PAGE.read_text()


NUMBER = r"(?:\d[\d.,]*|two|three|four|five|six|seven|eight|nine|ten|twice|half)"
SPEED = (
    rf"{NUMBER} (?:times )?(?:%|percent)? ?(?:as fast|faster|slower|sooner)|\w+fold faster|tenfold"
)


def test_how_fast_stands_on_the_page_of_measurements_alone(record):
    """A speed beside another is true of one machine and one day, which that page names."""
    assert re.search(SPEED, "is 2.2 times as fast") and re.search(SPEED, "up to 18 % faster")
    top = record.FOLDER.parent
    pages = [top / "README.md", *top.glob("docs/**/*.md"), *top.glob("vitgal/**/*.py")]
    assert len(pages) > 100
    found = [
        f"{page.relative_to(top)}: {match[0]}"
        for page in pages
        for match in re.finditer(SPEED, re.sub(r"\s+", " ", page.read_text()))
    ]
    assert not found, "state it in benchmarks/README.md, with its run"
