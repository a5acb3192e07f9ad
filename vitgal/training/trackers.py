"""Where training's rows go beside log.jsonl: TensorBoard, and any tracker of accelerate."""

from pathlib import Path

from accelerate import tracking

from vitgal import runs
from vitgal.training.errors import TrainingError


def open_trackers(name: str | None, folder: Path) -> list[tracking.GeneralTracker]:
    """Starts TensorBoard's files in `folder` and the tracker of this name, None for no other.

    Raises TrainingError for a tracker that accelerate does not know, that is not installed, or
    that does not start.
    """
    board = tracking.TensorBoardTracker("tensorboard", folder)
    board.start()
    if name in (None, board.name):
        return [board]
    if name not in tracking.LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(map(str, tracking.LOGGER_TYPE_TO_CLASS)))
        raise TrainingError(f"tracker {runs.short(name)} is none of {known}")
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    if name not in map(str, tracking.get_available_trackers()):
        raise TrainingError(f"tracker: {name} is not installed: `pip install {name}`")
    try:
        further = kind("vitgal", folder) if kind.requires_logging_directory else kind("vitgal")
        further.start()
    except Exception as error:  # each tracker raises its own errors
        text = runs.printable(str(error))[:200]
        raise TrainingError(
            f"tracker: {name} does not start ({text}): log in, or leave tracker out"
        ) from error
    return [board, further]
