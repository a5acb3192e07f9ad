"""The README's Python runs as it stands."""

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
    assert names["descriptors"].shape == (3, 128)
    assert names["ranks"].shape == (2, 1)
    assert 0 < names["result"].count <= len(names["matches"])
    assert capsys.readouterr().out.endswith("inliers\n")
