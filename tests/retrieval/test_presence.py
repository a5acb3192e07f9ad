"""Probability that a result shows the place: fit and threshold, by hand."""

import numpy as np
import pytest

from vitgal.retrieval.presence import (
    Presence,
    PresenceError,
    best_threshold,
    fit_presence,
)


def drawn(count: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs whose log-odds are -6 + 5 s + 1.5 log(1 + e), drawn with these."""
    rng = np.random.default_rng(seed)
    similarities, evidence = rng.random(count), rng.integers(0, 40, count)
    odds = -6 + 5 * similarities + 1.5 * np.log1p(evidence)
    return similarities, evidence, rng.random(count) < 1 / (1 + np.exp(-odds))


def test_probabilities_by_hand():
    model = Presence(-2.0, 3.0, 1.0, 0.5, 1.0, 1.0, 4, 2)
    # log-odds: -2 + 3 * 0.5 + log 1 = -0.5, and -2 + 0 + log 8 = 0.0794
    found = model.probabilities(np.array([0.5, 0.0]), np.array([0, 7]))
    np.testing.assert_allclose(found, [0.3775407, 0.5198499], atol=1e-7)
    assert model.probabilities(np.zeros(0), np.zeros(0)).shape == (0,)


def test_the_fit_is_that_of_scikit_learn():
    """Its regularisation is that of standardised inputs as well: C = 1."""
    similarities, evidence, shown = drawn()
    inputs = np.column_stack([similarities, np.log1p(evidence)])
    scaled = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    linear_model = pytest.importorskip("sklearn.linear_model", reason="no scikit-learn here")
    other = linear_model.LogisticRegression(C=1.0, tol=1e-10).fit(scaled, shown)
    model = fit_presence(similarities, evidence, shown)
    np.testing.assert_allclose(
        model.probabilities(similarities, evidence),
        other.predict_proba(scaled)[:, 1],
        atol=1e-4,
    )


def test_neither_coefficient_is_negative_and_separable_pairs_have_a_fit():
    shown = np.array([True] * 5 + [False] * 5)
    model = fit_presence(np.where(shown, 0.2, 0.8), np.where(shown, 30, 0), shown)
    assert model.similarity == 0 and 0 < model.evidence < np.inf
    assert (model.precision, model.recall) == (1, 1)
    rising = model.probabilities(np.full(9, 0.5), np.arange(9))
    assert (np.diff(rising) > 0).all()


def test_threshold_by_hand():
    """Falling: 1, 1, 0, then two equal, 1 and 0; from 0.8 on precision is 1, recall 2/3: best."""
    probabilities = np.array([0.2, 0.9, 0.5, 0.8, 0.2])
    shown = np.array([True, True, False, True, False])
    threshold, precision, recall = best_threshold(probabilities, shown)
    assert (threshold, precision, recall) == (pytest.approx(0.65), 1.0, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("similarities", "shown", "message"),
    [
        ([0.1, 0.2], [True, True], "2 pairs of which all show one place fix no probability"),
        ([0.1, 0.2], [False, False], "2 pairs of which none show one place"),
        ([], [], "0 pairs of which none"),
        ([0.1, np.nan], [True, False], "do not fit together"),
        ([0.1, 0.2], [True], "do not fit together"),
    ],
)
def test_what_fixes_no_model_is_refused(similarities, shown, message):
    with pytest.raises(PresenceError, match=message):
        fit_presence(np.array(similarities), np.zeros(len(similarities)), np.array(shown))


def test_the_sentence_names_threshold_precision_and_recall():
    model = Presence(-2.0, 3.0, 1.0, 0.5, 0.97, 0.92, 1670, 30)
    stated = "from 50 % on, 97 % are right and 92 % of all are found, on 1,670 pairs"
    assert model.sentence(0.31).startswith("nothing here shows it: the best has 31 %")
    assert model.sentence(0.99).startswith("the best shows it with 99 %")
    assert stated in model.sentence(0.31) and stated in model.sentence(0.99)
