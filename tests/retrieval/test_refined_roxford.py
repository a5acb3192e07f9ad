"""Refinement of real descriptors: ROxford5k by AlexNet, from a folder beside the checkout."""

import sys

import numpy as np
import pytest

from vitgal import runs
from vitgal.data.revisited import load_ground_truth
from vitgal.evaluation.protocol import evaluate

DATA = runs.checkout().parent / "shared" / "data" / "revisited"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no {DATA}")
@pytest.mark.parametrize(
    ("chain", "medium", "hard"),
    [
        ([], 21.13, 4.60),
        (["k_reciprocal"], 24.0, 6.2),
        (["whitening power=0.25", "augmentation", "expansion"], 23.8, 6.1),
        (["whitening power=0.25", "diffusion"], 23.7, 5.4),
        (["whitening power=0.25", "diffusion", "k_reciprocal"], 24.9, 6.8),
    ],
    ids=["plain", "k_reciprocal", "expansion", "diffusion", "all"],
)
def test_gains_on_roxford(chain, medium, hard, monkeypatch):
    """The benchmark's chains; the whitening is learnt from the database, without labels."""
    monkeypatch.syspath_prepend(str(runs.checkout() / "benchmarks"))
    import refine

    monkeypatch.delitem(sys.modules, "refine")
    truth = load_ground_truth(DATA / "gnd_roxford5k.pkl")
    arrays = np.load(DATA / "roxford5k_alexnet_fc7_pca128.npz")
    ranking = refine.refined(arrays["Q"], arrays["X"], truth, chain)
    scores = evaluate(ranking.positions, truth)
    assert 100 * scores["medium"]["map"] >= medium - 0.005
    assert 100 * scores["hard"]["map"] >= hard - 0.005
