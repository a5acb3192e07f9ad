"""Parameters of notebooks: declared there, given in YAML or on the command line, checked first."""

import ast
import contextlib
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from vitgal import runs

CHAIN = "0[1-7]_*.ipynb"
KINDS = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}
# A parameter is a path by its name alone, so that every notebook and every file agree on it.
PATH_ENDINGS = ("_dir", "_folder", "_table", "_list", "_file", "_weights")
PATH_NAMES = ("weights", "distractors", "exclude", "photographs", "descriptors")


class ParameterError(ValueError):
    """A parameter, a parameter file or a choice of notebooks that cannot be run as it stands."""


@dataclass(frozen=True)
class Declaration:
    """One line of a notebook's `parameters` cell."""

    name: str
    kind: str  # as written: "float | None"
    default: Any
    notebook: str  # the file's stem: "04_global_evaluation"


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
