"""Comparisons of results: three queries whose AP are written by hand, in run folders on disk."""

from pathlib import Path

import numpy as np
import pytest

from vitgal import runs
from vitgal.app.command_line import main
from vitgal.data.revisited import GroundTruth
from vitgal.evaluation import comparison, scores as evaluation_scores
from vitgal.features.files import FileError

QUERIES = ["p", "q", "r"]


def truth(queries=QUERIES, *, easy=0) -> GroundTruth:
    nothing = [np.zeros(0, np.int64)] * len(queries)
    return GroundTruth(
        name="small",
        database=["a", "b", "c", "d"],
        queries=list(queries),
        boxes=np.tile([0.0, 0, 1, 1], (len(queries), 1)),
        easy=[np.array([easy + index]) for index in range(len(queries))],
        hard=nothing,
        junk=nothing,
    )


def document(ap, *, ground_truth=None, parameters=None, **protocol) -> dict:
    """A scores.json: Medium with these AP, Hard without any."""
    ap = np.array(ap, np.float64)
    existing = ap[~np.isnan(ap)]
    scores = {
        "medium": {
            "map": existing.mean() if existing.size else np.nan,
            "mp_at": {1: 0.0},
            "ap": ap,
        },
        "hard": {"map": np.nan, "mp_at": {1: np.nan}, "ap": np.full(len(ap), np.nan)},
    }
    return evaluation_scores.scores_document(
        scores,
        protocol={"dataset": "small"} | protocol,
        parameters=parameters or {"size": 224},
        inputs={"weights": "ab" * 32, "ranks.npy": "cd" * 32},
        ground_truth=ground_truth or truth(),
    )


def place(folder: Path, content: dict) -> Path:
    runs.write_json(folder / "scores.json", content)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Runs a and b: their global results differ, b alone is reranked."""
    place(tmp_path / "a" / "small" / "global", document([0.5, np.nan, 0.25]))
    other = document([1.0, np.nan, 0.0], parameters={"size": 512})
    other["fingerprints"]["ranks.npy"] = "ef" * 32
    place(tmp_path / "b" / "small" / "global", other)
    place(tmp_path / "b" / "small" / "rerank", document([1.0, np.nan, 1.0], short_list="first"))
    return tmp_path / "a", tmp_path / "b"


def test_two_runs_query_by_query(two):
    result = comparison.compare(*two)
    assert list(result) == ["small/global"]
    single = result["small/global"]
    assert single.names == ("a", "b")
    # Changes +1/2 and -1/4; both signs tossed give sums of 3/4 and 1/4: all four count.
    test = single.tests["medium"]
    assert (test.difference, test.p_value, test.queries) == (0.125, 1.0, 2)
    assert (test.won, test.lost) == (1, 1)
    assert single.changes.index.tolist() == QUERIES
    changes = single.table("medium")["change"]
    assert changes.loc[["p", "r"]].tolist() == [0.5, -0.25] and np.isnan(changes["q"])
    assert single.table("medium").columns.tolist() == ["before", "after", "change"]
    assert single.intervals["medium"][0] == (0.375, 0.25, 0.5)
    assert single.tests["hard"].queries == 0 and "no query counts" in single.sentence("hard")


def test_differing_settings_are_listed_without_derived_ones(two):
    table = comparison.compare(*two)["small/global"].settings
    assert table.to_dict("index") == {"global.size": {"a": "224", "b": "512"}}
    stages = comparison.compare(two[0] / "small" / "global", two[1] / "small" / "rerank")
    (single,) = stages.values()
    assert single.names == ("global", "rerank")
    assert single.settings.loc["protocol.short_list"].tolist() == ["–", "first"]
    assert single.settings.loc["rerank.size"].tolist() == ["–", "224"]


def test_a_reranked_result_names_the_parameters_of_the_stages_before_it():
    single = document([0.5, 0.5, 0.5], short_list="x", parameters={"threshold": 16.0})
    other = single | {"earlier": {"global": {"size": 512}}}
    single = single | {"earlier": {"global": {"size": 224}}}
    result = comparison.compare_results(single, other, names=("a", "b"))
    assert result.settings.to_dict("index") == {"global.size": {"a": "224", "b": "512"}}
    assert "do not differ (every query has the same AP, 3 queries)" in result.sentence("medium")


def test_a_parameter_that_the_protocol_repeats_is_listed_once():
    single = document([0, 0, 0], parameters={"size": 224, "resize": "area"}, resize="area")
    other = document([0, 0, 0], parameters={"size": 224, "resize": "squash"}, resize="squash")
    result = comparison.setting_table(single, other, ("a", "b"))
    assert result.to_dict("index") == {"global.resize": {"a": "area", "b": "squash"}}
    # "auto" was asked for, and something else came of it: both are said.
    single = document([0, 0, 0], parameters={"precision": "auto"}, precision="bf16")
    other = document([0, 0, 0], parameters={"precision": "fp32"}, precision="fp32")
    result = comparison.setting_table(single, other, ("a", "b"))
    assert set(result.index) == {"global.precision", "protocol.precision"}


def test_results_are_found_from_a_run_a_data_set_and_a_stage(two, monkeypatch):
    run = two[1]
    assert list(comparison.find_results(run)) == ["small/global", "small/rerank"]
    assert list(comparison.find_results(run / "small")) == ["small/global", "small/rerank"]
    assert comparison.find_results(run / "small" / "global") == {
        "small/global": (run / "small" / "global").resolve()
    }
    monkeypatch.setenv("VITGAL_RUNS", str(run.parent))
    assert list(comparison.find_results("b/small")) == ["small/global", "small/rerank"]


def test_what_cannot_be_compared(two, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run nowhere"):
        comparison.compare("nowhere", two[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no scores.json: run the notebooks 04"):
        comparison.compare(two[0], tmp_path / "empty")
    with pytest.raises(comparison.ResultError, match="empty holds no scores.json: name a run"):
        comparison.compare_folders(tmp_path / "empty", two[0], names=("c", "a"))
    alone = tmp_path / "c"
    place(alone / "other" / "global", document([0, 0, 0]))
    place(alone / "other" / "rerank", document([0, 0, 0]))
    with pytest.raises(FileNotFoundError, match="a has small/global and .*other/global, other/re"):
        comparison.compare(two[0], alone)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (document([0, 0, 0], dataset="large"), "a is a result on small, b on large"),
        (
            document([0, 0], ground_truth=truth(["p", "q"])),
            "a has 3 queries, b 2, and query 2 is r there and None here",
        ),
        (document([0, 0, 0], ground_truth=truth(["p", "q", "s"])), "query 2 is r there and s here"),
        (document([0, 0, 0], ground_truth=truth(easy=1)), "different labels or boxes"),
        (document([0, 0, np.nan]), "query 2 counts in one system only"),
        ({"easy": document([0, 0, 0])["medium"]}, "share no protocol"),
    ],
)
def test_other_data_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        comparison.compare_results(document([1, 1, 1]), other, names=("a", "b"))


def test_names_are_the_shortest_that_differ():
    assert comparison.distinct_names(["x/demo/global", "x/demo/rerank"]) == ["global", "rerank"]
    paths = ["x/demo/global", "y/demo/global"]
    assert comparison.distinct_names(paths) == paths
    assert comparison.distinct_names(["x", "x"]) == ["x (1)", "x (2)"]


def test_command_prints_settings_then_results_aligned(two, capsys):
    assert main(["compare", *map(str, two), "--queries", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small/global: a (first) against b (second)"
    order = [
        next(i for i, line in enumerate(lines) if line.startswith(start))
        for start in ("what was set", "mAP in percent", "Medium", "queries that changed", "p: ")
    ]
    assert order == sorted(order)
    assert "  global.size  224  512" in lines
    table = [line for line in lines if line.startswith("  Medium")]
    assert table[0].split() == (
        "Medium 37.5 (25.0 to 50.0) 50.0 (0.0 to 100.0) +12.5 – 1.0000 1/1/0".split()
    )
    changed = lines[order[3] + 1 : order[3] + 4]
    assert [line.split() for line in changed[1:]] == [
        ["r", "25.0", "0.0", "-25.0"],
        ["p", "50.0", "100.0", "+50.0"],
    ]
    assert len(set(map(len, changed))) == 1


def test_command_reports_missing_files_and_ends_with_1(two, capsys):
    assert main(["compare", str(two[0]), "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("vitgal: there is no run nowhere")


def test_command_on_a_result_and_itself(two, capsys):
    assert main(["compare", str(two[0]), str(two[0])]) == 0
    out = capsys.readouterr().out
    assert "no setting differs" in out and "every query has the same AP in both" in out


@pytest.mark.parametrize("part", ["medium", "queries", "protocol", "fingerprints", "parameters"])
@pytest.mark.parametrize("value", [None, 3, "x", [1], {"ap": [2]}, {"map": 1, "ap": []}])
def test_scores_of_another_structure_are_refused_by_file(tmp_path, part, value):
    score = {"map": 0.5, "mp_at": {"1": 0.5}, "ap": [0.5, None]}
    document = {"medium": score, "queries": ["q", "r"], "protocol": {}}
    runs.write_json(tmp_path / "a" / "scores.json", document)
    runs.write_json(tmp_path / "b" / "scores.json", document | {part: value})
    folders = tmp_path / "a", tmp_path / "b"
    if part in ("protocol", "fingerprints", "parameters") and isinstance(value, dict):
        comparison.compare_folders(*folders, names=("a", "b"))
        return
    with pytest.raises(FileError, match="b/scores.json holds no scores"):
        comparison.compare_folders(*folders, names=("a", "b"))
