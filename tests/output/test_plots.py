import random
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from captioning.output import plots
from captioning.output.plots import (
    NotebookFigure,
    best_grid,
    count_cells,
    overlay_attention,
    plot_attention,
    plot_caption_grid,
    plot_history,
    thumbnail,
    upsample_attention,
    wrap_text,
)

COLUMNS = ("epoch", "train_loss", "val_loss", "bleu4", "cider")


def test_upsample_attention_keeps_location_and_is_smooth():
    attention_weights = np.zeros(64)
    attention_weights[8 * 2 + 5] = 1  # row 2, column 5
    enlarged = upsample_attention(attention_weights, (160, 80))
    assert enlarged.shape == (80, 160)
    y, x = np.unravel_index(enlarged.argmax(), enlarged.shape)
    assert abs(y - 25) <= 2 and abs(x - 110) <= 2
    assert np.abs(np.diff(enlarged, axis=1)).max() < 0.2 and enlarged.min() >= 0, "8x8 blocks, or negative weights"


def test_overlay_attention_lights_the_largest_weight():
    attention_weights = np.zeros(64)
    attention_weights[0] = 0.01  # scaled to full brightness
    pixels = overlay_attention(Image.new("RGB", (80, 80), (100, 100, 100)), attention_weights)
    assert pixels.shape == (80, 80, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0, 0] > 140 and pixels[79, 79, 0] == 25
    dark = overlay_attention(Image.new("RGB", (80, 80)), attention_weights)
    assert dark[0, 0, 0] > 50 and dark[79, 79, 0] == 0, "it is visible in a dark image, too"


@pytest.mark.parametrize(("size", "count"), [((300, 200), 3), ((40, 400), 1), ((800, 60), 20), ((100, 100), 0)])
def test_plot_attention_of_any_image_and_caption(tmp_path, size, count):
    path = tmp_path / "new folder/a_attention.png"
    attention = np.full((count, 64), 1 / 64)
    plot_attention(Image.new("RGBA", size, "red"), ("word",) * count, attention, (1.0,) * count, path)
    with Image.open(path) as plot:
        assert plot.format == "PNG" and min(plot.size) > 100


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


def test_plot_attention_titles_each_word_with_its_probability():
    image, attention = Image.new("RGB", (60, 40)), np.full((2, 64), 1 / 64)
    figure = plot_attention(image, ("a", "$5"), attention, (0.9, 0.001))
    assert texts_of(figure) == ["a $5", "a\n90 %", "$5\n< 1 %"]
    assert len(figure.axes) == 3, "the image itself comes first"
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    assert texts_of(plot_attention(image, ("a", "$5"), attention)) == ["a $5", "a", "$5"]
    assert texts_of(plot_attention(image, (), attention[:0])) == ["(no words)"]
    assert texts_of(plot_attention(image, ("狗", "猫"), attention, text="狗猫")) == ["狗猫", "狗", "猫"]
    assert texts_of(plot_attention(image, ("\u0301", "a"), attention)) == ["\u0301 a", "\u0301", "a"]


@pytest.mark.parametrize(("image_format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plots_are_written_in_three_formats_and_missing_fonts_logged_once(
    tmp_path, image_format, start, monkeypatch, capsys
):
    monkeypatch.setattr(plots, "font_families", lambda: ["DejaVu Sans"])
    monkeypatch.setattr(NotebookFigure, "has_logged_missing_glyph", False)
    image, path = Image.new("RGB", (60, 40)), tmp_path / f"attention.{image_format}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")  # letters that join, before 3.11
        plot_attention(image, ("一", "$5 ท\u0e34"), np.full((2, 64), 1 / 64), (0.9, 0.001), path)
        captions = ["a dog " * 30, "🐶 שלום سلام नमस्ते"]
        plot_caption_grid([(thumbnail(image), text) for text in captions], tmp_path / f"grid.{image_format}")
    for name in ("attention", "grid"):
        assert (tmp_path / f"{name}.{image_format}").read_bytes().startswith(start)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plots: no installed font has '一', which is drawn as a box; install Noto Sans CJK, ")


def test_font_families_are_the_installed_ones_in_order(monkeypatch):
    monkeypatch.setattr(fontManager, "get_font_names", lambda: ["Arial", "Malgun Gothic", "Noto Emoji", "DejaVu Sans"])
    assert plots.font_families.__wrapped__() == ["DejaVu Sans", "Noto Emoji", "Malgun Gothic"]


def test_plot_caption_grid_has_every_image_with_its_caption():
    image = thumbnail(Image.new("RGB", (60, 40)))
    figure = plot_caption_grid([(image, "a dog"), (image, ""), (image, "a cat")])
    assert texts_of(figure) == ["a dog", "(no words)", "a cat"] and len(figure.axes) == 3


@pytest.mark.parametrize(
    ("size", "expected"), [((600, 300), (480, 240)), ((10, 40), (120, 480)), ((3000, 1), (480, 96))]
)
def test_thumbnail_limits_side_and_aspect(size, expected):
    small = thumbnail(Image.new("L", size))
    assert (small.size, small.mode) == (expected, "RGB")


def test_best_grid_is_near_the_target_aspect():
    assert best_grid(1, 1.0) == (1, 1)
    assert best_grid(8, 1.0) == (2, 4)
    assert best_grid(8, 0.2) == (1, 8) and best_grid(8, 12.0) == (8, 1)


def test_wrap_text_breaks_where_each_script_allows_it():
    assert wrap_text("a man in a red shirt", 0.77, 10) == ["a man in a", "red shirt"]
    assert wrap_text("一个穿红衣服的人", 0.77, 10) == ["一个穿红衣", "服的人"]
    assert wrap_text("手机 iphone手机", 0.77, 10) == ["手机", "iphone手机"]
    assert wrap_text("a dog 一个穿红", 0.77, 10) == ["a dog 一个", "穿红"]
    assert wrap_text("ก้ก้ก้ก้ก้ก้ก้ก้ก้ก้ก้", 0.77, 10) == ["ก้" * 10, "ก้"]
    assert wrap_text("extraordinarily", 0.77, 10) == ["extraordin", "arily"]
    assert wrap_text("", 1, 10) == []


def test_wrap_text_marks_what_is_left_out():
    assert wrap_text("a man in a red shirt and a hat", 0.77, 10, max_lines=2) == ["a man in a", "red shir …"]
    assert wrap_text("一个穿红衣服的人在跑步", 0.77, 10, max_lines=2) == ["一个穿红衣", "服的人在 …"]


def test_wrap_text_loses_nothing_and_fits():
    choice = random.Random(0)
    for _ in range(300):
        text = "".join(choice.choice("ab 一狗ก\u0e49🐶שس\u0301") for _ in range(choice.randrange(60)))
        lines = wrap_text(text, 0.77, 10, max_lines=99)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert max(map(count_cells, lines), default=0) <= 10


def history_rows(*rows):
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def test_plot_history_marks_best_epoch(tmp_path):
    rows = history_rows((1, 4, 3, 5, 20), (2, 3, 2.5, 9, 31.4), (3, 2, 2.6, 8, 30))
    figure = plot_history(rows, 2, "cider", tmp_path / "loss.png")
    losses, scores = figure.axes
    assert losses.get_title() == "best: epoch 2, with CIDEr 31.4, BLEU-4 9.0"
    assert [line.get_label() for line in losses.lines[:2]] == ["training loss", "validation loss"]
    assert scores.lines[-1].get_xydata().tolist() == [[2, 31.4]]
    assert (tmp_path / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("missing", [None, ""])
def test_plot_history_without_scores_marks_lowest_validation_loss(missing):
    figure = plot_history(history_rows((1, 4, 3, missing, missing), (2, 3, 2.5, missing, missing)), 2, "val_loss")
    (losses,) = figure.axes
    assert losses.get_title() == "best: epoch 2, with a validation loss of 2.50"
    assert losses.lines[2].get_xydata().tolist() == [[2, 2.5]]


def test_plot_history_plots_other_columns_of_the_training_beside_cider():
    rows = history_rows((1, 0, 3, 5, 20), (2, 0, 2.5, 9, 31.4))
    rows = [{"train_reward": 40.0 + number, "train_seconds": 900.0, **row} for number, row in enumerate(rows)]
    for row in rows:
        del row["train_loss"]
    losses, scores = plot_history(rows, 2, "cider").axes
    assert [line.get_label() for line in losses.lines[:1]] == ["validation loss"]
    assert [line.get_label() for line in scores.lines[:2]] == ["CIDEr", "training reward"]
    assert scores.lines[1].get_xydata().tolist() == [[1, 40], [2, 41]] and 41 < scores.get_ylim()[1] < 50


def test_plot_history_names_a_best_epoch_whose_row_is_gone():
    figure = plot_history(history_rows((2, 3, 2.5, 9, 31.4)), 1, "cider")
    assert figure.axes[0].get_title() == "best: epoch 1"
