"""One small run of all notebooks, params/tiny.yaml: the same again, reused, and read otherwise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tests.test_notebooks import CHAIN, IGNORED, TOP, codes, sanitized, tags
from vitgal.app import pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tiny") / "first"
    return pipeline.run(TOP / "params" / "tiny.yaml", output=output, progress=False)


def shown(folder: Path) -> dict[str, list]:
    """What the compared cells of a run's executed notebooks show, pictures included."""
    result = {}
    for path in sorted(folder.glob("*.ipynb")):
        cells = codes(nbformat.read(path, as_version=4))
        kept = [cell for cell in cells if not tags(cell) & {*IGNORED, "injected-parameters"}]
        result[path.stem] = [_plain(output) for cell in kept for output in cell.outputs]
    return result


def _plain(output: NotebookNode) -> tuple[str, dict]:
    data = {"text": output.get("text", ""), **output.get("data", {})}
    data.pop("application/vnd.jupyter.widget-view+json", None)  # a random id
    # Pictures are compared as they are: searching megabytes of base64 for times takes a minute.
    texts = {kind: sanitized(str(v)) for kind, v in data.items() if not kind.startswith("image/")}
    return output.output_type, data | texts


def test_a_finished_chain_is_left_as_it_is(tiny_run, capfd):
    copies = {path: path.read_bytes() for path in (tiny_run / "notebooks").glob("*.ipynb")}
    pipeline.run(TOP / "params" / "tiny.yaml", output=tiny_run)
    lines = [f"{path.stem}: unchanged, not run again" for path in CHAIN]
    assert capfd.readouterr().err.splitlines() == lines
    assert {path: path.read_bytes() for path in copies} == copies


def test_cells_show_the_same_when_stages_are_reused(tiny_run):
    """01 to 06 as before, 07 by papermill alone."""
    first = shown(tiny_run / "notebooks")
    assert list(first) == [path.stem for path in CHAIN]
    stages = {path: path.read_bytes() for path in tiny_run.rglob("stage.json")}
    assert stages
    options = dict(between=("01", "06"), output=tiny_run, progress=False)
    pipeline.run(TOP / "params" / "tiny.yaml", again=True, **options)
    executed = tiny_run / "notebooks" / CHAIN[6].name
    executed.unlink()
    # 07 has a widget; it does not answer on the socket of the cell's end.
    command = [sys.executable, "-m", "papermill", str(CHAIN[6]), str(executed)]
    options = ["-f", "params/tiny.yaml", "-p", "run_dir", str(tiny_run)]
    command += [*options, "--cwd", "notebooks", "-k", "python3", "--no-progress-bar"]
    child = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert shown(tiny_run / "notebooks") == first
    assert {path: path.read_bytes() for path in tiny_run.rglob("stage.json")} == stages


def test_the_same_command_gives_the_same_bytes(tiny_run, tmp_path):
    # 07 draws alone
    options = dict(between=("01", "06"), output=tmp_path / "b", progress=False)
    second = pipeline.run(TOP / "params" / "tiny.yaml", **options)

    def results(run: Path) -> dict[str, bytes]:
        kept = [*run.rglob("*.npy"), *run.rglob("*.safetensors"), *run.rglob("scores.json")]
        return {
            str(path.relative_to(run)): path.read_bytes()
            for path in kept
            if "state" not in path.parts
        }

    first = results(tiny_run)
    assert {"model.safetensors", "scores.json"} <= {Path(name).name for name in first}
    assert first.keys() == results(second).keys()
    assert [name for name, content in results(second).items() if content != first[name]] == []


def test_the_validation_set_is_a_benchmark_too(tiny_run, tmp_path):
    run = tmp_path / "validation"
    shutil.copytree(tiny_run, run)
    # 06 of the run has described it already, with the settings of its benchmark
    pipeline.run(
        TOP / "params" / "tiny.yaml",
        between=("04", "06"),
        overrides={"dataset": "val_retrieval", "overwrite": True},
        output=run,
        progress=False,
    )
    for stage in ("global", "rerank"):
        scores = json.loads((run / "val_retrieval" / stage / "scores.json").read_text())
        assert 0 <= scores["medium"]["map"] <= 1
        # every right image is an easy one, so that Hard has no query
        assert scores["hard"]["map"] is None
        low, high = scores["medium"]["interval"]
        assert low <= scores["medium"]["map"] <= high
