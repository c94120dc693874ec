import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import inference
import plots
import search
from common import InputError
from model import Encoded
from tokenizer import END, SPECIAL, START, Tokenizer

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
    tokens, _, _ = search.greedy_search(FakeCaptioner(AFTER), pictures(0, 3))
    assert tokens.numpy().tolist() == [[A, DOG, END], [END, 0, 0]]


class Markov(FakeCaptioner):
    """A model whose next word depends on the last one alone, with probabilities given by hand."""

    def __init__(self, table):
        table = np.where(table.sum(axis=1, keepdims=True) > 0, table, 1)  # words that are never said
        self.table = tf.math.log(tf.constant(table, tf.float32))  # (vocabulary, vocabulary)

    def step(self, token, state, encoded):
        # Looks at the location whose number is the last word's, so that looks can be told from those of others.
        return tf.gather(self.table, token), state + 1, tf.one_hot(token, 64)


def table(**rows):
    """Probabilities of the next words: <end>, a, dog, cat, runs."""
    result = np.zeros((8, 8))
    for word, row in rows.items():
        result[START if word == "start" else WORDS.ids[word], END:] = row
    return result


#                                <end>  a    dog  cat  runs
GARDEN = table(start=[0.0, 0.6, 0.0, 0.4, 0.0], a=[0.1, 0.0, 0.5, 0.4, 0.0], dog=[0.5, 0, 0, 0, 0.5])
GARDEN += table(cat=[0.9, 0, 0, 0, 0.1], runs=[1.0, 0, 0, 0, 0])


def test_beam_search_by_hand():
    """Greedy says "a dog" (0.6 * 0.5 * 0.5 = 0.15); "cat" (0.4 * 0.9 = 0.36) is more probable."""
    captions = lambda size, penalty: inference.caption_features(Markov(GARDEN), WORDS, pictures(0, 0), size, penalty)
    assert captions(1, 0.0)[0].text == "a dog"
    first, second = captions(2, 0.0)
    assert first.text == second.text == "cat" and first.ended
    np.testing.assert_allclose(first.probabilities, [0.4], rtol=1e-5)
    assert first.attention.argmax(axis=1).tolist() == [START]
    # With three places, "a cat" (0.6 * 0.4 * 0.9 = 0.216) is followed too. <end> counted, its mean log p is
    # log 0.216 / 3 = log 0.6, and that of "cat" is log 0.36 / 2 = log 0.6: above a penalty of 1 the longer one wins.
    longer = captions(3, 1.1)[0]
    assert longer.text == "a cat"
    np.testing.assert_allclose(longer.probabilities, [0.6, 0.4], rtol=1e-5)
    assert longer.attention.argmax(axis=1).tolist() == [START, A], "looks must follow the words to their new places"
    assert captions(3, 0.9)[0].text == "cat"


def test_a_caption_that_has_ended_keeps_its_place():
    """ "a" (0.3) stays although "a dog cat" and "a dog runs" (0.35) are more probable for a while."""
    after = table(start=[0, 1, 0, 0, 0], a=[0.3, 0, 0.7, 0, 0], dog=[0, 0, 0, 0.5, 0.5])
    after += table(cat=[0.2, 0.2, 0.2, 0.2, 0.2], runs=[0.2, 0.2, 0.2, 0.2, 0.2])
    assert inference.caption_features(Markov(after), WORDS, pictures(0), 2, 0.0)[0].text == "a"


def test_places_that_continue_nothing_are_free_again():
    """Only two words can come first, and six captions go on from them, of which the sixth wins."""
    after = table(start=[0, 0.6, 0, 0.4, 0], a=[0, 0.3, 0.3, 0.2, 0.2], cat=[0, 0.6, 0.4, 0, 0])
    after += table(dog=[0.5, 0, 0.5, 0, 0], runs=[1, 0, 0, 0, 0])
    assert inference.caption_features(Markov(after), WORDS, pictures(0), 6, 0.0)[0].text == "a runs"
    assert inference.caption_features(Markov(after), WORDS, pictures(0), 5, 0.0)[0].text == "a dog"


def exhaustive(probabilities, longest, penalty):
    """The best of all captions of up to `longest` words, <end> included; those that end come first."""
    best = (-np.inf, ())
    for length in range(1, longest + 1):
        for middle in itertools.product(range(END + 1, 8), repeat=length - 1):
            path = (START, *middle, END)
            with np.errstate(divide="ignore"):
                score = sum(np.log(probabilities[i, j]) for i, j in itertools.pairwise(path)) / length**penalty
            best = max(best, (score, path[1:]))
    return best[1]


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_a_beam_wide_enough_finds_the_best_of_all_captions(penalty):
    dice = np.random.default_rng(7)
    for _ in range(4):
        probabilities = np.zeros((8, 8))
        probabilities[2:, END:] = dice.dirichlet([0.5] * 5, size=6)
        tokens, _, _ = search.beam_search(Markov(probabilities), pictures(0), 400, penalty, max_words=4)
        row = tokens.numpy()[0]
        assert tuple(row[row > 0]) == exhaustive(probabilities, 4, penalty)


@pytest.fixture
def lively(small_model, dataset, cache):
    """Features of all pictures, and small_model with random weights so large that their captions differ."""
    for variable in small_model.trainable_variables:
        variable.assign(variable * 4)
    paths = [str(cache.path(example.image)) for example in dataset.examples]
    return cache.read(tf.constant(paths))


def test_a_beam_of_one_is_greedy(small_model, lively):
    greedy = search.greedy_search(small_model, lively)
    beam = search.beam_search(small_model, lively, 1, 0.7)
    assert len({tuple(row) for row in greedy[0].numpy()}) > 5
    np.testing.assert_array_equal(greedy[0], beam[0])
    real = greedy[0].numpy() > 0  # behind <end> nothing counts
    np.testing.assert_allclose(greedy[1][real], beam[1][real], rtol=1e-4)
    np.testing.assert_allclose(greedy[2][real], beam[2][real], rtol=1e-4, atol=1e-6)


def test_a_wider_beam_is_more_probable_and_the_same_in_any_batch(small_model, lively):
    log_p = lambda found: np.log(np.where(found[0] > 0, found[1], 1)).sum(axis=1)
    greedy, beam = search.greedy_search(small_model, lively), search.beam_search(small_model, lively, 5, 0.0)
    assert log_p(beam).mean() > log_p(greedy).mean() + 0.1
    alone = search.beam_search(small_model, lively[3:4], 5, 0.0)
    length = alone[0].shape[1]
    np.testing.assert_array_equal(alone[0][0], beam[0][3, :length])
    assert not beam[0].numpy()[3, length:].any()


def test_a_beams_probabilities_and_attention_are_those_of_teacher_forcing(small_model, lively):
    tokens, probabilities, looks = search.beam_search(small_model, lively, 5, 0.7)
    taught = small_model(lively, tf.pad(tokens, [[0, 0], [1, 0]], constant_values=START))
    sayable = tf.where(
        search.never_said(small_model.config.vocabulary_size), -np.inf, tf.gather(taught.logits, taught.beginning)
    )
    said = lambda values: tf.gather_nd(values, taught.place)
    expected = tf.gather(tf.nn.softmax(sayable), said(tokens), batch_dims=1)
    assert len(expected) == np.count_nonzero(tokens)
    np.testing.assert_allclose(said(probabilities), expected, rtol=1e-3)
    np.testing.assert_allclose(said(looks), taught.weights, rtol=1e-3, atol=1e-6)


def test_a_beam_that_never_ends_gives_its_best_so_far():
    endless = table(start=[0, 0.4, 0.6, 0, 0], a=[0, 1, 0, 0, 0], dog=[0, 0, 0.4, 0.6, 0], cat=[0, 0, 1, 0, 0])
    caption = inference.caption_features(Markov(endless), WORDS, pictures(0), 3)[0]
    assert len(caption.words) == search.MAX_WORDS and not caption.ended
    assert caption.words[:3] == ("a", "a", "a"), (
        "0.4 in all; greedy says dog, after which every way grows less and less probable"
    )
    ends = table(start=[0.001, 0.999, 0, 0, 0], a=[0, 1, 0, 0, 0])
    caption = inference.caption_features(Markov(ends), WORDS, pictures(0), 2)[0]
    assert caption.words == () and caption.ended, "a caption that has ended comes before one that has not"


def test_batches_and_single_pictures_agree(small_model, words, dataset, cache):
    paths = [str(cache.path(example.image)) for example in dataset.examples[:6]]
    values = cache.read(tf.constant(paths))
    together = inference.caption_features(small_model, words, values)
    alone = [inference.caption_features(small_model, words, values[i : i + 1])[0] for i in range(6)]
    assert [caption.text for caption in together] == [caption.text for caption in alone]


def test_enlarging_keeps_the_place_and_is_smooth():
    weights = np.zeros(64)
    weights[8 * 2 + 5] = 1  # row 2, column 5
    large = plots.enlarge(weights, (160, 80))
    assert large.shape == (80, 160)
    y, x = np.unravel_index(large.argmax(), large.shape)
    assert abs(y - 25) <= 2 and abs(x - 110) <= 2
    assert np.abs(np.diff(large, axis=1)).max() < 0.2 and large.min() >= 0, "8x8 blocks, or less than nothing"


@pytest.mark.parametrize(("size", "count"), [((300, 200), 3), ((40, 400), 1), ((800, 60), 20), ((100, 100), 0)])
def test_attention_plot_of_any_picture_and_caption(tmp_path, size, count):
    caption = inference.Caption(tuple("word" for _ in range(count)), (1.0,) * count, np.full((count, 64), 1 / 64), True)
    path = tmp_path / "new folder/a_attention.png"
    plots.plot_attention(Image.new("RGBA", size, "red"), caption, path)
    with Image.open(path) as plot:
        assert plot.format == "PNG" and min(plot.size) > 100


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plots_in_three_formats(tmp_path, kind, start):
    caption = search.Caption(("a", "$5 dog"), (0.9, 0.001), np.full((2, 64), 1 / 64), True)
    plots.plot_attention(Image.new("RGB", (60, 40)), caption, tmp_path / f"attention.{kind}")
    plots.plot_overview([(plots.thumbnail(Image.new("L", (9, 300))), "a dog " * 30)] * 7, tmp_path / f"grid.{kind}")
    for name in ("attention", "grid"):
        assert (tmp_path / f"{name}.{kind}").read_bytes().startswith(start)


def test_the_loss_plot_marks_the_best_epoch(tmp_path):
    columns = ("epoch", "train_loss", "val_loss", "bleu4", "cider")
    rows = [
        dict(zip(columns, row, strict=True)) for row in ((1, 4, 3, 5, 20), (2, 3, 2.5, 9, 31.4), (3, 2, 2.6, 8, 30))
    ]
    figure = plots.plot_history(rows, tmp_path / "loss.png")
    losses, scores = figure.axes
    assert losses.get_title() == "best: epoch 2, with CIDEr 31.4, BLEU-4 9.0"
    assert [line.get_label() for line in losses.lines[:2]] == ["training loss", "validation loss"]
    assert scores.lines[-1].get_xydata().tolist() == [[2, 31.4]]


def test_a_folder_names_its_pictures_but_not_their_plots(tmp_path):
    for name in ("b.JPG", "a.png", "a_attention.png", "notes.txt"):
        (tmp_path / name).touch()
    assert inference.pictures_of(str(tmp_path)) == [str(tmp_path / "a.png"), str(tmp_path / "b.JPG")]
    assert inference.pictures_of("https://example.com/photos/") == ["https://example.com/photos/"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: expected a folder with pictures"):
        inference.pictures_of(str(tmp_path / "empty"))
