"""Images of all kinds, as `features.load_image` gives them to the CNN."""

import numpy as np
import pytest
from PIL import Image

import features
from captioning.cli import InputError


def ramp(mode="RGB", size=(40, 30)):
    """A smooth image that is dark on the left and bright on the right."""
    row = np.linspace(30, 220, size[0]).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, size[::-1]).copy()).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "gif"), ("1", "png"), ("LA", "png")],
)
def test_load_image_converts_every_format_to_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    ramp(mode).save(path)
    pixels = features.load_image(path)
    assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)
    assert pixels[:, -50:].mean() > pixels[:, :50].mean() + 50, "left is dark and right is bright"


def test_load_image_makes_transparency_white(tmp_path):
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (features.load_image(tmp_path / "a.png") == 255).all()


def test_load_image_keeps_contrast_of_16_bit_images(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)).save(tmp_path / "a.png")
    pixels = features.load_image(tmp_path / "a.png")
    assert pixels.min() < 20 and 100 < pixels.mean() < 155 and pixels.max() > 235


def test_load_image_applies_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    ramp().save(tmp_path / "a.jpg", exif=exif)
    pixels = features.load_image(tmp_path / "a.jpg")
    assert pixels[:, :50].mean() > pixels[:, -50:].mean() + 50


def test_load_image_reports_unreadable_file_in_one_line(tmp_path):
    ramp().save(tmp_path / "complete.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "complete.jpg").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.png", "none.jpg"):
        with pytest.raises(InputError, match=name) as error:
            features.load_image(tmp_path / name)
        assert "\n" not in str(error.value)
