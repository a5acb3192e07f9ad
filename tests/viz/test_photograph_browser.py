"""The browser over one's own photographs."""

import shutil

import ipywidgets as widgets
import pytest

from vitgal.data import photographs as data_photographs, revisited
from vitgal.settings import (
    GlobalSettings,
    LocalSettings,
    MachineSettings,
    MatchingSettings,
    RerankingSettings,
)
from vitgal.stages import inspection, own
from vitgal.stages.own import Describer
from vitgal.viz.browsers import PhotographBrowser, browse_photographs
from vitgal.viz.match_inspector import inspect_matches


@pytest.fixture
def describer(inspected_run, tmp_path) -> Describer:
    return Describer(
        tmp_path,
        inspected_run / "model.safetensors",
        GlobalSettings(size=64),
        LocalSettings(size=96),
        MachineSettings(threads=1),
    )


@pytest.fixture
def photographs(inspected_run, describer) -> own.Photographs:
    return own.describe_folder(inspected_run / "jpg", describer, progress=False)


@pytest.mark.slow
def test_photographs_of_any_name_are_browsed(inspected_run, describer, tmp_path):
    names = ["北京🗼", "a\u202eb", "line\nbreak\x1b[2J", "$x_1$", "漢" * 80, "caf\udce9"]
    for name, letter in zip(names, "qabcde", strict=True):
        shutil.copy(inspected_run / "jpg" / f"{letter}.jpg", tmp_path / f"{name}.jpg")
    folder = own.describe_folder(tmp_path, describer, progress=False)
    browser = PhotographBrowser(folder, folder.names[0], None, RerankingSettings(), columns=3)
    for name in folder.names:
        browser.query.value = name
        browser.button.click()
        assert len(browser.ranking.pictures.children) == 1, browser.ranking.words.value
        browser.partner.index = 1
        assert len(browser.pair.pictures.children) == 1, browser.pair.words.value
    labels = [label for label, _ in (*browser.query.options, *browser.partner.options)]
    assert len(labels) > 8 and all(label.isprintable() for label in labels)


@pytest.mark.slow
def test_a_box_is_drawn_and_searched(photographs):
    browser = PhotographBrowser(
        photographs,
        "q.jpg",
        None,
        RerankingSettings(matching=MatchingSettings(max_distance=0.5)),
        columns=3,
    )
    assert (browser.across.value, browser.down.value) == ((0, 128), (0, 96))
    assert browser.box is None
    assert browser.result.table["photograph"][0] == "a.jpg"  # the same photograph
    assert len(browser.partner.options) == 6
    before, outline = bytes(browser.pair.pictures.children[0].value), bytes(browser.preview.value)
    browser.partner.value = "c.jpg"
    assert bytes(browser.pair.pictures.children[0].value) != before
    browser.across.value, browser.down.value = (10, 100), (20, 90)
    assert bytes(browser.preview.value) != outline and browser.result.box is None
    browser.button.click()
    assert browser.result.box == browser.box == (10, 20, 100, 90)
    browser.across.value = (10, 12)
    browser.button.click()
    assert "2 x 70 pixels is less than one patch" in browser.ranking.words.value
    browser.query.value = "b.jpg"
    assert browser.box is None
    browser.button.click()
    assert browser.result.query == "b.jpg" and browser.ranking.pictures.children


def test_a_wrong_first_question_is_raised(photographs):
    for box, reason in (((50, 50, 10, 90), "empty"), ((-1, 0, 50, 50), "negative")):
        with pytest.raises(data_photographs.PhotographError, match=rf"^q\.jpg: .*{reason}"):
            browse_photographs(photographs, "q.jpg", box, RerankingSettings())
    with pytest.raises(data_photographs.PhotographError, match="no query z.jpg"):
        browse_photographs(photographs, "z.jpg", None, RerankingSettings())


@pytest.mark.slow
def test_no_browser_holds_an_output_widget(inspected_run, photographs):
    # One would answer on the socket where a headless run awaits the cell's end, and may hang there.
    searched = browse_photographs(photographs, "q.jpg", (0, 0, 90, 90), RerankingSettings(top=2))
    benchmark = revisited.open_dataset("tiny", inspected_run)
    weights = str(inspected_run / "model.safetensors")
    inspector = inspection.Inspector(inspected_run, benchmark, weights=weights)
    compared = inspect_matches(inspector, 0, None, RerankingSettings())
    for root in (searched, compared):
        kinds = {type(widget) for widget in within(root)}
        assert widgets.Image in kinds and widgets.Output not in kinds


def within(root: widgets.Widget) -> list[widgets.Widget]:
    return [root, *(inner for child in getattr(root, "children", ()) for inner in within(child))]
