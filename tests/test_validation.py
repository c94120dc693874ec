import functools
import itertools

import numpy as np
import pytest

from captioning import metrics
from captioning.input_pipeline import encode_captions
from captioning.quiet_tensorflow import tf
from captioning.validation import Validator
from tokenizer import split_words


@pytest.fixture
def make_validator(dataset, tokenizer, cache, small_model):
    """Returns a function that makes a validator of the small dataset, which generates these captions."""
    examples = dataset.split("val")[:2]

    def make(texts, batch_size=3):
        return Validator(
            small_model,
            encode_captions(examples, functools.partial(tokenizer.encode, max_length=50), cache.path),
            [list(example.captions) for example in examples],
            cache.read,
            lambda: texts,
            split_words,
            batch_size,
        )

    return make


def test_validator_loss_is_the_mean_over_words(make_validator, dataset, tokenizer, cache, small_model):
    """Word by word with the decoder's step."""
    losses = []
    for example in dataset.split("val")[:2]:
        images = small_model.encode(cache.read(tf.constant([str(cache.path(example.image_path))])))
        for caption in example.captions:
            state = small_model.initial_state(1)
            for token, target in itertools.pairwise(tokenizer.encode(caption)):
                logits, state, _ = small_model.step(tf.constant([token]), images, state)
                losses.append(-tf.nn.log_softmax(logits)[0, target])
    for small_model.decoder.fused, batch_size in ((False, 3), (True, 100)):
        assert make_validator([], batch_size).loss() == pytest.approx(np.mean(losses), rel=1e-5)


def test_validator_evaluate_scores_captions(make_validator, dataset):
    references = [example.captions[1] for example in dataset.split("val")[:2]]
    row, sample = make_validator(references).evaluate()
    assert list(row) == ["val_loss", "bleu4", "cider", "distinct_ratio"]
    assert row["bleu4"] == pytest.approx(100, abs=0.1), "every caption is one of its references"
    assert row["cider"] > 100
    assert row["distinct_ratio"] == pytest.approx(100 * len(set(references)) / len(references), abs=0.05)
    assert sample == references[0]
    wrong, _ = make_validator(["in the picture"] * len(references)).evaluate()
    assert wrong["cider"] < row["cider"] and wrong["val_loss"] == row["val_loss"]


def test_validator_without_pycocoevalcap_leaves_out_scores(make_validator, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "has_pycocoevalcap", lambda: False)
    monkeypatch.setattr(metrics, "score", None)
    validator = make_validator(["a red dog"] * 2)
    assert capsys.readouterr().err == (
        "BLEU-4 and CIDEr are left out, and the best epoch is chosen by the validation loss: they need `pip install "
        "pycocoevalcap`\n"
    )
    row, sample = validator.evaluate()
    assert (row["bleu4"], row["cider"], sample) == (None, None, "a red dog")
    assert row["val_loss"] > 0 and row["distinct_ratio"] == 50
