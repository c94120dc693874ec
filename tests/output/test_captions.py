import math

import numpy as np
import pytest

from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, SPECIAL_TOKENS
from captioning.decoder.decoding import DecodedBatch
from captioning.output.captions import Caption, to_captions
from tokenizer import Tokenizer

TOKENIZER = Tokenizer((*SPECIAL_TOKENS, "a", "dog"))
A, DOG = 4, 5


def make_caption(end_probability=0.5, **fields):
    return Caption("a dog", ("a", "dog"), (0.5, 0.25), np.full((2, 64), 1 / 64), end_probability, **fields)


def decoded(tokens):
    """Captions with these tokens: the probability of token i of caption k is (k + 1) / 10 ** i."""
    rows, steps = np.indices(np.shape(tokens))
    return DecodedBatch(
        tokens=tf.constant(tokens),
        probabilities=tf.constant((rows + 1) / 10.0**steps, tf.float32),
        attention=tf.reshape(tf.range(rows.size * 64.0), (*rows.shape, 64)),
    )


# Words.


def test_to_captions_ends_at_end_token():
    batch = decoded([[A, DOG, END_ID, 0], [END_ID, 0, 0, 0], [DOG, DOG, DOG, DOG]])
    first, empty, endless = to_captions(batch, TOKENIZER)
    assert (first.words, empty.words, endless.words) == (("a", "dog"), (), ("dog",) * 4)
    assert (first.text, empty.text, endless.text) == ("a dog", "", "dog dog dog dog")
    assert (first.finished, empty.finished, endless.finished) == (True, True, False)
    np.testing.assert_allclose(first.probabilities, (1, 0.1), rtol=1e-6)
    np.testing.assert_allclose([first.end_probability, empty.end_probability], [0.01, 2], rtol=1e-6)
    assert endless.end_probability is None and empty.probabilities == ()
    assert [each.attention.shape for each in (first, empty, endless)] == [(2, 64), (0, 64), (4, 64)]
    np.testing.assert_array_equal(endless.attention, batch.attention[2])


def test_to_captions_of_characters_has_no_spaces_between_them():
    batch = DecodedBatch(tf.constant([[4, 5, 6, END_ID]]), tf.ones((1, 4)), tf.ones((1, 4, 64)))
    for words, text in (("spaces", "一 只 dog"), ("characters", "一只 dog")):
        (caption,) = to_captions(batch, Tokenizer((*SPECIAL_TOKENS, "一", "只", "dog"), words))
        assert (caption.text, caption.words) == (text, ("一", "只", "dog"))


def test_to_captions_makes_further_captions_alternatives():
    batch = decoded([[A, END_ID], [DOG, END_ID], [0, 0], [DOG, DOG], [A, A], [A, END_ID]])
    first, second = to_captions(batch, TOKENIZER, num_captions=3)
    assert [each.text for each in (first, *first.alternatives)] == ["a", "dog"], "the third place holds no caption"
    assert [each.text for each in (second, *second.alternatives)] == ["dog dog", "a a", "a"]


# How sure.


def test_confidence_counts_the_end():
    caption = make_caption()
    assert caption.log_prob == pytest.approx(math.log(0.5 * 0.25 * 0.5))
    assert caption.confidence == pytest.approx((0.5 * 0.25 * 0.5) ** (1 / 3))
    cut = make_caption(end_probability=None)
    assert cut.log_prob == pytest.approx(math.log(0.125)) and cut.confidence == pytest.approx(0.125**0.5)


def test_confidence_of_odd_captions_is_a_number():
    assert Caption("", (), (), np.zeros((0, 64)), 0.25).confidence == pytest.approx(0.25)
    impossible = Caption("a", ("a",), (0.0,), np.zeros((1, 64)), 1.0)
    assert -110 < impossible.log_prob < -100, "JSON has no infinity"


# As JSON and as text.


def test_to_json_has_what_is_known():
    caption = make_caption(alternatives=(make_caption(end_probability=None),))
    words = [{"word": "a", "probability": 0.5}, {"word": "dog", "probability": 0.25}]
    expected = {"caption": "a dog", "confidence": 0.3969, "log_prob": -2.773, "finished": True, "words": words}
    other = {"caption": "a dog", "confidence": 0.3536, "log_prob": -2.079, "finished": False, "words": words}
    assert caption.to_json() == {**expected, "alternatives": [other]}
    assert make_caption().to_json() == expected
    with_attention = caption.to_json(with_attention=True)
    for each in (with_attention, *with_attention["alternatives"]):
        assert [word["attention"] for word in each["words"]] == [[0.0156] * 64] * 2


def test_caption_is_short_where_a_notebook_shows_it():
    assert repr(make_caption()) == "<Caption 'a dog', confidence 0.40>"
