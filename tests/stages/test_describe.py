"""The global stage: its files, its resume, and what it refuses."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.mini_benchmark import NANO, contents, evaluate, interrupt, noise
from tests.stages.killing import kill
from vitgal import runs
from vitgal.data import images as data_images
from vitgal.features.store import RowFile
from vitgal.models.descriptors import extract_global
from vitgal.models.network import build_model
from vitgal.models.weights import save_model
from vitgal.retrieval import shortlists
from vitgal.retrieval.ranking import Ranking
from vitgal.stages import describe
from vitgal.stages.rank import GLOBAL_OUTPUTS


def read_all(benchmark: Path, names: list[str]) -> list[np.ndarray]:
    return [data_images.read_image(benchmark / f"jpg/{name}.jpg") for name in names]


def test_files(global_run, benchmark, model):
    folder = global_run / "mini" / "global"
    assert set(contents(folder)) == set(GLOBAL_OUTPUTS)
    names = json.loads((folder / "names.json").read_text())
    database, queries = (np.load(folder / f"{name}.npy") for name in ("database", "queries"))
    expected = extract_global(model, read_all(benchmark, names["database"]), size=64)
    np.testing.assert_allclose(database, expected, atol=1e-5)  # batches of another size
    boxes = [(0, 0, 128, 96), (8, 4, 150, 76)]
    photographs = read_all(benchmark, names["queries"])
    expected = extract_global(model, photographs, boxes=boxes, size=64)
    np.testing.assert_allclose(queries, expected, atol=1e-5)
    similarities = queries.astype(np.float64) @ database.T.astype(np.float64)
    ranking = Ranking.load(folder)
    order = np.argsort(-similarities, axis=1, kind="stable").T
    np.testing.assert_array_equal(ranking.order, order)
    assert ranking.order.dtype == np.int32
    assert [index.tolist() for index in ranking.positions.indices] == [[0, 2, 5], [1, 3]]
    for q, index in enumerate(ranking.positions.indices):
        np.testing.assert_array_equal(order[ranking.positions.ranks[q], q], index)
    assert set(shortlists.read_shortlist(folder / "shortlist.txt")) == {"query0", "query1"}
    assert json.loads((folder / "failures.json").read_text()) == []
    assert order[0, 0] == 0  # query 0 is image 0 compressed once more


def test_scores_hold_nothing_of_time_and_place(global_run, finished):
    text = (global_run / "mini" / "global" / "scores.json").read_text()
    scores = json.loads(text)
    assert set(scores["medium"]) >= {"map", "mp_at", "ap"}
    assert scores["protocol"]["crop_queries"] is True
    assert scores["failed_images"] == 0
    assert str(finished) not in text
    for word in ("seconds", "commit", "host", "device"):
        assert f'"{word}"' not in text


def test_the_manifest_records_where_data_and_weights_are(global_run, finished, weight_file):
    recorded = runs.read_stage(global_run / "mini" / "global", "")["recorded"]
    paths = [recorded[name] for name in ("dataset_dir", "distractors", "weights")]
    assert paths == [str(finished / "benchmark"), None, str(weight_file)]


def test_paths_in_the_run_and_in_the_checkout_survive_a_move(run, benchmark, weight_file):
    own = run / "data" / "benchmark"
    own.parent.mkdir(parents=True)
    benchmark.rename(own)
    small = runs.checkout() / runs.SMALL_WEIGHTS
    recorded = runs.read_stage(evaluate(run, own, small), "")["recorded"]
    assert recorded["dataset_dir"] is None and recorded["weights"] == runs.SMALL_WEIGHTS
    facts = [recorded[name] for name in ("architecture", "patch", "class_token")]
    assert facts == ["timm:tf_efficientnet_lite0", 32, "gem"]  # for the diagram


def test_twice_the_same_bytes(run, benchmark, weight_file, finished):
    again = evaluate(run, benchmark, weight_file, read_threads=3)
    assert contents(again) == contents(finished / "run" / "mini" / "global")


def test_a_finished_stage_is_reused_and_other_settings_are_refused(
    global_run, benchmark, weight_file
):
    manifest = global_run / "mini" / "global" / "stage.json"
    before = manifest.stat().st_mtime_ns
    evaluate(global_run, benchmark, weight_file, read_threads=0, batch_size=5, threads=2)
    assert manifest.stat().st_mtime_ns == before
    with pytest.raises(runs.StageError, match="parameters.size: 64 there, 48 now"):
        evaluate(global_run, benchmark, weight_file, size=48)
    with pytest.raises(runs.StageError, match="inputs.weights"):
        evaluate(global_run, benchmark, f"untrained:{NANO}")
    evaluate(global_run, benchmark, weight_file, size=48, overwrite=True)
    assert manifest.stat().st_mtime_ns != before


def test_a_finished_stage_answers_before_its_inputs_are_read(
    finished, weight_file, monkeypatch, tmp_path
):
    def read(*arguments):
        raise AssertionError("an input was read")

    monkeypatch.setattr("vitgal.runs.inputs.fingerprint_images", read)
    monkeypatch.setattr("vitgal.runs.inputs.fingerprint_file", read)
    folder = evaluate(finished / "run", finished / "benchmark", weight_file)
    assert folder == finished / "run" / "mini" / "global"
    with pytest.raises(AssertionError, match="was read"):
        evaluate(tmp_path, finished / "benchmark", weight_file)


def test_another_model_beside_it(global_run, benchmark, tmp_path):
    model = save_model(build_model("timm:test_vit", seed=1), tmp_path / "other.safetensors")
    folder = evaluate(global_run, benchmark, model, folder="other")
    assert folder == global_run / "mini" / "other"
    rows, other = (np.load(folder.with_name(name) / "database.npy") for name in ("global", "other"))
    assert np.abs(rows - other).max() > 1e-3


def test_uncropped_queries(run, benchmark, weight_file, model):
    folder = evaluate(run, benchmark, weight_file, crop_queries=False)
    expected = extract_global(model, read_all(benchmark, ["query0", "query1"]), size=64)
    np.testing.assert_allclose(np.load(folder / "queries.npy"), expected, atol=1e-5)
    assert json.loads((folder / "scores.json").read_text())["protocol"]["crop_queries"] is False


def test_distractors_follow_the_database(run, benchmark, weight_file, tmp_path):
    more = tmp_path / "more"
    (more / "jpg" / "0").mkdir(parents=True)
    for name in ("b.jpg", "a.jpg"):
        assert cv2.imwrite(str(more / "jpg/0" / name), noise(64, 64, len(name)))
    (more / "revisitop1m.txt").write_text("0/b.jpg\n0/a.jpg\n")
    folder = evaluate(run, benchmark, weight_file, distractors=more)
    names = json.loads((folder / "names.json").read_text())["database"]
    assert names[6:] == ["0/b.jpg", "0/a.jpg"]
    assert np.load(folder / "ranks.npy").shape == (8, 2)
    assert json.loads((folder / "scores.json").read_text())["protocol"]["distractors"] == 2
    assert runs.read_stage(folder, "")["recorded"]["distractors"] == str(more)


# Resume


def test_it_continues_where_it_stopped(run, benchmark, weight_file, tmp_path, monkeypatch):
    """Stopped after the second block of two images, it keeps both and ends the same."""
    monkeypatch.setattr(describe, "BLOCK", 2)
    (benchmark / "jpg/image3.jpg").write_bytes(b"")
    wanted = contents(evaluate(tmp_path / "whole", benchmark, weight_file, max_failed_share=1))
    with pytest.raises(runs.StageError, match="what is done so far is kept"):
        evaluate(run, benchmark, weight_file)
    path = run / "mini/global/database.npy"
    assert not path.exists()
    assert RowFile.open(path, (6, 64), settings={"precision": "fp32"}).rows == 4
    assert contents(evaluate(run, benchmark, weight_file, max_failed_share=1)) == wanted


def test_rows_on_disk_are_not_made_again(global_run, benchmark, weight_file):
    """Rows that no image gives are put where a killed run's would be, and found at the end."""
    folder = global_run / "mini/global"
    wanted = np.load(folder / "database.npy")
    interrupt(folder)
    rows = RowFile.open(folder / "database.npy", (6, 64), settings={"precision": "fp32"})
    assert rows.rows == 0
    marks = np.eye(2, 64, dtype=np.float32)
    rows.append(marks)
    database = np.load(evaluate(global_run, benchmark, weight_file) / "database.npy")
    np.testing.assert_array_equal(database[:2], marks)
    np.testing.assert_allclose(database[2:], wanted[2:], atol=1e-5)  # in other batches
    interrupt(folder)
    rows = RowFile.open(folder / "database.npy", (6, 64), settings={"precision": "bf16"})
    rows.append(marks)
    # The processor's other precision: neither mixed with ours nor thrown away unasked.
    with pytest.raises(runs.StageError, match='precision: "bf16" there, "fp32" now'):
        evaluate(global_run, benchmark, weight_file)
    again = evaluate(global_run, benchmark, weight_file, overwrite=True)
    np.testing.assert_array_equal(np.load(again / "database.npy"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_killed_while_describing(run, benchmark, weight_file, finished, monkeypatch, number):
    kill(evaluate, (run, benchmark, weight_file), "describe", number, monkeypatch)
    wanted = contents(finished / "run" / "mini" / "global")
    assert contents(evaluate(run, benchmark, weight_file)) == wanted


# Bad input


def test_a_failed_image_is_recorded_and_ranks_last(run, benchmark, weight_file, capsys):
    path = benchmark / "jpg/image1.jpg"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(runs.StageError, match=r"1 of 6 images.*image1: the file is cut short"):
        evaluate(run, benchmark, weight_file)
    # A greater fraction is no other setting: the same stage goes on.
    folder = evaluate(run, benchmark, weight_file, max_failed_share=0.2)
    failures = json.loads((folder / "failures.json").read_text())
    assert failures == [{"name": "image1", "reason": "the file is cut short"}]
    assert not np.load(folder / "database.npy")[1].any()
    assert np.load(folder / "ranks.npy")[-1].tolist() == [1, 1]
    assert json.loads((folder / "scores.json").read_text())["failed_images"] == 1
    evaluate(run, benchmark, weight_file, max_failed_share=0.2)
    assert capsys.readouterr().out.count("1 of 6 images could not be read") == 2  # reused too


def test_a_failed_query_stops(run, benchmark, weight_file):
    (benchmark / "jpg/query1.jpg").write_bytes(b"")
    with pytest.raises(runs.StageError, match="query1 cannot be read: the file is empty"):
        evaluate(run, benchmark, weight_file, max_failed_share=1)
    assert not (run / "mini/global/stage.json").exists()


def test_a_box_outside_its_query(run, benchmark, weight_file):
    assert cv2.imwrite(str(benchmark / "jpg/query1.jpg"), noise(60, 60, 0))
    with pytest.raises(ValueError, match=r"query1\.jpg: box .* of a 60 x 60 image"):
        evaluate(run, benchmark, weight_file)


def test_missing_weights(run, benchmark, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no weights.*02_train"):
        evaluate(run, benchmark, tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights.*`vitgal download vitgal_s24` br"):
        evaluate(run, benchmark, tmp_path / "weights" / "vitgal_s24.pth")
    with pytest.raises(ValueError, match="unknown architecture"):
        evaluate(run, benchmark, "untrained:resnet")


def test_a_model_that_gives_nan(run, benchmark, tmp_path):
    broken = build_model(NANO, seed=0)
    broken.backbone.cls_token.data[:] = float("nan")
    path = save_model(broken, tmp_path / "token.safetensors")
    with pytest.raises(ValueError, match="not finite: use precision fp32, or other weights"):
        evaluate(run, benchmark, path)
    assert not (run / "mini/global/database.npy").exists()
