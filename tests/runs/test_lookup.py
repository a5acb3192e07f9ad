"""Facts of many files: by helper processes as in this one, missing ones marked, slow disks."""

import itertools
import os
import sys
import threading
from pathlib import Path

import pytest

from vitgal import runs
from vitgal.runs import lookup


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[str]:
    """70 files in three folders, one with a name that is no UTF-8, and a relative one."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "abc"[k % 3] / f"{k} é.jpg" for k in range(68)]
    paths += [tmp_path / "a" / os.fsdecode(b"caf\xe9.jpg"), Path("b/relative.jpg")]
    for size, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
    return [os.fspath(path) for path in paths]


def expected(paths: list[str]) -> list[int]:
    found = map(os.stat, paths)
    return [n for s in found for n in (s.st_size, s.st_mtime_ns, s.st_ctime_ns)]


def below(files: list[str], folder: str | None) -> list[str]:
    return files if folder is None else [os.path.relpath(file, folder) for file in files]


@pytest.mark.parametrize("folder", [None, ".", "a"])
def test_helpers_find_what_this_process_finds(files, folder, monkeypatch):
    names = below(files, folder)
    assert runs.file_facts(names, folder).tolist() == expected(files)
    monkeypatch.setattr(lookup, "MANY", 20)
    monkeypatch.setattr(lookup, "BLOCK", 24)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    in_this_process = []
    monkeypatch.setattr(lookup, "look_up", in_this_process.append)
    assert runs.file_facts(names, folder).tolist() == expected(files)
    assert not in_this_process


@pytest.mark.parametrize("folder", [None, "a"])
@pytest.mark.parametrize("python", ["/does/not/exist", "/bin/false", None])
def test_without_helpers_this_process_looks(files, monkeypatch, python, folder):
    monkeypatch.setattr(lookup, "MANY", 20)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(sys, "executable", python)
    assert runs.file_facts(below(files, folder), folder).tolist() == expected(files)


def test_a_folder_that_is_not_there_holds_no_file(monkeypatch):
    monkeypatch.setattr(lookup, "MANY", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert runs.file_facts(["x"] * 5, "gone").tolist() == [-1] * 15


def test_a_slow_disk_is_asked_by_threads(files, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(lookup.time, "perf_counter", lambda: float(next(ticks)))
    threads, real = set(), os.stat

    def seen(path):
        threads.add(threading.current_thread())
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", seen)
        found = runs.file_facts(files)
    assert found.tolist() == expected(files)
    assert threads - {threading.current_thread()}


def test_what_is_no_file_is_marked(files, tmp_path):
    names = [files[1], str(tmp_path / "gone"), str(tmp_path), "nul\0", files[2]]
    found = runs.file_facts(names).tolist()
    assert found[3:12] == [-1] * 9
    assert found[:3] + found[12:] == expected(files[1:3])
    assert runs.file_facts([]).tolist() == []


def test_a_missing_image_of_an_input_is_named(files):
    with pytest.raises(FileNotFoundError, match="gone"):
        runs.images_input(["a", "b"], [files[0], "gone"]).stamp()


def test_many_names_are_refused_as_one_is(tmp_path):
    good = ["a.jpg", "b/c.jpg", "d..e.jpg", ".hidden/x"]
    runs.refuse_outside(tmp_path, good)
    runs.refuse_outside(tmp_path, [])
    for wrong in ("", ".", "..", "/etc/passwd", "a/../../b", "nul\0byte", "caf\udce9"):
        with pytest.raises(runs.PathError) as single:
            runs.inside(tmp_path, wrong)
        with pytest.raises(runs.PathError) as listed:
            runs.refuse_outside(tmp_path, [*good, wrong])
        assert str(listed.value) == str(single.value)
