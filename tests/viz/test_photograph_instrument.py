"""The front end over one's own photographs: what the kernel answers."""

import shutil

import numpy as np
import pytest

from tests.viz.test_instrument_answers import ask
from vitgal.data.photographs import PhotographError
from vitgal.settings import RerankingSettings
from vitgal.stages import own
from vitgal.viz.photograph_instrument import PhotographInstrument

SETTINGS = RerankingSettings.build({"max_distance": 0.5})


@pytest.fixture
def instrument(photographs) -> PhotographInstrument:
    return PhotographInstrument(photographs, "q.jpg", None, SETTINGS)


def pair_of(instrument, name: str, query: str = "q.jpg", box: list | None = None) -> dict:
    """A question on a pair of the search for a query."""
    image, searched = map(instrument.document["names"].index, (name, query))
    return dict(query=0, image=image, searched=searched, box=box)


def results(instrument, query: dict) -> list[str]:
    return [instrument.document["names"][number] for number in query["before"]]


def test_the_document_holds_the_first_search(instrument, photographs):
    (entry,) = instrument.document["entries"]
    (query,) = entry["queries"]
    table = own.search_folder(photographs, "q.jpg", None, SETTINGS).table
    assert results(instrument, query) == table["photograph"].tolist()
    assert results(instrument, query)[0] == "a.jpg"  # the same photograph
    assert query["similarity"] == pytest.approx(table["similarity"], abs=1e-4)
    assert query["inliers"] == table["inliers"].tolist() and query["box"] is None
    assert instrument.document["sizes"][query["image"]] == [128, 96]
    assert query["probability"] == [None] * len(query["verified"])  # no model for these settings


def test_another_query_and_a_box_are_searched(instrument):
    number = instrument.document["names"].index("q.jpg")
    reply, _ = ask(instrument, "search", image=number, box=[10, 20, 100, 90])
    assert reply["query"]["box"] == [10, 20, 100, 90]
    reply, _ = ask(instrument, "search", image=number, box=[10, 20, 12, 90])
    assert "2 x 70 pixels is less than one patch" in reply["error"]
    other = instrument.document["names"].index("b.jpg")
    reply, _ = ask(instrument, "search", image=other, box=None)
    assert reply["query"]["image"] == other and other not in reply["query"]["before"]


def test_a_pair_is_matched_under_the_knobs(instrument):
    question = pair_of(instrument, "a.jpg")
    pair, _ = ask(instrument, "pair", **question, settings={})
    assert pair["pair"]["matches"] == pair["pair"]["count"] > 20
    few, _ = ask(instrument, "pair", **question, settings={"max_keypoints": 10})
    assert few["pair"]["matches"] == 10
    # Another view searches: the pair is still that of the first search, even a long time after.
    number = instrument.document["names"].index("b.jpg")
    ask(instrument, "search", image=number, box=None)
    assert ask(instrument, "pair", **question, settings={})[0] == pair
    for left in range(15):  # the 17th search, of 16 that are kept
        ask(instrument, "search", image=number, box=[left, 0, 100, 90])
    assert len(instrument._results) == 16
    assert ask(instrument, "pair", **question, settings={})[0] == pair


def test_overlays_and_patches_are_those_of_the_searched_box(instrument, describer):
    number = instrument.document["names"].index("a.jpg")
    assert instrument.document["entries"][0]["features"]["tokens"]
    question = pair_of(instrument, "a.jpg", box=[10, 0, 90, 96]) | {"scale": 1.0}
    reply, attached = ask(instrument, "tokens", **question)
    assert reply["boxes"] == [[10, 0, 90, 96], [0, 0, 128, 96]]
    expected = describer.selection(instrument.images.paths[number]).scores[1.0]
    layers, height, width = reply["grids"][1]
    scores = np.frombuffer(attached[1], np.uint8).reshape(layers, height, width)[0]
    assert np.abs(scores / 255 - expected / expected.max()).max() < 0.003
    # q and a are one photograph, but other surroundings reach the patches of a box.
    patch, (data,) = ask(instrument, "patch", **question, side=1, x=50.0, y=40.0)
    x0, y0, x1, y1 = patch["patch"]
    assert x0 <= 50.5 < x1 and y0 <= 40.5 < y1 and patch["box"] == [10, 0, 90, 96]
    assert len(data) == patch["grid"][0] * patch["grid"][1]
    outside, _ = ask(instrument, "patch", **question, side=0, x=5.0, y=40.0)
    assert "outside the part" in outside["error"]


def test_a_dropped_photograph_is_the_query(instrument, inspected_run):
    data = (inspected_run / "jpg" / "a.jpg").read_bytes()
    name = "../../etc/<b>.jpg"
    reply, _ = ask(instrument, "drop", (data,), name=name)
    assert set(results(instrument, reply["query"])[:2]) == {"q.jpg", "a.jpg"}
    path = instrument.images.paths[reply["query"]["image"]]
    assert path.read_bytes() == data and path.parents[1].name.startswith("vitgal-query-")
    assert reply["size"] == [128, 96] and reply["name"] == path.name == "_b_.jpg"
    again, _ = ask(instrument, "search", image=reply["query"]["image"], box=[0, 0, 60, 60])
    assert again["query"]["box"] == [0, 0, 60, 60]
    bad, _ = ask(instrument, "drop", (b"no image",), name="x.jpg")
    assert bad["error"].startswith("x.jpg: not an image")
    large, _ = ask(instrument, "drop", (bytes(10 << 20),), name="x.jpg")
    assert "larger than 9 MB" in large["error"]


def test_photographs_of_any_name_are_searched(inspected_run, describer, tmp_path):
    names = ["北京🗼", "a\u202eb", "line\nbreak\x1b[2J", "</script>", "漢" * 80, "caf\udce9"]
    for name, letter in zip(names, "qabcde", strict=True):
        name = name.replace("/", "\u2215")
        shutil.copy(inspected_run / "jpg" / f"{letter}.jpg", tmp_path / f"{name}.jpg")
    folder = own.describe_folder(tmp_path, describer)
    instrument = PhotographInstrument(folder, folder.names[0], None, SETTINGS)
    for number in range(len(folder.names)):
        reply, _ = ask(instrument, "search", image=number, box=None)
        assert len(reply["query"]["before"]) == len(folder.names) - 1
        partner = reply["query"]["before"][0]
        question = dict(query=0, image=partner, searched=number, box=None, settings={})
        assert "pair" in ask(instrument, "pair", **question)[0]
        assert ask(instrument, "image", image=partner, large=True)[1][0][:2] == b"\xff\xd8"
    assert all(name.isprintable() for name in instrument.document["names"])


def test_a_photograph_that_has_gone_is_an_answer(inspected_run, describer, tmp_path):
    for letter in "qab":
        shutil.copy(inspected_run / "jpg" / f"{letter}.jpg", tmp_path / f"{letter}.jpg")
    folder = own.describe_folder(tmp_path, describer)
    (tmp_path / "b.jpg").unlink()
    instrument = PhotographInstrument(folder, "q.jpg", None, SETTINGS)
    number = instrument.document["names"].index("b.jpg")
    assert instrument.document["sizes"][number] == [0, 0]
    assert "error" in ask(instrument, "image", image=number, large=False)[0]
    assert "error" in ask(instrument, "search", image=number, box=None)[0]
    assert "pair" in ask(instrument, "pair", **pair_of(instrument, "b.jpg"), settings={})[0]


def test_a_wrong_first_question_is_raised(photographs):
    for box, reason in (((50, 50, 10, 90), "empty"), ((-1, 0, 50, 50), "negative")):
        with pytest.raises(PhotographError, match=rf"^q\.jpg: .*{reason}"):
            PhotographInstrument(photographs, "q.jpg", box, SETTINGS)
    with pytest.raises(PhotographError, match=r"no query z\.jpg"):
        PhotographInstrument(photographs, "z.jpg", None, SETTINGS)
