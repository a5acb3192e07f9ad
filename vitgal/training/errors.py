"""What stops a training run."""

from vitgal import runs


class TrainingError(runs.UserError, RuntimeError):
    """Training cannot go on; the message names the step and the images, and says what to do."""


class Preempted(TrainingError):
    """The process was asked to end (SIGTERM); its state is saved, a restart goes on from there."""
