"""The commands as a person runs them, from drawn pictures to a caption, with the real InceptionV3 (random weights)."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import evaluate
import features
import inference
import shapes
import train
from common import InputError, exclusive

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with 24 drawn pictures, one of them unreadable, and a run trained on them for one epoch."""
    folder = tmp_path_factory.mktemp("work place")  # a space, as people have
    before = os.getcwd()
    os.chdir(folder)
    annotations = shapes.draw_dataset("shapes", pictures=24)
    name = json.loads(annotations.read_text())["images"][-1]["filename"]
    (folder / "shapes/images" / name).write_text("not a picture")
    train.main(
        [*DATA, "--weights", "random", "--epochs", "1", "--batch-size", "8", "--embedding-dim", "8", "--units", "16"]
    )
    yield folder
    os.chdir(before)


DATA = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes"]


def test_the_whole_pipeline(workplace, capsys, monkeypatch):
    cached = sorted((workplace / "features/shapes/images").iterdir())
    assert len(cached) == 23, "every readable picture has its features, the unreadable one has none"
    values = np.load(cached[0], allow_pickle=False)
    assert (values.shape, values.dtype) == ((64, 2048), np.float16)
    run = workplace / "runs/shapes"
    for name in ("config.json", "vocabulary.json", "history.csv", "loss.png", "cnn.weights.h5"):
        assert (run / name).stat().st_size > 0
    assert json.loads((run / "config.json").read_text())["data"]["unreadable"] == ["images/shapes_00023.png"]

    features.main([*DATA, "--weights", "random"])
    assert "23 pictures have their features" in capsys.readouterr().out

    inference.main(["shapes/images/shapes_00000.png", "--run", "runs/shapes"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1, "one caption, and nothing else, on standard output"
    assert Path("shapes_00000_attention.png").stat().st_size > 1000

    monkeypatch.setattr(common.Talk, "wanted", True)  # which --quiet changes
    pictures = [f"shapes/images/shapes_0000{i}.png" for i in (1, 2)]
    inference.main([*pictures, "--json", "--format", "svg", "--grid", "all.png", "--output-dir", "more", "--quiet"])
    found = capsys.readouterr()
    assert [json.loads(line)["picture"] for line in found.out.splitlines()] == pictures and found.err == ""
    assert {path.name for path in Path("more").iterdir()} == {f"{Path(p).stem}_attention.svg" for p in pictures}
    assert Path("all.png").stat().st_size > 1000
    monkeypatch.setattr(common.Talk, "wanted", True)

    inference.main([])
    assert "real:" in (out := capsys.readouterr().out) and "predicted:" in out

    evaluate.main(["--split", "test"])
    assert "BLEU-4" in capsys.readouterr().out
    results = json.loads((run / "captions_test.json").read_text())
    assert {type(row["image_id"]) for row in results} == {int} and all("caption" in row for row in results)


def test_a_beam_captions_plots_and_is_scored(workplace, capsys):
    inference.main(["shapes/images/shapes_00000.png", "--beam-size", "3", "--output-dir", "beam"])
    assert Path("beam/shapes_00000_attention.png").stat().st_size > 1000
    evaluate.main(["--beam-size", "3", "--length-penalty", "0.5"])
    metrics = json.loads(Path("runs/shapes/metrics_val_beam3.json").read_text())
    assert (metrics["split"], metrics["beam_size"], metrics["length_penalty"]) == ("val", 3, 0.5)
    printed = capsys.readouterr().out
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "distinct captions", "never ended"):
        value = (metrics["scores"] | metrics)[name]
        assert re.search(rf"^{name} +{value:.1f}$", printed, re.MULTILINE)
    # The captions it wrote, scored as if they had been made elsewhere, with and without the run.
    for named in ([], ["--annotations", "shapes/dataset_shapes.json", "--split", "val"]):
        evaluate.main(["--results", "runs/shapes/captions_val_beam3.json", *named])
        scored = json.loads(Path("runs/shapes/captions_val_beam3_metrics_val.json").read_text())
        assert scored["scores"] == metrics["scores"]


def test_karpathys_split_of_coco_with_two_commands(tmp_path, monkeypatch):
    """The layout of dataset_coco.json and of COCO's pictures."""
    monkeypatch.chdir(tmp_path)
    images = []
    for number in range(12):
        folder, split = [("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test")][
            number % 4
        ]
        name = f"COCO_{folder}_{1000 + number:012}.jpg"
        (Path("coco") / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (20 * number, 99, 0)).save(Path("coco") / folder / name)
        texts = [f"A picture of number {number}.", "A plain colour, nothing else."]
        sentences = [{"raw": text, "tokens": text.lower().split(), "imgid": number} for text in texts]
        images.append(
            {"filepath": folder, "filename": name, "cocoid": 1000 + number, "split": split, "sentences": sentences}
        )
    Path("dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    small = ["--weights", "random", "--epochs", "1", "--embedding-dim", "8", "--units", "16"]
    train.main(["--recipe", "best", "--annotations", "dataset_coco.json", "--images", "coco/", *small])
    config = json.loads(Path("runs/coco/config.json").read_text())
    assert config["training"]["recipe"] == "best"
    found = config["training"] | config["model"]
    assert {name: found[name] for name in train.RECIPES["best"]} == train.RECIPES["best"]
    evaluate.main(["--run", "runs/coco", "--split", "test", "--beam-size", "5"])
    results = json.loads(Path("runs/coco/captions_test_beam5.json").read_text())
    assert [row["image_id"] for row in results] == [1003, 1007, 1011]
    assert len(list(Path("features/coco/val2014").iterdir())) == 9


def test_results_of_a_run_whose_pictures_lie_in_one_folder(workplace):
    """The annotations name folders that are not there; the run knows its pictures by their bare names."""
    flat, small = ["--annotations", DATA[1], "--images", "shapes/images"], ["--embedding-dim", "8", "--units", "16"]
    train.main([*flat, *small, "--weights", "random", "--epochs", "1", "--run", "flat", "--features-dir", "flat_cache"])
    evaluate.main(["--run", "flat"])
    evaluate.main(["--run", "flat", "--results", "flat/captions_val.json"])
    assert Path("flat/captions_val_metrics_val.json").exists()


def test_captioning_a_file_equals_captioning_its_cached_features(workplace):
    captioning = inference.Captioning.load("runs/shapes")
    from_file = captioning.caption("shapes/images/shapes_00001.png")
    cached = np.load("features/shapes/images/shapes_00001.png.npy")[np.newaxis]
    from_cache = captioning.caption_features(cached)[0]
    assert from_file.text == from_cache.text
    np.testing.assert_allclose(from_file.attention, from_cache.attention, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "gif"), ("I;16", "png")]
)
def test_pictures_of_all_kinds_are_captioned_and_plotted(workplace, mode, suffix):
    name = f"kind_{mode.replace(';', '')}"
    picture = Image.new(mode, (50, 30)) if mode == "I;16" else Image.new("RGB", (50, 30), "red").convert(mode)
    picture.save(f"{name}.{suffix}")
    inference.main([f"{name}.{suffix}"])
    assert Path(f"{name}_attention.png").stat().st_size > 1000


def test_a_bad_picture_among_good_ones(workplace, capsys):
    bad = "shapes/images/shapes_00023.png"
    with pytest.raises(InputError, match="1 of 2 pictures"):
        inference.main([bad, "shapes/images/shapes_00002.png"])
    printed = capsys.readouterr()
    assert "shapes_00002.png\t" in printed.out and bad in printed.err


def test_changed_data_are_noticed(workplace):
    path = workplace / "shapes/dataset_shapes.json"
    whole = path.read_text()
    path.write_text(whole.replace('"split": "test"', '"split": "train"', 1))
    try:
        with pytest.raises(InputError, match="the data have changed"):
            evaluate.main([])
        with pytest.raises(InputError, match="fingerprint"):
            train.main([*DATA, "--weights", "random", "--batch-size", "8", "--embedding-dim", "8", "--units", "16"])
    finally:
        path.write_text(whole)


def test_pictures_on_the_web(workplace, capsys, monkeypatch):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}/shapes/images/shapes_00003.png"
        inference.main(["shapes/images/shapes_00003.png", "--run", "runs/shapes", "--output-dir", "web"])
        expected = capsys.readouterr().out
        inference.main([address, "--run", "runs/shapes", "--output-dir", "web"])
        assert capsys.readouterr().out == expected
        assert Path("web/shapes_00003_attention.png").stat().st_size > 1000
        monkeypatch.setattr(inference, "MAX_DOWNLOAD", 100)
        for bad, message in ((address, "at most 100 bytes"), ("file:///etc/passwd", "begins with http")):
            with pytest.raises(InputError, match=message):
                inference.main([bad, "--run", "runs/shapes"])
        httpd.shutdown()


def test_a_run_in_use_is_refused(workplace):
    arguments = [*DATA, "--weights", "random", "--batch-size", "8", "--embedding-dim", "8", "--units", "16"]
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("runs/shapes").rglob("*"))
    with exclusive(Path("runs/shapes")), pytest.raises(InputError, match="runs/shapes is in use by another process"):
        train.main([*arguments, "--epochs", "2"])
    assert before == sorted((path, path.stat().st_mtime_ns) for path in Path("runs/shapes").rglob("*"))
    train.main([*arguments, "--epochs", "1"])  # free again


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inference.py none.jpg", "none.jpg: no such picture"),
        ("inference.py --run nowhere shapes/images/shapes_00000.png", "not a run folder"),
        ("inference.py shapes/dataset_shapes.json", "not a picture that can be read"),
        ("train.py --annotations shapes/dataset_shapes.json", "needs --images"),
        ("features.py --annotations none.csv --images shapes", "no such annotation file"),
        ("features.py --cnn-batch-size 0", "expected a whole number of at least 1, found '0'"),
        ("features.py --annotations features/shapes/features.json --images shapes", "JSON without captions"),
        (
            "features.py --annotations shapes/dataset_shapes.json --images shapes",
            "holds features made with weights random",
        ),
        ("tokenizer.py nothing.txt", "nothing.txt"),
        ("train.py --dropout 1.5", "dropout: expected at least 0 and less than 1, found 1.5"),
        ("evaluate.py --length-penalty -1", "expected a number of at least 0, found '-1'"),
        ("evaluate.py --annotations shapes/dataset_shapes.json", "data can be named for --results FILE only"),
        ("evaluate.py --results captions.json", "captions.json: no such file"),
        ("evaluate.py --results captions.json --beam-size 3", "--results holds captions already"),
        ("evaluate.py --results captions.json --val-fraction 0.5", "expected --dataset or --annotations"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(workplace, command, message):
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=workplace, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(script), "the last line is the mistake"


@pytest.mark.parametrize(
    "script", ["data_utils", "demo", "evaluate", "features", "inference", "model", "shapes", "tokenizer", "train"]
)
def test_every_command_explains_itself(script, capsys):
    module = __import__(script)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert f"python {script}.py" in capsys.readouterr().out


def test_shapes_are_drawn_as_described(tmp_path):
    annotations = json.loads(shapes.draw_dataset(tmp_path, pictures=12).read_text())
    for image in annotations["images"]:
        with Image.open(tmp_path / image["filepath"] / image["filename"]) as picture:
            for shape in image["shapes"]:
                left, top, right, bottom = shape["box"]
                assert 0 <= left < right <= shapes.SIZE and 0 <= top < bottom <= shapes.SIZE
                # The middle of a shape's lower half has its colour, whatever the noun.
                found = picture.getpixel(((left + right) // 2, (top + 3 * bottom) // 4))
                assert found == shapes.COLOURS[shape["colour"]]
        if len(image["shapes"]) == 2:
            first, second = image["shapes"]
            caption = image["sentences"][0]["raw"]
            assert caption.startswith(f"a {first['colour']} {first['noun']}")
            axis = 1 if "above" in caption else 0
            assert first["box"][axis + 2] <= second["box"][axis] + 20, "the relation must be plain to see"
    with pytest.raises(InputError, match="drawn with"):
        shapes.draw_dataset(tmp_path, pictures=16)
