"""Widgets for notebooks: training curves that grow, and a run's queries, the worst first.

A browser draws its first choice at once, also where nobody can click, so that a notebook that is
executed headlessly runs the same code and fails where the drawing fails. Later an error is shown
where the picture would be.
"""

from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from vitgal.data.revisited import PROTOCOLS, RetrievalDataset
from vitgal.viz.controls import Chooser, FigureOutput, Options, refill, unobserved
from vitgal.viz.failures import failure_figure, failure_table
from vitgal.viz.training import training_curves

ORDERS = {"lowest AP": "ap", "AP lost by reranking": "change", "worst miss": "miss"}


def live_curves() -> Callable[[pd.DataFrame], None]:
    """Returns a function that draws training curves into this cell; pass it to a fit as `watch`.

    It draws the log so far into one output that it updates; after a headless run the executed
    notebook holds the last state.
    """
    handle = display(display_id=True)

    def watch(log: pd.DataFrame) -> None:
        figure = training_curves(log)[0].figure
        plt.close(figure)  # else the inline backend shows it a second time
        handle.update(figure)

    return watch


def browse_failures(
    run: Path,
    dataset: RetrievalDataset | str,
    *,
    by: str = "ap",
    protocol: str = "medium",
    reranked: bool = True,
    columns: int = 8,
) -> widgets.VBox:
    """Shows a run's queries, the worst first, each with its `failure_figure`.

    Args:
        run, dataset, reranked: as for `failure_table`.
        by: "ap", "change" or "miss", the order at first.
        protocol: at first.
        columns: images in a row.
    Returns:
        The widget, which shows the first query at once.
    Raises:
        ValueError: `by` or the protocol is unknown.
        StageError: notebook 04 has not been run.
    """
    if by not in ORDERS.values():
        raise ValueError(f"by is {by!r}; queries are sorted by {', '.join(ORDERS.values())}")
    protocols = widgets.Dropdown(options=PROTOCOLS, value=protocol, description="protocol")
    order = widgets.Dropdown(options=list(ORDERS.items()), value=by, description="sorted by")

    def entries() -> Options:
        table = failure_table(
            run, dataset, order.value, protocol=protocols.value, reranked=reranked
        )
        return [
            (f"{query}  {row.query}   AP {_percents(row, reranked)}", int(query))
            for query, row in zip(table.index, table.itertuples(), strict=True)
        ]

    options = entries()
    chooser = Chooser("query", options, options[0][1] if options else None)
    output = FigureOutput()

    def draw() -> None:
        if chooser.value is None:
            print("nothing to choose from")
            return
        failure_figure(
            *(run, dataset, chooser.value),
            protocol=protocols.value,
            columns=columns,
            reranked=reranked,
        )

    def show(_: object = None) -> None:
        output.redraw(draw)

    def sort(_: object) -> None:
        with unobserved(chooser.list, show):
            refill(chooser.list, entries())
        show()

    chooser.list.observe(show, "value")
    for control in (order, protocols):
        control.observe(sort, "value")
    output.draw(draw)
    return widgets.VBox([widgets.HBox([order, protocols]), chooser.widget, output.widget])


def _percents(row: tuple, reranked: bool) -> str:
    """AP in percent, before and after reranking."""
    after = f" → {100 * row.after:.0f}" if reranked else ""
    return f"{100 * row.before:.0f}{after}"
