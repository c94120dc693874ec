"""Data sets of small fields, a few images each in their own form, read with the options that docs/fields.md prints."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.annotation_files import coco, karpathy

import train
from captioning.config.settings import DataConfig
from data_utils import load_dataset

DOCUMENT = (Path(__file__).parents[2] / "docs/fields.md").read_text(encoding="utf-8")
REPORTS = ["The lungs are clear.", "The heart, as before, is large.\nNo effusion."]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes files into the current folder, and reads them with the options of a row of the document."""
    monkeypatch.chdir(tmp_path)

    def load(row, files, commands=""):
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        exec(commands, {})
        (options,) = re.findall(rf"^\| {row}.*\| `(.*)` \|$", DOCUMENT, re.MULTILINE)
        dataset = load_dataset(DataConfig.from_args(train.parse(shlex.split(options))))
        return [(example.image_path, example.split, *example.captions) for example in dataset.examples]

    return load


def table(*rows):
    return "".join(
        ",".join(f'"{cell}"' if "," in cell or "\n" in cell else cell for cell in row) + "\n" for row in rows
    )


def images(folder, *names):
    return {f"{folder}/{name}": "" for name in names}


@pytest.mark.parametrize(("first", "second"), [("airport_1.jpg", "church_2.jpg"), ("1.tif", "10.tif")])
def test_rsicd_and_ucm(load, first, second):
    content = karpathy({first: ["many planes are parked ."], second: ["a church .", "a church ."]})
    examples = load("RSICD", {"dataset_rsicd.json": content} | images("RSICD_images", first, second))
    assert examples == [(first, "val", "many planes are parked ."), (second, "train", "a church .", "a church .")]


def test_r2gen_gives_every_image_of_a_study_its_report(load, capsys):
    names = {"train": ["CXR1/0.png", "CXR1/1.png"], "val": ["CXR2/0.png"], "test": ["CXR3/0.png", "CXR3/1.png"]}
    content = {
        split: [{"id": paths[0][:4], "report": REPORTS[0], "image_path": paths, "split": split}]
        for split, paths in names.items()
    }
    pairs = [(name, split) for split, paths in names.items() for name in paths]
    files = {"annotation.json": content} | images("images", *(name for name, _ in pairs))
    assert load("IU X-Ray, MIMIC-CXR", files) == [(*pair, REPORTS[0]) for pair in pairs]
    note = "fields image_path, report, split; not used: id; 2 objects have several images, each with all captions"
    assert note in capsys.readouterr().err


def test_iu_xray_of_kaggle_is_joined_as_printed(load):
    header = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
    reports = [(uid, "normal", "normal", "Xray Chest", "x", "None.", REPORTS[uid == "8"], "x") for uid in "189"]
    reports.append(("4", "normal", "normal", "Xray Chest", "x", "None.", "", "Normal chest."))
    names = [f"{uid}_IM-{view}.dcm.png" for uid in "1894" for view in (1, 2)]
    files = {
        "indiana_reports.csv": table(header, *reports),
        "indiana_projections.csv": table(("uid", "filename", "projection"), *((n[0], n, "Frontal") for n in names)),
    }
    (commands,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    examples = load("IU X-Ray of Kaggle", files | images("images_normalized", *names), commands)
    splits = {"1": "train", "8": "val", "9": "test"}
    assert [(name, split) for name, split, _ in examples] == [(n, splits[n[0]]) for n in names[:6]], "4 has no findings"
    assert examples[2][2] == REPORTS[1].replace("\n", " ")


def test_roco_of_kaggle(load):
    files = {}
    for split, short in (("train", "train"), ("validation", "val")):
        name = f"PMC1_{short}.jpg"
        rows = (("id", "name", "caption"), ("ROCO_00002", name, " CT scan, axial."))
        files |= {f"{split}/radiology{short}data.csv": table(*rows)} | images(f"{split}/radiology/images", name)
    assert load("ROCO of Kaggle", files) == [
        ("train/radiology/images/PMC1_train.jpg", "train", "CT scan, axial."),
        ("validation/radiology/images/PMC1_val.jpg", "val", "CT scan, axial."),
    ]


def test_roco_captions_name_images_by_their_number(tmp_path):
    names = [f"ROCO_{number:05}" for number in range(4)]
    for name in names:
        (tmp_path / f"{name}.jpg").touch()
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"{name}\t Axial CT (arrow).\n" for name in names))
    examples = load_dataset(DataConfig(annotations=str(path))).examples
    assert [(e.image_path, e.captions) for e in examples] == [(f"{name}.jpg", ("Axial CT (arrow).",)) for name in names]


def test_vizwiz(load):
    files = {}
    for split in ("train", "val"):
        content = coco({f"VizWiz_{split}_0.jpg": ["a can of soda", "Quality issues are too severe"]})
        content["annotations"][1]["is_precanned"] = True
        files |= {f"annotations/{split}.json": content} | images(split, f"VizWiz_{split}_0.jpg")
    assert load("VizWiz", files) == [(f"{s}/VizWiz_{s}_0.jpg", s, "a can of soda") for s in ("train", "val")]


def test_fashion_products_are_named_by_their_ids(load, capsys):
    header = ("id", "gender", "year", "usage", "productDisplayName")
    rows = [(str(i), "Men", "2011", "Casual", f"Turtle Men Shirt {i}") for i in range(10, 15)]
    files = {"styles.csv": table(header, *rows) + "15,Men,2011,Casual,a shirt, blue\n"}
    examples = load("Fashion", files | images("images", *(f"{i}.jpg" for i in range(10, 16))))
    assert [(name, caption) for name, _, caption in examples] == [(f"{row[0]}.jpg", row[-1]) for row in rows]
    assert "6 columns, expected 5" in capsys.readouterr().err


def test_flickr8k_cn_has_words_of_one_character(load, capsys):
    files = {"flickr8kzhc.caption.txt": "".join(f"{i}_a.jpg#zhc#0 一只狗在跑步。\n" for i in range(3))}
    files |= {"flickr8ktrain.txt": "0_a\n1_a\n", "flickr8kval.txt": "2_a\n"}
    examples = load("Flickr8k-CN", files | images("Images", *(f"{i}_a.jpg" for i in range(3))))
    assert [example[:2] for example in examples] == [("0_a.jpg", "train"), ("1_a.jpg", "train"), ("2_a.jpg", "val")]
    assert examples[0][2].startswith("一只狗在跑步") and "--words" not in capsys.readouterr().err
