import numpy as np
import pytest

from captioning.base.quiet_tensorflow import tf
from captioning.decoder.sampling import BLOCK, draw, image_keys, pick, random_numbers

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3], np.float32)  # most probable first: 1, 3, 2, 0
ALMOST_1 = np.nextafter(np.float32(1), np.float32(0))


def draw_many(numbers, temperature=1.0, top_p=1.0, probabilities=PROBABILITIES):
    with np.errstate(divide="ignore"):
        log_probs = np.tile(np.log(probabilities), (len(numbers), 1))
    return draw(tf.constant(log_probs), tf.constant(numbers, tf.float32), temperature, top_p).numpy().tolist()


def plain_draw(number, temperature, top_p):
    """What `draw` does, one word at a time."""
    weights = PROBABILITIES.astype(np.float64) ** (1 / temperature)
    weights /= weights.sum()
    order, kept = np.argsort(-weights) if top_p < 1 else range(len(weights)), []
    for word in order:
        kept.append(word)
        if sum(weights[kept]) >= top_p - 1e-6:
            break
    target, passed = number * sum(weights[kept]), 0.0
    for word in kept:
        passed += weights[word]
        if passed > target:
            return word
    return kept[-1]


def test_draw_takes_the_word_at_the_cumulative_probability():
    assert draw_many([0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, ALMOST_1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert draw_many([0.0, 0.56, 0.58, ALMOST_1], top_p=0.6) == [1, 1, 3, 3], "of the most probable words"


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.7, 0.95, 1.0])
def test_draw_equals_plain_loop(temperature, top_p, rng):
    numbers = rng.random(200, np.float32)
    assert draw_many(numbers, temperature, top_p) == [plain_draw(number, temperature, top_p) for number in numbers]


def test_pick_finds_the_word_in_any_block(rng):
    num_words = 3 * BLOCK + 7  # the last block is not full
    probabilities = np.where(rng.random((50, num_words)) < 0.3, 0, rng.random((50, num_words)))
    probabilities[0, :BLOCK] = 0  # an empty block
    numbers = np.linspace(0, 0.999, 50, dtype=np.float32)
    cumulative = np.cumsum(probabilities, axis=1)
    expected = (cumulative <= numbers[:, None] * cumulative[:, -1:]).sum(axis=1)
    np.testing.assert_array_equal(pick(tf.constant(probabilities, tf.float32), tf.constant(numbers)), expected)


def test_pick_takes_a_possible_word_however_the_sums_are_rounded(rng):
    probabilities = rng.random((4000, 2 * BLOCK)).astype(np.float32) ** 8
    probabilities[:, BLOCK - 9 :] = 0  # after the last possible word, in its block and in the next
    words = pick(tf.constant(probabilities), tf.fill([4000], ALMOST_1)).numpy()
    assert (probabilities[np.arange(4000), words] > 0).all()


def test_draw_never_takes_a_word_that_is_not_possible():
    probabilities = np.array([0.0, 0.5, 0.0, 0.5], np.float32)
    numbers = np.linspace(0, ALMOST_1, 101, dtype=np.float32)
    for top_p in (0.5, 0.9, 1.0):
        assert set(draw_many(numbers, top_p=top_p, probabilities=probabilities)) <= {1, 3}


def test_random_numbers_depend_on_seed_and_image_only():
    numbers = random_numbers(1, [5, 6, 5], 2, 4)
    assert numbers.shape == (6, 4) and numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_array_equal(numbers[:2], numbers[4:], "the same image")
    assert len(np.unique(numbers[:4])) == 16, "two captions of two images differ"
    np.testing.assert_array_equal(random_numbers(1, [5], 3, 4)[:2], numbers[:2], "more captions keep the first ones")
    assert not np.any(random_numbers(2, [5], 2, 4) == numbers[:2]), "another seed"
    assert random_numbers(1, [], 2, 4).shape == (0, 4)


def test_image_keys_tell_images_apart(rng):
    pixels = rng.integers(0, 256, (3, 5, 5, 3), np.uint8)
    pixels[2] = pixels[0]
    first, second, third = image_keys(pixels)
    assert first == third != second
