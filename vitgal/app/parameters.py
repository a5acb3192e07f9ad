"""The notebooks, and their parameters from a file and the command line.

A notebook takes the settings of its sections (`settings.NOTEBOOKS`) and what its cell tagged
`parameters` declares, one `name: type = value` a line. papermill only warns of an unknown name and
checks no type; here all is checked before the first notebook starts.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from vitgal.settings.reader import (
    NOTEBOOK_RANGE,
    Settings,
    Values,
    checked,
    from_command_line,
    settings_of,
)
from vitgal.settings.section import SettingsError, conform
from vitgal.settings.sections import NOTEBOOKS, all_names

CHAIN = "0[1-7]_*.ipynb"
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "None": None}


@dataclass(frozen=True)
class Declaration:
    """One line of a notebook's `parameters` cell."""

    name: str
    kind: Any  # the type: `float | None`
    default: Any


def declared(notebook: Path) -> dict[str, Declaration]:
    """What a notebook's `parameters` cell declares, by name, in the cell's order.

    Raises ValueError naming the notebook and the line where the cell is missing or not
    unique, a line is not `name: type = literal`, or a default is of another type.
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
    declarations = {}
    for line in lines:
        try:
            declaration = _declaration(line)
        except ValueError as error:
            source = ast.unparse(line)
            raise ValueError(f"{notebook}, parameters cell, `{source}`: {error}") from None
        declarations[declaration.name] = declaration
    return declarations


def _declaration(line: ast.stmt) -> Declaration:
    plain = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value
    if not plain:
        raise ValueError("a parameter is written `name: type = value`")
    kind = _type(line.annotation)
    value = ast.literal_eval(line.value)
    conform(line.target.id, value, kind)
    return Declaration(line.target.id, kind, value)


def _type(node: ast.expr) -> Any:
    """The type that an annotation names: one of TYPES, a list of one, or a union of these."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _type(node.left) | _type(node.right)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "list":
        return list[_type(node.slice)]
    if (name := ast.unparse(node)) in TYPES:
        return TYPES[name]
    raise ValueError(f"`{name}` is none of {', '.join(TYPES)}, list[...] or their union")


def takes(notebook: Path) -> set[str]:
    """The names that a notebook takes: its sections' settings and those that its cell declares."""
    sections = NOTEBOOKS.get(notebook.stem, ())
    return {name for section in sections for name in section.flat()} | set(declared(notebook))


def further_types(notebooks: Iterable[Path]) -> dict[str, Any]:
    """Name -> type of the parameters that are declared by notebooks alone."""
    declarations = {n: d for path in notebooks for n, d in declared(path).items()}
    return {name: d.kind for name, d in declarations.items() if name not in all_names()}


def chain(folder: Path) -> list[Path]:
    """The numbered notebooks 01 to 07 of a folder, in order; SettingsError where there is none."""
    notebooks = sorted(Path(folder).glob(CHAIN))
    if not notebooks:
        raise SettingsError(f"{folder} holds no numbered notebook ({CHAIN})")
    return notebooks


def notebook_range(values: Values) -> tuple[str | None, str | None]:
    """First and last notebook of a file's line `notebooks: 04-07`; None, None without it.

    Raises SettingsError where it is no range of numbers.
    """
    text = values.values.get(NOTEBOOK_RANGE)
    if text is None:
        return None, None
    numbers = re.fullmatch(r"(\d\d?)-(\d\d?)", text) if isinstance(text, str) else None
    if not numbers:
        raise SettingsError(f"{NOTEBOOK_RANGE}: {text!r} is no range such as 04-07")
    return numbers[1], numbers[2]


def select(
    notebooks: list[Path],
    *,
    only: Iterable[str] | None = None,
    first: str | None = None,
    last: str | None = None,
) -> list[Path]:
    """The notebooks to execute: those named by `only`, or from `first` to `last`, inclusive.

    A notebook is named by its number ("4", "04") or its name. Raises SettingsError.
    """
    numbers = [path.name[:2] for path in notebooks]

    def index(name: str) -> int:
        """Returns the position of the notebook with this number or name."""
        number = re.match(r"\d*", str(name))[0].zfill(2)
        if number not in numbers:
            raise SettingsError(f"there is no notebook {name!r}; there are {', '.join(numbers)}")
        return numbers.index(number)

    if only is not None:
        if first is not None or last is not None:
            raise SettingsError("--only excludes --from and --to")
        return [notebooks[position] for position in sorted({index(name) for name in only})]
    begin = 0 if first is None else index(first)
    end = len(notebooks) - 1 if last is None else index(last)
    if begin > end:
        raise SettingsError(f"--from {first} comes after --to {last}")
    return notebooks[begin : end + 1]


def typed(overrides: dict[str, Any], notebooks: list[Path], chosen: list[Path]) -> Values:
    """Returns the values of the command line; SettingsError for one that nothing chosen takes."""
    for name in overrides:
        readers = [path for path in notebooks if name in takes(path)]
        if readers and not set(readers) & set(chosen):
            stems = ", ".join(path.stem for path in readers)
            raise SettingsError(
                f"the command line: {name} has no effect here: only {stems} reads it"
            )
    return from_command_line(overrides, further_types(notebooks))


def injected(values: Values, notebook: Path) -> dict[str, Any]:
    """Returns what papermill injects: the values a notebook takes and does not declare itself."""
    names, cell, found = takes(notebook), declared(notebook), {}
    for name, value in values.values.items():
        plain = list(value) if isinstance(value, tuple) else value
        if name in names and not (name in cell and cell[name].default == plain):
            found[name] = plain
    return found


def settings_in(notebook: Path, values: dict[str, Any]) -> Settings:
    """Returns the settings that a notebook reads where these values are injected into it."""
    cell = {name: line.default for name, line in declared(notebook).items() if name in all_names()}
    kept = {name: value for name, value in values.items() if name in all_names()}
    layers = Values.of(cell, notebook.name) | Values.of(kept, "the injected parameters")
    return settings_of(checked(layers))
