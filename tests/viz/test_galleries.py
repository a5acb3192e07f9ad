"""Galleries: photographs in rows, rankings and what moved in them."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import ConnectionPatch, Rectangle

from tests.viz.drawn_samples import LABELS, LONG, photographs, picture, ranked, texts
from vitgal.viz import galleries
from vitgal.viz.galleries import QueryImage
from vitgal.viz.style import LABEL_COLOURS, QUERY_COLOUR

QUERY = QueryImage(picture(9, 9))


def test_contact_sheet_fills_rows_and_leaves_the_rest_blank():
    axes = galleries.contact_sheet(photographs(5), list("abcde"), columns=2)
    assert axes.shape == (3, 2)
    assert [cell.get_title() for cell in axes.flat] == ["a", "b", "c", "d", "e", ""]
    assert [len(cell.images) for cell in axes.flat] == [1, 1, 1, 1, 1, 0]
    assert not any(spine.get_visible() for spine in axes[2, 1].spines.values())
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        galleries.contact_sheet(photographs(2), ["a"])


def test_captions_of_neighbours_do_not_touch():
    shapes = [(60, 80), (80, 60), (20, 160), (150, 40)]
    images = [
        galleries.RankedImage(index, picture(*shapes[index % 4]), "easy", title)
        for index, title in enumerate(LONG)
    ]
    axes = galleries.ranking_rows([QUERY], [images], columns=6)[0]
    figure = axes[0].figure
    figure.draw_without_rendering()
    boxes = [cell.title.get_window_extent() for cell in axes]
    for left, right in itertools.pairwise(boxes[1:]):
        assert left.x1 < right.x0
        # photographs of all aspects hang from one line: a pixel for rounding
        assert left.y0 == pytest.approx(right.y0, abs=1)


def test_frames_and_letters_follow_the_labels():
    axes = galleries.ranking_rows([QUERY], [ranked("abcd", LABELS, "1259")], columns=4)[0]
    frames = [to_hex(cell.spines["left"].get_edgecolor()).upper() for cell in axes]
    assert frames == [QUERY_COLOUR, *(LABEL_COLOURS[label] for label in LABELS[:4])]
    assert [texts(cell) for cell in axes] == [[], ["E"], ["H"], ["J"], ["N"]]
    assert [cell.get_title() for cell in axes] == ["query", "1", "2", "5", "9"]
    legend = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert legend == ["query", "E  easy", "H  hard", "N  negative", "J  junk"]


def test_a_row_holds_the_first_images_of_its_query():
    rows = galleries.ranking_rows([QUERY] * 2, [ranked("abcdef", LABELS), []], columns=4)
    assert rows.shape == (2, 5)
    assert all(len(cell.images) == 1 for cell in rows[0])
    assert [len(cell.images) for cell in rows[1]] == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="1 queries, but 2 rankings"):
        galleries.ranking_rows([QUERY], [[], []])


def test_the_query_is_faded_outside_its_box():
    query = picture(40, 60, 100)
    axes = galleries.ranking_rows([QueryImage(query, (10.7, 5, 30.9, 25))], [[]], columns=1)[0, 0]
    (box,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    # columns 10 to 29 and rows 5 to 24 are inside: their outer edges are 9.5 and 29.5, 4.5, 24.5
    assert box.get_bbox().extents.tolist() == [9.5, 4.5, 29.5, 24.5]
    pixels = np.asarray(axes.images[0].get_array())[:, :, 0]
    inside = np.zeros((40, 60), bool)
    inside[5:25, 10:30] = True
    assert (pixels[inside] == 100).all()
    assert (pixels[~inside] == 193).all()  # 0.4 * 100 + 0.6 * 255
    assert (query == 100).all()  # the caller's pixels are untouched


def test_arrows_join_an_image_s_two_positions():
    rows = {
        "before": ranked("abcd", LABELS),
        "after": ranked("cbdfa", ["junk", "hard", "negative", "easy", "easy"]),
    }
    axes = galleries.stacked_rankings(QUERY, rows, columns=3)
    assert axes.shape == (2, 4)
    assert [texts(cell) for cell in axes[:, 1:].flat] == [[letter] for letter in "EHJJHN"]
    arrows = [single for single in axes[0, 0].figure.artists if isinstance(single, ConnectionPatch)]
    ends = [(arrow.axesA, arrow.axesB) for arrow in arrows]
    assert ends == [(axes[0, 2], axes[1, 2]), (axes[0, 3], axes[1, 1])]  # b and c
    assert [to_hex(arrow.get_edgecolor()).upper() for arrow in arrows] == [
        LABEL_COLOURS["hard"],
        LABEL_COLOURS["junk"],
    ]


def test_rows_arrows_and_a_table_of_reasons():
    rows = {
        "before": ranked("ab", ["easy", "negative"], ["1", "2"]),
        "after": ranked("bca", ["negative", "junk", "easy"], ["1 ▲2", "–", "2"]),
    }
    reasons = pd.DataFrame({"image": ["a", "b" * 300], "inliers": [3, 40], "mean": [0.5, np.nan]})
    axes = galleries.stacked_rankings(QUERY, rows, reasons, columns=3)
    assert axes.shape == (2, 4)
    figure = axes[0, 0].figure
    arrows = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    assert len(arrows) == 2  # a and b stand in both rows
    text = [single.get_text() for single in figure.findobj(plt.Text)]
    for wanted in ("before", "after", "1 ▲2", "image", "inliers", "40", "0.50", "–"):
        assert wanted in text
    assert any(single.startswith("bbb") and "…" in single and len(single) < 300 for single in text)


def test_a_table_keeps_its_text_inside_the_figure():
    names = {"image": ["a_very_long_name_of_a_photograph_" * 4], "why": ["no local features " * 6]}
    axes = galleries.stacked_rankings(
        QUERY, {"before": ranked("a", ["easy"], ["1   0.71"])}, pd.DataFrame(names), columns=1
    )
    figure = axes[0, 0].figure
    figure.draw_without_rendering()
    canvas = figure.bbox
    for text in figure.findobj(plt.Text):
        if text.get_text() and text.get_visible():
            extent = text.get_window_extent()
            # One pixel: glyphs are wider than their advances by their antialiasing.
            assert extent.x0 >= canvas.x0 - 1 and extent.x1 <= canvas.x1 + 1, text


def test_rankings_without_labels_have_no_frames():
    rows = {"by similarity": ranked("ab", [None] * 2, ["1 a", "2 b"]), "by inliers": []}
    axes = galleries.stacked_rankings(QUERY, rows, columns=2)
    assert axes.shape == (2, 3)
    assert axes[0, 2].get_title() == "2 b" and not axes[0, 2].spines["left"].get_visible()
    assert [text.get_text() for text in axes[1, 1].texts] == ["no image\nranked"]
    assert not axes[0, 0].figure.artists and not axes[0, 0].figure.legends
