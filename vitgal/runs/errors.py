"""Errors that the user can act on, and safe texts for their messages."""

import datetime
import os
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np


class UserError(Exception):
    """An error that the user can correct; a notebook shows its message without a traceback.

    The cell still fails. Subclasses list this class before a built-in exception. Messages quote
    names and contents of files, so control characters are escaped.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))

    def _render_traceback_(self) -> list[str]:
        """Returns the lines that IPython prints in place of the traceback."""
        return str(self).split("\n")


class StageError(UserError, RuntimeError):
    """A stage cannot begin, continue or be read; the message has the reason and the remedy."""


class PathError(UserError, ValueError):
    """A path that leads out of its folder, or that is a link."""


def printable(text: object) -> str:
    r"""Returns `str(text)` on one line without control characters, as in "a\x1b[2Jb".

    Control characters, newlines, bidirectional overrides, unassigned characters and lone surrogates
    are written as Python escapes; letters of every script stay.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        character if _is_visible(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_visible(character: str) -> bool:
    # The joiners U+200C and U+200D belong to Persian and Indic words and to emoji.
    category = unicodedata.category(character)
    return character in "\u200c\u200d" or category[0] != "C" and category not in ("Zl", "Zp")


def short(value: Any) -> str:
    """Returns a short representation of any value for a message, cut to its first items."""
    text = printable(_SHORT.repr(value))
    return text if len(text) <= 200 else text[:199] + "…"


class _Short(reprlib.Repr):
    """Representations of built-in values; of other objects only the type is shown."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 2
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxdict = 4
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        """Returns the digits of an integer; for a huge one only its size, to save time."""
        return repr(x) if x.bit_length() < 200 else f"<int of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        """Returns a short text for a class that reprlib does not support, or its type."""
        if isinstance(x, np.ndarray):
            return f"<array of {x.dtype.name}, shape {x.shape}>"
        if isinstance(x, bytes):
            return self.repr_str(x[: self.maxstring], level)
        if x is None or isinstance(
            x, (bool, float, complex, np.number, datetime.date, os.PathLike)
        ):
            return super().repr_instance(x, level)
        return f"<{type(x).__name__}>"


_SHORT = _Short()


def abbreviate(names: Sequence[str], limit: int = 3) -> str:
    """Joins names for a message: the first few, and an ellipsis where there are more."""
    return ", ".join(map(printable, names[:limit])) + (", …" if len(names) > limit else "")
