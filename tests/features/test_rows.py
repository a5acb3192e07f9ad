"""The row file: it continues after a kill, and never with damaged rows."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.features.examples import damaged, damaged_json, fuzz
from vitgal import runs
from vitgal.features import store

SETTINGS = {"precision": "fp32"}


def open_rows(tmp_path: Path, settings: dict = SETTINGS) -> store.RowFile:
    return store.RowFile.open(tmp_path / "rows.npy", (5, 3), settings=settings)


def test_block_by_block(tmp_path):
    rows = np.arange(15, dtype=np.float32).reshape(5, 3)
    file = open_rows(tmp_path)
    file.append(rows[:2], [{"name": "a", "reason": "empty"}])
    file.append(rows[2:2])
    file.append(rows[2:])
    assert not (tmp_path / "rows.npy").exists()
    np.testing.assert_array_equal(np.load(file.finish()), rows)
    file.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_continues_after_a_kill(tmp_path):
    rows = np.arange(15, dtype=np.float32).reshape(5, 3)
    open_rows(tmp_path).append(rows[:2], [{"name": "a", "reason": "empty"}])
    with open(tmp_path / "rows.npy.partial", "ab") as handle:
        handle.write(b"half a row")  # killed between data and journal
    file = open_rows(tmp_path)
    assert file.rows == 2
    assert file.failures == [{"name": "a", "reason": "empty"}]
    file.append(rows[2:], [{"name": "b", "reason": "cut"}])
    np.testing.assert_array_equal(np.load(file.finish()), rows)
    again = open_rows(tmp_path)  # killed after finish, before the stage was whole
    assert again.rows == 5
    assert [failure["name"] for failure in again.failures] == ["a", "b"]
    np.testing.assert_array_equal(np.load(again.finish()), rows)


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "gone"])
def test_damaged_rows_are_not_continued(tmp_path, damage):
    open_rows(tmp_path).append(np.ones((3, 3)))
    partial = tmp_path / "rows.npy.partial"
    data = bytearray(partial.read_bytes())
    if damage == "flip":
        data[-2] ^= 4
    if damage == "header":
        data[20] ^= 4
    partial.write_bytes(data[:-4] if damage == "cut" else data)
    if damage == "gone":
        partial.unlink()
    assert open_rows(tmp_path).rows == 0


def test_other_settings_are_refused(tmp_path):
    file = open_rows(tmp_path)
    assert open_rows(tmp_path, {"precision": "bf16"}).rows == 0  # nothing is lost
    file = open_rows(tmp_path)
    file.append(np.ones((3, 3)))
    with pytest.raises(runs.StageError, match='precision: "fp32" there, "bf16" now.*auto dep'):
        open_rows(tmp_path, {"precision": "bf16"})
    assert open_rows(tmp_path).rows == 3


def test_no_rows_at_all(tmp_path):
    file = store.RowFile.open(tmp_path / "rows.npy", (0, 3), settings={})
    assert np.load(file.finish()).shape == (0, 3)


def test_errors(tmp_path):
    file = open_rows(tmp_path)
    with pytest.raises(ValueError, match="0 of 5 rows"):
        file.finish()
    with pytest.raises(ValueError, match="block"):
        file.append(np.ones((2, 4)))
    with pytest.raises(ValueError, match="block"):
        file.append(np.ones((6, 3)))


def test_a_full_disk_loses_nothing(tmp_path):
    """A child process may write files of 4 KiB at most, as on a disk that is full."""
    code = f"""
import resource, numpy as np
from vitgal.features.store import RowFile
file = RowFile.open({str(tmp_path / "rows.npy")!r}, (600, 4), settings={{}})
file.append(np.full((100, 4), 7))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
file.append(np.full((500, 4), 8))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 1
    assert "File too large" in child.stderr
    file = store.RowFile.open(tmp_path / "rows.npy", (600, 4), settings={})
    assert file.rows == 100
    file.append(np.full((500, 4), 8))
    rows = np.load(file.finish())
    assert (rows[:100] == 7).all() and (rows[100:] == 8).all()


@settings(fuzz, max_examples=20)  # each of them waits for the disk
@given(data=st.data(), name=st.sampled_from([".partial", ".journal.json"]))
def test_a_damaged_file_is_not_continued_wrongly(tmp_path, data, name):
    """Whole rows as they were written, none, or a refusal of other settings."""
    rows = np.arange(9, dtype=np.float32).reshape(3, 3)
    for path in tmp_path.iterdir():
        path.unlink()
    open_rows(tmp_path).append(rows, [{"name": "a", "reason": "empty"}])
    path = tmp_path / f"rows.npy{name}"
    content = path.read_bytes()
    if name == ".partial":
        path.write_bytes(data.draw(damaged(content)))
    else:
        changed = damaged(content) | damaged_json(content.decode()).map(str.encode)
        path.write_bytes(data.draw(changed))
    try:
        file = open_rows(tmp_path)
    except runs.StageError as error:
        assert "rows.npy was begun with other settings" in str(error)
        return
    kept = np.frombuffer(
        (tmp_path / "rows.npy.partial").read_bytes()[128:][: 12 * file.rows], "<f4"
    )
    np.testing.assert_array_equal(kept, rows[: file.rows].ravel())
    file.append(np.zeros((5 - file.rows, 3)))
    assert np.load(file.finish()).shape == (5, 3)
