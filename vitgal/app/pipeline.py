"""Executes the numbered notebooks in order with papermill, from one flat file of settings.

A notebook takes the settings of its sections (`settings.NOTEBOOKS`) and those that its cell
tagged `parameters` declares, one `name: type = value` a line. papermill only warns about unknown
names and checks no types; this module checks both before the first notebook starts.
"""

import ast
import functools
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgal import runs
from vitgal.app import executed
from vitgal.settings.reader import (
    NOTEBOOK_RANGE,
    Settings,
    Values,
    checked,
    from_command_line,
    read_file,
    settings_of,
)
from vitgal.settings.section import AbsentError, SettingsError, conform
from vitgal.settings.sections import NOTEBOOKS, WEIGHTS, all_names, is_path

CHAIN = "0[1-7]_*.ipynb"
OWN = "08_own_photos.ipynb"  # outside the chain
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "None": None}


def run(
    params: Path | None = None,
    *,
    only: Iterable[str] | None = None,
    between: tuple[str | None, str | None] = (None, None),
    again: bool = False,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
    notebooks: Path | None = None,
    progress: bool = True,
) -> Path:
    """Executes the chosen notebooks in order and returns the run folder.

    A notebook whose executed copy is in this folder is left as it is where nothing has changed
    since (`executed.fingerprints`).

    The executed copies are `<run>/notebooks/NN_name.ipynb`, with `worker_count` above 1
    `<run>/notebooks/worker-K/NN_name.ipynb`; each notebook gets only the parameters that it
    takes and that differ from its own, and runs in the notebooks' folder, as in JupyterLab; those
    of an installed wheel run in the current folder.

    Args:
        params: a flat YAML file; None leaves every notebook's own defaults.
        only, between: see `select`; without any, the file's `notebooks: 04-07` counts, else all
            are executed. Notebook 01 is executed before a first one of 04 or later that needs the
            run's own data, if these are missing.
        again: also executes unchanged ones.
        overrides: replace values of the file; text is parsed by the declared type.
        output: the run folder, relative to the current folder; None takes `run_dir`.
        notebooks: the folder of the numbered notebooks; None is the checkout's, or the wheel's.
        progress: one line a notebook, on a terminal with its cells and the running bar.
    Raises:
        SettingsError: before anything starts; where data is absent, it has the command that brings
            it (AbsentError).
        NotebookError: a notebook stopped, see `execute`.
        StageError: another process executes notebooks in this run folder, or it is not writable.
    """
    values = read_file(params) if params else Values({}, {})
    every = chain(notebooks or runs.resolve("notebooks"))
    if only is None and between == (None, None):
        between = notebook_range(values)
    chosen = select(every, only=only, between=between)
    folder, parameters = plan(values, every, chosen, overrides=overrides, output=output)
    if between[0] is not None and _lacks_data(folder, every[0], chosen[0], parameters):
        if progress:
            print(f"{every[0].stem} comes first: {runs.printable(folder.name)} has no data yet")
        chosen = [every[0], *chosen]
        folder, parameters = plan(values, every, chosen, overrides=overrides, output=output)
    return _execute(folder, parameters, again=again, progress=progress)


def _execute(
    folder: Path, parameters: dict[Path, dict[str, Any]], *, again: bool, progress: bool
) -> Path:
    """Executes notebooks with their parameters; each of several workers has copies of its own."""
    _refuse_absent({n: v for values in parameters.values() for n, v in values.items()})
    copies = folder / "notebooks"
    for values in parameters.values():
        if values.get("worker_count", 1) > 1:
            copies = folder / "notebooks" / f"worker-{values.get('worker', 0)}"
    runs.refuse_links([copies.parent])
    with runs.locked(copies):
        for path, values in parameters.items():
            copy = copies / path.name
            before = _fingerprints(path, values, folder)
            if not again and executed.is_unchanged(copy, before):
                if progress:
                    print(f"{path.stem}: unchanged, not run again", file=sys.stderr)
                continue
            from vitgal.app.execution import execute  # imports papermill

            executed.record_path(copy).unlink(missing_ok=True)
            execute(path, copy, values, progress=progress)
            executed.write_record(copy, before, _fingerprints(path, values, folder))
    return folder


def _fingerprints(notebook: Path, values: dict[str, Any], run: Path) -> dict[str, str] | None:
    """Returns `executed.fingerprints`; None where the notebook has no settings: it will say why."""
    try:
        return executed.fingerprints(notebook, values, settings_in(notebook, values), run)
    except (ValueError, OSError):
        return None


def run_own(
    folder: Path,
    query: str,
    box: str | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
    notebooks: Path | None = None,
    progress: bool = True,
) -> Path:
    """Executes 08_own_photos on a folder of photographs and returns the run folder.

    `query` is one of them by its name in the folder, or any file (see `find_photograph`), `box` its
    x0,y0,x1,y1 in pixels or None for all of it. `output` is the run with the model; the other
    arguments and the errors are those of `run`.
    """
    from vitgal.data.photographs import find_photograph

    if photograph := find_photograph(folder, query, Path.cwd()):
        query = str(photograph)
        print(f"the query is {runs.printable(photograph)}", file=sys.stderr)
    texts = dict(overrides or {}) | {"query_image": query}
    run_folder, parameters = plan_own(folder, box, texts, output, notebooks)
    return _execute(run_folder, parameters, again=True, progress=progress)


def plan_own(
    folder: Path,
    box: str | None,
    overrides: dict[str, Any] | None,
    output: Path | None,
    notebooks: Path | None = None,
) -> tuple[Path, dict[Path, dict[str, Any]]]:
    """Returns what `plan` does for 08_own_photos alone; the arguments are those of `run_own`."""
    path = (notebooks or runs.resolve("notebooks")) / OWN
    texts = dict(overrides or {}) | {"photographs_folder": str(folder)}
    texts |= {} if box is None else {"query_box": box}
    return plan(Values({}, {}), [path], [path], overrides=texts, output=output)


def plan(
    values: Values,
    every: list[Path],
    chosen: list[Path],
    *,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
) -> tuple[Path, dict[Path, dict[str, Any]]]:
    """Returns the run folder, and the parameters of each chosen notebook.

    A file may set parameters of any of `every` notebook, a command line only of the chosen ones.
    Raises SettingsError for an unknown name, a wrong type and a value out of range.
    """
    overrides = dict(overrides or {})
    if output is not None:
        if "run_dir" in overrides:
            raise SettingsError("give either --output or -p run_dir, not both")
        overrides["run_dir"] = str(Path.cwd() / Path(output).expanduser())
    merged = values.without(NOTEBOOK_RANGE) | typed(overrides, every, chosen)
    merged = checked(merged, further_types(every))
    settings = settings_of(merged.without(*further_types(every)))
    for path in chosen:
        for section in NOTEBOOKS.get(path.stem, ()):
            settings.section(section)
    run_dir = merged.values.get("run_dir") or _default_run(every)
    return runs.run_folder(run_dir), {path: injected(merged, path) for path in chosen}


def _lacks_data(folder: Path, maker: Path, first: Path, parameters: dict[Path, dict]) -> bool:
    """Returns whether `first` evaluates the run's own data and the data are missing."""
    evaluates = first.name >= "04" and "dataset_dir" in takes(first)
    own = parameters[first].get("dataset_dir") is None
    finished = (folder / "split" / runs.MANIFEST).exists()
    return evaluates and maker.name.startswith("01") and own and not finished


def _default_run(every: list[Path]) -> str:
    for path in every:
        if "run_dir" in declared(path):
            return declared(path)["run_dir"].default
    raise SettingsError("no notebook declares run_dir: give --output")


def _refuse_absent(values: dict[str, Any]) -> None:
    """Raises AbsentError for missing data that `vitgal download` fetches."""
    absent = []
    for name, value in sorted(values.items()):
        if not is_path(name) or not isinstance(value, str):
            continue
        path = runs.weights_path(value) if name in WEIGHTS else value
        if path is not None and not runs.resolve(path).exists():
            from vitgal.data.download import sources

            source = sources.source_of(runs.resolve(path))
            if source:
                absent.append(f"{name}: {value} is not there; `vitgal download {source}` brings it")
    if absent:
        raise AbsentError("\n".join(absent))


# Parameters


@dataclass(frozen=True)
class Declaration:
    """One line of a notebook's `parameters` cell."""

    name: str
    kind: Any  # the type: `float | None`
    default: Any


def declared(notebook: Path) -> dict[str, Declaration]:
    """Returns what a notebook's `parameters` cell declares, by name, in the cell's order.

    Raises ValueError naming the notebook and the line where the cell is missing or not unique, a
    line is not `name: type = literal`, or a default is of another type.
    """
    return _declared(notebook, notebook.read_bytes())


@functools.lru_cache(maxsize=16)  # each notebook is asked several times, and holds its figures
def _declared(notebook: Path, content: bytes) -> dict[str, Declaration]:
    try:  # nbformat takes a second to import
        cells = json.loads(content)["cells"]
        cells = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{notebook} is no notebook of Jupyter in format 4") from None
    if len(cells) != 1:
        raise ValueError(f"{notebook} has {len(cells)} cells tagged `parameters`; it needs one")
    try:
        lines = ast.parse("".join(cells[0]["source"])).body
        return {line.name: line for line in map(_declaration, lines)}
    except SyntaxError as error:
        raise ValueError(f"{notebook}, parameters cell, line {error.lineno}: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"{notebook}, parameters cell, {error}") from None


def _declaration(line: ast.stmt) -> Declaration:
    try:
        if not (
            isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value
        ):
            raise ValueError("a parameter is written `name: type = value`")
        kind, value = _type(line.annotation), ast.literal_eval(line.value)
        conform(line.target.id, value, kind)
        return Declaration(line.target.id, kind, value)
    except ValueError as error:
        raise ValueError(f"`{ast.unparse(line)}`: {error}") from None


def _type(node: ast.expr) -> Any:
    """Returns an annotation's type: one of TYPES, a list of one, or a union of these."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _type(node.left) | _type(node.right)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "list":
        return list[_type(node.slice)]
    if (name := ast.unparse(node)) in TYPES:
        return TYPES[name]
    raise ValueError(f"`{name}` is none of {', '.join(TYPES)}, list[...] or their union")


def takes(notebook: Path) -> set[str]:
    """Returns the names that a notebook takes: its sections' settings and its cell's."""
    sections = NOTEBOOKS.get(notebook.stem, ())
    return {name for section in sections for name in section.flat()} | set(declared(notebook))


def further_types(notebooks: Iterable[Path]) -> dict[str, Any]:
    """Returns the types of the parameters that notebooks alone declare, by name."""
    declarations = {n: d for path in notebooks for n, d in declared(path).items()}
    return {name: d.kind for name, d in declarations.items() if name not in all_names()}


def chain(folder: Path) -> list[Path]:
    """Returns the notebooks 01 to 07 of a folder, in order; SettingsError where there is none."""
    notebooks = sorted(Path(folder).glob(CHAIN))
    if not notebooks:
        raise SettingsError(f"{folder} holds no numbered notebook ({CHAIN})")
    return notebooks


def notebook_range(values: Values) -> tuple[str | None, str | None]:
    """Returns the ends of a file's line `notebooks: 04-07`; None, None without it.

    Raises SettingsError for a value that is not such a range.
    """
    text = values.values.get(NOTEBOOK_RANGE)
    if text is None:
        return None, None
    numbers = re.fullmatch(r"(\d\d?)-(\d\d?)", text) if isinstance(text, str) else None
    if not numbers:
        raise SettingsError(f"{NOTEBOOK_RANGE}: {runs.short(text)} is not a range such as 04-07")
    return numbers[1], numbers[2]


def select(
    notebooks: list[Path],
    *,
    only: Iterable[str] | None = None,
    between: tuple[str | None, str | None] = (None, None),
) -> list[Path]:
    """Returns those notebooks that `only` names, or `between` two, inclusive; None: an end.

    A notebook is named by its number ("4", "04") or its name. Raises SettingsError.
    """
    numbers = [path.name[:2] for path in notebooks]

    def index(name: str) -> int:
        """Returns the position of the notebook with this number or name."""
        number = re.match(r"\d*", str(name))[0].zfill(2)
        if number not in numbers:
            raise SettingsError(
                f"there is no notebook {runs.short(name)}; there are {', '.join(numbers)}"
            )
        return numbers.index(number)

    first, last = between
    if only is not None:
        if between != (None, None):
            raise SettingsError("--only excludes --from and --to")
        return [notebooks[position] for position in sorted({index(name) for name in only})]
    begin = 0 if first is None else index(first)
    end = len(notebooks) - 1 if last is None else index(last)
    if begin > end:
        raise SettingsError(f"--from {first} comes after --to {last}")
    return notebooks[begin : end + 1]


def typed(overrides: dict[str, Any], notebooks: list[Path], chosen: list[Path]) -> Values:
    """Returns the command line's values; SettingsError for one that no chosen notebook reads."""
    for name in overrides:
        readers = [path for path in notebooks if name in takes(path)]
        if readers and not set(readers) & set(chosen):
            stems = ", ".join(path.stem for path in readers)
            raise SettingsError(
                f"the command line: {name} has no effect here: only {stems} reads it"
            )
    return from_command_line(overrides, further_types(notebooks))


def injected(values: Values, notebook: Path) -> dict[str, Any]:
    """Returns the values to inject: those a notebook reads and does not declare itself."""
    names, cell, chosen = takes(notebook), declared(notebook), {}
    for name, value in values.values.items():
        plain = list(value) if isinstance(value, tuple) else value
        if name in names and not (name in cell and cell[name].default == plain):
            chosen[name] = plain
    return chosen


def settings_in(notebook: Path, values: dict[str, Any]) -> Settings:
    """Returns the settings that a notebook reads where these values are injected into it."""
    cell = {name: line.default for name, line in declared(notebook).items() if name in all_names()}
    kept = {name: value for name, value in values.items() if name in all_names()}
    layers = Values.of(cell, notebook.name) | Values.of(kept, "the injected parameters")
    return settings_of(checked(layers))
