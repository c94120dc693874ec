import csv
import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.output import results
from captioning.output.captions import Caption
from captioning.output.plots import MAX_GRID_IMAGES
from captioning.output.results import CaptionedImage, CsvWriter, GridWriter, JsonWriter, TextWriter, write_plot

IMAGE = Image.new("RGB", (50, 30), "red")


def make_caption(text="a dog", *alternatives):
    words = tuple(text.split())
    attention = np.full((len(words), 64), 1 / 64)
    probabilities = (0.123456, 0.5, 0.5)[: len(words)]
    return Caption(text, words, probabilities, attention, 0.5, tuple(map(make_caption, alternatives)))


def make_result(caption=None, references=None, name="a.jpg"):
    return CaptionedImage(name, IMAGE, caption or make_caption(), references)


# Plots.


def test_write_plot_titles_words_as_they_are_and_the_caption_as_it_is_joined(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(results, "plot_attention", lambda *args: calls.append(args))
    caption = Caption("一只", ("一", "只"), (0.5, 0.5), np.full((2, 64), 1 / 64), 1.0)
    assert write_plot(IMAGE, caption, tmp_path / "plot.png")
    assert calls == [(IMAGE, ("一", "只"), caption.attention, (0.5, 0.5), tmp_path / "plot.png", "一只")]


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
        chosen = [dataclasses.replace(caption, consensus=26.76) for caption in (two.caption, *two.caption.alternatives)]
        writer.write(make_result(dataclasses.replace(chosen[0], alternatives=tuple(chosen[1:]))))
        assert capsys.readouterr().out.splitlines()[1] == f"{prefix}dog\t-2.79\t0.248\t26.8"


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


# A table.


@pytest.fixture
def run(tmp_path):
    """What is needed of a run: its checkpoint."""
    write_checkpoint(tmp_path / "run", 1.0)
    (tmp_path / "run/config.json").touch()
    return tmp_path / "run"


def write_checkpoint(run, value):
    """Writes the checkpoint of a run with one weight."""
    tf.train.Checkpoint(weight=tf.Variable(value)).write(str(run / "checkpoints/best/ckpt-1"))
    (run / "checkpoints/best/checkpoint").write_text('model_checkpoint_path: "ckpt-1"\n')


@pytest.fixture
def write(tmp_path, run):
    """Writes images with their captions into captions.csv, and returns what was there before."""

    def write(*images, captions=("a dog",), given=(), replaced=b"", **settings):
        table = CsvWriter(tmp_path / "captions.csv", run, DecodeConfig(captions=len(captions), **settings), given)
        for image in images:
            table.note(image)
            if replaced:
                Path(image).write_bytes(replaced)
            table.write(make_result(make_caption(*captions), name=image))
        table.close()
        return table.done

    return write


def read(tmp_path):
    with open(tmp_path / "captions.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_writer_has_a_row_for_every_caption(tmp_path, write):
    assert write("a.jpg", captions=("a dog", "a, b")) == set()
    first, second = read(tmp_path)
    expected = {"image": "a.jpg", "rank": "1", "caption": "a dog", "confidence": "0.3137", "log_prob": "-3.478"}
    assert first == {**expected, "finished": "true"}
    assert (second["rank"], second["caption"]) == ("2", "a, b")


def test_csv_writer_continues(tmp_path, write):
    names = ["a.jpg", 'quote".jpg', "new\nline.jpg", "return\r.jpg", os.fsdecode(b"caf\xe9.png"), "ünï.jpg"]
    assert write(*names[:2]) == set()
    assert write(*names[2:]) == set(map(os.path.abspath, names[:2]))
    assert write() == set(map(os.path.abspath, names))
    assert [row["image"] for row in read(tmp_path)] == names


def test_csv_writer_captions_an_image_that_was_replaced_again(tmp_path, write, capsys):
    names = [str(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    url = "https://example.com/c.jpg"
    for name in names:
        Path(name).write_bytes(b"first")
    write(*names, url)
    os.utime(names[0])  # touched, not changed
    assert write(given=names) == {*names, url}
    Path(names[1]).write_bytes(b"second")
    assert write(given=names[:1]) == {*names, url}, "other images of the table stay"
    assert write(given=names) == {names[0], url}
    assert f"1 images have changed, or their files are not recorded; captioned again, the first: {names[1]!r}" in (
        capsys.readouterr().err
    )
    write(names[1], captions=("a cat",))
    assert [(row["image"], row["caption"]) for row in read(tmp_path)] == [
        (names[0], "a dog"),
        (url, "a dog"),
        (names[1], "a cat"),
    ]
    assert write(given=names) == {*names, url}


def test_csv_writer_captions_an_image_that_was_replaced_meanwhile_again(tmp_path, write):
    name = str(tmp_path / "a.jpg")
    Path(name).write_bytes(b"first")
    write(name, replaced=b"second")
    assert write(given=[name]) == set()


@pytest.mark.parametrize("captions", [("a dog",), ("a dog", "a cat", "a bird")])
def test_csv_writer_cut_off_anywhere_continues_with_whole_images(tmp_path, write, captions):
    images = ["a.jpg", "line\nbreak.jpg", "c.jpg"]
    write(*images, captions=captions)
    path = tmp_path / "captions.csv"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        done = write(captions=captions)
        assert done == set(map(os.path.abspath, images[: len(done)])) and content.startswith(path.read_bytes())
        write(*images[len(done) :], captions=captions)
        assert path.read_bytes() == content


def test_csv_writer_is_written_at_once(tmp_path, run):
    path = tmp_path / "new/folder/captions.csv"
    table = CsvWriter(path, run, DecodeConfig(), [])
    table.write(make_result())
    assert path.read_text().splitlines()[1].startswith("a.jpg,1,a dog,"), "it is not closed yet"
    with pytest.raises(InputError, match="another process writes into it"):
        CsvWriter(path, run, DecodeConfig(), [])
    table.close()


def test_csv_writer_never_mixes_settings_or_runs(tmp_path, write, run):
    write("a.jpg")
    content = (tmp_path / "captions.csv").read_bytes()
    with pytest.raises(InputError, match=r"captions\.csv: was made with other settings.*choose another file"):
        write("b.jpg", beam_size=3)
    write_checkpoint(run, 2.0)
    with pytest.raises(InputError, match="was made with other settings"):
        write("b.jpg")
    assert (tmp_path / "captions.csv").read_bytes() == content
    (tmp_path / "captions.csv.settings.json").unlink()
    with pytest.raises(InputError, match="was made by another program"):
        write("b.jpg")
    (tmp_path / "captions.csv").unlink()
    assert write("b.jpg", beam_size=3) == set()


def test_csv_writer_continues_a_table_of_a_version_with_fewer_settings(tmp_path, write):
    write("a.jpg")
    path = tmp_path / "captions.csv.settings.json"
    settings = json.loads(path.read_text())
    del settings["choose"]
    path.write_text(json.dumps(settings))
    assert len(write("b.jpg")) == 1
    path.write_text("[]")
    with pytest.raises(InputError, match=r"with other settings \(\[\]\)"):
        write("c.jpg")


@pytest.mark.parametrize(
    "content",
    [
        b"image,caption\na.jpg,a dog\n",
        b"\x80\x00 no text\n",
        b"one line, unfinished",
        b"image,rank,something else",
        b"image,rank,caption,confidence,log_prob,finished\na,b\na,1,c,d,e,f\n",
    ],
)
def test_csv_writer_refuses_other_files_and_keeps_them(tmp_path, write, content):
    write("a.jpg")
    path = tmp_path / "captions.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"captions\.csv: expected a table .* with the columns image,rank"):
        write("a.jpg")
    assert path.read_bytes() == content
