import numpy as np
import pytest

from beyond.cider.rewards import CaptionReward
from beyond.cider.rewards import cider_d as plain_cider_d
from beyond.consensus.agreement import DocumentFrequencies, cider_d, find_ngrams


def draw_captions(rng, count, longest, vocab_size=12):
    """Captions of 0 to `longest` words, (count, longest), padded with 0; of so few words that n-grams repeat."""
    tokens = rng.integers(4, vocab_size, (count, longest))
    return np.where(np.arange(longest) < rng.integers(0, longest + 1, (count, 1)), tokens, 0)


def test_cider_d_equals_that_of_single_captions(rng):
    """pycocoevalcap's arithmetic, which `beyond.cider` has for one caption at a time, and is tested against it."""
    train, images = draw_captions(rng, 60, 9), np.repeat(np.arange(20), 3)
    plain = CaptionReward([[row[row > 0] for row in train[images == image]] for image in range(20)])
    frequencies = DocumentFrequencies.of(train, images)
    captions = draw_captions(rng, 7, 12, vocab_size=14)  # with words that no training caption has
    references = train[:40]
    captions[0, :6] = [4, 5, 4, 5, 4, 5]

    def weigh(row):
        return plain.weigh(row[row > 0].tolist())

    expected = [[plain_cider_d(weigh(caption), [weigh(row)]) for row in references] for caption in captions]
    actual = cider_d(captions, references, frequencies)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert actual.max() > 1


def test_document_frequencies_count_images_once():
    tokens = np.array([[4, 5, 4], [4, 5, 0], [4, 6, 0], [7, 0, 0]])
    frequencies = DocumentFrequencies.of(tokens, np.array([0, 0, 1, 2]))
    assert frequencies.num_images == 3
    unigrams = np.array([4, 5, 7, 9], np.uint64)
    weights = frequencies.weights(unigrams)
    np.testing.assert_allclose(weights, [np.log(3 / 2), np.log(3), np.log(3), np.log(3)], err_msg="9 is unknown")
    assert len(frequencies.codes) == 1, "only what several images have is kept"


@pytest.mark.parametrize("shape", [(0, 3), (2, 3)])
def test_captions_without_words_agree_with_none(shape):
    nothing = DocumentFrequencies.of(np.zeros((1, 1), np.int64), np.zeros(1, np.int64))
    assert not cider_d(np.zeros(shape, np.int64), np.array([[4, 5, 6]]), nothing).any()
    assert len(find_ngrams(np.zeros(shape, np.int64)).code) == 0
