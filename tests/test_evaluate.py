import csv
import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
import inference
from captioning.base.cli import InputError
from captioning.base.files import write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.data.annotations import Example
from captioning.scores import coco_results, java_scores, metrics
from inference import Caption, Captioner
from tokenizer import Tokenizer

REFERENCES = [
    ["A dog runs on the grass.", "the brown dog is running"],
    ["A cat sleeps on a bed .", "a sleeping cat"],
    ["two men", "men"],
]
EXAMPLES = [Example(f"{i}.jpg", tuple(captions), 100 + i, "val") for i, captions in enumerate(REFERENCES)]
RESULTS = [
    {"image_id": 102, "caption": "two men"},
    {"image_id": 100, "caption": "a dog runs on the grass"},
    {"image_id": 101, "caption": "a cat sleeps"},
]


@pytest.fixture(autouse=True)
def _no_java(monkeypatch):
    """Java takes seconds, and what it computes is tested in test_metrics.py."""
    monkeypatch.setattr(metrics, "has_java", lambda: False)


@pytest.fixture
def captioner(tmp_path, cache, tokenizer, small_model, run_config):
    """A run with the untrained small_model."""
    write_json(cache.folder / "features.json", cache.manifest)
    (tmp_path / "run").mkdir()
    return Captioner(small_model, tokenizer, run_config, tmp_path / "run")


# Captions of a split.


@pytest.mark.slow
def test_generate_captions_equals_captions_of_single_images(small_model, tokenizer, cache, dataset):
    examples = dataset.split("train")
    captions = evaluate.generate_captions(small_model, tokenizer, cache, examples, batch_size=5)
    features = cache.read(tf.constant([str(cache.path(example.image_path)) for example in examples]))
    expected = [inference.decode_captions(small_model, tokenizer, features[i : i + 1])[0] for i in range(len(examples))]
    assert [caption.text for caption in captions] == [caption.text for caption in expected]


def test_generate_captions_divides_the_batch_by_the_beam(small_model, tokenizer, cache, dataset, monkeypatch):
    batch_sizes = []

    def decode_captions(model, tokenizer, features, config):
        batch_sizes.append(len(features))
        return []

    monkeypatch.setattr(inference, "decode_captions", decode_captions)
    evaluate.generate_captions(small_model, tokenizer, cache, dataset.split("train"), 24, DecodeConfig(4, 0.5))
    assert batch_sizes == [6, 6, 4]
    evaluate.generate_captions(small_model, tokenizer, cache, dataset.split("val"), 2, DecodeConfig(4, 0.5))
    assert batch_sizes[3:] == [1] * 4
    for config in (DecodeConfig(captions=4), DecodeConfig(captions=4, sample=True)):
        batch_sizes.clear()
        evaluate.generate_captions(small_model, tokenizer, cache, dataset.split("train"), 24, config)
        assert batch_sizes == [6, 6, 4]


def test_unfinished_ratio_of_collapsed_model():
    captions = [
        Caption("a dog", ("a", "dog"), (1.0, 1.0), np.zeros((2, 64)), finished) for finished in (1.0, 1.0, 1.0, None)
    ]
    assert evaluate.unfinished_ratio(captions) == 25.0


# A run.


def test_caption_examples_uses_the_cache(captioner, dataset, cache, monkeypatch):
    monkeypatch.setattr(captioner, "caption_batch", None)  # no image is read
    examples = dataset.split("val")
    texts = [caption.text for caption in evaluate.caption_examples(captioner, dataset.image_dir, examples)]
    features = cache.read(tf.constant([str(cache.path(example.image_path)) for example in examples]))
    assert texts == [caption.text for caption in captioner.caption_features(features)]


def test_caption_examples_without_a_cache_reads_the_images(captioner, saved_dataset, tmp_path, capsys):
    examples, folder = saved_dataset.split("val"), tmp_path / "none"
    captioner.config.features["folder"] = str(folder)
    captioner.extractor = lambda pixels, training: tf.ones((tf.shape(pixels)[0], 64, 2048))
    captions = evaluate.caption_examples(captioner, saved_dataset.image_dir, examples)
    expected = captioner.caption_features(tf.ones((1, 64, 2048)))[0]
    assert [caption.text for caption in captions] == [expected.text] * 4
    assert f"no cached features in {folder}: computing them from the images" in capsys.readouterr().err.splitlines()
    with pytest.raises(InputError, match=r"features\.json"):  # the user expects it there
        evaluate.caption_examples(captioner, saved_dataset.image_dir, examples, str(folder))
    (saved_dataset.image_dir / examples[2].image_path).write_text("not an image")
    with pytest.raises(InputError, match=f"{examples[2].image_path}: not an image"):
        evaluate.caption_examples(captioner, saved_dataset.image_dir, examples)


def test_check_features_refuses_missing_ones(dataset, cache):
    examples = dataset.split("val")
    cache.path(examples[1].image_path).unlink()
    with pytest.raises(InputError, match=r"the features of 1 images are missing .*image_17\.jpg.* run features\.py"):
        evaluate.check_features(cache, dataset.image_dir, examples)


def test_check_features_refuses_those_of_another_image(dataset, cache):
    examples = dataset.split("val")
    evaluate.check_features(cache, dataset.image_dir, examples)  # images that are gone have not changed
    dataset.image_dir.mkdir()
    (dataset.image_dir / "image_17.jpg").write_text("newer than its features")
    with pytest.raises(InputError, match=r"1 images have changed .*image_17\.jpg\); run features\.py"):
        evaluate.check_features(cache, dataset.image_dir, examples)


# Results made elsewhere.


def test_score_file_matches_captions_by_image_id(tmp_path, capsys):
    path = tmp_path / "results.json"
    rows = [{"image_id": "102", "caption": "two\r\nmen"}, *RESULTS[1:], {"image_id": 7, "caption": "of another split"}]
    path.write_text(json.dumps([*rows, {"image_id": "8.jpg", "caption": "of nothing"}]))
    scored, captions, scores = evaluate.score_file(path, EXAMPLES, [*EXAMPLES, Example("7.jpg", ("a hat",), 7, "test")])
    texts = ["a dog runs on the grass", "a cat sleeps", "two men"]
    assert [" ".join(caption.split()) for caption in captions] == texts
    assert scores == metrics.score(REFERENCES, texts) and scored["scores"] == scores.total
    assert scored["distinct captions"] == 100
    log = capsys.readouterr().err
    assert f"{path}: 1 captions of images of other splits are left out" in log
    no_image = "1 of its 5 captions belong to no image of the data, the first with image_id '8.jpg'; left out"
    assert f"{path}: {no_image}" in log


def test_score_file_of_characters(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 1, "caption": "一只狗在跑步"}, {"image_id": 2, "caption": "猫"}]))
    examples = [Example("1.jpg", ("一只狗在爬山。",), 1, "val"), Example("2.jpg", ("猫",), 2, "val")]
    scored, _, _ = evaluate.score_file(path, examples, words="characters")
    assert scored["scores"]["BLEU-1"] == pytest.approx(100 * 5 / 7, abs=0.01)
    assert scored["tokenizer"] == "characters" and "of characters" in capsys.readouterr().err
    # As words one of two is right, and the full stop of the reference makes the captions too short: exp(1 - 3 / 2).
    of_words = evaluate.score_file(path, examples)[0]["scores"]
    assert of_words["BLEU-1"] == pytest.approx(100 / 2 * np.exp(-1 / 2), abs=0.01)


FOLDERS = [
    Example("val/COCO_val2014_000000000391.jpg", ("a dog",), 391),
    Example("val/b.jpg", ("a cat",), 7),
    Example("c.jpg.png", ("a hat",), "x7"),
    Example("other/b.jpg", ("a car",), 50),
    Example("c.jpg", ("a bus",), 51),
    Example("50.jpg", ("a pen",), 0),
]


@pytest.mark.parametrize(
    ("image_id", "expected"),
    [
        (391, 0),
        ("391", 0),
        ("000000000391", 0),
        ("val/COCO_val2014_000000000391.jpg", 0),
        ("COCO_val2014_000000000391.jpg", 0),
        ("COCO_val2014_000000000391", 0),
        ("other/b.jpg", 3),
        ("x7", 2),
        ("c.jpg", 4),  # a name comes before a stem
        ("c.jpg.png", 2),
        ("0000", 5),
        (50, 3),  # a number is an id
        (8, None),
        ("²", None),
        ("", None),
    ],
)
def test_image_index_finds_images_by_id_path_name_and_stem(image_id, expected):
    found = coco_results.ImageIndex(FOLDERS).find(image_id)
    assert found == (None if expected is None else FOLDERS[expected])


@pytest.mark.parametrize(
    ("image_id", "first", "second"),
    [
        ("b.jpg", r"other/b\.jpg \(id 50\)", r"val/b\.jpg \(id 7\)"),
        ("50", r"50\.jpg \(id 0\)", r"other/b\.jpg \(id 50\)"),
    ],
)
def test_image_index_refuses_what_means_two_images(image_id, first, second):
    with pytest.raises(InputError, match=f"image_id '{image_id}' means 2 images, such as {first} and {second}"):
        coco_results.ImageIndex(FOLDERS).find(image_id)


def test_score_file_reads_names_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "results.json"
    by_id = {row["image_id"]: row["caption"] for row in RESULTS}
    rows = [{"image_id": f"{number - 100}.jpg", "caption": caption} for number, caption in by_id.items()]
    path.write_text(json.dumps(RESULTS))
    expected = evaluate.score_file(path, EXAMPLES)
    path.write_text(json.dumps(rows), encoding="utf-8-sig")
    assert evaluate.score_file(path, EXAMPLES) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RESULTS[:2], "no caption of 1 of the 3 images, the first with image_id 101"),
        (
            [*RESULTS[:2], {"image_id": "a.jpg", "caption": "a dog"}],
            "1 of its 3 captions belong to no image of the data",
        ),
        ([*RESULTS, RESULTS[0]], "found two of image_id 102"),
        ([*RESULTS, {"image_id": "2", "caption": "men"}], r"found two of image_id 102 \(2\.jpg\), the second as '2'"),
        ([{"image_id": 100, "caption": "half a \ud800"}], "caption of image_id 100 is not Unicode text"),
        ({"annotations": RESULTS}, "not COCO results"),
        ([{"image_id": 1}], "not COCO results"),
        ([{"image_id": [1], "caption": "a dog"}], "not COCO results"),
    ],
)
def test_score_file_refuses_bad_results(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        evaluate.score_file(path, EXAMPLES)


# The command.


@pytest.mark.slow
def test_main_writes_captions_and_metrics_of_a_run(captioner, dataset, monkeypatch, capsys):
    def load(run, config):
        return Captioner(captioner.model, captioner.tokenizer, captioner.config, Path(run), config)

    monkeypatch.setattr(Captioner, "load", load)
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, locations: dataset)
    evaluate.main(["--run", str(captioner.run), "--beam-size", "2", "--length-penalty", "0.5"])
    written = json.loads((captioner.run / "metrics_val_beam2_penalty0.5.json").read_text())
    assert (written["split"], written["images"], written["tokenizer"]) == ("val", 4, "PTB")
    assert (
        DecodeConfig(**{name: written[name] for name in DecodeConfig().to_json()})
        == captioner.with_decoding(DecodeConfig(beam_size=2, length_penalty=0.5)).decode_config
    )
    results = json.loads((captioner.run / "captions_val_beam2_penalty0.5.json").read_text())
    assert [row["image_id"] for row in results] == [16, 17, 18, 19]
    references = [list(example.captions) for example in dataset.split("val")]
    assert written["scores"] == metrics.score(references, [row["caption"] for row in results]).total
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{captioner.run}, val: 4 images"
    printed = {line[:-6].strip(): float(line[-6:]) for line in lines[1:]}
    ratios = {name: written[name] for name in evaluate.RATIOS}
    assert printed == {name: round(value, 1) for name, value in (written["scores"] | ratios).items()}
    assert list(printed) == [*written["scores"], *ratios]
    evaluate.main(["--run", str(captioner.run), "--split", "all"])
    assert len(json.loads((captioner.run / "captions_all.json").read_text())) == 24
    assert json.loads((captioner.run / "metrics_all.json").read_text())["images"] == 24


@pytest.mark.parametrize(
    ("config", "suffix"),
    [
        (DecodeConfig(), ""),
        (DecodeConfig(length_penalty=0.5), ""),
        (DecodeConfig(beam_size=5, length_penalty=0.5), "_beam5_penalty0.5"),
        (DecodeConfig(captions=3), "_beam3"),
        (DecodeConfig(sample=True, captions=3, temperature=2.0), "_sample"),
        (DecodeConfig(beam_size=2, min_words=4, no_repeat=True), "_beam2_min4_norepeat"),
    ],
)
def test_results_of_other_searches_have_other_names(config, suffix):
    assert config.suffix == suffix


def test_main_writes_a_table_of_the_images(captioner, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "load", lambda run, config: captioner)
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, locations: dataset)
    captioner.tokenizer = Tokenizer(captioner.tokenizer.index_word, "characters")
    evaluate.main(["--run", str(captioner.run), "--per-image", str(tmp_path / "scores.csv")])
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["image"] for row in table} == {example.image_path for example in dataset.split("val")}
    results = json.loads((captioner.run / "captions_val.json").read_text())
    assert {row["caption"] for row in table} == {row["caption"] for row in results}
    assert json.loads((captioner.run / "metrics_val.json").read_text())["tokenizer"] == "characters"


def test_main_scores_results_against_a_run(captioner, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_config", lambda run: captioner.config)
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, with_images, locations: dataset)
    path = tmp_path / "mine.json"
    rows = [{"image_id": example.image_id, "caption": example.captions[0]} for example in dataset.split("val")]
    path.write_text(json.dumps(rows))
    evaluate.main(["--run", str(captioner.run), "--results", str(path)])
    written = json.loads((tmp_path / "mine_metrics_val.json").read_text())
    assert written["scores"]["BLEU-3"] == 100 and written["references"] == str(captioner.run)
    assert (written["results"], written["split"], written["images"]) == (str(path), "val", 4)
    out = capsys.readouterr().out
    assert f"{path}, val: 4 images" in out and "distinct captions" in out and "unfinished captions" not in out


def test_main_scores_results_against_other_data(tmp_path, monkeypatch):
    annotations, path = tmp_path / "captions.csv", tmp_path / "mine.json"
    lines = [f"{i}.jpg,{caption}\n" for i, captions in enumerate(REFERENCES * 4) for caption in captions]
    annotations.write_text("image,caption\n" + "".join(lines))
    path.write_text(json.dumps([{"image_id": i, "caption": "a dog"} for i in range(12)]))
    table = tmp_path / "scores.csv"
    evaluate.main(["--results", str(path), "--annotations", str(annotations), "--per-image", str(table)])
    lines = table.read_text().splitlines()
    assert lines[0].startswith("image,caption,CIDEr,") and len(lines) == 13
    written = json.loads((tmp_path / "mine_metrics_all.json").read_text())
    assert (written["references"], written["split"], written["images"]) == (str(annotations), "all", 12)
    assert written["distinct captions"] == 8.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "coco"], "only where they are can be named"),
        (["--num-captions", "10"], "only where they are can be named"),
        (["--results", "r.json", "--beam-size", "3"], "--results holds captions already"),
        (["--results", "r.json", "--length-penalty", "0"], "--results holds captions already"),
        (["--results", "r.json", "--no-repeat"], "--results holds captions already"),
        (["--per-image", "scores.txt"], r"--per-image scores\.txt: expected a name that ends in \.csv"),
        (["--results", "r.json", "--val-fraction", "0.5"], "expected --dataset or --annotations"),
        (["--results", "r.json", "--dataset", "coco", "--run", "run"], "only where they are can be named"),
    ],
)
def test_parse_refuses_options_that_contradict(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate.parse(arguments)


def test_parse_chooses_split():
    assert evaluate.parse([]).split == "val" and evaluate.parse(["--results", "r.json"]).split == "val"
    assert evaluate.parse(["--results", "r.json", "--dataset", "coco"]).split == "all"
    assert evaluate.parse(["--results", "r.json", "--dataset", "coco", "--split", "test"]).split == "test"


# SPICE.


def test_main_refuses_spice_before_captions_are_generated(captioner, monkeypatch):
    monkeypatch.setattr(Captioner, "load", lambda run, config: captioner)
    with pytest.raises(InputError, match="--spice needs Java 8 to 15, found none"):
        monkeypatch.setattr(java_scores, "java_version", lambda: None)
        evaluate.main(["--run", str(captioner.run), "--spice"])
    monkeypatch.setattr(evaluate, "check_spice", lambda: None)
    captioner.tokenizer = Tokenizer(captioner.tokenizer.index_word, "characters")
    with pytest.raises(InputError, match="--spice supports English words only"):
        evaluate.main(["--run", str(captioner.run), "--spice"])


@pytest.mark.parametrize("fails", [False, True])
def test_main_with_spice(tmp_path, monkeypatch, capsys, fails):
    def spice(references, captions):
        if fails:
            raise java_scores.JavaError("there is no network")
        return 0.5, [0.25, 0.75]

    monkeypatch.setattr(evaluate, "check_spice", lambda: None)
    monkeypatch.setattr(metrics, "spice", spice)
    annotations, path, table = tmp_path / "captions.csv", tmp_path / "mine.json", tmp_path / "scores.csv"
    annotations.write_text("image,caption\n0.jpg,a dog\n1.jpg,a cat\n")
    path.write_text(json.dumps([{"image_id": number, "caption": "a dog"} for number in range(2)]))
    arguments = ["--results", str(path), "--annotations", str(annotations), "--per-image", str(table), "--spice"]
    evaluate.main(arguments)
    written = json.loads((tmp_path / "mine_metrics_all.json").read_text())["scores"]
    assert written.get("SPICE") == (None if fails else 50) and "CIDEr" in written
    printed = capsys.readouterr()
    assert ("SPICE" in printed.out) is not fails and ("SPICE is left out: there is no network" in printed.err) is fails
    assert ("SPICE" in table.read_text()) is not fails


def test_main_without_pycocoevalcap_is_an_error(monkeypatch):
    monkeypatch.setattr(evaluate, "has_pycocoevalcap", lambda: False)
    with pytest.raises(InputError, match="pip install pycocoevalcap"):
        evaluate.main([])
