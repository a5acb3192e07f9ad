"""Parts of the browsers: figures are shown and closed, lists chosen from."""

import matplotlib.pyplot as plt
import pytest

from vitgal import runs
from vitgal.viz import controls


def words(output: controls.FigureOutput) -> str:
    return output.words.value


def pictures(output: controls.FigureOutput) -> list[bytes]:
    return [bytes(image.value) for image in output.pictures.children]


def test_figures_are_shown_and_closed_but_those_of_others():
    others, output = plt.figure().number, controls.FigureOutput()

    def draw(index: int) -> None:
        print(f"query <{index}>")
        for _ in range(index + 1):
            plt.figure(figsize=(1, 1))

    output.draw(draw, 0)
    (first,) = pictures(output)
    assert first.startswith(b"\x89PNG") and "query &lt;0&gt;" in words(output)
    output.redraw(draw, 1)
    assert len(pictures(output)) == 2 and "query &lt;1&gt;" in words(output)
    assert plt.get_fignums() == [others]


def test_a_failing_drawing_is_raised_and_leaves_no_figure():
    def draw() -> None:
        plt.figure()
        raise ValueError("no features")

    with pytest.raises(ValueError, match="no features"):
        controls.FigureOutput().draw(draw)
    assert not plt.get_fignums()


def test_a_later_failure_is_shown_in_its_own_words():
    def draw(error: Exception | None) -> None:
        plt.figure(figsize=(1, 1))
        if error is not None:
            raise error

    output = controls.FigureOutput()
    output.redraw(draw, runs.StageError("run 05 first"))
    assert ">run 05 first<" in words(output) and pictures(output) == []
    output.redraw(draw, KeyError("x"))
    assert "KeyError: &#x27;x&#x27; (test_controls.py, line" in words(output)
    output.redraw(draw, None)  # the picture is there again, the words are not
    assert len(pictures(output)) == 1 and "KeyError" not in words(output)


def test_arrows_move_the_choice_round_the_ends():
    chooser = controls.Chooser("query", [("a", 4), ("b", 7), ("c", 2)], 7)
    _, back, forth = chooser.widget.children
    values = []
    for button in (forth, forth, back):
        button.click()
        values.append(chooser.value)
    assert values == [2, 4, 2]


def test_a_list_may_be_empty_and_filled_again():
    chooser = controls.Chooser("query", [], None)
    chooser.widget.children[2].click()
    assert chooser.value is None
    controls.refill(chooser.list, [("a", 3), ("b", 1)])
    assert chooser.value == 3
    controls.refill(chooser.list, [])
    assert chooser.value is None


def test_a_first_choice_that_does_not_exist_is_refused():
    with pytest.raises(IndexError, match="no query 3: choose 0 to 2"):
        controls.Chooser("query", [("a", 0), ("b", 1), ("c", 2)], 3)
