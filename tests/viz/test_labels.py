"""Nothing about a name or the user's style ends a run: every figure is drawn with nasty names."""

import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from tests.viz.drawn_samples import features, picture
from vitgal.retrieval.verification import PairInspection, Verification
from vitgal.viz import diagrams, drawing, galleries, maps, matching, scores, style
from vitgal.viz.galleries import QueryImage, RankedImage

NAMES = [
    *("北京.jpg", "かなカナ", "한국어", "ภาษาไทย", "देवनागरी", "தமிழ்", "ខ្មែរ", "🗼👩‍👩‍👧🇫🇷"),
    *("𠮷野家", "𓀀", "שלום.jpg", "برج إيفل", "a\u202egpj.exe", "\u2066isolate", "tab\tname"),
    *("line\nbreak", "\x1b[2Jclear", "nul\x00", "caf\udce9.jpg", "\ud800", "\ufffe", "\U0010ffff"),
    *("e\u0301", "$x_1$", "$", "$\\frac{1}{2", "\\alpha{", "%s {} {0}", "_hidden", "#1", "", " "),
    *("-", "é" * 127, "漢" * 85, "x" * 255, "</pre><script>"),
]
QUERY = QueryImage(picture(60, 80), (10, 5, 60, 40), NAMES[0])


def contact_sheet():
    return galleries.contact_sheet([picture(20, 30)] * len(NAMES), NAMES)


def ranked() -> list[RankedImage]:
    labels = ["easy", "hard", "junk", "negative"]
    return [
        RankedImage(name, picture(30, 40), labels[index % 4], f"{index}\n{name}")
        for index, name in enumerate(NAMES)
    ]


def ranking_rows():
    queries = [QueryImage(picture(60, 80), None, name) for name in NAMES]
    return galleries.ranking_rows(queries, [ranked()[:1]] * len(NAMES), columns=2)


def stacked_rankings():
    reasons = pd.DataFrame({"image": NAMES, "why": NAMES[::-1]}, dtype=object)
    reasons["$n$"] = range(len(NAMES))
    rows = {NAMES[0]: ranked(), "\x1b\n$": ranked()[:2]}
    return galleries.stacked_rankings(QUERY, rows, reasons, columns=len(NAMES))


def score_dots():
    return scores.score_dots({name: {"easy": 0.5, "hard": 0.2} for name in NAMES})


def ap_change():
    change, names = np.linspace(0, 1, len(NAMES)), pd.Index(NAMES, dtype=object)
    return scores.ap_change(pd.DataFrame({"before": 0.5, "after": change}, index=names))


def dropped_features():
    subset = features([(8, 8), (24, 24), (40, 8)])
    reasons, titles = NAMES[:3], dict(zip(NAMES[:3], NAMES[14:17], strict=True))
    return maps.dropped_features(picture(150, 240), subset, subset, reasons, titles=titles)


def step_diagram():
    return diagrams.step_diagram([(name, name[:20], name[::-1]) for name in NAMES])


def match_lines(first: str, second: str) -> plt.Axes:
    subset, pairs = features([(8, 8), (24, 24)]), np.array([[0, 0], [1, 1]])
    sides = [matching.MatchedImage(picture(150, 240), subset, name) for name in (first, second)]
    return matching.match_lines(*sides, PairInspection(pairs, Verification(np.ones(2, bool), None)))


FIGURES = [contact_sheet, ranking_rows, stacked_rankings, score_dots, ap_change]
FIGURES += [dropped_features, step_diagram]


def test_names_in_every_script_are_written_in_every_format(tmp_path):
    dots = score_dots()
    for suffix in (".png", ".pdf", ".svg"):
        assert style.save_figure(dots, tmp_path / f"a{suffix}").stat().st_size > 1000


@pytest.mark.parametrize("draw", FIGURES, ids=lambda one: one.__name__)
def test_any_name_can_be_drawn(draw, recwarn):
    figure = np.ravel(np.asarray(draw(), dtype=object))[0].figure
    figure.canvas.draw()
    assert not [str(single.message) for single in recwarn if "Glyph" in str(single.message)]
    written = "".join(text.get_text() for text in figure.findobj(plt.Text))
    assert written and all(
        letter == "\n" or drawing.printable(letter) == letter for letter in written
    )


@pytest.mark.parametrize("pair", [*zip(NAMES[::2], NAMES[1::2], strict=False)], ids=ascii)
def test_any_name_can_be_drawn_on_matches(pair):
    match_lines(*pair).figure.canvas.draw()


def test_every_system_is_in_the_legend():
    legend = score_dots().figure.legends[0]
    assert len(legend.get_texts()) == len(NAMES)


@pytest.mark.parametrize("letter", ["a", "漢", "ไ", "\t", "\ud800", "\U0010ffff", "🗼"], ids=ascii)
def test_every_letter_has_a_width(letter):
    assert 0.1 < drawing.text_width(letter, 1) < 3
    assert drawing.shorten(letter * 300, 0.5).count("…") == 1


@pytest.fixture
def installed_font(tmp_path) -> str:
    """The name of a font with nothing but 漢, known to matplotlib."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "han"])
    builder.setupCharacterMap({ord("漢"): "han"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "han": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "han": (2000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=0)
    builder.setupNameTable({"familyName": "One Letter", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "one.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "one.ttf")
    yield "One Letter"
    fontManager.ttflist[:] = before


def test_a_letter_is_drawn_with_a_font_that_has_it(installed_font):
    def black(axes: plt.Axes) -> float:
        axes.figure.canvas.draw()
        return (np.asarray(axes.figure.canvas.buffer_rgba())[..., :3] < 128).all(axis=-1).sum()

    assert drawing.text_width("漢", 1) == pytest.approx(2)
    axes = match_lines("漢字", "")
    families = axes.texts[0].get_fontfamily()
    assert families[:2] == ["DejaVu Sans", installed_font]
    assert set(families[2:]) <= {style.BOXES_FONT}  # for 字
    # the letter fills a square of nine tenths of eight points, at 80 dots an inch
    plain = black(match_lines("字", ""))
    assert black(axes) - plain == pytest.approx((0.9 * 8 * 80 / 72) ** 2, rel=0.3)


def test_a_missing_font_file_is_ignored(installed_font, tmp_path):
    (tmp_path / "one.ttf").unlink()
    assert drawing.text_width("漢\u4dff", 1) > 0
    (tmp_path / "one.ttf").write_bytes(b"no font")
    assert drawing.text_width("字\u4dfe", 1) > 0


@pytest.mark.slow
def test_the_user_style_does_not_change_figures(tmp_path):
    """Without LaTeX on the machine, `text.usetex` would end the run."""
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.family: serif\nfont.size: 30\naxes.grid: True\nsavefig.dpi: 20\n"
        "path.sketch: 3, 50, 9\nsavefig.transparent: True\naxes.unicode_minus: False\n"
        "figure.autolayout: True\nlines.linewidth: 9\naxes.formatter.use_mathtext: True\n"
        "image.cmap: jet\npdf.fonttype: 42\nsvg.fonttype: none\nsavefig.pad_inches: 3\n"
    )
    code = (
        "import sys; from pathlib import Path; import matplotlib; matplotlib.use('agg')\n"
        "from tests.viz.drawn_samples import log; from tests.viz.test_labels import *\n"
        "from vitgal.viz import charts\n"
        "assert str(matplotlib.rcParams['text.usetex']) == sys.argv[2]\n"
        "drawn = [score_dots(), charts.training_curves(log()), match_lines('a', 'b'),\n"
        "  galleries.ranking_rows([QUERY], [ranked()[:3]], columns=3),\n"
        "  charts.split_statistics([300, 4], [1]),\n"
        "  matching.keypoints(picture(150, 240), features([(8, 8), (24, 24)]))]\n"
        "for number, axes in enumerate(drawn):\n"
        "    for suffix in ('png', 'svg', 'pdf'):\n"
        "        style.save_figure(axes, Path(sys.argv[1]) / f'{number}.{suffix}')\n"
    )
    for usetex, rc in (("False", "/dev/null"), ("True", str(tmp_path / "matplotlibrc"))):
        command = [sys.executable, "-c", code, str(tmp_path / f"drawn-{usetex}"), usetex]
        subprocess.run(command, check=True, env=os.environ | {"MATPLOTLIBRC": rc})
    plain = sorted((tmp_path / "drawn-False").iterdir())
    assert len(plain) == 18
    for path in plain:
        assert path.read_bytes() == (tmp_path / "drawn-True" / path.name).read_bytes(), path.name
