"""Browsers: what is drawn when, and that they work where nobody can click."""

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient

from vitgal import explore, runs

matplotlib.use("agg")

LISTS = {0: ["x", "y", "z"], 1: ["u"], 2: []}


def press(browser, row: int, button: int) -> None:
    browser.children[row].children[1 + button].click()


def test_a_query_browser_draws_at_once_and_on_every_choice():
    drawn = []
    browser = explore.browse_queries(drawn.append, ["a", "b", "c"], first=1)
    assert drawn == [1]
    chooser = browser.children[0].children[0]
    assert chooser.options == (("0  a", 0), ("1  b", 1), ("2  c", 2))
    chooser.value = 2
    press(browser, 0, 1)  # on, round the end
    press(browser, 0, 0)  # and back
    assert drawn == [1, 2, 0, 2]


def test_a_pair_browser_starts_a_new_query_at_its_first_image_and_draws_once():
    drawn = []
    browser = explore.browse_pairs(lambda *pair: drawn.append(pair), ["a", "b"], LISTS.get)
    press(browser, 1, 1)
    press(browser, 1, 1)
    browser.children[0].children[0].value = 1
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert browser.children[1].children[0].options == (("0  u", 0),)
    press(browser, 1, 1)  # one image only: nothing changes, nothing is drawn
    assert len(drawn) == 4


def test_nothing_to_choose_from_is_said():
    drawn = []
    browser = explore.browse_pairs(
        lambda *pair: drawn.append(pair), list("abc"), LISTS.get, first=2
    )
    assert not drawn and "nothing to choose from" in words(browser)
    press(browser, 1, 1)
    browser.children[0].children[0].value = 0
    assert drawn == [(0, 0)]
    press(explore.browse_queries(drawn.append, []), 0, 1)
    explore.browse_pairs(lambda *pair: drawn.append(pair), [], LISTS.get)
    assert drawn == [(0, 0)]


def test_a_first_choice_that_does_not_exist_is_refused():
    with pytest.raises(IndexError, match="no query 3: choose 0 to 2"):
        explore.browse_queries(print, list("abc"), first=3)


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

    browser = explore.browse_queries(draw, ["a", "b"])
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
        explore.browse_queries(draw, ["a"])
    assert not plt.get_fignums()


def test_a_later_failure_is_shown_in_its_own_words():
    def draw(index: int) -> None:
        plt.figure(figsize=(1, 1))
        if index == 1:
            raise runs.StageError("run 05 first")
        if index == 2:
            raise KeyError("x")

    browser = explore.browse_queries(draw, ["a", "b", "c"])
    press(browser, 0, 1)
    assert ">run 05 first<" in words(browser) and pictures(browser) == []
    press(browser, 0, 1)
    assert "KeyError: &#x27;x&#x27; (test_explore.py, line" in words(browser)
    press(browser, 0, 1)  # round the end: the picture is there again, the words are not
    assert len(pictures(browser)) == 1 and "KeyError" not in words(browser)


def test_a_notebook_without_a_browser_shows_the_figure_and_fails_with_the_drawing():
    cells = [
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nfrom vitgal import explore\n"
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
