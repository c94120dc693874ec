import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import pytest

from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID, SPECIAL_TOKENS, START_ID, UNK_ID
from captioning.config.settings import DecodeConfig
from captioning.decoder.constraints import forbidden_tokens
from captioning.decoder.decoding import MAX_WORDS, beam_search, decode, expand_beams, greedy_search, sample_words
from captioning.decoder.sampling import random_numbers
from captioning.output.captions import to_captions
from inference import decode_captions
from tokenizer import Tokenizer

TOKENIZER = Tokenizer((*SPECIAL_TOKENS, "a", "dog", "cat", "runs"))
A, DOG, CAT, RUNS = range(4, 8)
VOCAB_SIZE = 8


class FakeImages(NamedTuple):
    features: tf.Tensor


class FakeModel:
    """A model whose captions are known: the first number of an image's features chooses its row of `next_word`.

    Its most probable word is always <unk>, which no caption may contain.
    """

    class config:
        vocab_size = VOCAB_SIZE

    def __init__(self, next_word):
        self.next_word = tf.constant(next_word)  # (captions, vocab_size), the word after each word

    def initial_state(self, images):
        return tf.zeros((tf.shape(images.features)[0], 1))  # counts the steps

    def encode(self, features):
        return FakeImages(features)

    def step(self, token, images, state):
        caption_index = tf.cast(images.features[:, 0, 0], tf.int32)
        following = tf.gather_nd(self.next_word, tf.stack([caption_index, token], axis=1))
        logits = 3 * tf.one_hot(following, VOCAB_SIZE) + 9 * tf.one_hot(UNK_ID, VOCAB_SIZE)
        attention_weights = tf.one_hot(tf.cast(state[:, 0], tf.int32), 64)  # location 0, then 1, ...
        return logits, state + 1, attention_weights


class BigramModel(FakeModel):
    """A model whose next word depends only on the previous one, with given probabilities."""

    def __init__(self, probabilities):
        is_possible = probabilities.sum(axis=1, keepdims=True) > 0
        probabilities = np.where(is_possible, probabilities, 1)  # the rows of words that never come before another
        with np.errstate(divide="ignore"):
            self.log_probs = tf.constant(np.log(probabilities), tf.float32)  # (vocab_size, vocab_size)

    def step(self, token, images, state):
        # The attention is on the location with the number of the previous word, which tells beams apart.
        return tf.gather(self.log_probs, token), state + 1, tf.one_hot(token, 64)


def make_features(*caption_indices):
    """Features of images that the model captions with these rows of `NEXT_WORD`."""
    return tf.ones((len(caption_indices), 64, 4)) * tf.constant(caption_indices, tf.float32)[:, None, None]


def bigram_table(**rows):
    """Probabilities of the next word, by previous word: of <end>, a, dog, cat and runs."""
    table = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    for word, row in rows.items():
        table[START_ID if word == "start" else TOKENIZER.word_index[word], END_ID:] = row
    return table


def caption(model, features, beam_size=1, length_penalty=1.0, **settings):
    return decode_captions(model, TOKENIZER, features, DecodeConfig(beam_size, length_penalty, **settings))


NEXT_WORD = [
    [0, 0, A, 0, DOG, END_ID, 0, 0],  # <start> a dog <end>
    [0, 0, CAT, 0, 0, 0, RUNS, END_ID],  # <start> cat runs <end>
    [0, 0, RUNS, 0, 0, 0, 0, RUNS],  # runs runs runs ...
    [0, 0, END_ID, 0, 0, 0, 0, 0],  # <end> at once
]


# Greedy search.


def test_greedy_search_matches_captions_known_by_hand():
    captions = caption(FakeModel(NEXT_WORD), make_features(0, 1, 2, 3, 0))
    assert [c.text for c in captions] == ["a dog", "cat runs", "runs " * 49 + "runs", "", "a dog"]
    assert [c.finished for c in captions] == [True, True, False, True, True]
    assert all(c.attention.shape == (len(c.words), 64) and len(c.probabilities) == len(c.words) for c in captions)
    assert captions[0].attention.argmax(1).tolist() == [0, 1], "a word has the attention of the step that predicts it"
    expected = np.exp(3) / (np.exp(3) + 4)  # of the five words that are not forbidden
    np.testing.assert_allclose(captions[0].probabilities, expected, rtol=1e-5)


def test_greedy_search_stops_when_all_captions_are_finished():
    tokens, probabilities, attention = greedy_search(FakeModel(NEXT_WORD), make_features(0, 3))
    assert tokens.numpy().tolist() == [[A, DOG, END_ID], [END_ID, PAD_ID, PAD_ID]]
    assert probabilities.shape == (2, 3) and attention.shape == (2, 3, 64)


# Beam search.


#                                       <end>  a    dog  cat  runs
BIGRAM_PROBS = bigram_table(start=[0.0, 0.6, 0.0, 0.4, 0.0], a=[0.1, 0.0, 0.5, 0.4, 0.0], dog=[0.5, 0, 0, 0, 0.5])
BIGRAM_PROBS += bigram_table(cat=[0.9, 0, 0, 0, 0.1], runs=[1.0, 0, 0, 0, 0])


@pytest.mark.slow
def test_beam_search_finds_more_probable_caption_than_greedy_search():
    """Greedy search returns "a dog" (0.6 * 0.5 * 0.5 = 0.15); "cat" (0.4 * 0.9 = 0.36) is more probable."""
    model, features = BigramModel(BIGRAM_PROBS), make_features(0, 0)
    assert caption(model, features, 1, 0.0)[0].text == "a dog"
    first, second = caption(model, features, 2, 0.0)
    assert first.text == second.text == "cat" and first.finished
    np.testing.assert_allclose(first.probabilities, [0.4], rtol=1e-5)
    assert first.attention.argmax(axis=1).tolist() == [START_ID]


def test_beam_search_length_penalty_matches_hand_computation():
    """Three beams also follow "a cat" (0.6 * 0.4 * 0.9 = 0.216).

    With <end>, its mean log p is log 0.216 / 3 = log 0.6, and that of "cat" is log 0.36 / 2 = log 0.6: the longer one
    wins with a penalty above 1.
    """
    model, features = BigramModel(BIGRAM_PROBS), make_features(0, 0)
    longer = caption(model, features, 3, 1.1)[0]
    assert longer.text == "a cat"
    np.testing.assert_allclose(longer.probabilities, [0.6, 0.4], rtol=1e-5)
    assert longer.attention.argmax(axis=1).tolist() == [START_ID, A], "the attention moves with its caption"
    assert caption(model, features, 3, 0.9)[0].text == "cat"


def test_beam_search_keeps_finished_captions():
    """ "a" (0.3) stays although "a dog cat" and "a dog runs" (0.35) are more probable before they are finished."""
    probabilities = bigram_table(start=[0, 1, 0, 0, 0], a=[0.3, 0, 0.7, 0, 0], dog=[0, 0, 0, 0.5, 0.5])
    probabilities += bigram_table(cat=[0.2, 0.2, 0.2, 0.2, 0.2], runs=[0.2, 0.2, 0.2, 0.2, 0.2])
    assert caption(BigramModel(probabilities), make_features(0), 2, 0.0)[0].text == "a"


def test_beam_search_refills_empty_beams():
    """There are only two first words, and six captions continue them, of which the sixth wins."""
    probabilities = bigram_table(start=[0, 0.6, 0, 0.4, 0], a=[0, 0.3, 0.3, 0.2, 0.2], cat=[0, 0.6, 0.4, 0, 0])
    probabilities += bigram_table(dog=[0.5, 0, 0.5, 0, 0], runs=[1, 0, 0, 0, 0])
    assert caption(BigramModel(probabilities), make_features(0), 6, 0.0)[0].text == "a runs"
    assert caption(BigramModel(probabilities), make_features(0), 5, 0.0)[0].text == "a dog"


def rank_captions(probabilities, max_words, length_penalty):
    """Returns score and ids of every possible caption of up to `max_words` words, <end> included, best first."""
    scored = []
    for length in range(1, max_words + 1):
        for middle in itertools.product(range(END_ID + 1, VOCAB_SIZE), repeat=length - 1):
            path = (START_ID, *middle, END_ID)
            with np.errstate(divide="ignore"):
                log_p = sum(np.log(probabilities[i, j]) for i, j in itertools.pairwise(path))
            scored.append((log_p / length**length_penalty, path[1:]))
    return sorted((row for row in scored if np.isfinite(row[0])), reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
def test_beam_search_equals_exhaustive_search(length_penalty):
    rng = np.random.default_rng(7)
    for _ in range(4):
        probabilities = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
        probabilities[START_ID:, END_ID:] = rng.dirichlet([0.5] * 5, size=6)
        tokens = beam_search(BigramModel(probabilities), make_features(0), 400, length_penalty, max_words=4).tokens
        row = tokens.numpy()[0]
        assert tuple(row[row > 0]) == rank_captions(probabilities, 4, length_penalty)[0][1]


def test_beam_search_without_finished_caption_returns_best_unfinished():
    endless = bigram_table(start=[0, 0.4, 0.6, 0, 0], a=[0, 1, 0, 0, 0], dog=[0, 0, 0.4, 0.6, 0], cat=[0, 0, 1, 0, 0])
    result = caption(BigramModel(endless), make_features(0), 3)[0]
    assert len(result.words) == MAX_WORDS and not result.finished
    assert result.words[:3] == ("a", "a", "a"), (
        "0.4 in all; greedy search begins with dog, after which every caption becomes less and less probable"
    )


def test_expand_beams_matches_hand_computation():
    scores = tf.math.log([[0.5, 0.4]])
    log_probs = tf.math.log([[[0.0, 0.1, 0.9], [0.0, 0.7, 0.3]]])  # the first word is <pad>
    expansion = expand_beams(scores, log_probs, tf.constant([[False, False]]))
    assert (expansion.parent.numpy().tolist(), expansion.token.numpy().tolist()) == ([[0, 1]], [[2, 1]])
    np.testing.assert_allclose(tf.exp(expansion.scores), [[0.45, 0.28]], rtol=1e-5)
    np.testing.assert_allclose(expansion.probabilities, [[0.9, 0.7]], rtol=1e-5)
    # A finished caption is kept and costs nothing, even if both continuations of the other are more probable.
    expansion = expand_beams(tf.math.log([[0.5, 0.01]]), log_probs, tf.constant([[False, True]]))
    assert (expansion.parent.numpy().tolist(), expansion.token.numpy().tolist()) == ([[1, 0]], [[PAD_ID, 2]])
    np.testing.assert_allclose(tf.exp(expansion.scores), [[0.01, 0.45]], rtol=1e-5)
    np.testing.assert_allclose(expansion.probabilities, [[1, 0.9]], rtol=1e-5)


# Several captions of an image.


def test_beam_search_returns_the_best_captions_in_order():
    model, length_penalty = BigramModel(BIGRAM_PROBS), 0.7
    tokens, probabilities, attention = beam_search(
        model, make_features(0, 0), 400, length_penalty, max_words=4, num_captions=5
    )
    expected = rank_captions(BIGRAM_PROBS, 4, length_penalty)[:5]
    for start in (0, 5):
        rows = [tuple(row[row > 0]) for row in tokens.numpy()[start : start + 5]]
        assert rows == [row for _, row in expected]
    for row, (score, token_ids) in zip(range(5), expected, strict=True):
        length = len(token_ids)
        log_prob = np.log(probabilities.numpy()[row, :length]).sum()
        np.testing.assert_allclose(log_prob / length**length_penalty, score, rtol=1e-4)
        assert attention.numpy()[row, :length].argmax(axis=1).tolist() == [START_ID, *token_ids[:-1]]


def test_beam_search_returns_finished_captions_first():
    probabilities = bigram_table(start=[0.001, 0.999, 0, 0, 0], a=[0, 1, 0, 0, 0])
    result = caption(BigramModel(probabilities), make_features(0), 2, captions=2)[0]
    assert (result.words, result.finished) == ((), True)
    assert [(len(each.words), each.finished) for each in result.alternatives] == [(MAX_WORDS, False)]


def test_beam_search_returns_fewer_captions_where_there_are_no_more():
    probabilities = bigram_table(start=[0, 1, 0, 0, 0], a=[0.75, 0, 0.25, 0, 0], dog=[1, 0, 0, 0, 0])
    first, second = caption(BigramModel(probabilities), make_features(0, 0), 4, captions=4)
    for result in (first, second):
        assert [each.text for each in (result, *result.alternatives)] == ["a", "a dog"]


def test_decode_widens_the_beam_to_the_number_of_captions():
    model, features = BigramModel(BIGRAM_PROBS), make_features(0)
    wide = decode(model, features, DecodeConfig(beam_size=3, captions=3))
    for actual, expected in zip(decode(model, features, DecodeConfig(captions=3)), wide, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert wide.tokens.shape[0] == 3


# With XLA, on a CPU.


def assert_equal_with_xla(model, features, config):
    """Compares a search that XLA compiles, whose results are not trimmed, with the plain one, which it returns."""
    plain, compiled = decode(model, features, config), decode(model, features, config, with_xla=True)
    num_steps = plain.tokens.shape[1]
    np.testing.assert_array_equal(compiled.tokens, np.pad(plain.tokens, ((0, 0), (0, config.max_words - num_steps))))
    mask = plain.tokens.numpy() != PAD_ID
    for actual, expected in zip(compiled[1:], plain[1:], strict=True):  # probabilities and attention
        assert actual.shape[1] == config.max_words
        np.testing.assert_allclose(actual[:, :num_steps][mask], expected[mask], rtol=1e-4, atol=1e-6)
    actual, expected = (to_captions(decoded, TOKENIZER, config.captions) for decoded in (compiled, plain))
    for one, other in zip(actual, expected, strict=True):
        assert (one.words, one.finished, one.attention.shape) == (other.words, other.finished, other.attention.shape)
        assert [each.words for each in one.alternatives] == [each.words for each in other.alternatives]
    return plain


@pytest.mark.slow
def test_greedy_search_with_xla_finds_captions_of_any_length():
    model, config = FakeModel(NEXT_WORD), DecodeConfig(max_words=6)
    plain = assert_equal_with_xla(model, make_features(0, 3, 1, 2), config)
    assert plain.tokens.numpy()[3].tolist() == [RUNS] * 6
    assert assert_equal_with_xla(model, make_features(0, 3, 1, 3), config).tokens.shape[1] == 3


@pytest.mark.slow
def test_beam_search_with_xla_moves_the_attention_with_its_caption():
    model, features = BigramModel(BIGRAM_PROBS), make_features(0, 0)
    for length_penalty, first_word in ((0.9, CAT), (1.1, A)):  # "cat", "a cat"
        plain = assert_equal_with_xla(model, features, DecodeConfig(3, length_penalty, captions=3, max_words=8))
        assert plain.tokens.numpy()[0, 0] == first_word and plain.tokens.shape[1] < 8
    endless = BigramModel(bigram_table(start=[0.001, 0.999, 0, 0, 0], a=[0, 1, 0, 0, 0]))
    plain = assert_equal_with_xla(endless, features, DecodeConfig(3, captions=3, max_words=4))
    assert plain.tokens.numpy()[:3].tolist() == [[END_ID, 0, 0, 0], [A, A, A, A], [0, 0, 0, 0]]


@pytest.mark.slow
def test_decode_searches_without_xla_what_it_cannot_compile():
    model, features = BigramModel(BIGRAM_PROBS), make_features(0, 0)
    for settings in ({"min_words": 2}, {"beam_size": 2, "no_repeat": True}, {"sample": True}):
        config = DecodeConfig(max_words=8, **settings)
        expected = decode(model, features, config).tokens
        np.testing.assert_array_equal(decode(model, features, config, with_xla=True).tokens, expected)


# Rules for captions.


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, 3])
def test_searches_obey_min_words(beam_size):
    model, features = FakeModel(NEXT_WORD), make_features(0, 3)
    plain, at_once = caption(model, features, beam_size)
    assert (plain.text, at_once.text) == ("a dog", "")
    for result in caption(model, features, beam_size, min_words=4):
        assert len(result.words) >= 4 and result.finished
    assert caption(model, features, beam_size, min_words=2)[0].text == "a dog"


@pytest.mark.slow
@pytest.mark.parametrize("search", [{}, {"beam_size": 3}, {"sample": True, "temperature": 0.01}])
def test_searches_obey_no_repeat(search):
    to_runs = [0.01, 0.1, 0.1, 0.1, 0.69]
    model = BigramModel(bigram_table(start=to_runs, a=to_runs, dog=to_runs, cat=to_runs, runs=to_runs))
    (plain,) = caption(model, make_features(0), **search, min_words=9)
    assert plain.words[:9] == ("runs",) * 9
    (result,) = caption(model, make_features(0), **search, min_words=9, no_repeat=True)
    words = result.words
    assert len(words) >= 9 and all(first != second for first, second in itertools.pairwise(words))
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    assert len(trigrams) == len(set(trigrams))


def test_probabilities_under_rules_are_the_models_own():
    model, features = FakeModel(NEXT_WORD), make_features(3)  # <end> at once
    (result,) = caption(model, features, min_words=1)
    np.testing.assert_allclose(result.probabilities, [1 / (np.exp(3) + 4)], rtol=1e-5)


# Random words.


def test_sample_words_has_the_frequencies_of_the_model():
    numbers = random_numbers(0, [1], 4000, 6)
    tokens, probabilities, _ = sample_words(BigramModel(BIGRAM_PROBS), make_features(0), numbers)
    tokens, probabilities = tokens.numpy(), probabilities.numpy()
    for word, probability in ((A, 0.6), (CAT, 0.4)):
        np.testing.assert_allclose(np.mean(tokens[:, 0] == word), probability, atol=0.03)
        np.testing.assert_allclose(probabilities[tokens[:, 0] == word, 0], probability, rtol=1e-5)
    after_a = tokens[tokens[:, 0] == A, 1]
    np.testing.assert_allclose(np.mean(after_a == DOG), 0.5, atol=0.04)


def test_decode_draws_the_same_words_for_the_same_seed_and_image():
    model, features = BigramModel(BIGRAM_PROBS), make_features(0, 0, 0)
    config = DecodeConfig(sample=True, captions=4)
    batch = decode(model, features, config, [7, 8, 9]).tokens.numpy()
    alone = decode(model, features[:1], config, [8]).tokens.numpy()
    np.testing.assert_array_equal(batch[4:8, : alone.shape[1]], alone)
    assert batch.shape[0] == 12 and len({tuple(row) for row in batch}) > 3
    other = decode(model, features, dataclasses.replace(config, decode_seed=1), [7, 8, 9]).tokens.numpy()
    assert not np.array_equal(batch[:, 0], other[:, 0]), "another seed gives other words"


def test_decode_draws_only_the_best_words_with_a_low_temperature_or_top_p():
    model, features = BigramModel(BIGRAM_PROBS), make_features(0)
    greedy = decode(model, features, DecodeConfig()).tokens.numpy()[0]
    for config in (
        DecodeConfig(sample=True, captions=9, top_p=0.01),
        DecodeConfig(sample=True, captions=9, temperature=0.01),
    ):
        tokens = decode(model, features, config).tokens.numpy()
        # After "a dog" the model has two words of the same probability, of which a low temperature leaves both.
        assert (tokens[:, :2] == greedy[:2]).all()


# All, with a real model.


@pytest.fixture
def diverse_model_and_features(small_model, dataset, cache):
    """small_model with weights so large that the captions of the images differ, and the features of the images."""
    for variable in small_model.trainable_variables:
        variable.assign(variable * 4)
    paths = [str(cache.path(example.image_path)) for example in dataset.examples]
    return small_model, cache.read(tf.constant(paths))


def test_beam_search_of_one_beam_equals_greedy_search(diverse_model_and_features):
    greedy = greedy_search(*diverse_model_and_features)
    beam = beam_search(*diverse_model_and_features, 1, 0.7)
    assert len({tuple(row) for row in greedy.tokens.numpy()}) > 5
    np.testing.assert_array_equal(greedy.tokens, beam.tokens)
    mask = greedy.tokens.numpy() > 0
    np.testing.assert_allclose(greedy.probabilities[mask], beam.probabilities[mask], rtol=1e-4)
    np.testing.assert_allclose(greedy.attention[mask], beam.attention[mask], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_beam_search_does_not_depend_on_the_rest_of_the_batch(diverse_model_and_features):
    model, features = diverse_model_and_features
    batch, alone = beam_search(model, features, 5, 0.0), beam_search(model, features[3:4], 5, 0.0)
    length = alone.tokens.shape[1]
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[3, :length])
    assert not batch.tokens.numpy()[3, length:].any()


@pytest.mark.slow
def test_beam_search_probabilities_and_attention_match_teacher_forcing(diverse_model_and_features):
    model, features = diverse_model_and_features
    tokens, probabilities, attention = beam_search(model, features, 5, 0.7)
    outputs = model(features, tf.pad(tokens, [[0, 0], [1, 0]], constant_values=START_ID))
    mask = tf.gather_nd(tokens, outputs.positions) != PAD_ID  # (N,)
    positions = tf.boolean_mask(outputs.positions, mask)
    logits = tf.where(forbidden_tokens(model.config.vocab_size), -np.inf, tf.boolean_mask(outputs.logits, mask))
    expected = tf.gather(tf.nn.softmax(logits), tf.gather_nd(tokens, positions), batch_dims=1)
    assert len(expected) == np.count_nonzero(tokens)
    np.testing.assert_allclose(tf.gather_nd(probabilities, positions), expected, rtol=1e-3)
    expected = tf.boolean_mask(outputs.attention_weights, mask)
    np.testing.assert_allclose(tf.gather_nd(attention, positions), expected, rtol=1e-3, atol=1e-6)
