import csv
import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
import inference
from captioning.base.cli import InputError, log_once
from captioning.base.files import write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.scores import java_scores, metrics
from inference import Captioner
from tokenizer import Tokenizer

REFERENCES = [
    ["A dog runs on the grass.", "the brown dog is running"],
    ["A cat sleeps on a bed .", "a sleeping cat"],
    ["two men", "men"],
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


def test_generate_captions_divides_the_batch_by_the_beam(small_model, tokenizer, cache, dataset, monkeypatch):
    monkeypatch.setattr(inference, "decode_captions", lambda model, tokenizer, features, *_, **__: [len(features)])
    for config in (DecodeConfig(4, 0.5), DecodeConfig(captions=4), DecodeConfig(captions=4, sample=True)):
        batch_sizes = evaluate.generate_captions(small_model, tokenizer, cache, dataset.split("train"), 24, config)
        assert batch_sizes == [6, 6, 4]
    assert evaluate.generate_captions(small_model, tokenizer, cache, dataset.split("val"), 2, config) == [1] * 4
    monkeypatch.setattr(evaluate, "has_gpu", lambda: True)
    assert evaluate.generate_captions(small_model, tokenizer, cache, dataset.split("train"), 24, config) == [16]


@pytest.fixture
def small_gpu(monkeypatch):
    """Lets captions be generated as on a GPU, for which 16 images are many."""
    monkeypatch.setattr(evaluate, "has_gpu", lambda: True)
    monkeypatch.setattr(evaluate, "GPU_BATCH_SIZE", 5)
    monkeypatch.setattr(evaluate, "XLA_MIN_IMAGES", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("small_gpu")
def test_generate_captions_of_many_images_on_a_gpu_compiles_for_one_shape(
    small_model, tokenizer, cache, dataset, monkeypatch
):
    calls, decode_captions = [], inference.decode_captions

    def note_call(model, tokenizer, features, with_xla=False, **options):
        calls.append((len(features), with_xla))
        return decode_captions(model, tokenizer, features, with_xla=with_xla, **options)

    for variable in small_model.trainable_variables:
        variable.assign(variable * 4)  # the captions differ
    monkeypatch.setattr(inference, "decode_captions", note_call)
    examples, config = dataset.split("train"), DecodeConfig(3, max_words=8)
    captions = evaluate.generate_captions(small_model, tokenizer, cache, examples, 15, config)
    assert calls == [(5, True)] * 4
    calls.clear()
    monkeypatch.setattr(evaluate, "XLA_MIN_IMAGES", 17)
    expected = evaluate.generate_captions(small_model, tokenizer, cache, examples, 15, config)
    assert calls == [(5, False)] * 3 + [(1, False)]
    for caption, other in zip(captions, expected, strict=True):
        assert caption.text == other.text
        np.testing.assert_allclose(caption.probabilities, other.probabilities, rtol=1e-3)
        np.testing.assert_allclose(caption.attention, other.attention, rtol=1e-3, atol=1e-6)
    assert len({caption.text for caption in captions}) > 5


@pytest.mark.slow
@pytest.mark.usefixtures("small_gpu")
def test_generate_captions_goes_on_where_xla_fails(small_model, tokenizer, cache, dataset, monkeypatch, capsys):
    def step_in_python(*arguments):
        logits, state, attention_weights = step(*arguments)
        return tf.ensure_shape(tf.numpy_function(np.copy, [logits], tf.float32), logits.shape), state, attention_weights

    step = small_model.step
    monkeypatch.setattr(small_model, "step", step_in_python)
    log_once.cache_clear()
    examples, config = dataset.split("train"), DecodeConfig(max_words=3)
    captions = evaluate.generate_captions(small_model, tokenizer, cache, examples, 5, config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("XLA cannot run the search (") and line.endswith("): captioning goes on without")
    monkeypatch.setattr(evaluate, "has_gpu", lambda: False)
    expected = evaluate.generate_captions(small_model, tokenizer, cache, examples, 5, config)
    assert [caption.text for caption in captions] == [caption.text for caption in expected]


# A run.


def test_caption_examples_uses_the_cache(captioner, dataset, cache, monkeypatch):
    monkeypatch.setattr(captioner, "caption_batch", None)  # no image is read
    examples = dataset.split("val")
    opened = evaluate.open_features(captioner)
    texts = [caption.text for caption in evaluate.caption_examples(captioner, dataset.image_dir, examples, opened)]
    features = cache.read(tf.constant([str(cache.path(example.image_path)) for example in examples]))
    assert texts == [
        caption.text
        for caption in inference.decode_captions(
            captioner.model, captioner.tokenizer, features, captioner.decode_config
        )
    ]


def test_caption_examples_without_a_cache_reads_the_images(captioner, saved_dataset, tmp_path, capsys):
    examples, folder = saved_dataset.split("val"), tmp_path / "none"
    captioner.config.features["folder"] = str(folder)
    captioner.extractor = lambda pixels, training: tf.ones((tf.shape(pixels)[0], 64, 2048))
    assert evaluate.open_features(captioner) is None
    captions = evaluate.caption_examples(captioner, saved_dataset.image_dir, examples, None)
    expected = inference.decode_captions(captioner.model, captioner.tokenizer, tf.ones((1, 64, 2048)))[0]
    assert [caption.text for caption in captions] == [expected.text] * 4
    said = f"no cached features of this run in {folder}: computing them from the images"
    assert said in capsys.readouterr().err.splitlines()
    write_json(folder / "features.json", captioner.config.features | {"dtype": "float32"})
    assert evaluate.open_features(captioner) is None, "of a run whose CNN was trained further"
    assert "its dtype is float32, that of the run's config.json float16" in capsys.readouterr().err
    with pytest.raises(InputError, match="its dtype is float32"):
        evaluate.open_features(captioner, str(folder))
    (folder / "features.json").unlink()
    with pytest.raises(InputError, match=r"features\.json"):  # the user expects it there
        evaluate.open_features(captioner, str(folder))
    (saved_dataset.image_dir / examples[2].image_path).write_text("not an image")
    with pytest.raises(InputError, match=f"{examples[2].image_path}: not an image"):
        evaluate.caption_examples(captioner, saved_dataset.image_dir, examples, None)


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


# The command.


@pytest.mark.slow
def test_main_writes_captions_and_metrics_of_a_run(captioner, dataset, cache, monkeypatch, capsys):
    given = []

    def load(run, config, locations):
        given.append(locations)
        return Captioner(captioner.model, captioner.tokenizer, captioner.config, Path(run), config)

    monkeypatch.setattr(Captioner, "load", load)
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, locations: dataset)
    options = ["--beam-size", "2", "--length-penalty", "0.5", "--features-dir", str(cache.folder)]
    evaluate.main(["--run", str(captioner.run), *options])
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
    assert given == [{"features_dir": str(cache.folder)}, {}]
    assert len(json.loads((captioner.run / "captions_all.json").read_text())) == 24
    assert json.loads((captioner.run / "metrics_all.json").read_text())["images"] == 24


def test_results_of_other_searches_have_other_names():
    configs = {
        "": DecodeConfig(length_penalty=0.5),
        "_beam3": DecodeConfig(captions=3),
        "_beam5_penalty0.5": DecodeConfig(beam_size=5, length_penalty=0.5),
        "_beam20_consensus": DecodeConfig(choose="consensus", length_penalty=0.5),
        "_sample": DecodeConfig(sample=True, captions=3),
        "_sample_t2_p0.9_seed7": DecodeConfig(sample=True, temperature=2.0, top_p=0.9, decode_seed=7),
        "_max5": DecodeConfig(max_words=5),
        "_beam2_min4_norepeat": DecodeConfig(beam_size=2, min_words=4, no_repeat=True),
    }
    assert [config.suffix for config in configs.values()] == list(configs)


def test_main_writes_a_table_of_the_images(captioner, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: captioner)
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, locations: dataset)
    captioner.tokenizer = Tokenizer(captioner.tokenizer.index_word, "characters")
    evaluate.main(["--run", str(captioner.run), "--per-image", str(tmp_path / "scores.csv")])
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["image"] for row in table} == {example.image_path for example in dataset.split("val")}
    results = json.loads((captioner.run / "captions_val.json").read_text())
    assert {row["caption"] for row in table} == {row["caption"] for row in results}
    assert json.loads((captioner.run / "metrics_val.json").read_text())["tokenizer"] == "characters"


def test_metrics_of_samples_have_settings_that_can_be_read(captioner, dataset, monkeypatch):
    captioner.decode_config = DecodeConfig(sample=True, captions=3, max_words=4)
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: captioner)
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, locations: dataset)
    evaluate.main(["--run", str(captioner.run), "--sample", "--captions", "3", "--max-words", "4"])
    metrics = json.loads((captioner.run / "metrics_val_sample_max4.json").read_text())
    assert (
        DecodeConfig(**{name: metrics[name] for name in captioner.decode_config.to_json()}) == captioner.decode_config
    )


def test_main_measures_the_attention_in_boxes(captioner, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: captioner)
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, locations: dataset)
    names = [example.image_path for example in dataset.split("val")]
    attention = np.eye(64)[[10, 10]]  # all of it in the second row and the third column of the 8x8 locations
    captions = [inference.Caption("a dog", ("a", "dog"), (1.0, 1.0), attention, 1.0) for _ in names]
    monkeypatch.setattr(evaluate, "caption_examples", lambda *args: captions)
    boxes = {
        "images": [{"id": name, "file_name": name, "width": 80, "height": 40} for name in names],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": name, "category_id": 1, "bbox": [20, 5, 5, 5]} for name in names],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    evaluate.main(["--run", str(captioner.run), "--boxes", str(tmp_path / "boxes.json")])
    measured = json.loads((captioner.run / "metrics_val.json").read_text())["attention"]
    assert (measured["words"], measured["inside"], measured["inside, even"], measured["pointing"]) == (4, 50, 0.8, 100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-7:-5] == ["attention of 4 words that name a box", f"inside{50:20.1f}"]
    with pytest.raises(InputError, match="--boxes measures the attention of a run, and --results has captions only"):
        evaluate.parse(["--results", "r.json", "--boxes", "boxes.json"])


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
        (["--results", "r.json", "--beam-size", "3"], "--results holds captions already"),
        (["--results", "."], "--results .: expected a file, found a folder"),
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
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: captioner)
    with pytest.raises(InputError, match="--spice needs Java 8 to 15, found none"):
        monkeypatch.setattr(java_scores, "java_version", lambda: None)
        evaluate.main(["--run", str(captioner.run), "--spice"])
    monkeypatch.setattr(evaluate, "check_spice", lambda: None)
    captioner.tokenizer = Tokenizer(captioner.tokenizer.index_word, "characters")
    with pytest.raises(InputError, match="--spice supports English words only"):
        evaluate.main(["--run", str(captioner.run), "--spice"])


@pytest.mark.parametrize("result", [None, (0.5, [0.25, 0.75])])
def test_main_with_spice(tmp_path, monkeypatch, capsys, result):
    monkeypatch.setattr(evaluate, "check_spice", lambda: None)
    monkeypatch.setattr(metrics, "compute_java_score", lambda *_: result)
    annotations, path, table = tmp_path / "captions.csv", tmp_path / "mine.json", tmp_path / "scores.csv"
    annotations.write_text("image,caption\n0.jpg,a dog\n1.jpg,a cat\n")
    path.write_text(json.dumps([{"image_id": number, "caption": "a dog"} for number in range(2)]))
    arguments = ["--results", str(path), "--annotations", str(annotations), "--per-image", str(table), "--spice"]
    evaluate.main(arguments)
    written = json.loads((tmp_path / "mine_metrics_all.json").read_text())["scores"]
    assert written.get("SPICE") == (50 if result else None) and "CIDEr" in written
    assert ("SPICE" in capsys.readouterr().out) == ("SPICE" in table.read_text()) == (result is not None)


def test_main_without_pycocoevalcap_is_an_error(monkeypatch):
    monkeypatch.setattr(evaluate, "has_pycocoevalcap", lambda: False)
    with pytest.raises(InputError, match="pip install pycocoevalcap"):
        evaluate.main([])
