"""Errors of training."""

from vitgal import runs


class TrainingError(runs.UserError, RuntimeError):
    """Training cannot go on; the message names the step, the images and the remedy."""


class Preempted(TrainingError):
    """SIGTERM came; the state is saved, and a restart continues from it."""
