"""A minute of mutated files for all readers; `python -m tests.fuzz --minutes 60` takes an hour."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_mutated_files_are_read_or_refused():
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", "1"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
