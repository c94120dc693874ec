"""`train.py --dry-run`, and the log line that tells how long a training takes."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.runs import run_training
from PIL import Image

import train
from captioning.base.cli import InputError
from captioning.base.files import write_json
from captioning.config.settings import FeatureConfig
from captioning.data import datasets
from captioning.training import plan, training_log
from captioning.training.checkpoints import TrainProgress
from data_utils import CaptionDataset

SIZES = ["--embedding-dim", "8", "--units", "16", "--batch-size", "8"]

pytestmark = pytest.mark.usefixtures("compare_decoders_once")


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """Runs `train.py --dry-run` in an empty folder; returns what it prints, and asserts that it writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(datasets, "download", lambda *_, **__: pytest.fail("something is downloaded"))
    monkeypatch.setattr(datasets, "fetch_archive", lambda *_: pytest.fail("something is downloaded"))

    def list_files():
        return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}

    def run(*arguments):
        before = list_files()
        train.main(["--dry-run", *SIZES, *arguments])
        assert list_files() == before
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_plan_of_the_users_files_times_some_steps(dry_run):
    Path("photos").mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(f"photos/{number}.png")
    Path("captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,a dog\n{i}.png,a cat\n" for i in range(10)))
    lines = dry_run("--annotations", "captions.csv", "--images", "photos", "--epochs", "3").splitlines()
    assert lines[:3] == [
        "data      train       8 images       16 captions",
        "data      val         1 images        2 captions",
        "data      test        1 images        2 captions",
    ]
    weights = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert lines[3] == f"missing   {weights}, into {Path.cwd()}/keras/models/ (88 MB)"
    assert lines[4].startswith(
        "features  10 of 10 images to compute, into features/photos/ (3 MB, about 1 s on two CPU"
    )
    assert lines[5].startswith("training  2 steps an epoch, ") and "for 3 epochs at most" in lines[5]
    assert lines[6].startswith("disk      92 MB needed, ") and len(lines) == 7


@pytest.fixture
def coco():
    """COCO's annotations of 12 images with five captions each, of which seven are there."""
    names = [f"COCO_train2014_{number:012}.jpg" for number in range(12)]
    rows = [{"image_id": number, "caption": f"a dog {n}"} for number in range(12) for n in range(5)]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    write_json("data/coco/annotations/captions_train2014.json", {"images": images, "annotations": rows})
    Path("data/coco/train2014").mkdir()
    for name in names[:7]:
        Path("data/coco/train2014", name).write_text(name)
    return [f"train2014/{name}" for name in names]


@pytest.mark.slow
def test_plan_counts_images_and_features_that_are_there(dry_run, coco, monkeypatch):
    timed = []
    monkeypatch.setattr(plan, "measure_rate", lambda step, batches, state: timed.append(batches.shapes) or 2.0)
    monkeypatch.setattr(plan, "choose_compiler", lambda state, config, _: dataclasses.replace(config, jit="on"))
    dataset = CaptionDataset("coco", Path("data/coco"), ())
    cache, _ = plan.open_features(dataset, FeatureConfig())
    write_json(cache.folder / "features.json", cache.manifest)
    for image_path in coco[:4]:
        cache.write(image_path, np.zeros(cache.shape))
    Path("runs/coco").mkdir(parents=True)  # of a run with five epochs
    Path("runs/coco/history.csv").write_text(
        ",".join(training_log.COLUMNS) + "".join(f"\n{epoch}{',1' * 6}" for epoch in range(1, 6))
    )
    printed = dry_run()
    assert "train      10 images       50 captions\n" in printed
    assert "missing   5 of 12 images, one by one, into data/coco/ (1 MB)\n" in printed
    assert "features  8 of 12 images to compute, into features/coco/ (3 MB, " in printed
    assert timed[0].lengths, "the step is timed that would be trained with"
    assert "training  7 steps an epoch, 2 captions/s: 25 s an epoch, 7 min for 15 epochs at most, besides" in printed
    with pytest.raises(InputError, match=r"features/coco holds features made with dtype float16, expected float32"):
        dry_run("--dtype", "float32")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ("", ("about 6,000 images;", "6,000 of 6,000 images, one by one, into data/coco/ (1.0 GB)", "  2.8 GB needed")),
        ("--num-captions 150000", ("about 30,000 ", " train2014.zip, into data/coco/ (13.5 GB)", "  27.7 GB needed")),
        ("--dataset coco2017 --official-val --num-captions 100", ("about 20 ", " 1 of 1 images", "  0.5 GB needed")),
        ("--dataset shapes", ("2,200 images of shapes, which are drawn, into data/shapes/ (14 MB)", "  0.6 GB needed")),
        ("--dataset flickr8k", ("Flickr8k_Dataset.zip, into data/flickr8k/\n", " 8,000 of 8,000", "at least 2.1 GB")),
        (
            "--dataset flickr30k",
            ("caption_datasets.zip", "features  known once the captions are there", "at least 0 MB"),
        ),
    ],
)
def test_plan_without_captions_tells_what_is_known(dry_run, monkeypatch, arguments, texts):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10e9))
    printed = dry_run("--cnn-weights", "random", *arguments.split())
    assert [text for text in texts if text not in printed] == []
    assert "training  known once the captions are there" in printed and "10.0 GB free in" in printed
    assert (": too little" in printed) == ("150000" in arguments)


def test_plan_unpacks_no_run_to_start_from(dry_run):
    with pytest.raises(
        InputError, match=r"--dry-run unpacks nothing: expected a run folder as --start, found run\.zip"
    ):
        dry_run("--start", "run.zip")


def test_duration_is_logged_once_and_only_of_long_epochs(capsys):
    for num_captions, expected in ((1100, ""), (1300, "20 captions/s: 2 min an epoch, 3.6 h for 200 epochs at most")):
        progress = TrainProgress()
        for rate in (0.0, 20.0, 20.0):
            plan.announce_duration(progress, rate, num_captions, 200)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"{expected}, besides validation"] * bool(expected)


@pytest.mark.slow
def test_training_tells_its_duration(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_log, "plot_history", lambda *_: None)
    monkeypatch.setattr(train, "FirstRate", lambda: SimpleNamespace(measure=lambda done: done / 64))
    run_training(tmp_path / "run", data, epochs=1)
    printed = capsys.readouterr().err
    assert printed.count("captions/s: ") == 1 and "for 1 epochs at most, besides validation" in printed
