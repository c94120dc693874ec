"""Images of all kinds, as `features.load_image` gives them to the CNN."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

import features
import inference
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.images.reading import read_image, set_max_megapixels
from captioning.output.captions import Caption


def test_load_image_gives_the_pixels_of_the_cnn(tmp_path):
    row = np.linspace(30, 220, 40).astype(np.uint8)  # dark on the left and bright on the right
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    Image.fromarray(np.broadcast_to(row, (30, 40)).copy()).save(tmp_path / "a.jpg", exif=exif)
    for pixels, size in (
        (features.load_image(tmp_path / "a.jpg"), 299),
        (features.load_image(tmp_path / "a.jpg", 64), 64),
    ):
        assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
        assert pixels[:, :10].mean() > pixels[:, -10:].mean() + 50


# Large JPEGs, which are decoded at a part of their size.


def photo(mode="RGB", size=(2000, 1500)):
    """An image with details of all sizes, as photographs have them."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", size, "gray")
    for share in (300, 100, 30, 10, 3):  # larger details are stronger
        noise = rng.integers(0, 256, (size[1] // share, size[0] // share, 3), np.uint8)
        image = Image.blend(image, Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR), 0.4)
    return image.convert(mode)


def encode(image, image_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def large_jpeg():
    return encode(photo())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_load_image_decodes_large_jpegs_at_a_part_of_their_size(mode):
    content = encode(photo(mode))
    scaled, full = features.load_image(content), features.to_pixels(read_image(content))
    assert 0 < np.abs(scaled.astype(int) - full).mean() < 1.5


@pytest.mark.parametrize(
    ("size", "scaled"),
    [
        ((500, 375), (500, 375)),
        ((1195, 1300), (1195, 1300)),
        ((1196, 1301), (598, 651)),
        ((2391, 3000), (1196, 1500)),
        ((2392, 3001), (598, 751)),
        ((4784, 9000), (598, 1125)),
    ],
)
@pytest.mark.parametrize("image_format", ["JPEG", "MPO"])
def test_read_image_keeps_twice_the_pixels_of_the_cnn(size, scaled, image_format):
    frames = {"save_all": True, "append_images": [Image.new("L", (9, 9))]} if image_format == "MPO" else {}
    content = encode(Image.new("L", size), image_format, **frames)
    assert Image.open(io.BytesIO(content)).format == image_format
    assert read_image(content, 598).size == scaled
    assert read_image(content).size == size


def test_read_image_scales_progressive_and_turned_jpegs(large_jpeg):
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side is up
    expected = read_image(large_jpeg, 598)
    progressive, turned = encode(photo(), progressive=True), encode(photo(), exif=exif)
    assert read_image(progressive, 598) == expected
    assert read_image(turned, 598) == expected.transpose(Image.Transpose.ROTATE_270)


@pytest.mark.parametrize("progressive", [False, True])
def test_read_image_decodes_truncated_jpegs_in_full(progressive, capsys):
    content = encode(photo(), progressive=progressive)
    truncated = content[: len(content) * 9 // 10]
    image = read_image(truncated, 598)
    assert image.width == 2000 and 1200 < image.height <= 1500
    np.testing.assert_array_equal(np.asarray(image), np.asarray(read_image(truncated)))
    height = 1500 if progressive else image.height
    assert f"its first {height} of 1500 rows are used" in (err := capsys.readouterr().err) or "finest details" in err


def test_read_image_takes_other_images_as_they_are(large_jpeg):
    image = photo()
    for source in (image, np.asarray(image), encode(image, "BMP"), Image.open(io.BytesIO(large_jpeg))):
        assert read_image(source, 598).size == (2000, 1500)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the project's own filter
def test_read_image_counts_the_megapixels_of_the_whole_image(large_jpeg, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # to be restored
    set_max_megapixels(2)
    with pytest.raises(InputError, match="3 megapixels, expected at most 2"):
        read_image(large_jpeg, 598)


# Training and captioning.


def test_captioner_reads_images_as_for_the_training(
    small_model, tokenizer, run_config, large_jpeg, tmp_path, monkeypatch
):
    """All ways to the CNN give it the same pixels."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(large_jpeg)
    seen = []

    def extract(pixels, training=False):
        seen.append(tf.numpy_function(lambda batch: seen.append(batch), [pixels], []))
        return tf.zeros((tf.shape(pixels)[0], 64, 2048))

    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: extract)
    cache = features.open_or_create_cache(tmp_path / "cache", tmp_path, ["photo.jpg"], "imagenet", "float16")
    features.cache_features(cache, tmp_path, ["photo.jpg"], batch_size=4)
    trained = seen[-1]  # (1, 299, 299, 3)
    np.testing.assert_array_equal(trained[0], features.load_image(large_jpeg))

    seen.clear()
    config = dataclasses.replace(run_config, features={**cache.manifest, "folder": "unused"})
    captioner = inference.Captioner(small_model, tokenizer, config, tmp_path)
    monkeypatch.setattr(inference.Captioner, "extract_features", lambda self, pixels: seen.append(pixels))
    monkeypatch.setattr(inference, "decode", lambda *_, **__: None)
    monkeypatch.setattr(inference, "to_captions", lambda *_: [Caption("", (), (), np.zeros((0, 64)))])
    monkeypatch.setattr(inference, "write_plot", lambda *_: True)
    captioner.caption(path)
    captioner.caption(large_jpeg)
    captioner.caption_batch([path])
    list(inference.caption_stream(captioner, [str(path)]))
    inference.caption_and_plot(captioner, path, tmp_path)
    assert len(seen) == 5
    for pixels in seen:
        np.testing.assert_array_equal(pixels, trained)
