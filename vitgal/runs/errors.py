"""Errors that a reader can act on: their message is shown alone."""


class Told(Exception):
    """A mistake that a person can put right: its message says all, so a notebook shows it alone.

    To be inherited before a built-in exception. IPython prints what `_render_traceback_` gives in
    place of the traceback; the cell fails as ever, and so does a headless run.
    """

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class StageError(Told, RuntimeError):
    """A stage cannot begin, continue or be read; the message says what differs and what to do."""
