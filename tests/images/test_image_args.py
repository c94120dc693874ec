import io
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from captioning.base.cli import InputError
from captioning.images import image_args
from captioning.images.image_args import (
    download_image,
    expand_image_args,
    find_images,
    is_url,
    open_image,
    plot_paths,
    read_list,
    shown_name,
)


@pytest.fixture
def photos(tmp_path):
    """A folder with images, and what lies beside images."""
    folder = tmp_path / "photos"
    others = ("a_attention.png", "call_attention.jpg", "notes.txt", "._b.JPG", "Thumbs.db", ".thumbs/a.jpg")
    for name in ("b.JPG", "a.png", "c/d/e.jpg", *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# Folders and lists.


def test_expand_image_args_lists_images_of_folders_but_not_their_plots(photos, capsys):
    assert expand_image_args([str(photos)]) == [
        str(photos / name) for name in ("a.png", "b.JPG", "c/d/e.jpg", "call_attention.jpg")
    ]
    url, file = "https://example.com/photos/", str(photos / "notes.txt")
    assert expand_image_args([url]) == [url]
    assert expand_image_args([file, str(photos)])[:2] == [file, str(photos / "a.png")]
    assert expand_image_args([str(photos / ".thumbs")]) == [str(photos / ".thumbs/a.jpg")], "named itself"
    (photos / "empty").mkdir()
    with pytest.raises(InputError, match="empty: expected a folder with images, found none in it"):
        expand_image_args([str(photos / "empty")])
    assert expand_image_args([str(photos / "empty"), file], missing_ok=True) == [file]
    assert "empty: expected a folder with images, found none in it" in capsys.readouterr().err


def test_expand_image_args_refuses_missing_files_unless_told(tmp_path):
    with pytest.raises(InputError, match=r"none\.jpg: no such image"):
        expand_image_args(["none.jpg"])
    assert expand_image_args(["none.jpg"], missing_ok=True) == ["none.jpg"]


def test_read_list_reads_lines(tmp_path, monkeypatch):
    content = b"\xef\xbb\xbf a b.jpg \r\n\nhttps://example.com/c.jpg\ncaf\xe9.png"
    expected = ["a b.jpg", "https://example.com/c.jpg", os.fsdecode(b"caf\xe9.png")]
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    assert read_list(str(path)) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8", "strict"))
    assert read_list("-") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a.jpg\r\nü b.png\n".encode("utf-16"), ["a.jpg", "ü b.png"]),
        (b"# photos\n'a b.jpg'\n \"c.jpg\" # c\n'd.jpg\ne#1.jpg # e\n", ["a b.jpg", "c.jpg", "'d.jpg", "e#1.jpg"]),
        (b"./a b.jpg\0./c\nd.jpg\0# e.jpg\0", ["./a b.jpg", "./c\nd.jpg", "# e.jpg"]),
    ],
)
def test_read_list_takes_what_other_programs_write(tmp_path, monkeypatch, content, expected, capsys):
    monkeypatch.chdir(tmp_path)
    Path("list").write_bytes(content)
    assert read_list("list") == expected
    has_comment = content.startswith(b"#")
    assert ("--from list: 1 lines that begin with # are left out" in capsys.readouterr().err) == has_comment
    for name in ("# photos", "'a b.jpg'", "e#1.jpg # e"):
        Path(name).touch()
    assert ({"# photos", "'a b.jpg'", "e#1.jpg # e"} <= set(read_list("list"))) == has_comment, "files of these names"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found none"),
        (b" \n#\n", "found none"),
        (b"a.jpg\n\0\1\2", "found a binary file"),
        ("a.jpg".encode("utf-16-le"), "found a binary file"),
        (None, "No such file"),
    ],
)
def test_read_list_refuses_what_is_no_list(tmp_path, content, message):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"--from \S+list\.txt: expected a text file with an image on .*{message}"):
        read_list(str(path))
    with pytest.raises(InputError, match="expected a text file"):
        read_list(str(tmp_path))


def test_find_images_takes_each_image_once(photos, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{photos}/a.png\nnone.jpg\n{photos}/c\n{photos}/a.png\n")
    found = find_images([str(photos / "b.JPG"), str(photos / "a.png")], str(tmp_path / "list.txt"))
    assert found == [str(photos / "b.JPG"), str(photos / "a.png"), "none.jpg", str(photos / "c/d/e.jpg")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "folders.txt").write_text(str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"--from \S+folders\.txt: there are no images in its folders"):
        find_images([], str(tmp_path / "folders.txt"))
    assert "empty: expected a folder with images" in (logged := capsys.readouterr().err)
    assert logged.startswith("2 images are given more than once, and captioned once\n")
    assert find_images([], None) == [] and capsys.readouterr().err == ""


def test_find_images_knows_a_file_by_its_path(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    Path("a%b ü.png").touch()
    Path("#1.png").touch()
    found = find_images(["a.png", str(photos / "a.png"), "c/../a.png", (photos / "a%b ü.png").as_uri()], None)
    assert found == ["a.png", str(photos / "a%b ü.png")]
    assert expand_image_args([f"FILE:{photos}/#1.png"]) == [f"{photos}/#1.png"]
    assert capsys.readouterr().err == "2 images are given more than once, and captioned once\n"


# Addresses.


def test_image_of_an_address_that_cannot_be_read_has_its_address_in_the_message(tmp_path, monkeypatch):
    def download(url, path, **_):
        path.write_text("no image")
        return path

    monkeypatch.setattr(image_args, "download", download)
    url = "https://example.com/7/image.jpg?key=secret"
    with pytest.raises(InputError, match=re.escape(f"{shown_name(url)}: not an image")):
        open_image(url)


@pytest.mark.parametrize("url", ["https://example.com:99999/a.jpg?key=secret", "https:///a.jpg?key=secret"])
def test_query_of_what_is_no_address_stays_secret(url):
    with pytest.raises(InputError, match=r"a\.jpg cannot be downloaded from https:") as error:
        open_image(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("image", ["http://[::1/a.jpg", "http://ex\u2100mple.com/a.jpg", f"http://{'a' * 64}.b/c.jpg"])
def test_what_is_no_address_is_an_image_that_cannot_be_read(image, tmp_path, capsys):
    with pytest.raises(InputError, match=r"cannot be downloaded .*\)$"):
        open_image(image)
    assert shown_name(image).startswith("http://") and plot_paths([image], tmp_path, "png")
    assert expand_image_args([image, "a" * 300], missing_ok=True) == [image, "a" * 300]


@pytest.mark.parametrize(
    ("url", "name"),
    [("https://example.com/a/dog.jpg?x=1", "dog.jpg"), ("https://example.com/", "image"), ("https://x/..", "image")],
)
def test_download_image_is_limited_and_named_after_the_url(monkeypatch, tmp_path, url, name):
    calls = []

    def download(url, path, **options):
        calls.append((url, path, options))
        return path

    monkeypatch.setattr(image_args, "download", download)
    assert is_url(url) and download_image(url, tmp_path) == tmp_path / name
    assert calls == [(url, tmp_path / name, {"quiet": True, "max_bytes": 50_000_000, "is_temporary": True})]


def test_open_image_reads_paths_and_addresses(monkeypatch, tmp_path):
    folders = []

    def download(url, path, **options):
        folders.append(path.parent)
        Image.new("RGB", (5, 4), "blue").save(path)
        return path

    monkeypatch.setattr(image_args, "download", download)
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    assert open_image(str(tmp_path / "a.png")).size == (3, 2)
    assert open_image("https://example.com/b.png").size == (5, 4)
    assert len(folders) == 1 and not folders[0].exists(), "nothing is left of the download"


# The names of plots.


def test_plot_paths_gives_every_image_its_own_file():
    images = ["a/dog.jpg", "b/dog.jpg", "dog_2.jpg", "c/Dog.png", "https://x.org/cat.jpg?v=1", "https://x.org/", "a/"]
    paths = plot_paths(images, Path("plots"), "svg")
    assert list(paths) == images
    assert [path.as_posix() for path in paths.values()] == [
        f"plots/{name}_attention.svg" for name in ("dog", "dog_2", "dog_2_2", "Dog_3", "cat", "image", "a")
    ]
