"""What the kernel answers to the front end, without a browser."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from vitgal import runs
from vitgal.data import revisited
from vitgal.models.network import build_model
from vitgal.models.weights import save_model
from vitgal.settings import GlobalSettings, MachineSettings, RerankingSettings
from vitgal.stages.describe import evaluate_descriptors
from vitgal.stages.inspection import InspectionError, Inspector, similar_patches
from vitgal.stages.rerank import rerank_shortlist
from vitgal.viz.instrument import Instrument


@pytest.fixture(scope="module")
def run(inspected_run, tmp_path_factory) -> Path:
    """The inspected run with a global ranking (set by hand) and real counts."""
    run = tmp_path_factory.mktemp("answers") / "run"
    shutil.copytree(inspected_run, run)
    shutil.rmtree(run / "tiny" / "rerank")
    dataset = revisited.open_dataset("tiny", run)
    cosines = np.array([1, 1, 0.8, 0.7, 0.6, 0.5, -1], np.float32)  # e is beyond the short lists
    np.save(run / "d.npy", np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1))
    (run / "d.txt").write_text("\n".join("qpabcde"))
    evaluate_descriptors(run, dataset, GlobalSettings(top=2), descriptors=run / "d.npy")
    settings = RerankingSettings.build({"top": 2, "max_distance": 1.0})
    machine = MachineSettings(workers=1)
    rerank_shortlist(run, dataset.ground_truth, settings, machine)
    return run


@pytest.fixture
def instrument(run) -> Instrument:
    dataset = revisited.open_dataset("tiny", run)
    inspector = Inspector(run, dataset, weights=str(run / "model.safetensors"))
    return Instrument(run, dataset, inspector=inspector, view="pair", query=0, image=0)


def ask(instrument, kind: str, buffers: tuple = (), **question) -> tuple[dict, list[bytes]]:
    """One message, as the widget's channel delivers it."""
    sent = []
    instrument.send = lambda reply, attached: sent.append((reply, attached))
    instrument._answer(instrument, {"id": 5, "kind": kind} | question, list(buffers))
    ((reply, attached),) = sent
    assert reply["id"] == 5
    json.dumps(reply)
    return reply, attached


def matched(instrument, image: int, **settings) -> dict:
    name = "abcde"[image]
    number = instrument.document["names"].index(name)
    return ask(instrument, "pair", query=0, image=number, settings=settings)[0]["pair"]


def test_it_starts_at_the_pair_of_database_indices(instrument):
    assert instrument.document["names"][instrument.start["image"]] == "a"


def test_every_knob_changes_the_pair(instrument):
    whole = matched(instrument, 0)
    assert whole["matches"] == whole["count"] == 40  # a is the same photograph
    assert matched(instrument, 0, max_keypoints=20)["matches"] == 20
    assert matched(instrument, 1, max_distance=0.0)["matches"] < 5
    assert set(matched(instrument, 0, hidden=[0.7071])["scale"]) == {1.0}
    for changes in ({"method": "mutual"}, {"estimator": "magsac", "threshold": 3.0}):
        names = {"method": "matching"}
        values = {names.get(name, name): value for name, value in changes.items()}
        settings = RerankingSettings.build({"top": 2, "max_distance": 1.0} | values)
        wanted = instrument._inspector.pair(0, 1, settings).result
        pair = matched(instrument, 1, **changes)
        assert pair["matches"] == len(wanted.matches)
        assert pair["inlier"] == wanted.verification.inliers.astype(int).tolist()


def test_a_wrong_knob_or_kind_is_an_answer(instrument):
    number = instrument.start["image"]
    question = dict(query=0, image=number, settings={"method": "<b>"})
    assert "unknown matching '<b>'" in ask(instrument, "pair", **question)[0]["error"]
    assert "AttributeError" in ask(instrument, "nothing")[0]["error"]
    assert "IndexError" in ask(instrument, "image", image=99, large=False)[0]["error"]


def test_an_image_of_no_short_list_is_described_by_the_network(instrument):
    assert "e" not in instrument._inspector.features
    assert matched(instrument, 4)["matches"] > 0
    assert ("database", 4) in instrument._inspector.selections


def test_scores_and_attention_are_maps_over_the_box(instrument):
    question = dict(query=0, image=instrument.start["image"], scale=0.9)
    reply, attached = ask(instrument, "tokens", **question)
    selection = instrument._inspector.selection("query", 0)
    assert reply["boxes"][0] == [0, 0, 128, 96]
    layers, height, width = reply["grids"][0]
    maps = np.frombuffer(attached[0], np.uint8).reshape(layers, height, width)
    assert layers == 2 + 4 and maps[0].max() == 255  # scores, norms, and four heads
    norms = selection.norms[1.0]
    assert np.abs(maps[1] / 255 - (norms - norms.min()) / np.ptp(norms)).max() < 0.003
    expected = selection.attention[1.0][2]
    assert np.abs(maps[4] / 255 - expected).max() < 0.003


def test_a_patch_is_compared_with_every_other(instrument):
    # Image a is the query's photograph: the most similar patch is the patch itself.
    place = dict(query=0, image=instrument.start["image"], side=0, x=70.0, y=40.0, scale=1.0)
    reply, (data,) = ask(instrument, "patch", **place)
    x0, y0, x1, y1 = reply["patch"]
    assert x0 <= 70.5 < x1 and y0 <= 40.5 < y1
    first = reply["nearest"][0]
    assert first["box"] == pytest.approx(reply["patch"]) and first["scale"] == 1.0
    assert first["similarity"] == pytest.approx(1, abs=2e-3)
    height, width = reply["grid"]
    similarities = np.frombuffer(data, np.uint8).reshape(height, width)
    row, column = int(40.5 / 96 * height), int(70.5 / 128 * width)
    assert np.unravel_index(similarities.argmax(), similarities.shape) == (row, column)
    outside = ask(instrument, "patch", **(place | {"x": -3.0}))[0]
    assert "outside the part" in outside["error"]


def test_similar_patches_by_hand(instrument):
    selection = instrument._inspector.selection("query", 0)
    code = selection.codes[0.7071][1, 2]
    maps, best = similar_patches(code, selection, count=2)
    assert best[0] == (0.7071, 1, 2)
    by_hand = max(
        (float(np.dot(unit, code)), scale)
        for scale, codes in selection.codes.items()
        for place, unit in enumerate(codes.reshape(-1, codes.shape[-1]))
        if (scale, place) != (0.7071, 1 * codes.shape[1] + 2)
    )
    scale, row, column = best[1]
    assert (float(maps[scale][row, column]), scale) == pytest.approx(by_hand)


def test_other_weights_are_refused(run, tmp_path):
    other = tmp_path / "other.safetensors"
    save_model(build_model("xcit_nano_12_p16_224", code_dim=8, seed=1), other)
    inspector = Inspector(run, revisited.open_dataset("tiny", run), weights=str(other))
    with pytest.raises(InspectionError, match=r"other\.safetensors is not the model"):
        inspector.selection("query", 0)
    with pytest.raises(InspectionError, match="no query 5: tiny has 0 to 1"):
        inspector.image("query", 5)


def test_notes_are_kept_in_the_run_and_shared(instrument, run):
    path = run / "notes.json"
    path.unlink(missing_ok=True)
    star = {"star": True, "note": "<b>"}
    ask(instrument, "note", name="run | tiny | q", value=star)
    ask(instrument, "note", name="run | tiny | p", value={"star": True, "note": ""})
    ask(instrument, "note", name="run | tiny | p", value={"star": False, "note": ""})
    assert runs.read_json(path) == {"run | tiny | q": star}
    another = Instrument(run, revisited.open_dataset("tiny", run))
    assert another.document["notes"] == {"run | tiny | q": star}
    path.write_text("[]")
    reply, _ = ask(instrument, "note", name="a", value=star)
    assert "holds no notes: move it away" in reply["error"]
    path.unlink()


def test_a_photograph_that_has_gone_is_named(instrument, run):
    number = instrument.document["names"].index("c")
    path = instrument.images.paths[number]
    content = path.read_bytes()
    _, (jpeg,) = ask(instrument, "image", image=number, large=False)
    assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (96, 128, 3)
    path.unlink()
    assert "c.jpg" in ask(instrument, "image", image=number, large=False)[0]["error"]
    path.write_bytes(content)


def test_a_run_whose_reranking_is_being_written_shows_what_is_finished(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "tiny" / "rerank" / runs.MANIFEST).unlink()
    instrument = Instrument(copy, revisited.open_dataset("tiny", run))
    (entry,) = instrument.document["entries"]
    assert list(entry["scores"]) == ["global"] and entry["matching"] is None
    number = instrument.document["names"].index("a")
    reply, _ = ask(instrument, "pair", query=0, image=number, settings={})
    assert "06_rerank" in reply["error"]
