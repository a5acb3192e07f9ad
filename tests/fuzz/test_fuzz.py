"""A hundred mutated files for each reader; `python -m tests.fuzz --files 10000` looks longer."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_mutated_files_are_read_or_refused():
    command = [sys.executable, "-m", "tests.fuzz", "--files", "100"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
