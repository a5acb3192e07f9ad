"""Widgets for notebooks: live training curves, and a run's queries, the worst first.

A browser draws its first choice at once, so that a headless run fails if the drawing fails. Later
errors are shown in place of the picture.
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

    It updates one output, which holds the last state after a headless run.
    """
    handle = display(display_id=True)

    def watch(log: pd.DataFrame) -> None:
        """Draws the log in place of what was shown before."""
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

    by ("ap", "change" or "miss") and protocol: at first. Others: as for `failure_figure`.
    The first query is drawn at once. Raises ValueError for an unknown `by` or protocol,
    StageError where notebook 04 has not been run.
    """
    if by not in ORDERS.values():
        raise ValueError(f"by is {by!r}; queries are sorted by {', '.join(ORDERS.values())}")
    return _FailureBrowser(run, dataset, by, protocol, reranked, columns).widget


class _FailureBrowser:
    """The controls and the figure of `browse_failures`."""

    def __init__(
        self,
        run: Path,
        dataset: RetrievalDataset | str,
        by: str,
        protocol: str,
        reranked: bool,
        columns: int,
    ) -> None:
        self.run, self.dataset, self.reranked, self.columns = run, dataset, reranked, columns
        self.protocols = widgets.Dropdown(options=PROTOCOLS, value=protocol, description="protocol")
        self.order = widgets.Dropdown(options=ORDERS.items(), value=by, description="sorted by")
        options, self.output = self._entries(), FigureOutput()
        self.query = Chooser("query", options, options[0][1] if options else None)
        self.query.list.observe(self._redraw, "value")
        for control in (self.order, self.protocols):
            control.observe(self._sort, "value")
        self.output.draw(self._draw)
        controls = widgets.HBox([self.order, self.protocols])
        self.widget = widgets.VBox([controls, self.query.widget, self.output.widget])

    def _entries(self) -> Options:
        """The queries in their order, each with its AP in percent, before and after reranking."""
        protocol, reranked = self.protocols.value, self.reranked
        table = failure_table(
            self.run, self.dataset, self.order.value, protocol=protocol, reranked=reranked
        )
        after = [f" → {100 * ap:.0f}" if reranked else "" for ap in table["after"]]
        return [
            (f"{query}  {row.query}   AP {100 * row.before:.0f}{end}", int(query))
            for query, row, end in zip(table.index, table.itertuples(), after, strict=True)
        ]

    def _draw(self) -> None:
        if self.query.value is None:
            print("nothing to choose from")
            return
        failure_figure(
            *(self.run, self.dataset, self.query.value),
            protocol=self.protocols.value,
            columns=self.columns,
            reranked=self.reranked,
        )

    def _redraw(self, _: object = None) -> None:
        self.output.redraw(self._draw)

    def _sort(self, _: object) -> None:
        with unobserved(self.query.list, self._redraw):
            refill(self.query.list, self._entries())
        self._redraw()
