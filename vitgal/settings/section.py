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

from vitgal.runs.errors import UserError


class SettingsError(UserError, ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message names it."""


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
    result: bool = True  # False: results do not depend on the setting, only speed or display
    path: bool = False  # a file or folder


def setting(default: Any, meaning: str, **facts: Any) -> Any:
    """Declares a field of a section; `facts` are further attributes of `Fact`."""
    return field(default=default, metadata={"fact": Fact(meaning, **facts)})


def fact(entry: dataclasses.Field) -> Fact:
    """Returns the facts of a section's field."""
    return entry.metadata["fact"]


class Section:
    """A group of settings; a frozen dataclass that inherits it is validated when it is built."""

    PREFIX: ClassVar[str] = ""  # starts the flat names of the fields in PREFIXED
    PREFIXED: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for entry in fields(self):
            if "fact" in entry.metadata:
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
        return {cls.flat_name(entry): entry for entry in fields(cls) if "fact" in entry.metadata}

    @classmethod
    @functools.cache
    def types(cls) -> dict[str, Any]:
        """Returns the type of each setting, by flat name."""
        return {name: field_types(cls)[entry.name] for name, entry in cls.flat().items()}

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Builds the section from values by flat name; ignores the names of other sections.

        SettingsError names a value of the wrong type or out of range.
        """
        types = cls.types()
        chosen = {
            entry.name: conform(name, values[name], types[name])
            for name, entry in cls.flat().items()
            if name in values
        }
        return cls(**chosen)

    @classmethod
    def from_manifest(cls, parameters: Mapping[str, Any]) -> Self:
        """Builds the section from a manifest's parameters by field name; ignores other names."""
        names = {flat: entry.name for flat, entry in cls.flat().items()}
        return cls.build({f: parameters[name] for f, name in names.items() if name in parameters})

    def compared(self) -> dict[str, Any]:
        """Returns the parameters that results depend on, which manifests of stages compare."""
        return {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if "fact" in entry.metadata and fact(entry).result
        }


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """Returns the type of each field of a dataclass, by the field's name."""
    return typing.get_type_hints(section)


def check_range(name: str, value: Any, facts: Fact) -> None:
    """Raises SettingsError for a value that is none of the choices or out of range; None passes."""
    if value is None:
        return
    if facts.choices and value not in facts.choices:
        raise SettingsError(f"unknown {name} {value!r}; known: {', '.join(facts.choices)}")
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(number, bool) or not isinstance(number, numbers.Real):  # NumPy's as well
            continue
        if not (facts.low <= number <= facts.high and facts.above < number < facts.below):
            raise SettingsError(f"{name} is {value}; it must be {_range(facts)}")


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
    return typing.get_args(kind) if typing.get_origin(kind) in UNIONS else (kind,)


UNIONS = (typing.Union, type(int | str))


def _complaint(value: Any, kind: Any) -> str:
    declared = kind.__name__ if isinstance(kind, type) else str(kind)
    if isinstance(value, str) and {int, float} & set(alternatives(kind)):
        try:
            float(value)
        except ValueError:
            pass
        else:
            return f"`{value}` is text to YAML; write {yaml_number(value)}"
    if value is None:
        return f"null is only for `X | None`, this is declared `{declared}`"
    return f"{value!r} is {type(value).__name__}, declared is `{declared}`"


def yaml_number(text: str) -> str:
    """Rewrites a number that YAML reads as text: 1e-3 becomes 1.0e-3, 1.e5 becomes 1.0e+5."""
    mantissa, _, exponent = text.strip().lower().partition("e")
    if not exponent:
        return mantissa
    whole, _, decimals = mantissa.partition(".")
    sign = "" if exponent[0] in "+-" else "+"
    return f"{whole or 0}.{decimals or 0}e{sign}{exponent}"


def guess(name: str, names: Iterable[str]) -> str:
    """Returns a hint at the names that resemble an unknown one; "" where none does."""
    close = difflib.get_close_matches(str(name), list(names), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""
