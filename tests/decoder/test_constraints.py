import numpy as np
import pytest

from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID, START_ID, UNK_ID
from captioning.decoder.constraints import Constraints, constrain, forbidden_tokens

A, DOG, CAT, RUNS = range(4, 8)
VOCAB_SIZE = 8
LOG_PROBS = np.log(np.full((1, VOCAB_SIZE), 1 / VOCAB_SIZE, np.float32))


def forbidden(history, constraints, log_probs=LOG_PROBS):
    """Returns the words that may not follow; all others must keep their log p."""
    result = constrain(tf.constant(log_probs), tf.constant([history], tf.int32), constraints).numpy()
    assert set(result[np.isfinite(result)]) <= set(log_probs[np.isfinite(log_probs)])
    return np.flatnonzero(np.isinf(result[0])).tolist()


def test_forbidden_tokens_are_those_that_no_caption_contains():
    assert np.flatnonzero(forbidden_tokens(VOCAB_SIZE)).tolist() == [PAD_ID, UNK_ID, START_ID]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], []),
        ([A], [A]),
        ([A, DOG, A], [A]),
        ([A, DOG, RUNS, A, DOG], [DOG, RUNS]),  # "a dog runs" is there
        ([A, DOG, RUNS, A, DOG, CAT, A, DOG], [DOG, CAT, RUNS]),  # both that followed "a dog"
        ([DOG, A, RUNS, A, DOG], [DOG]),  # "dog a" is not "a dog"
    ],
)
def test_constrain_forbids_repetitions(history, expected):
    assert forbidden(history, Constraints(no_repeat=True)) == expected
    assert forbidden(history, Constraints()) == []


def test_constrain_forbids_repetitions_in_each_caption_alone():
    log_probs = tf.constant(np.repeat(LOG_PROBS, 2, axis=0))
    result = constrain(log_probs, tf.constant([[A, DOG, RUNS, A, DOG], [A, CAT, RUNS, A, CAT]]), Constraints(0, True))
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in result.numpy()] == [[DOG, RUNS], [CAT, RUNS]]


def test_constrain_forbids_an_early_end():
    assert forbidden([A], Constraints(min_words=2)) == [END_ID]
    assert forbidden([A, DOG], Constraints(min_words=2)) == []


def test_constrain_lets_a_caption_end_that_cannot_go_on():
    only_dog_or_end = np.full((1, VOCAB_SIZE), -np.inf, np.float32)
    only_dog_or_end[0, [DOG, END_ID]] = np.log(0.5)
    others = [word for word in range(VOCAB_SIZE) if word not in (DOG, END_ID)]
    assert forbidden([A], Constraints(5, True), only_dog_or_end) == sorted([*others, END_ID])
    assert forbidden([DOG], Constraints(5, True), only_dog_or_end) == sorted([*others, DOG]), "it ends before 5 words"
