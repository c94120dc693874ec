"""Features to words: the greedy search and the beam search, batched in the graph."""

import dataclasses

import model  # before TensorFlow, which it keeps quiet
import numpy as np
import tensorflow as tf

from tokenizer import END, PAD, START, UNK, Tokenizer

MAX_WORDS = 50  # a caption that has not ended by then is cut
LENGTH_PENALTY = 1.0  # captions compete by their mean log p


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption, and what led to it."""

    words: tuple[str, ...]
    probabilities: tuple[float, ...]  # of each word, given those before it
    attention: np.ndarray  # (number of words, 64), how much each word looked at each location; sums to 1
    ended: bool  # whether the model said <end>, or was cut after MAX_WORDS

    @property
    def text(self) -> str:
        """The words in one line."""
        return " ".join(self.words)


def never_said(vocabulary_size: int) -> tf.Tensor:
    """Which words no caption says: <pad>, <unk> and <start>; (vocabulary,) bool."""
    return tf.reduce_any(tf.one_hot([PAD, UNK, START], vocabulary_size, True, False), axis=0)


@tf.function(reduce_retracing=True)
def greedy_search(captioner: model.Captioner, pictures: tf.Tensor, max_words: int = MAX_WORDS) -> tuple[tf.Tensor, ...]:
    """The most probable word at every step, until <end>; never <pad>, <unk> or <start>.

    Args:
        captioner: the model.
        pictures: features, (B, 64, 2048).
        max_words: where a caption that does not end is cut.

    Returns:
        tokens (B, T), <end> included and padded with <pad>; their probabilities (B, T); attention weights
        (B, T, 64). T is at most `max_words`.
    """
    encoded = captioner.encode(pictures)
    batch = tf.shape(pictures)[0]
    token = tf.fill([batch], START)
    state = captioner.decoder.initial_state(batch)
    ended = tf.zeros([batch], tf.bool)
    never = never_said(captioner.config.vocabulary_size)
    tokens, probabilities, looks = (
        tf.TensorArray(kind, 0, dynamic_size=True) for kind in (tf.int32, tf.float32, tf.float32)
    )
    for t in tf.range(max_words):
        logits, state, weights = captioner.step(token, state, encoded)
        logits = tf.where(never, -np.inf, tf.cast(logits, tf.float32))  # (B, vocabulary)
        token = tf.where(ended, PAD, tf.argmax(logits, axis=1, output_type=tf.int32))  # (B,)
        tokens = tokens.write(t, token)
        probabilities = probabilities.write(t, tf.reduce_max(tf.nn.softmax(logits), axis=1))
        looks = looks.write(t, tf.cast(weights, tf.float32))
        ended |= token == END
        if tf.reduce_all(ended):
            break
    # Stacked by step, wanted by picture.
    swap = tf.experimental.numpy.swapaxes
    return swap(tokens.stack(), 0, 1), swap(probabilities.stack(), 0, 1), swap(looks.stack(), 0, 1)


def best_continuations(scores: tf.Tensor, log_p: tf.Tensor, ended: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The K most probable captions that are one word longer than K others.

    Args:
        scores: (B, K), log p of the captions.
        log_p: (B, K, vocabulary), of their next words.
        ended: (B, K) bool. Such a caption has one continuation, <pad>, which costs nothing and which nothing can
            push out.

    Returns:
        All (B, K): which caption each continues, its new word, log p of the whole, and p of the word.
    """
    batch, (beam_size, vocabulary) = tf.shape(log_p)[0], log_p.shape[1:]
    padding = tf.one_hot(PAD, vocabulary, 0.0, -np.inf)
    log_p = tf.where(ended[:, :, tf.newaxis], padding, log_p)  # (B, K, vocabulary)
    total = scores[:, :, tf.newaxis] + log_p
    order = tf.where(ended[:, :, tf.newaxis] & (padding == 0), np.inf, total)
    _, best = tf.math.top_k(tf.reshape(order, [batch, -1]), beam_size)  # (B, K) of K * vocabulary
    of_best = lambda tensor: tf.gather(tf.reshape(tensor, [batch, -1]), best, batch_dims=1)
    return best // vocabulary, best % vocabulary, of_best(total), tf.exp(of_best(log_p))


@tf.function(reduce_retracing=True)
def beam_search(
    captioner: model.Captioner,
    pictures: tf.Tensor,
    beam_size: int,
    length_penalty: float = LENGTH_PENALTY,
    max_words: int = MAX_WORDS,
) -> tuple[tf.Tensor, ...]:
    """The best of the most probable captions that were followed at the same time, `beam_size` of them.

    At every step each unfinished caption is continued by every word, and the most probable continuations are
    kept. A caption that says <end> keeps its place, so that fewer go on. In the end the one with the largest
    log p(caption) / length ** length_penalty wins, <end> counted in the length: 0 prefers short captions,
    1 takes the mean over the words. A picture none of whose captions has ended gives its best so far.

    Args:
        captioner: the model.
        pictures: features, (B, 64, 2048).
        beam_size: K in the comments; 1 gives the greedy caption.
        length_penalty: see above.
        max_words: where a caption that does not end is cut.

    Returns:
        What `greedy_search` returns.
    """
    vocabulary, batch = captioner.config.vocabulary_size, tf.shape(pictures)[0]
    never = never_said(vocabulary)
    # The captions of a picture lie beside each other in one batch of B * K.
    encoded = model.Encoded(*(tf.repeat(tensor, beam_size, axis=0) for tensor in captioner.encode(pictures)))
    state = captioner.decoder.initial_state(batch * beam_size)  # (B * K, 512)
    locations = encoded.features.shape[1]
    first = tf.one_hot(0, beam_size, 0.0, -np.inf)  # at first there is one caption, the empty one
    scores = tf.tile(first[tf.newaxis], [batch, 1])  # (B, K), log p of the words so far
    ended = tf.zeros([batch, beam_size], tf.bool)
    token = tf.fill([batch, beam_size], START)
    tokens = tf.zeros([batch, beam_size, 0], tf.int32)
    probabilities = tf.zeros([batch, beam_size, 0])
    looks = tf.zeros([batch, beam_size, 0, locations])
    growing = tf.TensorShape([None, beam_size, None])  # by a word in every step
    for _ in tf.range(max_words):
        tf.autograph.experimental.set_loop_options(
            shape_invariants=[
                (tensor, tf.TensorShape([None, *tensor.shape[1:]])) for tensor in (state, token, scores, ended)
            ]
            + [(tokens, growing), (probabilities, growing), (looks, growing.concatenate(locations))]
        )
        logits, state, look = captioner.step(tf.reshape(token, [-1]), state, encoded)
        logits = tf.where(never, -np.inf, tf.cast(logits, tf.float32))
        log_p = tf.reshape(tf.nn.log_softmax(logits), [batch, beam_size, vocabulary])
        parent, token, scores, p = best_continuations(scores, log_p, ended)  # each (B, K)
        real = scores > -np.inf  # with few words to say, some of the K continue nothing
        ended = (tf.gather(ended, parent, batch_dims=1) | (token == END)) & real
        # What belongs to a caption follows it to its new place.
        tokens = tf.concat([tf.gather(tokens, parent, batch_dims=1), token[:, :, tf.newaxis]], axis=2)
        probabilities = tf.concat([tf.gather(probabilities, parent, batch_dims=1), p[:, :, tf.newaxis]], axis=2)
        look = tf.reshape(tf.cast(look, tf.float32), [batch, beam_size, 1, locations])
        looks = tf.gather(tf.concat([looks, look], axis=2), parent, batch_dims=1)
        place = tf.range(batch)[:, tf.newaxis] * beam_size + parent  # (B, K), in the batch of B * K
        state = tf.gather(state, tf.reshape(place, [-1]))
        if tf.reduce_all(ended | ~real):
            break
    lengths = tf.reduce_sum(tf.cast(tokens != PAD, tf.float32), axis=2)  # (B, K)
    final = scores / lengths**length_penalty
    done = tf.reduce_any(ended, axis=1, keepdims=True)
    winner = tf.argmax(tf.where(done & ~ended, -np.inf, final), axis=1)  # (B,)
    return tuple(tf.gather(tensor, winner, batch_dims=1) for tensor in (tokens, probabilities, looks))


def caption_features(
    captioner: model.Captioner,
    words: Tokenizer,
    pictures: tf.Tensor,
    beam_size: int = 1,
    length_penalty: float = LENGTH_PENALTY,
) -> list[Caption]:
    """Captions a batch of features, (B, 64, 2048): greedily, or with a beam of more than one."""
    if beam_size == 1:
        found = greedy_search(captioner, pictures)
    else:
        found = beam_search(captioner, pictures, beam_size, length_penalty)
    captions = []
    for row, probability, look in zip(*(tensor.numpy() for tensor in found), strict=True):
        ended = END in row
        length = int(np.argmax(row == END)) if ended else len(row)
        captions.append(
            Caption(
                tuple(words.words[i] for i in row[:length]),
                tuple(map(float, probability[:length])),
                look[:length],
                ended,
            )
        )
    return captions
