import dataclasses
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
from captioning.output.results import CaptionedImage, ResultWriter, write_plot

IMAGE = Image.new("RGB", (50, 30), "red")


def make_caption(text="a dog", *alternatives):
    words = tuple(text.split())
    attention = np.full((len(words), 64), 1 / 64)
    return Caption(text, words, (0.123456, 0.5)[: len(words)], attention, 0.5, tuple(map(make_caption, alternatives)))


def make_result(caption=None, name="a.jpg", references=None):
    return CaptionedImage(name, IMAGE, caption or make_caption(), references)


class Recorder:
    """Stands for a table or a page."""

    def __init__(self):
        self.calls = []

    def write(self, *args):
        self.calls.append(args)

    add = write


# Plots.


def test_write_plot_titles_words_as_they_are_and_the_caption_as_it_is_joined(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(results, "plot_attention", lambda *args: calls.append(args))
    caption = Caption("一只", ("一", "只"), (0.5, 0.5), np.full((2, 64), 1 / 64), 1.0)
    assert write_plot(IMAGE, caption, tmp_path / "plot.png")
    assert calls == [(IMAGE, ("一", "只"), caption.attention, (0.5, 0.5), tmp_path / "plot.png", "一只", None)]


def test_write_plot_shows_the_gate_of_each_word(tmp_path, monkeypatch):
    figures, plot_attention = [], results.plot_attention
    monkeypatch.setattr(results, "plot_attention", lambda *args: figures.append(plot_attention(*args)))
    assert write_plot(IMAGE, dataclasses.replace(make_caption(), gates=(0.826, 0.004)), tmp_path / "plot.png")
    texts = [text.get_text() for text in figures[0].texts]
    assert texts == ["a dog", "a", "12 %, gate 0.83", "dog", "50 %, gate 0.00"]


def test_write_plot_makes_a_picture(tmp_path):
    assert write_plot(IMAGE, make_caption(), tmp_path / "new/plot.svg")
    assert (tmp_path / "new/plot.svg").stat().st_size > 1000


def fail_to_plot(monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(results, "plot_attention", fail)


def test_write_plot_says_where_nothing_can_be_written(monkeypatch, capsys):
    fail_to_plot(monkeypatch, errno.EACCES)
    assert not write_plot(IMAGE, make_caption(), Path("plot.png"))
    assert capsys.readouterr().err == "plot.png: the plot cannot be written (Permission denied)\n"


def test_write_plot_ends_if_the_disk_is_full(monkeypatch):
    fail_to_plot(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        write_plot(IMAGE, make_caption(), Path("plot.png"))


# Standard output.


def test_result_writer_prints_text(capsys):
    ResultWriter(show_names=False).write(make_result())
    ResultWriter().write(make_result())
    assert capsys.readouterr().out == "a dog\na.jpg\ta dog\n"


def test_result_writer_prints_several_captions_with_log_p_and_confidence(capsys):
    caption = make_caption("a dog", "dog")
    ResultWriter(show_names=False).write(make_result(caption))
    ResultWriter().write(make_result(caption))
    lines = [f"{each.text}\t{each.log_prob:.2f}\t{each.confidence:.3f}" for each in (caption, *caption.alternatives)]
    assert lines == ["a dog\t-3.48\t0.314", "dog\t-2.79\t0.248"]
    assert capsys.readouterr().out.splitlines() == [*lines, *(f"a.jpg\t{line}" for line in lines)]


def test_result_writer_prints_json(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "plot_attention", lambda *_: None)
    caption = make_caption()
    ResultWriter(as_json=True).write(make_result(caption), tmp_path / "plot.png")
    expected = {"image": "a.jpg", **caption.to_json(), "plot": str(tmp_path / "plot.png")}
    assert json.loads(capsys.readouterr().out) == expected
    ResultWriter(as_json=True).write(make_result(caption, references=("one", "two")))
    assert json.loads(capsys.readouterr().out) == {**expected, "plot": None, "references": ["one", "two"]}


def test_result_writer_shows_references_beside_the_prediction(capsys, monkeypatch):
    monkeypatch.setattr(results, "plot_attention", lambda *_: None)
    ResultWriter().write(make_result(make_caption("a dog", "dog"), references=("one", "two")), Path("plot.png"))
    expected = "a.jpg,reference: one,reference: two,predicted: a dog,predicted: dog,attention: plot.png"
    printed = capsys.readouterr()
    assert [line.strip() for line in printed.out.splitlines()] == expected.split(",") and printed.err == ""


def test_result_writer_names_plots_that_were_written(capsys, monkeypatch):
    monkeypatch.setattr(results, "plot_attention", lambda *_: None)
    ResultWriter().write(make_result(), Path("plot.png"))
    assert capsys.readouterr().err == "attention: plot.png\n"
    fail_to_plot(monkeypatch, errno.EACCES)
    ResultWriter(as_json=True).write(make_result(), Path("plot.png"))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["plot"] is None and "attention: " not in printed.err


# Files.


def test_result_writer_fills_a_table_instead_of_printing(capsys):
    table, caption = Recorder(), make_caption()
    ResultWriter(table=table).write(make_result(caption))
    assert table.calls == [("a.jpg", caption)] and capsys.readouterr().out == ""
    ResultWriter(as_json=True, table=table).write(make_result(caption))
    assert len(table.calls) == 2 and json.loads(capsys.readouterr().out)["image"] == "a.jpg"


def test_result_writer_fills_a_page(capsys):
    page, caption = Recorder(), make_caption()
    ResultWriter(report=page).write(make_result(caption, references=("one",)))
    assert page.calls == [(IMAGE, "a.jpg", caption.to_json(with_attention=True), ("one",))]
    assert "predicted: a dog" in capsys.readouterr().out


def test_result_writer_writes_grid_of_the_first_images(capsys, tmp_path):
    writer = ResultWriter(grid=tmp_path / "grid.png")
    writer.write_grid()
    assert not (tmp_path / "grid.png").exists(), "there are no images yet"
    for _ in range(MAX_GRID_IMAGES + 1):
        writer.write(make_result())
    assert len(writer.images_and_captions) == MAX_GRID_IMAGES
    del writer.images_and_captions[2:]
    writer.write_grid()
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert "grid.png" in capsys.readouterr().err
