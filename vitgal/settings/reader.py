"""Settings from a YAML file, a notebook's parameters cell or the command line.

Lowest precedence first: the sections' defaults, the recipe, the machine, the notebook's cell, the
files that `extends` names, injected or typed values.
"""

import ast
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from vitgal import runs
from vitgal.settings import sections
from vitgal.settings.section import (
    Section,
    SettingsError,
    alternatives,
    conform,
    fact,
    guess,
)

EXTENDS = "extends"
NOTEBOOK_RANGE = "notebooks"  # a file's line `notebooks: 04-07`: which notebooks it is made for
FOLDERS = {"recipe": "recipes", "machine": "machines"}  # below params/
INJECTED = "# Parameters"  # first line of the cell that papermill injects
KERNEL_NAMES = ("In", "Out", "exit", "quit")  # IPython's names in a notebook

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
        return Values({**self.values, **other.values}, {**self.sources, **other.sources})

    def without(self, *names: str) -> "Values":
        """All but these names."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return Values(kept, {name: self.sources[name] for name in kept})


@dataclass(frozen=True)
class Settings(Values):
    """Every setting of a notebook or command; each section is an attribute."""

    def section(self, kind: type[S]) -> S:
        """One section, built from the values; SettingsError names the source of a bad value."""
        try:
            return kind.build(self.values)
        except SettingsError as error:
            names = [n for n in kind.flat() if re.search(rf"\b{n}\b", str(error))]
            source = next((self.sources[name] for name in names if name in self.sources), None)
            raise SettingsError(f"{source}: {error}" if source else str(error)) from None

    @cached_property
    def run(self) -> sections.RunSettings:
        """Where the run's inputs and outputs are."""
        return self.section(sections.RunSettings)

    @cached_property
    def demo(self) -> sections.DemoSettings:
        """The demo data."""
        return self.section(sections.DemoSettings)

    @cached_property
    def split(self) -> sections.SplitSettings:
        """The split."""
        return self.section(sections.SplitSettings)

    @cached_property
    def training(self) -> sections.TrainingSettings:
        """Training of the retrieval model."""
        return self.section(sections.TrainingSettings)

    @cached_property
    def autoencoder(self) -> sections.AutoencoderSettings:
        """Training of the autoencoder."""
        return self.section(sections.AutoencoderSettings)

    @cached_property
    def describing(self) -> sections.GlobalSettings:
        """Global descriptors."""
        return self.section(sections.GlobalSettings)

    @cached_property
    def local(self) -> sections.LocalSettings:
        """Local features."""
        return self.section(sections.LocalSettings)

    @cached_property
    def reranking(self) -> sections.RerankingSettings:
        """Matching, verification and reranking."""
        return self.section(sections.RerankingSettings)

    @cached_property
    def tuning(self) -> sections.TuningSettings:
        """The grid of thresholds."""
        return self.section(sections.TuningSettings)

    @cached_property
    def own(self) -> sections.OwnSettings:
        """A search among one's own photographs."""
        return self.section(sections.OwnSettings)

    @cached_property
    def machine(self) -> sections.MachineSettings:
        """Speed."""
        return self.section(sections.MachineSettings)

    @cached_property
    def show(self) -> sections.ShowSettings:
        """What is drawn and what is asserted."""
        return self.section(sections.ShowSettings)

    def recorded(
        self, folder: Path, kind: type[S], notebook: str, names: Iterable[str] | None = None
    ) -> S:
        """A section with the values that a finished stage's manifest holds.

        Args:
            folder: of the stage.
            notebook: which one makes the stage, for messages.
            names: the flat settings that are taken; None takes all that the manifest has.
        Raises:
            SettingsError: a setting was given another value here.
            StageError: the stage is not finished.
        """
        parameters = runs.read_stage(folder, notebook)["parameters"]
        values, wanted = dict(self.values), self.section(kind).compared()
        for name in kind.flat() if names is None else names:
            field_name = kind.flat()[name].name
            if field_name not in parameters:
                continue
            recorded, here = parameters[field_name], runs.plain(wanted[field_name])
            if name in self.sources and here != recorded:
                raise SettingsError(
                    f"{name} is {here} ({self.sources[name]}), but {folder / runs.MANIFEST} was "
                    f"made with {recorded}: change it in {notebook}, or leave it out here"
                )
            values[name] = recorded
        return kind.build(values)


# YAML files


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a flat YAML mapping of settings.

    Raises FileNotFoundError (naming the files beside it) where there is none, SettingsError where
    it is empty, no mapping, nested, or gives a name twice.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else runs.resolve("params")
        files = ", ".join(sorted(file.name for file in folder.glob("*.yaml")))
        raise FileNotFoundError(f"{path} does not exist; {folder} holds {files or 'no .yaml'}")
    try:
        text = path.read_text(encoding="utf-8")
        tree, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not values:
        shape = "empty" if not values else f"a {type(values).__name__}"
        raise SettingsError(f"{path} is {shape}; it needs lines of `name: value`")
    names = [key.value for key, _ in tree.value]  # PyYAML keeps the last of two equal names
    for name in values:
        if names.count(str(name)) > 1:
            raise SettingsError(f"{path} gives {name} {names.count(name)} times")
        if isinstance(values[name], dict):
            raise SettingsError(f"{path}: {name} is a mapping; settings are flat")
    return values


def read_file(path: Path, parents: tuple[Path, ...] = ()) -> Values:
    """A YAML file's settings, and those of the files that its `extends` names.

    Raises as `read_yaml`, and SettingsError for a file that extends itself, or two extended files
    that disagree on a setting which the file itself does not set.
    """
    path = Path(path).absolute()
    if path.resolve() in [parent.resolve() for parent in parents]:
        chain = " -> ".join(file.name for file in (*parents, path))
        raise SettingsError(f"{path} extends itself: {chain}")
    values = read_yaml(path)
    names = values.pop(EXTENDS, None) or []
    if isinstance(names, str):
        names = [names]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise SettingsError(f"{path}: {EXTENDS} is a file name or a list of them, not {names!r}")
    inherited = Values({}, {})
    for name in names:
        other = read_file(path.parent / name, (*parents, path))
        _refuse_disagreement(path, inherited.without(*values), other.without(*values))
        inherited |= other
    return inherited.without(NOTEBOOK_RANGE) | Values.of(values, str(path))


def _refuse_disagreement(path: Path, first: Values, second: Values) -> None:
    for name in first.values.keys() & second.values.keys() - {NOTEBOOK_RANGE}:
        if first.values[name] != second.values[name]:
            raise SettingsError(
                f"{path} extends two files that disagree: {name} is {first.values[name]!r} in "
                f"{first.sources[name]} and {second.values[name]!r} in {second.sources[name]}; "
                f"set {name} in {path.name}"
            )


def named_files(values: Values) -> Values:
    """The settings of the recipe and the machine that the values name.

    Raises SettingsError for a name that is no file of params/recipes or params/machines.
    """
    layers = Values({}, {})
    for setting, folder in FOLDERS.items():
        name = values.values.get(setting)
        if name is None:
            continue
        path = runs.resolve("params") / folder / f"{name}.yaml"
        if os.sep in str(name) or not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
            raise SettingsError(
                f"{values.sources[setting]}: {setting} {name!r} is none of {known or 'no file'}"
            )
        layers |= read_file(path)
    return layers


def checked(values: Values, names: Mapping[str, Any] | None = None) -> Values:
    """The values in the settings' types; one SettingsError lists every fault.

    names: name -> type of further names that are known, such as a notebook's own.
    """
    known, faults, conformed = sections.all_names(), [], {}
    further = names or {}
    for name, value in values.values.items():
        try:
            if name in known:
                for kind in known[name]:
                    conformed[name] = conform(name, value, kind.types()[name])
            elif name in further:
                conformed[name] = conform(name, value, further[name])
            else:
                hint = guess(name, [*known, *further])
                raise SettingsError(f"there is no setting {name}{hint}")
        except SettingsError as error:
            faults.append(f"{values.sources[name]}: {error}")
    if faults:
        raise SettingsError("\n".join(faults))
    return Values(conformed, values.sources)


def settings_of(values: Values) -> Settings:
    """Settings of checked values, on top of the recipe and the machine that they name."""
    whole = checked(named_files(values)) | values
    return Settings(whole.values, whole.sources)


# A notebook


def read_settings(namespace: Mapping[str, Any]) -> Settings:
    """The settings of a notebook: `settings = read_settings(globals())` after its parameters cell.

    Every plain value in the namespace must be a setting. Injected values override the files that an
    injected `extends` names; these override the notebook's cell. Raises SettingsError.
    """
    plain = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in KERNEL_NAMES
        and isinstance(value, (bool, int, float, str, list, type(None)))
    }
    injected = _injected_names(namespace.get("In", []))
    cell = {name: value for name, value in plain.items() if name not in injected}
    given = {name: value for name, value in plain.items() if name in injected}
    given.pop(NOTEBOOK_RANGE, None)
    extends = given.pop(EXTENDS, None)
    layers = Values.of(cell, "the notebook's parameters cell")
    if extends is not None:
        for name in [extends] if isinstance(extends, str) else extends:
            layers |= read_file(runs.resolve("params") / name).without(NOTEBOOK_RANGE)
    return settings_of(checked(layers | Values.of(given, "the injected parameters")))


def _injected_names(history: list[str]) -> set[str]:
    """The names that papermill's last injected cell assigns."""
    for source in reversed(history):
        if source.startswith(INJECTED):
            body = ast.parse(source).body
            return {t.id for line in body if isinstance(line, ast.Assign) for t in line.targets}
    return set()


# The command line


def parse_text(text: str, kind: Any) -> Any:
    """A command line's text as a setting's type: `1e-3` is a float, `007` for `str` stays text.

    A list is written 0.7071,1,1.4142 with or without brackets; null and None are None. Raises
    SettingsError.
    """
    wanted = alternatives(kind)
    if type(None) in wanted and text in ("null", "None", "~"):
        return None
    if bool in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in wanted and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if float in wanted:
        try:
            return conform("it", float(text), float)
        except ValueError:
            pass
    for option in wanted:
        if get_origin(option) in (tuple, list):
            items = text.strip().removeprefix("[").removesuffix("]").split(",")
            return [parse_text(i.strip().strip("'\""), get_args(option)[0]) for i in items if i]
    if str in wanted:
        return text
    raise SettingsError(f"`{text}` is no {getattr(kind, '__name__', kind)}")


def from_command_line(texts: Mapping[str, str], types: Mapping[str, Any]) -> Values:
    """Settings typed as text; relative paths are relative to the current folder.

    types: name -> type of further names. Raises SettingsError, a line for each fault.
    """
    known, values, faults = sections.all_names(), {}, []
    for name, text in texts.items():
        kind = types.get(name)
        if name in known:
            section = known[name][0]
            entry = section.flat()[name]
            kind = section.types()[name]
        if kind is None or not isinstance(text, str):
            values[name] = text
            continue
        try:
            text.encode()
            values[name] = parse_text(text, kind)
        except (SettingsError, UnicodeEncodeError) as error:
            if isinstance(error, UnicodeEncodeError):
                error = f"{runs.printable(text)} is no UTF-8: rename it"
            faults.append(f"the command line: {name}: {error}")
            continue
        is_path = name in known and fact(entry).path and values[name] is not None
        if is_path and not text.startswith("untrained:"):
            values[name] = str(Path.cwd() / Path(text).expanduser())
    if faults:
        raise SettingsError("\n".join(faults))
    return Values.of(values, "the command line")
