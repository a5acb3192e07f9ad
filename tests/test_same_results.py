"""The script that compares the results of two runs sees each kind of difference, and no other."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import same_results
from vitgal import runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one array and one scores.json, and a file that is no result."""
    folder = tmp_path / "first"
    runs.write_array(folder / "demo" / "global" / "queries.npy", np.arange(3.0))
    runs.write_json(folder / "demo" / "global" / "scores.json", {"map": 0.5, "versions": {"a": 1}})
    runs.write_json(folder / "demo" / "global" / "stage.json", {"seconds": 1})
    return folder


def test_a_copy_is_equal_and_versions_and_manifests_do_not_count(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "second")
    runs.write_json(other / "demo/global/scores.json", {"map": 0.5, "versions": {"a": 2}})
    runs.write_json(other / "demo/global/stage.json", {"seconds": 2})
    assert same_results.main(str(run), str(other)) == 0


@pytest.mark.parametrize("change", ["array", "score", "missing", "additional"])
def test_a_difference_is_named(run, tmp_path, change):
    other = shutil.copytree(run, tmp_path / "second")
    folder = other / "demo" / "global"
    if change == "array":
        runs.write_array(folder / "queries.npy", np.arange(3.0) + np.float64(2**-50))
    elif change == "score":
        runs.write_json(folder / "scores.json", {"map": 0.25, "versions": {"a": 1}})
    elif change == "missing":
        (folder / "queries.npy").unlink()
    else:
        runs.write_array(folder / "more.npy", np.zeros(1))
    (line,) = same_results.differences(run, other)
    assert "demo/global/" in line
    assert same_results.main(str(run), str(other)) == 1


def test_two_empty_folders_are_equal(tmp_path):
    assert same_results.differences(tmp_path, tmp_path) == []
