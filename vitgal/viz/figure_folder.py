"""The folder that a notebook saves its figures to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitgal.settings.sections import ShowSettings
from vitgal.viz.style import save_figure


@dataclass(frozen=True)
class FigureFolder:
    """A folder that figures are written to where `show.save_figures` is set."""

    folder: Path
    show: ShowSettings

    def keep(self, drawing: Axes | np.ndarray | Figure, name: str) -> None:
        """Writes a figure, or the figure of some axes, as `<name>.<figure_format>`.

        An array of axes has any shape. Call it before the figure is shown.
        """
        if self.show.save_figures:
            axes = drawing.axes[0] if isinstance(drawing, Figure) else drawing
            save_figure(axes, self.folder / f"{name}.{self.show.figure_format}")
