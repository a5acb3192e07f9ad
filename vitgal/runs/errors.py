"""Errors that the user can act on."""

from collections.abc import Sequence


class UserError(Exception):
    """An error that the user can correct; a notebook shows its message without a traceback.

    The cell still fails. Subclasses list this class before a built-in exception.
    """

    def _render_traceback_(self) -> list[str]:
        """Returns the lines that IPython prints in place of the traceback."""
        return str(self).splitlines()


class StageError(UserError, RuntimeError):
    """A stage cannot begin, continue or be read; the message says why and what to do."""


def abbreviate(names: Sequence[str], limit: int = 3) -> str:
    """Joins names for a message: the first few, and an ellipsis where there are more."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
