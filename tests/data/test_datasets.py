"""Where datasets come from: the known ones, from a server on this machine, and the user's own files."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import shutil
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from captioning.base.cli import InputError
from captioning.config.settings import DataConfig
from captioning.data import datasets, shapes
from data_utils import load_dataset

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


def replace_archive(monkeypatch, name, url, num_bytes=None, md5=None):
    """Replaces the address of one of COCO's archives, and what is known of it."""
    archive = datasets.COCO_ARCHIVES[name]._replace(url=url, num_bytes=num_bytes, md5=md5)
    monkeypatch.setitem(datasets.COCO_ARCHIVES, name, archive)


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
    replace_archive(monkeypatch, "annotations_trainval2014", f"{http_server.url}/annotations.zip", length, md5)
    monkeypatch.setattr(datasets, "COCO_URL", http_server.url)
    http_server.config = DataConfig(data_dir=str(tmp_path / "data"), num_captions=25)
    return http_server


def test_load_dataset_of_coco_downloads_only_the_images_of_the_subset(coco, tmp_path):
    assert len(load_dataset(coco.config, with_images=False).examples) == 5
    assert coco.requests == ["/annotations.zip"]
    dataset = load_dataset(coco.config)
    assert len(dataset.examples) == 5
    assert all((dataset.image_dir / e.image_path).stat().st_size for e in dataset.examples)
    assert len(coco.requests) == 1 + 5, "one archive and five images"
    assert not (tmp_path / "data/coco/annotations_trainval2014.zip").exists(), "the archive's space is freed"
    assert load_dataset(coco.config) == dataset
    assert len(coco.requests) == 6, "a second run downloads nothing"


@pytest.mark.usefixtures("all_options")
def test_load_dataset_of_coco_logs_sizes_and_checks_the_disk(coco, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "COCO_IMAGE_BYTES", 5e8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2.2e9))
    with pytest.raises(InputError, match=r"needs 2.5 GB in .*coco, found 2.2 GB free; .* fewer --num-captions"):
        load_dataset(coco.config)
    assert coco.requests == ["/annotations.zip"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2.6e9))
    load_dataset(coco.config)
    printed = capsys.readouterr().err
    assert "downloading annotations_trainval2014.zip, 1 MB, into" in printed
    assert "0 of 5 images are in" in printed and "downloading 5 one by one (about 2.5 GB)" in printed


def test_load_dataset_of_all_of_coco_downloads_the_archive(coco, monkeypatch):
    files = {f"train2014/{path.name}": path.read_bytes() for path in (coco.folder / "train2014").iterdir()}
    coco.serve_zip("train2014.zip", files)
    replace_archive(monkeypatch, "train2014", f"{coco.url}/train2014.zip")
    dataset = load_dataset(dataclasses.replace(coco.config, num_captions=0))
    assert len(dataset.examples) == 12 and all((dataset.image_dir / e.image_path).exists() for e in dataset.examples)
    assert coco.requests == ["/annotations.zip", "/train2014.zip"]


def test_archive_of_coco_that_is_here_is_used_for_a_subset(coco, monkeypatch):
    files = {f"train2014/{path.name}": path.read_bytes() for path in (coco.folder / "train2014").iterdir()}
    num_bytes, md5 = coco.serve_zip("train2014.zip", files)
    replace_archive(monkeypatch, "train2014", f"{coco.url}/train2014.zip", 10**9, md5)
    folder = Path(coco.config.data_dir, "coco")
    folder.mkdir(parents=True)
    part = folder / "train2014.zip.part"
    part.write_bytes(bytes(num_bytes))
    source = datasets.Coco(folder)
    (missing,) = source.find_missing_images(list(files) * 1000)
    assert missing.num_bytes == missing.archive_bytes == 10**9 - num_bytes, "what has been received takes no more disk"
    assert missing.disk_bytes == 82_783 * datasets.COCO_IMAGE_BYTES, "all images are unpacked"
    shutil.copy(coco.folder / "train2014.zip", folder)
    assert len(load_dataset(coco.config).examples) == 5 and coco.requests == ["/annotations.zip"]
    assert len(list((folder / "train2014").iterdir())) == 5, "and no others are unpacked"


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
        archive = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, archive._replace(url=f"{http_server.url}/{file}"))
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


# COCO's other files, and Flickr30k.


@pytest.fixture
def official_coco(coco, monkeypatch):
    """The same server, with 12 official validation images, of 2014 and of 2017."""
    for year, prefix in ((2014, "COCO_{}2014_"), (2017, "")):
        members = {}
        for number, split in enumerate(("train", "val")):
            names = [f"{prefix.format(split)}{100 * number + i:012}.jpg" for i in range(12)]
            images = [{"id": 100 * number + i, "file_name": name} for i, name in enumerate(names)]
            rows = [{"image_id": image["id"], "caption": f"a dog {n}"} for image in images for n in range(5)]
            members[f"annotations/captions_{split}{year}.json"] = json.dumps({"images": images, "annotations": rows})
            (coco.folder / f"{split}{year}").mkdir(exist_ok=True)
            for name in names:
                (coco.folder / f"{split}{year}" / name).write_bytes(jpeg("green"))
        length, md5 = coco.serve_zip(f"annotations_trainval{year}.zip", members)
        name = f"annotations_trainval{year}"
        replace_archive(monkeypatch, name, f"{coco.url}/{name}.zip", length, md5)
    return coco


def sizes(dataset):
    return [sum(example.split == split for example in dataset.examples) for split in ("train", "val", "test")]


@pytest.mark.parametrize(("name", "year"), [("coco", 2014), ("coco2017", 2017)])
def test_load_dataset_with_official_val(official_coco, name, year):
    config = dataclasses.replace(official_coco.config, dataset=name, official_val=True, num_captions=0)
    dataset = load_dataset(config)
    assert sizes(dataset) == [12, 6, 6]
    for example in dataset.examples:
        folder = f"{'train' if example.split == 'train' else 'val'}{year}"
        assert example.image_path.startswith(f"{folder}/") and (dataset.image_dir / example.image_path).exists()
    assert sorted(e.image_id for e in dataset.examples)[-2:] == [110, 111], "COCO's ids"
    assert len(official_coco.requests) == 1 + 24
    subset = load_dataset(dataclasses.replace(config, num_captions=50))
    assert sizes(subset) == [8, 1, 1], "the sizes of a random split of 50 captions"
    at_random = load_dataset(dataclasses.replace(official_coco.config, dataset=name, num_captions=None))
    assert (at_random.name, sizes(at_random)) == (name, [10, 1, 1]), "by default"


def test_load_dataset_of_flickr30k_downloads_the_captions_and_asks_for_the_images(http_server, tmp_path, monkeypatch):
    content = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}]}
    content["images"].append(content["images"][0] | {"filename": "b.jpg", "split": "val"})
    http_server.serve_zip("captions.zip", {"dataset_flickr30k.json": json.dumps(content), "dataset_coco.json": "{}"})
    archive = datasets.KARPATHY_SPLITS._replace(url=f"{http_server.url}/captions.zip")
    monkeypatch.setattr(datasets, "KARPATHY_SPLITS", archive)
    config = DataConfig("flickr30k", data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"given out on request only: .* into .*flickr30k/flickr30k-images/"):
        load_dataset(config)
    assert http_server.requests == ["/captions.zip"]
    (tmp_path / "flickr30k/flickr30k_images").mkdir()
    (tmp_path / "flickr30k/flickr30k_images/a.jpg").touch()
    dataset = load_dataset(config)
    assert (dataset.name, dataset.image_dir.name, sizes(dataset)) == ("flickr30k", "flickr30k_images", [1, 1, 0])


def test_load_dataset_of_flickr30k_takes_the_captions_that_are_there(tmp_path):
    folder = tmp_path / "flickr30k"
    (folder / "Images").mkdir(parents=True)
    (folder / "Images/a.jpg").touch()
    lines = [f"{name}.jpg| {n}| A dog ." for name in "abc" for n in range(5)]
    (folder / "results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(lines))
    assert sizes(load_dataset(DataConfig("flickr30k", data_dir=str(tmp_path)))) == [1, 1, 1]


# Several files of the user.


@pytest.fixture
def user_files(tmp_path, monkeypatch):
    """An annotation file and a folder with its images for every split, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val", "test"):
        folder = Path("data") / f"{split}_images"
        folder.mkdir(parents=True)
        names = [f"{split}{i}.jpg" for i in range(4)]
        for name in names:
            (folder / name).touch()
        Path(f"{split}.csv").write_text("image,caption\n" + "".join(f"{name},a dog\n" for name in names))


TRAIN = {"annotations": "train.csv", "images": "data/train_images"}
VAL = {"val_annotations": "val.csv", "val_images": "data/val_images"}
TEST = {"test_annotations": "test.csv", "test_images": "data/test_images"}


@pytest.mark.usefixtures("user_files")
def test_annotations_of_each_split():
    dataset = load_dataset(DataConfig(**TRAIN, **VAL, **TEST))
    assert sizes(dataset) == [4, 4, 4] and dataset.drawn_splits == ()
    assert (dataset.name, dataset.image_dir) == ("train_images", Path("data"))
    assert all((dataset.image_dir / example.image_path).exists() for example in dataset.examples)
    assert dataset.split("val")[0].image_path == "val_images/val0.jpg"
    assert [example.image_id for example in dataset.examples] == [0, 1, 2, 3] * 3, "in each file"
    assert sizes(load_dataset(DataConfig(**TRAIN, **VAL))) == [4, 4, 0]
    without_val = load_dataset(DataConfig(**TRAIN, **TEST))
    assert sizes(without_val) == [3, 1, 4] and without_val.drawn_splits == ("train", "val"), "val is taken from train"


@pytest.mark.usefixtures("user_files")
def test_ids_are_those_of_the_file_of_their_split(capsys):
    for split, ids in (("train", [7, 8, 9, 5]), ("val", [8, 7, 5, 6]), ("test", [3, 3, 4, 5])):
        rows = [{"filename": f"{split}{i}.jpg", "cocoid": image_id} for i, image_id in enumerate(ids)]
        rows = [row | {"split": split, "sentences": [{"raw": "a dog"}]} for row in rows]
        Path(f"{split}.csv").write_text(json.dumps({"images": rows}))
    dataset = load_dataset(DataConfig(**TRAIN, **VAL, **TEST))
    assert [example.image_id for example in dataset.examples] == [7, 8, 9, 5, 8, 7, 5, 6, 0, 1, 2, 3]
    assert "test.csv: several images have the same id; the images are numbered anew" in capsys.readouterr().err


@pytest.mark.usefixtures("user_files")
def test_images_of_all_splits_in_one_folder():
    dataset = load_dataset(DataConfig(annotations="train.csv", val_annotations="val.csv", images="data"))
    assert sizes(dataset) == [4, 4, 0] and dataset.image_dir == Path("data")
    assert dataset.examples[0].image_path == "train_images/train0.jpg"


@pytest.mark.usefixtures("user_files")
def test_linked_folders_stay_inside_the_image_folder():
    Path("link").symlink_to("data")
    linked = {"images": "link/train_images", "val_images": "link/val_images"}
    dataset = load_dataset(DataConfig(**TRAIN | VAL | linked))
    assert dataset.examples[0].image_path == "train_images/train0.jpg"
    with pytest.raises(InputError, match=r"train\.csv: .*train0\.jpg is also in the annotations of another split"):
        load_dataset(DataConfig(**TRAIN, val_annotations="train.csv", val_images="link/train_images"))


@pytest.mark.usefixtures("user_files")
def test_a_file_with_its_own_split_is_refused_for_one_split():
    row = {"sentences": [{"raw": "a dog"}]}
    rows = [row | {"filename": f"train{i}.jpg", "split": split} for i, split in enumerate(("train", "val"))]
    Path("train.csv").write_text(json.dumps({"images": rows}))
    with pytest.raises(InputError, match=r"expected images of the train split, found train1\.jpg of the val split"):
        load_dataset(DataConfig(**TRAIN, **VAL))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("train", "annotations contain only the train split; splitting at random"),
        ("test", "annotations contain no validation images; taking some of the training images"),
    ],
)
@pytest.mark.usefixtures("user_files")
def test_splits_that_the_annotations_lack_are_made(capsys, last, message):
    rows = [f"train{i}.jpg,{split},a dog\n" for i, split in enumerate(("train", "train", "train", last))]
    Path("train.csv").write_text("image,split,caption\n" + "".join(rows))
    assert sizes(load_dataset(DataConfig(**TRAIN))) == [2, 1, 1]
    assert f"split: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": "data"}, "--images needs --annotations"),
        ({"dataset": None}, "expected --dataset or --annotations"),
        ({"annotations": "train.csv", "val_images": "data"}, "--val-images needs --val-annotations"),
        ({"annotations": "none.csv"}, r"none\.csv: no such annotation file"),
        ({"annotations": "train.csv", "official_val": True}, "--official-val is for --dataset coco and coco2017"),
        ({"annotations": "train.csv", "images": "none"}, "none: no such image folder"),
        ({"annotations": "train.csv", "val_annotations": "val.csv", "train_list": "train.csv"}, "found both"),
        (
            {"annotations": "train.csv", "images": "data/val_images"},
            r"none of the 4 images of train\.csv is in it, such as 'train0\.jpg'; name the folder .*--images",
        ),
    ],
)
@pytest.mark.usefixtures("all_options", "user_files")
def test_files_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load_dataset(DataConfig(**settings))


# Names.


def test_names_of_one_file_are_one_image(tmp_path, capsys):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "captions.csv").write_text(
        "image,caption\na.jpg,one\nphotos/A.jpg,two\n./a.jpg,three\nb.jpg,four\nc,five\nnone.jpg,six\n"
    )
    dataset = load_dataset(DataConfig(annotations=str(tmp_path / "captions.csv"), test_fraction=0.0))
    assert {example.image_path: example.captions for example in dataset.examples} == {
        "a.jpg": ("one", "three", "two"),
        "b.jpg": ("four",),
        "c.jpg": ("five",),
        "none.jpg": ("six",),
    }
    logged = capsys.readouterr().err
    assert "1 of 5 images are not in it, such as 'none.jpg'" in logged
    assert "2 images have other names there, such as 'a.jpg' for 'photos/A.jpg'" in logged
    assert "1 images are named in two ways; their captions are put together" in logged
