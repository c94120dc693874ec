"""The records of image files, from which a cache knows that an image has changed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioning.base.files import file_sha256
from captioning.images import image_records
from captioning.images.image_records import NUM_FIRST_BYTES, RECORDS_FILE, ImageRecords, find_copies

ROOT = Path(__file__).parents[2]
NAMES = ["a.jpg", "b.jpg", "c.jpg"]
HOUR = 3600 * 10**9


@pytest.fixture
def folders(tmp_path):
    """A folder of three images, and one for a cache; no image has a record."""
    image_dir, cache = tmp_path / "images", tmp_path / "cache"
    image_dir.mkdir()
    cache.mkdir()
    for name in NAMES:
        (image_dir / name).write_text(f"the image {name}")
    return image_dir, cache


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed."""
    names = []

    def hash_file(path):
        names.append(Path(path).name)
        return file_sha256(path)

    monkeypatch.setattr(image_records, "file_sha256", hash_file)
    return names


def shift_time(path, difference):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + difference))


def open_records(folders):
    image_dir, cache = folders
    return ImageRecords(cache, image_dir)


def find_changed(folders, names=NAMES):
    return open_records(folders).find_changed(names)


def read_lines(folders):
    return [json.loads(line) for line in (folders[1] / RECORDS_FILE).read_text().splitlines() if line]


def record(folders, names=NAMES):
    records = open_records(folders)
    for name in names:
        records.note(name)
        records.add(name)


def test_add_writes_a_line_per_image(folders):
    assert find_changed(folders) == NAMES, "an image without a record has changed"
    record(folders)
    stat = (folders[0] / "b.jpg").stat()
    sha256 = file_sha256(folders[0] / "b.jpg")
    assert read_lines(folders)[1] == ["b.jpg", stat.st_size, stat.st_mtime_ns, sha256, None]


def test_an_image_that_could_not_be_noted_has_changed(folders, monkeypatch):
    records = open_records(folders)
    with monkeypatch.context() as patch:
        patch.setattr(image_records, "file_sha256", lambda _: os.stat("/none"))
        assert not records.note("a.jpg")
    records.add("a.jpg")
    assert "a.jpg" in find_changed(folders)


def test_checksum_of_the_features_outlives_a_new_time_of_the_image(folders):
    records = open_records(folders)
    records.note("a.jpg")
    records.add("a.jpg", features_crc32=7)
    shift_time(folders[0] / "a.jpg", HOUR)
    assert find_changed(folders, ["a.jpg"]) == []
    assert len(read_lines(folders)) == 2 and open_records(folders).checksum("a.jpg") == 7
    assert open_records(folders).checksum("b.jpg") is None


def test_find_changed_compares_the_content_of_files_of_another_time_only(folders, hashed):
    record(folders)
    hashed.clear()
    assert find_changed(folders) == [] and hashed == [], "size and time agree"
    shift_time(folders[0] / "b.jpg", HOUR)
    assert find_changed(folders) == [] and hashed == ["b.jpg"]
    assert find_changed(folders) == [] and hashed == ["b.jpg"], "the new time is recorded"


def test_find_changed_finds_other_content(folders):
    record(folders)
    (folders[0] / "a.jpg").write_text("the image A.jpg")  # as long as before
    (folders[0] / "c.jpg").write_text("a longer image than before")
    shift_time(folders[0] / "c.jpg", -9 * HOUR)  # older than its record
    for _ in range(2):
        assert sorted(find_changed(folders)) == ["a.jpg", "c.jpg"], "until new features are recorded"
    record(folders, ["a.jpg", "c.jpg"])
    assert find_changed(folders) == []


def test_find_changed_keeps_what_is_gone_but_not_what_cannot_be_read(folders):
    record(folders)
    (folders[0] / "a.jpg").unlink()
    assert find_changed(folders) == find_changed(folders, ["\0"]) == []
    (folders[0] / "a.jpg").mkdir()
    assert find_changed(folders) == ["a.jpg"]


def test_find_changed_needs_no_right_to_write(folders, monkeypatch, capsys):
    def fail(self, records):
        raise PermissionError(errno.EACCES, "Permission denied")

    record(folders)
    shift_time(folders[0] / "b.jpg", HOUR)
    monkeypatch.setattr(ImageRecords, "_append", fail)
    assert find_changed(folders) == []
    assert "images.jsonl cannot be written (Permission denied)" in capsys.readouterr().err


def test_note_keeps_the_file_that_was_read(folders):
    record(folders)
    records = open_records(folders)
    records.note("a.jpg")
    (folders[0] / "a.jpg").write_text("an image that came while the features were computed")
    shift_time(folders[0] / "a.jpg", -9 * HOUR)
    records.add("a.jpg")
    assert find_changed(folders) == ["a.jpg"]


@pytest.mark.parametrize("damage", [b"{", b'"text"', b'["b.jpg", 1]', b'[["b.jpg"], 1, 2, "3"]', b"\xff\xfe"])
def test_damaged_lines_are_ignored(folders, damage):
    record(folders)
    path = folders[1] / RECORDS_FILE
    _, first, _, last = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, damage, last, last[:20]]))  # the last one was cut off
    assert find_changed(folders) == ["b.jpg"]
    record(folders, ["b.jpg"])
    assert find_changed(folders) == []
    *_, cut, added = path.read_bytes().splitlines()
    assert cut == last[:20] and json.loads(added)[0] == "b.jpg", "a line of its own"


def test_names_need_not_be_unicode(folders):
    name = os.fsdecode(b"caf\xe9.png")
    (folders[0] / name).write_text("the image")
    record(folders, [name])
    assert read_lines(folders)[0][0] == name and find_changed(folders, [name]) == []
    (folders[0] / name).write_text("another image")
    assert find_changed(folders, [name]) == [name]


def test_processes_append_to_the_same_file(folders):
    code = (
        "import pathlib, sys\n"
        "from captioning.images.image_records import ImageRecord, ImageRecords\n"
        "records = ImageRecords(pathlib.Path(sys.argv[1]), pathlib.Path('images'))\n"
        "for number in range(500):\n"
        "    records._append({f'{sys.argv[2]}_{number}.jpg': ImageRecord(number, number, sys.argv[2] * 64)})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, folders[1], letter], cwd=ROOT) for letter in "ab"]
    assert [process.wait(30) for process in processes] == [0, 0]
    lines = read_lines(folders)
    expected = {
        (f"{letter}_{number}.jpg", number, number, letter * 64, None) for letter in "ab" for number in range(500)
    }
    assert len(lines) == 1000 and {tuple(line) for line in lines} == expected


def test_find_copies_reads_only_what_begins_alike(tmp_path, hashed):
    begin = "x" * NUM_FIRST_BYTES
    contents = {"a": "same", "b": "", "c": begin + "1", "d": "other size", "e": "same", "f": "", "g": begin + "2"}
    contents |= {"h": "same", "i": "else", "j": begin + "1"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "folder").mkdir()
    assert find_copies(tmp_path, [*contents, "none", "folder", "\x00"]) == [["a", "e", "h"], ["c", "j"]]
    assert sorted(hashed) == ["a", "c", "e", "g", "h", "j"]
