"""Executes the numbered notebooks in order with papermill, from one flat file of parameters.

What a notebook takes stands in its own cell tagged `parameters`, one `name: type = value` a line.
Here that cell is read and everything is checked against it before the first notebook starts:
papermill itself only warns of a name that no notebook knows and passes any type on.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitgal import runs
from vitgal.app.execution import execute
from vitgal.app.parameters import (
    Declaration,
    ParameterError,
    chain,
    combine,
    declared,
    is_path,
    own_range,
    read_params,
    select,
)

OWN = "08_own_photos.ipynb"  # outside the chain
RESTART = 75  # exit status after SIGTERM: sysexits.h's EX_TEMPFAIL, "try again later"


def run(
    params: Path | None = None,
    *,
    only: Iterable[str] | None = None,
    first: str | None = None,
    last: str | None = None,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
    notebooks: Path | None = None,
    progress: bool = True,
) -> Path:
    """Executes the chosen notebooks in order and returns the run folder.

    The executed copies are `<run>/notebooks/NN_name.ipynb`, with `worker_count` above 1
    `<run>/notebooks/worker-K/NN_name.ipynb`; each notebook gets just the parameters that it
    declares with another default, and runs in the notebooks' folder, as in JupyterLab.

    Args:
        params: a flat YAML file; None leaves every notebook's own defaults.
        only, first, last: see `select`; without any, the file's own line `notebooks: 04-07` counts,
            else all are executed. Where `first` comes after the training and would read the run's
            own data, which are not there yet, notebook 01 makes them before it.
        overrides: beat the file; text is parsed by the declared type.
        output: the run folder, relative to the current folder; None takes `run_dir`.
        notebooks: the folder of the numbered notebooks; None is the checkout's.
        progress: one line a notebook, on a terminal with its cells and the running bar.
    Raises:
        ParameterError, FileNotFoundError: before anything starts; where data is absent, the message
            has the command that brings it.
        NotebookError: a cell failed, the kernel died or did not start, Ctrl-C was pressed, or
            SIGTERM came (Preempted).
        StageError: another process executes notebooks in this run folder, or it is not writable.
    """
    given, begin, end = own_range(read_params(params) if params else {})
    every = chain(notebooks or runs.checkout() / "notebooks")
    if only is None and first is None and last is None:
        first, last = begin, end
    chosen = select(every, only=only, first=first, last=last)
    where = dict(overrides=overrides or {}, output=output, source=str(params))
    folder, taken = plan(given, every, chosen, **where)
    if first is not None and _lacks_data(folder, every[0], chosen[0], taken):
        if progress:
            print(f"{every[0].stem} comes first: {folder.name} has no data yet", flush=True)
        chosen = [every[0], *chosen]
        folder, taken = plan(given, every, chosen, **where)
    _refuse_absent({name: value for values in taken.values() for name, value in values.items()})
    place = _place(folder, taken)
    with runs.locked(place):
        for path in chosen:
            execute(path, place / path.name, taken[path], progress=progress)
    return folder


def _place(folder: Path, taken: dict[Path, dict[str, Any]]) -> Path:
    """Where the executed copies go: one folder a run, but each of several workers has its own."""
    workers = [values for values in taken.values() if values.get("worker_count", 1) > 1]
    shared = folder / "notebooks"
    return shared / f"worker-{workers[0].get('worker', 0)}" if workers else shared


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

    Args:
        folder: of the photographs. query: one of them by its name in it, or any file. box:
            x0,y0,x1,y1 in pixels of the query; None: all of it.
        overrides, output, notebooks, progress: as in `run`; the run holds the model.
    Raises as `run` does.
    """
    path = (notebooks or runs.checkout() / "notebooks") / OWN
    given = dict(overrides or {}) | {"photographs_folder": str(folder), "query_image": query}
    given |= {} if box is None else {"query_box": box}
    if Path(query).is_file():
        given["query_image"] = str(Path.cwd() / query)
    run_folder, taken = plan({}, [path], [path], overrides=given, output=output)
    _refuse_absent(taken[path])
    with runs.locked(run_folder / "notebooks"):
        execute(path, run_folder / "notebooks" / path.name, taken[path], progress=progress)
    return run_folder


def plan(
    given: dict[str, Any],
    every: list[Path],
    chosen: list[Path],
    *,
    overrides: dict[str, Any],
    output: Path | None = None,
    source: str = "the parameter file",
) -> tuple[Path, dict[Path, dict[str, Any]]]:
    """The run folder, and what each chosen notebook gets of a file's and a command line's values.

    A file may feed any of `every` notebook, a command line only the chosen ones. Starts nothing.
    """
    if output is not None:
        if "run_dir" in overrides:
            raise ParameterError("give either --output or -p run_dir, not both")
        overrides = overrides | {"run_dir": str(Path.cwd() / Path(output).expanduser())}
    by_notebook = {path: declared(path) for path in every}
    declarations: dict[str, list[Declaration]] = {}
    for found in by_notebook.values():
        for name, declaration in found.items():
            declarations.setdefault(name, []).append(declaration)
    values = combine(given, overrides, declarations, source)
    _refuse_idle(overrides, declarations, chosen)
    taken = {path: _news(values, by_notebook[path]) for path in chosen}
    return runs.run_folder(values.get("run_dir") or _default_run(declarations)), taken


def _lacks_data(folder: Path, maker: Path, first: Path, taken: dict[Path, dict]) -> bool:
    """Whether a notebook that evaluates would read data of the run that nobody has made."""
    if "dataset_dir" not in declared(first) or not maker.name.startswith("01"):
        return False
    own = taken[first].get("dataset_dir") is None
    return own and not (folder / "split" / runs.MANIFEST).exists()


def _news(values: dict[str, Any], declarations: dict[str, Declaration]) -> dict[str, Any]:
    """What a notebook declares and does not say itself: a demo's copy stays as it is committed."""
    return {
        name: values[name]
        for name, declaration in declarations.items()
        if name in values and values[name] != declaration.default
    }


def _default_run(declarations: dict[str, list[Declaration]]) -> str:
    if "run_dir" not in declarations:
        raise ParameterError("no notebook declares run_dir: give --output")
    return declarations["run_dir"][0].default


def _refuse_idle(
    overrides: dict[str, Any], declarations: dict[str, list[Declaration]], chosen: list[Path]
) -> None:
    """A file feeds all notebooks; what is typed for a run that does not read it is a mistake."""
    stems = {path.stem for path in chosen}
    for name in overrides:
        users = [declaration.notebook for declaration in declarations[name]]
        if not stems & set(users):
            raise ParameterError(
                f"the command line: {name} has no effect here: only {', '.join(users)} reads it"
            )


def _refuse_absent(values: dict[str, Any]) -> None:
    """Data that `vitgal download` brings must be there; other paths are the notebooks' matter."""
    from vitgal.data.download import sources

    absent = []
    for name, value in sorted(values.items()):
        if is_path(name) and isinstance(value, str) and not runs.resolve(value).exists():
            source = sources.hint(runs.resolve(value))
            if source:
                absent.append(f"{name}: {value} is not there; `vitgal download {source}` brings it")
    if absent:
        raise FileNotFoundError("\n".join(absent))
