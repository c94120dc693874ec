"""The commands as a person runs them, from drawn images to a caption, with a small CNN in place of InceptionV3.

tests/config/test_cnns.py has a run with a CNN of Keras.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.quick_commands import quick_commands
from helpers.runs import read_history
from PIL import Image

import evaluate
import features
import inference
import model
import train
from captioning.base.cli import InputError
from captioning.base.files import lock_folder
from captioning.config.settings import RECIPES, DataConfig
from captioning.data import shapes
from data_utils import load_dataset

ROOT = Path(__file__).parents[1]
DATA = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes"]
# Longer captions take longer to decode and to plot.
SIZES = ["--embedding-dim", "8", "--units", "16", "--max-length", "6"]
TRAIN = ["--cnn-weights", "cnn.h5", *SIZES, "--batch-size", "8", "--epochs", "1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_commands():
        yield


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A folder with 16 drawn images, one of them unreadable, and a run trained on them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("work place")  # a space, as people have
        patch.chdir(folder)
        annotations = shapes.draw_dataset("shapes", num_images=16)
        name = json.loads(annotations.read_text())["images"][-1]["filename"]
        (folder / "shapes/images" / name).write_text("not an image")
        Path("cnn.h5").write_text("stands for weights")
        train.main([*DATA, *TRAIN])
        yield folder


def draw_image(path, number):
    """Writes a small image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), (20 * number, 99, 0)).save(path)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty folder, which is the current one, with weights of the CNN beside it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "cnn.h5").write_text("stands for weights")
    return folder


def settings_of(inside):
    return ["--cnn-weights", str(inside.parent / "cnn.h5"), *SIZES]


def test_a_run_that_starts_from_another_needs_fewer_epochs(inside, monkeypatch):
    monkeypatch.setattr(model, "build", model.build.__wrapped__)  # which would share the weights, too
    for name, num_images, seed in (("start", 60, 0), ("new", 16, 1)):
        shapes.draw_dataset(name, num_images=num_images, seed=seed)

    def train_on(name, *options):
        arguments = ["--annotations", f"{name}/dataset_shapes.json", *settings_of(inside), "--batch-size", "8"]
        train.main([*arguments, "--patience", "0", *options])
        return [float(row["val_loss"]) for row in read_history(Path(options[-1]))]

    train_on("start", "--epochs", "5", "--learning-rate", "1e-2", "--run", "runs/start")
    started = train_on("new", "--epochs", "1", "--start", "runs/start", "--run", "runs/started")
    alone = train_on("new", "--epochs", "2", "--learning-rate", "1e-2", "--run", "runs/alone")
    assert started[0] < min(alone)


def test_pipeline_leaves_features_and_a_complete_run(trained_run, capsys):
    cached = sorted((trained_run / "features/shapes/images").iterdir())
    assert len(cached) == 15, "every readable image has its features, the unreadable one has none"
    values = np.load(cached[0], allow_pickle=False)
    assert (values.shape, values.dtype) == ((64, 2048), np.float16)
    run = trained_run / "runs/shapes"
    for name in ("config.json", "vocabulary.json", "history.csv", "loss.png", "cnn.h5"):
        assert (run / name).stat().st_size > 0
    assert json.loads((run / "config.json").read_text())["unreadable_images"] == ["images/shapes_00015.png"]

    features.main([*DATA, "--cnn-weights", "cnn.h5"])
    assert "15 images have their features" in capsys.readouterr().out


def test_a_run_is_resumed_without_an_image_that_can_be_read_now(trained_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained_run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    shutil.copy("shapes/images/shapes_00000.png", "shapes/images/shapes_00015.png")
    train.main([*DATA, *TRAIN, "--epochs", "2"])
    assert len(read_history(Path("runs/shapes"))) == 2
    assert "shapes: 1 images that could not be read at its beginning stay left out" in capsys.readouterr().err


def test_other_settings_are_refused_before_the_data_are_read(trained_run, monkeypatch):
    monkeypatch.setattr(train.data_utils, "load_dataset", None)
    for options in ([], ["--dry-run"]):
        with pytest.raises(InputError, match=r"runs/shapes was trained with units = 16, expected 9; give its settings"):
            train.main([*DATA, *TRAIN, "--units", "9", *options])


def test_beam_search_captions_plots_and_is_scored(trained_run, capsys):
    inference.main(["shapes/images/shapes_00000.png", "--beam-size", "3", "--output-dir", "beam"])
    assert Path("beam/shapes_00000_attention.png").stat().st_size > 1000
    evaluate.main(["--beam-size", "3", "--length-penalty", "0.5"])
    metrics = json.loads(Path("runs/shapes/metrics_val_beam3_penalty0.5.json").read_text())
    assert (metrics["split"], metrics["beam_size"], metrics["length_penalty"]) == ("val", 3, 0.5)
    printed = capsys.readouterr().out
    for name in ("BLEU-4", "CIDEr", "distinct captions", "unfinished captions"):
        value = (metrics["scores"] | metrics)[name]
        assert re.search(rf"^{name} +{value:.1f}$", printed, re.MULTILINE)
    # The captions it wrote, scored as if another program had made them, with and without the run.
    for named in ([], ["--annotations", "shapes/dataset_shapes.json", "--split", "val"]):
        evaluate.main(["--results", "runs/shapes/captions_val_beam3_penalty0.5.json", *named])
        scored = json.loads(Path("runs/shapes/captions_val_beam3_penalty0.5_metrics_val.json").read_text())
        assert scored["scores"] == metrics["scores"]


def test_karpathy_split_of_coco_takes_two_commands(inside):
    """The layout of dataset_coco.json and of COCO's images."""
    splits = [("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test")]
    rows = []
    for number in range(12):
        folder, split = splits[number % 4]
        name = f"COCO_{folder}_{1000 + number:012}.jpg"
        draw_image(Path("coco") / folder / name, number)
        sentences = [{"raw": f"A picture of number {number}."}, {"raw": "A plain colour, nothing else."}]
        rows.append(
            {"filepath": folder, "filename": name, "cocoid": 1000 + number, "split": split, "sentences": sentences}
        )
    Path("dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    data = ["--annotations", "dataset_coco.json", "--images", "coco/"]
    train.main(["--recipe", "best", *data, *settings_of(inside), "--epochs", "1"])
    config = json.loads(Path("runs/coco/config.json").read_text())
    settings = config["train"] | config["model"]
    assert settings["recipe"] == "best" and {name: settings[name] for name in RECIPES["best"]} == RECIPES["best"]
    evaluate.main(["--run", "runs/coco", "--split", "test", "--beam-size", "5"])
    results = json.loads(Path("runs/coco/captions_test_beam5.json").read_text())
    assert [row["image_id"] for row in results] == [1003, 1007, 1011]


def test_captions_without_spaces_are_learned_by_characters(inside, capsys):
    lines = ["image,caption"]
    for number in range(8):
        draw_image(Path(f"images/{number}.png"), number)
        lines += [f"{number}.png,一只狗在跑步。", f"{number}.png,一个男孩在草地上爬山"]
    Path("captions.csv").write_text("\n".join(lines), encoding="utf-8")
    data = ["--annotations", "captions.csv", "--images", "images"]
    train.main([*data, *settings_of(inside), "--epochs", "1", "--words", "characters"])
    assert " captions have more than 6 tokens (--max-length) and are cut" in capsys.readouterr().err
    run = Path("runs/images")
    vocabulary = json.loads((run / "vocabulary.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary[4:]) == sorted(set("一只狗在跑步一个男孩在草地上爬山"))
    evaluate.main([])
    metrics = json.loads((run / "metrics_val.json").read_text())
    assert metrics["tokenizer"] == "characters"
    evaluate.main(["--results", str(run / "captions_val.json"), *data, "--words", "characters", "--split", "val"])
    assert json.loads((run / "captions_val_metrics_val.json").read_text())["scores"] == metrics["scores"]
    capsys.readouterr()
    inference.main(["images/0.png", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert " " not in result["caption"] and "".join(row["word"] for row in result["words"]) == result["caption"]


def test_run_is_continued_from_another_folder_and_its_data_may_move(inside, monkeypatch, capsys):
    Path("project/notebooks").mkdir(parents=True)
    monkeypatch.chdir("project")
    for number in range(10):
        draw_image(Path(f"photos/{number}.png"), number)
    Path("captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,a picture\n" for i in range(10)))
    settings = [*settings_of(inside), "--patience", "0"]
    train.main(["--annotations", "captions.csv", "--images", "photos", *settings, "--epochs", "1"])
    saved = Path("runs/photos/config.json").read_text()

    monkeypatch.chdir("notebooks")
    data = ["--annotations", "../captions.csv", "--images", "../photos"]
    train.main([*data, *settings, "--epochs", "2", "--run", "../runs/photos"])
    assert json.loads(saved)["data"] == json.loads(Path("../runs/photos/config.json").read_text())["data"]
    assert not Path("features").exists(), "the features of the run are used"

    monkeypatch.chdir(inside)
    Path("project").rename("elsewhere")
    evaluate.main(["--run", "elsewhere/runs/photos"])
    Path("elsewhere/photos").rename("photos")
    Path("elsewhere/captions.csv").rename("photos.csv")
    Path("elsewhere/features").rename("cache")
    run = ["--run", "elsewhere/runs/photos"]
    for script, options in ((evaluate, ["--features-dir", "cache/photos"]), (inference, [])):
        with pytest.raises(InputError, match=r"no such .*; if the data were moved, name them with --annotations, --im"):
            script.main([*run, *options])
    moved = ["--annotations", "photos.csv", "--images", "photos"]
    evaluate.main([*run, *moved, "--features-dir", "cache/photos"])
    capsys.readouterr()
    inference.main([*run, *moved, "--num-images", "1", "--seed", "0"])
    assert "reference: a picture" in capsys.readouterr().out


def test_copies_of_an_image_are_in_one_split_of_the_run(inside, capsys):
    rows = ["image,caption"]
    for number in range(10):
        for name in (f"{number}.png", f"copy_{number}.png"):
            draw_image(inside / "photos" / name, number)
            rows.append(f"{name},a picture")
    (inside / "captions.csv").write_text("\n".join(rows))
    data = ["--annotations", "captions.csv", "--images", "photos", *settings_of(inside)]
    train.main([*data, "--epochs", "1"])
    config = json.loads(Path("runs/photos/config.json").read_text())
    assert config["moved_copies"]
    assert f"of 10 images that are copies of others, {len(config['moved_copies'])} moved" in capsys.readouterr().err
    evaluate.main(["--run", "runs/photos"])
    results = ["--results", "runs/photos/captions_val.json", "--split", "val"]
    evaluate.main([*results, "--run", "runs/photos"])
    evaluate.main([*results, "--annotations", "captions.csv", "--images", "photos"])

    # A run of version 1.0 has its copies where chance put them, and goes on so.
    loaded = load_dataset(DataConfig(annotations="captions.csv", images="photos"))
    del config["moved_copies"]
    Path("runs/photos/config.json").write_text(json.dumps(config | {"data_fingerprint": loaded.fingerprint}))
    capsys.readouterr()
    train.main([*data, "--epochs", "2"])
    assert "are copies of others" not in capsys.readouterr().err
    assert json.loads(Path("runs/photos/config.json").read_text())["moved_copies"] == {}


def test_run_in_use_is_refused(trained_run):
    def list_files():
        return sorted((path, path.stat().st_mtime_ns) for path in Path("runs/shapes").rglob("*"))

    before = list_files()
    with lock_folder(Path("runs/shapes")), pytest.raises(InputError, match="runs/shapes is in use by another process"):
        train.main([*DATA, *TRAIN, "--epochs", "2"])
    assert before == list_files()


def test_mistake_gets_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "tokenizer.py", "none.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.splitlines()[-1].startswith(
        "tokenizer.py: none.txt"
    )
    assert "Traceback" not in done.stderr
