"""The committed notebooks: hygiene, and proof that comparing their stored outputs means something.

The strict comparison itself is `pytest --nbval notebooks/` in `make test`.
"""

import ast
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from nbval.plugin import get_sanitize_patterns

from vitgal.app import pipeline
from vitgal.features.store.feature_store import FeatureStore

TOP = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
CHAIN = [path for path in NOTEBOOKS if path.match(pipeline.CHAIN)]
SANITIZE = TOP / "tests" / "sanitize.cfg"
LIMIT = 1_500_000  # bytes; above this GitHub shows a notebook badly or not at all
LINES = 15
IGNORED = {"nbval-ignore-output", "nbval-skip"}
# A slash and at least two names, where neither an address nor a fraction nor a tag goes before.
ABSOLUTE = re.compile(r"(?<![\w.~:/<*])/[A-Za-z][\w.-]*/[\w.-]+")


# Hygiene: one function a rule, each yields what is wrong


def codes(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def texts(cell: NotebookNode) -> Iterator[str]:
    """What a cell shows as text: streams, reprs, HTML; no pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield value


def python(cell: NotebookNode) -> ast.Module:
    """A cell's statements, without IPython's own lines."""
    lines = [line for line in cell.source.splitlines() if not line.startswith(("%", "!"))]
    return ast.parse("\n".join(lines))


def executed(notebook: NotebookNode) -> Iterator[str]:
    """Without counts nbval compares nothing; out of order, nobody can reproduce what is shown."""
    counts = [cell.execution_count for cell in codes(notebook) if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}"
    for cell in codes(notebook):
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"a stored error in {head(cell)}"


def clean(notebook: NotebookNode) -> Iterator[str]:
    """No trace of the machine that executed it."""
    if stray := {"papermill", "widgets"} & notebook.metadata.keys():
        yield f"metadata.{'/'.join(sorted(stray))}"
    for cell in notebook.cells:
        if stray := {"papermill", "execution", "scrolled"} & cell.metadata.keys():
            yield f"cell metadata {'/'.join(sorted(stray))} in {head(cell)}"
        if tags(cell) & {"injected-parameters", "papermill-error-cell-tag"}:
            yield f"a cell of papermill's: {head(cell)}"
        source = re.sub(r"<\w+>", "x", cell.source)  # placeholders, as in runs/<run>/split
        visible = [source, *(texts(cell) if cell.cell_type == "code" else [])]
        for result in filter(None, map(ABSOLUTE.search, visible)):
            yield f"an absolute path {result[0]} in {head(cell)}"


def parameters(notebook: NotebookNode) -> Iterator[str]:
    """One tagged cell, the first with code; `pipeline.declared` checks what is in it."""
    tagged = [index for index, cell in enumerate(codes(notebook)) if "parameters" in tags(cell)]
    if tagged != [0]:
        yield f"the first code cell, and no other, is tagged parameters (tagged: {tagged})"
    for index in tagged:
        # papermill's own inspection, and a reader, take a line at a time.
        for line in python(codes(notebook)[index]).body:
            if line.lineno != line.end_lineno:
                yield f"`{ast.unparse(line)}` is more than one line: shorten its comment"


def kernel(notebook: NotebookNode) -> Iterator[str]:
    name = notebook.metadata.get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"kernel {name}"
    if notebook.metadata.get("language_info", {}).get("name") != "python":
        yield "no language_info.name python"
    if len({cell.get("id") for cell in notebook.cells}) != len(notebook.cells):
        yield "cells without ids of their own"


def short(notebook: NotebookNode) -> Iterator[str]:
    """Logic is in the package: small cells, one function at most (for `interact`)."""
    for cell in codes(notebook):
        long = len(cell.source.splitlines()) > LINES
        if long and "parameters" not in tags(cell) and "interact" not in cell.source:
            yield f"{len(cell.source.splitlines())} lines in {head(cell)}"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for cell in codes(notebook) for node in ast.walk(python(cell))]
    if sum(isinstance(node, kinds) for node in nodes) > 1:
        yield "more than one def"


def portable(notebook: NotebookNode) -> Iterator[str]:
    """Nothing that only works, or only shows, in one of JupyterLab, papermill and nbval."""
    for cell in codes(notebook):
        for line in cell.source.splitlines():
            if re.match(r"\s*(!|%cd|%pip|%%|.*sys\.path)", line):
                yield f"`{line.strip()}`"
        if cell.source.rstrip().endswith(";"):
            yield f"a last `;`, which nbval does not obey, in {head(cell)}"
        unknown = {tag for tag in tags(cell) if tag.upper().startswith("NBVAL")}
        unknown -= {"nbval-ignore-output", "nbval-check-output"}
        if unknown | (tags(cell) & {"raises-exception"}):
            yield f"tags {sorted(tags(cell))}: obeyed by one tool alone, or by none"
        if "NBVAL_" in cell.source:
            yield f"a comment for nbval, where a tag would not show, in {head(cell)}"
        if re.search(r"\binteract\(", cell.source) and not tags(cell) & IGNORED:
            yield f"interact without the tag nbval-ignore-output in {head(cell)}"


def imports(notebook: NotebookNode) -> Iterator[str]:
    if not any(re.search(r"^(from|import) vitgal", cell.source, re.M) for cell in codes(notebook)):
        yield "does not import vitgal"


def compared(notebook: NotebookNode) -> Iterator[str]:
    """Most of what is shown is compared, and some of it is text that can differ."""
    visible = [cell for cell in codes(notebook) if cell.outputs]
    kept = [cell for cell in visible if not tags(cell) & IGNORED]
    if not visible or 2 * len(kept) < len(visible):
        yield f"{len(kept)} of {len(visible)} cells with output are compared"
    if not any(re.search(r"\d", text) for cell in kept for text in texts(cell)):
        yield "no compared output has a number in it"


def captioned(notebook: NotebookNode) -> Iterator[str]:
    """Each cell that shows figures is followed by a caption; they are numbered from 1 on."""
    number, following = 0, [*notebook.cells[1:], None]
    for cell, after in zip(notebook.cells, following, strict=True):
        if cell.cell_type == "code" and "plt.show()" in cell.source:
            number += 1
            text = "" if after is None or after.cell_type == "code" else after.source
            if not re.match(rf"\*\*Figure \d\.{number}\.\*\* \w", text):
                yield f"no caption Figure {number} after {head(cell)}"


def head(cell: NotebookNode) -> str:
    return repr(cell.source[:40])


RULES = (executed, clean, parameters, kernel, short, portable, imports, compared, captioned)


def complaints(notebook: NotebookNode) -> list[str]:
    return [f"{rule.__name__}: {text}" for rule in RULES for text in rule(notebook)]


def test_the_seven_notebooks_are_there():
    names = "data_split train train_autoencoder global_evaluation local_extraction rerank"
    names = [*names.split(), "match_visualization"]
    expected = [f"{number:02d}_{name}" for number, name in enumerate(names, 1)]
    assert [path.stem for path in CHAIN] == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_hygiene(path):
    assert complaints(nbformat.read(path, as_version=4)) == []
    assert path.stat().st_size < LIMIT


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_plain_typed_literals(path):
    result = pipeline.declared(path)
    assert path not in CHAIN or result["run_dir"].kind is str


# The rules themselves


@pytest.fixture
def good(scratch: Callable) -> NotebookNode:
    path = scratch(
        "01_a.ipynb",
        "run_dir: str = 'a'  # the run's name",
        "from vitgal import runs",
        "print('mAP 51.2, 3/4 of 10 at https://example.org/a/b in runs/a/b')",
    )
    notebook = nbformat.read(path, as_version=4)
    for count, cell in enumerate(notebook.cells, 1):
        cell.execution_count = count
    text = "mAP 51.2, 3/4 of 10 at https://example.org/a/b in runs/a/b\n"
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text=text)]
    return notebook


def test_a_good_notebook_has_no_complaints(good):
    assert complaints(good) == []


def _set(**fields) -> Callable[[NotebookNode], None]:
    """Changes the last cell; `metadata` and `tags` go where they belong."""

    def change(notebook: NotebookNode) -> None:
        cell = notebook.cells[2]
        if "tags" in fields:
            cell.metadata["tags"] = fields["tags"]
        cell.metadata.update(fields.get("metadata", {}))
        cell.update({key: fields[key] for key in fields.keys() - {"tags", "metadata"}})

    return change


def _shows(text: str) -> Callable[[NotebookNode], None]:
    return _set(outputs=[nbformat.v4.new_output("stream", text=text)])


def _html(text: str) -> Callable[[NotebookNode], None]:
    return _set(outputs=[nbformat.v4.new_output("display_data", {"text/html": text + " 1"})])


@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        ("executed", _set(execution_count=None)),
        ("executed", _set(execution_count=7)),
        ("executed", _set(outputs=[nbformat.v4.new_output("error", ename="E", traceback=[])])),
        ("clean", _set(metadata={"papermill": {"duration": 1}})),
        ("clean", _set(metadata={"execution": {"iopub.status.busy": "now"}})),
        ("clean", _set(tags=["injected-parameters"])),
        ("clean", lambda notebook: notebook.metadata.update(widgets={"state": {}})),
        ("clean", _shows("1 saved to /home/me/runs/a.npy\n")),
        ("clean", _html("<td>/data/a/b.jpg</td>")),
        ("clean", _set(source="open('/data/a.txt')")),
        ("clean", _set(source="# see `/data/<name>/a.txt`")),
        ("parameters", lambda notebook: notebook.cells[0].metadata.clear()),
        ("parameters", _set(tags=["parameters"])),
        ("parameters", lambda notebook: notebook.cells[0].update(source="a: int = (\n    1\n)")),
        ("kernel", lambda notebook: notebook.metadata.kernelspec.update(name="cv")),
        ("kernel", lambda notebook: notebook.cells[1].update(id=notebook.cells[2].id)),
        ("short", _set(source="x = 1\n" * 16)),
        ("short", _set(source="def f():\n    def g(): pass")),
        ("portable", _set(source="!ls")),
        ("portable", _set(source="%cd ..")),
        ("portable", _set(source="import sys\nsys.path.append('x')")),
        ("portable", _set(source="plot(1);")),
        ("portable", _set(tags=["NBVAL_IGNORE_OUTPUT"])),
        ("portable", _set(tags=["raises-exception"])),
        ("portable", _set(source="# NBVAL_IGNORE_OUTPUT\nprint(1)")),
        ("portable", _set(source="interact(show, index=3)")),
        ("imports", lambda notebook: notebook.cells[1].update(source="import os")),
        ("compared", _set(tags=["nbval-ignore-output"])),
        ("compared", _set(outputs=[])),
        ("compared", _shows("done\n")),
        ("captioned", _set(source="plt.show()")),
    ],
)
def test_each_rule_sees_its_damage(good, rule, damage):
    damage(good)
    assert any(text.startswith(f"{rule}: ") for text in complaints(good)), complaints(good)


def test_placeholders_are_no_absolute_paths(good):
    good.cells[1].source = "# writes <run>/demo/global/scores.json\nfrom vitgal import runs"
    assert complaints(good) == []


def test_long_cells_of_parameters_and_interact_are_allowed(good):
    good.cells[0].source += "\n# what it is" * 20
    good.cells[2].source = "interact(show, x=1)\n" + "y = 2\n" * 20
    assert [text for text in complaints(good) if text.startswith("short")] == []


# What nbval does not compare


def sanitized(text: str) -> str:
    for pattern, replacement in get_sanitize_patterns(SANITIZE.read_text()):
        text = re.sub(pattern, replacement, text)
    return text


def test_every_pattern_of_sanitize_cfg_is_obeyed():
    # nbval drops a pair silently where the blank after `replace:` is missing.
    text = SANITIZE.read_text()
    pairs = get_sanitize_patterns(text)
    assert (
        len(pairs) == len(re.findall("^regex:", text, re.M)) == len(re.findall("^rep", text, re.M))
    )
    assert all(replacement for _, replacement in pairs)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        ("20%|##   | 2/10 [00:01<00:04,  1.9it/s]", "20%|##   | 2/10 [01:11:02<?, ?it/s]"),
        ("/tmp/ipykernel_12/345.py:3: UserWarning: x", "/var/x/ipykernel_9/1.py:3: UserWarning: x"),
        ("/a/b/site-packages/torch/x.py:3: W", "/c/site-packages/torch/x.py:3: W"),
        ("<object at 0x7f0a1b2c3d4e>", "<object at 0x7fffffffffff>"),
        ("gained: 0.26 measured; required: 0.1", "gained: 0.31 measured; required: 0.1"),
    ],
)
def test_sanitize_hides_irrelevant_outputs(stored, computed):
    assert stored != computed
    assert sanitized(stored) == sanitized(computed)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        ("mAP 51.2", "mAP 51.3"),
        ("20%|##   | 2/10 [00:01<00:04]", "20%|##   | 2/11 [00:01<00:04]"),
        ("saved runs/a", "saved runs/b"),
        ("[1:2]", "[1:3]"),
        ("0x10", "0x11"),
        ("gained: 0.26 measured; required: 0.1", "gained: 0.26 measured; required: 0.2"),
    ],
)
def test_sanitize_hides_nothing_else(stored, computed):
    assert sanitized(stored) != sanitized(computed)


# On the finished run of `make test`


def nbval(path: Path, run: Path) -> subprocess.CompletedProcess:
    """Runs strict nbval on one notebook, with the project's settings, in an existing run folder."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--nbval"]
    environment = os.environ | {"VITGAL_RUNS": str(run.parent)}
    return subprocess.run(
        [*command, "-c", str(TOP / "pyproject.toml"), str(path)],
        cwd=TOP,
        env=environment,
        capture_output=True,
        text=True,
    )


def altered(notebook: NotebookNode) -> NotebookNode:
    """The notebook with one digit of its first compared text output changed."""
    notebook = copy.deepcopy(notebook)
    for cell in codes(notebook):
        for output in cell.outputs if not tags(cell) & IGNORED else []:
            text = output.get("text", "")
            for result in re.finditer(r"\d", text):
                digit = str((int(result[0]) + 1) % 10)
                output["text"] = text[: result.start()] + digit + text[result.end() :]
                if sanitized(output["text"]) != sanitized(text):
                    return notebook
    raise AssertionError("no compared cell prints a number")


def measured(number: str) -> list[float]:
    """The numbers that a committed notebook states as measured."""
    (path,) = (path for path in CHAIN if path.name.startswith(number))
    cells = codes(nbformat.read(path, as_version=4))
    shown = "\n".join(text for cell in cells for text in texts(cell))
    return [float(value) for value in re.findall(r"(-?\d+\.\d+) measured", shown)]


def test_measured_numbers_are_those_of_a_run_here(finished_run):
    def score(stage: str) -> dict:
        return json.loads((finished_run / "demo" / stage / "scores.json").read_text())

    with open(finished_run / "retrieval" / "log.jsonl") as lines:
        curve = [e["val_map"] for e in map(json.loads, lines) if e.get("val_map") is not None]
    medium = score("global")["medium"]["map"]
    untrained = score("global-untrained")["medium"]["map"]
    reranked = score("rerank")
    features = FeatureStore.open(finished_run / "demo" / "local")
    here = {
        "02": [curve[-1] - curve[0]],
        "04": [medium - untrained, medium],
        "05": [np.mean([len(features[name]) for name in features])],
        "06": [reranked["hard"]["map"] - reranked["global"]["hard"]["map"]],
    }
    # Training in bfloat16 differs between processors: mAP by 0.01 to 0.03, features by a few.
    for number, values in here.items():
        assert measured(number) == pytest.approx(values, abs=0.06, rel=0.05), number


@pytest.mark.slow
def test_one_altered_digit_fails_the_comparison(finished_run, tmp_path):
    path = CHAIN[0]
    notebook = nbformat.read(path, as_version=4)
    nbformat.write(altered(notebook), tmp_path / path.name)
    other = nbval(tmp_path / path.name, finished_run)
    assert other.returncode == 1
    assert "Cell outputs differ" in other.stdout
    assert re.search(r"\b1 failed, \d+ passed", other.stdout), other.stdout[-3000:]
