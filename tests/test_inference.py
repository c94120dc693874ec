import dataclasses
import errno
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import features
import inference
import model
from captioning.cli import InputError
from captioning.config import DecodeConfig
from captioning.decoding import DecodedBatch, decode
from captioning.plots import MAX_GRID_IMAGES, plot_attention
from captioning.quiet_tensorflow import tf
from captioning.special_tokens import END_ID, SPECIAL_TOKENS
from inference import Caption, Captioner, ResultWriter
from tokenizer import Tokenizer


def extract_mean(pixels, training=False):
    """Stands for InceptionV3: the mean brightness of an image, in all its features."""
    mean = tf.reduce_mean(tf.cast(pixels, tf.float32), axis=(1, 2, 3))
    return tf.ones((tf.shape(pixels)[0], 64, 2048)) * mean[:, tf.newaxis, tf.newaxis] / 255


build_once = functools.cache(model.build)  # of one size, so that its decoding is compiled once


def decode_three_words(model, image_features, config):
    """Decodes with the real model, and cuts its captions: an untrained model goes on to 50 words, slow to plot."""
    return DecodedBatch(*(tensor[:, :3] for tensor in decode(model, image_features, config)))


@pytest.fixture
def fast_run(run, monkeypatch):
    """The run, with short captions and without InceptionV3."""
    monkeypatch.setattr(features, "build_feature_extractor", lambda cnn_weights: extract_mean)
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


# Captions.


def test_to_captions_ends_at_end_token():
    tokenizer = Tokenizer((*SPECIAL_TOKENS, "a", "dog"))
    decoded = DecodedBatch(
        tokens=tf.constant([[4, 5, END_ID, 0], [END_ID, 0, 0, 0], [5, 5, 5, 5]]),
        probabilities=tf.reshape(tf.range(12.0), (3, 4)),
        attention=tf.reshape(tf.range(12.0 * 64), (3, 4, 64)),
    )
    captions = inference.to_captions(decoded, tokenizer)
    assert [caption.words for caption in captions] == [("a", "dog"), (), ("dog",) * 4]
    assert [caption.text for caption in captions] == ["a dog", "", "dog dog dog dog"]
    assert [caption.finished for caption in captions] == [True, True, False]
    assert [caption.probabilities for caption in captions] == [(0, 1), (), (8, 9, 10, 11)]
    assert [caption.attention.shape for caption in captions] == [(2, 64), (0, 64), (4, 64)]
    np.testing.assert_array_equal(captions[2].attention, decoded.attention[2])


def test_to_captions_of_characters_has_no_spaces_between_them():
    decoded = DecodedBatch(tf.constant([[4, 5, 6, END_ID]]), tf.ones((1, 4)), tf.ones((1, 4, 64)))
    for words, text in (("spaces", "一 只 dog"), ("characters", "一只 dog")):
        (caption,) = inference.to_captions(decoded, Tokenizer((*SPECIAL_TOKENS, "一", "只", "dog"), words))
        assert (caption.text, caption.words) == (text, ("一", "只", "dog"))


def test_decode_captions_uses_the_beam_of_its_settings(small_model, tokenizer, rng, monkeypatch):
    image_features = tf.constant(rng.uniform(size=(3, 64, 2048)), tf.float32)
    greedy = inference.decode_captions(small_model, tokenizer, image_features)
    one_beam = inference.decode_captions(small_model, tokenizer, image_features, DecodeConfig(beam_size=1))
    assert [caption.text for caption in greedy] == [caption.text for caption in one_beam]
    calls = []

    def beam_search(model, image_features, beam_size, length_penalty, max_words):
        calls.append((beam_size, length_penalty, max_words))
        return DecodedBatch(*[tf.zeros((0, 0))] * 3)

    monkeypatch.setattr("captioning.decoding.beam_search", beam_search)
    inference.decode_captions(small_model, tokenizer, image_features, DecodeConfig(3, 0.5, 7))
    assert calls == [(3, 0.5, 7)]


# The captioner.


def test_captioner_caption_equals_caption_of_its_features(captioner, photo):
    caption = captioner.caption(photo)
    pixels = features.load_image(photo)[np.newaxis]
    for other in (
        captioner.caption_pixels(pixels)[0],
        captioner.caption_features(captioner.extract_features(pixels))[0],
    ):
        assert (caption.words, caption.probabilities) == (other.words, other.probabilities)
        np.testing.assert_array_equal(caption.attention, other.attention)
    assert len(caption.words) == len(caption.probabilities) == len(caption.attention) > 0
    with pytest.raises(InputError, match=r"none\.jpg: no such image"):
        captioner.caption("none.jpg")


def test_captioner_rounds_features_as_the_cache(captioner, photo):
    values = captioner.extract_features(features.load_image(photo)[np.newaxis])
    assert values.dtype == tf.float16 and values.shape == (1, 64, 2048)


def test_captioner_extractor_prefers_weights_in_the_run_folder(run, monkeypatch):
    used = []
    monkeypatch.setattr(features, "build_feature_extractor", used.append)
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


def test_caption_and_plot_names_the_plot_after_the_image(captioner, photo, tmp_path):
    caption, plot_path = inference.caption_and_plot(captioner, photo, tmp_path / "plots")
    assert plot_path == tmp_path / "plots/photo_attention.png" and plot_path.stat().st_size > 1000
    assert caption.text == captioner.caption(photo).text
    _, plot_path = inference.caption_and_plot(captioner, photo, tmp_path, "other", "svg")
    assert plot_path == tmp_path / "other_attention.svg" and plot_path.stat().st_size > 1000


def test_caption_and_plot_writes_the_text_as_the_tokenizer_joins_it(captioner, photo, tmp_path, monkeypatch):
    caption = Caption("一只", ("一", "只"), (0.5, 0.5), np.full((2, 64), 1 / 64), True)
    monkeypatch.setattr(captioner, "caption", lambda path: caption)
    figures = []
    monkeypatch.setattr(inference, "plot_attention", lambda *args: figures.append(plot_attention(*args)))
    inference.caption_and_plot(captioner, photo, tmp_path)
    assert [text.get_text() for text in figures[0].texts] == ["一只", "一", "50 %", "只", "50 %"]


def test_caption_and_plot_reads_what_can_be_read_of_the_image(captioner, tmp_path, capsys):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path, exif=b"Exif\x00\x00damaged")
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])
    _, plot_path = inference.caption_and_plot(captioner, path, tmp_path)
    assert plot_path.stat().st_size > 1000
    assert capsys.readouterr().err.count("cut.jpg: truncated") == 1, "it is read twice"


def test_caption_and_plot_returns_the_caption_without_a_plot(captioner, tmp_path, capsys):
    path = tmp_path / ("long" * 62 + ".jpg")  # 252 bytes
    Image.new("RGB", (9, 9)).save(path)
    caption, plot_path = inference.caption_and_plot(captioner, path, tmp_path)
    assert caption.text and plot_path is None
    assert "longlong_attention.png: the plot cannot be written (File name too long)" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_caption_images_continues_without_plots(captioner, photo, tmp_path, capsys, as_json):
    (tmp_path / "file").touch()  # no folder can be made there
    images = [str(photo), str(photo)]
    assert inference.caption_images(captioner, images, tmp_path / "file", ResultWriter(as_json, None)) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == printed.err.count("the plot cannot be written") == 2
    assert "attention: " not in printed.err
    if as_json:
        assert [json.loads(line)["plot"] for line in printed.out.splitlines()] == [None, None]


def fail_to_plot(monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(inference, "plot_attention", fail)


def test_caption_images_ends_if_the_disk_is_full(captioner, photo, tmp_path, monkeypatch):
    fail_to_plot(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        inference.caption_images(captioner, [str(photo)], tmp_path, ResultWriter(False, None))


# The images of the command line.


def test_expand_image_args_lists_images_of_folders_but_not_their_plots(tmp_path):
    for name in ("b.JPG", "a.png", "a_attention.png", "notes.txt", "._b.JPG", "Thumbs.db"):
        (tmp_path / name).touch()
    url, file = "https://example.com/photos/", str(tmp_path / "notes.txt")
    assert inference.expand_image_args([str(tmp_path)]) == [str(tmp_path / "a.png"), str(tmp_path / "b.JPG")]
    assert inference.expand_image_args([url]) == [url]
    assert inference.expand_image_args([file, str(tmp_path)])[:2] == [file, str(tmp_path / "a.png")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: expected a folder with images, found none in it"):
        inference.expand_image_args([str(tmp_path / "empty")])
    with pytest.raises(InputError, match=r"none\.jpg: no such image"):
        inference.expand_image_args(["none.jpg"])


@pytest.mark.parametrize(
    ("url", "name"),
    [("https://example.com/a/dog.jpg?x=1", "dog.jpg"), ("https://example.com/", "image"), ("https://x/..", "image")],
)
def test_download_image_is_limited_and_named_after_the_url(monkeypatch, tmp_path, url, name):
    calls = []

    def download(url, path, **options):
        calls.append((url, path, options))
        return path

    monkeypatch.setattr(inference, "download", download)
    assert inference.is_url(url) and inference.download_image(url, tmp_path) == tmp_path / name
    assert calls == [(url, tmp_path / name, {"quiet": True, "max_bytes": 50_000_000})]


def make_caption():
    return Caption("a dog", ("a", "dog"), (0.123456, 0.5), np.full((2, 64), 1 / 64), True)


def test_result_writer_prints_text_or_json(capsys, photo):
    caption, plot_path = make_caption(), Path("plot.png")
    ResultWriter(False, None).write("label", photo, caption, plot_path, "some text")
    assert capsys.readouterr().out == "some text\n"
    ResultWriter(True, None).write("label", photo, caption, plot_path, "some text", references=("one", "two"))
    assert json.loads(capsys.readouterr().out) == {
        "image": "label",
        "caption": "a dog",
        "words": [{"word": "a", "probability": 0.1235}, {"word": "dog", "probability": 0.5}],
        "plot": "plot.png",
        "references": ["one", "two"],
    }


def test_result_writer_writes_grid_of_the_first_images(capsys, photo, tmp_path):
    writer = ResultWriter(False, tmp_path / "grid.png")
    writer.write_grid()
    assert not (tmp_path / "grid.png").exists(), "there are no images yet"
    for _ in range(MAX_GRID_IMAGES + 1):
        writer.write("label", photo, make_caption(), Path("plot.png"), "")
    assert len(writer.images_and_captions) == MAX_GRID_IMAGES
    del writer.images_and_captions[2:]
    writer.write_grid()
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert "grid.png" in capsys.readouterr().err


def test_caption_images_gives_equal_names_different_plots(captioner, tmp_path, capsys):
    paths = [tmp_path / "a/dog.jpg", tmp_path / "b/dog.jpg"]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (9, 9)).save(path)
    assert inference.caption_images(captioner, [*map(str, paths)], tmp_path / "plots", ResultWriter(False, None)) == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"dog_attention.png", "dog__attention.png"}
    printed = capsys.readouterr()
    assert [line.split("\t")[0] for line in printed.out.splitlines()] == [*map(str, paths)]
    assert printed.err.count("attention: ") == 2


def test_caption_images_continues_after_a_bad_image(captioner, photo, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_text("not an image")
    writer = ResultWriter(False, None)
    assert inference.caption_images(captioner, [str(bad), str(photo)], tmp_path, writer) == 1
    printed = capsys.readouterr()
    assert "photo.jpg\t" in printed.out and f"inference.py: {bad}" in printed.err
    with pytest.raises(InputError, match=r"bad\.jpg: not an image that can be read"):
        inference.caption_images(captioner, [str(bad)], tmp_path, writer)


def test_caption_images_hides_secrets_of_urls(captioner, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "download_image", lambda url, folder: photo)
    urls = ["https://example.com/photo.jpg?key=secret"] * 2
    inference.caption_images(captioner, urls, tmp_path, ResultWriter(False, None))
    assert capsys.readouterr().out.startswith("https://example.com/photo.jpg\t")


# The test images of the run.


def test_caption_test_images_shows_references_and_prediction(captioner, saved_dataset, capsys):
    inference.caption_test_images(captioner, saved_dataset, 2, 0, ResultWriter(False, None))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5 and all(line.startswith("  reference: ") for line in (*lines[1:3], *lines[6:8]))
    assert lines[3].startswith("  predicted: ") and lines[4].startswith("  attention: ")
    test_images = {str(saved_dataset.image_dir / example.image_path) for example in saved_dataset.split("test")}
    assert {lines[0], lines[5]} <= test_images and lines[0] != lines[5]
    assert len(list((captioner.run / "attention").iterdir())) == 2
    inference.caption_test_images(captioner, saved_dataset, 99, None, ResultWriter(True, None))
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {result["image"] for result in results} == test_images and all(len(r["references"]) == 2 for r in results)


def test_caption_test_images_leaves_out_plots_that_cannot_be_written(captioner, saved_dataset, capsys):
    (captioner.run / "attention").touch()
    inference.caption_test_images(captioner, saved_dataset, 1, 0, ResultWriter(False, None))
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("  predicted: ") and "cannot be written" in printed.err


def test_caption_test_images_skips_unreadable_images(captioner, saved_dataset, capsys):
    for example in saved_dataset.split("test"):
        (saved_dataset.image_dir / example.image_path).write_text("not an image")
    inference.caption_test_images(captioner, saved_dataset, 1, 0, ResultWriter(False, None))
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("skipped ")


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


def test_main_captions_a_folder_without_plots_if_none_may_be_written(fast_run, photo, monkeypatch, capsys):
    fail_to_plot(monkeypatch, errno.EACCES)
    folder = photo.parent / "photos"
    folder.mkdir()
    photo.rename(folder / photo.name)
    for name in ("._photo.jpg", "Thumbs.db", "notes.txt"):
        (folder / name).write_text("no image")
    inference.main([str(folder), "--run", str(fast_run), "--json", "--output-dir", str(folder)])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["image"] == str(folder / photo.name) and result["caption"] and result["plot"] is None
    assert f"{folder}/photo_attention.png: the plot cannot be written (Permission denied)" in printed.err


def test_main_captions_test_images_of_the_latest_run(fast_run, saved_dataset, monkeypatch, capsys):
    monkeypatch.chdir(fast_run.parents[1])
    inference.main(["--num-images", "1"])
    out = capsys.readouterr().out
    assert out.count("reference:") == 2 and out.count("predicted:") == 1


def test_main_fails_if_an_image_cannot_be_captioned(fast_run, photo, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("not an image")
    with pytest.raises(InputError, match="1 of 2 images could not be captioned"):
        inference.main([str(bad), str(photo), "--run", str(fast_run), "--output-dir", str(tmp_path)])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the project's own filter
def test_main_limits_the_size_of_images(fast_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", (1100, 1000)).save(tmp_path / "large.png")
    arguments = [str(tmp_path / "large.png"), "--run", str(fast_run), "--output-dir", str(tmp_path)]
    with pytest.raises(InputError, match=r"large\.png: 2 megapixels, expected at most 1; .* --max-megapixels 2"):
        inference.main([*arguments, "--max-megapixels", "1"])
    inference.main([*arguments, "--max-megapixels", "2"])


def test_main_names_no_option_of_other_commands_if_the_cnn_cannot_be_downloaded(run, photo, monkeypatch):
    def fail(**kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(tf.keras.applications, "InceptionV3", fail)
    with pytest.raises(InputError, match=r"cannot be downloaded .*; put the file \S+ into \S+$"):
        inference.main([str(photo), "--run", str(run)])


def test_main_refuses_grid_of_unknown_format(run):
    with pytest.raises(InputError, match=r"--grid all\.gif: expected a file that ends in \.png, \.svg, \.pdf"):
        inference.main(["--run", str(run), "--grid", "all.gif"])
