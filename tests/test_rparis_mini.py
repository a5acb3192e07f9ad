"""Notebooks 04 to 06 on real photographs under the official protocol, with the small weights."""

from pathlib import Path

import numpy as np
import pytest

from vitgal import runs
from vitgal.app import pipeline
from vitgal.data import revisited
from vitgal.evaluation import protocol as evaluation_protocol
from vitgal.retrieval import ranking

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "rparis_mini"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here: its photographs are not free")
def test_the_notebooks_run_on_real_photographs(tmp_path):
    run = pipeline.run(
        HERE / "rparis_mini.yaml",
        between=("04", "06"),
        overrides={
            "weights": str(runs.checkout() / runs.SMALL_WEIGHTS),
            "dataset_dir": str(DATA),
            "top": "10",  # a short list of the whole database takes minutes
        },
        output=tmp_path / "rparis_mini",
        progress=False,
    )
    folder = run / "rparis_mini"
    truth = revisited.load_ground_truth(DATA / "gnd_rparis_mini.pkl")
    scores = runs.read_json(folder / "global" / "scores.json")
    # mAP again from nothing but the descriptors: a full sort, and the protocol
    queries, database = (np.load(folder / "global" / f"{n}.npy") for n in ("queries", "database"))
    assert database.shape[0] == 238 and queries.shape[0] == 12
    ranks = np.argsort(-(database @ queries.T), axis=0, kind="stable")
    again = evaluation_protocol.evaluate(ranks, truth)
    for protocol in revisited.PROTOCOLS:
        # the stage's products may differ in the last bit and swap two near-equal images
        assert scores[protocol]["map"] == pytest.approx(again[protocol]["map"], abs=1e-3)
    # Better than chance by far: a random ranking reaches the share of positives, about 0.1
    chance = np.mean([len(single) for single in revisited.positives(truth, "medium")]) / 238
    assert scores["medium"]["map"] > 2 * chance
    reranked = ranking.Positions.load(folder / "rerank" / "positions_hard.npz")
    hard = evaluation_protocol.evaluate({"hard": reranked}, truth)["hard"]["map"]
    assert runs.read_json(folder / "rerank" / "scores.json")["hard"]["map"] == pytest.approx(hard)
