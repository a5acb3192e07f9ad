"""Figures: what they draw and where, checked against coordinates and values worked out by hand."""

import itertools
import math

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.textpath import TextPath

from vitgal.data.revisited import GroundTruth
from vitgal.features.local import LocalFeatures
from vitgal.viz import failure_figure, matching, paths, rankings, style, training_curves
from vitgal.viz import maps as viz_maps
from vitgal.viz import scores as viz_scores

matplotlib.use("agg")

PANORAMA, TOWER, DOT = (6, 300), (300, 6), (1, 1)


@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


def picture(height: int, width: int, value: int = 120) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def photographs(count: int) -> list[np.ndarray]:
    sides = [(60, 80), (80, 60), (20, 160), (150, 40)]
    return [picture(*sides[index % 4], 40 + 20 * index) for index in range(count)]


def log() -> pd.DataFrame:
    rows = [
        {"step": 10, "loss": 4.0, "lr": 1e-4, "accuracy": 0.1, "images_per_second": 90.0},
        {"step": 20, "loss": 3.0, "lr": 5e-5, "accuracy": 0.3, "images_per_second": 95.0},
        {"step": 30, "loss": 2.0, "lr": 1e-5, "val_accuracy": 0.4, "val_map": 0.55},
    ]
    return pd.DataFrame(rows).assign(
        val_accuracy_margin=[np.nan, np.nan, 0.2],
        reconstruction=[0.5, 0.4, 0.3],
        val_reconstruction=[np.nan, 0.6, 0.5],
    )


def features(keypoints: list, **changes) -> LocalFeatures:
    """A crop of 200 x 100 pixels at (30, 40), seen by the network as 400 x 100."""
    count = len(keypoints)
    fields = {
        "keypoints": np.array(keypoints, np.float32).reshape(-1, 2),
        "descriptors": np.zeros((count, 2), np.float32),
        "scores": np.linspace(2, 1, count).astype(np.float32),
        "scales": np.full(count, 0.5, np.float32),
        "input_size": (100, 400),
        "box": (30, 40, 230, 140),
        "image_size": (150, 240),
    }
    return LocalFeatures(**fields | changes)


def texts(axes: plt.Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


LABELS = ["easy", "hard", "junk", "negative", "hard", "easy"]
KEYS = ["a", "b", "c", "d", "e", "f"]
PICTURES = dict(zip(KEYS, photographs(6), strict=True))
LONG = [f"a_landmark_with_quite_a_long_name_{index:06d}" for index in range(6)]
SYSTEMS = {
    name: {"easy": 0.999, "medium": 0.5, "hard": 0.1}
    for name in (
        "an untrained network of the same size",
        "the trained network, global features",
        "reranked, all protocols as published",
        "$x$ y $z$",
    )
}
CALLS = {
    "contact_sheet": lambda: rankings.contact_sheet(photographs(6), LONG, columns=4),
    "two lines": lambda: rankings.contact_sheet(photographs(3), ["one\ntwo", "", "$a$ and $b$"]),
    "split": lambda: training_curves.split_statistics([3, 5, 9], [1, 0, 2]),
    "long tail": lambda: training_curves.split_statistics(np.arange(1, 2000), [1, 10, 100]),
    "training_curves": lambda: training_curves.training_curves(log()),
    "reconstruction": lambda: viz_maps.reconstruction_error(
        log(), photographs(2), [np.eye(3), np.ones((2, 4))]
    ),
    "attention": lambda: viz_maps.attention_maps(photographs(2), [np.eye(3)] * 2, [np.eye(4)] * 2),
    "gallery": lambda: rankings.gallery(
        picture(60, 80), (10, 5, 60, 40), photographs(6), LABELS, titles=LONG, columns=4
    ),
    "galleries": lambda: rankings.galleries(
        photographs(2),
        [None, (0, 0, 9, 9)],
        [photographs(6)] * 2,
        [LABELS] * 2,
        query_titles=LONG[:2],
        columns=5,
    ),
    "before_after": lambda: rankings.before_after(
        picture(80, 60), None, PICTURES, dict(zip(KEYS, LABELS, strict=True)), KEYS, KEYS[::-1]
    ),
    "ap_change": lambda: viz_scores.ap_change(
        pd.DataFrame({"before": [0.1, 0.5, np.nan], "after": [0.9, 0.2, np.nan]}, index=LONG[:3])
    ),
    "score_bars": lambda: viz_scores.score_bars(SYSTEMS),
    "feature_counts": lambda: matching.feature_counts([3, 90, 500], [0.3535, 0.5, 1.4142]),
    "keypoints": lambda: matching.keypoints(picture(150, 240), features([(8, 8), (392, 92)])),
    "matches": lambda: matching.matches(
        *(picture(60, 80), picture(90, 40)),
        *(np.array([[0, 0], [79, 59]]), np.array([[0, 0], [39, 89]])),
        *(np.array([[0, 0], [1, 1]]), np.array([True, False])),
        homography=np.eye(3),
        titles=(LONG[0], LONG[1] * 3),
    ),
}
EMPTY = {
    "contact_sheet": (lambda: rankings.contact_sheet([]), "no images"),
    "training_curves": (lambda: training_curves.training_curves(pd.DataFrame()), "no values"),
    "reconstruction": (lambda: viz_maps.reconstruction_error(pd.DataFrame()), "no\nreconstruction"),
    "attention": (lambda: viz_maps.attention_maps([], [], []), "no photographs"),
    "gallery": (
        lambda: rankings.gallery(picture(9, 9), None, [], [], columns=2),
        "no image\nranked",
    ),
    "galleries": (lambda: rankings.galleries([], [], [], []), "no queries"),
    "one query": (
        lambda: rankings.galleries([picture(9, 9)], [None], [[]], [[]], columns=2),
        "no image\nranked",
    ),
    "before_after": (
        lambda: rankings.before_after(picture(9, 9), None, {}, {}, [], []),
        "no image\nranked",
    ),
    "ap_change": (
        lambda: viz_scores.ap_change(pd.DataFrame({"before": [np.nan], "after": [np.nan]})),
        "no query",
    ),
    "score_bars": (lambda: viz_scores.score_bars({}), "no scores"),
}


# What holds for every figure


@pytest.mark.parametrize("name", CALLS)
def test_one_figure_with_every_label_inside_and_no_setting_changed(name):
    before = dict(matplotlib.rcParams)
    axes = np.ravel(np.asarray(CALLS[name](), dtype=object))
    assert dict(matplotlib.rcParams) == before
    assert len(plt.get_fignums()) == 1
    figure = axes[0].figure
    assert all(isinstance(one, plt.Axes) and one.figure is figure for one in axes)
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()
    # 0.03 inches: half a frame's line may lie outside, letters of names may not
    assert drawn.x0 > -0.03 and drawn.y0 > -0.03
    assert drawn.x1 < figure.get_figwidth() + 0.03 and drawn.y1 < figure.get_figheight() + 0.03


def test_the_user_style_does_not_reach_the_figure_when_it_is_drawn_later():
    with plt.rc_context({"xtick.labelsize": 30, "font.family": "serif", "axes.grid": True}):
        axes = viz_scores.score_bars(SYSTEMS)
        axes.figure.draw_without_rendering()
        ticks = axes.get_xticklabels()
    assert {tick.get_fontsize() for tick in ticks} == {8}
    assert ticks[0].get_fontfamily() == ["DejaVu Sans"]
    assert not axes.xaxis.get_gridlines()[0].get_visible()


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_input_is_said_in_the_figure(name):
    draw, sentence = EMPTY[name]
    axes = np.ravel(np.asarray(draw(), dtype=object))
    assert any(sentence in text for one in axes for text in texts(one))
    axes[0].figure.draw_without_rendering()


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(PANORAMA, TOWER), (TOWER, DOT), (DOT, PANORAMA)])
def test_any_aspect_can_be_drawn(sides):
    first, second = (picture(*side) for side in sides)
    point, pair = np.zeros((1, 2)), np.zeros((1, 2), int)
    for axes in (
        rankings.contact_sheet([first, second], ["a", "b"], columns=2),
        rankings.gallery(first, (0, 0, 1, 1), [second, first], ["easy", "junk"], columns=2),
        viz_maps.attention_maps([first, second], [np.eye(2)] * 2, [np.eye(2)] * 2),
        matching.matches(first, second, point, point, pair, np.array([True]), homography=np.eye(3)),
    ):
        figure = np.ravel(np.asarray(axes, dtype=object))[0].figure
        figure.draw_without_rendering()
        assert max(figure.get_size_inches()) < 25


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_what_is_no_photograph_is_refused_and_no_figure_is_left(wrong):
    with pytest.raises(ValueError, match="a photograph must be"):
        rankings.contact_sheet([wrong])
    with pytest.raises(ValueError, match="a photograph must be"):
        rankings.gallery(picture(9, 9), None, [wrong], ["easy"])
    assert not plt.get_fignums()


def test_a_file_and_grey_pixels_are_drawn_as_their_pixels(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    axes = rankings.contact_sheet([tmp_path / "grey.png", grey, np.dstack([grey] * 3)])
    for cell in axes[0, :3]:
        assert np.array_equal(cell.images[0].get_array(), np.dstack([grey] * 3))
        assert cell.images[0].get_extent() == [-0.5, 7.5, 5.5, -0.5]


def test_frames_can_be_told_apart_without_red_green_vision():
    # Machado, Oliveira, Fernandes 2009, severity 1, for linear RGB
    seen = {
        "normal": np.eye(3),
        "deuteranope": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "protanope": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
    }

    def lab(colour: str, matrix: np.ndarray) -> np.ndarray:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        rgb_to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        xyz = rgb_to_xyz @ np.clip(matrix @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    def nearest(colours, matrix) -> float:
        points = [lab(colour, np.asarray(matrix)) for colour in colours]
        return min(math.dist(a, b) for a, b in itertools.combinations(points, 2))

    for matrix in seen.values():
        # 20 CIELAB units: ten times the difference that can just be noticed
        assert nearest(style.COLOURS.values(), matrix) > 20
    usual = ("#009E73", "#E69F00", "#D55E00", "#999999")
    assert nearest(usual, seen["deuteranope"]) < 20  # the test can tell
    assert len(set(style.LETTERS.values())) == 4


# Photographs and text


def test_contact_sheet_fills_rows_and_leaves_the_rest_blank():
    axes = rankings.contact_sheet(photographs(5), list("abcde"), columns=2)
    assert axes.shape == (3, 2)
    assert [cell.get_title() for cell in axes.flat] == ["a", "b", "c", "d", "e", ""]
    assert [len(cell.images) for cell in axes.flat] == [1, 1, 1, 1, 1, 0]
    assert not any(spine.get_visible() for spine in axes[2, 1].spines.values())
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        rankings.contact_sheet(photographs(2), ["a"])


def test_photographs_are_kept_no_larger_than_they_are_drawn():
    axes = rankings.contact_sheet([picture(1200, 1600)], columns=4, width=8)[0, 0]
    # a cell of 2 inches at 80 dots an inch, three pixels a dot
    assert axes.images[0].get_array().shape == (360, 480, 3)
    assert axes.images[0].get_extent() == [-0.5, 1599.5, 1199.5, -0.5]


def test_long_titles_lose_their_middle():
    assert style._elide("short", 1) == "short"
    cut = style._elide("the_first_words_and_the_last", 0.8)
    start, end = cut.split("…")
    assert "the_first_words_and_the_last".startswith(start)
    assert "the_first_words_and_the_last".endswith(end) and 0 <= len(start) - len(end) <= 1
    letters = TextPath((0, 0), cut, size=style.CAPTION).get_extents()
    assert 0.6 * 72 < letters.width <= 0.8 * 72  # matplotlib's own outlines of the letters
    assert style._elide("$5 or $6", 3) == r"\$5 or \$6"
    assert style._elide("", 1) == ""


def test_captions_of_neighbours_do_not_touch():
    axes = rankings.gallery(picture(9, 9), None, photographs(6), LABELS, titles=LONG, columns=6)
    figure = axes[0].figure
    figure.draw_without_rendering()
    boxes = [cell.title.get_window_extent() for cell in axes]
    for left, right in itertools.pairwise(boxes[1:]):
        assert left.x1 < right.x0
        # photographs of all aspects hang from one line: a pixel for rounding
        assert left.y0 == pytest.approx(right.y0, abs=1)


# The split and the training


def test_split_statistics_counts_classes():
    left, right = training_curves.split_statistics([2, 1, 2, 4], np.array([1, 0, 0, 1]))
    train, validation = (patch.get_data().values for patch in left.patches)
    assert train.tolist() == [0, 1, 2, 0, 1]  # classes with 0, 1, 2, 3, 4 images
    assert validation.tolist() == [2, 2, 0, 0, 0]
    assert right.lines[0].get_xydata().tolist() == [[1, 4], [2, 2], [3, 2], [4, 1]]
    labels = [text.get_text() for text in left.figure.legends[0].get_texts()]
    assert labels == ["training: 9 images of 4 classes", "validation: 2 images of 2 classes"]


def test_split_statistics_of_a_long_tail_keeps_every_class():
    counts = np.concatenate([np.full(500, 1), np.full(70, 40), [3000]])
    left, _ = training_curves.split_statistics(counts, [])
    histogram = left.patches[0].get_data()
    assert histogram.values.sum() == 571 and histogram.values[0] == 500
    assert left.get_xscale() == "log"
    with pytest.raises(ValueError, match="none negative"):
        training_curves.split_statistics([1, -1], [])


def test_training_curves_show_what_the_log_holds():
    panels = training_curves.training_curves(log())
    assert [panel.get_title("left") for panel in panels] == list(style.PANELS)
    accuracy = panels[1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines["training (margin)"] == [[10, 10], [20, 30]]
    assert lines["validation"] == [[30, 40]] and lines["validation (margin)"] == [[30, 20]]
    assert len({line.get_linestyle() for line in accuracy.lines}) == 3
    codes = training_curves.training_curves(log().drop(columns="val_accuracy_margin"))
    assert [line.get_label() for line in codes[1].lines] == ["training", "validation"]
    only_loss = training_curves.training_curves(log()[["step", "loss"]])
    assert [panel.get_title("left") for panel in only_loss] == ["loss"]
    own = training_curves.training_curves(log(), panels={"mine (%)": {"val_map": "mAP"}})
    assert own[0].lines[0].get_ydata() == pytest.approx([55])  # 0.55 * 100 is rounded
    with pytest.raises(ValueError, match="no column step"):
        training_curves.training_curves(log().drop(columns="step"))
    assert panels[0].get_xlabel() == "step"
    schedule = training_curves.training_curves(
        pd.DataFrame({"epoch": [0, 1, 2], "lr": [0.1, 0.2, 0.1]})
    )
    assert [panel.get_xlabel() for panel in schedule] == ["epoch"]
    assert schedule[0].lines[0].get_xdata().tolist() == [0, 1, 2]


def test_a_curve_has_the_band_of_its_interval():
    given = log().assign(val_map_low=[np.nan, np.nan, 0.5], val_map_high=[np.nan, np.nan, 0.7])
    given.loc[0, ["val_map", "val_map_low", "val_map_high"]] = (0.25, 0.125, 0.375)
    (axes,) = training_curves.training_curves(given, panels={"mAP (%)": {"val_map": "validation"}})
    (band,) = axes.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()} == {
        *((10.0, 12.5), (10.0, 37.5), (30.0, 50.0), (30.0, 70.0))
    }


def test_reconstruction_error_maps_share_one_scale_and_span_the_photograph():
    errors = [np.arange(6.0).reshape(2, 3), np.full((4, 4), 100.0)]
    axes = viz_maps.reconstruction_error(log(), photographs(2), errors)
    assert len(axes) == 5
    first, second = axes[3].images[1], axes[4].images[1]
    assert np.array_equal(first.get_array(), errors[0])
    assert first.norm is second.norm
    assert first.get_extent() == [-0.5, 79.5, 59.5, -0.5]
    assert axes[0].lines[1].get_xydata().tolist() == [[20, 0.6], [30, 0.5]]
    for wrong in ([np.ones(4)], [np.full((2, 2), np.nan)], []):
        with pytest.raises(ValueError, match="error maps"):
            viz_maps.reconstruction_error(log(), photographs(1), wrong)


def test_attention_is_drawn_relative_to_its_mean():
    before, after = np.array([[1.0, 3.0]]), np.array([[0.0, 0.0], [0.0, 8.0]])
    axes = viz_maps.attention_maps(picture(10, 20), before, after)
    assert axes.shape == (1, 3)
    assert axes[0, 1].images[1].get_array().tolist() == [[0.5, 1.5]]
    assert axes[0, 2].images[1].get_array().tolist() == [[0, 0], [0, 4]]
    several = viz_maps.attention_maps(photographs(2), [before] * 2, [after] * 2)
    assert several.shape == (2, 3)
    flat = viz_maps.attention_maps(picture(4, 4), np.zeros((2, 2)), np.zeros((2, 2)))
    assert flat[0, 1].images[1].get_array().tolist() == [[0, 0], [0, 0]]


# Rankings


def test_relevance_reads_the_ground_truth():
    truth = GroundTruth(
        name="hand",
        database=list("abcde"),
        queries=["q", "r"],
        boxes=np.zeros((2, 4)),
        easy=[np.array([3]), np.array([], int)],
        hard=[np.array([0, 1]), np.array([4])],
        junk=[np.array([4]), np.array([], int)],
    )
    labels = rankings.relevance(truth, 0, np.array([4, 3, 2, 1, 0]))
    assert labels == ["junk", "easy", "negative", "hard", "hard"]
    assert rankings.relevance(truth, 1, [4, 3]) == ["hard", "negative"]
    assert rankings.relevance(truth, 1, []) == []


def test_gallery_frames_and_letters_follow_the_labels():
    axes = rankings.gallery(
        picture(9, 9), None, photographs(4), LABELS[:4], ranks=[1, 2, 5, 9], columns=4
    )
    assert len(axes) == 5
    frames = [to_hex(cell.spines["left"].get_edgecolor()).upper() for cell in axes]
    assert frames == [style.COLOURS[name].upper() for name in ("query", *LABELS[:4])]
    assert [texts(cell) for cell in axes] == [[], ["E"], ["H"], ["J"], ["N"]]
    assert [cell.get_title() for cell in axes] == ["query", "1", "2", "5", "9"]
    legend = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert legend == ["query", "E  easy", "H  hard", "N  negative", "J  junk"]


def test_gallery_wraps_and_galleries_cut():
    assert len(rankings.gallery(picture(9, 9), None, photographs(6), LABELS, columns=4)) == 7
    rows = rankings.galleries(
        photographs(2), [None] * 2, [photographs(6), []], [LABELS, []], columns=4
    )
    assert rows.shape == (2, 5)
    assert all(len(cell.images) == 1 for cell in rows[0])
    assert [len(cell.images) for cell in rows[1]] == [1, 0, 0, 0, 0]


def test_the_query_is_faded_outside_its_box():
    query = picture(40, 60, 100)
    axes = rankings.gallery(query, (10.7, 5, 30.9, 25), [], [], columns=1)[0]
    (box,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    # columns 10 to 29 and rows 5 to 24 are inside: their outer edges are 9.5 and 29.5, 4.5, 24.5
    assert box.get_bbox().extents.tolist() == [9.5, 4.5, 29.5, 24.5]
    pixels = np.asarray(axes.images[0].get_array())[:, :, 0]
    inside = np.zeros((40, 60), bool)
    inside[5:25, 10:30] = True
    assert (pixels[inside] == 100).all()
    assert (pixels[~inside] == 193).all()  # 0.4 * 100 + 0.6 * 255
    assert (query == 100).all()  # the caller's pixels are untouched


@pytest.mark.parametrize(
    ("labels", "message"), [(["easy"], "1 labels for 2"), (["good", "easy"], "good")]
)
def test_labels_that_do_not_fit_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        rankings.gallery(picture(9, 9), None, photographs(2), labels)


def test_before_after_tells_what_moved():
    labels = dict(zip(KEYS, LABELS, strict=True))
    axes = rankings.before_after(
        *(picture(9, 9), None, PICTURES, labels),
        *(["a", "b", "c", "d"], ["c", "b", "d", "f", "a"]),
        notes={"c": "31 inliers"},
        columns=3,
        width=14,
    )
    assert axes.shape == (2, 4)
    assert [cell.get_title() for cell in axes[0, 1:]] == ["1   ▼ to 5", "2", "3"]
    below = [cell.get_xlabel() for cell in axes[1, 1:]]
    assert below == ["1 ▲ from 3\n31 inliers", "2 =", "3 ▲ from 4"]
    assert [texts(cell) for cell in axes[:, 1:].flat] == [[letter] for letter in "EHJJHN"]
    arrows = [one for one in axes[0, 0].figure.artists if isinstance(one, ConnectionPatch)]
    ends = [(arrow.axesA, arrow.axesB) for arrow in arrows]
    assert ends == [(axes[0, 2], axes[1, 2]), (axes[0, 3], axes[1, 1])]  # b and c
    assert [to_hex(arrow.get_edgecolor()).upper() for arrow in arrows] == [
        style.COLOURS["hard"],
        style.COLOURS["junk"],
    ]


def test_before_after_captions_of_images_from_nowhere():
    first, second = rankings._moves(["a", "b"], ["x", "a"], 2, {})
    assert first == ["1", "2   ▼ out"]
    assert second == ["1 new", "2 ▼ from 1"]
    with pytest.raises(ValueError, match="more than once"):
        rankings.before_after(picture(9, 9), None, PICTURES, {}, ["a", "a"], [])
    with pytest.raises(KeyError, match="z"):
        rankings.before_after(picture(9, 9), None, PICTURES, {"z": "easy"}, ["z"], ["z"])
    assert not plt.get_fignums()


# Scores


def test_ap_change_sorts_and_counts():
    table = pd.DataFrame(
        {"global": [0.5, 0.5, 0.2, np.nan, 0.3], "reranked": [0.75, 0.25, 0.2, np.nan, 0.8]},
        index=list("pqrst"),
    )
    axes = viz_scores.ap_change(table, before="global", after="reranked")
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 25, 0, -25])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["t", "p", "r", "q"]
    assert axes.get_title("left") == "2 won, 1 lost, 1 unchanged; mean +12.5 points"
    assert "1 without a positive" in axes.get_xlabel()
    up, down = axes.patches[0], axes.patches[3]
    assert to_hex(up.get_facecolor()).upper() == style.COLOURS["easy"]
    assert to_hex(down.get_edgecolor()).upper() == style.COLOURS["negative"] and down.get_hatch()
    with pytest.raises(ValueError, match="no column after, before"):
        viz_scores.ap_change(table)


def test_ap_change_of_very_many_queries_names_none():
    change = np.linspace(-0.5, 0.5, 400)
    axes = viz_scores.ap_change(pd.DataFrame({"before": np.full(400, 0.5), "after": 0.5 + change}))
    assert len(axes.patches) == 400 and not len(axes.get_xticks())


def test_score_bars_print_their_values():
    scores = {
        "one": {"easy": 0.5, "medium": None, "hard": float("nan")},
        "two": {"easy": {"map": 0.904, "mp_at": {}}, "medium": 0.25},
    }
    axes = viz_scores.score_bars(scores, intervals={"two": {"medium": (0.2, 0.4)}})
    assert texts(axes) == ["50.0", "90.4", "25.0"]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([50, np.nan, np.nan, 90.4, 25, np.nan], nan_ok=True)
    assert axes.lines[0].get_ydata() == pytest.approx([20, 40])
    assert axes.texts[2].get_position()[1] == pytest.approx(41)  # above the whisker
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["Easy", "Medium", "Hard"]
    mean_place = np.mean([bar.get_x() + bar.get_width() / 2 for bar in axes.patches[::3]])
    assert mean_place == pytest.approx(0)  # both bars stand round the tick


# Local features


def test_keypoints_are_squares_of_a_patch():
    drawn = features([(8, 8), (100, 50)], scales=np.array([1.0, 0.5], np.float32))
    axes = matching.keypoints(picture(150, 240), drawn)
    # An input pixel is half a pixel wide and one high. The first patch is the crop's corner: its
    # 16 x 16 input pixels cover 8 x 16 pixels from the corner's edge (29.5, 39.5).
    best, second = (path.get_extents().extents for path in axes.collections[0].get_paths()[::-1])
    assert best == pytest.approx([29.5, 39.5, 37.5, 55.5])
    # twice as large round (30 + 50 - 0.5, 40 + 50 - 0.5)
    assert second == pytest.approx([79.5 - 8, 89.5 - 16, 79.5 + 8, 89.5 + 16])
    assert axes.get_title() == "2 of 2 local features"
    assert axes.child_axes  # the scale of the scores


def test_keypoints_draw_the_best_and_cope_with_unknowns():
    many = features([(8, 8), (24, 8), (40, 8)])
    axes = matching.keypoints(picture(150, 240), many, max_keypoints=2, title="q")
    assert axes.get_title() == "q   2 of 3 local features"
    assert len(axes.collections[0].get_paths()) == 2
    nans = np.full(3, np.nan, np.float32)
    axes = matching.keypoints(picture(150, 240), features([(8, 8)] * 3, scores=nans, scales=nans))
    assert axes.collections[0].get_paths()[0].get_extents().width == pytest.approx(8)
    assert not axes.child_axes
    axes = matching.keypoints(picture(150, 240), features([]))
    assert axes.get_title() == "0 of 0 local features" and not axes.collections


def test_keypoints_draw_into_given_axes():
    figure, (left, right) = plt.subplots(1, 2)
    assert matching.keypoints(picture(150, 240), features([(8, 8)]), axes=right) is right
    assert len(right.collections) == 1 and not left.images
    assert plt.get_fignums() == [figure.number]


def test_feature_counts_are_counted():
    counts = [0, 10, 10, 300]
    images, by_scale = matching.feature_counts(counts, np.float32([0.7071, 0.5, 0.7071, np.nan]))
    assert [bar.get_height() for bar in images.patches if bar.get_height()] == [1, 2, 1]
    assert images.get_title("left") == "320 features of 4 images"
    assert [bar.get_height() for bar in by_scale.patches] == [1, 2, 1]
    by_scale.figure.draw_without_rendering()
    labels = [tick.get_text() for tick in by_scale.get_xticklabels()]
    assert labels == ["0.5", "0.7071", "nan"]
    assert matching.feature_counts([], [])[1].get_title("left").startswith("0 features")


def test_homography_to_pixels_agrees_with_the_keypoints():
    rng = np.random.default_rng(0)
    homography = np.array([[0.9, 0.1, 12], [-0.2, 1.1, 3], [1e-4, -2e-4, 1]])
    points = rng.uniform(0, 90, (20, 2))
    mapped = np.array([cv2.perspectiveTransform(points[None], homography)])[0, 0]
    query = features(points)
    database = features(mapped, input_size=(64, 96), box=(3, 0, 50, 77), image_size=(80, 60))
    result = matching.homography_to_pixels(homography, query, database)
    there = cv2.perspectiveTransform(query.original_keypoints()[None].astype(float), result)[0]
    # keypoints are float32: 1e-5 of coordinates up to 100, magnified a little
    assert there == pytest.approx(database.original_keypoints(), abs=1e-3)


def draw_matches(**options) -> plt.Axes:
    """A photograph of 100 x 50 pixels beside one of 50 x 50, at one height."""
    query_points = np.array([[0, 0], [99, 49], [49.5, 24.5]])
    database_points = np.array([[24.5, 24.5], [0, 0]])
    pairs, inliers = np.array([[2, 0], [1, 1]]), np.array([True, False])
    arguments = (picture(50, 100), picture(50, 50), query_points, database_points, pairs, inliers)
    return matching.matches(*arguments, width=6.08, **options)


def test_matches_join_the_right_places():
    axes = draw_matches()
    # 6 inches for 150 columns: 0.04 inches a pixel; the second photograph starts at 4.08
    extents = [image.get_extent() for image in axes.images]
    assert np.array(extents) == pytest.approx(np.array([[0, 4, 2, 0], [4.08, 6.08, 2, 0]]))
    rejected, accepted = (np.array(lines.get_segments()) for lines in axes.collections)
    assert accepted == pytest.approx(np.array([[[2, 1], [5.08, 1]]]))  # centre to centre
    assert rejected == pytest.approx(np.array([[[3.98, 1.98], [4.1, 0.02]]]))
    assert axes.get_title() == "1 inliers of 2 matches"
    assert not axes.patches  # no homography, no box: no outline
    assert texts(axes) == ["query", "database image"]


def test_matches_project_the_box():
    halve = np.diag([0.5, 0.5, 1.0])
    query, database = draw_matches(homography=halve, box=(10, 10, 50, 30)).patches
    # edges 9.5, 49.5 and 9.5, 29.5 in pixels, half of that in the database image
    expected = np.array([[10, 10], [50, 10], [50, 30], [10, 30], [10, 10]]) * 0.04
    assert query.get_xy() == pytest.approx(expected)
    half = np.array([[4.75, 4.75], [24.75, 4.75], [24.75, 14.75], [4.75, 14.75], [4.75, 4.75]])
    assert database.get_xy() == pytest.approx((half + 0.5) * 0.04 + [4.08, 0])
    axes = draw_matches(homography=np.eye(3))
    whole, cut = axes.patches
    assert whole.get_xy()[2] == pytest.approx([4, 2])
    # twice as wide as the database image: cut off at its edges
    assert cut.get_xy()[2] == pytest.approx([8.08, 2])
    edges = axes.transData.inverted().transform(cut.get_clip_box().corners()[[0, 3]])
    assert np.sort(edges, axis=0) == pytest.approx(np.array([[4.08, 0], [6.08, 2]]))


def test_matches_without_a_sensible_outline():
    horizon = np.array([[1, 0, 0], [0, 1, 0], [-0.02, 0, 1]])  # w = 0 at x = 50
    assert len(draw_matches(homography=horizon).patches) == 1
    assert matching._project(np.full((3, 3), np.nan), np.zeros((1, 2))) is None
    upside = matching._project(-np.eye(3), np.array([[3.0, 4.0]]))  # scale and sign are free
    assert upside.tolist() == [[3, 4]]
    assert len(draw_matches(box=(0, 0, 9, 9)).patches) == 1  # the query's box alone


def test_matches_beside_a_panorama_stay_legible():
    none = np.zeros((0, 2))
    arguments = (picture(10, 1000), picture(100, 100), none, none, none, [])
    axes = matching.matches(*arguments, width=10.08)
    widths = [image.get_extent()[1] - image.get_extent()[0] for image in axes.images]
    assert widths == pytest.approx([8, 2])  # at one height it would be 9.9 and 0.1
    top, bottom = (image.get_extent()[2:] for image in axes.images)
    assert sum(top) == pytest.approx(sum(bottom))  # centred on one line


def test_matches_are_thinned_evenly_and_checked():
    assert matching._evenly(0, 5).tolist() == []
    assert matching._evenly(3, 5).tolist() == [0, 1, 2]
    assert matching._evenly(9, 3).tolist() == [0, 4, 8]
    points = np.random.default_rng(0).uniform(0, 40, (30, 2))
    pairs = np.column_stack([np.arange(30)] * 2)
    arguments = (picture(50, 50), picture(50, 50), points, points, pairs)
    axes = matching.matches(*arguments, np.arange(30) < 20, max_lines=8)
    assert [len(lines.get_segments()) for lines in axes.collections] == [8, 8]
    assert axes.get_title() == "20 inliers (8 drawn) of 30 matches"
    with pytest.raises(ValueError, match="30 matches, but inliers of shape"):
        matching.matches(*arguments, np.ones(29, bool))
    nothing = matching.matches(*arguments[:2], *[np.zeros((0, 2))] * 3, [])
    assert nothing.get_title() == "0 inliers of 0 matches"


# Files


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".png", ".jpg"])
def test_saving_twice_gives_the_same_bytes(tmp_path, suffix):
    figures = [viz_scores.score_bars(SYSTEMS) for _ in range(2)]
    files = [
        style.save(axes, tmp_path / f"{index}" / f"bars{suffix}", close=True).read_bytes()
        for index, axes in enumerate(figures)
    ]
    assert files[0] == files[1] and len(files[0]) > 1000
    assert not plt.get_fignums()
    assert [path.name for path in (tmp_path / "0").iterdir()] == [f"bars{suffix}"]


def test_saving_an_array_of_axes_keeps_the_figure_open(tmp_path):
    axes = rankings.contact_sheet(photographs(2), columns=2, width=4)
    saved = cv2.imread(str(style.save(axes, tmp_path / "sheet.png", dpi=100)))
    assert 350 < saved.shape[1] <= 420  # 4 inches, less the margin
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match=r"sheet\.nope: no format"):
        style.save(axes, tmp_path / "sheet.nope")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


# Failures, tuning, figures for a paper


def failing(rows, reasons=None, **options):
    reasons = pd.DataFrame(columns=["image"]) if reasons is None else reasons
    photographs = {key: np.full((30, 40, 3), 90, np.uint8) for key in "abc"}
    labels = {"a": "easy", "b": "negative", "c": "junk"}
    picture = np.zeros((40, 60, 3), np.uint8)
    return failure_figure.failure(
        picture, (5, 5, 50, 30), photographs, labels, rows, reasons, **options
    )


def test_failure_draws_both_rows_arrows_and_words():
    rows = {"before": [("a", "1"), ("b", "2")], "after": [("b", "1 ▲2"), ("c", "–"), ("a", "2")]}
    reasons = pd.DataFrame({"image": ["a", "b" * 300], "inliers": [3, 40], "mean": [0.5, np.nan]})
    axes = failing(rows, reasons)
    assert axes.shape == (2, 4)
    figure = axes[0, 0].figure
    arrows = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    assert len(arrows) == 2  # a and b stand in both rows
    text = [one.get_text() for one in figure.findobj(plt.Text)]
    for wanted in ("before", "after", "1 ▲2", "image", "inliers", "40", "0.50", "–"):
        assert wanted in text
    assert any(one.startswith("bbb") and "…" in one and len(one) < 300 for one in text)


def test_failure_keeps_its_text_inside_the_figure():
    names = {"image": ["a_very_long_name_of_a_photograph_" * 4], "why": ["no local features " * 6]}
    axes = failing({"before": [("a", "1   0.71")]}, pd.DataFrame(names))
    figure = axes[0, 0].figure
    figure.draw_without_rendering()
    canvas = figure.bbox
    for text in figure.findobj(plt.Text):
        if text.get_text() and text.get_visible():
            extent = text.get_window_extent()
            # One pixel: glyphs are wider than their advances by their antialiasing.
            assert extent.x0 >= canvas.x0 - 1 and extent.x1 <= canvas.x1 + 1, text


def test_failure_without_images_or_with_a_wrong_label():
    axes = failing({"before": []})
    assert "no image" in "".join(one.get_text() for one in axes[0, 1].texts)
    with pytest.raises(KeyError):
        failing({"before": [("d", "1")]})


def mean_only(ap):
    return float(np.nanmean(ap)), float(np.nanmean(ap))


def test_tuning_curves_show_means_over_queries_that_count():
    ap = np.array([[0.2, np.nan, 0.4], [0.5, np.nan, 0.7]])
    axes = viz_scores.tuning_curves(
        {"max_distance": ([0.7, 0.9], ap)},
        {"max_distance": 0.9},
        {"max_distance": 0.7},
        before=np.array([0.1, np.nan, 0.3]),
        interval=mean_only,
    )
    lines = {line.get_label(): line for line in axes[0].lines}
    assert lines["reranked"].get_ydata().tolist() == pytest.approx([30, 60])
    assert lines["not reranked"].get_ydata()[0] == pytest.approx(20)
    assert (lines["chosen"].get_xdata()[0], lines["current"].get_xdata()[0]) == (1, 0)
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0.7", "0.9"]


def test_tuning_curves_of_nothing_say_so():
    axes = viz_scores.tuning_curves({}, {}, {}, before=np.zeros(0), interval=mean_only)
    assert "nothing was tuned" in axes[0].texts[0].get_text()


def test_keep_writes_vectors_on_request_only(tmp_path):
    axes = viz_scores.score_bars({"a": {"easy": 0.5}})
    style.keep(axes, None, "bars", "pdf")
    assert list(tmp_path.iterdir()) == []
    style.keep(axes, tmp_path / "figures", "bars", "pdf")
    style.keep(axes.figure, tmp_path / "figures", "bars", "svg")
    assert (tmp_path / "figures" / "bars.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "figures" / "bars.svg").read_text()
    with pytest.raises(ValueError, match="no format is known"):
        style.keep(axes, tmp_path, "bars", "bmpx")


def test_tensor_path_keeps_every_word_in_its_box_and_its_box_in_the_figure():
    steps = [("name " * (1 + i % 3), f"{i} × 128", "a note of some words") for i in range(11)]
    axes = paths.tensor_path(steps, width=8)
    axes.figure.draw_without_rendering()
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(boxes) == 11
    words = [text for text in axes.texts if text.get_text()]
    assert len(words) == 33
    for number, text in enumerate(words):
        extent, box = text.get_window_extent(), boxes[number // 3]
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1, text
        assert box.y0 <= extent.y0 and extent.y1 <= box.y1, text
    assert all(box.x1 <= axes.figure.bbox.x1 for box in boxes)
    # Rows of boxes do not overlap, and arrows stay within a row.
    assert len({round(box.y0) for box in boxes}) > 1
    assert len(axes.texts) - len(words) == 11 - len({round(box.y0) for box in boxes})


def test_tensor_path_of_nothing_says_so():
    assert "no steps" in paths.tensor_path([]).texts[0].get_text()


# A pair under the lens; photographs without labels


def _features(count: int = 3, box: tuple = (10, 5, 50, 35)) -> LocalFeatures:
    """Features at x = 8, 24, 40 of a 40 x 60 input (h, w), from a box of 40 x 30 pixels."""
    points = np.array([[8, 8], [24, 24], [40, 8]], np.float32)[:count]
    codes, falling = np.eye(3, dtype=np.float32)[:count], np.ones(count, np.float32)
    return LocalFeatures(points, codes, falling, falling, (40, 60), box, (48, 64))


def test_inspection_marks_what_it_is_given():
    photo = np.full((48, 64, 3), 200, np.uint8)
    one, pairs = _features(), np.array([[0, 0], [1, 1], [2, 2]])
    inliers = np.array([True, True, False])
    axes = matching.inspection(photo, photo, one, one, pairs, inliers, homography=np.eye(3))
    assert axes.get_title() == "2 inliers of 3 matches"
    assert len(axes.patches) == 2  # the box, and its image under the homography
    assert len(axes.collections) == 2
    bare = matching.inspection(
        photo, photo, one, one, pairs, inliers, homography=np.eye(3), outline=False, rejected=False
    )
    assert len(bare.patches) == 0 and len(bare.collections) == 1
    crossed = matching.inspection(photo, photo, one, one, pairs, inliers, dropped=(one, None))
    (marks,) = [line for line in crossed.lines if line.get_marker() == "x"]
    assert len(marks.get_xdata()) == 3
    with pytest.raises(ValueError, match="3 matches, but inliers of shape"):
        matching.inspection(photo, photo, one, one, pairs, inliers[:2])


def test_heat_lies_over_the_box_alone():
    photo = np.full((48, 64, 3), 200, np.uint8)
    heat = np.array([[1.0, 0.0]])
    mixed = viz_maps._heated(photo, heat, (10, 5, 50, 35))
    assert (mixed[:5] == 200).all() and (mixed[:, 50:] == 200).all()
    # 0.4 of the grey photograph and 0.6 of the colour map's ends: bright left, black right
    assert mixed[20, 15].max() > 200 and (np.abs(mixed[20, 45].astype(int) - 80) <= 3).all()
    assert (photo == 200).all()
    with pytest.raises(ValueError, match="finite"):
        viz_maps._heated(photo, np.array([[np.nan]]), (0, 0, 64, 48))


def test_attention_has_a_row_a_scale_and_a_column_a_head():
    photo = np.zeros((48, 64, 3), np.uint8)
    attention = {scale: np.random.default_rng(0).random((4, 3, 4)) for scale in (0.5, 1.0)}
    scores = {scale: maps.mean(axis=0) for scale, maps in attention.items()}
    axes = viz_maps.attention_heads(photo, attention, scores, box=(0, 0, 32, 48))
    assert axes.shape == (2, 5)
    assert [cell.get_title() for cell in axes[0]] == [
        *("score: all heads", "head 1", "head 2", "head 3", "head 4"),
    ]
    assert [row[0].get_ylabel() for row in axes] == ["scale 0.5", "scale 1"]
    assert viz_maps.attention_heads(photo, attention, scores, scales=[1.0]).shape == (1, 5)
    assert viz_maps.attention_heads(photo, {}, {}).shape == (1, 1)


def test_dropped_features_are_counted_by_reason():
    photo = np.zeros((48, 64, 3), np.uint8)
    axes = viz_maps.dropped_features(
        *(photo, _features(1), _features(3), ["overlap", "keypoints", "overlap"]),
        titles={"overlap": "too near"},
    )
    assert [panel.get_title() for panel in axes] == ["1 kept", "3 dropped"]
    labels = [line.get_label() for line in axes[1].lines]
    assert labels == ["1: keypoints", "2: too near"]
    assert viz_maps.dropped_features(photo, _features(), _features(0), [])[1].get_title() == (
        "0 dropped"
    )
    with pytest.raises(ValueError, match="3 dropped features, but"):
        viz_maps.dropped_features(photo, _features(), _features(), ["overlap"])


def test_knob_curves_have_a_panel_a_knob():
    rows = [("threshold", 4, 10, 2), ("threshold", 16, 10, 7), ("max_distance", 0.8, 10, 7)]
    table = pd.DataFrame(rows, columns=["knob", "value", "matches", "inliers"])
    axes = viz_scores.knob_curves(table, marks={"threshold": 16})
    assert [panel.get_xlabel() for panel in axes] == ["threshold", "max distance"]
    assert axes[0].lines[1].get_ydata().tolist() == [2, 7]
    assert [len(panel.lines) for panel in axes] == [3, 2]  # the mark
    assert len(viz_scores.knob_curves(table.head(0), marks={})) == 1


def test_two_rankings_need_no_labels():
    photo = np.zeros((48, 64, 3), np.uint8)
    axes = rankings.two_rankings(photo, None, [(photo, "1 a"), (photo, "2 b")], [], columns=2)
    assert axes.shape == (2, 3)
    assert axes[0, 2].get_title() == "2 b"
    assert [text.get_text() for text in axes[1, 1].texts] == ["no photograph\nranked"]
