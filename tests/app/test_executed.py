"""Unchanged notebooks are not executed again; any doubt means execution."""

import os
import shutil
import site
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from vitgal import runs
from vitgal.app import executed, pipeline
from vitgal.app.execution import NotebookError

CELL = "run_dir: str = 'a'\ndataset: str = 'x'\ndataset_dir: str | None = None\nsize: int = 4"
WEIGHTS = "weights: str | None = None\noverwrite: bool = False\nverify: bool = False"
FLAGS = "save_figures: bool = False\ncompared_run: str | None = None\nmachine: str = 'laptop'"
BEFORE = ("data/a.jpg", "split/train.csv", "retrieval/.lock", "mine/a.txt")
NAMED = {"split": "distractors", "x/global": "refine_set"}  # files that manifests name


class Evaluation:
    """Notebook 04 in a run folder with its finished stages, as if it had been executed."""

    def __init__(self, notebook: Path, top: Path) -> None:
        self.notebook, self.run = notebook, top / "run"
        self.copy = self.run / "notebooks" / notebook.name
        self.values = {"dataset_dir": str(top / "benchmark")}
        for name, file in NAMED.items():
            write(top / file)
            with runs.stage(self.run / name, name, parameters={}, inputs={}) as stage:
                stage.finish([], {file: str(top / file), "weights": None})
        for path in (*(self.run / name for name in BEFORE), self.benchmark / "jpg/a.jpg"):
            write(path)
        write(self.copy)
        executed.write_record(self.copy, self.facts(), self.facts())

    @property
    def benchmark(self) -> Path:
        return Path(self.values["dataset_dir"])

    def facts(self, **values) -> dict[str, str] | None:
        values = self.values | values
        settings = pipeline.settings_in(self.notebook, values)
        return executed.fingerprints(self.notebook, values, settings, self.run)

    def unchanged(self) -> bool:
        return executed.is_unchanged(self.copy, self.facts())


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def edit(notebook: Path) -> None:
    content = nbformat.read(notebook, as_version=4)
    content.cells[-1].source += "  # looked at"
    nbformat.write(content, notebook)


@pytest.fixture
def evaluation(scratch, tmp_path) -> Evaluation:
    source = "\n".join((CELL, WEIGHTS, FLAGS))
    return Evaluation(scratch("04_global_evaluation.ipynb", source, "print(1)"), tmp_path)


# What has changed

CHANGES: dict[str, Callable[[Evaluation], object]] = {
    "the notebook": lambda e: edit(e.notebook),
    "a module beside it": lambda e: write(e.notebook.parent / "helper.py"),
    "the executed copy": lambda e: write(e.copy, "yy"),
    "no executed copy": lambda e: e.copy.unlink(),
    "no record": lambda e: executed.record_path(e.copy).unlink(),
    "half a record": lambda e: write(executed.record_path(e.copy), '{"notebook": "'),
    "another record": lambda e: write(executed.record_path(e.copy), "[1]"),
    "a parameter": lambda e: e.values.update(size=5),
    "its stage, written again": lambda e: os.utime(e.run / "x/global/stage.json", (1, 1)),
    "no stage": lambda e: shutil.rmtree(e.run / "x/global"),
    "an earlier stage": lambda e: write(e.run / "split/train.csv", "yy"),
    "an earlier stage, begun": lambda e: write(e.run / "autoencoder/started.json"),
    "a damaged manifest": lambda e: write(e.run / "split/stage.json", "{"),
    "what an earlier manifest names": lambda e: write(e.run.parent / "distractors", "yy"),
    "what its manifest names": lambda e: write(e.run.parent / "refine_set", "yy"),
    "a file of nobody's": lambda e: write(e.run / "mine/a.txt", "yy"),
    "the benchmark": lambda e: write(e.benchmark / "jpg/b.jpg"),
    "no benchmark": lambda e: shutil.rmtree(e.benchmark),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_noticed(evaluation, change):
    assert evaluation.unchanged()
    CHANGES[change](evaluation)
    assert not evaluation.unchanged()


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "VITGAL_MAX_MEGAPIXELS", "TIMM_FUSED_ATTN"])
def test_environment_variables_that_matter_are_noticed(evaluation, monkeypatch, name):
    with monkeypatch.context() as changed:
        changed.setenv("VITGAL_RUNS", "elsewhere")  # the run folder itself counts
        assert evaluation.unchanged()
        changed.setenv(name, "7")
        assert not evaluation.unchanged()
    assert evaluation.unchanged()
    monkeypatch.setenv("WINDOWID", "7")
    assert evaluation.unchanged()


def test_installed_software_is_noticed(evaluation, monkeypatch, tmp_path):
    package = tmp_path / "site" / "vitgal"
    write(package / "app" / "executed.py")
    monkeypatch.setattr(executed, "__file__", str(package / "app" / "executed.py"))
    assert not evaluation.unchanged()  # other sources
    facts = evaluation.facts()
    executed.write_record(evaluation.copy, facts, facts)
    assert evaluation.unchanged()
    write(package / "stages.py")
    assert not evaluation.unchanged()
    (package / "stages.py").unlink()
    assert evaluation.unchanged()
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "site"))
    assert evaluation.unchanged()
    (tmp_path / "site" / "numpy-99.dist-info").mkdir()
    assert not evaluation.unchanged()


def test_what_later_notebooks_and_other_commands_write_is_no_change(evaluation):
    later = ("x/local/shard-00/a.npy", "x/rerank/a", "val_retrieval/global/a.npy", "codes/a")
    later += ("data/benchmark/gnd_val_retrieval.pkl", "x/matches/1.pdf")
    for name in (*later, "own/a", "report/index.html", "x/map/a.npy", "notebooks/05.ipynb"):
        write(evaluation.run / name)
    assert evaluation.unchanged()
    # of another data set these would be its own
    evaluation.values["dataset"] = "val_retrieval"
    facts = evaluation.facts()
    write(evaluation.run / "val_retrieval/global/a.npy", "yy")
    assert evaluation.facts()["written"] != facts["written"]


DOUBTS = [
    *({name: True} for name in ("overwrite", "verify", "save_figures")),
    *({"weights": name} for name in ("timm:resnet18", "/none.safetensors", "timm:a@/none")),
    *({"compared_run": "b"}, {"worker_count": 2}),
]


@pytest.mark.parametrize("values", DOUBTS, ids=str)
def test_in_doubt_there_is_no_record(evaluation, values):
    assert evaluation.facts(**values) is None
    assert not executed.is_unchanged(evaluation.copy, None)
    record = executed.record_path(evaluation.copy)
    record.unlink()
    executed.write_record(evaluation.copy, None, evaluation.facts())
    executed.write_record(evaluation.copy, evaluation.facts(), None)
    assert not record.exists()


def test_too_many_files_and_loops_of_links_are_not_looked_at(evaluation, monkeypatch):
    assert evaluation.facts(weights="untrained:xcit_nano_12_p16_224") is not None
    for name in ("a", "b"):  # 2**40 paths
        (evaluation.benchmark / name).symlink_to(evaluation.benchmark)
    monkeypatch.setattr(executed, "MOST", 1000)
    assert evaluation.facts() is None


def test_what_changes_meanwhile_is_not_recorded(evaluation):
    before = evaluation.facts()
    write(evaluation.run / "x/global/scores.json")  # the notebook's own result
    executed.record_path(evaluation.copy).unlink()
    executed.write_record(evaluation.copy, before, evaluation.facts())
    assert evaluation.unchanged()
    executed.record_path(evaluation.copy).unlink()
    write(evaluation.run / "split/train.csv", "yy")
    executed.write_record(evaluation.copy, before, evaluation.facts())
    assert not executed.record_path(evaluation.copy).exists()


# Real notebooks

STAGE = """from pathlib import Path
from vitgal import runs
run = runs.run_folder(run_dir)
print(run)
with runs.stage(run / "split", "split", parameters={}, inputs={}) as stage:
    if not stage.finished:
        runs.write_text(run / "split" / "train.csv", "a")
        stage.finish(["train.csv"])
"""
READER = """import os
from pathlib import Path
FLAG = Path(DIES)
if FLAG.exists():
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def execute(scratch, tmp_path, capfd) -> Callable[..., list[str]]:
    """Runs a chain of two notebooks; returns what became of each, a line a notebook."""
    scratch("01_data_split.ipynb", "run_dir: str = 'a'\nsize: int = 4", STAGE)
    reader = READER.replace("DIES", repr(str(tmp_path / "dies")))
    folder = scratch("02_train.ipynb", "run_dir: str = 'a'", reader).parent

    def run(**options) -> list[str]:
        pipeline.run(notebooks=folder, output=tmp_path / "out", **options)
        return [line.split(" after ")[0] for line in capfd.readouterr().err.splitlines()]

    return run


DONE = ["01_data_split: done", "02_train: done"]
SKIPPED = [f"{line.split(':')[0]}: unchanged, not run again" for line in DONE]


def test_a_finished_chain_is_not_executed_again(execute, tmp_path):
    assert execute() == DONE
    copies = sorted((tmp_path / "out" / "notebooks").glob("*.ipynb"))
    contents = [path.read_bytes() for path in copies]
    assert execute() == SKIPPED
    assert [path.read_bytes() for path in copies] == contents
    shutil.rmtree(tmp_path / "out" / "split")
    assert execute(only=["01"]) == DONE[:1]
    assert (tmp_path / "out" / "split" / "train.csv").exists()


@pytest.mark.slow
def test_only_what_has_changed_is_executed(execute, tmp_path):
    assert execute() == DONE
    assert execute(again=True) == DONE
    assert execute(overrides={"size": "5"}) == [DONE[0], SKIPPED[1]]
    assert execute(only=["02"]) == SKIPPED[1:]
    edit(tmp_path / "notebooks" / "02_train.ipynb")
    assert execute(overrides={"size": "5"}) == [SKIPPED[0], DONE[1]]
    # the stage itself is as strict as ever
    (tmp_path / "out" / "split" / "train.csv").write_text("b")
    with pytest.raises(NotebookError, match="not as the stage left it"):
        execute(overrides={"size": "5"})


@pytest.mark.slow
def test_a_killed_notebook_has_no_record(execute, tmp_path, capfd):
    assert execute() == DONE
    (tmp_path / "dies").touch()
    with pytest.raises(NotebookError, match="the kernel died"):
        execute(again=True)
    (tmp_path / "dies").unlink()
    capfd.readouterr()
    assert execute() == [SKIPPED[0], DONE[1]]
