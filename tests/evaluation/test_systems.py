"""Tables of systems: results whose AP are written by hand, in run folders on disk."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitgal import evaluation, runs
from vitgal.app.command_line import main
from vitgal.data.revisited import GroundTruth
from vitgal.evaluation import system_text, systems
from vitgal.features import store
from vitgal.features.local import LocalFeatures

QUERIES = [f"q{index}" for index in range(6)]
NOTHING = [np.zeros(0, np.int64)] * len(QUERIES)


def place(
    run: Path, ap: list[float], stage="global", dataset="small", shared=1, **protocol
) -> Path:
    """Writes a scores.json: Medium with these AP, one for each query, Hard without any.

    shared: queries of each landmark.
    """
    truth = GroundTruth(
        name=dataset,
        database=list("abcdef"),
        queries=QUERIES[: len(ap)],
        boxes=np.tile([0.0, 0, 1, 1], (len(ap), 1)),
        easy=[np.array([query // shared]) for query in range(len(ap))],
        hard=NOTHING[: len(ap)],
        junk=NOTHING[: len(ap)],
    )
    medium = {"map": np.nanmean(ap), "mp_at": {1: 0.0, 10: 0.25}, "ap": np.array(ap)}
    none = {"map": np.nan, "mp_at": {10: np.nan}, "ap": np.full(len(ap), np.nan)}
    content = evaluation.scores_document(
        {"medium": medium, "hard": none},
        protocol={"dataset": dataset, "crop_queries": True} | protocol,
        parameters={"size": 224},
        inputs={},
        ground_truth=truth,
    )
    folder = run / dataset / stage
    runs.write_json(folder / "scores.json", content)
    return folder


def test_holm_by_hand():
    # In rising order 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before it
    corrected = evaluation.holm([0.04, np.nan, 0.01, 0.03])
    np.testing.assert_allclose(corrected, [0.06, np.nan, 0.03, 0.06])
    assert evaluation.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert evaluation.holm([]).shape == (0,)


def test_the_correction_decides_who_is_better(tmp_path):
    low, high = [0.1, 0.2, 0.3, 0.2, 0.1, 0.3], [0.3, 0.4, 0.5, 0.4, 0.3, 0.5]
    place(tmp_path / "a", low)
    place(tmp_path / "b", high)
    pair = evaluation.system_table([tmp_path / "a", tmp_path / "b"])
    # Six queries, all better: two of 64 combinations of signs are as extreme.
    test = pair.tests.set_index("protocol").loc["medium"]
    assert (test["p"], test["p Holm"]) == (2 / 64, 2 / 64)
    assert test["difference"] == pytest.approx(20)
    assert pair.systems["medium better than"].tolist() == [(), (1,)]
    place(tmp_path / "c", low)
    three = evaluation.system_table([tmp_path / name for name in "abc"])
    assert len(three.tests.query("protocol == 'medium'")) == 3
    assert three.tests["p Holm"].min() == 3 * 2 / 64  # above 0.05
    assert three.systems["medium better than"].tolist() == [(), (), ()]


def test_landmarks_are_resampled_not_queries(tmp_path):
    # Landmarks of two queries each: their means are 0.2, 0.4 and 0.6.
    place(tmp_path / "a", [0.1, 0.3, 0.4, 0.4, 0.6, 0.6], shared=2)
    place(tmp_path / "b", [0.5] * 6, shared=2)
    table = evaluation.system_table([tmp_path / "a", tmp_path / "b"])
    assert table.landmarks.count == 3
    # All three draws the same landmark, with probability 1/27 = 3.7 % each.
    assert table.systems.loc[1, ["medium low", "medium high"]].tolist() == pytest.approx([20, 60])
    assert table.tests.set_index("protocol").loc["medium", "low":"high"].isna().all()
    text = evaluation.as_text(table)
    assert "Intervals and tests resample 3 landmarks" in text
    assert "2 against 1: +10.0 points (–)" in text


def test_a_row_has_the_scores_in_percent(tmp_path):
    place(tmp_path / "a", [0.5, np.nan, 0.25])
    table = evaluation.system_table([tmp_path / "a"])
    row = table.systems.loc[1]
    assert (row["system"], row["size"], table.queries) == ("a global", "224", 3)
    assert (row["medium"], row["medium low"], row["medium high"]) == (37.5, 25, 50)
    assert row["medium mP@10"] == 25 and np.isnan(row["hard"]) and np.isnan(row["easy"])
    assert table.tests.empty
    text = evaluation.as_text(table)
    assert "37.5 (25.0 to 50.0)" in text and "beyond chance" not in text


def test_runs_of_one_name_and_stages_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        place(tmp_path / parent / "run", [0.5, 0.5])
    place(tmp_path / "y" / "run", [1.0, 0.5], stage="rerank")
    place(tmp_path / "y" / "run", [0.5, 0.5], dataset="val_retrieval")
    table = evaluation.system_table([tmp_path / "x" / "run", tmp_path / "y" / "run"])
    names = ["x/run global", "y/run global", "y/run reranked"]
    assert table.systems["system"].tolist() == names
    stages = [tmp_path / "y" / "run" / "small" / name for name in ("rerank", "global")]
    named = evaluation.system_table(stages).systems["system"].tolist()
    assert named == ["run reranked", "run global"]


def test_what_cannot_stand_in_one_table_is_refused(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    place(a, [0.5, 0.5])
    place(b, [0.5, 0.5], dataset="other")

    def refuses(text, *paths, **options):
        with pytest.raises((evaluation.TableError, FileNotFoundError, ValueError), match=text):
            evaluation.system_table(paths, **options)

    refuses("no run is named")
    refuses("is named twice", a, a / "small")
    refuses(r"no data set in common \(.*a: small; .*b: other\)", a, b)
    refuses("has no result on other, but on small", a, b, dataset="other")
    refuses("holds no scores.json", tmp_path / "a" / "small", runs_without_scores(tmp_path))
    place(a, [0.5, 0.5], dataset="other")
    refuses("results on other, small: name one with --dataset", a)
    refuses("b global has 2 queries, c global 1", b, place(tmp_path / "c", [0.5], dataset="other"))
    place(tmp_path / "d", [0.5, 0.5], dataset="other", distractors=9)
    refuses("a global is ranked among 0 distractors and d global among 9", a, tmp_path / "d",
            dataset="other")  # fmt: skip
    refuses("no published results are known on small", a, dataset="small", published=True)


def runs_without_scores(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_published_results_stand_in_columns_of_their_own(tmp_path):
    place(tmp_path / "a", [0.5, 0.5], dataset="roxford5k")
    table = evaluation.system_table([tmp_path / "a"], published=True)
    assert len(table.measured) == 1 and table.tests.empty
    ours = table.systems.set_index("system").loc["ViTGaL-S12"]
    assert (ours["published medium"], ours["published hard"]) == (79.64, 62.03)
    assert np.isnan(ours["medium"]) and "ACCV 2022" in ours["source"]
    assert np.isnan(table.systems.loc[1, "published medium"])
    shown = evaluation.display_table(table)
    assert shown.loc[1, "published Medium"] == "–" and shown.loc[2, "Medium"] == "–"
    # With a million distractors others are known.
    place(tmp_path / "b", [0.5, 0.5], dataset="roxford5k", distractors=1_001_001)
    million = evaluation.system_table([tmp_path / "b"], published=True).systems
    assert million.set_index("system").loc["ViTGaL-S12", "published medium"] == 68.92


def test_the_published_results_are_consistent():
    table = evaluation.published_results()
    assert not table.duplicated(["system", "dataset", "distractors"]).any()
    assert table["source"].str.len().gt(0).all() and table["hard"].between(20, 95).all()
    known = table.dropna(subset="medium")
    assert (known["medium"] > known["hard"]).all()
    assert set(table["dataset"]) == {"roxford5k", "rparis6k"}


def test_markup_in_names_is_escaped(tmp_path):
    run = tmp_path / "a|b_*c*$&#%{}^~\\<i>"
    place(run, [0.5] * 6)
    place(tmp_path / "plain", [0.1] * 6)
    table = evaluation.system_table([run, tmp_path / "plain"])
    lines = evaluation.as_markdown(table).splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]}) == 1
    assert r"a\|b\_\*c\*\$\&\#%\{\}^\~\\\<i\> global" in lines[2]
    assert "<sup>2</sup>" in lines[2]
    latex = evaluation.as_latex(table).splitlines()
    rows = [line for line in latex if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    escaped = (
        r"a\textbar{}b\_*c*\$\&\#\%\{\}\textasciicircum{}\textasciitilde{}\textbackslash{}"
        r"\textless{}i\textgreater{} global"
    )
    assert escaped in rows[1] and "$^{2}$" in rows[1]
    columns = re.search(r"begin\{tabular\}\{(\w+)\}", "\n".join(latex))[1]
    assert len(columns) == rows[0].count(" & ") + 1


def test_a_control_character_in_a_name_is_shown_as_an_escape(tmp_path):
    place(tmp_path / "a\nb", [0.5])
    table = evaluation.system_table([tmp_path / "a\nb"])
    assert r"a\\nb global" in evaluation.as_markdown(table)
    assert r"a\nb global" in evaluation.as_text(table)


def test_the_command_prints_and_writes(tmp_path, capsys):
    place(tmp_path / "a", [0.1] * 6)
    place(tmp_path / "b", [0.5] * 6)
    files = [tmp_path / f"t.{ending}" for ending in ("md", "tex", "csv")]
    written = [part for file in files for part in ("--to", str(file))]
    assert main(["table", str(tmp_path / "a"), str(tmp_path / "b"), *written]) == 0
    printed = capsys.readouterr().out
    assert "50.0 (50.0 to 50.0) >1" in printed and "2 against 1: +40.0 points" in printed
    assert all(f"written: {file}" in printed for file in files)
    numbers = pd.read_csv(tmp_path / "t.csv", index_col=0)
    assert numbers["medium"].tolist() == [10.0, 50.0]
    assert pd.read_csv(tmp_path / "t_tests.csv")["p Holm"].dropna().tolist() == [2 / 64]
    assert main(["table", str(tmp_path / "a"), "--to", str(tmp_path / "t.docx")]) == 1
    assert "ends with none of .md, .csv and .tex" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "nowhere")]) == 1
    assert "there is no run" in capsys.readouterr().err


def finish(folder: Path, name: str, seconds: float, **recorded) -> None:
    """Writes a stage's manifest with these seconds."""
    with runs.stage(folder, name, parameters={}, inputs={}) as stage:
        stage.finish([], recorded)
    manifest = runs.read_json(folder / runs.MANIFEST)
    manifest["recorded"]["seconds"] = seconds
    runs.write_json(folder / runs.MANIFEST, manifest)


def test_costs_come_from_the_stages(tmp_path):
    """8 images and 2 queries of 4 float32; local features of 2 images; 2 queries reranked."""
    run = tmp_path / "a" / "small"
    recorded = {"weights": "somewhere/net.pth", "device": "cuda"}
    finish(run / "global", "global", 1.0, **recorded)
    runs.write_array(run / "global" / "database.npy", np.zeros((8, 4), np.float32))
    runs.write_array(run / "global" / "queries.npy", np.zeros((2, 4), np.float32))
    finish(run / "local", "local", 3.0, images=2, failed=0, weights="somewhere/net.pth")
    features = LocalFeatures(
        keypoints=np.zeros((5, 2), np.float32),
        descriptors=np.eye(5, 3, dtype=np.float32),
        scores=np.ones(5, np.float32),
        scales=np.ones(5, np.float32),
        input_size=(16, 16),
        box=(0, 0, 16, 16),
        image_size=(16, 16),
    )
    kind = store.ShardFormat("float16", 3, {"precision": "fp32"})
    store.write_shard(run / "local" / "shard-00", [("a", features), ("b", features)], kind)
    store.write_index(run / "local")
    finish(run / "rerank", "rerank", 0.5, pairs=4)
    place(tmp_path / "a", [0.5, 0.5])
    place(tmp_path / "a", [0.5, 0.5], stage="rerank")
    rows = evaluation.system_table([tmp_path / "a"]).systems
    assert rows["network"].tolist() == ["net.pth"] * 2 and rows["device"][1] == "cuda"
    for weights, name in (("timm:vit@a/b.pth", "timm:vit"), ("untrained:x", "untrained:x")):
        manifest = runs.read_json(run / "global" / runs.MANIFEST)
        manifest["recorded"]["weights"] = weights
        runs.write_json(run / "global" / runs.MANIFEST, manifest)
        assert evaluation.system_table([run / "global"]).systems["network"][1] == name
    manifest["recorded"]["weights"] = None  # the run's own model
    runs.write_json(run / "global" / runs.MANIFEST, manifest)
    assert evaluation.system_table([run / "global"]).systems["network"][1] == "ViTGaL"
    with runs.stage(
        run.parent / "retrieval", "train", parameters={"architecture": "nano"}, inputs={}
    ) as stage:
        stage.finish([])
    assert evaluation.system_table([run / "global"]).systems["network"][1] == "ViTGaL, nano"
    assert rows["dimension"].tolist() == [4, 4] and rows["local dimension"][2] == 3
    np.testing.assert_allclose(rows["ms an image"], [100, 100 + 1500])
    np.testing.assert_allclose(rows["ms a query"], [np.nan, 250])
    files = sum(path.stat().st_size for path in (run / "local").rglob("*.npy"))
    np.testing.assert_allclose(rows["bytes an image"], [16, 16 + files / 2])
    assert evaluation.display_table(evaluation.system_table([tmp_path / "a"]))["dim"][2] == (
        "4 / local 3"
    )


def test_uncropped_queries_are_marked(tmp_path):
    place(tmp_path / "a", [0.5], crop_queries=False)
    (name,) = evaluation.system_table([tmp_path / "a"]).systems["system"]
    assert name == "a global, queries not cropped"


def test_long_tables_leave_the_list_of_tests_to_the_csv(tmp_path):
    for name in "abcdef":
        place(tmp_path / name, [0.5, 0.5])
    table = evaluation.system_table([tmp_path / name for name in "abcdef"])
    assert len(table.tests.query("protocol == 'medium'")) == 15 > system_text.LISTED
    assert "with the corrected p" not in evaluation.as_text(table)
    assert systems.PUBLISHED.is_file()
