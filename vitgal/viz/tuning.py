"""The figure of a tuning grid."""

import numpy as np

from vitgal.evaluation import statistics
from vitgal.evaluation.tuning import Tuning
from vitgal.viz import scores


def draw(found: Tuning) -> np.ndarray:
    """mAP over each parameter, the others as chosen, as `plots.tuning_curves` draws it."""
    return scores.tuning_curves(
        {name: (values, found.curve(name)) for name, values in found.grid.items()},
        found.values(found.chosen),
        found.values(found.current),
        before=found.before,
        interval=statistics.bootstrap_interval,
    )
