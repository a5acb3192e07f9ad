"""Parts of the browsers: a list to choose from, and the output that shows figures.

Pictures are `widgets.Image` and words `widgets.HTML`, not `widgets.Output`: with it about one cell
in a hundred of a headless run never ended (see `execution.Client.process_message`).
"""

import contextlib
import html
import io
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt

from vitgal import runs
from vitgal.viz.style import ERROR_COLOUR

Options = Sequence[tuple[str, int]]  # the entries of a list: text and index
NARROW = widgets.Layout(width="3em")
WIDE = widgets.Layout(width="26em")
LIST = widgets.Layout(width="36em")  # a name, its label and its numbers
NATURAL = widgets.Layout(align_self="flex-start", max_width="100%")  # not stretched


class FigureOutput:
    """The output of a browser: a line of words, and the pictures under it."""

    def __init__(self) -> None:
        self.words = widgets.HTML()
        self.pictures = widgets.VBox()
        self.widget = widgets.VBox([self.words, self.pictures])

    def draw(self, work: Callable[..., object], *arguments: object) -> None:
        """Shows the figures that `work(*arguments)` opens and what it prints.

        Closes these figures and leaves others open. Raises what `work` raises.
        """
        pictures, words = _capture(work, *arguments)
        self.show(pictures, words)

    def redraw(self, work: Callable[..., object], *arguments: object) -> None:
        """Shows as `draw` does, or the error in place of the picture."""
        try:
            self.draw(work, *arguments)
        except Exception as error:
            self.show_error(_describe(error))

    def show(self, pictures: Sequence[bytes], words: str = "", *, colour: str = "inherit") -> None:
        """Shows .png pictures and words."""
        style = f"color:{colour};white-space:pre-wrap"
        self.words.value = f"<pre style='{style}'>{html.escape(words.strip())}</pre>"
        images = self.pictures.children
        if len(images) != len(pictures):  # else the old ones are filled anew, without flicker
            images = [widgets.Image(format="png", layout=NATURAL) for _ in pictures]
        for image, picture in zip(images, pictures, strict=True):
            image.value = picture
        self.pictures.children = tuple(images)

    def show_error(self, message: str) -> None:
        """Shows a message in red and no picture."""
        self.show([], message, colour=ERROR_COLOUR)


def _capture(work: Callable[..., object], *arguments: object) -> tuple[list[bytes], str]:
    """The pictures of the figures that `work` opens, and the text that it prints."""
    others, text = set(plt.get_fignums()), io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            work(*arguments)
        numbers = sorted(set(plt.get_fignums()) - others)
        return [_png(plt.figure(number)) for number in numbers], text.getvalue()
    finally:
        for number in set(plt.get_fignums()) - others:
            plt.close(number)


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    # Little compression, which took a quarter of the time of a redraw.
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def _describe(error: Exception) -> str:
    """The message of a UserError; of any other also type and line."""
    if isinstance(error, runs.UserError):
        return str(error)
    (frame,) = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


class Chooser:
    """A list to choose from, with two arrows that move the choice by one."""

    def __init__(self, label: str, options: Options, first: int | None) -> None:
        """first: the index that is chosen; IndexError where the list does not have it."""
        values = [value for _, value in options]
        if options and first not in values:
            raise IndexError(f"there is no {label} {first}: choose 0 to {len(options) - 1}")
        self.list = widgets.Dropdown(
            options=options, value=first if options else None, description=label, layout=LIST
        )
        arrows = [self._arrow(sign, step) for sign, step in (("◀", -1), ("▶", 1))]
        self.widget = widgets.HBox([self.list, *arrows])

    @property
    def value(self) -> int | None:
        """The chosen index; None where the list is empty."""
        return self.list.value

    def _arrow(self, sign: str, step: int) -> widgets.Button:
        """A button that moves the choice, round the ends."""
        button = widgets.Button(description=sign, layout=NARROW)

        def move(_: object) -> None:
            """Chooses the item `step` further on."""
            if self.list.options:
                self.list.index = ((self.list.index or 0) + step) % len(self.list.options)

        button.on_click(move)
        return button


def labelled(control: widgets.Widget) -> widgets.Widget:
    """Gives a control the common width; returns it."""
    control.style.description_width, control.layout = "9em", WIDE
    return control


@contextlib.contextmanager
def unobserved(widget: widgets.Widget, handler: Callable) -> Iterator[None]:
    """Keeps changes of the widget's value within the block from calling the handler."""
    widget.unobserve(handler, "value")
    try:
        yield
    finally:
        widget.observe(handler, "value")


def refill(dropdown: widgets.Dropdown, options: Options) -> None:
    """Replaces the entries of a list and chooses the first."""
    dropdown.options = options
    dropdown.index = 0 if options else None  # a list that was empty stays without a choice
