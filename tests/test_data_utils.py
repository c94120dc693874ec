"""Datasets: the user's own, and the known ones from a server on this machine."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import re
import shutil
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import data_utils
from captioning import shapes
from captioning.annotations import Example
from captioning.cli import InputError, Verbosity
from captioning.config import DataConfig
from data_utils import CaptionDataset, assign_splits, load_dataset, subsample

EXAMPLES = [Example(f"{i}.jpg", ("a", "b"), i) for i in range(50)]
KARPATHY = [
    {"filepath": "train2014", "filename": "a.jpg", "split": "train", "cocoid": 3, "sentences": [{"raw": "a dog"}]},
    {"filepath": "val2014", "filename": "b.jpg", "split": "test", "cocoid": 7, "sentences": [{"raw": "a cat"}]},
]


# Limiting and splitting.


def test_subsample_takes_images_with_all_their_captions():
    chosen = subsample(EXAMPLES, 21, seed=0)
    assert len(chosen) == 11
    assert chosen == subsample(EXAMPLES, 21, seed=0) != subsample(EXAMPLES, 21, seed=1)
    assert chosen == sorted(chosen, key=EXAMPLES.index), "in the order of the file"


def test_split_and_subsample_do_not_change_between_versions():
    assert [example.image_id for example in subsample(EXAMPLES, 8, seed=3)] == [8, 15, 34, 37]
    split = assign_splits(EXAMPLES, DataConfig(), {})
    assert [example.image_id for example in split if example.split == "val"] == [4, 7, 12, 19, 40]
    assert [example.image_id for example in split if example.split == "test"] == [2, 10, 11, 28, 41]


def test_assign_splits_at_random_is_by_image_and_seeded():
    split = assign_splits(EXAMPLES, DataConfig(), {})
    assert [sum(example.split == name for example in split) for name in ("train", "val", "test")] == [40, 5, 5]
    assert split == assign_splits(EXAMPLES, DataConfig(), {}), "the same seed must give the same split"
    assert split != assign_splits(EXAMPLES, DataConfig(split_seed=1), {})


def test_assign_splits_by_lists(tmp_path):
    for name, rows in (("train", "0.jpg\n1.jpg\n"), ("val", "2.jpg\n")):
        (tmp_path / name).write_text(rows)
    split_files = {"train": tmp_path / "train", "val": tmp_path / "val"}
    split = assign_splits(EXAMPLES, DataConfig(), split_files)
    assert [(e.image_path, e.split) for e in split] == [("0.jpg", "train"), ("1.jpg", "train"), ("2.jpg", "val")]
    (tmp_path / "val").write_text("1.jpg\n")
    with pytest.raises(InputError, match=r"1\.jpg is in the val list and in the train list"):
        assign_splits(EXAMPLES, DataConfig(), split_files)
    with pytest.raises(InputError, match="missing: val"):
        assign_splits(EXAMPLES, DataConfig(), {"train": tmp_path / "train"})


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "list is empty"), (b"\xff\xfe", "cannot read"), (None, "cannot read")]
)
def test_assign_splits_refuses_bad_lists(tmp_path, content, message):
    (tmp_path / "train").write_text("0.jpg\n")
    if content is not None:
        (tmp_path / "val").write_bytes(content)
    with pytest.raises(InputError, match=message):
        assign_splits(EXAMPLES, DataConfig(), {"train": tmp_path / "train", "val": tmp_path / "val"})


def test_assign_splits_by_lists_finds_names_without_folders_and_logs_unknown_ones(tmp_path, capsys):
    examples = [Example(f"photos/{i}.jpg", ("a",), i) for i in range(3)]
    (tmp_path / "train").write_text("\ufeffphotos/0.jpg\nnone.jpg\n", encoding="utf-8")
    (tmp_path / "val").write_text("1.jpg")
    split = assign_splits(examples, DataConfig(), {"train": tmp_path / "train", "val": tmp_path / "val"})
    assert [(e.image_path, e.split) for e in split] == [("photos/0.jpg", "train"), ("photos/1.jpg", "val")]
    assert "1 images without captions are left out, the first: 'none.jpg'" in capsys.readouterr().err


def test_assign_splits_keeps_the_split_of_the_annotations():
    examples = [dataclasses.replace(e, split="train" if e.image_id % 2 else "val") for e in EXAMPLES]
    assert assign_splits(examples, DataConfig(), {}) == examples


@pytest.mark.parametrize("fractions", [{"val_fraction": 0.6, "test_fraction": 0.5}, {"val_fraction": -0.1}])
def test_assign_splits_refuses_impossible_fractions(fractions):
    with pytest.raises(InputError, match="fractions"):
        assign_splits(EXAMPLES, DataConfig(**fractions), {})


def test_assign_splits_refuses_too_few_images():
    with pytest.raises(InputError, match="at least 2 images"):
        assign_splits(EXAMPLES[:1], DataConfig(), {})
    with pytest.raises(InputError, match="3 images are too few"):
        assign_splits(EXAMPLES[:3], DataConfig(val_fraction=0.7), {})


def test_caption_dataset_exclude_and_fingerprint():
    dataset = CaptionDataset("small", Path("images"), tuple(EXAMPLES))
    smaller = dataset.exclude({"0.jpg", "9.jpg"})
    assert {e.image_path for e in dataset.examples} - {e.image_path for e in smaller.examples} == {"0.jpg", "9.jpg"}
    assert smaller.fingerprint != dataset.fingerprint
    assert dataset.fingerprint == "b1cf05f40c449c74", "it must not change between versions"
    elsewhere = dataclasses.replace(dataset, name="other", image_dir=Path("elsewhere"))
    assert elsewhere.fingerprint == dataset.fingerprint, "where the images are does not matter"


# The user's own data.


@pytest.fixture
def user_config(tmp_path):
    """A function that writes an annotation file, and an empty image folder, and returns their settings."""

    def user_config(content, image_dir="images"):
        (tmp_path / image_dir).mkdir()
        annotations = tmp_path / "annotations"
        annotations.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return DataConfig(annotations=str(annotations), images=str(tmp_path / image_dir))

    return user_config


def test_load_dataset_of_the_user(user_config, tmp_path):
    config = user_config("image,caption\n" + "".join(f"{i}.jpg,a dog\n" for i in range(10)))
    dataset = load_dataset(config)
    assert (dataset.name, len(dataset.split("train")), len(dataset.split("val"))) == ("images", 8, 1)
    without_test = load_dataset(dataclasses.replace(config, test_fraction=0))
    with pytest.raises(InputError, match=r"the test split has no images \(found: train 9, val 1, test 0\)"):
        without_test.split("test")
    assert dataset.fingerprint != without_test.fingerprint
    with pytest.raises(InputError, match="needs --images"):
        load_dataset(dataclasses.replace(config, images=None))
    assert load_dataset(dataclasses.replace(config, images=None), with_images=False).examples == dataset.examples
    with pytest.raises(InputError, match="no such image folder"):
        load_dataset(dataclasses.replace(config, images=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": "photos"}, "--images needs --annotations"),
        ({"dataset": None}, "expected --dataset or --annotations"),
    ],
)
def test_load_dataset_refuses_settings_that_do_not_fit(settings, message):
    with pytest.raises(InputError, match=message):
        load_dataset(DataConfig(**settings))


def test_load_dataset_uses_flickr8k_lists_beside_the_annotations(user_config, tmp_path):
    config = user_config("image,caption\na.jpg,a\nb.jpg,b\nc.jpg,c\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("c.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("a.jpg\n")
    assert [(e.image_path, e.split) for e in load_dataset(config).examples] == [("a.jpg", "val"), ("c.jpg", "train")]


def test_load_dataset_refuses_lists_of_other_images(user_config, tmp_path):
    config = user_config("image,caption\na.jpg,a\n")
    (tmp_path / "list").write_text("x.jpg\n")
    lists = {"train_list": str(tmp_path / "list"), "val_list": str(tmp_path / "list")}
    with pytest.raises(InputError, match="in the val list and in the train list"):
        load_dataset(dataclasses.replace(config, **lists))
    (tmp_path / "other").write_text("y.jpg\n")
    with pytest.raises(InputError, match="none of its images is in the split lists"):
        load_dataset(dataclasses.replace(config, **lists | {"val_list": str(tmp_path / "other")}))


def test_load_dataset_of_karpathy_with_images_in_one_folder(user_config):
    config = user_config({"images": KARPATHY})
    assert [e.image_path for e in load_dataset(config).examples] == ["a.jpg", "b.jpg"]
    (Path(config.images) / "train2014").mkdir()
    assert load_dataset(config).examples[0].image_path == "train2014/a.jpg"


def test_load_dataset_refuses_names_that_clash_without_their_folders(user_config):
    same_name = [image | {"filename": "a.jpg"} for image in KARPATHY]
    with pytest.raises(InputError, match="without them its names clash"):
        load_dataset(user_config({"images": same_name}))


def test_main_prints_the_splits_and_an_example(user_config, capsys, monkeypatch):
    monkeypatch.setattr(Verbosity, "quiet", False)  # which --quiet changes
    config = user_config("image,caption\n" + "".join(f"{i}.jpg,a dog\n" for i in range(10)))
    data_utils.main(["--annotations", config.annotations, "--images", config.images, "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        [split, size, "images", size, "captions"] for split, size in (("train", "8"), ("val", "1"), ("test", "1"))
    ]
    assert re.fullmatch(re.escape(config.images) + r"/\d\.jpg:", lines[3]) and lines[4:] == ["  a dog"]


# Known datasets.


@dataclasses.dataclass
class HttpServer:
    """A folder that is served over HTTP, and the paths that have been requested."""

    folder: Path
    url: str
    requests: list[str]

    def serve_zip(self, name, members):
        """Writes an archive into the folder, members given by name, and returns its length and MD5."""
        with zipfile.ZipFile(self.folder / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        content = (self.folder / name).read_bytes()
        return len(content), hashlib.md5(content).hexdigest()


@pytest.fixture
def http_server(tmp_path):
    folder, requests = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield HttpServer(folder, f"http://127.0.0.1:{httpd.server_port}", requests)
        httpd.shutdown()


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def coco(http_server, tmp_path, monkeypatch):
    """A server with 12 images of COCO: their annotations as an archive, the images as files. Also its settings."""
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012}.jpg"} for i in range(12)]
    annotations = [
        {"image_id": i, "id": 10 * i + n, "caption": f"a dog number {n}"} for i in range(12) for n in range(5)
    ]
    length, md5 = http_server.serve_zip(
        "annotations.zip",
        {
            "annotations/captions_train2014.json": json.dumps({"images": images, "annotations": annotations}),
            "annotations/instances_train2014.json": "{}",
        },
    )
    (http_server.folder / "train2014").mkdir()
    for image in images:
        (http_server.folder / "train2014" / image["file_name"]).write_bytes(jpeg("red"))
    archive = data_utils.COCO_CAPTIONS._replace(url=f"{http_server.url}/annotations.zip", num_bytes=length, md5=md5)
    monkeypatch.setattr(data_utils, "COCO_CAPTIONS", archive)
    monkeypatch.setattr(data_utils, "COCO_URL", http_server.url)
    http_server.config = DataConfig(data_dir=str(tmp_path / "data"), num_captions=25)
    return http_server


def test_load_dataset_of_coco_downloads_only_the_images_of_the_subset(coco, tmp_path):
    dataset = load_dataset(coco.config)
    assert len(dataset.examples) == 5
    assert all((dataset.image_dir / e.image_path).stat().st_size for e in dataset.examples)
    assert len(coco.requests) == 1 + 5, "one archive and five images"
    assert not (tmp_path / "data/coco/annotations_trainval2014.zip").exists(), "the archive's space is freed"
    assert load_dataset(coco.config) == dataset
    assert len(coco.requests) == 6, "a second run downloads nothing"


def test_load_dataset_of_coco_without_images_downloads_only_the_captions(coco):
    assert len(load_dataset(coco.config, with_images=False).examples) == 5
    assert coco.requests == ["/annotations.zip"]


def test_load_dataset_of_coco_logs_sizes_and_checks_the_disk(coco, monkeypatch, capsys):
    monkeypatch.setattr(data_utils, "COCO_IMAGE_BYTES", 1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4.5e9))
    with pytest.raises(InputError, match=r"needs 5.0 GB in .*coco, found 4.5 GB free; use a smaller --num-captions"):
        load_dataset(coco.config)
    assert coco.requests == ["/annotations.zip"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5.5e9))
    load_dataset(coco.config)
    printed = capsys.readouterr().err
    assert "downloading annotations_trainval2014.zip, 1 MB, into" in printed
    assert "0 of 5 images are in" in printed and "downloading 5 one by one (about 5.0 GB)" in printed


def test_load_dataset_of_coco_uses_and_keeps_an_archive_of_the_user(coco, tmp_path):
    archive = tmp_path / "data/coco/annotations_trainval2014.zip"
    archive.parent.mkdir(parents=True)
    (coco.folder / "annotations.zip").rename(archive)
    load_dataset(dataclasses.replace(coco.config, num_captions=5))
    assert "/annotations.zip" not in coco.requests
    assert archive.exists()


def test_load_dataset_of_all_of_coco_downloads_the_archive(coco, monkeypatch):
    files = {f"train2014/{path.name}": path.read_bytes() for path in (coco.folder / "train2014").iterdir()}
    coco.serve_zip("train2014.zip", files)
    archive = data_utils.COCO_IMAGES._replace(url=f"{coco.url}/train2014.zip", num_bytes=None, md5=None)
    monkeypatch.setattr(data_utils, "COCO_IMAGES", archive)
    monkeypatch.setattr(data_utils, "ARCHIVE_THRESHOLD", 10)
    dataset = load_dataset(dataclasses.replace(coco.config, num_captions=0))
    assert len(dataset.examples) == 12 and all((dataset.image_dir / e.image_path).exists() for e in dataset.examples)
    assert coco.requests == ["/annotations.zip", "/train2014.zip"]


def test_load_dataset_of_flickr8k(http_server, tmp_path, monkeypatch):
    rows = "".join(f"{name}.jpg#{n}\ta dog\n" for name in "abc" for n in range(5)) + "d.jpg.1#0\ta ghost\n"
    lists = {
        f"Flickr_8k.{name}Images.txt": f"{image}.jpg\n"
        for name, image in zip(("train", "dev", "test"), "abc", strict=True)
    }
    http_server.serve_zip("text.zip", {"Flickr8k.token.txt": rows, **lists})
    images = {f"Flicker8k_Dataset/{name}.jpg": jpeg("blue") for name in "abc"}
    http_server.serve_zip("images.zip", {**images, "__MACOSX/Flicker8k_Dataset/._a.jpg": "x"})
    for name, file in (("FLICKR8K_TEXT", "text.zip"), ("FLICKR8K_IMAGES", "images.zip")):
        archive = getattr(data_utils, name)
        monkeypatch.setattr(data_utils, name, archive._replace(url=f"{http_server.url}/{file}"))
    config = DataConfig("flickr8k", data_dir=str(tmp_path / "data"))
    dataset = load_dataset(config)
    splits = [(e.image_path, e.split) for e in dataset.examples]
    assert splits == [("a.jpg", "train"), ("b.jpg", "val"), ("c.jpg", "test")]
    assert all((dataset.image_dir / e.image_path).exists() for e in dataset.examples)
    load_dataset(config)
    assert sorted(http_server.requests) == ["/images.zip", "/text.zip"]


def test_load_dataset_of_shapes_draws_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_dataset", functools.partial(shapes.draw_dataset, num_images=12))
    dataset = load_dataset(DataConfig("shapes", data_dir=str(tmp_path)))
    assert (dataset.name, len(dataset.examples), len(dataset.split("test"))) == ("shapes", 12, 3)
    assert all((dataset.image_dir / e.image_path).exists() for e in dataset.examples)
