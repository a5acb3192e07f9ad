"""Browsers: what is drawn when, and that they work where nobody can click."""

import subprocess
import sys
from pathlib import Path

import cv2
import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from vitgal import runs
from vitgal.data import photographs as data_photographs
from vitgal.data import revisited
from vitgal.features import store
from vitgal.models import descriptors, inference
from vitgal.models.network import build_model
from vitgal.models.weights import save_model
from vitgal.settings import (
    GlobalSettings,
    LocalSettings,
    MachineSettings,
    MatchingSettings,
    RerankingSettings,
)
from vitgal.stages import inspection, own
from vitgal.stages.own_descriptions import Describer
from vitgal.viz import figures, photograph_browser
from vitgal.viz import widgets as viz_widgets

matplotlib.use("agg")


def press(browser, row: int, button: int) -> None:
    browser.children[row].children[1 + button].click()


def test_a_query_browser_draws_at_once_and_on_every_choice():
    drawn = []
    browser = viz_widgets.browse_queries(drawn.append, ["a", "b", "c"], first=1)
    assert drawn == [1]
    chooser = browser.children[0].children[0]
    assert chooser.options == (("0  a", 0), ("1  b", 1), ("2  c", 2))
    chooser.value = 2
    press(browser, 0, 1)  # on, round the end
    press(browser, 0, 0)  # and back
    assert drawn == [1, 2, 0, 2]


def test_nothing_to_choose_from_is_said():
    drawn = []
    browser = viz_widgets.browse_queries(drawn.append, [])
    assert "nothing to choose from" in words(browser)
    press(browser, 0, 1)
    assert not drawn


def test_a_first_choice_that_does_not_exist_is_refused():
    with pytest.raises(IndexError, match="no query 3: choose 0 to 2"):
        viz_widgets.browse_queries(print, list("abc"), first=3)


def words(browser) -> str:
    return browser.children[-1].children[0].value


def pictures(browser) -> list[bytes]:
    return [bytes(image.value) for image in browser.children[-1].children[1].children]


def test_figures_are_shown_and_closed_but_those_of_others():
    kept = plt.figure().number

    def draw(index: int) -> None:
        print(f"query <{index}>")
        for _ in range(index + 1):
            plt.figure(figsize=(1, 1))

    browser = viz_widgets.browse_queries(draw, ["a", "b"])
    (first,) = pictures(browser)
    assert first.startswith(b"\x89PNG") and "query &lt;0&gt;" in words(browser)
    press(browser, 0, 1)
    assert len(pictures(browser)) == 2 and "query &lt;1&gt;" in words(browser)
    assert plt.get_fignums() == [kept]
    plt.close("all")


def test_a_failing_first_drawing_is_raised_and_leaves_no_figure():
    def draw(index: int) -> None:
        plt.figure()
        raise ValueError(f"no features of query {index}")

    with pytest.raises(ValueError, match="no features of query 0"):
        viz_widgets.browse_queries(draw, ["a"])
    assert not plt.get_fignums()


def test_a_later_failure_is_shown_in_its_own_words():
    def draw(index: int) -> None:
        plt.figure(figsize=(1, 1))
        if index == 1:
            raise runs.StageError("run 05 first")
        if index == 2:
            raise KeyError("x")

    browser = viz_widgets.browse_queries(draw, ["a", "b", "c"])
    press(browser, 0, 1)
    assert ">run 05 first<" in words(browser) and pictures(browser) == []
    press(browser, 0, 1)
    assert "KeyError: &#x27;x&#x27; (test_explore.py, line" in words(browser)
    press(browser, 0, 1)  # round the end: the picture is there again, the words are not
    assert len(pictures(browser)) == 1 and "KeyError" not in words(browser)


@pytest.mark.slow
def test_a_notebook_without_a_browser_shows_the_figure_and_fails_with_the_drawing():
    cells = [
        "%matplotlib inline\nimport matplotlib.pyplot as plt\n"
        "from vitgal.viz import widgets as explore\n"
        "explore.browse_queries(lambda index: plt.subplots(figsize=(1, 1)), ['a', 'b'])",
        "explore.browse_queries(lambda index: 1 // index, ['a', 'b'])",
        "import pandas as pd\nwatch = explore.live_curves()\n"
        "for steps in (1, 2):\n"
        "    watch(pd.DataFrame({'step': range(steps), 'loss': range(steps)}))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, kernel_name="python3", allow_errors=True, timeout=60)
    client.execute()
    first, second, third = notebook.cells
    assert [output.output_type for output in first.outputs] == ["execute_result"]
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    names = [state["model_name"] for state in states.values()]
    assert names.count("ImageModel") == 1 and "OutputModel" not in names
    assert [output.get("ename") for output in second.outputs] == ["ZeroDivisionError"]
    # the growing curves are one output, which two drawings have updated
    assert ["image/png" in output.data for output in third.outputs] == [True]


@pytest.mark.slow
def test_plain_papermill_never_waits_for_a_browser(tmp_path):
    """With an output widget in their place, a run of these cells seldom came to its end."""
    cells = [
        "%matplotlib inline\nimport matplotlib.pyplot as plt\n"
        "from vitgal.viz import widgets as explore"
    ]
    cells += ["explore.browse_queries(lambda q: plt.subplots(figsize=(1, 1)), ['a', 'b'])"] * 60
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    command = [sys.executable, "-m", "papermill", "a.ipynb", "b.ipynb", "-k", "python3"]
    # The limit only ends a run that would never end.
    subprocess.run([*command, "--no-progress-bar"], cwd=tmp_path, check=True, timeout=300)
    done = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
    assert [cell.execution_count for cell in done] == list(range(1, 62))


# Failures


@pytest.mark.slow
def test_failures_are_sorted_anew_and_drawn(finished_run):
    benchmark = revisited.open_dataset("demo", finished_run / "data" / "benchmark")
    browser = viz_widgets.browse_failures(finished_run, benchmark, columns=4)
    order, protocols = browser.children[0].children
    chooser = browser.children[1].children[0]
    assert [label for label, _ in order.options] == list(viz_widgets.SORTS)
    for by, protocol in (("change", "medium"), ("miss", "hard")):
        before = pictures(browser)
        order.value, protocols.value = by, protocol
        table = figures.failure_table(finished_run, benchmark, by=by, protocol=protocol)
        assert [value for _, value in chooser.options] == table.index.tolist()
        assert chooser.value == table.index[0] and pictures(browser) != before
    press(browser, 1, 1)
    assert chooser.value == table.index[1] and len(pictures(browser)) == 1
    with pytest.raises(ValueError, match="by is 'x'; queries are sorted by ap, change, miss"):
        viz_widgets.browse_failures(finished_run, benchmark, by="x")


# The match inspector


OPTIONS = dict(size=96, scales=(0.7071, 1.0), max_keypoints=40)


def texture(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return cv2.resize(small, (128, 96), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Query q: a easy, b hard, c junk, d wrong, e on no short list; query p: nothing verified."""
    folder = tmp_path_factory.mktemp("inspected")
    model = build_model("xcit_nano_12_p16_224", code_dim=8, seed=0)
    save_model(model, folder / "model.safetensors")
    (folder / "jpg").mkdir()
    for seed, name in enumerate("qabcde"):
        image = texture(seed if seed > 1 else 0)  # q and a are one photograph
        cv2.imwrite(str(folder / "jpg" / f"{name}.jpg"), image)
    labels = {"easy": [0], "hard": [1], "junk": [2]}
    truth = revisited.GroundTruth(
        name="tiny",
        database=list("abcde"),
        queries=["q", "p"],
        boxes=np.array([[0.0, 0.0, 128.0, 96.0]] * 2),
        **{label: [np.array(at), np.array([], int)] for label, at in labels.items()},
    )
    cv2.imwrite(str(folder / "jpg" / "p.jpg"), texture(9))
    revisited.write_ground_truth(folder / "gnd_tiny.pkl", truth)
    described = [
        (name, descriptors.extract_local(model, read(folder, name), **OPTIONS)) for name in "abcdpq"
    ]
    _stages(folder, described)
    return folder


def read(folder: Path, name: str) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(folder / "jpg" / f"{name}.jpg")), cv2.COLOR_BGR2RGB)


def _stages(folder: Path, described: list) -> None:
    weights = inference.weights_fingerprint(folder / "model.safetensors")
    parameters = OPTIONS | {"precision": "fp32"}
    local = dict(parameters=parameters, inputs={"weights": weights})
    with runs.stage(folder / "tiny" / "local", "local", **local) as stage:
        store.write_shard(
            stage.folder / "shard-00", sorted(described), store.ShardFormat("float32")
        )
        stage.finish([], precision="fp32")
    with runs.stage(folder / "tiny" / "rerank", "rerank", parameters={}, inputs={}) as stage:
        candidates = np.array([[3, 1, 0, 2], [-1, -1, -1, -1]], np.int32)
        runs.write_array(stage.folder / "candidates.npy", candidates)
        inliers = np.array([[4, 6, 9, 0], [-1, -1, -1, -1]], np.int32)
        runs.write_array(stage.folder / "inliers.npy", inliers)
        stage.finish(["candidates.npy", "inliers.npy"])


@pytest.fixture
def lens(run) -> viz_widgets.MatchInspector:
    benchmark = revisited.open_dataset("tiny", run)
    inspector = inspection.Inspector(run, benchmark, weights=str(run / "model.safetensors"))
    return viz_widgets.MatchInspector(inspector, 0, None, {"max_distance": 1.0})


def seen(lens) -> tuple[list[bytes], str]:
    return [bytes(image.value) for image in lens.screen.pictures.children], lens.screen.words.value


def test_the_inspector_begins_with_the_best_hard_image(lens):
    assert [label for label, _ in lens.image.options] == [
        "a  (easy, 9 inliers)",
        "b  (hard, 6 inliers)",
        "d  (negative, 4 inliers)",
        "c  (junk, 0 inliers)",
    ]
    assert lens.image.value == 1
    (picture,), words = seen(lens)
    assert picture.startswith(b"\x89PNG")
    pair = lens.inspector.pair(0, 1, max_distance=1.0)
    assert pair.sentence() in words


def test_every_knob_changes_the_pair_as_it_stands(lens):
    lens.image.value = 0
    whole = lens.pair()
    assert len(whole.found.matches) == whole.found.verification.count == 40  # the same photograph
    lens.count.value = 20
    assert len(lens.pair().query) == 20
    lens.hidden.value = (0.7071,)
    assert set(lens.pair().query.scales) == {1.0}
    assert "not extracted anew" in seen(lens)[1] and "0.707" in seen(lens)[1]
    lens.hidden.value = ()
    lens.image.value = 1
    before, _ = seen(lens)
    lens.distance.value = 0.0
    after, words = seen(lens)
    assert before != after and len(lens.pair().found.matches) < 5
    assert "below 5 no homography" in words
    lens.estimator.value, lens.distance.value, lens.threshold.value = "magsac", 1.2, 3.0
    wanted = lens.inspector.pair(
        *(0, 1), max_distance=1.2, estimator="magsac", threshold=3.0, max_keypoints=20
    )
    np.testing.assert_array_equal(
        lens.pair().found.verification.inliers, wanted.found.verification.inliers
    )


def test_one_pass_a_photograph_shows_attention_and_dropped_features(lens):
    assert len(lens.heat.options) == 1 and not lens.inspector.looks
    plain, _ = seen(lens)
    lens.ask.click()
    assert set(lens.inspector.looks) == {("query", 0), ("database", 1)}
    heated, _ = seen(lens)
    assert heated != plain
    assert len(lens.heat.options) == 1 + 2 * (1 + 4)  # none; two scales, all heads and each of four
    first = dict(lens.inspector.looks)
    lens.heat.value = ("head 3", 0.7071)
    assert seen(lens)[0] != heated
    lens.ask.click()
    assert all(lens.inspector.looks[side] is look for side, look in first.items())
    lens.image.value = 0  # not looked at yet: said, and drawn without
    assert "press the button" in seen(lens)[1] and len(seen(lens)[0]) == 1


def test_any_database_image_by_name_or_index(lens):
    lens.other.value = "z"
    assert "there is no database image &#x27;z&#x27;" in seen(lens)[1] and seen(lens)[0] == []
    lens.other.value = "7"
    assert "there is no database image 7: tiny has 0 to 4" in seen(lens)[1]
    lens.other.value = "3"
    assert lens.image.value == 3 and len(seen(lens)[0]) == 1
    lens.other.value = "e"
    assert "on no short list" in seen(lens)[1] and seen(lens)[0] == []
    lens.ask.click()  # the pass gives its features too
    assert len(seen(lens)[0]) == 1


def test_a_query_without_verified_images(lens):
    lens.query.value = 1
    assert "no verified image: type any database image" in seen(lens)[1]
    lens.other.value = "a"
    assert len(seen(lens)[0]) == 1
    lens.query.value = 0
    assert lens.image.value == 0 and len(lens.image.options) == 4


def test_other_weights_are_refused(lens, run, tmp_path):
    other = tmp_path / "other.safetensors"
    save_model(build_model("xcit_nano_12_p16_224", code_dim=8, seed=1), other)
    benchmark = revisited.open_dataset("tiny", run)
    inspector = inspection.Inspector(run, benchmark, weights=str(other))
    with pytest.raises(inspection.InspectionError, match="not those that the local features"):
        inspector.look("query", 0)
    with pytest.raises(inspection.InspectionError, match="no query 5: tiny has 0 to 1"):
        inspector.image("query", 5)


# Own photographs


@pytest.fixture
def photographs(run, tmp_path) -> own.Photographs:
    describer = Describer(
        tmp_path,
        run / "model.safetensors",
        GlobalSettings(size=64),
        LocalSettings(size=96),
        MachineSettings(threads=1),
    )
    return own.describe_folder(run / "jpg", describer, progress=False)


@pytest.mark.slow
def test_a_box_is_drawn_and_searched(photographs):
    browser = photograph_browser.PhotographBrowser(
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
    with pytest.raises(data_photographs.PhotographError, match="no query z.jpg"):
        photograph_browser.browse_photographs(photographs, "z.jpg", None, RerankingSettings())


@pytest.mark.slow
def test_no_browser_holds_an_output_widget(lens, photographs):
    # One would answer on the socket where a headless run awaits the cell's end, and may hang there.
    browser = photograph_browser.browse_photographs(
        photographs, "q.jpg", (0, 0, 90, 90), RerankingSettings(top=2)
    )
    for root in (lens.widget, browser, viz_widgets.browse_queries(print, ["a"])):
        kinds = {type(widget) for widget in within(root)}
        assert widgets.Image in kinds or root.children[0].children
        assert widgets.Output not in kinds


def within(root: widgets.Widget) -> list[widgets.Widget]:
    return [root, *(each for child in getattr(root, "children", ()) for each in within(child))]
