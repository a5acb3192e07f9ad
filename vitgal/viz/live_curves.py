"""Training curves that a notebook's cell draws while a fit runs."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from vitgal.viz.charts import training_curves


def live_curves() -> Callable[[pd.DataFrame], None]:
    """Returns a function that draws training curves into this cell; pass it to a fit as `watch`.

    It updates one output, which holds the last state after a headless run.
    """
    handle = display(display_id=True)

    def watch(log: pd.DataFrame) -> None:
        """Draws the log in place of the previous drawing."""
        figure = training_curves(log)[0].figure
        plt.close(figure)  # otherwise the inline backend shows it twice
        handle.update(figure)

    return watch
