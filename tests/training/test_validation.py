import dataclasses
import itertools
import re

import numpy as np
import pytest

import evaluate
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID
from captioning.config.settings import TrainConfig
from captioning.output.captions import Caption
from captioning.scores import metrics
from captioning.training import validation
from captioning.training.input_pipeline import TrainData
from captioning.training.validation import EpochScore, Validator
from tokenizer import Tokenizer


def make_caption(text):
    """A caption of these words, which was cut if the last one is "..."."""
    words = tuple(text.removesuffix("...").split())
    attention = np.full((len(words), 64), 1 / 64)
    return Caption(" ".join(words), words, (0.5,) * len(words), attention, None if text.endswith("...") else 0.5)


@pytest.fixture
def make_validator(dataset, tokenizer, cache, small_model, monkeypatch):
    """Returns a function that makes a validator of the small dataset, which generates these captions."""
    first, second, *_ = dataset.split("val")

    def make(texts, batch_size=3, num_images=2, own_cider=None):
        pair = (first, dataclasses.replace(second, split="val"))
        examples = tuple(pair[number % 2] for number in range(num_images))
        data = TrainData(dataclasses.replace(dataset, examples=examples), cache, tokenizer)
        monkeypatch.setattr(Validator, "generate_captions", lambda _: list(map(make_caption, texts)))
        return Validator(small_model, data, TrainConfig(batch_size=batch_size), own_cider)

    return make


def test_validator_takes_at_most_the_images_it_may(dataset, tokenizer, cache, small_model):
    validator = Validator(small_model, TrainData(dataset, cache, tokenizer), TrainConfig(max_val_images=1))
    assert len(validator.references) == len(validator.captions.feature_paths) == 1
    assert TrainConfig().max_val_images == 1000, "as README says"


@pytest.mark.slow
def test_validator_loss_is_the_mean_over_words(make_validator, dataset, tokenizer, cache, small_model):
    """Word by word with the decoder's step."""
    losses = []
    for example in dataset.split("val")[:2]:
        images = small_model.encode(cache.read(tf.constant([str(cache.path(example.image_path))])))
        for caption in example.captions:
            state = small_model.initial_state(images)
            for token, target in itertools.pairwise(tokenizer.encode(caption)):
                logits, state, _ = small_model.step(tf.constant([token]), images, state)
                losses.append(-tf.nn.log_softmax(logits)[0, target])
    for small_model.decoder.fused, batch_size in ((False, 3), (True, 100)):
        assert make_validator([], batch_size).loss() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.slow
def test_validator_evaluate_scores_captions(make_validator, dataset):
    references = [example.captions[1] for example in dataset.split("val")[:2]]
    row, score, sample = make_validator(references).evaluate()
    assert list(row) == ["val_loss", "bleu4", "cider", "distinct_ratio"]
    assert row["bleu4"] == pytest.approx(100, abs=0.1), "every caption is one of its references"
    assert row["cider"] > 100
    assert row["distinct_ratio"] == pytest.approx(100 * len(set(references)) / len(references), abs=0.05)
    assert sample == references[0]
    assert score == (0, 0, -row["val_loss"]), "two images are too few for CIDEr to decide"
    wrong = make_validator(["in the picture"] * len(references)).evaluate().row
    assert wrong["cider"] < row["cider"] and wrong["val_loss"] == row["val_loss"]


def test_validator_without_pycocoevalcap_leaves_out_scores(make_validator, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "has_pycocoevalcap", lambda: False)
    monkeypatch.setattr(metrics, "ReferenceScorer", None)
    row, score, sample = make_validator(["a red dog", " "]).evaluate()
    assert (row["bleu4"], row["cider"], sample) == (None, None, "a red dog")
    assert row["val_loss"] > 0 and row["distinct_ratio"] == 100
    assert score == (0, -1, -row["val_loss"])


def test_validator_lets_cider_decide_of_enough_images(make_validator, dataset, monkeypatch):
    monkeypatch.setattr(validation, "MIN_CIDER_IMAGES", 2)
    row, score, _ = make_validator([dataset.split("val")[0].captions[1], ""]).evaluate()
    assert score == (row["cider"], -1, -row["val_loss"]) and row["cider"] > 0


@pytest.mark.parametrize("installed", [True, False])
def test_validator_takes_the_objectives_cider_for_few_images(make_validator, monkeypatch, capsys, tokenizer, installed):
    monkeypatch.setattr(metrics, "has_pycocoevalcap", lambda: installed)
    given = []
    validator = make_validator(["a red dog", "a red ..."], own_cider=lambda *args: given.append(args) or 12.345)
    row, score, _ = validator.evaluate()
    assert row["cider"] == score.cider == 12.35 and score.column == "cider"
    assert (row["bleu4"] is not None) == installed
    ((texts, references),) = given
    assert [tokenizer.decode(ids) for ids in texts] == ["a red dog", "a red"]
    assert [ids[-1] == END_ID for ids in texts] == [True, False], "a caption that was cut has no <end>"
    assert [[tokenizer.decode(ids) for ids in captions] for captions in references] == validator.references
    assert "CIDEr with the document frequencies of the training captions" in capsys.readouterr().err


def test_validator_keeps_cider_of_enough_images(make_validator, monkeypatch):
    monkeypatch.setattr(validation, "MIN_CIDER_IMAGES", 2)
    assert make_validator(["a", "b"], own_cider=lambda *_: 99.0).evaluate().row["cider"] < 99
    monkeypatch.setattr(metrics, "has_pycocoevalcap", lambda: False)
    with pytest.raises(InputError, match="needs `pip install pycocoevalcap`"):  # a resumed run had the other CIDEr
        make_validator(["a", "b"], own_cider=lambda *_: 99.0)


def test_validator_splits_words_as_published_scores_do(make_validator, monkeypatch):
    scorer = metrics.ReferenceScorer
    seen = []
    monkeypatch.setattr(metrics, "ReferenceScorer", lambda *args: seen.append(args) or scorer(*args))
    validator = make_validator(["a", "b"])
    tokenizer = Tokenizer(validator.data.tokenizer.index_word, "characters")
    validator.data = validator.data._replace(tokenizer=tokenizer)
    validator.evaluate()
    validator.evaluate()
    assert seen == [(validator.references, "characters")], "the references are split once for all epochs"


def test_validator_takes_larger_batches_on_a_gpu(make_validator, monkeypatch):
    sizes = []
    make_batches = validation.make_epoch_batches
    monkeypatch.setattr(
        validation, "make_epoch_batches", lambda c, size, **order: sizes.append(size) or make_batches(c, size, **order)
    )
    validator = make_validator([])
    expected = validator.loss()
    monkeypatch.setattr(evaluate, "has_gpu", lambda: True)
    assert validator.loss() == pytest.approx(expected, rel=1e-6)
    assert sizes == [3, evaluate.GPU_BATCH_SIZE]


@pytest.mark.parametrize(
    ("num_images", "installed", "message"),
    [
        (20, True, "$"),
        (
            20,
            False,
            "BLEU-4 and CIDEr are left out, and the best epoch is chosen by the validation loss: they need `pip",
        ),
        (1, True, r"too few validation images for CIDEr to choose the best epoch \(found 1, expected at least 20\)"),
    ],
)
def test_validator_says_what_decides(make_validator, monkeypatch, capsys, num_images, installed, message):
    monkeypatch.setattr(metrics, "has_pycocoevalcap", lambda: installed)
    validator = make_validator([], num_images=num_images)
    assert re.match(message, capsys.readouterr().err)
    assert validator.cider_decides == (message == "$")


# Which of two epochs is better.


def test_epoch_score_compares_cider_then_empty_captions_then_the_loss():
    scores = [EpochScore(), EpochScore(0, -3, -1.0), EpochScore(0, 0, -2.5), EpochScore(0, 0, -2.0)]
    scores += [EpochScore(12.25, -1, -9.0), EpochScore(12.5, -3, -9.5)]
    assert sorted(reversed(scores)) == scores
