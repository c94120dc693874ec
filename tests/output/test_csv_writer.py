import csv
import os

import numpy as np
import pytest

from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig
from captioning.output.captions import Caption
from captioning.output.results import CaptionedImage, CsvWriter


def make_caption(text, *alternatives):
    words = tuple(text.split())
    attention = np.full((len(words), 64), 1 / 64)
    return Caption(text, words, (0.5,) * len(words), attention, 0.5, tuple(map(make_caption, alternatives)))


def make_result(image, *captions):
    return CaptionedImage(image, None, make_caption(*captions))


@pytest.fixture
def run(tmp_path):
    """What is needed of a run: the index of its checkpoint."""
    folder = tmp_path / "run/checkpoints/best"
    folder.mkdir(parents=True)
    (tmp_path / "run/config.json").touch()
    (folder / "checkpoint").write_text('model_checkpoint_path: "ckpt-1"\n')
    (folder / "ckpt-1.index").write_bytes(b"weights")
    return tmp_path / "run"


@pytest.fixture
def write(tmp_path, run):
    """Writes images with their captions into captions.csv, and returns what was there before."""

    def write(*images, captions=("a dog",), **settings):
        table = CsvWriter(tmp_path / "captions.csv", run, DecodeConfig(captions=len(captions), **settings))
        for image in images:
            table.write(make_result(image, *captions))
        table.close()
        return table.done

    return write


def read(tmp_path):
    with open(tmp_path / "captions.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_writer_has_a_row_for_every_caption(tmp_path, write):
    assert write("a.jpg", captions=("a dog", "a, b")) == set()
    first, second = read(tmp_path)
    expected = {"image": "a.jpg", "rank": "1", "caption": "a dog", "confidence": "0.5000", "log_prob": "-2.079"}
    assert first == {**expected, "finished": "true"}
    assert (second["rank"], second["caption"]) == ("2", "a, b")


def test_csv_writer_continues(tmp_path, write):
    names = ["a.jpg", 'quote".jpg', "new\nline.jpg", os.fsdecode(b"caf\xe9.png"), "ünï.jpg"]
    assert write(*names[:2]) == set()
    assert write(*names[2:]) == set(names[:2])
    assert write() == set(names)
    assert [row["image"] for row in read(tmp_path)] == names


@pytest.mark.parametrize("captions", [("a dog",), ("a dog", "a cat", "a bird")])
def test_csv_writer_cut_off_anywhere_continues_with_whole_images(tmp_path, write, captions):
    images = ["a.jpg", "line\nbreak.jpg", "c.jpg"]
    write(*images, captions=captions)
    path = tmp_path / "captions.csv"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        done = write(captions=captions)
        assert done == set(images[: len(done)]) and content.startswith(path.read_bytes())
        write(*images[len(done) :], captions=captions)
        assert path.read_bytes() == content


def test_csv_writer_is_written_at_once(tmp_path, run):
    path = tmp_path / "new/folder/captions.csv"
    table = CsvWriter(path, run, DecodeConfig())
    table.write(make_result("a.jpg", "a dog"))
    assert path.read_text().splitlines()[1].startswith("a.jpg,1,a dog,"), "it is not closed yet"
    with pytest.raises(InputError, match="another process writes into it"):
        CsvWriter(path, run, DecodeConfig())
    table.close()


def test_csv_writer_never_mixes_settings_or_runs(tmp_path, write, run):
    write("a.jpg")
    content = (tmp_path / "captions.csv").read_bytes()
    with pytest.raises(InputError, match=r"captions\.csv: was made with other settings.*choose another file"):
        write("b.jpg", beam_size=3)
    (run / "checkpoints/best/ckpt-1.index").write_bytes(b"other weights")
    with pytest.raises(InputError, match="was made with other settings"):
        write("b.jpg")
    assert (tmp_path / "captions.csv").read_bytes() == content
    (tmp_path / "captions.csv").unlink()
    assert write("b.jpg", beam_size=3) == set(), "settings without a table are of no table"


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


def test_csv_writer_refuses_a_table_without_its_settings(tmp_path, write):
    write("a.jpg")
    (tmp_path / "captions.csv.settings.json").unlink()
    with pytest.raises(InputError, match="was made by another program"):
        write("b.jpg")
