"""The page of `vitgal report`, and the document that it draws from."""

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.viz.reported_run import DATABASE, QUERIES, SHIFT, SIMILARITIES, write_run
from vitgal import runs
from vitgal.app import command_line
from vitgal.data import revisited
from vitgal.settings import GlobalSettings
from vitgal.stages.describe import evaluate_descriptors
from vitgal.viz import report
from vitgal.viz.instrument import Instrument
from vitgal.viz.run_document import Images, descriptor_map, run_document


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("reported"))


@pytest.fixture
def own(run, tmp_path) -> Path:
    """A copy of the run, beside a copy of its data."""
    shutil.copytree(run.parent, tmp_path / "copy")
    manifest = tmp_path / "copy" / "run" / "tiny" / "global" / "stage.json"
    text = manifest.read_text().replace(str(run.parent), str(tmp_path / "copy"))
    manifest.write_text(text)
    return tmp_path / "copy" / "run"


def names(document: dict, images: list[int]) -> list[str]:
    return [document["names"][image] for image in images]


def test_the_document_holds_rankings_labels_and_ranks(run):
    document, images = run_document([run])
    (entry,) = document["entries"]
    query = entry["queries"][0]
    order = np.argsort(-SIMILARITIES[0])
    assert names(document, query["before"]) == [DATABASE[image] for image in order]
    assert query["similarity"] == pytest.approx(0.7 * SIMILARITIES[0][order], abs=1e-3)
    assert names(document, query["labels"]["hard"]) == [DATABASE[1]]
    # Image 1 alone matches: it moves from the end to the front, past the ignored junk.
    assert names(document, query["after"]["hard"])[0] == DATABASE[1]
    image, before, after = query["worst"]["hard"]
    assert (names(document, [image]), before, after) == ([DATABASE[1]], 4, 1)
    assert entry["queries"][1]["worst"].keys() == {"easy", "medium"}
    assert sorted(images.names) == sorted([*QUERIES, *DATABASE])
    json.dumps(document, allow_nan=False)


def test_a_pair_has_its_matches_in_pixels_of_the_photographs(run):
    document, _ = run_document([run])
    query = document["entries"][0]["queries"][0]
    (pair,) = [pair for pair in query["pairs"] if document["indices"][pair["image"]] == 1]
    assert (pair["matches"], sum(pair["inlier"])) == (30, 30)
    points = np.array(pair["points"]).reshape(-1, 4)
    # The network's inputs are twice as wide as box and photograph, and equally high; the query's
    # box begins at 8.
    expected = points[:, :2] + [SHIFT[0] / 2 - 8, SHIFT[1]]
    assert points[:, 2:] == pytest.approx(expected, abs=0.11)  # each is rounded to 0.1
    h = np.array(pair["homography"]).reshape(3, 3)
    assert h / h[2, 2] == pytest.approx(
        np.array([[1, 0, SHIFT[0] / 2 - 8], [0, 1, SHIFT[1]], [0, 0, 1]]), abs=1e-3
    )
    counted = dict(zip(query["verified"], query["inliers"], strict=True))
    assert counted[pair["image"]] == 30


def test_candidates_have_their_probabilities_where_the_run_has_them(run, tmp_path):
    document, _ = run_document([run])
    query = document["entries"][0]["queries"][0]
    assert query["probability"] == [None] * len(query["verified"])
    judged = shutil.copytree(run, tmp_path / "judged")
    (folder,) = judged.glob("*/rerank")
    candidates = np.load(folder / "candidates.npy")
    runs.write_array(folder / "probabilities.npy", np.where(candidates == 1, 0.98765, -1.0))
    document, _ = run_document([judged])
    query = document["entries"][0]["queries"][0]
    shown = dict(zip(query["verified"], query["probability"], strict=True))
    known = {document["indices"][image]: shows for image, shows in shown.items()}
    assert known.pop(1) == 0.9877 and set(known.values()) <= {None}


def test_neighbours_are_the_database_images_of_nearest_descriptors(run):
    document, _ = run_document([run])
    entry = document["entries"][0]
    rows = np.load(run / "tiny" / "global" / "database.npy")
    products = rows @ rows.T
    for image, name in enumerate(DATABASE):
        number = document["names"].index(name)
        expected = [other for other in np.argsort(-products[image]) if other != image]
        found = names(document, entry["neighbours"][str(number)])
        assert found == [DATABASE[other] for other in expected]


@pytest.mark.parametrize("written", [False, True], ids=["never reranked", "being written"])
def test_a_run_without_reranking_has_its_global_ranking_alone(own, written):
    if written:  # a stage's manifest comes last
        (own / "tiny" / "rerank" / "stage.json").unlink()
        (own / "tiny" / "rerank" / "inliers.npy").write_bytes(b"half")
    else:
        shutil.rmtree(own / "tiny" / "rerank")
        shutil.rmtree(own / "tiny" / "local")
    (entry,) = run_document([own])[0]["entries"]
    assert list(entry["scores"]) == ["global"]
    assert entry["tests"] == {}
    assert (entry["queries"][0]["after"], entry["queries"][0]["pairs"]) == ({}, [])


def test_a_run_whose_local_features_were_removed_has_its_rankings(own):
    shutil.rmtree(own / "tiny" / "local")
    (entry,) = run_document([own])[0]["entries"]
    assert list(entry["scores"]) == ["global", "reranked"] and entry["features"] is None
    assert [query["pairs"] for query in entry["queries"]] == [[], []]
    assert max(entry["queries"][0]["inliers"]) == 30


def test_runs_of_different_data_sets_are_not_compared(run, own):
    data = own.parent / "data"
    truth = dataclasses.replace(revisited.load_ground_truth(data / "gnd_tiny.pkl"), name="other")
    truth.easy[1] = np.array([4])
    revisited.write_ground_truth(data / "gnd_other.pkl", truth)
    described = own.parent / "descriptors.npy"
    other = own.parent / "other"
    evaluate_descriptors(
        other, revisited.open_dataset("other", data), GlobalSettings(top=6), descriptors=described
    )
    document, _ = run_document([run, other])
    assert [entry["dataset"] for entry in document["entries"]] == ["tiny", "other"]
    (comparison,) = document["comparisons"]
    assert "tests" not in comparison and "tiny" in comparison["reason"]


NAMES = [
    "</script><script>window.bad=1</script>",
    "<!--",
    "a\u202eb",
    "🏰",
    "'\"&amp;",
    "caf\udce9",
]


def test_names_of_any_kind_are_data_of_the_page(tmp_path):
    images = Images()
    for name in NAMES:
        images.number(tmp_path / name.replace("/", "_"), name)
    assert images.sizes == [[0, 0]] * len(NAMES)  # no such file
    text = report.page(images.document([]))
    text.encode()
    assert text.count("</script>") == 2 and text.count("<!--") == 0
    data = json.loads(re.search(r'id="document">(.*?)</script>', text, re.DOTALL)[1])
    assert data["names"] == [runs.printable(name) for name in NAMES]
    assert data["names"][:2] == NAMES[:2] and all(name.isprintable() for name in data["names"])


def test_two_runs_on_one_data_set_are_compared(run, own):
    shutil.rmtree(own / "tiny" / "rerank")
    document, _ = run_document([run, own])
    (comparison,) = document["comparisons"]
    assert comparison["tests"].keys() >= {"easy", "medium", "hard"}
    # Each file is shown once; both runs' images are their own.
    assert len(document["names"]) == 2 * (len(QUERIES) + len(DATABASE))


def test_a_run_without_a_global_stage_is_refused(tmp_path):
    with pytest.raises(runs.StageError, match="04_global_evaluation"):
        run_document([tmp_path])


def test_the_map_keeps_two_groups_apart_and_is_the_same_each_time():
    generator = np.random.default_rng(0)
    groups = generator.standard_normal((40, 16)) * 0.01 + np.repeat(np.eye(2, 16), 20, axis=0)
    points = descriptor_map(groups.astype(np.float32))
    assert points.shape == (40, 2)
    assert points.min() == 0 and points.max() == 1
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    within = max(distance[:20, :20].max(), distance[20:, 20:].max())
    assert within < distance[:20, 20:].min()
    np.testing.assert_array_equal(points, descriptor_map(groups.astype(np.float32)))
    assert descriptor_map(np.eye(4, dtype=np.float32)).shape == (4, 2)


def test_the_page_stands_alone_and_names_stay_text(run, tmp_path):
    page = report.write_report([run], tmp_path / "page")
    text = page.read_text()
    assert text.count("</script>") == 2
    assert text.count("\n") < 2_900  # the script stays below 2,500 lines, the style below 400
    assert "<img src=x" not in text
    data = json.loads(re.search(r'id="document">(.*?)</script>', text, re.DOTALL)[1])
    assert sorted(data["names"]) == sorted([*QUERIES, *DATABASE])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    for address in [*data["thumbs"], *data["photos"].values()]:
        assert (page.parent / address).read_bytes()[:2] == b"\xff\xd8"
    again = report.write_report([run], tmp_path / "page")
    assert again.read_text() == text


def test_one_file_holds_all(run, tmp_path):
    page = report.write_report([run], tmp_path / "page", single_file=True)
    data = json.loads(re.search(r'id="document">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert all(address.startswith("data:image/jpeg;base64,") for address in data["thumbs"])
    assert [path.name for path in page.parent.rglob("*.jpg")] == []


def test_a_photograph_that_cannot_be_read_is_left_out(own):
    (own.parent / "data" / "jpg" / "e.jpg").write_bytes(b"no photograph")
    page = report.write_report([own])
    assert page == own / "report" / "index.html"
    data = json.loads(re.search(r'id="document">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    number = data["names"].index("e")
    assert (data["thumbs"][number], data["sizes"][number]) == (None, [0, 0])


def test_files_of_others_are_not_overwritten(run, tmp_path):
    (tmp_path / "index.html").write_text("<p>mine</p>")
    with pytest.raises(runs.StageError, match="no part of a report"):
        report.write_report([run], tmp_path)
    assert (tmp_path / "index.html").read_text() == "<p>mine</p>"
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(runs.PathError):
        report.write_report([run], tmp_path / "link")


def test_the_command_writes_the_page(run, tmp_path, capsys):
    options = ["report", str(run), "--to", str(tmp_path / "page"), "--ranks", "2", "--pairs", "0"]
    assert command_line.main(options) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    assert command_line.main(["report", str(tmp_path / "none")]) == 1


class Page:
    """A report opened from disk, with everything that went wrong in it."""

    def __init__(self, browser, path: Path):
        self.page = browser.new_page(viewport={"width": 1300, "height": 900})
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("request", self._note)
        self.page.goto(path.absolute().as_uri())
        self.page.wait_for_selector("main")

    def _note(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.faults.append(f"asked for {request.url}")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def contrast_and_names(self) -> list[str]:
        """What axe-core finds wrong."""
        from axe_playwright_python.sync_playwright import Axe

        results = Axe().run(self.page).response["violations"]
        return [f"{found['id']}: {found['nodes'][0]['html'][:200]}" for found in results]

    def missed_by_tab(self) -> list[str]:
        """The controls that are shown and that Tab does not reach."""
        controls = self.page.locator("button, input, select, summary, canvas.pair")
        controls = controls.filter(visible=True)
        reached = self.page.evaluate_handle("() => new Set()")
        for _ in range(controls.count() + 5):
            self.page.keyboard.press("Tab")
            reached.evaluate("reached => reached.add(document.activeElement)")
        missed = "(all, reached) => all.filter((one) => !reached.has(one)).map(String)"
        return controls.evaluate_all(missed, reached)


def drag_over(page, selector: str, margin: float) -> None:
    """Draws a rectangle with the mouse over an element, from corner to corner."""
    box = page.locator(selector).bounding_box()
    page.mouse.move(box["x"] + margin, box["y"] + margin)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - margin, box["y"] + box["height"] - margin)
    page.mouse.up()


def parameters(page) -> str:
    """What the page gives to reproduce what is shown."""
    page.get_by_role("button", name="copy as parameters").click()
    text = page.locator("dialog textarea").input_value()
    page.get_by_role("button", name="close").last.click()
    return text


@pytest.mark.slow
def test_the_page_in_a_browser(run, own, browser, tmp_path):
    shutil.rmtree(own / "tiny" / "rerank")
    path = report.write_report([run, own], tmp_path / "page")
    view = Page(browser, path)
    page = view.page
    assert page.locator("table.queries tbody tr").count() == 2
    assert view.contrast_and_names() == [] and view.missed_by_tab() == []

    # A drag over the plot selects queries; both have AP 1 after reranking.
    drag_over(page, "svg.chart", 5)
    assert "2 of 2 queries" in view.text("main")
    page.keyboard.press("Escape")
    first, second = (row.bounding_box() for row in page.locator("table.queries tbody tr").all())
    page.mouse.move(first["x"] + 300, first["y"] + 5)  # over the rows of the table
    page.mouse.down()
    page.mouse.move(second["x"] + 300, second["y"] + 5)
    page.mouse.up()
    assert "2 of 2 queries" in view.text("main")
    page.reload()
    page.wait_for_selector("main")
    assert "2 of 2 queries" in view.text("main")  # by the address
    page.keyboard.press("Escape")
    page.keyboard.press("Shift+ArrowDown")
    assert "2 of 2 queries" in view.text("main")
    page.keyboard.press("ArrowUp")  # back to the first
    page.keyboard.press("Escape")
    drag_over(page, "canvas.chart", 1)  # the map
    assert "2 of 2 queries, 6 images of the map" in view.text("main")
    page.keyboard.press("Escape")
    assert parameters(page) == "vitgal report run"

    page.keyboard.press("2")
    tiles = page.locator("main section .tile")
    assert tiles.count() == 12
    assert view.text("section:has(h3:text('After reranking')) .tile >> nth=0").startswith("H 1")
    page.keyboard.press("p")  # hard
    first = page.locator("section:has(h3:text('After reranking')) .tile").first
    assert first.get_attribute("title") == DATABASE[1]
    assert "30 inliers" in first.inner_text()
    page.get_by_label("J junk").uncheck()
    assert page.locator("main section .tile").count() == 10
    assert view.contrast_and_names() == [] and view.missed_by_tab() == []

    first.click(modifiers=["Shift"])
    assert "Nearest to" in view.text("main")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash").startswith("#view=pair&protocol=hard")
    assert (
        "30 inliers as counted by reranking, 30 inliers on 30 features of 30 matches"
        in view.text("main")
    )
    assert "Computed with matching one_way, max_distance 0.1" in view.text("main")
    canvas = page.locator("canvas.pair")
    page.locator(".crops canvas").first.wait_for()  # both photographs are drawn
    canvas.focus()
    pictures = {canvas.screenshot()}
    for key in ("+", "Shift+ArrowRight"):
        page.keyboard.press(key)
        pictures.add(canvas.screenshot())
    assert len(pictures) == 3
    page.keyboard.press("0")
    page.locator(".crops canvas").first.wait_for()
    before = canvas.screenshot()
    assert parameters(page).splitlines() == [
        'run_dir: "run"',
        'dataset: "tiny"',
        "query_index: 0",
        "image_index: 1",
    ]
    page.get_by_label("inliers").uncheck()
    assert canvas.screenshot() != before
    assert page.locator(".crops canvas").count() == 3
    page.get_by_label("display").select_option("checkerboard")
    warped = page.locator("canvas.pair").screenshot()
    assert warped != before
    page.get_by_label("display").select_option("matches")
    assert view.contrast_and_names() == [] and view.missed_by_tab() == []

    page.keyboard.press("4")
    assert "What was set differently" in view.text("main")
    assert parameters(page) == "vitgal compare run run"
    page.get_by_label("what to compare with").select_option("its global ranking")
    assert parameters(page) == "vitgal compare run/tiny/global run/tiny/rerank"
    rows = page.locator("table.queries tbody tr").all_inner_texts()
    assert any("100.0" in text for text in rows) and "reranked against" not in view.text("main")
    assert view.contrast_and_names() == [] and view.missed_by_tab() == []
    page.keyboard.press("?")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0

    page.reload()  # the address keeps the choice
    page.wait_for_selector("main")
    assert "What was set differently" in view.text("main")
    assert page.evaluate("window.bad") is None
    assert view.faults == []


@pytest.fixture(scope="module")
def document(run) -> dict:
    document, images = run_document([run])
    return document | {"thumbs": [None] * len(images.paths), "photos": {}}


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1])
def test_a_page_of_one_query_or_none(document, browser, tmp_path, count):
    """Without thumbnails, as where all photographs have gone: tiles are grey and have names."""
    document = json.loads(json.dumps(document))
    (entry,) = document["entries"]
    entry["queries"] = entry["queries"][:count]
    for scores in (scores for stage in entry["scores"].values() for scores in stage.values()):
        scores["ap"] = scores["ap"][:count]
    entry["map"] = None
    path = tmp_path / "index.html"
    path.write_text(report.page(document))
    view = Page(browser, path)
    words = {"1": "Queries", "2": "no query", "3": "no query", "4": "no query"}
    if count:
        words |= {"2": "30 inliers", "3": "30 inliers on 30 features of 30 matches"}
        words["4"] = "One run before and after reranking"
    for key, word in words.items():
        view.page.keyboard.press(key)
        assert word in view.text("main")
        assert view.contrast_and_names() == []
        if count and key == "2":
            missing = view.page.locator("section .tile .missing")
            assert sorted(set(missing.all_inner_texts())) == sorted(DATABASE)
    for key in ("ArrowUp", "ArrowRight", "Enter", "s", "n", "p", "Escape", "Escape"):
        view.page.keyboard.press(key)
    assert view.page.evaluate("window.bad") is None
    assert view.faults == []


@pytest.mark.slow
def test_a_page_without_reranking_has_every_view(own, browser, tmp_path):
    shutil.rmtree(own / "tiny" / "rerank")
    shutil.rmtree(own / "tiny" / "local")
    view = Page(browser, report.write_report([own], tmp_path / "page"))
    words = {"1": "AP", "2": "Global ranking", "3": "are not stored in the page", "4": "One run"}
    for key, word in words.items():
        view.page.keyboard.press(key)
        assert word in view.text("main") and "eranked" not in view.text("main")
        assert view.contrast_and_names() == []
    for key in ("ArrowDown", "p", "ArrowRight", "Escape", "Escape", "4"):
        view.page.keyboard.press(key)
    assert view.faults == []


@pytest.mark.slow
def test_the_page_of_runs_of_different_data_sets_says_why_it_compares_nothing(
    document, browser, tmp_path
):
    document = json.loads(json.dumps(document))
    other = document["entries"][0] | {"dataset": "</script>", "queries": [], "map": None}
    document["entries"].append(other)
    document["comparisons"] = [{"first": 0, "second": 1, "reason": "<b>not one data set"}]
    path = tmp_path / "index.html"
    path.write_text(report.page(document))
    view = Page(browser, path)
    view.page.keyboard.press("4")
    other = view.page.get_by_label("what to compare with")
    other.select_option("1")
    assert "<b>not one data set" in view.text("main")
    view.page.get_by_label("run and data set").select_option("1")
    other.select_option("0")
    assert "<b>not one data set" in view.text("main")
    assert view.faults == []


@pytest.mark.slow
def test_the_page_of_the_demo(finished_run, browser, tmp_path):
    path = report.write_report([finished_run], tmp_path / "page")
    assert sum(file.stat().st_size for file in path.parent.rglob("*.*")) < 15_000_000
    view = Page(browser, path)
    for key in "234":
        view.page.keyboard.press(key)
    view.page.keyboard.press("1")
    rows = view.page.locator("table.queries tbody tr")
    assert rows.count() == 50
    assert view.faults == []


# The instrument in a notebook: what its kernel answers.


@pytest.fixture
def instrument(run):
    dataset = revisited.open_dataset("tiny", run.parent / "data")
    widget = Instrument(run, dataset, view="pair", query=0)
    widget.received = []
    widget.send = lambda content, buffers=None: widget.received.append((content, buffers))
    return widget


def ask(widget, **question) -> tuple[dict, list]:
    widget._answer(widget, {"id": 7, **question}, [])
    content, buffers = widget.received.pop()
    assert content["id"] == 7
    return content, buffers


def test_a_kernel_answers_with_the_document_its_images_and_pairs(instrument):
    document = ask(instrument, kind="document")[0]["document"]
    image = document["names"].index(DATABASE[1])
    assert document["entries"][0]["matching"]["max_distance"] == 0.1
    for large in (False, True):
        _, (data,) = ask(instrument, kind="image", image=image, large=large)
        assert data[:2] == b"\xff\xd8"
    found = ask(instrument, kind="pair", query=0, image=image, settings={})[0]["pair"]
    assert (found["matches"], found["count"]) == (30, 30)
    stricter = {"max_distance": 0.0}  # no distance is below it
    found = ask(instrument, kind="pair", query=0, image=image, settings=stricter)[0]["pair"]
    assert (found["matches"], found["count"], found["homography"]) == (0, 0, None)


def test_a_kernel_finds_the_neighbours_of_an_image(instrument, run):
    document = ask(instrument, kind="document")[0]["document"]
    assert document["entries"][0]["neighbours"] == {}
    stored = run_document([run])[0]
    for image, name in enumerate(DATABASE):
        number = document["names"].index(name)
        found = ask(instrument, kind="neighbours", image=number)[0]
        expected = stored["entries"][0]["neighbours"][str(stored["names"].index(name))]
        assert found["names"] == names(stored, expected) == names(document, found["neighbours"])
        assert found["indices"] == [DATABASE.index(other) for other in found["names"]]
        assert document["indices"][number] == image and found["sizes"] == [[128, 96]] * 5


def test_a_wrong_question_is_answered_by_its_reason(instrument):
    content, _ = ask(instrument, kind="pair", query=9, image=1, settings={})
    assert "there is no query 9" in content["error"]
    content, _ = ask(instrument, kind="pair", query=0, image=2, settings={"estimator": "none"})
    assert "estimator" in content["error"]


def test_a_code_host_shows_a_picture_in_place_of_the_widget(run):
    dataset = revisited.open_dataset("tiny", run.parent / "data")
    widget = Instrument(run, dataset, figure=plt.figure())
    data, _ = widget._repr_mimebundle_()
    assert base64.b64decode(data["image/png"])[:4] == b"\x89PNG"
    assert "the instrument on tiny" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert plt.get_fignums() == []
