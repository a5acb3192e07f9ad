"""Colours and files of figures, and text and photographs on axes."""

import base64
import itertools
import math

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.textpath import TextPath

from tests.viz.drawn_samples import SYSTEMS, photographs, picture
from vitgal.runs import PathError
from vitgal.settings.sections import ShowSettings
from vitgal.viz import drawing, galleries, scores, style
from vitgal.viz.style import FigureFolder


def test_frames_differ_without_red_green_vision():
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
        assert nearest([*style.LABEL_COLOURS.values(), style.QUERY_COLOUR], matrix) > 20
    usual = ("#009E73", "#E69F00", "#D55E00", "#999999")
    assert nearest(usual, seen["deuteranope"]) < 20  # the test can tell
    assert len({label[0] for label in style.LABEL_COLOURS}) == 4


def test_a_file_and_grey_pixels_are_drawn_as_their_pixels(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    axes = galleries.contact_sheet([tmp_path / "grey.png", grey, np.dstack([grey] * 3)], [""] * 3)
    for cell in axes[0, :3]:
        assert np.array_equal(cell.images[0].get_array(), np.dstack([grey] * 3))
        assert cell.images[0].get_extent() == [-0.5, 7.5, 5.5, -0.5]


def test_photographs_are_kept_no_larger_than_they_are_drawn():
    axes = galleries.contact_sheet([picture(1200, 1600)], [""], columns=5)[0, 0]
    # a cell of 2 inches at 80 dots an inch, three pixels a dot
    assert axes.images[0].get_array().shape == (360, 480, 3)
    assert axes.images[0].get_extent() == [-0.5, 1599.5, 1199.5, -0.5]


def test_long_titles_lose_their_middle():
    assert drawing.shorten("short", 1) == "short"
    cut = drawing.shorten("the_first_words_and_the_last", 0.8)
    start, end = cut.split("…")
    assert "the_first_words_and_the_last".startswith(start)
    assert "the_first_words_and_the_last".endswith(end) and 0 <= len(start) - len(end) <= 1
    letters = TextPath((0, 0), cut, size=style.CAPTION_SIZE).get_extents()
    assert 0.6 * 72 < letters.width <= 0.8 * 72  # matplotlib's own outlines of the letters
    assert drawing.shorten("$5 or $6", 3) == "$5 or $6"
    assert drawing.shorten("", 1) == ""


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".png", ".jpg"])
def test_saving_twice_gives_the_same_bytes(tmp_path, suffix):
    figures = [scores.score_dots(SYSTEMS) for _ in range(2)]
    files = [
        style.save_figure(axes, tmp_path / f"{index}" / f"bars{suffix}", close=True).read_bytes()
        for index, axes in enumerate(figures)
    ]
    assert files[0] == files[1] and len(files[0]) > 1000
    assert not plt.get_fignums()
    assert [path.name for path in (tmp_path / "0").iterdir()] == [f"bars{suffix}"]


def test_saving_an_array_of_axes_keeps_the_figure_open(tmp_path):
    axes = galleries.contact_sheet(photographs(2), ["", ""], columns=2)
    saved = cv2.imread(str(style.save_figure(axes, tmp_path / "sheet.png", dpi=100)))
    assert 800 < saved.shape[1] <= 1010  # 10 inches, less the margin
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match=r"sheet\.nope: no format"):
        style.save_figure(axes, tmp_path / "sheet.nope")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_figures_are_saved_on_request(tmp_path):
    axes = scores.score_dots({"a": {"easy": 0.5}})
    FigureFolder(tmp_path, ShowSettings(save_figures=False)).keep(axes, "bars")
    assert list(tmp_path.iterdir()) == []
    for figure_format, figure in (("pdf", axes), ("svg", axes.figure)):
        show = ShowSettings(save_figures=True, figure_format=figure_format)
        FigureFolder(tmp_path / "figures", show).keep(figure, "bars")
    (tmp_path / "link").symlink_to(tmp_path / "figures")
    with pytest.raises(PathError, match="link is a link to"):
        FigureFolder(tmp_path / "link", show).keep(axes, "bars")
    assert (tmp_path / "figures" / "bars.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "figures" / "bars.svg").read_text()


def test_notebooks_store_charts_as_png_and_photographs_as_jpeg():
    drawn = [scores.score_dots(SYSTEMS).figure for _ in range(2)]
    assert style.stored_picture(drawn[0], "jpeg") is None
    first, second = (style.stored_picture(figure, "png") for figure in drawn)
    assert first == second  # the same figure, the same bytes
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(first[0]), np.uint8), cv2.IMREAD_COLOR)
    # stored at 200 dots an inch, shown at 80
    assert first[1]["width"] == pytest.approx(pixels.shape[1] * 0.4, abs=0.5)
    sheet = galleries.contact_sheet(photographs(2), ["", ""], columns=5)[0, 0].figure
    assert style.stored_picture(sheet, "png") is None
    assert base64.b64decode(style.stored_picture(sheet, "jpeg")[0]).startswith(b"\xff\xd8")
    with pytest.raises(RuntimeError, match="for notebooks"):
        style.sharpen_figures()
