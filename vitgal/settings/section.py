"""Sections of settings: fields with a meaning, a flat name, a strict type and a range."""

import dataclasses
import difflib
import functools
import math
import numbers
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from vitgal.runs.errors import UserError, short

INT64 = 2**63  # the smallest int that does not fit into int64


class SettingsError(UserError, ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message names it."""

    status = 2  # exit status of the command


class AbsentError(SettingsError, FileNotFoundError):
    """A file that a setting names does not exist; the message states how to get it."""


@dataclass(frozen=True)
class Fact:
    """What a setting declares besides its type and default."""

    meaning: str
    flat: str | None = None  # in YAML files and notebooks; None: the field's name
    unit: str | None = None
    published: Any = None  # the published code's value, where the default differs
    choices: tuple = ()
    low: float = -math.inf  # smallest value
    high: float = math.inf  # greatest value
    above: float = -math.inf  # limits that are excluded themselves
    below: float = math.inf
    filled: bool = False  # a list that needs an entry
    later: bool = False  # left out of manifests at its default, so that older runs stay valid
    result: bool = True  # False: results do not depend on the setting, only speed or display
    path: bool = False  # a file or folder


def setting(default: Any, meaning: str, **facts: Any) -> Any:
    """Declares a field of a section; `facts` are further attributes of `Fact`."""
    return field(default=default, metadata={"fact": Fact(meaning, **facts)})


# Declare a field as `setting` does. `neutral`: results do not depend on it, only speed or display.
neutral = functools.partial(setting, result=False)
# `later`: at its default it is left out of manifests, so that older runs stay valid.
later = functools.partial(setting, later=True)


def path(meaning: str, default: str | None = None) -> Any:
    """Declares a file or folder; results depend on its contents, not on its path."""
    return neutral(default, meaning, path=True)


def fact(entry: dataclasses.Field) -> Fact:
    """Returns the facts of a section's field."""
    return entry.metadata["fact"]


class Section:
    """A group of settings; a frozen dataclass that inherits it is validated when it is built.

    A field may itself be a section, whose settings then count as the outer section's own.
    """

    PREFIX: ClassVar[str] = ""  # starts the flat names of the fields in PREFIXED
    PREFIXED: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for entry in fields(self):
            if not isinstance(entry.default, Section):
                check_range(self.flat_name(entry), getattr(self, entry.name), fact(entry))
        self.check()

    def check(self) -> None:
        """Raises SettingsError where settings contradict each other; sections override it."""

    @classmethod
    def flat_name(cls, entry: dataclasses.Field) -> str:
        """Returns the flat name of one of the section's fields."""
        name = fact(entry).flat or entry.name
        return cls.PREFIX + name if entry.name in cls.PREFIXED else name

    @classmethod
    @functools.cache
    def flat(cls) -> dict[str, dataclasses.Field]:
        """Returns the field of each setting, by flat name."""
        entries: dict[str, dataclasses.Field] = {}
        for entry in fields(cls):
            inner = isinstance(entry.default, Section)
            entries |= entry.default.flat() if inner else {cls.flat_name(entry): entry}
        return entries

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Builds the section from values by flat name, ignoring others; raises SettingsError."""
        chosen = {}
        for entry in fields(cls):
            if isinstance(entry.default, Section):
                chosen[entry.name] = entry.default.build(values)
            elif (name := cls.flat_name(entry)) in values:
                chosen[entry.name] = conform(name, values[name], entry.type)
        return cls(**chosen)

    @classmethod
    def from_manifest(cls, parameters: Mapping[str, Any]) -> Self:
        """Builds the section from a manifest's parameters by field name; ignores other names."""
        names = {flat: entry.name for flat, entry in cls.flat().items()}
        return cls.build({f: parameters[name] for f, name in names.items() if name in parameters})

    def compared(self) -> dict[str, Any]:
        """Returns the parameters that results depend on, which manifests of stages compare."""
        parameters = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Section):
                parameters |= value.compared()
            elif fact(entry).result and not (fact(entry).later and value == entry.default):
                parameters[entry.name] = value
        return parameters


def check_range(name: str, value: Any, facts: Fact) -> None:
    """Raises SettingsError for a value that is none of the choices or out of range; None passes."""
    if value is None:
        return
    values = value if isinstance(value, (list, tuple)) else (value,)
    if facts.choices and not set(values) <= set(facts.choices):
        raise SettingsError(f"unknown {name} {short(value)}; known: {', '.join(facts.choices)}")
    if facts.filled and not values:
        raise SettingsError(f"{name} is empty; it needs one entry at least")
    for number in values:
        if isinstance(number, bool) or not isinstance(number, numbers.Real):  # NumPy's as well
            continue
        if isinstance(number, int) and not -INT64 <= number < INT64:
            raise SettingsError(f"{name} is {short(value)}; its numbers must fit into 64 bits")
        if not (facts.low <= number <= facts.high and facts.above < number < facts.below):
            raise SettingsError(f"{name} is {short(value)}; it must be {_range(facts)}")


def _range(facts: Fact) -> str:
    limits = [
        ("above", facts.above, -math.inf),
        ("at least", facts.low, -math.inf),
        ("below", facts.below, math.inf),
        ("at most", facts.high, math.inf),
    ]
    return " and ".join(f"{words} {limit:g}" for words, limit, none in limits if limit != none)


def conform(name: str, value: Any, kind: Any) -> Any:
    """Returns `value` as the declared type `kind`: ints become floats and lists tuples.

    Nothing else is converted: a bool is no int, null needs `X | None`, a float must be finite.
    SettingsError names the setting and the remedy.
    """
    import pydantic

    if isinstance(value, list) and tuple in {typing.get_origin(k) or k for k in alternatives(kind)}:
        value = tuple(value)
    try:
        return _adapter(kind).validate_python(value)
    except pydantic.ValidationError:
        raise SettingsError(f"{name}: {_complaint(value, kind)}") from None


@functools.cache
def _adapter(kind: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))


def alternatives(kind: Any) -> tuple:
    """Returns the alternatives of a type: (float, NoneType) for `float | None`."""
    unions = (typing.Union, type(int | str))
    return typing.get_args(kind) if typing.get_origin(kind) in unions else (kind,)


def _complaint(value: Any, kind: Any) -> str:
    declared = kind.__name__ if isinstance(kind, type) else str(kind)
    if value is None:
        return f"null is only for `X | None`, this is declared `{declared}`"
    if isinstance(value, str) and {int, float} & set(alternatives(kind)):
        try:
            float(value)
        except ValueError:
            pass
        else:
            return f"{short(value)} is text to YAML; write {yaml_number(value)[:40]}"
    return f"{short(value)} is {type(value).__name__}, declared is `{declared}`"


def yaml_number(text: str) -> str:
    """Rewrites a number that YAML reads as text: 1e-3 becomes 1.0e-3, 1.e5 becomes 1.0e+5."""
    mantissa, _, exponent = text.strip().lower().partition("e")
    if not exponent:
        return mantissa
    whole, _, decimals = mantissa.partition(".")
    sign = "" if exponent[0] in "+-" else "+"
    return f"{whole or 0}.{decimals or 0}e{sign}{exponent}"


def guess(name: str, names: Iterable[str]) -> str:
    """Returns a hint at names similar to an unknown one; "" without any."""
    close = difflib.get_close_matches(str(name)[:100], list(names), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""
