"""The choice of fonts, with a tiny font that the tests make."""

import logging
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from captioning.output import fonts
from captioning.output.fonts import font_families, script_name
from captioning.output.plots import NotebookFigure, plot_attention, plot_caption_grid


def write_font(path, family, chars, weight=400):
    """Writes a font in which each of these characters is a large filled square."""
    pen = TTGlyphPen(None)
    for x, y in ((0, 0), (0, 900), (900, 900), (900, 0)):
        (pen.lineTo if x or y else pen.moveTo)((x, y))
    pen.closePath()
    glyph = pen.glyph()
    names = [f"u{ord(char):X}" for char in chars]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(char): name for char, name in zip(chars, names, strict=True)})
    builder.setupGlyf(dict.fromkeys([".notdef", *names], glyph))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=weight)
    builder.setupPost()
    builder.save(path)


@pytest.fixture(autouse=True)
def _own_fonts(monkeypatch):
    """Leaves only Matplotlib's fonts, whatever is installed; undoes what a test adds, and what was said."""
    own = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", own)
    monkeypatch.setattr(fonts, "_reported", set())
    fontManager._findfont_cached.cache_clear()
    yield
    fontManager._findfont_cached.cache_clear()


@pytest.fixture
def add_font(tmp_path):
    """Returns a function that makes a font and installs it for Matplotlib."""

    def add(family, chars, **kwargs):
        path = tmp_path / f"{family}.ttf"
        write_font(path, family, chars, **kwargs)
        fontManager.addfont(path)

    return add


def test_default_font_is_enough_for_most_languages(capsys):
    for text in ("a dog", "Mädchen läuft", "собака", "σκύλος", "שלום", "سلام", "", " \n\u200b\ufe0f\x07"):
        assert font_families(text) == ["DejaVu Sans"]
    assert capsys.readouterr().err == ""


def test_font_is_found_for_what_the_default_lacks(add_font, capsys):
    add_font("Tiny", "一狗")
    assert font_families("a 狗") == ["DejaVu Sans", "Tiny"]
    assert font_families("a dog") == ["DejaVu Sans"]
    assert capsys.readouterr().err == ""


def test_fonts_whose_names_promise_a_script_are_opened_first(add_font, monkeypatch):
    add_font("A Tiny", "一狗ท")
    add_font("Noto Sans Runic", "ᚠ")
    add_font("A Noto Serif CJK", "一狗")
    add_font("Noto Sans CJK", "一狗")
    add_font("Noto Sans Thai", "ท")
    opened = []
    read_family = fonts._read_family
    monkeypatch.setattr(fonts, "_read_family", lambda family: opened.append(family) or read_family(family))
    assert font_families("一狗") == ["DejaVu Sans", "Noto Sans CJK"]
    assert font_families("ท") == ["DejaVu Sans", "Noto Sans Thai"]
    assert opened == ["Noto Sans CJK", "Noto Sans Thai"]
    assert font_families("一ท") == ["DejaVu Sans", "Noto Sans CJK", "Noto Sans Thai"]


def test_fonts_that_cannot_be_used_are_passed_over(add_font, tmp_path, capsys):
    add_font("Noto Color Emoji", "\U0001f436")
    add_font("Noto Sans CJK", "一")
    (tmp_path / "Noto Sans CJK.ttf").write_bytes(b"damaged")
    add_font("Tiny", "一")
    assert font_families("\U0001f436一") == ["DejaVu Sans", "Tiny"]
    assert "some emoji or symbols" in capsys.readouterr().err


def test_scripts_without_font_are_said_once(capsys):
    assert font_families("一只狗 ท 🐶") == ["DejaVu Sans"]
    assert capsys.readouterr().err.splitlines() == [
        "plots: no installed font has Han characters; they are drawn as boxes (install one, such as Noto Sans CJK)",
        "plots: no installed font has Thai characters; they are drawn as boxes (install one, such as Noto Sans Thai)",
        "plots: no installed font has some emoji or symbols; they are drawn as boxes (install one, such as Noto Emoji)",
    ]
    font_families("一个男孩 🐶")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("char", "script"),
    [
        ("狗", "Han"),
        ("々", "Han"),
        ("ー", "Katakana"),
        ("ひ", "Hiragana"),
        ("ท", "Thai"),
        ("한", "Hangul"),
        ("🐶", fonts.SYMBOLS),
    ],
)
def test_script_name(char, script):
    assert script_name(char) == script


# Plots.


def count_dark_pixels(path):
    with Image.open(path) as image:
        return int((np.asarray(image.convert("L")) < 100).sum())


@pytest.mark.parametrize("image_format", ["png", "svg", "pdf"])
def test_plots_draw_with_the_fonts_that_have_the_characters(add_font, tmp_path, image_format, capsys, caplog):
    add_font("Tiny", "一狗", weight=500)  # not the normal weight, which Matplotlib would mention
    path = tmp_path / f"plot.{image_format}"
    attention = np.full((3, 64), 1 / 64)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")  # before 3.11, of letters that join
        plot_attention(Image.new("RGB", (60, 40)), ("狗", "dog", "ท\u0e34"), attention, (1, 1, 1), path, "狗dogท\u0e34")
        plot_caption_grid([(Image.new("RGB", (60, 40)), "🐶 שלום سلام नमस्ते")], tmp_path / f"grid.{image_format}")
    assert path.stat().st_size > 1000 and not caplog.records
    assert [line.split("; ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "plots: no installed font has Thai characters",
        "plots: no installed font has Devanagari characters",
        "plots: no installed font has some emoji or symbols",
    ]


def test_figures_draw_the_glyphs_of_the_font_that_was_found(add_font, tmp_path):
    add_font("Tiny", "狗")
    for name, text in (("found", "狗"), ("box", "猫")):
        figure = NotebookFigure(figsize=(2, 2), dpi=100)
        figure.add_text(1, 0.5, text, 72)
        figure.save(tmp_path / f"{name}.png")
    assert count_dark_pixels(tmp_path / "found.png") > 7000, "the square of the tiny font: 90 x 90 pixels"
    assert count_dark_pixels(tmp_path / "box.png") < 7000
