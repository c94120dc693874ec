"""The toy dataset: what is drawn, and how it is stored."""

import hashlib
import json

import pytest
from PIL import Image

from captioning.base.cli import InputError
from captioning.data import shapes


def test_draw_dataset_matches_its_annotations(tmp_path):
    annotations = json.loads(shapes.draw_dataset(tmp_path, num_images=12).read_text())
    for row in annotations["images"]:
        with Image.open(tmp_path / row["filepath"] / row["filename"]) as image:
            for shape in row["shapes"]:
                left, top, right, bottom = shape["box"]
                assert 0 <= left < right <= shapes.SIZE and 0 <= top < bottom <= shapes.SIZE
                # The middle of a shape's lower half has its colour, whatever the noun.
                pixel = image.getpixel(((left + right) // 2, (top + 3 * bottom) // 4))
                assert pixel == shapes.COLOURS[shape["colour"]]
        if len(row["shapes"]) == 2:
            first, second = row["shapes"]
            caption = row["sentences"][0]["raw"]
            assert caption.startswith(f"a {first['colour']} {first['noun']}")
            axis = 1 if "above" in caption else 0
            assert first["box"][axis + 2] <= second["box"][axis] + 20, "the relation must be plain to see"
    with pytest.raises(InputError, match="drawn with"):
        shapes.draw_dataset(tmp_path, num_images=16)


def test_draw_dataset_writes_the_same_annotations_in_every_version(tmp_path):
    path = shapes.draw_dataset(tmp_path, num_images=8)
    content = json.loads(path.read_text())
    assert content["settings"] == {"pictures": 8, "seed": 0, "version": 2}
    assert [row["split"] for row in content["images"]] == ["test"] * 2 + ["val"] + ["train"] * 5
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == "35b845f8359bb027", "is shapes.VERSION new?"


def test_main_draws_once_and_prints_the_annotation_file(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--num-images", "8", "--seed", "2"]
    shapes.main(arguments)
    assert capsys.readouterr().out.strip() == str(tmp_path / shapes.ANNOTATIONS)
    images = sorted((tmp_path / "images").iterdir())
    assert len(images) == 8
    images[0].write_text("not drawn again")
    shapes.main(arguments)
    assert images[0].read_text() == "not drawn again"
