"""Executes the numbered notebooks in order with papermill, from one flat file of settings."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitgal import runs
from vitgal.app.execution import Preempted, execute
from vitgal.app.parameters import (
    chain,
    declared,
    further_types,
    injected,
    notebook_range,
    select,
    takes,
    typed,
)
from vitgal.settings.reader import NOTEBOOK_RANGE, Values, checked, read_file, settings_of
from vitgal.settings.section import AbsentError, SettingsError
from vitgal.settings.sections import NOTEBOOKS, is_path

OWN = "08_own_photos.ipynb"  # outside the chain
RESTART = Preempted.status


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
    `<run>/notebooks/worker-K/NN_name.ipynb`; each notebook gets only the parameters that it
    takes and that differ from its own, and runs in the notebooks' folder, as in JupyterLab.

    Args:
        params: a flat YAML file; None leaves every notebook's own defaults.
        only, first, last: see `select`; without any, the file's `notebooks: 04-07` counts, else all
            are executed. Notebook 01 is executed before a `first` of 04 or later that needs the
            run's own data, if these are missing.
        overrides: replace values of the file; text is parsed by the declared type.
        output: the run folder, relative to the current folder; None takes `run_dir`.
        notebooks: the folder of the numbered notebooks; None is the checkout's.
        progress: one line a notebook, on a terminal with its cells and the running bar.
    Raises:
        SettingsError: before anything starts; where data is absent, it has the command that brings
            it (AbsentError).
        NotebookError: a notebook stopped, see `execute`.
        StageError: another process executes notebooks in this run folder, or it is not writable.
    """
    values = read_file(params) if params else Values({}, {})
    every = chain(notebooks or runs.checkout() / "notebooks")
    if only is None and first is None and last is None:
        first, last = notebook_range(values)
    chosen = select(every, only=only, first=first, last=last)
    folder, parameters = plan(values, every, chosen, overrides=overrides, output=output)
    if first is not None and _lacks_data(folder, every[0], chosen[0], parameters):
        if progress:
            print(f"{every[0].stem} comes first: {runs.printable(folder.name)} has no data yet")
        chosen = [every[0], *chosen]
        folder, parameters = plan(values, every, chosen, overrides=overrides, output=output)
    return _execute(folder, parameters, progress)


def _execute(folder: Path, parameters: dict[Path, dict[str, Any]], progress: bool) -> Path:
    """Executes notebooks with their parameters; each of several workers has copies of its own."""
    _refuse_absent({n: v for values in parameters.values() for n, v in values.items()})
    copies = folder / "notebooks"
    for values in parameters.values():
        if values.get("worker_count", 1) > 1:
            copies = folder / "notebooks" / f"worker-{values.get('worker', 0)}"
    runs.refuse_links([copies.parent])
    with runs.locked(copies):
        for path, values in parameters.items():
            execute(path, copies / path.name, values, progress=progress)
    return folder


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
    x0,y0,x1,y1 in pixels or None for all of it. The others are as for `run`, which also says what
    is raised; the run holds the model.
    """
    from vitgal.data.photographs import find_photograph

    path = (notebooks or runs.checkout() / "notebooks") / OWN
    texts = dict(overrides or {}) | {"photographs_folder": str(folder), "query_image": query}
    if box is not None:
        texts["query_box"] = box
    if found := find_photograph(folder, query, Path.cwd()):
        texts["query_image"] = str(found)
        print(f"the query is {runs.printable(found)}", file=sys.stderr)
    run_folder, parameters = plan(Values({}, {}), [path], [path], overrides=texts, output=output)
    return _execute(run_folder, parameters, progress)


def plan(
    values: Values,
    every: list[Path],
    chosen: list[Path],
    *,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
) -> tuple[Path, dict[Path, dict[str, Any]]]:
    """The run folder, and the parameters of each chosen notebook.

    A file may set parameters of any of `every` notebook, a command line only of the chosen ones.
    Raises SettingsError for an unknown name, a wrong type and a value out of range.
    """
    overrides = dict(overrides or {})
    if output is not None:
        if "run_dir" in overrides:
            raise SettingsError("give either --output or -p run_dir, not both")
        overrides["run_dir"] = str(Path.cwd() / Path(output).expanduser())
    given = values.without(NOTEBOOK_RANGE) | typed(overrides, every, chosen)
    given = checked(given, further_types(every))
    settings = settings_of(given.without(*further_types(every)))
    for path in chosen:
        for section in NOTEBOOKS.get(path.stem, ()):
            settings.section(section)
    run_dir = given.values.get("run_dir") or _default_run(every)
    return runs.run_folder(run_dir), {path: injected(given, path) for path in chosen}


def _lacks_data(folder: Path, maker: Path, first: Path, parameters: dict[Path, dict]) -> bool:
    """Whether `first` evaluates the run's own data and these are missing."""
    evaluates = first.name >= "04" and "dataset_dir" in takes(first)
    own = parameters[first].get("dataset_dir") is None
    made = (folder / "split" / runs.MANIFEST).exists()
    return evaluates and maker.name.startswith("01") and own and not made


def _default_run(every: list[Path]) -> str:
    for path in every:
        if "run_dir" in declared(path):
            return declared(path)["run_dir"].default
    raise SettingsError("no notebook declares run_dir: give --output")


def _refuse_absent(values: dict[str, Any]) -> None:
    """Raises AbsentError for missing data that `vitgal download` fetches."""
    from vitgal.data.download import sources

    absent = []
    for name, value in sorted(values.items()):
        if is_path(name) and isinstance(value, str) and not runs.resolve(value).exists():
            source = sources.source_of(runs.resolve(value))
            if source:
                absent.append(f"{name}: {value} is not there; `vitgal download {source}` brings it")
    if absent:
        raise AbsentError("\n".join(absent))
