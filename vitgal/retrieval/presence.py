"""Presence: the probability that a result shows the query's place.

A logistic model of two numbers of a pair: the similarity of the global descriptors, and the
evidence of verification. Evidence enters by its logarithm, as each further inlier adds less.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from vitgal import runs

# Weight of the squares of the coefficients, for standardised inputs: without it classes that can be
# separated completely have no best fit.
RIDGE = 1.0


class PresenceError(runs.UserError, ValueError):
    """A model of presence cannot be fitted or read; the message gives reason and remedy."""


@dataclass(frozen=True)
class Presence:
    """A model of the probability that a result shows the query's place, with a threshold.

    The probability is 1 / (1 + exp(-(bias + similarity * s + evidence * log(1 + e)))) for a
    similarity s and a count of evidence e; from `threshold` on it counts as found. Precision and
    recall are those of the threshold on the pairs of the fit, of which `positives` show one place.
    """

    bias: float
    similarity: float
    evidence: float
    threshold: float
    precision: float
    recall: float
    pairs: int
    positives: int

    def probabilities(self, similarities: np.ndarray, evidence: np.ndarray) -> np.ndarray:
        """Returns float64 probabilities of pairs with similarities and evidence of one shape."""
        logits = self.bias + self.similarity * np.asarray(similarities, np.float64)
        return expit(logits + self.evidence * np.log1p(np.asarray(evidence, np.float64)))

    def sentence(self, probability: float) -> str:
        """Returns what the highest probability of a ranking says about the query."""
        stated = (
            f"from {100 * self.threshold:.0f} % on, {100 * self.precision:.0f} % are right and "
            f"{100 * self.recall:.0f} % of all are found, on {self.pairs:,} pairs of known places"
        )
        if probability < self.threshold:
            return f"nothing here shows it: the best has {100 * probability:.0f} % ({stated})"
        return f"the best shows it with {100 * probability:.0f} % ({stated})"


def fit_presence(similarities: np.ndarray, evidence: np.ndarray, same: np.ndarray) -> Presence:
    """Fits a model to pairs whose answer is known.

    Neither coefficient is below 0: more similarity or evidence never speaks against a place. The
    threshold is that at which precision + recall is greatest.

    Args:
        similarities: (P,) real numbers. evidence: (P,) counts, at least 0.
        same: (P,) bool, whether the pair shows one place.
    Raises:
        PresenceError: shapes that differ, numbers that are not finite, or pairs of one kind alone.
    """
    same = np.asarray(same, bool)
    inputs = np.column_stack([similarities, np.log1p(np.asarray(evidence, np.float64))])
    if len(inputs) != len(same) or not np.isfinite(inputs).all():
        raise PresenceError("similarities, evidence and answers do not fit together")
    if same.all() or not same.any():
        raise PresenceError(
            f"{len(same)} pairs of which {'all' if same.any() else 'none'} show one place fix no "
            "probability: both kinds are needed"
        )
    centre, scale = inputs.mean(axis=0), inputs.std(axis=0)
    scale[scale == 0] = 1
    rows, signs = (inputs - centre) / scale, np.where(same, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """The penalised negative log-likelihood of parameters (1 + D,) and its gradient."""
        margins = signs * (parameters[0] + rows @ parameters[1:])
        pulls = -signs * expit(-margins)
        value = np.logaddexp(0, -margins).sum() + RIDGE / 2 * parameters[1:] @ parameters[1:]
        gradient = np.array([pulls.sum(), *(pulls @ rows + RIDGE * parameters[1:])])
        return value, gradient

    bounds = [(None, None), (0, None), (0, None)]
    result = minimize(loss, np.zeros(3), jac=True, bounds=bounds, method="L-BFGS-B")
    slopes = result.x[1:] / scale
    bias = float(result.x[0] - slopes @ centre)
    probabilities = expit(bias + inputs @ slopes)
    threshold, precision, recall = best_threshold(probabilities, same)
    return Presence(
        bias, *map(float, slopes), threshold, precision, recall, len(same), int(same.sum())
    )


def best_threshold(probabilities: np.ndarray, same: np.ndarray) -> tuple[float, float, float]:
    """Returns the threshold (P,) of greatest precision + recall, its precision and its recall.

    It lies halfway between two probabilities of the pairs; of equal ones it is the highest. same:
    (P,) bool, at least one true.
    """
    order = np.argsort(-probabilities, kind="stable")
    right = np.cumsum(same[order])
    ends = np.flatnonzero(np.diff(probabilities[order], append=-1.0))  # of runs of equal ones
    precision, recall = right[ends] / (ends + 1), right[ends] / right[-1]
    best = int(np.argmax(precision + recall))
    steps = np.append(probabilities[order][ends], 0.0)
    threshold = (steps[best] + steps[best + 1]) / 2
    return float(threshold), float(precision[best]), float(recall[best])
