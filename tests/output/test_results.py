import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning.output import results
from captioning.output.captions import Caption
from captioning.output.plots import MAX_GRID_IMAGES
from captioning.output.results import CaptionedImage, GridWriter, JsonWriter, TextWriter, write_plot

IMAGE = Image.new("RGB", (50, 30), "red")


def make_caption(text="a dog", *alternatives):
    words = tuple(text.split())
    attention = np.full((len(words), 64), 1 / 64)
    return Caption(text, words, (0.123456, 0.5)[: len(words)], attention, 0.5, tuple(map(make_caption, alternatives)))


def make_result(caption=None, references=None):
    return CaptionedImage("a.jpg", IMAGE, caption or make_caption(), references)


# Plots.


def test_write_plot_titles_words_as_they_are_and_the_caption_as_it_is_joined(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(results, "plot_attention", lambda *args: calls.append(args))
    caption = Caption("一只", ("一", "只"), (0.5, 0.5), np.full((2, 64), 1 / 64), 1.0)
    assert write_plot(IMAGE, caption, tmp_path / "plot.png")
    assert calls == [(IMAGE, ("一", "只"), caption.attention, (0.5, 0.5), tmp_path / "plot.png", "一只")]


def test_write_plot_makes_a_picture(tmp_path):
    assert write_plot(IMAGE, make_caption(), tmp_path / "new/plot.svg")
    assert (tmp_path / "new/plot.svg").stat().st_size > 1000


def test_write_plot_reports_a_file_that_cannot_be_written(monkeypatch, capsys):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(results, "plot_attention", fail)
    code = errno.EACCES
    assert not write_plot(IMAGE, make_caption(), Path("plot.png"))
    assert capsys.readouterr().err == "plot.png: the plot cannot be written (Permission denied)\n"
    code = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        write_plot(IMAGE, make_caption(), Path("plot.png"))


# Standard output.


def test_text_writer_prints_a_line_for_each_caption(capsys):
    one, two = make_result(), make_result(make_caption("a dog", "dog"))
    for show_names, prefix in ((False, ""), (True, "a.jpg\t")):
        writer = TextWriter(show_names)
        writer.write(one)
        assert capsys.readouterr().out == f"{prefix}a dog\n"
        writer.write(two)  # with log p and confidence
        assert capsys.readouterr().out == f"{prefix}a dog\t-3.48\t0.314\n{prefix}dog\t-2.79\t0.248\n"


def test_text_writer_shows_references_beside_the_prediction(capsys):
    TextWriter().write(make_result(make_caption("a dog", "dog"), references=("one", "two")), Path("plot.png"))
    lines = "a.jpg,  reference: one,  reference: two,  predicted: a dog,  predicted: dog,  attention: plot.png"
    assert capsys.readouterr().out.splitlines() == lines.split(",")


def test_json_writer_prints_an_object_for_each_image(capsys):
    caption = make_caption()
    JsonWriter().write(make_result(caption), Path("plot.png"))
    expected = {"image": "a.jpg", **caption.to_json(), "plot": "plot.png"}
    assert json.loads(capsys.readouterr().out) == expected
    JsonWriter().write(make_result(caption, references=("one", "two")))
    assert json.loads(capsys.readouterr().out) == {**expected, "plot": None, "references": ["one", "two"]}


# A grid.


def test_grid_writer_draws_the_first_images(capsys, tmp_path):
    writer = GridWriter(tmp_path / "grid.png")
    writer.close()
    assert not (tmp_path / "grid.png").exists(), "there are no images yet"
    for _ in range(MAX_GRID_IMAGES + 1):
        writer.write(make_result())
    assert len(writer.images_and_captions) == MAX_GRID_IMAGES
    del writer.images_and_captions[2:]
    writer.close()
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert "grid.png" in capsys.readouterr().err
