import csv
import dataclasses
import functools
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import features
import inference
import model
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.decoder.decoding import DecodedBatch, decode
from captioning.images.reading import read_image
from captioning.output.captions import to_captions
from captioning.output.plots import NotebookFigure
from captioning.output.results import JsonWriter, TextWriter
from inference import Captioner


def extract_mean(pixels, training=False):
    """Stands for InceptionV3: the mean brightness of an image, in all its features."""
    mean = tf.reduce_mean(tf.cast(pixels, tf.float32), axis=(1, 2, 3))
    return tf.ones((tf.shape(pixels)[0], 64, 2048)) * mean[:, tf.newaxis, tf.newaxis] / 255


build_once = functools.cache(model.build)  # of one size, so that its decoding is compiled once


def decode_three_words(*arguments, **options):
    """Decodes with the real model, and cuts its captions: an untrained model goes on to 50 words, slow to plot."""
    return DecodedBatch(*(tensor[:, :3] for tensor in decode(*arguments, **options)[:3]))


@pytest.fixture
def fast_run(run, monkeypatch):
    """The run, with short captions and without InceptionV3."""
    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: extract_mean)
    monkeypatch.setattr(model, "build", build_once)
    monkeypatch.setattr(inference, "decode", decode_three_words)
    return run


@pytest.fixture
def captioner(fast_run):
    return Captioner.load(fast_run)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (50, 30), "red").save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Seven images of different brightness, and one that is none, in the middle."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        Image.new("L", (20 + number, 10), 30 * number).save(folder / f"{number}.png")
    (folder / "4.png").write_text("not an image")
    return folder


# The captioner.


def test_captioner_caption_equals_caption_of_its_features(captioner, photo):
    caption = captioner.caption(photo)
    pixels = features.load_image(photo)[np.newaxis]
    image_features = captioner.extract_features(pixels)
    assert image_features.dtype == tf.float16, "rounded as in the cache"
    decoded = decode_three_words(captioner.model, image_features, captioner.decode_config)
    for other in (captioner.caption_pixels(pixels)[0], to_captions(decoded, captioner.tokenizer)[0]):
        assert (caption.words, caption.probabilities) == (other.words, other.probabilities)
        np.testing.assert_array_equal(caption.attention, other.attention)
    assert len(caption.words) == len(caption.probabilities) == len(caption.attention) > 0
    with pytest.raises(InputError, match=r"none\.jpg: no such image"):
        captioner.caption("none.jpg")


def test_captioner_extractor_prefers_weights_in_the_run_folder(run, monkeypatch):
    used = []
    monkeypatch.setattr(features, "build_feature_extractor", lambda cnn_weights, cnn: used.append(cnn_weights))
    assert Captioner.load(run).extractor is None
    (run / "cnn.h5").write_text("weights")
    captioner = Captioner.load(run)
    assert captioner.extractor is None and captioner.extractor is None
    assert used == ["imagenet", str(run / "cnn.h5")], "it is built once"


def test_captioner_extractor_refuses_other_weights(run, captioner):
    (run / "cnn.h5").write_text("other weights")
    config = dataclasses.replace(captioner.config, features={**captioner.config.features, "sha256": "0123"})
    captioner = Captioner(captioner.model, captioner.tokenizer, config, run)
    with pytest.raises(InputError, match="not the weights of the CNN that computed the features"):
        _ = captioner.extractor


def test_captioner_says_that_a_length_penalty_needs_a_beam(fast_run, capsys):
    Captioner.load(fast_run, DecodeConfig(length_penalty=0.5, beam_size=2))
    assert "--length-penalty" not in capsys.readouterr().err
    for config in (DecodeConfig(length_penalty=0.5), DecodeConfig(length_penalty=0.5, choose="consensus")):
        Captioner.load(fast_run, config)
        assert "--length-penalty changes nothing" in capsys.readouterr().err


def test_captioner_caption_takes_an_open_file_and_shows_it_in_notebooks(captioner, photo):
    caption = captioner.caption(io.BytesIO(photo.read_bytes()))
    assert caption.words == captioner.caption(photo).words
    assert read_image(caption.image).size == (50, 30)


@pytest.mark.slow
def test_captioner_caption_batch_equals_single_captions(captioner, photos):
    paths = [path for path in sorted(photos.iterdir()) if path.name != "4.png"]
    captions = captioner.caption_batch(iter(paths), batch_size=3)
    for path, caption in zip(paths, captions, strict=True):
        alone = captioner.caption(path)
        assert caption.text == alone.text and caption.image == path
        np.testing.assert_allclose(caption.probabilities, alone.probabilities, rtol=1e-4)
    of_files = captioner.caption_batch(io.BytesIO(path.read_bytes()) for path in paths)
    assert [caption.text for caption in of_files] == [caption.text for caption in captions]
    assert [caption.image for caption in of_files] == [path.read_bytes() for path in paths], "it can be read again"
    assert captioner.caption_batch([]) == []
    with pytest.raises(InputError, match=r"4\.png: not an image"):
        captioner.caption_batch([paths[0], photos / "4.png"])


@pytest.mark.slow
def test_captioner_with_decoding_keeps_the_weights(captioner, photo):
    extractor = captioner.extractor
    wide = captioner.with_decoding(DecodeConfig(captions=3))
    assert wide.model is captioner.model and wide.extractor is extractor
    assert len(wide.caption(photo).alternatives) == 2 and captioner.caption(photo).alternatives == ()
    assert wide.decode_config.max_words == captioner.decode_config.max_words == captioner.config.train.max_length


@pytest.mark.slow
def test_captioner_draws_the_same_words_alone_and_in_a_batch(captioner, photos):
    sampler = captioner.with_decoding(DecodeConfig(sample=True, captions=2, temperature=1.5))
    paths = [path for path in sorted(photos.iterdir()) if path.name != "4.png"]
    batch = [[c.words for c in (each, *each.alternatives)] for each in sampler.caption_batch(paths)]
    alone = [[c.words for c in (each, *each.alternatives)] for each in map(sampler.caption, paths)]
    assert batch == alone
    other = captioner.with_decoding(DecodeConfig(sample=True, captions=2, temperature=1.5, decode_seed=1))
    assert [[c.words for c in (each, *each.alternatives)] for each in map(other.caption, paths)] != alone


def test_caption_and_plot_names_the_plot_after_the_image(captioner, photo, tmp_path, capsys):
    caption, plot_path = inference.caption_and_plot(captioner, photo, tmp_path / "plots")
    assert plot_path == tmp_path / "plots/photo_attention.png" and plot_path.stat().st_size > 1000
    assert caption.text == captioner.caption(photo).text
    long_name = photo.rename(tmp_path / ("long" * 62 + ".jpg"))  # 252 bytes
    caption, plot_path = inference.caption_and_plot(captioner, long_name, tmp_path)
    assert caption.text and plot_path is None
    assert "longlong_attention.png: the plot cannot be written (File name too long)" in capsys.readouterr().err


# Many images.


@pytest.mark.slow
def test_caption_stream_yields_every_image_in_order(captioner, photos):
    paths = [str(path) for path in sorted(photos.iterdir())]
    for batch_size in (1, 8):  # 1: there are batches without any image that can be read
        results = list(inference.caption_stream(captioner, paths, batch_size))
        for path, result in zip(paths, results, strict=True):
            if path.endswith("4.png"):
                assert isinstance(result, InputError) and "4.png: not an image" in str(result)
            else:
                alone = captioner.caption(path)
                assert (result.name, result.caption.text) == (path, alone.text)
                np.testing.assert_allclose(result.caption.probabilities, alone.probabilities, rtol=1e-4)
                assert result.image.size[0] == 480, "a small copy"


def test_caption_stream_reads_only_some_images_ahead(captioner, photos, monkeypatch):
    opened = []

    def open_image(path, min_jpeg_side):
        opened.append(path)
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(inference, "open_image", open_image)
    stream = inference.caption_stream(captioner, (f"{i}.jpg" for i in range(1000)), batch_size=4)
    for _ in range(10):
        next(stream)
    stream.close()
    assert 10 <= len(opened) <= 10 + 4 + 2 * 4


def test_caption_images_continues_after_a_bad_image(captioner, photos, capsys):
    paths = [str(path) for path in sorted(photos.iterdir())]
    assert inference.caption_images(captioner, paths, [TextWriter()]) == 1
    printed = capsys.readouterr()
    assert [line.split("\t")[0] for line in printed.out.splitlines()] == [path for path in paths if "4.png" not in path]
    assert f"inference.py: {paths[4]}: not an image" in printed.err and "8/8" in printed.err
    with pytest.raises(InputError, match=r"4\.png: not an image that can be read"):
        inference.caption_images(captioner, [paths[4]], [TextWriter()])


def test_caption_images_writes_plots_where_they_are_wanted(captioner, photos, tmp_path, capsys):
    paths = [str(photos / "0.png"), str(photos / "1.png")]
    plots = {paths[0]: tmp_path / "plots/a.png", paths[1]: tmp_path / "plots/b.svg"}
    assert inference.caption_images(captioner, paths, [TextWriter()], plots) == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"a.png", "b.svg"}
    assert capsys.readouterr().err.count("attention: ") == 2
    photo = tmp_path / "plots/a.png"
    photo.write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"--output-dir \S+a\.png: expected a new file, or an earlier one"):
        inference.caption_images(captioner, paths, [TextWriter()], plots)
    capsys.readouterr()
    (tmp_path / "file").touch()  # no folder can be made there
    assert (
        inference.caption_images(captioner, paths, [TextWriter()], dict.fromkeys(paths, tmp_path / "file/a.png")) == 0
    )
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == printed.err.count("the plot cannot be written") == 2


def test_caption_images_hides_secrets_of_urls(captioner, photo, monkeypatch, capsys):
    monkeypatch.setattr(inference, "open_image", lambda url, min_jpeg_side: Image.open(photo))
    urls = ["https://example.com/photo.jpg?key=secret1", "https://example.com/photo.jpg?key=secret2"]
    inference.caption_images(captioner, urls, [TextWriter()])
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert all(re.fullmatch(r"https://example\.com/photo\.jpg#[0-9a-f]{16}", name) for name in names)
    assert len(set(names)) == 2, "a table that is resumed tells them apart"


# The test images of the run.


def test_caption_test_images_shows_references_and_prediction(captioner, saved_dataset, capsys):
    inference.caption_test_images(captioner, saved_dataset, 2, 0, [TextWriter()])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5 and all(line.startswith("  reference: ") for line in (*lines[1:3], *lines[6:8]))
    assert lines[3].startswith("  predicted: ") and lines[4].startswith("  attention: ")
    test_images = {str(saved_dataset.image_dir / example.image_path) for example in saved_dataset.split("test")}
    assert {lines[0], lines[5]} <= test_images and lines[0] != lines[5]
    assert len(list((captioner.run / "attention").iterdir())) == 2
    inference.caption_test_images(captioner, saved_dataset, 99, None, [JsonWriter()], image_format=None)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {result["image"] for result in results} == test_images and all(len(r["references"]) == 2 for r in results)
    assert all(result["plot"] is None for result in results)


def test_caption_test_images_counts_unreadable_ones(captioner, saved_dataset, capsys):
    (saved_dataset.image_dir / saved_dataset.split("test")[0].image_path).write_text("not an image")
    assert inference.caption_test_images(captioner, saved_dataset, 99, 0, [TextWriter()]) == 1
    assert "inference.py: " in capsys.readouterr().err


# The command.


def test_main_captions_images_of_the_command_line(fast_run, photo, tmp_path, capsys):
    arguments = ["--run", str(fast_run), "--output-dir", str(tmp_path / "plots"), "--beam-size", "2"]
    inference.main([str(photo), *arguments])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1, "one caption, and nothing else, on standard output"
    assert f"run: {fast_run}" in printed.err
    inference.main(
        [str(photo), *arguments, "--json", "--format", "svg", "--grid", str(tmp_path / "all.png"), "--quiet"]
    )
    printed = capsys.readouterr()
    assert json.loads(printed.out)["image"] == str(photo) and printed.err == ""
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"photo_attention.png", "photo_attention.svg"}
    assert (tmp_path / "all.png").stat().st_size > 1000


@pytest.mark.slow
def test_main_captions_a_folder_with_plots_only_if_they_are_wanted(fast_run, photos, tmp_path, capsys):
    (photos / "4.png").unlink()
    arguments = ["--run", str(fast_run), "--output-dir", str(tmp_path / "plots")]
    inference.main([str(photos), *arguments])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 7 and not (tmp_path / "plots").exists()
    assert "--output-dir is for plots, and there are none; of several images, --plots asks for them" in printed.err
    inference.main([str(photos), *arguments, "--plots"])
    assert len(list((tmp_path / "plots").iterdir())) == 7
    inference.main([str(photos / "0.png"), "--run", str(fast_run), "--output-dir", str(tmp_path / "no"), "--no-plots"])
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_main_continues_a_table(fast_run, photos, tmp_path, capsys, monkeypatch):
    table = tmp_path / "captions.csv"
    arguments = ["--run", str(fast_run), "--csv", str(table), "--cnn-batch-size", "2"]
    (tmp_path / "list.txt").write_text(f"{photos}/1.png\n{photos}/0.png\nnone.png\n")
    with pytest.raises(InputError, match="1 of 3 images could not be captioned"):
        inference.main(["--from", str(tmp_path / "list.txt"), *arguments])
    assert "none.png: no such image" in capsys.readouterr().err
    with pytest.raises(InputError, match="1 of 8 images could not be captioned"):
        inference.main([str(photos), *arguments])
    printed = capsys.readouterr()
    assert printed.out == "" and f"{table}: 2 of 8 images are in it already" in printed.err
    with open(table, newline="") as file:
        names = [Path(row["image"]).name for row in csv.DictReader(file)]
    assert names == ["1.png", "0.png", "2.png", "3.png", "5.png", "6.png", "7.png"]
    with monkeypatch.context() as patch:
        patch.setattr(inference, "open_image", lambda *_: Image.new("RGB", (8, 8)))
        for _ in range(2):  # an address whose end is not shown is found again
            options = [*arguments[:2], "--csv", str(tmp_path / "addresses.csv"), "--no-plots"]
            inference.main(["https://a.com/b.jpg?key=1", *options])
        assert "addresses.csv: 1 of 1 images are in it already" in capsys.readouterr().err
    (photos / "4.png").unlink()
    monkeypatch.setattr(inference, "caption_stream", lambda captioner, images, *_: iter(images))
    inference.main([str(photos), *arguments])  # there is nothing to do
    assert f"{table}: 7 of 7 images are in it already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "--beam-size", "3"], "expected only one"),
        (["--temperature", "2"], "--temperature, --top-p and --decode-seed are for --sample"),
        (["--min-words", "9", "--max-words", "5"], "--min-words 9: expected at most --max-words, which is 5"),
    ],
)
def test_main_refuses_decoding_options_that_contradict(photo, arguments, message):
    with pytest.raises(InputError, match=message):
        inference.main([str(photo), "--run", "none", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "captions.csv"], "--csv is for the images of the command line"),
        (["photo.jpg", "--seed", "1"], "--num-images and --seed choose test images; omit them, or the images"),
        (["--grid", "all.gif"], r"--grid all\.gif: expected a file that ends in \.png, \.svg, \.pdf"),
        (["--grid", "photo.png"], r"--grid photo\.png: expected a new file, or an earlier one of its kind"),
        (["--grid", "plot.png", "plot.png"], r"--grid plot\.png: is read by this command"),
    ],
)
def test_parse_refuses_outputs_that_cannot_be(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.png")
    NotebookFigure().save("plot.png")
    with pytest.raises(InputError, match=message):
        inference.parse(arguments)


def test_main_captions_test_images_of_the_latest_run(fast_run, saved_dataset, monkeypatch, capsys):
    monkeypatch.chdir(fast_run.parents[1])
    inference.main(["--num-images", "1"])
    out = capsys.readouterr().out
    assert out.count("reference:") == 2 and out.count("predicted:") == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the project's own filter
def test_main_limits_the_size_of_images(fast_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", (1100, 1000)).save(tmp_path / "large.png")
    arguments = [str(tmp_path / "large.png"), "--run", str(fast_run), "--output-dir", str(tmp_path)]
    with pytest.raises(InputError, match=r"large\.png: 2 megapixels, expected at most 1; .* --max-megapixels 2"):
        inference.main([*arguments, "--max-megapixels", "1"])
    inference.main([*arguments, "--max-megapixels", "2"])
