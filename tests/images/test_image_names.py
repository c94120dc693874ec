"""Names of images as people write them, and the files they mean."""

import os
import sys
import unicodedata
from pathlib import Path

import pytest

from captioning.images import image_names
from captioning.images.image_names import clean_name, find_clash, find_images, walk_files


@pytest.mark.parametrize(
    "name",
    [
        "photos/a.jpg",
        "./photos/a.jpg",
        "/photos/a.jpg",
        "../../photos/a.jpg",
        r"photos\a.jpg",
        r".\photos\a.jpg",
        r"C:\photos\a.jpg",
        "c:/photos//a.jpg ",
    ],
)
def test_clean_name_leads_into_the_folder(name):
    assert clean_name(name) == "photos/a.jpg"


def test_clean_name_of_nothing():
    assert clean_name("") == clean_name("../..") == clean_name("C:\\") == ""


@pytest.fixture
def folder(tmp_path):
    """A folder of images, beside a file that is none of them."""
    (tmp_path / "secret.jpg").touch()
    names = [
        "a.jpg",
        "Märchen.JPG",
        "sub/b.png",
        "sub/c.jpg",
        "other/c.jpg",
        "d.jpg",
        "d.png",
        "._e.jpg",
        "x.y.jpg",
        "n.jpg",
        "n.txt",
    ]
    for name in names:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", "a.jpg"),
        ("A.JPG", "a.jpg"),
        ("a", "a.jpg"),
        ("x.y", "x.y.jpg"),
        ("content/drive/photos/a.jpg", "a.jpg"),
        ("old/sub/B.PNG", "sub/b.png"),
        ("märchen.jpg", "Märchen.JPG"),
        (unicodedata.normalize("NFD", "Märchen.JPG"), "Märchen.JPG"),
        ("b.png", "sub/b.png"),
        ("b", "sub/b.png"),
        ("sub/c", "sub/c.jpg"),
        ("c.jpg", None),  # of two folders
        ("d", None),  # of two formats
        ("e.jpg", None),  # only a Mac's ._e.jpg
        ("other/b.png", None),  # that of another folder
        ("n", "n.jpg"),  # not n.txt
        ("secret.jpg", None),  # outside the folder
        ("a.png", None),
        ("z" * 300, None),
        ("a\x00.jpg", None),
    ],
)
def test_find_images(folder, name, expected):
    paths, missing = find_images(folder, [name])
    assert paths == {name: expected or name} and missing == ([] if expected else [name])


def test_find_images_takes_names_as_the_folder_has_them(folder, monkeypatch):
    def is_file(path):  # as macOS and Windows see it
        return str(path).casefold() in {str(each).casefold() for each in folder.rglob("*")}

    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listdir(str(path).replace("Sub", "sub")))
    monkeypatch.setattr(image_names, "IGNORES_CASE", True)
    monkeypatch.setattr(Path, "is_file", is_file)
    found = {
        "A.JPG": "a.jpg",
        "a.jpg": "a.jpg",
        "sub/B.png": "sub/b.png",
        "Sub/b.png": "sub/b.png",
        "märchen.jpg": "Märchen.JPG",
    }
    assert find_images(folder, list(found)) == (found, [])


def test_find_images_walks_only_if_a_name_is_not_exact(folder, monkeypatch):
    monkeypatch.setattr("os.walk", None)
    assert find_images(folder, ["photos/sub/b.png"])[0] == {"photos/sub/b.png": "sub/b.png"}


@pytest.mark.parametrize(
    ("names", "is_clash"),
    [
        (["a.jpg", "photos/A.jpg", "content/Photos/a.jpg", "a"], False),
        (["train/a.jpg", "val/a.jpg"], True),
        (["train/a.jpg", "a.jpg", "val/a"], True),
        (["x/train/a.jpg", "rain/a.jpg"], True),
    ],
)
def test_find_clash(names, is_clash):
    clash = find_clash(dict.fromkeys(names, "a.jpg"))
    assert clash == ((names[0], names[-1]) if is_clash else None)
    assert find_clash({name: name for name in names}) is None


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_walk_files_follows_links_once(tmp_path):
    for name in ("z/x.jpg", "elsewhere/w.jpg", "photos/a/y.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for link, target in (("photos/0", "photos/a"), ("photos/a/up", "photos"), ("photos/w", "elsewhere")):
        (tmp_path / link).symlink_to(tmp_path / target)
    assert walk_files(tmp_path / "photos") == ["a/y.jpg", "w/w.jpg"]
