"""The rewards of self-critical training against pycocoevalcap, whose scores are of whole corpora of words."""

import contextlib
import io

import numpy as np
import pytest

from beyond.cider.rewards import CaptionReward
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID, START_ID

WORDS = 4 + np.arange(6)


def make_caption(rng, max_words=9):
    return [START_ID, *rng.choice(WORDS, rng.integers(0, max_words), p=[0.4, 0.3, 0.15, 0.05, 0.05, 0.05]), END_ID]


@pytest.fixture
def references(rng):
    """One to five reference captions of 30 images."""
    return [[make_caption(rng) for _ in range(rng.integers(1, 6))] for _ in range(30)]


@pytest.fixture
def captions(rng, references):
    """A caption of each image: a random one, some like a reference, one without <end>, one that is empty."""
    captions = [list(refs[0]) if i % 3 == 0 else make_caption(rng) for i, refs in enumerate(references)]
    captions[1], captions[2] = [START_ID, *WORDS[:3]], [START_ID, END_ID]
    return captions


def pad(captions):
    return tf.keras.utils.pad_sequences(captions, padding="post", value=PAD_ID)


def as_text(caption):
    return " ".join(map(str, caption[1:]))  # without <start>; <end> is a word


@pytest.fixture
def texts(references, captions):
    """The same for pycocoevalcap."""
    gts = {i: [as_text(caption) for caption in refs] for i, refs in enumerate(references)}
    return gts, {i: [as_text(caption)] for i, caption in enumerate(captions)}


def test_cider_d_equals_pycocoevalcap(references, captions, texts):
    from pycocoevalcap.cider.cider import Cider

    rewards = CaptionReward(references)(pad(captions), np.arange(len(captions)))
    expected = Cider().compute_score(*texts)[1]
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)
    assert 1 < rewards.max() <= 10
    assert rewards[2] < 1 < len(set(rewards))


def test_cider_of_other_images_has_the_frequencies_of_these(references, captions):
    reward = CaptionReward(references, bleu_weight=2.0)
    expected = CaptionReward(references)(pad(captions), np.arange(len(captions)))
    assert reward.cider(captions, references) == pytest.approx(100 * expected.mean(), rel=1e-5)


def test_bleu4_equals_pycocoevalcap(references, captions, texts):
    from pycocoevalcap.bleu.bleu import Bleu

    numbers = np.arange(len(captions))
    cider = CaptionReward(references)(pad(captions), numbers)
    rewards = CaptionReward(references, bleu_weight=2.0)(pad(captions), numbers)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = Bleu(4).compute_score(*texts, verbose=0)[1][3]
    np.testing.assert_allclose((rewards - cider) / 2, expected, rtol=1e-4, atol=1e-6)
    assert max(expected) == pytest.approx(1, abs=1e-3)


def test_a_caption_that_stops_in_mid_sentence_scores_less():
    sentence = [START_ID, 4, 5, 6, 7, 8, END_ID]
    reward = CaptionReward([[sentence], [[START_ID, 9, 9, END_ID]]])
    whole, without_end, cut = reward(pad([sentence, sentence[:-1], sentence[:-2]]), np.zeros(3, int))
    assert whole > without_end > cut > 0
