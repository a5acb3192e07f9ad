"""Errors of training."""

import os

from vitgal import runs


class TrainingError(runs.UserError, RuntimeError):
    """Training cannot go on; the message names the step, the images and the remedy."""


class Preempted(TrainingError):
    """The run was stopped from outside; a restart continues from the last saved state."""

    status = os.EX_TEMPFAIL  # exit status of the command: 75, "try again later"


class WorkerLost(TrainingError):
    """A data worker was killed, or another process of the training; another try may succeed."""
