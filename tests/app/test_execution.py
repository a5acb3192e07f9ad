"""Which kernel executes a notebook, and what of its printed text the executed copy keeps."""

import json
import sys
from pathlib import Path

import nbformat
import pytest

from vitgal.app import execution, pipeline

PARAMETERS = "run_dir: str = 'a'"


def executed(notebook: Path) -> Path:
    """Executes a notebook alone; returns the executed copy."""
    run = pipeline.run(notebooks=notebook.parent, progress=False)
    return run / "notebooks" / notebook.name


def streams(copy: Path) -> dict[str, str]:
    """What the last cell printed, by stream; each stream is one output."""
    outputs = [o for o in nbformat.read(copy, as_version=4).cells[-1].outputs if "name" in o]
    assert len({output.name for output in outputs}) == len(outputs)
    return {output.name: output.text for output in outputs}


def test_the_kernel_is_this_python(scratch, tmp_path, monkeypatch):
    broken = tmp_path / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    startup = tmp_path / "home" / ".ipython" / "profile_default" / "startup" / "a.py"
    for path in (broken, startup):
        path.parent.mkdir(parents=True)
    argv = ["/no/such/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    broken.write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    startup.write_text("import builtins\nbuiltins.left_over = True")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    monkeypatch.setenv("PYTHONSTARTUP", str(startup))
    source = "import sys\nprint(sys.executable)\nprint('left_over' in dir(__builtins__))"
    copy = executed(scratch("01_a.ipynb", PARAMETERS, source))
    assert streams(copy) == {"stdout": f"{sys.executable}\nFalse\n"}
    kernel = nbformat.read(copy, as_version=4).metadata.kernelspec
    assert kernel == {
        "name": "python3",
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
    }


def test_a_users_matplotlibrc_changes_no_shown_figure(scratch, tmp_path, monkeypatch):
    rc = tmp_path / "matplotlib" / "matplotlibrc"
    rc.parent.mkdir()
    rc.write_text("image.cmap: nowhere\nsavefig.transparent: True\n")
    monkeypatch.setenv("MPLCONFIGDIR", str(rc.parent))
    monkeypatch.setenv("MATPLOTLIBRC", str(rc))
    source = (
        "%matplotlib inline\nimport matplotlib.pyplot as plt\n"
        "plt.plot([1])\nplt.show()\n"
        "print(plt.rcParams['image.cmap'], plt.rcParams['savefig.transparent'])"
    )
    copy = executed(scratch("01_a.ipynb", PARAMETERS, source))
    assert streams(copy) == {"stdout": "viridis False\n"}


def test_another_python_is_refused(scratch, monkeypatch):
    notebook = scratch("01_a.ipynb", PARAMETERS, "print(1)")
    monkeypatch.setattr(execution, "make_ipkernel_cmd", elsewhere(execution.make_ipkernel_cmd))
    with pytest.raises(execution.NotebookError, match="the kernel is '/elsewhere/python', not"):
        executed(notebook)


def elsewhere(command):
    """A kernel's command that reports another interpreter, as a wrapper script may."""

    def changed(extra_arguments):
        python, *rest = command(extra_arguments=extra_arguments)
        code = "import runpy, sys; sys.executable = '/elsewhere/python'; "
        return [
            python,
            "-c",
            code + "runpy.run_module('ipykernel_launcher', run_name='__main__')",
            *rest[2:],
        ]

    return changed


@pytest.mark.slow
def test_a_bar_of_20000_steps_stays_small(scratch):
    """As a text bar in a process of its own draws it: a message for every step."""
    source = (
        "import sys\nfor step in range(20_000):\n"
        "    sys.stderr.write(f'\\rtraining: {step + 1}/20000 [00:01<00:02, 1.0it/s, loss=1.0]')\n"
        "    sys.stderr.flush()\n    if step % 10 == 0: print('step', step, flush=True)"
    )
    copy = executed(scratch("01_a.ipynb", PARAMETERS, source))
    printed = streams(copy)
    assert printed["stderr"].strip() == "training: 20000/20000 [00:01<00:02, 1.0it/s, loss=1.0]"
    assert printed["stdout"].splitlines() == [f"step {step}" for step in range(0, 20_000, 10)]
    assert copy.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["\r1/2", "\r2/2", "\n"], "2/2\n"),
        (["a\n\rb", "\rc"], "a\nc"),
        (["a\r\n", "b\r", "\nc"], "a\r\nb\r\nc"),
        (["ab\r", "c"], "c"),
        (["one ", "line\n", "two"], "one line\ntwo"),
    ],
)
def test_text_is_kept_as_a_terminal_shows_it(pieces, shown):
    text = ""
    for piece in pieces:
        text = execution.appended(text, piece)
    assert text == shown


def test_a_very_long_text_keeps_its_ends():
    text = ""
    for number in range(50_000):
        text = execution.appended(text, f"line {number}\n")
    assert len(text) < execution.PRINTED + 20
    assert text.startswith("line 0\nline 1\n") and text.endswith("line 49999\n")
    assert text.count("\n[...]\n") == 1
    line = execution.appended("", "x" * 1_000_000)  # in time that grows with the length alone
    assert len(line) < execution.PRINTED + 20


def test_undecodable_names_with_latin1_output(scratch, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    source = "import sys\nprint('caf\\udce9', '\\u57ce')\nprint('\\u57ce', file=sys.stderr)"
    copy = executed(scratch("01_a.ipynb", PARAMETERS, source))
    assert streams(copy) == {"stdout": "caf\ufffd \u57ce\n", "stderr": "\u57ce\n"}
