"""Browsers for notebooks: choose a query, or a query and one of its images, and see it drawn.

A thin layer of ipywidgets: what is drawn is the caller's function, usually a few lines over
`plots`. A browser draws its first choice at once, also where nobody can click, so that a notebook
that is executed headlessly runs the same code and fails where the drawing fails.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import clear_output, display

from vitgal import figures, plots, reranking
from vitgal.revisited import RetrievalDataset
from vitgal.store import FeatureStore


def browse_queries(
    draw: Callable[[int], object], names: Sequence[str], *, first: int = 0
) -> widgets.VBox:
    """A browser over queries: a list to choose from, arrows for one by one.

    draw: called with the query's index; makes figures, which the browser shows and closes, and may
    print. names: of the queries. first: the index drawn at once. Returns the widget; as the last
    value of a cell it appears. No names: a browser that says so. Raises what `draw` raises, and
    IndexError for a first query that does not exist.
    """
    output = widgets.Output()
    chooser, row = _chooser("query", names, first)

    def show(_: object = None) -> None:
        _redraw(output, draw, chooser.value)

    chooser.observe(show, "value")
    show()
    return widgets.VBox([row, output])


def browse_pairs(
    draw: Callable[[int, int], object],
    names: Sequence[str],
    candidates: Callable[[int], Sequence[str]],
    *,
    first: int = 0,
) -> widgets.VBox:
    """A browser over pairs: a query, and one by one the database images it is compared with.

    draw: called with the query's index and the place of the image in its list; otherwise as in
    `browse_queries`. names: of the queries. candidates: the names of a query's database images,
    best first; called anew when another query is chosen. A query without any says so.
    """
    output = widgets.Output()
    query, upper = _chooser("query", names, first)
    image, lower = _chooser("image", candidates(first) if names else [], 0)

    def show(_: object = None) -> None:
        _redraw(output, draw, query.value, image.value)

    def refill(_: object) -> None:
        image.unobserve(show, "value")  # else the new list and the new query would each draw
        image.options = _numbered(candidates(query.value))
        image.value = 0 if image.options else None  # a list that was empty stays without a choice
        image.observe(show, "value")
        show()

    query.observe(refill, "value")
    image.observe(show, "value")
    show()
    return widgets.VBox([upper, lower, output])


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(f"{index}  {name}", index) for index, name in enumerate(names)]


def _chooser(label: str, names: Sequence[str], first: int) -> tuple[widgets.Dropdown, widgets.HBox]:
    """A list of names and two arrows; its value is an index, None where there are no names."""
    if names and not 0 <= first < len(names):
        raise IndexError(f"there is no {label} {first}: choose 0 to {len(names) - 1}")
    value = first if names else None
    chooser = widgets.Dropdown(options=_numbered(names), value=value, description=label)
    arrows = [_arrow(chooser, sign, step) for sign, step in (("◀", -1), ("▶", 1))]
    return chooser, widgets.HBox([chooser, *arrows])


def _arrow(chooser: widgets.Dropdown, sign: str, step: int) -> widgets.Button:
    """A button that moves the choice by one place, round the ends."""
    button = widgets.Button(description=sign, layout=widgets.Layout(width="3em"))

    def move(_: object) -> None:
        if chooser.options:
            chooser.value = (chooser.value + step) % len(chooser.options)

    button.on_click(move)
    return button


def _redraw(output: widgets.Output, draw: Callable[..., object], *choice: int | None) -> None:
    """Shows what `draw` makes in place of what was shown, and closes its figures.

    Inside a notebook an output area prints an exception and drops it, so it is raised once more.
    """
    others, failures = set(plt.get_fignums()), []
    with output:
        clear_output(wait=True)
        try:
            if None in choice:
                print("nothing to choose from")
            else:
                draw(*choice)
                for number in _new_figures(others):
                    display(plt.figure(number))
        except Exception as error:
            failures.append(error)
            raise
        finally:
            for number in _new_figures(others):
                plt.close(number)
    if failures:
        raise failures[0]


def _new_figures(others: set[int]) -> list[int]:
    return sorted(set(plt.get_fignums()) - others)


def live_curves() -> Callable[[pd.DataFrame], None]:
    """Training curves that grow in the cell: give it to a fit as `watch`.

    The returned function draws the log so far into one output that it updates; where nobody looks
    (a headless run) the executed notebook holds the last state.
    """
    handle = display(display_id=True)

    def watch(log: pd.DataFrame) -> None:
        figure = plots.training_curves(log)[0].figure
        plt.close(figure)  # else the inline backend shows it a second time
        handle.update(figure)

    return watch


def browse_hard_pairs(
    benchmark: RetrievalDataset,
    features: FeatureStore,
    folder: Path,
    *,
    first: int = 0,
    **options: Any,
) -> widgets.VBox:
    """A browser over every query's verified hard images, most inliers first.

    features: the store of all of them. folder: the finished stage `<dataset>/rerank`. options:
    `figures.pair`'s. Returns the widget, as `browse_pairs` does.
    """
    truth = benchmark.ground_truth

    def hard(query: int) -> list[int]:
        return reranking.hard_candidates(folder, truth, query)

    def draw(query: int, place: int) -> None:
        figures.pair(benchmark, features, query, hard(query)[place], **options)

    def names(query: int) -> list[str]:
        return [benchmark.database[image] for image in hard(query)]

    return browse_pairs(draw, truth.queries, names, first=first)
