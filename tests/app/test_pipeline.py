"""Choosing, checking and executing notebooks: on small notebooks written here."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vitgal import runs
from vitgal.app import command_line, execution, pipeline, summary
from vitgal.app.execution import NotebookError
from vitgal.settings.section import SettingsError

FIRST = "run_dir: str = 'demo'\nsize: int = 4  # pixels\nrate: float = 0.5\nname: str | None = None"
SECOND = "run_dir: str = 'demo'\nscales: list[float] = [1.0]\nweights: str | None = None"


@pytest.fixture
def two(scratch) -> Path:
    """Two notebooks that print what they were given, and their folder."""
    scratch("01_first.ipynb", FIRST, "print(size, rate, name)")
    return scratch("02_second.ipynb", SECOND, "print(scales, weights)").parent


def printed(notebook: Path) -> str:
    """All that a notebook's cells printed to stdout."""
    outputs = [output for cell in codes(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def codes(notebook: Path) -> list:
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


# Choosing notebooks


@pytest.mark.slow
def test_a_file_names_its_own_notebooks_and_the_command_line_beats_it(two, tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("notebooks: 02-02\nrun_dir: mine\n")
    for choice, executed in ((dict(), {"02"}), (dict(between=("01", None)), {"01", "02"})):
        folder = pipeline.run(file, notebooks=two, output=tmp_path / f"n{len(executed)}", **choice)
        assert {path.name[:2] for path in (folder / "notebooks").glob("*.ipynb")} == executed


@pytest.mark.slow
def test_evaluation_from_a_fresh_folder_lets_the_data_come_first(scratch, tmp_path):
    # 01 makes the data that 04 would read; what is typed for 04 alone reaches it all the same
    scratch("01_data.ipynb", "run_dir: str = 'demo'\nviews: int = 4", "print(views)")
    scratch("02_train.ipynb", "run_dir: str = 'demo'", "raise ValueError")
    options = "run_dir: str = 'demo'\ndataset_dir: str | None = None\ntop: int = 3"
    folder = scratch("04_eval.ipynb", options, "print(dataset_dir, top)").parent
    shared = dict(notebooks=folder, progress=False)

    def executed(name: str, **choice) -> set[str]:
        run = pipeline.run(output=tmp_path / name, **choice, **shared)
        return {path.name[:2] for path in (run / "notebooks").glob("*.ipynb")}

    assert executed("fresh", between=("04", None), overrides={"top": "5"}) == {"01", "04"}
    assert printed(tmp_path / "fresh/notebooks/04_eval.ipynb") == "None 5\n"
    assert executed("only", only=["04"]) == {"04"}  # as it was asked for
    assert executed("other", between=("04", None), overrides={"dataset_dir": str(tmp_path)}) == {
        "04"
    }
    with runs.stage(tmp_path / "made" / "split", "split", parameters={}, inputs={}) as stage:
        stage.finish([])
    assert executed("made", between=("04", None)) == {"04"}


# Nothing starts on a wrong parameter


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"sizes": "3"}, "no setting sizes; did you mean size"),
        ({"zzz": "3"}, "no setting zzz$"),
        ({"size": "big"}, "size: 'big' is no int"),
        ({"size": True}, "size: True is bool"),
        ({"rate": "nan"}, "rate: "),
    ],
)
def test_wrong_parameters_stop_before_anything_starts(two, tmp_path, overrides, complaint):
    with pytest.raises(SettingsError, match=complaint):
        pipeline.run(overrides=overrides, notebooks=two, output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_every_fault_is_named_at_once(two, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sise: 3\nrate: 1e-3\nsize: 5\n")
    with pytest.raises(SettingsError) as error:
        pipeline.run(file, notebooks=two, progress=False)
    lines = str(error.value).splitlines()
    assert ["sise" in lines[0], "rate" in lines[1], len(lines)] == [True, True, 2]
    assert all(line.startswith(str(file)) for line in lines)
    assert "did you mean size" in lines[0] and "write 1.0e-3" in lines[1]


def test_typed_values_of_unselected_notebooks_are_refused(two):
    with pytest.raises(SettingsError, match="scales has no effect here: only 02_second reads it"):
        pipeline.run(only=["01"], overrides={"scales": "1"}, notebooks=two, progress=False)


def test_output_and_run_dir_exclude_each_other(two, tmp_path):
    with pytest.raises(SettingsError, match="not both"):
        pipeline.run(overrides={"run_dir": "x"}, output=tmp_path, notebooks=two, progress=False)


def test_absent_data_are_reported_with_the_download_command(scratch, tmp_path):
    kinds = "run_dir: str = 'a'\nweights: str | None = None\ndataset_dir: str | None = None"
    folder = scratch("04_a.ipynb", kinds, "print(weights)").parent
    file = tmp_path / "a.yaml"
    absent = tmp_path / "data" / "weights" / "vitgal_s24.pth"
    file.write_text(f"weights: {absent}\ndataset_dir: {tmp_path / 'data' / 'rparis6k'}\n")
    with pytest.raises(FileNotFoundError) as error:
        pipeline.run(file, notebooks=folder, progress=False)
    assert [line.split("; ")[1] for line in str(error.value).splitlines()] == [
        "`vitgal download rparis6k` brings it",
        "`vitgal download vitgal_s24` brings it",
    ]
    assert not (tmp_path / "runs").exists()
    # A path that no source brings may be made by an earlier notebook of the same run.
    built = {"weights": str(tmp_path / "later.safetensors"), "dataset_dir": "null"}
    executed = pipeline.run(file, overrides=built, notebooks=folder, progress=False)
    assert printed(executed / "notebooks" / "04_a.ipynb").strip() == built["weights"]


# Execution


@pytest.mark.slow
def test_each_notebook_gets_what_it_declares(two, tmp_path, capfd):
    file = tmp_path / "a.yaml"
    file.write_text("size: 5\nrate: 2\nscales: [1, 0.5]\nrun_dir: mine\n")
    folder = pipeline.run(file, overrides={"name": "x y", "rate": "1e-3"}, notebooks=two)
    assert folder == tmp_path / "runs" / "mine"
    first, second = folder / "notebooks/01_first.ipynb", folder / "notebooks/02_second.ipynb"
    assert printed(first) == "5 0.001 x y\n"
    assert printed(second) == "[1.0, 0.5] None\n"
    # Nothing of the kernel's or papermill's own noise, one line a notebook.
    visible = capfd.readouterr()
    assert [line.split(" after ")[0] for line in visible.err.splitlines()] == [
        "01_first: done",
        "02_second: done",
    ]
    assert visible.out == ""
    records = [".01_first.json", ".02_second.json"]
    assert sorted(os.listdir(first.parent)) == [*records, ".lock", first.name, second.name]


def test_defaults_inject_nothing(two, tmp_path):
    same = {"run_dir": "demo", "size": 4}
    folder = pipeline.run(only=["01"], overrides=same, notebooks=two, progress=False)
    assert folder == tmp_path / "runs" / "demo"
    executed = folder / "notebooks" / "01_first.ipynb"
    assert printed(executed) == "4 0.5 None\n"
    assert [cell.execution_count for cell in codes(executed)] == [1, 2]
    assert not (folder / "notebooks" / "02_second.ipynb").exists()


def test_notebooks_run_in_their_own_folder_and_paths_may_hold_braces(scratch, tmp_path):
    notebook = scratch("01_a.ipynb", "run_dir: str = 'a'", "import os\nprint(os.getcwd())")
    folder = pipeline.run(
        notebooks=notebook.parent, output=tmp_path / "a {odd} name", progress=False
    )
    assert folder.name == "a {odd} name"
    assert printed(folder / "notebooks" / "01_a.ipynb").strip() == str(notebook.parent)


@pytest.mark.slow
def test_a_failing_cell_stops_the_run_and_a_repaired_one_leaves_no_banner(scratch, tmp_path):
    scratch(
        "01_a.ipynb",
        "run_dir: str = 'a'\nbad: bool = False",
        "x = 1",
        "# look\n\nif bad:\n    raise ValueError('no such\\nthing')\nprint('fine')",
    )
    folder = scratch("02_b.ipynb", "run_dir: str = 'a'", "print('second')").parent
    executed = tmp_path / "out" / "notebooks" / "01_a.ipynb"
    options = {"notebooks": folder, "output": tmp_path / "out", "progress": False}
    with pytest.raises(NotebookError) as error:
        pipeline.run(overrides={"bad": "true"}, **options)
    # In [4]: parameters, injected parameters, `x = 1`, the failing cell.
    assert str(error.value).splitlines() == [
        "01_a.ipynb stopped at In [4]:",
        "    # look",
        "    if bad:",
        "        raise ValueError('no such\\nthing')",
        "    ...",
        "ValueError: no such",
        "thing",
        f"the notebook as far as it got: {executed}",
    ]
    assert "An Exception was encountered" in executed.read_text()
    assert not (executed.parent / "02_b.ipynb").exists()
    pipeline.run(**options)
    assert "Exception" not in executed.read_text()
    assert printed(executed) == "fine\n"
    assert printed(executed.parent / "02_b.ipynb") == "second\n"


@pytest.mark.slow
def test_workers_of_one_notebook_have_each_a_copy_of_their_own(scratch, tmp_path):
    """They run at once: neither the lock nor the file of one is in the other's way."""
    parameters = "run_dir: str = 'a'\nworker: int = 0\nworker_count: int = 1"
    notebook = scratch("05_a.ipynb", parameters, "print(worker, worker_count)")
    options = dict(notebooks=notebook.parent, output=tmp_path / "out", progress=False)
    copies = tmp_path / "out" / "notebooks"
    with runs.locked(copies / "worker-0"):
        for worker in ("1", "2"):
            pipeline.run(**options, overrides={"worker": worker, "worker_count": "3"})
            assert printed(copies / f"worker-{worker}" / "05_a.ipynb") == f"{worker} 3\n"
        with pytest.raises(runs.StageError, match="another process is working in .*worker-0"):
            pipeline.run(**options, overrides={"worker_count": "3"})
    pipeline.run(**options)
    assert printed(copies / "05_a.ipynb") == "0 1\n"


@pytest.mark.slow
def test_a_dead_kernel_is_reported(scratch, tmp_path):
    notebook = scratch("01_a.ipynb", "run_dir: str = 'a'", "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(NotebookError) as error:
        pipeline.run(notebooks=notebook.parent, output=tmp_path / "out", progress=False)
    message = str(error.value)
    assert message.startswith("01_a.ipynb: the kernel died in In [3]:\n    import os")
    assert "out of memory" in message
    assert message.endswith(str(tmp_path / "out" / "notebooks" / "01_a.ipynb"))
    assert (tmp_path / "out" / "notebooks" / "01_a.ipynb").exists()


def test_the_last_output_is_the_fatal_line_else_the_last(tmp_path):
    log = tmp_path / "a.log"
    assert execution.last_output(log) == ""
    log.write_text("[IPKernelApp] WARNING | noise\n\n")
    assert execution.last_output(log) == ""
    log.write_text("Traceback\nModuleNotFoundError: no x\n\n")
    assert execution.last_output(log) == "the kernel's last output: ModuleNotFoundError: no x\n"
    log.write_text("Fatal Python error: Segmentation fault\n  File x\n")
    assert "Segmentation fault" in execution.last_output(log)


def test_two_runs_do_not_share_a_folder(two, tmp_path):
    with runs.locked(tmp_path / "out" / "notebooks"):
        with pytest.raises(runs.StageError, match="another process"):
            pipeline.run(notebooks=two, output=tmp_path / "out", progress=False)


def test_activity_returns_the_running_bar():
    client = execution.Client.__new__(execution.Client)

    def message(kind: str, **content) -> dict:
        return {"msg_type": kind, "content": content}

    def widget(value) -> dict:
        return message("comm_msg", data={"method": "update", "state": {"value": value}})

    assert client.activity(message("execute_input", code="x")) == ""
    assert client.activity(message("stream", text="1 of 3\r2 of 3\n")) == "2 of 3"
    assert client.activity(message("stream", text="\n")) is None
    assert client.activity(widget(2.0)) is None
    assert client.activity(widget("epoch:\u2007 40%")) is None
    assert client.activity(widget("\u20072/5\u2007[00:01&lt;00:02]")) == "epoch 2/5 [00:01<00:02]"
    assert client.activity(message("status", execution_state="busy")) is None


@pytest.mark.slow
def test_cells_with_widgets_do_not_wait_for_ever(scratch, tmp_path):
    # About one such cell in a hundred lost its end before `process_message` asked the socket again.
    cell = "out = widgets.Output()\nwith out:\n    print(1)\n    display(2)"
    notebook = scratch("01_a.ipynb", "run_dir: str = 'a'", "import ipywidgets as widgets")
    content = nbformat.read(notebook, as_version=4)
    content.cells += [nbformat.v4.new_code_cell(cell) for _ in range(200)]
    nbformat.write(content, notebook)
    code = (
        "from pathlib import Path; from vitgal.app import pipeline\n"
        f"pipeline.run(notebooks=Path({str(notebook.parent)!r}), progress=False)"
    )
    # Ten seconds on two quiet cores; the limit only ends a run that would never end.
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    executed = tmp_path / "runs" / "a" / "notebooks" / "01_a.ipynb"
    assert [cell.execution_count for cell in codes(executed)] == list(range(1, 203))


# The command line


def test_command_line_exit_codes(tmp_path, capsys):
    assert command_line.main(["run", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert command_line.main(["run", str(tmp_path / "list.yaml")]) == 2
    assert command_line.main(["download"]) == 2
    for arguments in (["wrong"], [], ["run", "x.yaml", "-p", "name"]):
        with pytest.raises(SystemExit) as stop:
            command_line.main(arguments)
        assert stop.value.code == 2


@pytest.mark.slow
def test_ctrl_c_keeps_the_partial_notebook(scratch, tmp_path):
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    notebook = scratch(
        "01_a.ipynb",
        "run_dir: str = 'a'",
        f"import threading\nopen({str(begun)!r}, 'w').close()\nthreading.Event().wait()",
    )
    code = (
        "import signal, sys; from pathlib import Path; from vitgal.app import pipeline\n"
        # A shell's background job, as which these tests may run, is born deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"pipeline.run(notebooks=Path({str(notebook.parent)!r}), progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    with open(begun):  # returns when the cell opens the other end
        process.send_signal(signal.SIGINT)
    complaint = process.communicate(timeout=60)[1]
    executed = tmp_path / "runs" / "a" / "notebooks" / "01_a.ipynb"
    assert "Interrupted: 01_a.ipynb was interrupted in In [2]:" in complaint
    assert str(executed) in complaint
    assert executed.exists()


SAVES = """import signal, threading
class Preempted(RuntimeError):
    pass
def save(*_):
    raise Preempted("the state is saved")
signal.signal(signal.SIGTERM, save)
open(BEGUN, "w").close()
threading.Event().wait()
"""
ENDS = """import threading
open(BEGUN, "w").close()
threading.Event().wait()
"""
GOES_ON = """import signal, threading
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
open(BEGUN, "w").close()
told.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (SAVES, "the state is saved"),
        pytest.param(ENDS, "In [2]", marks=pytest.mark.slow),
        pytest.param(GOES_ON, "it is finished", marks=pytest.mark.slow),
    ],
)
def test_sigterm_is_forwarded_and_ends_with_75(cell, said, scratch, tmp_path):
    """Whether the cell saves something, as training does, the kernel just ends, or goes on."""
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    cell = cell.replace("BEGUN", repr(str(begun)))
    notebook = scratch("01_a.ipynb", "run_dir: str = 'a'", cell)
    code = (
        "import os, sys; from pathlib import Path; from vitgal.app import execution, pipeline\n"
        "try:\n"
        f"    pipeline.run(notebooks=Path({str(notebook.parent)!r}), progress=False)\n"
        "except execution.Preempted as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(os.EX_TEMPFAIL)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    with open(begun):  # returns when the cell opens the other end
        process.terminate()
    complaint = process.communicate(timeout=120)[1]
    assert process.returncode == 75, complaint
    assert "01_a.ipynb was asked to end (SIGTERM) in In [2]:" in complaint and said in complaint
    assert "run the same command again to go on: finished stages" in complaint


def test_the_command_ends_with_75(monkeypatch, tmp_path, capsys):
    def ended(*_, **__):
        raise execution.Preempted("it was asked to end")

    monkeypatch.setattr(pipeline, "run", ended)
    assert command_line.main(["run", str(tmp_path / "x.yaml")]) == 75
    assert capsys.readouterr().err == "vitgal: it was asked to end\n"


# Scores


def write_scores(folder: Path, value: float, **more) -> None:
    protocol = {"map": value, "mp_at": {"1": 1.0, "5": value, "10": None}, "ap": [value, None]}
    protocol["interval"] = [value - 0.05, value + 0.0375]
    runs.write_json(folder / "scores.json", {"easy": protocol, "medium": protocol} | more)


def test_summary_is_aligned(tmp_path):
    write_scores(tmp_path / "demo/untrained", 0.05)
    write_scores(tmp_path / "demo/global", 0.5)
    published = {"hard": {"map": 0.25, "mp_at": {}, "interval": [None, None]}}
    write_scores(tmp_path / "demo/rerank", 0.875, published=published)
    (tmp_path / "demo/figures").mkdir()
    lines = summary.summary(tmp_path).splitlines()
    scores = lines[: lines.index("")]
    assert len({len(line) for line in scores}) == 1
    width = len("reranked, published")
    assert [line[:width].strip() for line in scores] == [
        *("demo", "untrained", "", "global", "", "reranked", "", "reranked, published")
    ]
    assert scores[0][width:].split() == ["mAP", "95", "%", "interval", "mP@1", "mP@5", "mP@10"]
    assert [line[width:].split() for line in scores[1::2]] == [
        ["easy", "5.0", "0.0", "to", "8.8", "100.0", "5.0", "-"],
        ["easy", "50.0", "45.0", "to", "53.8", "100.0", "50.0", "-"],
        ["easy", "87.5", "82.5", "to", "91.2", "100.0", "87.5", "-"],
        ["hard", "25.0", "-", "-", "-", "-"],
    ]
    assert [line[width:].split()[0] for line in scores[2::2]] == ["medium"] * 3
    assert lines[-3:] == [
        f"executed notebooks: {tmp_path / 'notebooks'}",
        f"to explore it as a page: vitgal report {tmp_path}",
        f"figures: {tmp_path / 'demo/figures'}",
    ]


def test_summary_without_scores(tmp_path):
    assert summary.summary(tmp_path) == f"executed notebooks: {tmp_path / 'notebooks'}"


@pytest.mark.slow
def test_a_notebook_that_fails_ends_the_command_with_1(tmp_path, capsys):
    # No notebook before it has run in this folder.
    params = runs.checkout() / "params" / "tiny.yaml"
    options = ["run", str(params), "--only", "06", "--output"]
    assert command_line.main([*options, str(tmp_path / "empty")]) == 1
    complaint = capsys.readouterr().err
    assert "06_rerank.ipynb stopped at In [" in complaint
    assert "StageError: the stage in" in complaint and "run 05_local_extraction first" in complaint
    partial = tmp_path / "empty" / "notebooks" / "06_rerank.ipynb"
    assert str(partial) in complaint and partial.exists()
    assert not list(tmp_path.rglob("stage.json"))
