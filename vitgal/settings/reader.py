"""Settings from a YAML file, a notebook's parameters cell or the command line.

Lowest precedence first: the sections' defaults, the recipe, the machine, the notebook's cell, the
files that `extends` names, injected or typed values.
"""

import ast
import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from vitgal import runs
from vitgal.settings import sections
from vitgal.settings.section import (
    AbsentError,
    Section,
    SettingsError,
    alternatives,
    conform,
    guess,
)

EXTENDS = "extends"
NOTEBOOK_RANGE = "notebooks"  # a file's line `notebooks: 04-07`: the notebooks that it is meant for
FOLDERS = {"recipe": "recipes", "machine": "machines"}  # below params/
INJECTED = "# Parameters"  # first line of the cell that papermill injects
KERNEL_NAMES = ("In", "Out", "exit", "quit")  # IPython's names in a notebook
READING = "read_settings(globals())"

LARGEST = 100_000  # bytes of a YAML file; PyYAML takes a second for them
DEPTH = 4  # the document, its value, a list in it, an entry
LONGEST_CHAIN = 8  # files of which each extends the next
MOST_FAULTS = 10  # that one message lists

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Values:
    """Flat settings, and for each the file, notebook or command line that set it."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> "Values":
        """Values that all come from one source."""
        return cls(dict(values), dict.fromkeys(values, source))

    def __or__(self, other: "Values") -> "Values":
        """Merges two; the other's value wins."""
        return Values(self.values | other.values, self.sources | other.sources)

    def without(self, *names: str) -> "Values":
        """All but these names."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return Values(kept, {name: self.sources[name] for name in kept})


def _view(kind: type[S]) -> S:
    """Declares an attribute of `Settings`: a section, built on first access."""
    return cached_property(lambda settings: settings.section(kind))  # type: ignore


@dataclass(frozen=True)
class Settings(Values):
    """Every setting of a notebook or command; each section is an attribute."""

    run = _view(sections.RunSettings)
    demo = _view(sections.DemoSettings)
    split = _view(sections.SplitSettings)
    training = _view(sections.TrainingSettings)
    autoencoder = _view(sections.AutoencoderSettings)
    describing = _view(sections.GlobalSettings)
    local = _view(sections.LocalSettings)
    reranking = _view(sections.RerankingSettings)
    tuning = _view(sections.TuningSettings)
    own = _view(sections.OwnSettings)
    machine = _view(sections.MachineSettings)
    show = _view(sections.ShowSettings)

    def section(self, kind: type[S]) -> S:
        """Builds one section; SettingsError names the source of a bad value."""
        try:
            return kind.build(self.values)
        except SettingsError as error:
            names = [n for n in kind.flat() if re.search(rf"\b{n}\b", str(error))]
            source = next((self.sources[name] for name in names if name in self.sources), None)
            raise SettingsError(f"{source}: {error}" if source else str(error)) from None

    def recorded(
        self, folder: Path, kind: type[S], notebook: str, names: Iterable[str] | None = None
    ) -> S:
        """Returns a section with the values in the manifest of the finished stage in `folder`.

        names: the flat names of the settings to read; None: all. Raises SettingsError where a
        setting has another value here, StageError (naming `notebook`) for an unfinished stage.
        """
        parameters = runs.read_stage(folder, notebook)["parameters"]
        values, wanted = dict(self.values), self.section(kind).compared()
        for name in kind.flat() if names is None else names:
            entry = kind.flat()[name]
            if entry.name not in parameters:
                continue
            recorded = parameters[entry.name]
            here = runs.plain(wanted.get(entry.name, entry.default))
            if name in self.sources and here != recorded:
                raise SettingsError(
                    f"{name} is {runs.short(here)} ({self.sources[name]}), but "
                    f"{folder / runs.MANIFEST} was made with {runs.short(recorded)}: change it in "
                    f"{notebook}, or leave it out here"
                )
            values[name] = recorded
        return kind.build(values)


# YAML files


class _FlatLoader(yaml.SafeLoader):
    """A YAML loader that refuses references, and nesting deeper than a list in a list."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node; raises YAMLError for a reference or a deeper nesting."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a reference (*name); write the value out")
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.YAMLError("it is nested; settings are flat")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a flat YAML mapping of settings; UTF-8, or UTF-16 with a byte order mark.

    Raises AbsentError (naming the files beside it) where there is none, SettingsError where
    it is empty, too large, no mapping, nested, or gives a name twice.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises for a very long name
        folder = path.parent if os.path.isdir(path.parent) else runs.resolve("params")
        files = runs.abbreviate(sorted(file.name for file in folder.glob("*.yaml")), 30)
        raise AbsentError(f"there is no file {path}; {folder} holds {files or 'no .yaml'}")
    if path.stat().st_size > LARGEST:
        raise SettingsError(f"{path} is too large for settings: above {LARGEST:,} bytes")
    try:
        loader = _FlatLoader(path.read_bytes())
        tree = loader.get_single_node()
        values = loader.construct_document(tree) if tree else None
    except Exception as error:  # for a wrong date or !!tag PyYAML raises nearly anything
        reason = runs.printable(" ".join(str(error).split()))[:300]
        raise SettingsError(f"{path} is not YAML of settings: {reason}") from None
    if not isinstance(values, dict) or not values:
        shape = "empty" if not values else f"a {type(values).__name__}"
        raise SettingsError(f"{path} is {shape}; it needs lines of `name: value`")
    # PyYAML keeps the last of two equal names.
    (name, count), *_ = Counter(key.value for key, _ in tree.value).most_common(1)
    if count > 1:
        raise SettingsError(f"{path} gives {runs.short(name)} {count} times")
    for name, value in values.items():
        if isinstance(value, dict):
            raise SettingsError(f"{path}: {runs.short(name)} is a mapping; settings are flat")
    return values


def read_file(
    path: Path, parents: tuple[Path, ...] = (), finished: dict[str, Values] | None = None
) -> Values:
    """Reads a YAML file's settings, and those of the files that its `extends` names.

    parents: the files that extend this one. finished: those read already, so that a file that
    several others extend is read once.

    Raises as `read_yaml`, and SettingsError for a file that extends itself, or two extended files
    that disagree on a setting which the file itself does not set.
    """
    path, key = Path(path).absolute(), os.path.abspath(path)
    finished = {} if finished is None else finished
    if key in finished:
        return finished[key]
    values = read_yaml(path)
    chain = (*parents, path.resolve())
    if path.resolve() in parents or len(chain) > LONGEST_CHAIN:
        names = " -> ".join(file.name for file in chain)
        raise SettingsError(f"{path} extends itself, or too many others: {names}")
    names = values.pop(EXTENDS, None) or []
    if isinstance(names, str):
        names = [names]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise SettingsError(
            f"{path}: {EXTENDS} is a file name or a list of them, not {runs.short(names)}"
        )
    inherited = Values({}, {})
    for name in dict.fromkeys(names):
        other = read_file(path.parent / name, chain, finished)
        _refuse_disagreement(path, inherited.without(*values), other.without(*values))
        inherited |= other
    finished[key] = inherited.without(NOTEBOOK_RANGE) | Values.of(values, str(path))
    return finished[key]


def _refuse_disagreement(path: Path, first: Values, second: Values) -> None:
    for name in first.values.keys() & second.values.keys() - {NOTEBOOK_RANGE}:
        if first.values[name] != second.values[name]:
            before, after = (
                f"{runs.short(v.values[name])} in {v.sources[name]}" for v in (first, second)
            )
            raise SettingsError(
                f"{path} extends two files that disagree: {name} is {before} and {after}; "
                f"set {name} in {path.name}"
            )


def named_files(values: Values) -> Values:
    """Returns the named recipe's and machine's settings; SettingsError for unknown names."""
    layers = Values({}, {})
    for setting, folder in FOLDERS.items():
        name = values.values.get(setting)
        if name is None:
            continue
        paths = {file.stem: file for file in (runs.resolve("params") / folder).glob("*.yaml")}
        if name not in paths:
            source, names = values.sources[setting], ", ".join(sorted(paths)) or "no file"
            raise SettingsError(f"{source}: {setting} {runs.short(name)} is none of {names}")
        layers |= read_file(paths[name])
    return layers


def checked(values: Values, further: Mapping[str, Any] | None = None) -> Values:
    """Returns the values in the settings' types; SettingsError has a line for each fault.

    further: types of additional names, such as a notebook's own.
    """
    types = (further or {}) | {name: entry.type for name, entry in sections.all_names().items()}
    faults, conformed = [], {}
    for name, value in values.values.items():
        try:
            if name not in types:
                hint = guess(name, types) if len(faults) < MOST_FAULTS else ""
                label = runs.printable(str(name)[:100])
                raise SettingsError(f"there is no setting {label}{hint}")
            conformed[name] = conform(name, value, types[name])
        except SettingsError as error:
            faults.append(f"{values.sources[name]}: {error}")
    _refuse(faults)
    return Values(conformed, values.sources)


def _refuse(faults: list[str]) -> None:
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], f"and {len(faults) - MOST_FAULTS} more faults"]
    if faults:
        raise SettingsError("\n".join(faults))


def settings_of(values: Values) -> Settings:
    """Returns settings of checked values, on top of the recipe and the machine that they name."""
    whole = checked(named_files(values)) | values
    return Settings(whole.values, whole.sources)


# A notebook


def read_settings(namespace: Mapping[str, Any]) -> Settings:
    """Reads a notebook's settings: `settings = read_settings(globals())` after its parameters cell.

    Every plain value that the parameters cell set must be a setting; what later cells have left in
    the kernel is not looked at, so that cells can be run again. Injected values override the files
    that an injected `extends` names; these override the notebook's cell. Raises SettingsError.
    """
    history = namespace.get("In", [])
    declared = _declared_names(history)
    plain = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in KERNEL_NAMES
        and (declared is None or name in declared)
        and isinstance(value, (bool, int, float, str, list, type(None)))
    }
    cells = (source for source in reversed(history) if source.startswith(INJECTED))
    injected = _assigned_names(next(cells, ""))[1]
    cell = {name: value for name, value in plain.items() if name not in injected}
    values = {name: value for name, value in plain.items() if name in injected}
    values.pop(NOTEBOOK_RANGE, None)
    extends = values.pop(EXTENDS, None)
    layers = Values.of(cell, "the notebook's parameters cell")
    if extends is not None:
        for name in [extends] if isinstance(extends, str) else extends:
            layers |= read_file(runs.resolve("params") / name).without(NOTEBOOK_RANGE)
    return settings_of(checked(layers | Values.of(values, "the injected parameters")))


def _declared_names(history: list[str]) -> set[str] | None:
    """The names that cells of parameters assigned; None where the kernel keeps no history.

    Such a cell was run before settings were first read, has a typed value, or was injected.
    """
    if not any(READING in source for source in history):
        return None
    names: set[str] = set()
    before = True
    for source in history:
        before = before and READING not in source
        typed, untyped = _assigned_names(source)
        if before or typed or source.startswith(INJECTED):
            names |= typed | untyped
    return names


def _assigned_names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell assigns with a type and without; none of a cell with a magic."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set(), set()
    typed = [line.target for line in body if isinstance(line, ast.AnnAssign)]
    untyped = [target for line in body if isinstance(line, ast.Assign) for target in line.targets]
    return tuple({t.id for t in part if isinstance(t, ast.Name)} for part in (typed, untyped))


# The command line


def parse_text(text: str, kind: Any) -> Any:
    """Returns a command line's text as a setting's type; SettingsError for text of another type.

    `1e-3` is a float, `007` for `str` stays text; a list is written 0.7071,1,1.4142 with or without
    brackets; null and None are None.
    """
    wanted = alternatives(kind)
    if type(None) in wanted and text in ("null", "None", "~"):
        return None
    if bool in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in wanted and re.fullmatch(r"[+-]?\d{1,4000}", text):  # int() refuses more digits
        return int(text)
    if float in wanted:
        with contextlib.suppress(ValueError):
            return conform("it", float(text), float)
    for option in wanted:
        if get_origin(option) in (tuple, list):
            items = text.strip().removeprefix("[").removesuffix("]").split(",")
            return [parse_text(i.strip().strip("'\""), get_args(option)[0]) for i in items if i]
    if str in wanted:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise SettingsError(f"{runs.printable(text)} is no UTF-8: rename it")
        return text
    raise SettingsError(f"{runs.short(text)} is no {getattr(kind, '__name__', kind)}")


def from_command_line(texts: Mapping[str, str], further: Mapping[str, Any]) -> Values:
    """Returns settings typed as text; relative paths are relative to the current folder.

    further: types of additional names. Raises SettingsError, with a line for each fault.
    """
    names, values, faults = sections.all_names(), {}, []
    for name, text in texts.items():
        kind = names[name].type if name in names else further.get(name)
        values[name] = text
        if kind is None or not isinstance(text, str):
            continue
        try:
            values[name] = parse_text(text, kind)
        except SettingsError as error:
            faults.append(f"the command line: {name}: {error}")
            continue
        if values[name] is None or not sections.is_path(name):
            continue
        is_model, folder = name in sections.WEIGHTS, Path.cwd()
        path = runs.resolve_source(text, folder) if is_model else folder / Path(text).expanduser()
        values[name] = str(path)
    _refuse(faults)
    return Values.of(values, "the command line")
