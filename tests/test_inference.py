import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import inference
from model import Encoded
from tokenizer import END, SPECIAL, Tokenizer

WORDS = Tokenizer((*SPECIAL, "a", "dog", "cat", "runs"))
A, DOG, CAT, RUNS = range(4, 8)


class FakeCaptioner:
    """A model whose captions are known: each word has one most probable next word, which the picture can change.

    Always prefers <unk> to all others, which must never be said.
    """

    class config:
        vocabulary_size = 8

    class decoder:
        @staticmethod
        def initial_state(batch):
            return tf.zeros((batch, 1))

    def __init__(self, after):
        self.after = tf.constant(after)  # (pictures' kinds, vocabulary), the next word

    def encode(self, pictures):
        return Encoded(pictures, pictures)

    def step(self, token, state, encoded):
        kind = tf.cast(encoded.features[:, 0, 0], tf.int32)
        following = tf.gather_nd(self.after, tf.stack([kind, token], axis=1))
        logits = 3 * tf.one_hot(following, 8) + tf.one_hot([1] * 8, 8)[0] * 9
        weights = tf.one_hot(tf.cast(state[:, 0], tf.int32), 64)  # looks at location 0, then 1, ...
        return logits, state + 1, weights


def pictures(*kinds):
    return tf.ones((len(kinds), 64, 4)) * tf.constant(kinds, tf.float32)[:, None, None]


AFTER = [
    [0, 0, A, 0, DOG, END, 0, 0],  # <start> a dog <end>
    [0, 0, CAT, 0, 0, 0, RUNS, END],  # <start> cat runs <end>
    [0, 0, RUNS, 0, 0, 0, 0, RUNS],  # runs runs runs ...
    [0, 0, END, 0, 0, 0, 0, 0],  # <end> at once
]


def test_greedy_captions_known_by_hand():
    captions = inference.caption_features(FakeCaptioner(AFTER), WORDS, pictures(0, 1, 2, 3, 0))
    assert [caption.text for caption in captions] == ["a dog", "cat runs", "runs " * 49 + "runs", "", "a dog"]
    assert [caption.ended for caption in captions] == [True, True, False, True, True]
    assert all(c.attention.shape == (len(c.words), 64) and len(c.probabilities) == len(c.words) for c in captions)
    assert captions[0].attention.argmax(1).tolist() == [0, 1], "a word must be shown with its own step's attention"
    expected = np.exp(3) / (np.exp(3) + 4)  # of the five words that may be said
    np.testing.assert_allclose(captions[0].probabilities, expected, rtol=1e-5)


def test_decoding_stops_when_all_captions_have_ended():
    tokens, _, _ = inference.greedy_search(FakeCaptioner(AFTER), pictures(0, 3))
    assert tokens.numpy().tolist() == [[A, DOG, END], [END, 0, 0]]


def test_batches_and_single_pictures_agree(small_model, words, dataset, cache):
    paths = [str(cache.path(example.image)) for example in dataset.examples[:6]]
    values = tf.stack([cache.read(tf.constant(path)) for path in paths])
    together = inference.caption_features(small_model, words, values)
    alone = [inference.caption_features(small_model, words, values[i : i + 1])[0] for i in range(6)]
    assert [caption.text for caption in together] == [caption.text for caption in alone]


def test_enlarging_keeps_the_place_and_is_smooth():
    weights = np.zeros(64)
    weights[8 * 2 + 5] = 1  # row 2, column 5
    large = inference.enlarge(weights, (160, 80))
    assert large.shape == (80, 160)
    y, x = np.unravel_index(large.argmax(), large.shape)
    assert abs(y - 25) <= 2 and abs(x - 110) <= 2
    assert np.abs(np.diff(large, axis=1)).max() < 0.2 and large.min() >= 0, "8x8 blocks, or less than nothing"


@pytest.mark.parametrize(("size", "count"), [((300, 200), 3), ((40, 400), 1), ((800, 60), 20), ((100, 100), 0)])
def test_attention_plot_of_any_picture_and_caption(tmp_path, size, count):
    caption = inference.Caption(tuple("word" for _ in range(count)), (1.0,) * count, np.full((count, 64), 1 / 64), True)
    path = tmp_path / "new folder/a_attention.png"
    inference.plot_attention(Image.new("RGBA", size, "red"), caption, path)
    with Image.open(path) as plot:
        assert plot.format == "PNG" and min(plot.size) > 100
