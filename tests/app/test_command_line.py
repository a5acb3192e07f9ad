"""The command line as a process: what it prints, its exit status, its arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mini_benchmark import write_benchmark
from vitgal.app import command_line, summary

TOP = Path(__file__).resolve().parents[2]


def vitgal(*arguments: object, python: tuple = (), **environment: str):
    """Executes `python -m vitgal`; stdout and stderr are bytes."""
    command = [sys.executable, *python, "-m", "vitgal", *map(os.fsencode, arguments)]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("coding", ["ascii", "latin-1"])
def test_any_terminal_encoding_succeeds(coding, tmp_path):
    target = tmp_path / "ch\u00e2teau \u57ce \x1b[2J\u202e"
    done = vitgal("notebooks", target, PYTHONIOENCODING=coding)
    assert (done.returncode, done.stderr) == (0, b"") and (target / "params").is_dir()
    visible = {"ascii": b"ch\\xe2teau", "latin-1": b"ch\xe2teau"}[coding]
    assert done.stdout.endswith(b"/" + visible + b" \\u57ce \\x1b[2J\\u202e\n")


def test_a_closed_pipe_is_no_failure():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vitgal", "download", "--list"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_control_characters_in_errors_are_escaped(tmp_path):
    name = os.fsdecode(b"caf\xe9\x1b[2J\xc2\x9b\n\rvitgal: all is well")
    done = vitgal("compare", tmp_path / name, tmp_path)
    assert done.returncode == 1
    assert b"caf\\udce9\\x1b[2J\\x9b" in done.stderr and b"\x1b" not in done.stderr
    wrong = vitgal("run", tmp_path / "none.yaml", "--nowhere\x1b[2J")
    assert wrong.returncode == 2 and b"--nowhere\\x1b[2J" in wrong.stderr


def test_photographs_names_are_escaped_in_the_table(tmp_path):
    (tmp_path / "own").mkdir()
    rows = "rank,photograph,similarity,inliers\n1,a\x1b[2J\u202e.jpg,0.5,\n2,\u57ce.jpg,0.25,7\n"
    (tmp_path / "own" / "ranking.csv").write_text(rows, encoding="utf-8")
    lines = summary.own_summary(tmp_path).splitlines()
    assert lines[1].split() == ["1", r"a\x1b[2J\u202e.jpg", "0.50", "-"]
    assert lines[2].split() == ["2", "\u57ce.jpg", "0.25", "7"]


@pytest.mark.parametrize("form", [["--box", "-5,0,20,20"], ["--box=-5,0,20,20"]])
def test_a_negative_box_is_a_value(form, tmp_path, capsys):
    options = ["own", str(tmp_path), "--query", "-1.jpg", "--output", str(tmp_path / "run")]
    assert command_line.main([*options, *form]) == 2
    output = "vitgal: the command line: query_box is (-5, 0, 20, 20); it must be at least 0\n"
    assert capsys.readouterr().err == output


@pytest.mark.parametrize("box", ["1,2,3", "0,0,1" + "0" * 400 + ",1", "1e400,0,1,1", "a"])
def test_an_invalid_box_is_refused_before_the_run(box, tmp_path, capsys):
    options = ["own", str(tmp_path), "--query", "1.jpg", "--output", str(tmp_path / "run")]
    assert command_line.main([*options, "--box", box]) == 2
    output = capsys.readouterr().err
    assert output.startswith("vitgal: the command line: query_box") and len(output) < 200
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("lr", "-1e-3"), ("max_distances", "-.5,1"), ("seed", "-2")]
)
def test_a_negative_number_may_follow_a_name(name, value):
    options = command_line._parser().parse_args(["run", "x.yaml", "-p", name, value])
    assert options.overrides == [[name, value]]


@pytest.mark.slow
def test_every_command_works_without_docstrings(tmp_path):
    python = ("-OO",)
    assert vitgal("--help", python=python).returncode == 0
    assert b"rparis6k" in vitgal("download", "--list", python=python).stdout
    data = write_benchmark(tmp_path / "mini")
    given = {"dataset": "mini", "dataset_dir": data, "shown_images": ""}
    # An impossible bound, which holds for the demo alone.
    given |= {"global_size": 64, "untrained": "null", "min_medium_map": 1.1}
    options = [text for pair in given.items() for text in ("-p", *map(str, pair))]
    run = ["run", TOP / "params" / "tiny.yaml", "--only", "04", *options]
    done = vitgal(*run, "--output", tmp_path / "a", python=python)
    assert done.returncode == 0, done.stderr
    compared = vitgal("compare", tmp_path / "a", tmp_path / "a", python=python)
    assert compared.returncode == 0, compared.stderr
