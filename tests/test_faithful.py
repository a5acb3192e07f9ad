"""docs/faithful.md says of every published behaviour which test holds it: those tests are there."""

import ast
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from vitgal.data.revisited import load_ground_truth
from vitgal.settings import (
    MachineSettings,
    MatchingSettings,
    RerankingSettings,
    VerificationSettings,
)
from vitgal.stages import rerank

TOP = Path(__file__).resolve().parents[1]
TABLE = TOP / "docs" / "faithful.md"
KINDS = ("same", "switch", "fixed", "gone")


def rows() -> list[list[str]]:
    """The cells of every row that says something: where, published, here, held by."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "where" and set(row[0]) != {"-"}]


def defined(path: Path) -> set[str]:
    """The names of a test file's functions and classes, methods among them."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def test_every_row_is_whole():
    result = rows()
    assert len(result) > 90
    for row in result:
        assert len(row) == 4 and all(row[:3]), row


def test_what_is_kept_has_a_test():
    for where, published, here, locks in rows():
        kept = re.match(r"same|switch|fixed", here)
        assert not kept or "::" in locks, f"{where}: {published}"


@pytest.mark.parametrize(
    "name", sorted({n for row in rows() for n in re.findall(r"`(\w+\.py)::", row[3])})
)
def test_the_tests_it_names_are_there(name):
    (path,) = (TOP / "tests").rglob(name)
    existing = defined(path)
    named = {test for row in rows() for test in re.findall(rf"`{name}::(\w+)`", row[3])}
    assert named and named <= existing, sorted(named - existing)


@pytest.mark.slow
def test_the_page_on_published_files_runs(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("VITGAL_RUNS", str(finished_run.parent))
    monkeypatch.chdir(tmp_path)
    page = (TOP / "docs" / "published_files.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 7
    exec(compile("\n".join(blocks), "published_files.md", "exec"), {})
    built = "train_split.txt global_rank.npy rerank_path.txt published run features.h5 pairs.txt"
    assert {path.name for path in (tmp_path / "exchange").iterdir()} == set(built.split())
    # The page says that features which went out and came back can be reranked with.
    run = tmp_path / "exchange" / "run"
    shutil.copytree(finished_run / "demo" / "global", run / "demo" / "global")
    quick = RerankingSettings(
        top=2,
        verification=VerificationSettings(iterations=10),
        matching=MatchingSettings(max_keypoints=40),
    )
    truth = load_ground_truth(finished_run / "data" / "benchmark" / "gnd_demo.pkl")
    folder = rerank.rerank_shortlist(run, truth, quick, MachineSettings(workers=1))
    assert (np.load(folder / "inliers.npy") >= 0).any()
