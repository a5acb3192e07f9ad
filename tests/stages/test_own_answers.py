"""Own photographs, many at once: what is asked, results.csv, places, the page, nothing twice."""

import json
import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.stages.test_own import describe, folder as two_places, texture, write
from tests.stages.test_own_presence import (
    RERANKING,
    described,
    described_once,
    sift_describer,
)
from tests.training_runs import exit_code
from vitgal import runs
from vitgal.app import command_line
from vitgal.data.photographs import PhotographError, list_photographs
from vitgal.retrieval.presence import Presence, PresenceError
from vitgal.stages import known_files, own, own_answers, verified_pairs
from vitgal.viz.own_document import own_document
from vitgal.viz.report import write_page

__all__ = ["described", "described_once", "two_places"]  # fixtures

PRESENCE = Presence(-4.0, 0.0, 2.0, 0.6, 1.0, 1.0, 10, 5)  # 0.5 at 6.4 inliers


def answers_to(photographs, *queries, presence=PRESENCE, **options) -> own_answers.Answers:
    asked = own_answers.named_queries(photographs, queries, **options)
    return own_answers.answer(photographs, asked, RERANKING, presence)


@pytest.fixture(scope="module")
def answers(described_once, xcit_file, tmp_path_factory) -> own_answers.Answers:
    """Those to all photographs of the places, to read alone."""
    folder = tmp_path_factory.mktemp("answered")
    shutil.copytree(described_once, folder, dirs_exist_ok=True)
    return answers_to(describe(folder / "places", sift_describer(xcit_file, folder / "run")))


# Questions and answers


def test_what_is_asked(described, tmp_path):
    every = own_answers.named_queries(described)
    assert [query.name for query in every] == described.names
    outside = write(tmp_path / "more/0/1.png", texture(50))
    shutil.copy(outside, tmp_path / "more/1.png")
    listed = own_answers.named_queries(described, ["0/2.png", "0/2.png"], tmp_path / "more")
    # "0/1.png" of the folder of queries is another file than that of the photographs
    assert [query.name for query in listed] == ["0/2.png", "0/1.png", "1.png"]
    assert listed[1].path == outside
    twice = own_answers.named_queries(described, [str(tmp_path / "more/1.png"), str(outside)])
    assert [query.name for query in twice] == ["1.png", str(outside)]
    with pytest.raises(PhotographError, match="a box belongs to one query, and there are 12"):
        own_answers.named_queries(described, box=(0, 0, 20, 20))
    with pytest.raises(PhotographError, match="there is no query z.png"):
        own_answers.named_queries(described, ["0/1.png", "z.png"])
    (tmp_path / "none").mkdir()
    with pytest.raises(PhotographError, match="holds no photograph"):
        own_answers.named_queries(described, (), tmp_path / "none")


def test_answers_are_those_of_single_searches(described, tmp_path):
    answers = answers_to(described, "3/1.png", "0/2.png")
    path = own_answers.write_answers(answers, tmp_path / "results.csv")
    written = pd.read_csv(path)
    assert list(written) == ["query", "rank", "image", "similarity", "inliers", "probability"]
    assert len(written) == 2 * 11
    for name in ("3/1.png", "0/2.png"):
        alone = own.search_folder(described, name, None, RERANKING, PRESENCE).table
        rows = written[written["query"] == name]
        assert rows["image"].tolist() == alone["photograph"].tolist()
        assert rows["inliers"].tolist() == alone["inliers"].tolist()
        np.testing.assert_allclose(rows["probability"], alone["probability"], atol=1e-6)
    assert written["image"][0] == "3/2.png" and answers.verdicts[0].startswith("the best shows it")
    unknown = answers_to(described, "0/1.png", presence=None)
    text = own_answers.write_answers(unknown, tmp_path / "results.csv").read_text()
    assert text.splitlines()[1].endswith(",")  # no probability


def test_a_query_that_cannot_be_read_is_named(described, tmp_path):
    write(tmp_path / "more/b.png", texture(0))
    (tmp_path / "more/a.png").write_text("no image")
    answers = answers_to(described, folder=tmp_path / "more")
    assert [query.name for query in answers.queries] == ["b.png"]
    assert answers.left_out == {"a.png": "not an image that OpenCV can decode"}
    (tmp_path / "more/b.png").unlink()
    with pytest.raises(PhotographError, match="none of the 1 queries can be read; a.png: not an"):
        answers_to(described, folder=tmp_path / "more")


# Nothing twice


def test_pairs_are_verified_once(described, weight_file, monkeypatch):
    compared = []
    inspect = verified_pairs.inspect_shortlist

    def counting(query, candidates, *arguments, **options):
        candidates = list(candidates)
        compared.append(len(candidates))
        return inspect(query, candidates, *arguments, **options)

    monkeypatch.setattr(verified_pairs, "inspect_shortlist", counting)
    first = answers_to(described, "0/1.png", "1/1.png").table
    again = answers_to(described, "0/1.png", "1/1.png").table
    pd.testing.assert_frame_equal(first, again)
    assert sum(compared) == 22  # by threads, each of which has its part
    (described.folder / "7/1.png").rename(described.folder / "moved.png")
    write(described.folder / "new.png", texture(60))
    later = describe(described.folder, described.describer)
    assert len(answers_to(later, "0/1.png").table) == 12
    assert sum(compared) == 22 + 1  # the new one alone
    for file in described.describer.folder.glob("pairs/*/*/*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    pd.testing.assert_series_equal(
        answers_to(later, "0/1.png").table["inliers"],
        answers_to(describe(described.folder, described.describer), "0/1.png").table["inliers"],
    )
    assert sum(compared) == 22 + 1 + 12


def test_unchanged_files_are_not_read(two_places, tmp_path, monkeypatch):
    monkeypatch.setattr(known_files, "SETTLED", -1)  # a file may be as new as the test
    read, digest = [], known_files.file_digest
    monkeypatch.setattr(known_files, "file_digest", lambda path: read.append(path) or digest(path))

    def look():
        read.clear()
        known = known_files.KnownFiles(tmp_path / "files.json")
        found = {
            name: known.look(two_places / name)[0] for name in list_photographs(two_places).names
        }
        known.save()
        return found

    first = look()
    assert len(read) == 3 and look() == first and read == []
    (two_places / "a").rename(two_places / "renamed")  # its files are the same ones
    assert list(look().values()) == [first["b/1.JPG"], first["a/1.png"], first["a/2.png"]]
    assert read == []
    stated = os.stat(two_places / "b/1.JPG")
    shutil.copy(two_places / "renamed/1.png", two_places / "b/1.JPG")
    os.utime(two_places / "b/1.JPG", ns=(stated.st_atime_ns, stated.st_mtime_ns))  # disguised
    assert look()["b/1.JPG"] == first["a/1.png"] and len(read) == 1
    entries = json.loads((tmp_path / "files.json").read_text())
    entries = {name: [*entry[:3], "../../etc/passwd", None] for name, entry in entries.items()}
    (tmp_path / "files.json").write_text(json.dumps(entries))
    assert look()["b/1.JPG"] == first["a/1.png"]
    (tmp_path / "files.json").write_text("[damaged")
    assert look()["b/1.JPG"] == first["a/1.png"]


def test_a_file_that_was_just_written_is_read_again(two_places, tmp_path):
    known = known_files.KnownFiles(tmp_path / "files.json")
    known.look(two_places / "a/1.png")
    known.save()
    assert not (tmp_path / "files.json").exists()


def test_memory_holds_no_local_features(described):
    assert described.descriptors.shape[0] == len(described.files) == 12
    assert not any(isinstance(value, own.Description) for value in vars(described).values())


# Places


def test_places_of_a_folder(answers, tmp_path):
    described = answers.photographs
    found = own_answers.find_places(answers)
    names = [sorted(described.names[index] for index in place.members) for place in found]
    assert names == [[f"{place}/1.png", f"{place}/2.png"] for place in range(4)]
    path = own_answers.write_places(described, found, tmp_path / "places.csv")
    table = pd.read_csv(path)
    assert list(table) == ["place", "photograph", "best", "links", "probability"]
    assert table["place"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4] and table["best"].sum() == 4
    assert (table["probability"] >= PRESENCE.threshold).all() and (table["links"] == 1).all()
    with pytest.raises(PresenceError, match="places need a probability, which is unknown"):
        own_answers.find_places(answers_to(described, "0/1.png", presence=None))
    header = own_answers.write_places(described, [], tmp_path / "places.csv").read_text()
    assert header == "place,photograph,best,links,probability\n"


def test_a_pair_counts_that_was_verified_both_ways(answers):
    table = answers.table.copy()
    one_way = (table["query"] == "0/1.png") & (table["image"] == "0/2.png")
    table.loc[one_way, "probability"] = 0.1
    assert len(own_answers.find_places(replace(answers, table=table))) == 3


# The page


def test_the_page_shows_answers_and_places(answers, tmp_path):
    described = answers.photographs
    document, images = own_document(answers, own_answers.find_places(answers))
    (entry,) = document["entries"]
    assert entry["kind"] == "own" and len(entry["queries"]) == 12
    assert len(document["names"]) == len(document["sizes"]) == 12
    query = entry["queries"][0]
    assert document["names"][query["image"]] == "0/1.png"
    first = query["after"]["medium"][0]
    assert document["names"][first] == "0/2.png" and document["sizes"][first] == [128, 96]
    shown = query["verified"].index(first)
    assert query["probability"][shown] > PRESENCE.threshold
    pair = query["pairs"][0]
    assert pair["image"] == first and pair["count"] == query["inliers"][shown]
    nearest = np.argsort(-described.descriptors @ described.descriptors[1], kind="stable")
    expected = [described.names[index] for index in nearest if index != 1]
    near = entry["neighbours"][str(document["names"].index(described.names[1]))]
    assert [document["names"][number] for number in near] == expected
    assert len(entry["places"]) == 4
    assert {document["names"][i] for i in entry["places"][0]["images"]} == {"0/1.png", "0/2.png"}
    page = write_page(document, images, tmp_path / "report")
    assert len(list((tmp_path / "report/thumbs").glob("*.jpg"))) == 12
    assert page.read_text().count("</script>") == 2
    assert own_document(answers)[0]["entries"][0]["places"] is None


# Bad input


def test_the_run_inside_the_folder_is_passed_over(two_places, weight_file):
    """The page's own pictures would be photographs of the folder at the next search."""
    run = two_places / "runs/mine"
    photographs = describe(two_places, sift_describer(weight_file, run))
    document, images = own_document(answers_to(photographs))
    write_page(document, images, run / "own" / "report")
    assert describe(two_places, sift_describer(weight_file, run)).names == photographs.names
    inside = describe(run, sift_describer(weight_file, two_places / "runs/other"))  # inside a run
    assert inside.names and all(name.startswith("own/report/") for name in inside.names)
    with pytest.raises(PhotographError, match="holds no photograph"):
        describe(run, sift_describer(weight_file, run))


def command(folder, weight_file, tmp_path) -> list[str]:
    return [
        *("own", str(folder), "--output", str(tmp_path / "run"), "-p", "weights", str(weight_file)),
        *("-p", "local", "sift", "-p", "global_size", "64"),
    ]


def test_two_processes_on_one_folder(two_places, weight_file, tmp_path, capsys):
    """The lock is that of another open file, as another process has it."""
    describer = sift_describer(weight_file, tmp_path / "run")
    with runs.locked(describer.folder):
        with pytest.raises(runs.StageError, match="another process is working in .*wait for it"):
            describe(two_places, describer)
    assert describe(two_places, describer).extracted == 3
    with runs.locked(tmp_path / "run/own"):
        assert command_line.main(command(two_places, weight_file, tmp_path)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vitgal: another process is working in") and "/run/own;" in error


def test_a_full_disk_is_one_sentence_and_what_is_whole_stays(two_places, weight_file, tmp_path):
    """A process that may write no file of more than 2 kB, as a full disk allows none."""
    describer = sift_describer(weight_file, tmp_path / "run")
    describer.describe(two_places / "b/1.JPG")
    (kept,) = describer.folder.glob("*/*.npz")

    def describe_all() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        with pytest.raises(OSError) as error:
            own.describe_folder(two_places, sift_describer(weight_file, tmp_path / "run"))
        (tmp_path / "message").write_text(str(error.value))

    assert exit_code(describe_all) == 0
    message = (tmp_path / "message").read_text()
    assert "no space left to write" in message and "run the same command again" in message
    assert list(describer.folder.glob("*/*.npz")) == [kept]
    assert not list(describer.folder.rglob(".tmp-*"))
    assert describe(two_places, describer).extracted == 2


def test_a_photograph_that_vanishes_between_description_and_answer(described):
    described.describer.describe(described.path("0/1.png"))
    (described.folder / "0/1.png").unlink()
    answers = answers_to(described, "1/1.png")
    assert "0/1.png" in answers.table["image"].tolist()
    every = own_answers.answer(described, own_answers.named_queries(described), RERANKING, PRESENCE)
    assert list(every.left_out) == ["0/1.png"] and len(every.queries) == 11
    described.path("1/1.png").unlink()
    document, images = own_document(answers)
    write_page(document, images, described.describer.run / "own/report")
    assert document["entries"][0]["queries"][0]["pairs"]


@pytest.mark.slow
def test_three_photographs_among_200_000_files(two_places, weight_file, tmp_path):
    """Links to one small file: 200,000 entries of a folder, as of a programmer's home."""
    (two_places / "code").mkdir()
    for number in range(200_000):
        if number % 20_000 == 0:
            part = two_places / f"code/{number}"
            part.mkdir()
            (part / "0.py").write_text("x")
        os.link(part / "0.py", part / f"{number + 1}.py")
    photographs = describe(two_places, sift_describer(weight_file, tmp_path / "run"))
    assert photographs.names == ["a/1.png", "a/2.png", "b/1.JPG"]
    assert photographs.report() == "3 photographs described, 200011 other files passed over"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--places", "--query", "a.png"], "--places asks every photograph: leave out --query"),
        (["--places"], "(--output runs/own), or fit one by stages.fit_places to a folder with"),
        (["--queries", "none"], "none is not a folder"),
        (["--query", "a/1.png", "--query", "z.png"], "there is no query z.png"),
        (["--box", "0,0,40,40"], "a box belongs to one query, and there are 3"),
    ],
)
def test_the_command_refuses(two_places, weight_file, tmp_path, capsys, options, message):
    assert command_line.main([*command(two_places, weight_file, tmp_path), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error


def test_the_command_asks_every_photograph(two_places, weight_file, tmp_path, capsys):
    assert command_line.main(command(two_places, weight_file, tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"3 queries answered: {tmp_path}/run/own/results.csv"
    assert lines[-1] == f"page: {tmp_path}/run/own/report/index.html"
    first = (tmp_path / "run/own/results.csv").read_bytes()
    assert len(first.splitlines()) == 1 + 3 * 2
    assert command_line.main(command(two_places, weight_file, tmp_path)) == 0
    assert (tmp_path / "run/own/results.csv").read_bytes() == first


def test_what_shows_the_query_expands_it(described, tmp_path):
    """The order worked out from the table without expansion and the stored descriptors."""
    plain = own.search_folder(described, "0/1.png", None, RERANKING).table
    table = own.search_folder(described, "0/1.png", None, RERANKING, PRESENCE).table
    rows = dict(zip(described.names, described.descriptors.astype(np.float64), strict=True))
    logits = -4 + 2 * np.log1p(plain["evidence"].astype(float))
    found = plain["photograph"][1 / (1 + np.exp(-logits)) >= PRESENCE.threshold].tolist()
    assert "0/2.png" in found and len(found) < len(plain)
    mean = rows["0/1.png"] + sum(rows[name] for name in found)
    mean /= np.linalg.norm(mean)
    evidence = dict(zip(plain["photograph"], plain["evidence"], strict=True))
    bonus = {name: 0.02 * max(min(count, 60) - 4, 0) for name, count in evidence.items()}
    scores = {name: rows[name] @ mean + value for name, value in bonus.items()}
    assert table["photograph"].tolist() == sorted(scores, key=lambda name: -scores[name])
    assert table["rank"].tolist() == list(range(1, 12))
    similar = dict(zip(plain["photograph"], plain["similarity"], strict=True))
    assert [similar[name] for name in table["photograph"]] == table["similarity"].tolist()
    low = Presence(-50.0, 0.0, 2.0, 0.6, 1.0, 1.0, 10, 5)  # nothing shows it
    same = own.search_folder(described, "0/1.png", None, RERANKING, low).table
    assert same["photograph"].tolist() == plain["photograph"].tolist()
