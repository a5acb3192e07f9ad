"""The README's Python runs as it stands; speeds name their measurement."""

import re
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_python_in_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(TOP)
    (block,) = re.findall(r"```python\n(.*?)```", (TOP / "README.md").read_text(), re.S)
    assert len([line for line in block.splitlines() if line and "import" not in line]) <= 10
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["descriptors"].shape == (3, 224)
    assert names["ranks"].shape == (2, 1)
    assert 0 < names["result"].count <= len(names["matches"])
    assert capsys.readouterr().out.endswith("inliers\n")


SPEED = re.compile(
    r"\d (ms|µs)\b|\d times (as fast|faster|sooner|slower)|\d (images|frames) (a|per) second"
)


def test_speeds_stand_where_their_measurement_is_named():
    """A speed is true of one machine: the package states none, a page names the benchmark."""
    package = sorted((TOP / "vitgal").rglob("*.py"))
    assert [str(path) for path in package if SPEED.search(path.read_text(encoding="utf-8"))] == []
    pages = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages}
    stated = {name for name, text in texts.items() if SPEED.search(text)}
    assert stated and all("benchmarks/" in texts[name] for name in stated)


def test_the_files_and_names_of_the_recipes_exist():
    """Each section of CONTRIBUTING.md names files, and names that stand in them."""
    text = (TOP / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipes = [part for part in re.split(r"^## ", text, flags=re.M) if part.startswith("Add ")]
    assert len(recipes) == 5
    for recipe in recipes:
        paths = re.findall(r"`((?:vitgal|tests|benchmarks|params)/[\w./-]*)", recipe)
        assert [path for path in paths if not (TOP / path).exists()] == []
        files = [TOP / path for path in paths if (TOP / path).is_file()]
        sources = "\n".join(file.read_text(encoding="utf-8") for file in files)
        names = {name.split(".")[-1] for name in re.findall(r"`([A-Za-z][\w.]+)`", recipe)}
        names -= {"py", "None"}  # files of folders that are named, and Python's own
        assert len(names) > 1
        assert {name for name in names if not re.search(rf"\b{name}\b", sources)} == set()
