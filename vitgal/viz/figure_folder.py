"""Where a notebook keeps its figures besides showing them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitgal.settings.sections import ShowSettings
from vitgal.viz.style import keep


@dataclass(frozen=True)
class FigureFolder:
    """A folder that figures are written to where `save_figures` says so."""

    folder: Path
    show: ShowSettings

    def keep(self, drawing: Any, name: str) -> None:
        """Writes a figure, or the figure of some axes, as `<name>.<figure_format>`."""
        folder = self.folder if self.show.save_figures else None
        keep(drawing, folder, name, self.show.figure_format)
