"""Errors of training."""

from vitgal import runs


class TrainingError(runs.UserError, RuntimeError):
    """Training cannot go on; the message names the step, the images and the remedy."""


class Preempted(TrainingError):
    """The run was stopped from outside; a restart continues from the last saved state."""


class WorkerLost(TrainingError):
    """A data worker was killed, or another process of the training; another try may succeed."""
