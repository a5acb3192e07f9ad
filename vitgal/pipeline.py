"""Executes the numbered notebooks in order with papermill, from one flat file of parameters.

What a notebook takes stands in its own cell tagged `parameters`, one `name: type = value` a line.
Here that cell is read and everything is checked against it before the first notebook starts:
papermill itself only warns of a name that no notebook knows and passes any type on.
"""

import ast
import contextlib
import csv
import difflib
import html
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
import zmq
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from vitgal import runs

CHAIN = "0[1-7]_*.ipynb"
OWN = "08_own_photos.ipynb"  # outside the chain
KERNEL = "python3"
RESTART = 75  # exit status after SIGTERM: sysexits.h's EX_TEMPFAIL, "try again later"
AUTOSAVE = 300  # seconds; a save rewrites the whole notebook, figures and all
KINDS = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}
# A parameter is a path by its name alone, so that every notebook and every file agree on it.
PATH_ENDINGS = ("_dir", "_folder", "_table", "_list", "_file", "_weights")
PATH_NAMES = ("weights", "distractors", "exclude", "photographs", "descriptors")
PROTOCOLS = ("easy", "medium", "hard")
KAPPAS = ("1", "5", "10")


class ParameterError(ValueError):
    """A parameter, a parameter file or a choice of notebooks that cannot be run as it stands."""


class NotebookError(RuntimeError):
    """A notebook stopped; the message has the cell, the error and the partial notebook's path."""


class Preempted(NotebookError):
    """SIGTERM came, a cluster's request to end; the same command goes on, see RESTART."""


class Interrupted(NotebookError):
    """A notebook was stopped by hand (Ctrl-C)."""


@dataclass(frozen=True)
class Declaration:
    """One line of a notebook's `parameters` cell."""

    name: str
    kind: str  # as written: "float | None"
    default: Any
    notebook: str  # the file's stem: "04_global_evaluation"


# Declarations


def declared(notebook: Path) -> dict[str, Declaration]:
    """What a notebook's `parameters` cell declares, by name, in the cell's order.

    Raises ValueError naming the notebook and the line where the cell is missing or doubled, where
    a line is not `name: type = literal`, or where a default is not of its own type.
    """
    cells = [
        cell
        for cell in nbformat.read(notebook, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    if len(cells) != 1:
        raise ValueError(f"{notebook} has {len(cells)} cells tagged `parameters`; it needs one")
    try:
        lines = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ValueError(f"{notebook}, parameters cell, line {error.lineno}: {error.msg}") from None
    found = {}
    for line in lines:
        try:
            declaration = _declaration(line, notebook.stem)
        except ValueError as error:
            shown = ast.unparse(line)
            raise ValueError(f"{notebook}, parameters cell, `{shown}`: {error}") from None
        found[declaration.name] = declaration
    return found


def _declaration(line: ast.stmt, notebook: str) -> Declaration:
    plain = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value
    if not plain:
        raise ValueError("a parameter is written `name: type = value`")
    kind = ast.unparse(line.annotation)
    for option in options(kind):
        if option.removeprefix("list[").rstrip("]") not in KINDS:
            raise ValueError(f"`{kind}` is none of {', '.join(KINDS)}, list[...] or their union")
    default = conform(ast.literal_eval(line.value), kind)
    return Declaration(line.target.id, kind, default, notebook)


def options(kind: str) -> list[str]:
    """The alternatives of a declared type: "float | None" gives ["float", "None"]."""
    node = ast.parse(kind, mode="eval").body
    found = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        found.insert(0, ast.unparse(node.right))
        node = node.left
    return [ast.unparse(node), *found]


def conform(value: Any, kind: str) -> Any:
    """`value` as the declared type holds it: an int becomes a float where float is declared.

    A bool is no int, None needs `X | None`, a float must be finite. Raises ValueError with the
    remedy.
    """
    for option in options(kind):
        if option.startswith("list[") and isinstance(value, list):
            return [conform(item, option[5:-1]) for item in value]
        if option == "float" and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if option in KINDS and option != "float" and type(value) is KINDS[option]:
            return value
    raise ValueError(_complaint(value, kind))


def _complaint(value: Any, kind: str) -> str:
    if isinstance(value, str) and {"int", "float"} & set(options(kind)):
        with contextlib.suppress(ValueError):
            float(value)
            return f"`{value}` is text to YAML; write {yaml_number(value)}"
    if value is None:
        return f"null is only for `X | None`, this is declared `{kind}`"
    return f"{value!r} is {type(value).__name__}, declared is `{kind}`"


def yaml_number(text: str) -> str:
    """A number that YAML takes for text, as YAML wants it: 1e-3 -> 1.0e-3, 1.e5 -> 1.0e+5."""
    mantissa, _, exponent = text.strip().lower().partition("e")
    if not exponent:
        return mantissa
    whole, _, fraction = mantissa.partition(".")
    sign = "" if exponent[0] in "+-" else "+"
    return f"{whole or 0}.{fraction or 0}e{sign}{exponent}"


def parse(text: str, kind: str) -> Any:
    """A command line's text as the declared type: `1e-3` is a float, `007` for `str` stays text.

    A list is written 0.7071,1,1.4142 with or without brackets; None is null. Raises ValueError.
    """
    wanted = options(kind)
    if "None" in wanted and text in ("null", "None", "~"):
        return None
    if "bool" in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "int" in wanted and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if "float" in wanted:
        with contextlib.suppress(ValueError):
            return conform(float(text), "float")
    for option in wanted:
        if option.startswith("list["):
            items = text.strip().removeprefix("[").removesuffix("]").split(",")
            return [parse(item.strip().strip("'\""), option[5:-1]) for item in items if item]
    if "str" in wanted:
        return text
    raise ValueError(f"`{text}` is no {kind}")


# From a file and a command line to what each notebook gets


def read_params(path: Path) -> dict[str, Any]:
    """Reads a flat YAML mapping of parameters.

    Raises FileNotFoundError (naming the files in params/) where there is none, ParameterError
    where it is empty, no mapping, nested, or gives a name twice.
    """
    path = Path(path)
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in runs.resolve("params").glob("*.yaml")))
        raise FileNotFoundError(f"{path} is not there; params/ holds {there or 'no .yaml'}")
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict) or not values:
        shape = "empty" if not values else f"a {type(values).__name__}"
        raise ParameterError(f"{path} is {shape}; it needs lines of `name: value`")
    # PyYAML keeps the last of two equal names without a word.
    names = [key.value for key, _ in tree.value]
    for name in values:
        if names.count(str(name)) > 1:
            raise ParameterError(f"{path} gives {name} {names.count(name)} times")
        if isinstance(values[name], dict):
            raise ParameterError(f"{path}: {name} is a mapping; parameters are flat")
    return values


def chain(folder: Path) -> list[Path]:
    """The numbered notebooks 01 to 07 of a folder, in order; ParameterError where there is none."""
    found = sorted(Path(folder).glob(CHAIN))
    if not found:
        raise ParameterError(f"{folder} holds no numbered notebook ({CHAIN})")
    return found


def own_range(given: dict[str, Any]) -> tuple[dict[str, Any], str | None, str | None]:
    """Takes a file's line `notebooks: 04-07`, the chapters it is made for, from its parameters.

    Returns the parameters without that line, the first and the last notebook (None where there is
    no such line). Raises ParameterError where it is no range of numbers.
    """
    given = dict(given)
    text = given.pop("notebooks", None)
    if text is None:
        return given, None, None
    found = re.fullmatch(r"(\d\d?)-(\d\d?)", text) if isinstance(text, str) else None
    if not found:
        raise ParameterError(f"notebooks: {text!r} is no range such as 04-07")
    return given, found[1], found[2]


def select(
    notebooks: list[Path],
    *,
    only: Iterable[str] | None = None,
    first: str | None = None,
    last: str | None = None,
) -> list[Path]:
    """The notebooks to execute: those named by `only`, or from `first` to `last`, inclusive.

    A notebook is named by its number ("4", "04") or its name. Raises ParameterError.
    """
    numbers = [path.name[:2] for path in notebooks]

    def place(name: str) -> int:
        number = re.match(r"\d*", str(name))[0].zfill(2)
        if number not in numbers:
            raise ParameterError(f"there is no notebook {name!r}; there are {', '.join(numbers)}")
        return numbers.index(number)

    if only is not None:
        if first is not None or last is not None:
            raise ParameterError("--only excludes --from and --to")
        return [notebooks[index] for index in sorted({place(name) for name in only})]
    begin = 0 if first is None else place(first)
    end = len(notebooks) - 1 if last is None else place(last)
    if begin > end:
        raise ParameterError(f"--from {first} comes after --to {last}")
    return notebooks[begin : end + 1]


def is_path(name: str) -> bool:
    """Whether a parameter of this name is a path (`run_dir` is not: it names a run)."""
    return name != "run_dir" and (name.endswith(PATH_ENDINGS) or name in PATH_NAMES)


def combine(
    values: dict[str, Any],
    overrides: dict[str, Any],
    declarations: dict[str, list[Declaration]],
    source: str = "the parameter file",
) -> dict[str, Any]:
    """File and command line as one mapping, checked, in the declared types.

    Every name must be declared by some notebook; text in `overrides` is parsed by the declared
    type, and relative paths there are relative to the current folder. All faults are collected
    and raised as one ParameterError, a line each.
    """
    faults, found = [], {}
    for where, given in ((source, values), ("the command line", overrides)):
        for name, value in given.items():
            if name not in declarations:
                faults.append(f"{where}: no notebook declares {name}{_guess(name, declarations)}")
                continue
            try:
                if given is overrides and isinstance(value, str):
                    value = _from_command_line(name, value, declarations[name][0].kind)
                for declaration in declarations[name]:
                    found[name] = conform(value, declaration.kind)
            except ValueError as error:
                faults.append(f"{where}: {name}: {error}")
    if faults:
        raise ParameterError("\n".join(faults))
    return found


def _from_command_line(name: str, text: str, kind: str) -> Any:
    value = parse(text, kind)
    # `untrained:xcit_...` and addresses are no paths.
    if is_path(name) and isinstance(value, str) and ":" not in value:
        return str(Path.cwd() / Path(value).expanduser())
    return value


def _guess(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# Execution


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
    from vitgal import download

    absent = []
    for name, value in sorted(values.items()):
        if is_path(name) and isinstance(value, str) and not runs.resolve(value).exists():
            source = download.hint(runs.resolve(value))
            if source:
                absent.append(f"{name}: {value} is not there; `vitgal download {source}` brings it")
    if absent:
        raise FileNotFoundError("\n".join(absent))


def execute(notebook: Path, target: Path, parameters: dict[str, Any], *, progress: bool) -> None:
    """Executes one notebook into `target`; raises NotebookError and keeps what there is of it.

    What the kernel process itself writes (a library's complaint, a crash report) goes to a passing
    .log beside the target; the message quotes it where the kernel died.
    """
    log = target.with_suffix(".log")
    asked = threading.Event()
    papermill_engines.register("vitgal", Engine)
    try:
        with _quiet(), _reported(notebook.stem, progress) as bar:
            papermill.execute_notebook(
                _literally(notebook),
                _literally(target),
                parameters=parameters,
                engine_name="vitgal",
                kernel_name=KERNEL,
                cwd=str(notebook.parent),
                progress_bar=bar,
                autosave_cell_every=AUTOSAVE,
                kernel_log=log,
                asked=asked,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"{notebook.name} was interrupted {_last_cell(target)}\n{_partial(target)}\n"
            "run the same command again to go on: finished stages return at once"
        ) from None
    except (PapermillExecutionError, NoSuchKernel, RuntimeError, TimeoutError) as error:
        if asked.is_set():
            raise Preempted(_ended(notebook, target, getattr(error, "evalue", ""))) from None
        raise NotebookError(_told(error, notebook, target, log)) from None
    else:
        if asked.is_set():  # the last cell caught it: it is meant for the whole chain
            raise Preempted(_ended(notebook, target, "it is finished"))
    finally:
        log.unlink(missing_ok=True)


def _ended(notebook: Path, target: Path, said: str) -> str:
    """What to know after SIGTERM."""
    lines = [f"{notebook.name} was asked to end (SIGTERM) {_last_cell(target)}", said]
    lines += [_partial(target), "run the same command again to go on: finished stages return at"]
    return "\n".join(filter(None, lines)) + " once, others go on from what they have saved"


def _told(error: Exception, notebook: Path, target: Path, log: Path) -> str:
    if isinstance(error, PapermillExecutionError):
        return (
            f"{notebook.name} stopped at In [{error.exec_count}]:\n{head(error.source)}\n"
            f"{error.ename}: {error.evalue}\n{_partial(target)}"
        )
    if isinstance(error, DeadKernelError):
        return (
            f"{notebook.name}: the kernel died {_last_cell(target)}\nmost likely the machine ran "
            "out of memory: lower the batch size or the number of workers\n"
            f"{_last_words(log)}{_partial(target)}"
        )
    return f"{notebook.name}: {error}\n{_last_words(log)}{_partial(target)}"


def head(source: str, lines: int = 3) -> str:
    """The first lines of a cell, indented, with an ellipsis where there are more."""
    kept = [f"    {line}" for line in source.splitlines() if line.strip()]
    return "\n".join(kept[:lines] + (["    ..."] if len(kept) > lines else []))


def _last_cell(target: Path) -> str:
    """Where an executed notebook stands: its last cell that was begun."""
    if not target.exists():
        return "before its first cell"
    cells = nbformat.read(target, as_version=4).cells
    begun = [
        index
        for index, cell in enumerate(cells)
        if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time")
    ]
    if not begun:
        return "before its first cell"
    number = sum(cell.cell_type == "code" for cell in cells[: begun[-1] + 1])
    return f"in In [{number}]:\n{head(cells[begun[-1]].source)}"


def _partial(target: Path) -> str:
    return f"the notebook as far as it got: {target}"


def _last_words(log: Path) -> str:
    """What a kernel process wrote before it died, in one line: the fatal one, else the last."""
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line.strip() for line in said if line.strip() and "IPKernelApp" not in line]
    fatal = [line for line in said if line.startswith("Fatal")]
    return f"the kernel's last words: {(fatal or said)[-1]}\n" if said else ""


def _literally(path: Path) -> str:
    """A path that papermill's own `{name}` substitution gives back as it is."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences papermill's log: its warnings repeat what has been checked, or are wrong.

    It does not know `X | None` and warns of every such parameter as unknown.
    """
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reported(name: str, progress: bool) -> Iterator[dict | bool]:
    """Yields papermill's progress_bar: a bar on a terminal, else one line when it is done."""
    if progress and sys.stderr.isatty():
        form = "{desc}: {n_fmt}/{total_fmt} cells [{elapsed}]{postfix}"
        yield {"desc": name, "bar_format": form, "dynamic_ncols": True}
        return
    began = time.monotonic()
    if progress:
        print(f"{name}: ", end="", file=sys.stderr, flush=True)
    outcome = "stopped"
    try:
        yield False
        outcome = "done"
    finally:
        if progress:
            print(f"{outcome} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


class Client(PapermillNotebookClient):
    """papermill's client that shows beside its bar what the running cell last said."""

    shown = 0.0  # when, on the monotonic clock
    label = ""  # of the tqdm bar that moved last

    def process_message(self, message: dict, *args: Any, **kwargs: Any) -> Any:
        """Passes a kernel's message on, after showing its text five times a second at most."""
        text = self.activity(message)
        due = time.monotonic() - self.shown > 0.2 or text == ""
        if text is not None and self.nb_man.pbar is not None and due:
            self.shown = time.monotonic()
            self.nb_man.pbar.set_postfix_str(text[:60])
        try:
            return super().process_message(message, *args, **kwargs)
        finally:
            # What a widget shows is answered on the socket where the cell's end is awaited, and
            # sending there can swallow the sign that something has come in (zmq tells only once):
            # about one cell in a hundred with a widget then waited for ever. Asking looks again.
            self.kc.shell_channel.socket.get(zmq.EVENTS)

    def activity(self, message: dict) -> str | None:
        """What a message says of the cell's progress: text, "" for a new cell, None for nothing.

        Text is the last line of a stream, or the count of a tqdm bar, which in a notebook is three
        widgets: a label `name:  40%`, the bar, a text ` 2/5 [00:01<...]`.
        """
        content = message["content"]
        if message["msg_type"] == "execute_input":
            return ""
        if message["msg_type"] == "stream":
            return (re.split(r"[\r\n]+", content["text"].strip()) or [""])[-1] or None
        value = content.get("data", {}).get("state", {}).get("value")
        if message["msg_type"] != "comm_msg" or not isinstance(value, str):
            return None
        value = " ".join(html.unescape(value).split())
        if value.endswith("%"):
            self.label = value.rpartition(":")[0]
        return f"{self.label} {value}".strip() if re.search(r"\d/\S+ \[", value) else None


class Engine(NBClientEngine):
    """papermill's engine with that client; the kernel's own stdout and stderr go to a file."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        kernel_log: Path,
        asked: threading.Event,
        **ignored: Any,
    ) -> None:
        """Executes the cells without any limit of time; `asked` is set where SIGTERM came."""
        client = Client(
            nb_man,
            kernel_name=kernel_name,
            timeout=None,
            startup_timeout=300,
            iopub_timeout=60,  # a loaded machine may need long to hand a figure over
            log=logging.getLogger("papermill"),
        )
        with open(kernel_log, "wb") as handle, _sigterm_passed_on(client, asked):
            client.execute(stdout=handle, stderr=handle)


@contextlib.contextmanager
def _sigterm_passed_on(client: Client, asked: threading.Event) -> Iterator[None]:
    """SIGTERM goes to the kernel, in which training saves its state and raises; others just end."""

    def pass_on(*_: object) -> None:
        asked.set()
        if client.km is None or not client.km.has_kernel:
            raise NotebookError("SIGTERM came before the kernel had started")
        os.kill(client.km.provisioner.pid, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What a run has reached


def summary(run: Path) -> str:
    """A run's scores as a table (percent), one block a data set, and where to look."""
    run = Path(run)
    rows = []
    for folder in sorted({path.parent.parent for path in run.glob("*/*/scores.json")}):
        rows += ["", *score_lines(folder)]
    figures = sorted(path for path in run.glob("**/figures*") if path.is_dir())
    rows += ["", f"executed notebooks: {run / 'notebooks'}"]
    rows += [f"figures: {path}" for path in figures]
    return "\n".join(rows[1:])


def own_summary(run: Path, lines: int = 10) -> str:
    """The first photographs that the last search found, and where to look."""
    with open(Path(run) / "own" / "ranking.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    width = max([len("photograph"), *(len(row["photograph"]) for row in rows[:lines])])
    found = [f"rank  {'photograph':<{width}}  similarity  inliers"]
    for row in rows[:lines]:
        shown = f"{row['rank']:>4}  {row['photograph']:<{width}}  {float(row['similarity']):>10.2f}"
        found.append(f"{shown}  {row['inliers'] or '-':>7}")
    found += ["", f"all of it: {Path(run) / 'own' / 'ranking.csv'}"]
    return "\n".join([*found, f"executed notebook: {Path(run) / 'notebooks' / OWN}"])


def score_lines(folder: Path) -> list[str]:
    """The scores below `<run>/<dataset>`, aligned: a line a system and protocol, global first.

    mAP comes with its interval as it stands in the file; what a file does not hold is a dash.
    """
    found = {
        path.parent.name: runs.read_json(path) for path in sorted(folder.glob("*/scores.json"))
    }
    order = {"global": "global", "rerank": "reranked"}
    tables = {name: found[name] for name in found if name not in order}
    tables |= {label: found[name] for name, label in order.items() if name in found}
    published = found.get("rerank", {}).get("published")
    if published:
        tables["reranked, published"] = published
    width = max(map(len, [*tables, folder.name]))
    heads = "".join(f"{f'mP@{kappa}':>7}" for kappa in KAPPAS)
    lines = [f"{folder.name:<{width}}  {'':6}{'mAP':>7}{'95 % interval':>16}{heads}"]
    for label, scores in tables.items():
        for protocol in [protocol for protocol in PROTOCOLS if protocol in scores]:
            lines.append(f"{label:<{width}}  {protocol:<6}{_cells(scores[protocol])}")
            label = ""
    return lines


def _cells(scores: dict) -> str:
    """One protocol's mAP, its interval and mP@k in percent, each in its column."""
    low, high = scores.get("interval") or (None, None)
    interval = "-" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
    at = "".join(_percent(scores.get("mp_at", {}).get(kappa)) for kappa in KAPPAS)
    return f"{_percent(scores.get('map'))}{interval:>16}{at}"


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{100 * value:7.1f}"
